"""逐格去做一个比较的计划：备好数据，几个格子并行，随时可以打断再接着。"""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.comparison.cells import base_path, choose_rows, read_rows_any, run_cell, start_worker
from finetune.comparison.data import prepare_task, split_text, without_near
from finetune.comparison.plan import Cell, cell_of, list_cells, next_cell, read_plan, replay_cell
from finetune.terminal import note
from utils import read_json, replacing, try_lock, write_json

ROOT = Path(__file__).resolve().parents[2]
# 试跑与正式的格子在前一个文件里，基座、重放与核对在后一个里
RESULTS, EXTRAS = "results.jsonl", "extras.jsonl"
KEYS = {"stage", "task", "method", "seed"}
FINAL_KEYS = {"score", "ci_low", "ci_high", "learning_rate", "tokens", "losses", "per_row", "forgetting"}


def load_rows(path: Path, repair: bool = False) -> list[dict[str, Any]]:
    """读 JSON 行，略去末尾写了一半的一行（当时被杀）；repair 时把它从文件里删去，只在占住目录时可以。

    Raises:
        ValueError: 中间有坏了的行。
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        note(f"{path} 的末行只写了一半（当时被杀），不算，它的格子要重做")
        if repair:
            with replacing(path, "wb") as stream:
                stream.write(complete)
    rows = []
    for number, line in enumerate(complete.decode("utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: 不是合法的 JSON（{error}），请删去这一行再运行") from error
        missing = KEYS - rows[-1].keys() if isinstance(rows[-1], dict) else KEYS
        if not missing and rows[-1]["stage"] == "final":
            missing = FINAL_KEYS - rows[-1].keys()
        if missing:
            named = "、".join(sorted(missing))
            raise ValueError(f"{path}:{number}: 不是一个格子的结果（缺 {named}），请删去这一行再运行")
    return rows


def load_results(output_dir: Path, repair: bool = False) -> list[dict[str, Any]]:
    """全部做完的格子；repair 见 load_rows。"""
    return [row for name in (RESULTS, EXTRAS) for row in load_rows(output_dir / name, repair)]


def record(output_dir: Path, row: dict[str, Any]):
    """记下一个做完的格子，刷到磁盘：随时被杀，至多少了末尾的一行。"""
    path = output_dir / (RESULTS if row["stage"] in ("sweep", "final") else EXTRAS)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def held(output_dir: Path) -> Iterator[None]:
    """占住 output_dir：两个比较写同一个目录会互相打乱；随进程结束自动放开。"""
    descriptor = os.open(output_dir, os.O_RDONLY | os.O_DIRECTORY)
    if not try_lock(descriptor):
        os.close(descriptor)
        raise ValueError(f"--output_dir {output_dir} 正被另一个比较使用，请等它结束或换一个目录")
    try:
        yield
    finally:
        os.close(descriptor)


def stop_orphans(work: Path):
    """杀掉上一次被杀的比较留下的训练：命令行里有这个 work 目录的 python 进程。"""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            is_ours = b"python" in os.path.basename(words[0]) and int(process.name) != os.getpid()
            if is_ours and any(word.startswith(os.fsencode(f"{work}/")) for word in words):
                os.kill(int(process.name), signal.SIGKILL)


def prepare(plan: dict[str, Any], output_dir: Path, build_base: Callable[[dict, Path], dict]) -> dict[str, Any]:
    """拆数据、核对泄漏、预训练基座、取训练行；已经备好的不再做 → 数据的说明（data.json）。

    只有说明与结果、没有数据与基座的目录（提交的那一份），重新备出来，同样才接着做。

    Raises:
        ValueError: 目录里是另一个计划的结果，或重新备出的数据或基座与说明不同，或数据不够分，或有泄漏。
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    kept = output_dir / "plan.json"
    if kept.is_file() and read_plan(kept) != plan:
        raise ValueError(f"{kept} 是另一个计划，它的结果不能接着用；请换一个 --output_dir，或先移走这个目录")
    write_json(kept, plan)
    work = output_dir / "work"
    stop_orphans(work)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    described, data = output_dir / "data.json", output_dir / "data"
    known = read_json(described) if described.is_file() else None
    if known is not None and data.is_dir() and base_path(plan, output_dir).is_dir():
        if isinstance(plan["base"], str) and "base" in known and known["base"] != build_base(plan, output_dir):
            raise ValueError(f"基座 {plan['base']} 的文件变了，已有的结果不能接着用；请改回来，或换一个 --output_dir")
        return known
    facts: dict[str, Any] = {"precision": chosen_precision(plan)}
    facts |= {task["name"]: prepare_task(task, plan["split_seed"], data / task["name"]) for task in plan["tasks"]}
    training, held_out = split_text(ROOT / plan["general_path"], plan["held_out_chars"])
    tests = [row["input"] for task in plan["tasks"] for row in read_rows_any(data / task["name"] / "test.json")]
    training = without_near([line for line in training if line], tests)
    for name, lines in (("general_train", training), ("general_test", held_out)):
        (data / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts["base"] = build_base(plan, output_dir)
    for task, chosen in choose_rows(plan, output_dir).items():
        facts[task] |= chosen
    if known is not None and facts != known:
        names = "、".join(name for name in {**known, **facts} if known.get(name) != facts.get(name))
        shutil.rmtree(data)  # 下一次不能当作已经备好
        raise ValueError(f"重新备出的 {names} 与 {described} 记着的不同，已有的结果不能接着用；请换一个 --output_dir")
    write_json(described, facts)
    return facts


def chosen_precision(plan: dict[str, Any]) -> str:
    """全部格子共用的计算精度，只定一次：train_flags 里写的，没有写时由设备决定。"""
    from finetune.process.precision import choose_precision

    words = [str(word) for word in plan["train_flags"]]
    requested = words[words.index("--precision") + 1] if "--precision" in words else "auto"
    return choose_precision(requested)[0]


def compare(plan: dict[str, Any], output_dir: Path, jobs: int, predict: Callable[[list[str]], int]):
    """做完全部格子，jobs 个并行；一个格子失败就停下，已做完的都在。predict 是 predict.py 的 main。"""
    results = load_results(output_dir, repair=True)
    num_extra = plan["replay"] is not None
    num_cells = len(list_cells(plan, results)) + num_extra
    bar = tqdm(total=num_cells, initial=len(results), desc="比较", unit="格", dynamic_ncols=True, disable=None)
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker, (output_dir / "work",))
    running: dict[Future, Cell] = {}
    try:
        with bar:
            while True:
                while len(running) < jobs and (found := next_cell(plan, results, set(running.values()))):
                    cell, rate = found
                    running[pool.submit(run_cell, plan, cell, rate, output_dir, predict)] = cell
                if not running:
                    break
                bar.set_postfix_str("，".join(cell.name for cell in running.values()))
                done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                bar.refresh()
                for future in done:
                    cell = running.pop(future)
                    results.append(future.result() | {"jobs": jobs})
                    record(output_dir, results[-1])
                    bar.total = len(list_cells(plan, results)) + num_extra  # 试跑的范围会往外伸
                    bar.update()
                    tqdm.write(f"[{len(results)}/{bar.total}] {describe(cell, results[-1])}")
    except BrokenProcessPool as error:
        raise RuntimeError(f"工作进程意外退出（多半是内存不足），请减少 --jobs（现在 {jobs}）后再次运行") from error
    finally:
        workers = list((pool._processes or {}).values())
        if running:
            for worker in workers:
                worker.kill()
            stop_orphans(output_dir / "work")
        pool.shutdown(wait=True, cancel_futures=True)
    expected = {*list_cells(plan, results), *filter(None, [replay_cell(plan, results)])}
    assert {cell_of(row) for row in results} >= expected, "还有没做的格子，却没有可以开始的"


def describe(cell: Cell, row: dict[str, Any]) -> str:
    """一个做完的格子的一行说明。"""
    if cell.stage == "sweep" and row["score"] is None:
        return f"{cell.name}：损失成了 NaN，这个学习率太大"
    if row["score"] is None:
        scores = [f"{name} {entry['test_score']:.3f}" for name, entry in row["forgetting"]["other_tasks"].items()]
        return f"{cell.name}：{'，'.join(scores)}"
    forgetting = row["forgetting"]
    return (
        f"{cell.name}：{row['metric']} {row['score']:.4f}［{row['ci_low']:.4f}，{row['ci_high']:.4f}］，"
        f"学习率 {row['learning_rate']:g}，{row['seconds']:.0f} 秒，{row['tokens_per_second']:.0f} token/s，"
        f"通用 NLL {forgetting['general_nll_before']:.3f} → {forgetting['general_nll_after']:.3f}"
    )
