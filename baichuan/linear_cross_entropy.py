"""词表投影与交叉熵合在一起分块计算：任何时候只有有限行的 logits 存在，前向与反向都是。"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 一块 logits（fp32）的元素数上限：512 MiB。块太小时矩阵乘法吃不饱，由 benchmarks/speed/bench.py 量得
MAX_LOGITS_ELEMENTS = 2**27
# 一次求这么多个数的行范数：fp32 64 MiB
NORM_ELEMENTS = 2**24


class Projection(NamedTuple):
    """词表投影：scale · (hidden @ weightᵀ)。

    归一化的词表投影（NormHead）以 scale = 1/‖weight_v‖ 表示，不另存一份归一化后的权重；
    权重需要梯度时，梯度按 ∂(w/‖w‖)/∂w 投影回原权重。
    weight [V, H]，scale [V] fp32 或 None；added [n, H]：从 first 号起的 n 个词用这些行（可以超出 V，盖住的不用），
    scale 也含它们。
    """

    weight: Tensor
    scale: Tensor | None
    added: Tensor | None = None
    first: int = 0

    def chunks(self, hidden: Tensor) -> list[slice]:
        """hidden [N, H] 的各块行。"""
        size = max(1, MAX_LOGITS_ELEMENTS // self.weight.shape[0])
        return [slice(start, start + size) for start in range(0, hidden.shape[0], size)]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, H] → fp32 [n, V]。"""
        logits = hidden @ self.weight.t()
        if self.added is not None:
            logits = with_added(logits, hidden @ self.added.t(), self.first)
        logits = logits.float()
        return logits if self.scale is None else logits.mul_(self.scale)

    def product_grad(self, logits: Tensor, log_normalizer: Tensor, target: Tensor) -> Tensor:
        """d CE / d (hidden @ weightᵀ)，fp32，写在 logits 的存储上：(softmax - onehot) · scale。"""
        grad = logits.sub_(log_normalizer).exp_()
        grad.scatter_add_(1, target, torch.full_like(log_normalizer, -1.0))
        return grad if self.scale is None else grad.mul_(self.scale)

    def backward(self, product_grad: Tensor, hidden: Tensor, grads: list[Tensor | None]):
        """product_grad [n, V]（用完即弃）、hidden [n, H] → grads：写 hidden 的，累加 weight、added 的；None 不算。"""
        hidden_grad, weight_grad, added_grad = grads
        if self.added is not None:
            span = slice(self.first, self.first + len(self.added))
            on_added = product_grad[:, span].clone()
            product_grad[:, span] = 0
            product_grad = product_grad[:, : len(self.weight)]
            if added_grad is not None:
                added_grad.addmm_(on_added.t(), hidden)
        if hidden_grad is not None:
            torch.mm(product_grad, self.weight, out=hidden_grad)
            if self.added is not None:
                hidden_grad.addmm_(on_added, self.added)
        if weight_grad is not None:
            weight_grad.addmm_(product_grad.t(), hidden)

    def finish(self, weight_grad: Tensor | None, added_grad: Tensor | None):
        """全部块累加之后：NormHead 的梯度投影回原权重，就地。"""
        if self.scale is None:
            return
        if weight_grad is not None:
            remove_radial(weight_grad, self.weight, self.scale[: len(self.weight)])
        if added_grad is not None:
            remove_radial(added_grad, self.added, self.scale[self.first : self.first + len(self.added)])


