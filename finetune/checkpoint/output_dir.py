"""output_dir 的一生：占住、上一次的结果移走、检查点的查找、轮换与清理。"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from finetune.terminal import note
from utils import first_free, log_rank_0, read_json, try_lock

CHECKPOINT_NAME = re.compile(r"^epoch-(\d+)-step-(\d+)$")
RUN_CONFIG = "run_config.json"
ADAPTER_CONFIG = "adapter_config.json"
BEST_FILE = "best.json"
TEMPORARY_PREFIX = ".tmp-"
# 一次训练留在 output_dir 里的东西：再次运行时移走的只有这些
RUN_RESULTS = ("train_log.jsonl", "loss.png", RUN_CONFIG, "ds_config.json", "runs", "bad_steps")
RUN_RESULTS += (BEST_FILE, "forgetting.json", "summary.json")


def checkpoint_name(epoch: int, step: int) -> str:
    """第 epoch 轮（从 1 起）、第 step 个优化器步的检查点的目录名。"""
    return f"epoch-{epoch}-step-{step}"


def iter_checkpoints(output_dir: Path) -> Iterator[tuple[int, int, Path]]:
    """output_dir 下的检查点，从新到旧：(step, epoch, 目录)。"""
    found = []
    for path in output_dir.iterdir() if output_dir.is_dir() else []:
        match = CHECKPOINT_NAME.match(path.name)
        if match and path.is_dir():
            found.append((int(match[2]), int(match[1]), path))
    yield from sorted(found, reverse=True)


def checkpoints_below(path: Path, name: str = "config.json") -> str:
    """目录下面有 name 的几个，括号里的一句；没有时为空（中间检查点的目录、下载工具的缓存的上层）。"""
    patterns = (f"*/{name}", f"snapshots/*/{name}", f"*/snapshots/*/{name}")
    found = [str(file.parent) for pattern in patterns for file in sorted(path.glob(pattern))]
    return f"（它下面的 {'、'.join(found[:3])} 里有）" if found else ""


def adapter_problem(flag: str, path: Path, whole_flag: str) -> str | None:
    """flag 给出的 path 不是适配器时说缺什么、该给什么，whole_flag 是完整的模型该用的参数；是适配器时 None。"""
    if (path / ADAPTER_CONFIG).is_file():
        return None
    below = checkpoints_below(path, ADAPTER_CONFIG)
    whole = f"；它是完整的模型，请用 {whole_flag}" if (path / "config.json").is_file() else ""
    return f"{flag} {path} 里没有 {ADAPTER_CONFIG}{below}，请给出 lora 或 ptuning 的检查点目录{whole}"


def check_directory(path: Path) -> None:
    """检查点必须是目录，且有 config.json 或适配器配置；否则抛 ValueError，说明应该给什么。"""
    if not path.is_dir():
        what = "不是目录" if path.exists() else "不存在"
        raise ValueError(f"检查点 {path} {what}，请给出检查点目录，例如 output/epoch-1-step-40")
    if path.resolve().name.startswith(TEMPORARY_PREFIX):
        raise ValueError(f"检查点 {path} 是没有写完的检查点，请换一个名字不以 {TEMPORARY_PREFIX} 开头的目录")
    if not any((path / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        below = checkpoints_below(path)
        raise ValueError(
            f"检查点 {path} 里没有 config.json{below}，也没有 {ADAPTER_CONFIG}；请给出检查点目录或训练的输出目录"
        )


def choose_checkpoint(path: str | Path, is_told: bool = True) -> Path:
    """训练的输出目录 → best.json 所指的检查点，没有它时是最新的一个，并说是哪个；别的目录原样返回。

    Raises:
        ValueError: 见 check_directory。
    """
    path = Path(path)
    newest = next((checkpoint for _, _, checkpoint in iter_checkpoints(path)), None)
    if newest is None:
        check_directory(path)
        return path
    best = read_json(path / BEST_FILE) if (path / BEST_FILE).is_file() else {}
    chosen, why = newest, "最新的一个"
    if (path / str(best.get("checkpoint"))).is_dir() and best.get("checkpoint"):
        chosen, why = path / best["checkpoint"], f"最好的一个：{best['metric']} {best['score']:.4f}"
    if is_told:
        note(f"{path} 是训练的输出目录，用其中的 {chosen.name}（{why}）")
    return chosen


def remove_leftovers(output_dir: Path):
    """删去上次被打断的保存留下的 .tmp- 目录。"""
    for path in output_dir.glob(f"{TEMPORARY_PREFIX}*"):
        log_rank_0(f"删除上次没有写完的 {path}")
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def rotate_checkpoints(output_dir: Path, limit: int, best: str | None):
    """只留最新的 limit 个检查点（0 为不限）；最好的（目录名 best）与最新的总是留下。只在 0 号进程调用。"""
    newest_first = [path for _, _, path in iter_checkpoints(output_dir)]
    kept = {path.name for path in newest_first[:1]} | ({best} & {path.name for path in newest_first})
    kept |= {path.name for path in [p for p in newest_first if p.name not in kept][: max(0, limit - len(kept))]}
    for path in newest_first if limit else ():
        if path.name in kept:
            continue
        try:
            doomed = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")  # 先改名：看得见的检查点总是完整的
            os.rename(path, doomed)
            shutil.rmtree(doomed)
            log_rank_0(f"已删除旧的 {path}（--save_total_limit {limit}）")
        except OSError as error:
            log_rank_0(f"删不掉旧的 {path}：{error.strerror}，请手工删除")


def set_aside_previous_run(output_dir: Path, after_step: int | None = None):
    """把 output_dir 里上一次训练的结果（只是我们写的那些）移进 previous-N/，不覆盖任何东西。

    after_step: 续训的起点；此时只移走这一步之后的检查点，日志留下。
    """
    results = [path for step, _, path in iter_checkpoints(output_dir) if after_step is None or step > after_step]
    if after_step is None:
        results += [output_dir / name for name in RUN_RESULTS if (output_dir / name).exists()]
    if not results:
        return
    number = first_free(lambda n: (output_dir / f"previous-{n}").exists())
    target = output_dir / f"previous-{number}"
    target.mkdir()
    for path in results:
        os.rename(path, target / path.name)
    log_rank_0(f"{output_dir} 里已有的 {'、'.join(sorted(path.name for path in results))} 移到了 {target}")


# 占着的 output_dir 的文件描述符，见 hold_output_dir
_held: list[int] = []


def hold_output_dir(output_dir: Path, wait_seconds: float = 60.0):
    """占住 output_dir，直到进程结束或占别的目录：两个训练写同一个目录会互相损坏。

    被打断的训练可能还在保存（启动器先死了），所以等它一会儿；flock 随进程结束自动放开，不留文件。

    Raises:
        ValueError: 等了 wait_seconds 秒，仍有另一个训练在用。
    """
    while _held:
        os.close(_held.pop())
    descriptor = os.open(output_dir, os.O_RDONLY | os.O_DIRECTORY)
    deadline, is_told = time.monotonic() + wait_seconds, False
    while not try_lock(descriptor):
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise ValueError(f"--output_dir {output_dir} 正被另一个训练使用，请等它结束、结束它，或换一个目录")
        if not is_told:
            log_rank_0(f"{output_dir} 正被另一个训练使用（也许还在保存），最多等 {wait_seconds:.0f} 秒")
            is_told = True
        time.sleep(0.2)
    _held.append(descriptor)
