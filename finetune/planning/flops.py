"""训练的计算量：一个优化步必要的 FLOPs，重算多出的部分，矩阵乘法的实测速率与各种卡的标称速率。

FLOPs（一个优化步，乘与加各算一次；不计补齐，注意力只计因果三角的一半）。记 h 宽度，i 前馈宽度，V 词表，
L 层数，n = 4h² + 3hi 为一层的矩阵权重，T 非补齐 token 数，R 目标 token 数，S_d 各样本的长度；几个样本共用的开头
只算一次（T 与 Σ S_d² 各减去重复的部分）：

    前向            2·T·n·L + 2·R·h·V + Σ_d 2·S_d²·h·L
    对激活的反向    2·T·n·L' + 2·R·h·V + Σ_d 4·S_d²·h·L'      L' 为从最低的可训练层往上的层数
    对权重的反向    2·T·n·L'' [+ 2·R·h·V]                      L'' 为可训练的层数；词表投影只在 full 训练
    最后一层        以上每项各减 2·(T-R)·(h² + 3hi)             注意力之后只算目标行

lora、ptuning：L' = L，L'' = 0（低秩部分不足 1%，不计）；freeze 末 k 层：L' = L'' = k；full：L' = L'' = L。
cache_frozen 的第二轮起，前向的 L 也换成 k。MFU = 公式 / 秒 / 实测的矩阵乘法速率。
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from finetune.process import accelerator
from finetune.process.precision import TORCH_DTYPES

# 稠密 bf16（V100、T4 是 fp16）矩阵乘法的标称速率，FLOP/s；厂家数据，按设备名里的片段查找，长的先查
NOMINAL_RATES = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A6000": 155e12,
    "L40": 181e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


class Shape(NamedTuple):
    """模型的尺寸。"""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocab: int

    @property
    def layer_weights(self) -> int:
        """一层的矩阵权重数。"""
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate


def step_flops(
    shape: Shape,
    lengths: Sequence[int],
    num_targets: int,
    method: str,
    trained_layers: int = 0,
    prefix_is_cached: bool = False,
    repeated: Sequence[int] = (),
) -> float:
    """一个优化步必要的 FLOPs，公式见文件开头。

    Args:
        lengths: 各样本的 token 数；num_targets: 目标 token 数。
        method: lora、ptuning、freeze、full；trained_layers 是 freeze 训练的末尾层数。
        repeated: 不再重算的共用开头的 token 数，每少算一次一项（n 个样本共用的有 n - 1 项）。
    """
    layers = shape.layers
    backward_layers = trained_layers if method == "freeze" else layers
    weight_layers = {"freeze": trained_layers, "full": layers}.get(method, 0)
    forward_layers = trained_layers if prefix_is_cached else layers
    num_tokens = sum(lengths) - sum(repeated)
    matmul = 2.0 * num_tokens * shape.layer_weights
    head = 2.0 * num_targets * shape.hidden * shape.vocab
    attention = 2.0 * (sum(n**2 for n in lengths) - sum(n**2 for n in repeated)) * shape.hidden
    only_targets = 2.0 * (num_tokens - num_targets) * (shape.hidden**2 + 3 * shape.hidden * shape.intermediate)
    return (
        matmul * (forward_layers + backward_layers + weight_layers)
        - only_targets * sum(count > 0 for count in (forward_layers, backward_layers, weight_layers))
        + attention * (forward_layers + 2 * backward_layers)
        + head * (3 if method == "full" else 2)
    )


def forward_flops(shape: Shape, lengths: Sequence[int], num_targets: int) -> float:
    """只作一遍前向的，公式的第一项。"""
    return step_flops(shape, lengths, num_targets, "freeze") - 2.0 * num_targets * shape.hidden * shape.vocab


def recompute_flops(shape: Shape, lengths: Sequence[int], checkpointed_layers: int, only_attention: bool) -> float:
    """--gradient_checkpointing 在反向里多算的前向：几层，或只是它们的注意力部分（W_pack、o_proj 与注意力）。"""
    weights = 4 * shape.hidden**2 if only_attention else shape.layer_weights
    attention = 2.0 * sum(length**2 for length in lengths) * shape.hidden
    return checkpointed_layers * (2.0 * sum(lengths) * weights + attention)


def nominal_rate(device_name: str) -> float | None:
    """设备名对应的标称速率，FLOP/s；表里没有则为 None。"""
    names = sorted(NOMINAL_RATES, key=len, reverse=True)
    return next((NOMINAL_RATES[name] for name in names if name in device_name), None)


def gemm_rate(shape: Shape, rows: int, dtype: str, device: Any = "cpu", seconds: float = 1.0) -> float:
    """这台机器矩阵乘法的速率，FLOP/s：模型自己的四种形状与 2048（GPU 上 8192）的方阵，取最快的一种。

    dtype 是 bf16、fp16 或 fp32；seconds 是总共量多久。
    """
    import torch

    on_card = torch.device(device).type != "cpu"
    side = 8192 if on_card else 2048
    shapes = [
        (rows, shape.hidden, 3 * shape.hidden),
        (rows, shape.hidden, shape.hidden),
        (rows, shape.hidden, shape.intermediate),
        (rows, shape.intermediate, shape.hidden),
        (side, side, side),
    ]
    kind = TORCH_DTYPES[dtype]
    best = 0.0
    for m, k, n in shapes:
        left, right = torch.randn(m, k, device=device).to(kind), torch.randn(n, k, device=device).to(kind).t()
        left @ right
        count, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds / len(shapes) or count < 2:
            for _ in range(10 if on_card else 1):
                left @ right
                count += 1
            if on_card:
                accelerator.synchronize()
        elapsed = time.perf_counter() - began
        best = max(best, 2.0 * m * k * n * count / elapsed)
    return best
