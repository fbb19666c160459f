"""RMSNorm 与 SwiGLU 的前向与反向：数值与写开的式子相同，反向只保留输入，不留 fp32 的中间结果。"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from baichuan import elementwise_gpu
from baichuan.elementwise_gpu import fused, is_worth_it, normalize


class RMSNormFunction(torch.autograd.Function):
    """y = w · cast(x / rms(x))。

    方差用 fp32；权重是半精度时，归一化的结果先转成权重的类型再相乘（官方代码的次序）。
    形状：x [..., H]，w [H] → [..., H]；反向保留 x 与 1/rms [..., 1]（fp32）。
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if is_worth_it(x):
            y, inverse_rms = fused(elementwise_gpu.rms_norm, (x.flatten(0, -2),), weight.detach(), eps)
            ctx.save_for_backward(x, weight, inverse_rms)
            return y.view(x.shape)
        square_sum = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        inverse_rms = square_sum.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return weight * normalize(x, inverse_rms, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: Tensor):
        x, weight, inverse_rms = ctx.saved_tensors
        x_grad = weight_grad = None
        if is_worth_it(x):
            rows = y_grad.flatten(0, -2), x.flatten(0, -2), inverse_rms
            if ctx.needs_input_grad[1]:
                weight_grad = fused(elementwise_gpu.rms_norm_weight_grad, rows, weight.detach())
            if ctx.needs_input_grad[0]:
                x_grad = fused(elementwise_gpu.rms_norm_input_grad, rows, weight.detach()).view(x.shape)
            return x_grad, weight_grad, None
        if ctx.needs_input_grad[1]:
            product = y_grad * normalize(x, inverse_rms, weight)
            weight_grad = product.flatten(0, -2).sum(dim=0, dtype=torch.float32).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            # d/dx (x·r) = r·(g - x·r²·mean(g·x))，g 是对归一化结果的梯度
            grad = (y_grad * weight).float()
            along = (grad * x).mean(dim=-1, keepdim=True) * inverse_rms.square()
            x_grad = grad.addcmul_(x, along, value=-1.0).mul_(inverse_rms).to(x.dtype)
        return x_grad, weight_grad, None


class SwiGLUFunction(torch.autograd.Function):
    """y = silu(gate) · up；反向只保留 gate 与 up，silu(gate) 重算。形状全部相同。"""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if is_worth_it(gate):
            return fused(elementwise_gpu.swiglu, (gate.flatten(0, -2), up.flatten(0, -2))).view(gate.shape)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: Tensor):
        gate, up = ctx.saved_tensors
        if is_worth_it(gate):
            grads = fused(elementwise_gpu.swiglu_grads, tuple(t.flatten(0, -2) for t in (y_grad, gate, up)))
            return tuple(grad.view(gate.shape) for grad in grads)
        gate_grad = torch.ops.aten.silu_backward(y_grad * up, gate)
        return gate_grad, nn.functional.silu(gate).mul_(y_grad)
