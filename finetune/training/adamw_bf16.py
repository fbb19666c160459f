"""全是 16 位的 AdamW：每个参数 10 字节（权重、梯度、两个动量、余数各 2），小的更新也不丢。

bf16 只有 8 位有效数字：权重 1 加上 0.001 还是 1。所以 fp32 的权重拆成两半：舍入得到的 bf16 是前向所用的权重，舍掉的
16 位存成整数（余数，即 Kahan 求和所补的那个数，一位不差）；每步先拼回 fp32，更新，再拆开。动量在 fp32 里更新之后舍入到
bf16。
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

CHUNK = 1 << 24  # 一次更新的元素数：fp32 的临时量各 64 MB


def split(full: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 → (最近的 bf16, 余数 int16)。"""
    bits = full.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(weight: Tensor, rest: Tensor) -> Tensor:
    """split 的逆，逐位相同。"""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + rest).view(torch.float32)


class AdamWBF16(torch.optim.Optimizer):
    """更新同 torch.optim.AdamW；参数与梯度都是 bf16，连续存放。"""

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def init_state(self, group: dict, parameter: Tensor, *_) -> None:
        """一个参数的状态：名字与类型决定存下什么（见 checkpoint/optimizer_state.py）。"""
        self.state[parameter] = {
            "step": 0,
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            "compensation": torch.zeros_like(parameter, dtype=torch.int16, requires_grad=False),
        }

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """更新一步，一段一段地算，fp32 的临时量不随参数的大小增长。"""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter)
                state = self.state[parameter]
                state["step"] += 1
                tensors = (parameter, parameter.grad, *(state[k] for k in ("exp_avg", "exp_avg_sq", "compensation")))
                for chunk in zip(*(tensor.view(-1).split(CHUNK) for tensor in tensors), strict=True):
                    _update(*chunk, step=state["step"], group=group)


def _update(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rest: Tensor, step: int, group: dict):
    """一段的更新，原地。"""
    (beta1, beta2), lr = group["betas"], group["lr"]
    full, grad = join(weight, rest), grad.float()
    mean = exp_avg.float().lerp_(grad, 1 - beta1)
    square = exp_avg_sq.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    exp_avg.copy_(mean)
    exp_avg_sq.copy_(square)
    denominator = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
    full.mul_(1 - lr * group["weight_decay"]).addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))
    high, low = split(full)
    weight.copy_(high)
    rest.copy_(low)
