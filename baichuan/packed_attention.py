"""并排样本（packing）的注意力：每个样本只看自己，任何地方都不出现 长度² 的整包掩码。"""

import torch
from torch import Tensor, nn

# CPU 上短样本用矩阵乘法 + softmax 更快，长样本用 SDPA（不存 S×S 的概率）；交叉点由 scripts/bench.py 量得
CPU_MATMUL_MAX_LENGTH = 512


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    document_lengths: list[int],
    bias: Tensor | None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> Tensor:
    """对并排的各样本分别做因果注意力。

    Args:
        query, key, value: [T, heads, head_dim]，T 为各样本长度之和（旋转位置编码已加）。
        document_lengths: 各样本的长度，和为 T。
        bias: [heads | 1, S, V + S]，S 为最长样本的长度：ALiBi 偏置与因果掩码之和，按样本长度裁取；
            None 表示不需要偏置（旋转位置编码且没有前缀，由 is_causal 表示因果）。
        prefix_key, prefix_value: [heads, V, head_dim]，P-Tuning 的前缀，放在每个样本之前；没有则为 None。

    Returns:
        [T, heads, head_dim]。
    """
    outputs = []
    documents = zip(
        query.split(document_lengths), key.split(document_lengths), value.split(document_lengths), strict=True
    )
    for document_query, document_key, document_value in documents:
        q, k, v = (states.transpose(0, 1) for states in (document_query, document_key, document_value))  # [heads, S, d]
        length, document_bias = q.shape[1], None
        if prefix_key is not None:
            k, v = torch.cat([prefix_key, k], dim=1), torch.cat([prefix_value, v], dim=1)
        if bias is not None:
            document_bias = bias[:, :length, : k.shape[1]]
        outputs.append(_document_attention(q, k, v, document_bias).transpose(0, 1))
    return torch.cat(outputs)


def _document_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """一个样本的因果注意力：query [heads, S, d]，key、value [heads, K, d] → [heads, S, d]。"""
    if query.device.type == "cpu" and bias is not None and query.shape[1] <= CPU_MATMUL_MAX_LENGTH:
        scale = query.shape[-1] ** -0.5
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)
        return torch.bmm(scores.softmax(dim=-1), value)
    return nn.functional.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=None if bias is None else bias[None],
        is_causal=bias is None,
    )[0]
