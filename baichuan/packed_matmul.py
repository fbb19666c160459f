"""CPU 上并排样本的注意力：逐样本、逐块的矩阵乘法与 softmax，前向与反向都手写，梯度直接写进 W_pack 输出的布局。"""

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from baichuan.attention import by_head, rotate

# 一块至多这么多个查询：块只看到它末尾为止的键，因果的上三角大多不必算
BLOCK = 256
# 样本不长于它时存下概率，反向直接用；更长的在反向里重算，免得存 S² 个数
MAX_SAVED_LENGTH = 512

softmax_backward = torch.ops.aten._softmax_backward_data


class PackedMatmulAttention(torch.autograd.Function):
    """旋转位置编码 + 并排样本的因果注意力。

    形状：packed_states [1, T, 3H]（W_pack 的输出），cos、sin [1, T, 1, d] 或 None，
    bias [heads | 1, S, V + S]（因果掩码与 ALiBi，S 为最长样本的长度），prefix_key、prefix_value [heads, V, d] 或 None
    → [1, T, H]。反向保留各样本旋转之后的 q、k、v，不再用 packed_states。
    """

    @staticmethod
    def forward(ctx, packed_states, cos, sin, bias, document_lengths, head_dim, prefix_key, prefix_value):
        states = by_head(packed_states, head_dim)[0].permute(1, 2, 0, 3)  # [3, heads, T, d]
        output = states.new_empty(states.shape[2], *states.shape[1::2])  # [T, heads, d]
        keeps = any(ctx.needs_input_grad)
        saved = []
        for rows in document_rows(document_lengths):
            # 布局整齐，矩阵乘法才不必逐次复制
            document = states[:, :, rows].clone(memory_format=torch.contiguous_format)
            if cos is not None:
                rotate(document[:2], cos[0, rows, 0], sin[0, rows, 0])
            query, key, value = with_prefix(document, prefix_key, prefix_value)
            document_output = output[rows].transpose(0, 1)  # [heads, S, d]
            probabilities = []
            for begin, end in query_blocks(query.shape[1]):
                num_keys = key.shape[1] - query.shape[1] + end
                block = softmax_scores(query[:, begin:end], key[:, :num_keys], bias[:, begin:end, :num_keys])
                document_output[:, begin:end] = torch.bmm(block, value[:, :num_keys])
                probabilities.append(block)
            if keeps:
                saved.append(document)
                saved += probabilities if query.shape[1] <= MAX_SAVED_LENGTH else []
        recomputes = max(document_lengths) > MAX_SAVED_LENGTH
        ctx.save_for_backward(cos, sin, bias if recomputes else None, prefix_key, prefix_value, *saved)
        ctx.document_lengths, ctx.head_dim, ctx.packed_shape = document_lengths, head_dim, packed_states.shape
        return output.view(1, states.shape[2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, output_grad: Tensor):
        cos, sin, bias, prefix_key, prefix_value, *saved = ctx.saved_tensors
        saved = iter(saved)
        scale = ctx.head_dim**-0.5
        packed_grad = output_grad.new_empty(ctx.packed_shape)
        states_grad = by_head(packed_grad, ctx.head_dim)[0].permute(1, 2, 0, 3)  # [3, heads, T, d]
        output_grad = output_grad.view(states_grad.shape[2], -1, ctx.head_dim).transpose(0, 1)  # [heads, T, d]
        prefix_grads = None
        if prefix_key is not None:
            prefix_grads = torch.zeros_like(prefix_key), torch.zeros_like(prefix_value)
        for rows in document_rows(ctx.document_lengths):
            document = next(saved)
            query, key, value = with_prefix(document, prefix_key, prefix_value)
            grad = output_grad[:, rows].contiguous()
            document_grad = torch.empty_like(document)
            length, num_prefix = query.shape[1], key.shape[1] - query.shape[1]
            sums = None
            for begin, end in query_blocks(length):
                num_keys = num_prefix + end
                q, k, v = query[:, begin:end], key[:, :num_keys], value[:, :num_keys]
                if length <= MAX_SAVED_LENGTH:
                    probabilities = next(saved)
                else:
                    probabilities = softmax_scores(q, k, bias[:, begin:end, :num_keys])
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
                part.copy_(total[:, num_prefix:])
            if prefix_grads is not None:
                for total, part in zip(prefix_grads, sums, strict=True):
                    total += part[:, :num_prefix]
            if cos is not None:
                rotate(document_grad[:2], cos[0, rows, 0], -sin[0, rows, 0])
            states_grad[:, :, rows] = document_grad
        return packed_grad, None, None, None, None, None, *(prefix_grads or (None, None))


def document_rows(lengths: list[int]) -> Iterator[slice]:
    """并排的各样本占哪些行。"""
    for begin, end in pairwise(accumulate(lengths, initial=0)):
        yield slice(begin, end)


def with_prefix(document: Tensor, prefix_key: Tensor | None, prefix_value: Tensor | None) -> tuple[Tensor, ...]:
    """一个样本的 [3, heads, S, d] → q [heads, S, d]，k、v [heads, V + S, d]。"""
    query, key, value = document
    if prefix_key is not None:
        key, value = torch.cat([prefix_key, key], dim=1), torch.cat([prefix_value, value], dim=1)
    return query, key, value


def query_blocks(length: int) -> list[tuple[int, int]]:
    """把 length 个查询分成尽量相等、每块至多 BLOCK 个的几块：[(起, 止)]。"""
    count = -(-length // BLOCK)
    edges = [length * index // count for index in range(count + 1)]
    return list(pairwise(edges))


def softmax_scores(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """softmax(q kᵀ / √d + bias)：[heads, q, d]、[heads, kv, d]、[heads | 1, q, kv] → [heads, q, kv]。"""
    return torch.baddbmm(bias, query, key.transpose(1, 2), alpha=query.shape[-1] ** -0.5).softmax(dim=-1)