class LinearCrossEntropy(torch.autograd.Function):
    """sum_n CE(scale · (hidden_n @ weightᵀ), target_n)，梯度在前向里随块算好，logits 只算一次、用完即弃。"""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, scale: Tensor | None, targets: Tensor, *added) -> Tensor:
        """hidden [N, H]，targets [N] int64，其余见 Projection → 标量 fp32（N 可为 0）。"""
        projection = Projection(weight, scale, *added)
        loss = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad, added_grad = parameter_grads(ctx, projection)
        for rows in projection.chunks(hidden):
            logits, target = projection.logits(hidden[rows]), targets[rows, None]
            log_normalizer = logits.logsumexp(dim=-1, keepdim=True)
            loss += (log_normalizer - logits.gather(1, target)).sum()
            if not any(ctx.needs_input_grad):
                continue
            product_grad = projection.product_grad(logits, log_normalizer, target).to(hidden.dtype)
            of_rows = None if hidden_grad is None else hidden_grad[rows]
            projection.backward(product_grad, hidden[rows], [of_rows, weight_grad, added_grad])
        projection.finish(weight_grad, added_grad)
        ctx.grads = [hidden_grad, weight_grad, None, None, added_grad, None][: len(ctx.needs_input_grad)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad: Tensor):
        assert ctx.grads is not None, "LinearCrossEntropy 的反向只能走一次"
        grads, ctx.grads = ctx.grads, None
        # 梯度已按和式算好，这里只乘上外面的系数（含 fp16 的损失缩放）
        return tuple(None if grad is None else grad.mul_(loss_grad) for grad in grads)


class RowCrossEntropy(torch.autograd.Function):
    """各行的 CE(scale · (hidden_n @ weightᵀ), target_n)，不求和：各行的权重要到前向之后才知道（偏好的损失）。

    隐藏状态的梯度各行独立，在前向里按权重 1 算好，反向乘上各行的权重；投影的权重需要梯度时，反向再算一遍 logits。
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, scale: Tensor | None, targets: Tensor, *added) -> Tensor:
        """hidden [N, H]，targets [N] int64，其余见 Projection → [N] fp32（N 可为 0）。"""
        projection = Projection(weight, scale, *added)
        losses = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        ctx.hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in projection.chunks(hidden):
            logits, target = projection.logits(hidden[rows]), targets[rows, None]
            log_normalizer = logits.logsumexp(dim=-1, keepdim=True)
            losses[rows] = (log_normalizer - logits.gather(1, target))[:, 0]
            if ctx.hidden_grad is not None:
                product_grad = projection.product_grad(logits, log_normalizer, target).to(hidden.dtype)
                projection.backward(product_grad, hidden[rows], [ctx.hidden_grad[rows], None, None])
        if any(ctx.needs_input_grad[1:]):
            ctx.save_for_backward(hidden, targets, *projection[:3])
            ctx.first = projection.first
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, losses_grad: Tensor):
        hidden_grad, ctx.hidden_grad = ctx.hidden_grad, None
        num_inputs = len(ctx.needs_input_grad)
        assert hidden_grad is not None or any(ctx.needs_input_grad[1:]), "RowCrossEntropy 的反向只能走一次"
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(losses_grad[:, None].to(hidden_grad.dtype))
        if not any(ctx.needs_input_grad[1:]):
            return (hidden_grad, *[None] * (num_inputs - 1))
        hidden, targets, *tensors = ctx.saved_tensors
        projection = Projection(*tensors, ctx.first)
        weight_grad, added_grad = parameter_grads(ctx, projection)
        for rows in projection.chunks(hidden):
            logits, target = projection.logits(hidden[rows]), targets[rows, None]
            product_grad = projection.product_grad(logits, logits.logsumexp(dim=-1, keepdim=True), target)
            product_grad = (product_grad * losses_grad[rows, None]).to(hidden.dtype)
            projection.backward(product_grad, hidden[rows], [None, weight_grad, added_grad])
        projection.finish(weight_grad, added_grad)
        return (hidden_grad, weight_grad, None, None, added_grad, None)[:num_inputs]


def parameter_grads(ctx, projection: Projection) -> tuple[Tensor | None, Tensor | None]:
    """weight 与 added 的梯度，从零起；不需要的是 None。"""
    needs_added = any(ctx.needs_input_grad[4:])
    weight_grad = torch.zeros_like(projection.weight) if ctx.needs_input_grad[1] else None
    return weight_grad, torch.zeros_like(projection.added) if needs_added else None


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
    """各行 2-范数的倒数：weight [V, H] → [V] fp32；范数下限 1e-12，与 torch.nn.functional.normalize 相同。

    一次几行：CPU 上 vector_norm 先把它整个变成 fp32，7B 的词表投影就是 2 GB。
    """
    parts = weight.split(max(1, NORM_ELEMENTS // weight.shape[1]))
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32) for part in parts]
    return torch.cat(norms).clamp_min(1e-12).reciprocal()
