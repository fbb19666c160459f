"""与模型和样本都无关的小工具：按 rank 输出、随机种子、JSON 文件、精度选择与 DeepSpeed 配置的填写。"""

import ctypes
import functools
import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from config_check import ds_config_problems

PRECISIONS = ("auto", "bf16", "fp16", "fp32")


# ---------------------------------------------------------------------------------------------------------------------
# 进程


def world_size() -> int:
    """进程总数；没有分布式时为 1。"""
    return dist.get_world_size() if dist.is_initialized() else 1


def global_rank() -> int:
    """本进程的全局序号；没有分布式时取环境变量 RANK，再没有为 0。"""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def log_rank_0(message: str, file=None):
    """只在 0 号进程打印一行（缺省到标准输出），不打断 tqdm 进度条。"""
    if global_rank() == 0:
        tqdm.write(message, file=file)


class AgreedError(RuntimeError):
    """各进程商定一起抛出的错误：原因相同，0 号进程打印即可。"""

    is_agreed = True


def raise_together(error: BaseException | None):
    """任何一个进程有错，所有进程都抛出同样的原因，不留下别的进程空等；集合操作，所有进程都要调用。

    Raises:
        ValueError: 出错的进程抛的是 ValueError（用户的错）。
        AgreedError: 其他错误；本进程的错误作为 __cause__。
    """
    mine = None if error is None else (isinstance(error, ValueError), f"{error}")
    everyone = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    for rank, reason in enumerate(everyone):
        if reason is not None:
            is_value_error, message = reason
            raise ValueError(message) if is_value_error else AgreedError(f"rank {rank}：{message}") from error


def broadcast_from_rank_0(function: Callable[[], Any]) -> Any:
    """只在 0 号进程执行 function，结果（或错误）发给所有进程；集合操作。"""
    value = error = None
    if global_rank() == 0:
        try:
            value = function()
        except Exception as raised:  # 原样带到所有进程，下面一起抛出
            error = raised
    raise_together(error)
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def quiet_libraries():
    """不显示各库写给自己开发者的 FutureWarning（将来改名之类）；用户改不了它们。"""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers|peft)\b")


def seed_everything(seed: int):
    """设定 random、numpy、torch（含 CUDA）的随机种子。"""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# 文件


def read_json(path: str | Path) -> Any:
    """读一个 JSON 文件。

    Raises:
        ValueError: 文件不存在、不是 UTF-8 或不是合法的 JSON，信息里有路径与位置。
    """
    try:
        if Path(path).exists() and not Path(path).is_file():  # 打开 FIFO 会一直等下去
            raise ValueError(f"{path} 不是普通文件（可能是目录或管道），请给出 JSON 文件")
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"读不了 {path}：{error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} 不是合法的 JSON：{error}") from error


def write_json(path: str | Path, value: Any):
    """写一个 JSON 文件：先写临时文件再改名，读者看不到写了一半的内容。"""
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_failed(error: OSError) -> OSError:
    """读写失败（磁盘满、只读、没有权限、挂载点消失）给人看的说明。"""
    reason = error.strerror or str(error)
    return OSError(f"读写 {error.filename or '文件'} 失败：{reason}。请检查磁盘空间与权限；已有的检查点没有受影响")


@contextmanager
def freed_blocks_returned() -> Iterator[None]:
    """1 MB 以上的内存块一释放就还给系统，不在堆里留下空洞；只对 glibc 有作用，退出时换成它自己会调到的上限。

    ZeRO-3 逐层造出完整的张量再切分，CPU 上的空洞曾使 4 个进程中的一个多占 240 MB（模型 595 MB）。
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)
    mmap_threshold, trim_threshold = -3, -1  # malloc.h 的 M_MMAP_THRESHOLD、M_TRIM_THRESHOLD
    mallopt(mmap_threshold, 2**20)
    try:
        yield
    finally:
        mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, 2**26)


# ---------------------------------------------------------------------------------------------------------------------
# 精度与 DeepSpeed 配置


@functools.cache
def cpu_bf16_speedup() -> float:
    """CPU 上 bf16 矩阵乘法的速率是 fp32 的几倍：各算五次 512 × 512，取最快的（约 20 毫秒）。

    指令集说明不了快慢：avx512_bf16 在 Zen 4 上快 2 倍多，在没有 AMX 的 Emerald Rapids 上慢一半；只有 AVX2 时慢约 7 倍。
    单线程，量这个线程占用的 CPU 时间：机器忙的时候也准。
    """

    def fastest(dtype: torch.dtype) -> float:
        matrix, seconds = torch.ones(512, 512, dtype=dtype), []
        for _ in range(5):
            began = time.thread_time()
            matrix @ matrix
            seconds.append(time.thread_time() - began)
        return min(seconds)

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return fastest(torch.float32) / fastest(torch.bfloat16)
    finally:
        torch.set_num_threads(num_threads)


def choose_precision(requested: str) -> tuple[str, str]:
    """把 --precision 定为 bf16、fp16 或 fp32 之一，并说明理由 → (精度, 理由)。"""
    if requested != "auto":
        return requested, "由 --precision 指定"
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{torch.cuda.get_device_name()} 直接计算 bf16"
        return "fp16", f"{torch.cuda.get_device_name()} 不直接计算 bf16，用 fp16 加损失缩放"
    speedup = cpu_bf16_speedup()
    if speedup >= 1:
        return "bf16", f"这个 CPU 的 bf16 矩阵乘法是 fp32 的 {speedup:.1f} 倍快"
    return "fp32", f"这个 CPU 的 bf16 矩阵乘法只有 fp32 的 {speedup:.2f} 倍快"


TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def read_ds_config(path: str | Path) -> dict:
    """读 DeepSpeed 的 JSON 并检查 DeepSpeed 自己不检查、会悄悄忽略的地方。

    Raises:
        ValueError: 不是合法的 JSON 对象，或有不认识的键、不对的类型、不支持的学习率调度；全部列出。
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} 应是一个 JSON 对象，得到 {type(config).__name__}")
    problems = ds_config_problems(config)
    if problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    return config


