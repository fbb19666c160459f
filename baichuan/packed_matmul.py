"""CPU 上并排样本的注意力：逐样本、逐块的矩阵乘法与 softmax，前向与反向都手写，梯度直接写进 W_pack 输出的布局。"""

from collections.abc import Iterator
from itertools import pairwise

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

    形状：packed_states [1, T, 3H]（W_pack 的输出；q、k 就地旋转），cos、sin [1, T, 1, d] 或 None，
    bias [heads | 1, S, V + S]（因果掩码与 ALiBi，S 为最长样本的长度），prefix_key、prefix_value [heads, V, d] 或 None
    → ([1, T, H], packed_states)；后者只因被就地改写而返回。
    """

    @staticmethod
    def forward(ctx, packed_states, cos, sin, bias, document_lengths, head_dim, prefix_key, prefix_value):
        states = by_head(packed_states, head_dim)[0]  # [T, 3, heads, d]
        if cos is not None:
            rotate(states, states, cos[0], sin[0])
            ctx.mark_dirty(packed_states)
        output = states.new_empty(states.shape[0], *states.shape[2:])
        keeps = any(ctx.needs_input_grad)
        saved = []
        for rows, query, key, value in _documents(states, document_lengths, prefix_key, prefix_value):
            document_output = output[rows].transpose(0, 1)  # [heads, S, d]
            for begin, end in query_blocks(query.shape[1]):
                num_keys = key.shape[1] - query.shape[1] + end
                probabilities = _probabilities(query[:, begin:end], key[:, :num_keys], bias[:, begin:end, :num_keys])
                document_output[:, begin:end] = torch.bmm(probabilities, value[:, :num_keys])
                if keeps and query.shape[1] <= MAX_SAVED_LENGTH:
                    saved.append(probabilities)
        recomputes = max(document_lengths) > MAX_SAVED_LENGTH
        ctx.save_for_backward(packed_states, cos, sin, bias if recomputes else None, prefix_key, prefix_value, *saved)
        ctx.document_lengths, ctx.head_dim = document_lengths, head_dim
        ctx.set_materialize_grads(False)
        return output.view(1, states.shape[0], -1), packed_states

    @staticmethod
    @once_differentiable
    def backward(ctx, output_grad: Tensor, _):
        packed_states, cos, sin, bias, prefix_key, prefix_value, *saved = ctx.saved_tensors
        saved = iter(saved)
        scale = ctx.head_dim**-0.5
        packed_grad = torch.empty_like(packed_states)
        states, states_grad = (by_head(tensor, ctx.head_dim)[0] for tensor in (packed_states, packed_grad))
        output_grad = output_grad.view(states.shape[0], *states.shape[2:])
        prefix_grads = None
        if prefix_key is not None:
            prefix_grads = torch.zeros_like(prefix_key), torch.zeros_like(prefix_value)
        for rows, query, key, value in _documents(states, ctx.document_lengths, prefix_key, prefix_value):
            length, num_prefix = query.shape[1], key.shape[1] - query.shape[1]
            grad = output_grad[rows].transpose(0, 1)
            query_grad, key_grad, value_grad = states_grad[rows].permute(1, 2, 0, 3)  # 各 [heads, S, d] 的视图
            sums = None
            for begin, end in query_blocks(length):
                num_keys = num_prefix + end
                q, k, v = query[:, begin:end], key[:, :num_keys], value[:, :num_keys]
                if length <= MAX_SAVED_LENGTH:
                    probabilities = next(saved)
                else:
                    probabilities = _probabilities(q, k, bias[:, begin:end, :num_keys])
                g = grad[:, begin:end]
                probabilities_grad = torch.bmm(g, v.transpose(1, 2))
                scores_grad = softmax_backward(probabilities_grad, probabilities, -1, probabilities.dtype)
                scores_grad *= scale
                query_grad[:, begin:end] = torch.bmm(scores_grad, k)
                parts = torch.bmm(scores_grad.transpose(1, 2), q), torch.bmm(probabilities.transpose(1, 2), g)
                if sums is not None:  # 后面的块看到更多的键：前面各块的和加进去
                    for part, total in zip(parts, sums, strict=True):
                        part[:, : total.shape[1]] += total
                sums = parts
            key_grad.copy_(sums[0][:, num_prefix:])
            value_grad.copy_(sums[1][:, num_prefix:])
            if prefix_grads is not None:
                for total, part in zip(prefix_grads, sums, strict=True):
                    total += part[:, :num_prefix]
        if cos is not None:
            rotate(states_grad, states_grad, cos[0], -sin[0])
        return packed_grad, None, None, None, None, None, *(prefix_grads or (None, None))


def _documents(states, lengths, prefix_key, prefix_value) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """逐个样本：(它的行, q [heads, S, d], k、v [heads, V + S, d])；都是视图，有前缀时 k、v 是拼好的。"""
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        query, key, value = states[rows].permute(1, 2, 0, 3)
        if prefix_key is not None:
            key, value = torch.cat([prefix_key, key], dim=1), torch.cat([prefix_value, value], dim=1)
        yield rows, query, key, value
        begin += length


def query_blocks(length: int) -> list[tuple[int, int]]:
    """把 length 个查询分成尽量相等、每块至多 BLOCK 个的几块：[(起, 止)]。"""
    count = -(-length // BLOCK)
    edges = [length * index // count for index in range(count + 1)]
    return list(pairwise(edges))


def _probabilities(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """softmax(q kᵀ / √d + bias)：[heads, q, d]、[heads, kv, d]、[heads | 1, q, kv] → [heads, q, kv]。"""
    return torch.baddbmm(bias, query, key.transpose(1, 2), alpha=query.shape[-1] ** -0.5).softmax(dim=-1)
