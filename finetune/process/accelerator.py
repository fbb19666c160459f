"""本机的加速卡（NVIDIA、昇腾、AMD、Intel 等），一律经 DeepSpeed 的 get_accelerator() 询问；没有时用 CPU。"""

import ctypes
import logging
import resource
from contextlib import suppress
from pathlib import Path

import torch

STEPS_PER_TRIM = 4
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # 只有 glibc 有


def get_accelerator():
    """DeepSpeed 的加速卡接口；用到时才导入 DeepSpeed：只用 CPU 的预测不必等它。"""
    muted = logging.root.manager.disable
    logging.disable(logging.WARNING)  # 没有加速卡时它往标准输出打一行「没有找到」
    try:
        from deepspeed import accelerator

        return accelerator.get_accelerator()
    finally:
        logging.disable(muted)


def accelerator_name() -> str:
    """DeepSpeed 选定的种类：cuda（NVIDIA，AMD 的 ROCm 也是）、npu、xpu……；没有加速卡时是 cpu。"""
    return get_accelerator()._name


def has_accelerator() -> bool:
    """有没有加速卡。"""
    return accelerator_name() != "cpu"


def device_count() -> int:
    """加速卡的块数；没有时为 0。"""
    return get_accelerator().device_count() if has_accelerator() else 0


def default_device(index: int | None = None) -> torch.device:
    """第 index 块卡（None 为当前的）；没有加速卡时是 CPU。"""
    return torch.device(get_accelerator().device_name(index) if has_accelerator() else "cpu")


def is_card(device: torch.device) -> bool:
    """这个设备是加速卡，不是 CPU。"""
    return has_accelerator() and device.type == default_device().type


def card_name() -> str:
    """第一块卡的型号；问不出来时是种类的名字。"""
    try:
        return torch.get_device_module(accelerator_name()).get_device_name(0)
    except (RuntimeError, AttributeError):
        return accelerator_name()


def computes_bf16() -> bool:
    """卡直接计算 bf16，不是模拟的。"""
    if accelerator_name() == "cuda":  # DeepSpeed 的回答把模拟也算在内
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return get_accelerator().is_bf16_supported()


def total_card_bytes() -> int:
    """第一块卡的显存，字节。"""
    return get_accelerator().total_memory(0)


def peak_memory_mb() -> float:
    """峰值内存，MB：卡上是本进程分配过的显存，CPU 上是进程自己的（匿名与共享），映射着的文件不算。

    内核只记常驻内存的峰值：减去此刻映射的文件（程序与库，大小不再变）；读完权重要 forget_mapped_peak。
    """
    if has_accelerator():
        return get_accelerator().max_memory_allocated() / 2**20
    status = process_status_mb()
    if "RssFile" not in status:  # 不是 Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return max(status["VmHWM"] - status["RssFile"], status["RssAnon"] + status["RssShmem"])


def process_status_mb() -> dict[str, float]:
    """/proc/self/status 里以 kB 计的各项，MB；没有这个文件时为空。"""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = (line.partition(":") for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) / 1024 for name, _, value in fields}


def forget_mapped_peak() -> None:
    """常驻内存的峰值从此刻起重新记：读权重时映射着整个文件，不是进程自己的；内核不许时照旧。"""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def return_free_memory(step: int) -> None:
    """CPU 上每 STEPS_PER_TRIM 步把堆里空着的页还给系统：每步的长度不同，glibc 留下的空洞会越积越多。

    还回的页下一步要重新取得，所以不是每步都还；卡上什么也不做。
    """
    if step % STEPS_PER_TRIM == 0 and not has_accelerator() and _malloc_trim is not None:
        _malloc_trim(0)


def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
    """锁页的副本，往卡上搬时不必等；没有加速卡时原样。"""
    return get_accelerator().pin_memory(tensor) if has_accelerator() else tensor


def random_state_of_card() -> dict[str, torch.Tensor]:
    """卡的随机状态 {种类: 状态}；没有加速卡时为空。"""
    return {accelerator_name(): get_accelerator().get_rng_state()} if has_accelerator() else {}


def set_random_state_of_card(state: dict[str, torch.Tensor]):
    """random_state_of_card() 的逆；state 里没有这种卡的（换了机器）不动。"""
    if has_accelerator() and accelerator_name() in state:
        get_accelerator().set_rng_state(state[accelerator_name()])


def use_card(device: torch.device):
    """以后缺省用这块卡。"""
    get_accelerator().set_device(device.index or 0)


def synchronize():
    """等卡做完。"""
    get_accelerator().synchronize()


def empty_cache():
    """把没有在用的显存还给系统。"""
    get_accelerator().empty_cache()
