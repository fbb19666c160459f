"""test_optimizers.py 拉起的进程：64 个 micro batch 的梯度之和，与各优化器占的字节，写成 JSON。

python tests/helpers/gradient_sums_worker.py 结果.json
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch

from benchmarks.optimizers.curves import counted_bytes
from finetune.process.interruption import leave
from finetune.training.ds_config import read_ds_config, resolve_ds_config
from finetune.training.engine import initialize, parameter_groups

ROOT = Path(__file__).resolve().parents[2]
MICRO_BATCHES = [1.0, *[2.0**-9] * 63]  # 各 micro batch 的梯度
SUMS = {
    "adamw fp32 zero2": ("adamw", "fp32", "ds_zero2_no_offload.json"),
    "adamw bf16 zero2": ("adamw", None, "ds_zero2_no_offload.json"),
    "adamw fp32 zero3": ("adamw", "fp32", "ds_zero3_offload.json"),
    "adamw_8bit fp32 zero2": ("adamw_8bit", "fp32", "ds_zero2_no_offload.json"),
    "adamw_8bit bf16 zero2": ("adamw_8bit", None, "ds_zero2_no_offload.json"),
    "adamw_bf16 fp32 zero2": ("adamw_bf16", "fp32", "ds_zero2_no_offload.json"),
    "adamw_bf16 bf16 zero2": ("adamw_bf16", None, "ds_zero2_no_offload.json"),
}


class Product(torch.nn.Module):
    """损失是输入与全部权重之和的乘积：每个权重的梯度就是输入。"""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(96, 96))

    def forward(self, inputs):
        return (self.weight.float() * inputs).sum()


def run(optimizer: str, grad_accum_dtype: str | None, file: str) -> dict:
    """两步，各 64 个 micro batch → 每个权重的梯度（由范数得到），第二次更新之前每个参数的字节。"""
    config = resolve_ds_config(
        read_ds_config(ROOT / file), "bf16", 1, 64, 1, 1e-3, 0.0, 10, 0.0, optimizer, grad_accum_dtype
    )
    model = Product().bfloat16()
    engine = initialize(model, parameter_groups(model, 0.0), config)
    found = {}
    for index, value in enumerate([*MICRO_BATCHES, *MICRO_BATCHES]):
        is_last = index % 64 == 63
        engine.set_gradient_accumulation_boundary(is_last)
        engine.backward(engine(torch.tensor(value)), scale_wrt_gas=False)
        if index == 127 and engine.zero_optimization_stage() == 2:
            found = counted_bytes(engine)
        engine.step()
    return {"gradient": float(engine.get_global_grad_norm()) / 96, "bytes": found}


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    results = {name: run(*case) for name, case in SUMS.items()}
    Path(sys.argv[1]).write_text(json.dumps(results), encoding="utf-8")
    leave(0)
