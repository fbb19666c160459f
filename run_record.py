"""一次训练的记录与 output_dir：写下足以重现与续训的一切，决定从头开始还是接着训练。"""

import errno
import fcntl
import os
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import deepspeed
import peft
import torch
import transformers

from checkpoint import CHECKPOINT_NAME, file_sha256, remove_leftovers, set_aside_previous_run
from finetune.data.mixture import describe_sources, parse_sources
from prompting import Prompting
from resume import check_same_run, find_resume_point
from utils import broadcast_from_rank_0, log_rank_0, raise_together, world_size

HASHED_SUFFIXES = (".json", ".model", ".bin", ".safetensors")
# 占着的 output_dir 的文件描述符，见 hold_output_dir
_held: list[int] = []


class ResumePoint(NamedTuple):
    """续训的起点。"""

    directory: Path
    step: int


def describe_run(args: Namespace, prompting: Prompting, ds_config: dict, precision: str) -> dict:
    """run_config.json 的内容：预测、合并、导出与续训由此知道一切，不必再输入一遍。

    基座的每个文件与数据文件都记下 SHA-256；几个文件并行计算。
    """
    base = Path(args.model_name_or_path)
    hashed = [path for path in sorted(base.iterdir()) if path.suffix in HASHED_SUFFIXES and path.is_file()]
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip([path.name for path in hashed], pool.map(file_sha256, hashed), strict=True))
    data = {name: getattr(args, f"{name}_path") for name in ("eval", "general", "replay")}
    data = {name: file_sha256(Path(path)) for name, path in data.items() if path is not None}
    data["train"] = describe_sources(parse_sources(args.train_path), lambda path: file_sha256(Path(path)))
    if args.val_ratio is not None:
        data["eval"] = [data["train"], args.val_ratio, args.seed]  # 评估集由它们决定
    return {
        "args": {name: value for name, value in vars(args).items() if name not in ("given", "local_rank", "dry_run")},
        "train_type": args.train_type,
        **prompting._asdict(),
        "precision": precision,
        "ds_file": ds_config,
        "global_batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size(),
        "world_size": world_size(),
        "base_model": {"path": args.model_name_or_path, "absolute_path": str(base.resolve()), "hashes": hashes},
        "data": data,
        "versions": {module.__name__: module.__version__ for module in (torch, deepspeed, transformers, peft)},
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def open_run(args: Namespace, run_config: dict) -> ResumePoint | None:
    """备好 output_dir，返回续训的起点（从头开始为 None）；集合操作，文件只由 0 号进程动。

    写到一半的 .tmp- 删去；从头开始时上一次的结果移进 previous-N/，续训时只移走起点之后的检查点。

    Raises:
        ValueError: output_dir 不能写、正被别的训练使用，或续训会成为另一次训练。
    """

    def prepare() -> str | None:
        output_dir = Path(args.output_dir)
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            if not os.access(output_dir, os.W_OK | os.X_OK):  # 只读的文件系统，root 也写不了
                raise PermissionError(errno.EACCES, "没有写权限，或文件系统是只读的")
            hold_output_dir(output_dir)
            remove_leftovers(output_dir)
            directory = find_resume_point(args.resume, output_dir)
            if directory is not None:
                check_same_run(directory, args, run_config)
            is_here = directory is not None and directory.parent.resolve() == output_dir.resolve()
            set_aside_previous_run(output_dir, after_step=step_of(directory) if is_here else None)
        except OSError as error:
            raise ValueError(
                f"--output_dir {output_dir} 不能写：{error.strerror}，请换一个目录或检查权限与磁盘"
            ) from error
        return None if directory is None else str(directory)

    found = broadcast_from_rank_0(prepare)
    if found is None:
        return None
    directory, error = Path(found), None
    try:
        check_same_run(directory, args, run_config)
    except ValueError as raised:  # 别的机器看不到这个目录：output_dir 须在共享的文件系统上
        error = raised
    raise_together(error)
    return ResumePoint(directory, step_of(directory))


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
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise ValueError(
                    f"--output_dir {output_dir} 正被另一个训练使用，请等它结束、结束它，或换一个目录"
                ) from error
        except OSError:
            break  # 这个文件系统不能给目录加锁（如 NFS）
        if not is_told:
            log_rank_0(f"{output_dir} 正被另一个训练使用（也许还在保存），最多等 {wait_seconds:.0f} 秒")
            is_told = True
        time.sleep(0.2)
    _held.append(descriptor)


def step_of(directory: Path) -> int:
    """检查点目录名里的步数。"""
    return int(CHECKPOINT_NAME.match(directory.name)[2])
