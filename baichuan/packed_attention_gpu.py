"""GPU 上并排样本的注意力：一层一次调用，不逐段循环，也没有 长度² 的偏置。

旋转位置编码用 flash 的变长注意力（torch.nn.attention.varlen）：接在别段之后的段、P-Tuning 的前缀，把各段看得到的键
依次抄成一行，段的末尾对齐，因果掩码就是对的。ALiBi 用 FlexAttention：偏置在核里现算，块掩码由各段的起止直接写出。
各段的布局一次前向只算一次，各层共用；逐段的写法（attention.packed_attention）是它们的标准答案，用不了它们时用它。
"""

from functools import cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from baichuan import elementwise_gpu
from baichuan.attention import by_head
from baichuan.packed_attention_cpu import segments

PREFIX, NOTHING = -2, -3  # 键的段号：P-Tuning 的前缀；没有父段
BLOCK = 128  # FlexAttention 的块


class Layout(NamedTuple):
    """并排的各段在一次前向里的布局。键的行号从 P-Tuning 的前缀（num_prefix 行）数起，之后是 T 个 token。"""

    lengths: list[int]
    parents: list[int]
    num_prefix: int


# ---------------------------------------------------------------------------------------------------------------------
# 旋转位置编码：flash 的变长注意力


class GatherKeys(torch.autograd.Function):
    """前缀 [V, …] 与各 token [T, …] 的键（或值）→ 各段看得到的依次排好，[K, …]。

    反向：每个 token 在自己的段里恰好一次，直接取回；被别段看到的（前缀与父段）另外加起来，用 fp32。
    """

    @staticmethod
    def forward(ctx, states: Tensor, prefix: Tensor | None, rows: "KeyRows") -> Tensor:
        ctx.rows, ctx.num_prefix = rows, 0 if prefix is None else len(prefix)
        return (states if prefix is None else torch.cat([prefix, states])).index_select(0, rows.sources)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, num_prefix = ctx.rows, ctx.num_prefix
        states_grad = grad.index_select(0, rows.own)
        seen = grad.new_zeros(rows.num_seen, *grad.shape[1:], dtype=torch.float32)
        seen.index_add_(0, rows.sources[rows.others], grad[rows.others].float())
        states_grad[: rows.num_seen - num_prefix] += seen[num_prefix:].to(grad.dtype)
        return states_grad, seen[:num_prefix].to(grad.dtype) if num_prefix else None, None


class KeyRows(NamedTuple):
    """抄键的行号，int64，在设备上。"""

    sources: Tensor  # [K]，各段看得到的键的行号
    own: Tensor  # [T]，各 token 自己的键在 K 里的位置
    others: Tensor  # [K - T]，其余（前缀与父段）在 K 里的位置
    num_seen: int  # 其余的行号都小于它


