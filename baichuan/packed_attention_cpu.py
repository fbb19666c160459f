"""CPU 上并排样本的注意力：逐段、逐块的矩阵乘法与 softmax，前向与反向都手写，梯度直接写进 W_pack 输出的布局。"""

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from baichuan.attention import by_head, rotate

# 一块至多这么多个查询：块只看到它末尾为止的键，因果的上三角大多不必算
BLOCK = 256
# 一段的概率（查询 × 键）不多于这么多个时存下，反向直接用；更多的在反向里重算
MAX_SAVED_SCORES = 512 * 512

softmax_backward = torch.ops.aten._softmax_backward_data


class PackedMatmulAttention(torch.autograd.Function):
    """旋转位置编码 + 并排样本的因果注意力。

    形状：packed_states [1, T, 3H]（W_pack 的输出），cos、sin [1, T, 1, d] 或 None，
    bias [heads | 1, S, V + S]（因果掩码与 ALiBi，S 为最长样本的长度），prefix_key、prefix_value [heads, V, d] 或 None
    → [1, T, H]。document_lengths、document_parents 见 AttentionContext；父段在前。
    反向保留各段旋转之后的 q、k、v，不再用 packed_states。
    """

    @staticmethod
    def forward(ctx, packed_states, cos, sin, bias, document_lengths, document_parents, head_dim, *prefix):
        states = by_head(packed_states, head_dim)[0].permute(1, 2, 0, 3)  # [3, heads, T, d]
        output = states.new_empty(states.shape[2], *states.shape[1::2])  # [T, heads, d]
        keeps = any(ctx.needs_input_grad)
        documents, saved, recomputes = [], [], False
        for rows, parent, first in segments(document_lengths, document_parents):
            # 布局整齐，矩阵乘法才不必逐次复制
            document = states[:, :, rows].clone(memory_format=torch.contiguous_format)
            if cos is not None:
                rotate(document[:2], cos[0, rows, 0], sin[0, rows, 0])
            documents.append(document)
            query, key, value = with_prefix(document, documents[parent] if first else None, *prefix)
            document_output = output[rows].transpose(0, 1)  # [heads, S, d]
            probabilities = []
            for begin, end in query_blocks(query.shape[1]):
                num_keys = key.shape[1] - query.shape[1] + end
                seen = bias[:, first + begin : first + end, :num_keys]
                block = softmax_scores(query[:, begin:end], key[:, :num_keys], seen)
                document_output[:, begin:end] = torch.bmm(block, value[:, :num_keys])
                probabilities.append(block)
            if query.shape[1] * key.shape[1] > MAX_SAVED_SCORES:
                recomputes = True
            elif keeps:
                saved += probabilities
        ctx.save_for_backward(cos, sin, bias if recomputes else None, *prefix, *(documents + saved if keeps else []))
        ctx.document_lengths, ctx.document_parents = document_lengths, document_parents
        ctx.head_dim, ctx.packed_shape = head_dim, packed_states.shape
        return output.view(1, states.shape[2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, output_grad: Tensor):
        cos, sin, bias, prefix_key, prefix_value, *saved = ctx.saved_tensors
        documents, saved = saved[: len(ctx.document_lengths)], iter(saved[len(ctx.document_lengths) :])
        scale = ctx.head_dim**-0.5
        packed_grad = output_grad.new_empty(ctx.packed_shape)
        states_grad = by_head(packed_grad, ctx.head_dim)[0].permute(1, 2, 0, 3)  # [3, heads, T, d]
        output_grad = output_grad.view(states_grad.shape[2], -1, ctx.head_dim).transpose(0, 1)  # [heads, T, d]
        prefix_grads = None
        if prefix_key is not None:
            prefix_grads = torch.zeros_like(prefix_key), torch.zeros_like(prefix_value)
        num_prefix = 0 if prefix_key is None else prefix_key.shape[1]
        document_grads = []
        places = list(segments(ctx.document_lengths, ctx.document_parents))
        for document, (rows, parent, first) in zip(documents, places, strict=True):
            own = num_prefix + first  # 自己的键从第几个起
            query, key, value = with_prefix(document, documents[parent] if first else None, prefix_key, prefix_value)
            grad = output_grad[:, rows].contiguous()
            document_grad = torch.empty_like(document)
            length = query.shape[1]
            sums = None
            for begin, end in query_blocks(length):
                num_keys = own + end
                q, k, v = query[:, begin:end], key[:, :num_keys], value[:, :num_keys]
                if length * key.shape[1] <= MAX_SAVED_SCORES:
                    probabilities = next(saved)
                else:
                    probabilities = softmax_scores(q, k, bias[:, first + begin : first + end, :num_keys])
                g = grad[:, begin:end]
                scores_grad = torch.bmm(g, v.transpose(1, 2))
                scores_grad = softmax_backward(scores_grad, probabilities, -1, probabilities.dtype).mul_(scale)
                document_grad[0, :, begin:end] = torch.bmm(scores_grad, k)
                parts = torch.bmm(scores_grad.transpose(1, 2), q), torch.bmm(probabilities.transpose(1, 2), g)
                if sums is not None:  # 后面的块看到更多的键：前面各块的和加进去
                    for part, total in zip(parts, sums, strict=True):
                        part[:, : total.shape[1]] += total
                sums = parts
            for part, total in zip(document_grad[1:], sums, strict=True):
                part.copy_(total[:, own:])
            if first:
                for total, part in zip(document_grads[parent][1:], sums, strict=True):
                    total += part[:, num_prefix:own]
            if prefix_grads is not None:
                for total, part in zip(prefix_grads, sums, strict=True):
                    total += part[:, :num_prefix]
            document_grads.append(document_grad)
        for document_grad, (rows, _, _) in zip(document_grads, places, strict=True):
            if cos is not None:
                rotate(document_grad[:2], cos[0, rows, 0], -sin[0, rows, 0])
            states_grad[:, :, rows] = document_grad
        return packed_grad, None, None, None, None, None, None, *(prefix_grads or (None, None))


def segments(lengths: list[int], parents: list[int]) -> Iterator[tuple[slice, int, int]]:
    """并排的各段：(占哪些行, 父段, 第一个查询的位置)；没有父段的从 0 起。"""
    for (begin, end), parent in zip(pairwise(accumulate(lengths, initial=0)), parents, strict=True):
        yield slice(begin, end), parent, lengths[parent] if parent >= 0 else 0


def with_prefix(
    document: Tensor, parent: Tensor | None, prefix_key: Tensor | None, prefix_value: Tensor | None
) -> tuple[Tensor, ...]:
    """一段的 [3, heads, S, d] → q [heads, S, d]，k、v [heads, V + U + S, d]；U 为父段的长度。"""
    query, key, value = document
    before = [] if prefix_key is None else [(prefix_key, prefix_value)]
    before += [] if parent is None else [(parent[1], parent[2])]
    if before:
        key, value = (torch.cat(parts, dim=1) for parts in zip(*before, (key, value), strict=True))
    return query, key, value


def query_blocks(length: int) -> list[tuple[int, int]]:
    """把 length 个查询分成尽量相等、每块至多 BLOCK 个的几块：[(起, 止)]。"""
    count = -(-length // BLOCK)
    edges = [length * index // count for index in range(count + 1)]
    return list(pairwise(edges))


def softmax_scores(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """softmax(q kᵀ / √d + bias)：[heads, q, d]、[heads, kv, d]、[heads | 1, q, kv] → [heads, q, kv]。"""
    return torch.baddbmm(bias, query, key.transpose(1, 2), alpha=query.shape[-1] ** -0.5).softmax(dim=-1)
