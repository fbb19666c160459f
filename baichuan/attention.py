"""注意力：位置（旋转编码、ALiBi）、掩码，以及批形式与并排形式（packing）的计算。

并排的样本各看各的，任何地方都不出现 长度² 的整包掩码。
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# ---------------------------------------------------------------------------------------------------------------------
# 位置


def rotary_tables(position_ids: Tensor, head_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """旋转位置编码的 cos、sin：position_ids [..., L] → 各 [..., L, 1, head_dim]，fp32；cos 前后两半相同，sin 前半取负。

    每次前向现算：不是缓冲区，所以在 meta 设备上加载不会坏，长度也不受预训练长度限制。
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=position_ids.device).float() / head_dim
    angles = position_ids[..., None, None].float() * (1.0 / base**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class RotaryFunction(torch.autograd.Function):
    """给 W_pack 的输出 [b, L, 3H] 里的 q、k 加旋转位置编码，就地改写，v 不动；cos、sin [b, L, 1, d] 见 rotate。

    旋转的反向就是反着转，什么都不必保留。
    """

    @staticmethod
    def forward(ctx, packed_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.mark_dirty(packed_states)
        rotate(by_head(packed_states, cos.shape[-1])[..., :2, :, :], cos[..., None, :, :], sin[..., None, :, :])
        return packed_states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        packed_grad = grad.clone()
        rotate(by_head(packed_grad, cos.shape[-1])[..., :2, :, :], cos[..., None, :, :], -sin[..., None, :, :])
        return packed_grad, None, None


def by_head(packed_states: Tensor, head_dim: int) -> Tensor:
    """W_pack 的输出 [..., 3H] → [..., 3, heads, d]：q、k、v 各自按头切分。"""
    return packed_states.view(*packed_states.shape[:-1], 3, packed_states.shape[-1] // (3 * head_dim), head_dim)


def rotate(states: Tensor, cos: Tensor, sin: Tensor):
    """就地把 states [..., d] 的前后两半 (x₁, x₂) 换成 (x₁ cos − x₂ sin, x₂ cos + x₁ sin)；cos、sin 见 rotary_tables。

    cos、sin 是 fp32 时在 fp32 里旋转再转回（Baichuan2 的做法），是 states 的类型时直接在该类型里算（Baichuan 的做法）。
    """
    swapped = states.roll(states.shape[-1] // 2, dims=-1)
    if cos.dtype == states.dtype:
        states.mul_(cos).addcmul_(swapped, sin)
    else:
        states.copy_((states * cos).addcmul_(swapped, sin))


def alibi_slopes(num_heads: int) -> Tensor:
    """各注意力头的 ALiBi 斜率，[num_heads] fp32（Press 等，2021；头数不是 2 的幂时与官方代码相同地取偶数项补齐）。"""

    def power_of_two_slopes(n: int) -> list[float]:
        return [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]

    power = 2 ** math.floor(math.log2(num_heads))
    slopes = power_of_two_slopes(power)
    if power < num_heads:
        slopes += power_of_two_slopes(2 * power)[0::2][: num_heads - power]
    return torch.tensor(slopes)


# ---------------------------------------------------------------------------------------------------------------------
# 一次前向里各层共用的东西


@dataclass(frozen=True)
class AttentionContext:
    """一次前向里各层注意力共用的张量，只算一遍。

    rotary: (cos, sin)，旋转位置编码；ALiBi 时为 None。
    bias: 加在注意力分数上的偏置（ALiBi + 因果 + 填充）。批形式 [b | 1, heads | 1, q, kv]，
        并排形式 [heads | 1, S, V + S]；None 表示不需要。
    is_causal: bias 为 None 时，是否还要因果掩码。
    document_lengths: 并排的各段的长度；None 表示批形式。
    document_parents: 各段接在哪一段之后（看得到那一段的全部），-1 表示自成开头。
    """

    rotary: tuple[Tensor, Tensor] | None
    bias: Tensor | None
    is_causal: bool
    document_lengths: list[int] | None = None
    document_parents: list[int] | None = None
    output_attentions: bool = False
    layout: Any = None  # 并排的各段在 GPU 上的布局，见 packed_attention_gpu；None 表示逐段算
    is_exact: bool = False  # 写开的注意力：全被遮住的填充行也要有正确的梯度（z_loss 用到它们的输出）


def counted_positions(attention_mask: Tensor) -> Tensor:
    """由 [b, kv] 的掩码数出位置：前面与中间的填充不占位置，末尾的填充接着数（与官方代码相同，z_loss 会用到那些行）。"""
    present = attention_mask != 0
    trailing = present.flip(-1).long().cumsum(-1).flip(-1) == 0
    return ((present | trailing).long().cumsum(-1) - 1).clamp(min=0)


def allowed_mask(
    attention_mask: Tensor | None, query_length: int, key_length: int, device: torch.device, padding_sees_all: bool
) -> Tensor:
    """哪个位置可以看哪个位置：bool，[q, kv] 或 [b, 1, q, kv]。

    attention_mask: None；[b, kv] 的 0/1 或段号（1、2、3…：同段才互相可见，0 为填充）；
    [b, q, kv] 或 [b, 1, q, kv] 的 0/1。最后 q 个键就是各查询自己。
    """
    causal = torch.ones(query_length, key_length, dtype=torch.bool, device=device).tril(key_length - query_length)
    if attention_mask is None:
        return causal
    if attention_mask.dim() == 2:
        segments = attention_mask[:, None, None, :]  # [b, 1, 1, kv]
        own_segments = segments[..., -query_length:].transpose(2, 3)  # [b, 1, q, 1]
        same = segments == own_segments
        if padding_sees_all:
            same = same | (own_segments == 0)
        return causal & (segments != 0) & same
    if attention_mask.dim() == 3:
        attention_mask = attention_mask[:, None]
    return causal & (attention_mask != 0)


# ---------------------------------------------------------------------------------------------------------------------
# 计算


def eager_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """写开的注意力，要输出概率或要被遮住的行也有正确的梯度时用：→ ([b, heads, q, d], 概率 [b, heads, q, kv])。"""
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if bias is not None:
        # 官方 13B 的写法：下限截断在相等处只传一半梯度
        scores = torch.maximum(scores + bias, scores.new_tensor(torch.finfo(scores.dtype).min))
    attentions = scores.float().softmax(dim=-1).to(query.dtype)
    return attentions @ value, attentions


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    document_lengths: list[int],
    document_parents: list[int],
    bias: Tensor | None,
    is_rotary: bool,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> Tensor:
    """对并排的各段分别做因果注意力：packed_attention_gpu 用不了时走这里（CPU 用 packed_attention_cpu.py）。

    Args:
        query, key, value: [T, heads, head_dim]，T 为各段长度之和（旋转位置编码已加）。
        document_lengths, document_parents: 见 AttentionContext；长度之和为 T。
        bias: [heads | 1, S, V + S]，S 为最长样本的长度：ALiBi 偏置与因果掩码之和，按各段的位置裁取；
            None 表示不需要偏置（旋转位置编码，没有前缀，各段都自成开头，由 is_causal 表示因果）。
        is_rotary: 用旋转位置编码，bias 只是因果掩码：前面什么也不接的段不用它，走不带掩码的快路。
        prefix_key, prefix_value: [heads, V, head_dim]，P-Tuning 的前缀，放在每个样本之前；没有则为 None。

    Returns:
        [T, heads, head_dim]。
    """
    outputs = []
    queries, keys, values = (states.transpose(0, 1).split(document_lengths, dim=1) for states in (query, key, value))
    for q, k, v, parent in zip(queries, keys, values, document_parents, strict=True):  # 各 [heads, S, d]
        length, document_bias = q.shape[1], None
        before = [] if prefix_key is None else [(prefix_key, prefix_value)]
        before += [(keys[parent], values[parent])] if parent >= 0 else []
        if before:
            k, v = (torch.cat(parts, dim=1) for parts in zip(*before, (k, v), strict=True))
        if bias is not None and (before or not is_rotary):
            first = document_lengths[parent] if parent >= 0 else 0  # 第一个查询的位置
            document_bias = bias[:, first : first + length, : k.shape[1]]
        output = nn.functional.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=None if document_bias is None else document_bias[None],
            is_causal=document_bias is None,
        )[0]
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)
