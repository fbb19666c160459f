"""训练用的 LoRA 前向与反向：冻结的权重不算梯度，低秩的结果直接累加进基座的输出，不多出一份激活的复制。"""

from types import MethodType

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LoraFunction(torch.autograd.Function):
    """y = x Wᵀ + s · dropout(x) Aᵀ Bᵀ（Hu 等，2021）；W 冻结。

    形状：x [..., in]，W [out, in]，A [r, in]，B [out, r]。
    反向只保留 x（或它的 dropout 结果与掩码）与 z = dropout(x) Aᵀ。
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout: float):
        rows = x.reshape(-1, x.shape[-1])
        dropped, mask = torch.native_dropout(rows, dropout, True) if dropout else (rows, None)
        z = dropped @ lora_a.t()  # [T, r]
        y = x.new_empty(*x.shape[:-1], weight.shape[0])  # 不是视图：旋转位置编码随后就地改写它
        y_rows = y.view(-1, weight.shape[0])
        torch.mm(rows, weight.t(), out=y_rows)
        y_rows.addmm_(z, lora_b.t(), alpha=scaling)
        ctx.save_for_backward(weight, lora_a, lora_b, dropped, mask, z)
        ctx.scaling, ctx.keep = scaling, 1.0 - dropout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: Tensor):
        weight, lora_a, lora_b, dropped, mask, z = ctx.saved_tensors
        rows_grad = y_grad.reshape(-1, y_grad.shape[-1])
        z_grad = (rows_grad @ lora_b).mul_(ctx.scaling)  # [T, r]
        a_grad = z_grad.t() @ dropped
        b_grad = (rows_grad.t() @ z).mul_(ctx.scaling)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = rows_grad @ weight
            if mask is None:
                x_grad.addmm_(z_grad, lora_a)
            else:
                x_grad.add_((z_grad @ lora_a).mul_(mask), alpha=1.0 / ctx.keep)
            x_grad = x_grad.view(*y_grad.shape[:-1], weight.shape[1])  # 没有目标的 micro batch 可以是 0 行，-1 认不出
        return x_grad, None, a_grad, b_grad, None, None


def fuse_lora(model: nn.Module) -> nn.Module:
    """让 peft 的 LoRA 层在普通情形下走 LoraFunction。

    别的情形（ZeRO-3、量化、合并、停用、多个适配器）仍走 peft 自己的前向。
    """
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
            module.forward = MethodType(_forward, module)
    return model


def _forward(self: LoraLinear, x: Tensor, *args, **kwargs) -> Tensor:
    adapters = self.active_adapters
    weight = self.base_layer.weight
    is_plain = (
        len(adapters) == 1
        and adapters[0] in self.lora_A
        and adapters[0] not in self.lora_variant
        and not (self.disable_adapters or self.merged or args or kwargs)
        and not (weight.requires_grad or hasattr(weight, "ds_tensor"))
        and x.dtype == weight.dtype == self.lora_A[adapters[0]].weight.dtype
    )
    if not is_plain:
        return LoraLinear.forward(self, x, *args, **kwargs)
    name = adapters[0]
    dropout = self.lora_dropout[name]
    return LoraFunction.apply(
        x,
        weight,
        self.lora_A[name].weight,
        self.lora_B[name].weight,
        self.scaling[name],
        dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0,
    )