class VarlenAttention:
    """flash 的变长注意力，旋转位置编码。"""

    def __init__(self, layout: Layout, device: torch.device):
        parts, key_lengths = [], []
        for own, parent, first in segments(layout.lengths, layout.parents):
            before = [np.arange(layout.num_prefix)]
            if first:
                begin = sum(layout.lengths[:parent])
                before.append(layout.num_prefix + np.arange(begin, begin + first))
            parts += [(rows, False) for rows in before]
            parts.append((layout.num_prefix + np.arange(own.start, own.stop), True))
            key_lengths.append(layout.num_prefix + first + own.stop - own.start)
        self.longest_query, self.longest_key = max(layout.lengths), max(key_lengths)
        starts = [list(accumulate(lengths, initial=0)) for lengths in (layout.lengths, key_lengths)]
        self.query_starts, self.key_starts = torch.tensor(starts, dtype=torch.int32).to(device)
        self.rows = None
        if key_lengths != layout.lengths:
            sources = np.concatenate([rows for rows, _ in parts])
            is_own = np.concatenate([np.full(len(rows), own) for rows, own in parts])
            own, others = np.flatnonzero(is_own), np.flatnonzero(~is_own)
            placed = (torch.from_numpy(rows).to(device) for rows in (sources, own, others))
            self.rows = KeyRows(*placed, int(sources[others].max()) + 1)

    def attend(self, packed_states: Tensor, rotary, head_dim: int, prefix_key=None, prefix_value=None) -> Tensor:
        """W_pack 的输出 [1, T, 3H]，前缀 [heads, V, d] 或 None → [1, T, H]。"""
        query, key, value = elementwise_gpu.RotarySplit.apply(packed_states[0], *rotary)
        if self.rows is not None:
            prefixes = (None if part is None else part.transpose(0, 1) for part in (prefix_key, prefix_value))
            key, value = (GatherKeys.apply(s, p, self.rows) for s, p in zip((key, value), prefixes, strict=True))
        output = self.kernel(query, key, value)
        return output.reshape(1, packed_states.shape[1], -1)

    def kernel(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """各段的因果注意力，末尾对齐：[T, heads, d]、[K, heads, d]、[K, heads, d] → [T, heads, d]。"""
        starts, longest = (self.query_starts, self.key_starts), (self.longest_query, self.longest_key)
        return varlen_function()(query, key, value, *starts, *longest, window_size=(-1, 0))


@cache
def varlen_function():
    """torch 的变长注意力；这个版本没有（或没有 window_size）时为 None。"""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    import inspect

    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


# ---------------------------------------------------------------------------------------------------------------------
# ALiBi：FlexAttention


class FlexAttention:
    """FlexAttention：块掩码 + ALiBi 的 score_mod；偏置用 fp32 现算。"""

    def __init__(self, layout: Layout, slopes: Tensor, device: torch.device):
        num_prefix, total = layout.num_prefix, sum(layout.lengths)
        own = np.repeat(np.arange(len(layout.lengths)), layout.lengths)
        parents = np.asarray([parent if parent >= 0 else NOTHING for parent in layout.parents])[own]
        positions = [np.arange(first, first + n.stop - n.start) for n, _, first in segments(*layout[:2])]
        positions = np.concatenate([np.arange(num_prefix), num_prefix + np.concatenate(positions)])
        keys = np.concatenate([np.full(num_prefix, PREFIX), own])
        tables = np.zeros((4, num_prefix + total), dtype=np.int32)
        tables[0], tables[1], tables[2, :total], tables[3, :total] = keys, positions, own, parents
        key_segment, position, segment, parent = torch.from_numpy(tables).to(device)
        slopes = slopes.to(device)

        def mask(batch, head, query, key):
            seen = key_segment[key]
            is_own = (seen == segment[query]) & (key <= query + num_prefix)
            return is_own | (seen == parent[query]) | (seen == PREFIX)

        def score(score, batch, head, query, key):
            return score + slopes[head] * (position[key] - position[query + num_prefix])

        self.mask, self.score = mask, score
        self.block_mask = block_mask_of(layout, mask, device)

    def attend(self, packed_states: Tensor, rotary, head_dim: int, prefix_key=None, prefix_value=None) -> Tensor:
        """见 VarlenAttention.attend。"""
        query, key, value = by_head(packed_states, head_dim).unbind(dim=2)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # [1, heads, T, d]
        if prefix_key is not None:
            key, value = torch.cat([prefix_key[None], key], dim=2), torch.cat([prefix_value[None], value], dim=2)
        output = flex_function()(query, key, value, score_mod=self.score, block_mask=self.block_mask)
        return output.transpose(1, 2).reshape(1, packed_states.shape[1], -1)


@cache
def flex_function():
    """编译好的 FlexAttention：长度可变，各步不重新编译。"""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def block_mask_of(layout: Layout, mask, device: torch.device):
    """由各段的起止写出块掩码：哪些块有看得到的、哪些块全看得到；与 create_block_mask 相同，但不经过 T × K 的掩码。"""
    from torch.nn.attention.flex_attention import BlockMask

    num_prefix, total = layout.num_prefix, sum(layout.lengths)
    num_rows, num_columns = -(-total // BLOCK), -(-(num_prefix + total) // BLOCK)
    partial, full = (np.zeros((num_rows, num_columns), dtype=bool) for _ in range(2))
    starts = list(accumulate(layout.lengths, initial=0))
    for own, parent, first in segments(layout.lengths, layout.parents):
        # 这一段看得到的：(键的起, 止)；自己的一份另外是因果的
        whole = [(0, num_prefix)] if num_prefix else []
        whole += [(num_prefix + starts[parent], num_prefix + starts[parent] + first)] if first else []
        for block in range(own.start // BLOCK, -(-own.stop // BLOCK)):
            begin, end = max(own.start, block * BLOCK), min(own.stop, (block + 1) * BLOCK)
            is_whole_block = end - begin == BLOCK
            for key_begin, key_end in [*whole, (num_prefix + own.start, num_prefix + end)]:
                partial[block, key_begin // BLOCK : -(-key_end // BLOCK)] = True
            if is_whole_block:  # 块里全是这一段的查询：键也全看得到的块不必看掩码
                for key_begin, key_end in [*whole, (num_prefix + own.start, num_prefix + begin + 1)]:
                    full[block, -(-key_begin // BLOCK) : key_end // BLOCK] = True
    full[: total // BLOCK, : num_prefix // BLOCK] = True  # 前缀不论哪一段都看得到
    return BlockMask.from_kv_blocks(
        *ordered_blocks(partial & ~full, device),
        *ordered_blocks(full, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask,
        seq_lengths=(total, num_prefix + total),
    )


def ordered_blocks(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """bool [行, 列] → BlockMask 的两个表：每行的个数 [1, 1, 行]，列号（要的在前）[1, 1, 行, 列]。"""
    counts = torch.from_numpy(blocks.sum(axis=1, dtype=np.int32))
    columns = torch.from_numpy(np.argsort(~blocks, axis=1, kind="stable").astype(np.int32))
    return counts[None, None].to(device), columns[None, None].to(device)


# ---------------------------------------------------------------------------------------------------------------------


def layout_on_gpu(
    lengths: list[int], parents: list[int], num_prefix: int, device: torch.device, dtype: torch.dtype, head_dim: int,
    slopes: Tensor | None,
) -> VarlenAttention | FlexAttention | None:  # fmt: skip
    """这一次前向的布局；slopes 是 ALiBi 的斜率 [heads]，旋转位置编码为 None。用不了（CPU、fp32、旧卡）时为 None。"""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > 256:
        return None
    if torch.get_device_module(device).get_device_capability(device) < (8, 0):
        return None
    layout = Layout(lengths, parents, num_prefix)
    if slopes is None:
        return None if varlen_function() is None else VarlenAttention(layout, device)
    return FlexAttention(layout, slopes, device) if elementwise_gpu.can_compile() and head_dim >= 16 else None
