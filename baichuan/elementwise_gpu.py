"""GPU 上的逐元素运算：写开的式子由 torch.compile 各合成一个核，每个元素读一次、写一次。

舍入的次序与逐句执行时相同（emulate_precision_casts）；行数少的（逐字生成）、没有编译器的，逐句执行。
"""

import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MIN_ROWS = 512  # 行数不到这么多时，时间在启动核上，编译没有收益


@cache
def can_compile() -> bool:
    """有没有 torch.compile 在 GPU 上要的：triton 与编译器。"""
    compilers = (os.environ.get("CC") or "gcc", "cc", "clang")
    device = torch.accelerator.current_accelerator()
    is_cuda = device is not None and device.type == "cuda"
    return is_cuda and bool(find_spec("triton")) and any(map(shutil.which, compilers))


@cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, options={"emulate_precision_casts": True})


def is_worth_it(states: Tensor) -> bool:
    """states [..., H] 在 GPU 上，行数也够。"""
    return states.is_cuda and states.numel() >= MIN_ROWS * states.shape[-1] and can_compile()


def fused(function: Callable, by_row: tuple[Tensor, ...], *shared) -> Tensor | tuple[Tensor, ...]:
    """function(*by_row, *shared)，合成一个核；by_row 各 [N, ...]，N 各步不同，shared 与 N 无关。"""
    if not is_worth_it(by_row[0]):
        return function(*by_row, *shared)
    for states in by_row:
        torch._dynamo.maybe_mark_dynamic(states, 0)
    return compiled(function)(*by_row, *shared)


# ---------------------------------------------------------------------------------------------------------------------
# RMSNorm、SwiGLU


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [N, H] → (w · cast(x / rms(x))，1/rms [N, 1] fp32)。"""
    inverse_rms = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)
    return weight * normalize(x, inverse_rms, weight), inverse_rms


def rms_norm_input_grad(y_grad: Tensor, x: Tensor, inverse_rms: Tensor, weight: Tensor) -> Tensor:
    grad = (y_grad * weight).float()
    along = (grad * x).mean(dim=-1, keepdim=True) * inverse_rms.square()
    return ((grad - x * along) * inverse_rms).to(x.dtype)


def rms_norm_weight_grad(y_grad: Tensor, x: Tensor, inverse_rms: Tensor, weight: Tensor) -> Tensor:
    return (y_grad * normalize(x, inverse_rms, weight)).sum(dim=0, dtype=torch.float32).to(weight.dtype)


def normalize(x: Tensor, inverse_rms: Tensor, weight: Tensor) -> Tensor:
    normalized = x * inverse_rms  # 与 fp32 相乘，结果是 fp32
    return normalized.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else normalized


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def swiglu_grads(y_grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(y_grad * up, gate), nn.functional.silu(gate) * y_grad


# ---------------------------------------------------------------------------------------------------------------------
# 旋转位置编码


class RotarySplit(torch.autograd.Function):
    """W_pack 的输出 [T, 3H] → 转好的 q、k 与 v，各 [T, heads, d]；cos、sin [1, T, 1, d] 见 attention.rotary_tables。

    反向把三个梯度反着转、拼成 W_pack 的布局，一次写成。
    """

    @staticmethod
    def forward(ctx, packed_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return fused(rotary_split, (packed_states, cos[0], sin[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx, query_grad: Tensor, key_grad: Tensor, value_grad: Tensor):
        cos, sin = ctx.saved_tensors
        return fused(rotary_join, (query_grad, key_grad, value_grad, cos[0], sin[0])), None, None


def rotary_split(packed_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T, 3H]、cos 与 sin [T, 1, d] → q、k、v，各 [T, heads, d]。"""
    query, key, value = packed_states.unflatten(1, (3, -1, cos.shape[-1])).unbind(dim=1)
    return rotated(query, cos, sin), rotated(key, cos, sin), value.clone(memory_format=torch.contiguous_format)


def rotary_join(query_grad: Tensor, key_grad: Tensor, value_grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    grads = torch.stack([rotated(query_grad, cos, -sin), rotated(key_grad, cos, -sin), value_grad], dim=1)
    return grads.flatten(1)


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """attention.rotate 的不就地的写法。"""
    first, second = states.chunk(2, dim=-1)
    return (states * cos + torch.cat([second, first], dim=-1) * sin).to(states.dtype)