def has_cpp_compiler() -> bool:
    """有没有编译器：DeepSpeed 自带的 Adam 要在首次使用时编译，在 GPU 上还要 CUDA 工具包（nvcc）。"""
    compiler = os.environ.get("CXX") or "g++"
    has_host_compiler = any(shutil.which(name) for name in (compiler, "c++", "clang++"))
    if not torch.cuda.is_available():
        return has_host_compiler
    from torch.utils.cpp_extension import CUDA_HOME

    return has_host_compiler and CUDA_HOME is not None


def skip_ops_without_compiler():
    """没有编译器时，让 DeepSpeed 的 CPU 通信退回 gloo，不去编译它的共享内存算子；须在 init_distributed 之前调用。"""
    if not has_cpp_compiler():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def resolve_ds_config(
    config: dict,
    precision: str,
    batch_size: int,
    accumulation_steps: int,
    num_ranks: int,
    learning_rate: float,
    weight_decay: float,
    num_steps: int,
    warmup_ratio: float,
) -> dict:
    """填好配置里的 "auto"，返回新的字典；原来写了具体值的地方不动。

    学习率：第 s 步（从 1 起）预热时为 s/(W+1)，W 是预热步数（1 按 2 算）；之后按调度衰减，最后一步为调度的下限。
    DeepSpeed 的预热从 0 起且至少 2 步，所以这里把起点设为 1/(W+1)；W = 0 时起点为 1，即没有预热。

    Args:
        config: read_ds_config 的结果。
        batch_size、accumulation_steps、num_ranks: 一个优化器步有三者之积个样本。
        num_steps: 优化器步的总数；warmup_ratio: 预热步数占它的比例。
    """
    warmup_steps = round(num_steps * warmup_ratio)
    warmup_start = 1.0 / (max(2, warmup_steps) + 1) if warmup_steps else 1.0
    # WarmupDecayLR 衰减到预热的起点，起点就是峰值的话一点也不衰减
    decays_to_start = config.get("scheduler", {}).get("type") == "WarmupDecayLR"
    warmup_start_lr = learning_rate * (0.1 if decays_to_start and not warmup_steps else warmup_start)
    auto_values = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": batch_size * accumulation_steps * num_ranks,
        "lr": learning_rate,
        "weight_decay": weight_decay,
        "total_num_steps": num_steps,
        "warmup_num_steps": max(1, warmup_steps),
        "warmup_min_ratio": warmup_start,
        "warmup_min_lr": warmup_start_lr,
        "warmup_max_lr": learning_rate,
    }

    def fill(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {name: fill(value, name) for name, value in node.items()}
        if node == "auto":
            if key not in auto_values:
                raise ValueError(f'DeepSpeed 配置里的 "{key}": "auto" 不知道该填什么，请写具体的值')
            return auto_values[key]
        return node

    resolved = {name: fill(value, name) for name, value in config.items() if name not in ("bf16", "fp16")}
    total = batch_size * accumulation_steps * num_ranks
    if resolved.get("train_batch_size", total) != total:
        raise ValueError(
            f"DeepSpeed 配置的 train_batch_size 是 {resolved['train_batch_size']}，但 per_device_train_batch_size × "
            f'gradient_accumulation_steps × 进程数 = {batch_size} × {accumulation_steps} × {num_ranks}；请改成 "auto"'
        )
    for name in ("bf16", "fp16"):
        switch = config.get(name, {}).get("enabled", "auto")
        if switch != "auto" and switch != (precision == name):
            log_rank_0(f"注意：精度由 --precision 决定（{precision}），配置里的 {name}.enabled={switch} 不起作用")
    resolved.setdefault("train_micro_batch_size_per_gpu", batch_size)
    resolved.setdefault("gradient_accumulation_steps", accumulation_steps)
    resolved["bf16"] = {"enabled": precision == "bf16", **_without_enabled(config.get("bf16", {}))}
    resolved["fp16"] = {"enabled": precision == "fp16", **_without_enabled(config.get("fp16", {}))}
    if resolved.get("optimizer", {}).get("type") in ("Adam", "AdamW") and not has_cpp_compiler():
        log_rank_0("没有找到 C++ 编译器，DeepSpeed 自带的 Adam 编译不了：改用 torch 的 AdamW（同样的更新，稍慢）")
        resolved["optimizer"]["params"]["torch_adam"] = True
        resolved["zero_force_ds_cpu_optimizer"] = False
    return resolved


def _without_enabled(section: dict) -> dict:
    return {name: value for name, value in section.items() if name != "enabled"}
