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
    def forward(ctx, hidden: Tensor, weight: Tensor, scale: Tensor | None, targets: Tensor) -> Tensor:
        """hidden [N, H]，weight [V, H]，scale [V] fp32 或 None，targets [N] int64 → 标量 fp32（N 可为 0）。"""
        loss = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for rows in _chunks(hidden, weight):
            logits, target = _logits(hidden[rows], weight, scale), targets[rows, None]  # logits [n, V]
            log_normalizer = logits.logsumexp(dim=-1, keepdim=True)
            loss += (log_normalizer - logits.gather(1, target)).sum()
            if hidden_grad is None and weight_grad is None:
                continue
            logits_grad = _logits_grad(logits, log_normalizer, target, scale).to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(logits_grad, weight, out=hidden_grad[rows])
            if weight_grad is not None:
                weight_grad.addmm_(logits_grad.t(), hidden[rows])
        if weight_grad is not None and scale is not None:
            project_out(weight_grad, weight, scale)
        ctx.hidden_grad, ctx.weight_grad = hidden_grad, weight_grad
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad: Tensor):
        assert ctx.hidden_grad is not None or ctx.weight_grad is not None, "LinearCrossEntropy 的反向只能走一次"
        hidden_grad, weight_grad = ctx.hidden_grad, ctx.weight_grad
        ctx.hidden_grad = ctx.weight_grad = None
        # 梯度已按和式算好，这里只乘上外面的系数（含 fp16 的损失缩放）
        hidden_grad = None if hidden_grad is None else hidden_grad.mul_(loss_grad)
        weight_grad = None if weight_grad is None else weight_grad.mul_(loss_grad)
        return hidden_grad, weight_grad, None, None


class RowCrossEntropy(torch.autograd.Function):
    """各行的 CE(scale · (hidden_n @ weightᵀ), target_n)，不求和：各行的权重要到前向之后才知道（偏好的损失）。

    隐藏状态的梯度各行独立，在前向里按权重 1 算好，反向乘上各行的权重；投影的权重需要梯度时，反向再算一遍 logits。
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, scale: Tensor | None, targets: Tensor) -> Tensor:
        """hidden [N, H]，weight [V, H]，scale [V] fp32 或 None，targets [N] int64 → [N] fp32（N 可为 0）。"""
        losses = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        ctx.hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _chunks(hidden, weight):
            logits, target = _logits(hidden[rows], weight, scale), targets[rows, None]
            log_normalizer = logits.logsumexp(dim=-1, keepdim=True)
            losses[rows] = (log_normalizer - logits.gather(1, target))[:, 0]
            if ctx.hidden_grad is not None:
                grad = _logits_grad(logits, log_normalizer, target, scale)
                torch.mm(grad.to(hidden.dtype), weight, out=ctx.hidden_grad[rows])
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(hidden, weight, targets)
            ctx.scale = scale
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, losses_grad: Tensor):
        hidden_grad, ctx.hidden_grad = ctx.hidden_grad, None
        assert hidden_grad is not None or ctx.needs_input_grad[1], "RowCrossEntropy 的反向只能走一次"
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(losses_grad[:, None].to(hidden_grad.dtype))
        if not ctx.needs_input_grad[1]:
            return hidden_grad, None, None, None
        hidden, weight, targets = ctx.saved_tensors
        weight_grad, scale = torch.zeros_like(weight), ctx.scale
        for rows in _chunks(hidden, weight):
            logits = _logits(hidden[rows], weight, scale)
            grad = _logits_grad(logits, logits.logsumexp(dim=-1, keepdim=True), targets[rows, None], scale)
            weight_grad.addmm_((grad * losses_grad[rows, None]).to(hidden.dtype).t(), hidden[rows])
        if scale is not None:
            project_out(weight_grad, weight, scale)
        return hidden_grad, weight_grad, None, None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, MAX_LOGITS_ELEMENTS // weight.shape[0])
    return [slice(start, start + size) for start in range(0, hidden.shape[0], size)]


def _logits(hidden: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return logits if scale is None else logits.mul_(scale)


def _logits_grad(logits: Tensor, log_normalizer: Tensor, target: Tensor, scale: Tensor | None) -> Tensor:
    """d CE / d logits（乘上 scale），写在 logits 的存储上：softmax - onehot。"""
    grad = logits.sub_(log_normalizer).exp_()
    grad.scatter_add_(1, target, torch.full_like(log_normalizer, -1.0))
    return grad if scale is None else grad.mul_(scale)


def project_out(weight_grad: Tensor, weight: Tensor, scale: Tensor):
    """w/‖w‖ 的梯度去掉沿 w 的分量：g - ŵ (ŵ·g)，就地；分块，免得整份权重的 fp32 副本同时存在。"""
    rows_per_chunk = max(1, MAX_LOGITS_ELEMENTS // weight.shape[1])
    chunks = zip(*(tensor.split(rows_per_chunk) for tensor in (weight_grad, weight, scale)), strict=True)
    for grad, rows, row_scale in chunks:
        along = (grad.float() * rows.float()).sum(dim=-1, keepdim=True) * row_scale[:, None].square()
        grad -= (rows * along).to(grad.dtype)


def inverse_row_norms(weight: Tensor) -> Tensor:
    """各行 2-范数的倒数：weight [V, H] → [V] fp32；范数下限 1e-12，与 torch.nn.functional.normalize 相同。"""
    return torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).clamp_min(1e-12).reciprocal()
