"""没有 bf16 指令的 CPU 上，bf16 的矩阵乘法展开成 fp32 来算：权重仍存成 bf16，一次只展开一块。

torch 在这样的 CPU 上用没有优化过的内核：AVX2 上权重不转置的一种（反向用的）每秒只有 fp32 的百分之一。
"""

import warnings

import torch
from torch import Tensor

from finetune.process.accelerator import has_accelerator
from finetune.process.precision import cpu_bf16_speedup
from utils import broadcast_from_rank_0

# bf16 不到 fp32 的这么快才换：AVX2 上是 0.15 上下；有 AVX-512 的各种 CPU 在 0.5 以上，用它们自己的内核
SLOW = 0.25
# 一次展开多少个数：fp32 64 MiB
ELEMENTS_AT_ONCE = 2**24
_library: torch.library.Library | None = None


def settle_products(precision: str) -> str:
    """bf16 而这个 CPU 算得很慢时换上 fp32 的乘法，返回给人看的一句，不必换时为空；集合操作，在第一次矩阵乘法之前。"""
    global _library
    is_possible = precision == "bf16" and not has_accelerator() and hasattr(torch.library, "get_kernel")
    if not is_possible or not broadcast_from_rank_0(lambda: cpu_bf16_speedup() < SLOW):
        return ""
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # 正是要换掉
            for name, product in {"mm": mm, "mm.out": mm, "bmm": bmm, "bmm.out": bmm}.items():
                _replace(_library, name, product)
    return "；矩阵乘法展开成 fp32 来算"


def products_type() -> str | None:
    """换过之后是 fp32，否则 None；记进 run_config.json。"""
    return None if _library is None else "fp32"


def _replace(library: torch.library.Library, name: str, product):
    """aten 的一个算子在 CPU 上遇到 bf16 时改用 product(left, right, out)，别的类型照旧。"""
    original = torch.library.get_kernel(f"aten::{name}", "CPU")

    def kernel(keys, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        if left.dtype != torch.bfloat16:
            return original.call_boxed(keys, left, right, **({} if out is None else {"out": out}))
        if out is None:
            out = left.new_empty(*left.shape[:-1], right.shape[-1])
        return product(left, right, out)

    library.impl(name, kernel, "CPU", with_keyset=True)


def mm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left [n, k] @ right [k, m] → out [n, m]：fp32 求和，舍入一次；right 顺着它存放的次序一块块展开。"""
    left = left.float()
    size = max(1, ELEMENTS_AT_ONCE // max(1, right.shape[right.stride(0) >= right.stride(1)]))
    if right.stride(0) < right.stride(1):  # 转置的权重：一块是 out 的几列
        for begin in range(0, right.shape[1], size):
            columns = slice(begin, begin + size)
            out[:, columns] = left @ right[:, columns].float()
        return out
    total = left.new_zeros(out.shape)
    for begin in range(0, right.shape[0], size):
        rows = slice(begin, begin + size)
        total.addmm_(left[:, rows], right[rows].float())
    return out.copy_(total)


def bmm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left [b, n, k] @ right [b, k, m] → out [b, n, m]，各是激活。"""
    return out.copy_(left.float() @ right.float())
