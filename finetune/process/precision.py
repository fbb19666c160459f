"""计算精度的选择：设备算得快的那种。"""

import functools
import time

import torch

from finetune.process.accelerator import card_name, computes_bf16, has_accelerator


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
    if has_accelerator():
        if computes_bf16():
            return "bf16", f"{card_name()} 直接计算 bf16"
        return "fp16", f"{card_name()} 不直接计算 bf16，用 fp16 加损失缩放"
    speedup = cpu_bf16_speedup()
    if speedup >= 1:
        return "bf16", f"这个 CPU 的 bf16 矩阵乘法是 fp32 的 {speedup:.1f} 倍快"
    return "fp32", f"这个 CPU 的 bf16 矩阵乘法只有 fp32 的 {speedup:.2f} 倍快"


TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# config.json 里的写法 → torch 的类型
NAMED_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TORCH_DTYPES.values()}
