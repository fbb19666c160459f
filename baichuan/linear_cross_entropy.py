"""词表投影与交叉熵合在一起分块计算：任何时候只有有限行的 logits 存在，前向与反向都是。"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 一块 logits（fp32）的元素数上限：512 MiB。块太小时矩阵乘法吃不饱，由 benchmarks/speed/bench.py 量得
MAX_LOGITS_ELEMENTS = 2**27


class LinearCrossEntropy(torch.autograd.Function):
    """sum_n CE(scale · (hidden_n @ weightᵀ), target_n)，梯度在前向里随块算好，logits 只算一次、用完即弃。

    归一化的词表投影（NormHead）以 scale = 1/‖weight_v‖ 表示，不另存一份归一化后的权重；
    权重需要梯度时，梯度按 ∂(w/‖w‖)/∂w 投影回原权重。
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        targets: Tensor,
        added: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:
        """hidden [N, H]，weight [V, H]，scale [V] fp32 或 None，targets [N] int64 → 标量 fp32（N 可为 0）。

        added [n, H]：从 first 号起的 n 个词用这些行（可以超出 V，盖住的不用），scale 也含它们，见 with_added。
        """
        rows_per_chunk = max(1, MAX_LOGITS_ELEMENTS // weight.shape[0])
        loss = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        added_grad = None if added is None else torch.zeros_like(added)
        for start in range(0, hidden.shape[0], rows_per_chunk):
            rows = slice(start, start + rows_per_chunk)
            logits = hidden[rows] @ weight.t()  # [n, V]
            if added is not None:
                logits = with_added(logits, hidden[rows] @ added.t(), first)
            logits = logits.float()
            if scale is not None:
                logits *= scale
            target = targets[rows, None]
            log_normalizer = logits.logsumexp(dim=-1, keepdim=True)
            loss += (log_normalizer - logits.gather(1, target)).sum()
            if not any(ctx.needs_input_grad):
                continue
            # d loss / d logits = softmax - onehot，写在 logits 的存储上
            logits_grad = logits.sub_(log_normalizer).exp_()
            logits_grad.scatter_add_(1, target, torch.full_like(log_normalizer, -1.0))
            if scale is not None:
                logits_grad *= scale
            logits_grad = logits_grad.to(hidden.dtype)
            if added is not None:
                span = slice(first, first + len(added))
                on_added = logits_grad[:, span].clone()
                logits_grad[:, span] = 0
                logits_grad = logits_grad[:, : len(weight)]
                added_grad.addmm_(on_added.t(), hidden[rows])
            if hidden_grad is not None:
                torch.mm(logits_grad, weight, out=hidden_grad[rows])
                if added is not None:
                    hidden_grad[rows].addmm_(on_added, added)
            if weight_grad is not None:
                weight_grad.addmm_(logits_grad.t(), hidden[rows])
        if weight_grad is not None and scale is not None:
            remove_radial(weight_grad, weight, scale[: len(weight)])
        if added is not None and scale is not None:
            remove_radial(added_grad, added, scale[first : first + len(added)])
        ctx.grads = [hidden_grad, weight_grad, None, None, added_grad, None][: len(ctx.needs_input_grad)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad: Tensor):
        assert ctx.grads is not None, "LinearCrossEntropy 的反向只能走一次"
        grads, ctx.grads = ctx.grads, None
        # 梯度已按和式算好，这里只乘上外面的系数（含 fp16 的损失缩放）
        return tuple(None if grad is None else grad.mul_(loss_grad) for grad in grads)


def with_added(values: Tensor, added: Tensor, first: int) -> Tensor:
    """values [..., V] 从 first 起换成 added [..., n]；可以超出 V。"""
    return torch.cat([values[..., :first], added, values[..., first + added.shape[-1] :]], dim=-1)


def remove_radial(weight_grad: Tensor, weight: Tensor, scale: Tensor):
    """w/‖w‖ 的梯度要去掉沿 w 的分量：g - ŵ (ŵ·g)；就地，分块，免得整份权重的 fp32 副本同时存在。"""
    rows_per_chunk = max(1, MAX_LOGITS_ELEMENTS // weight.shape[1])
    chunks = zip(*(tensor.split(rows_per_chunk) for tensor in (weight_grad, weight, scale)), strict=True)
    for grad, rows, row_scale in chunks:
        along = (grad.float() * rows.float()).sum(dim=-1, keepdim=True) * row_scale[:, None].square()
        grad -= (rows * along).to(grad.dtype)


def inverse_row_norms(weight: Tensor) -> Tensor:
    """各行 2-范数的倒数：weight [V, H] → [V] fp32；范数下限 1e-12，与 torch.nn.functional.normalize 相同。"""
    return torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).clamp_min(1e-12).reciprocal()
