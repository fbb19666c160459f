"""test_optimizer_state.py 拉起的一个训练进程：按任务单逐个建引擎、训练、保存或恢复，结果写成文件供测试比较。

python tests/optimizer_state_worker.py TASKS.json   （RANK、WORLD_SIZE、LOCAL_RANK、MASTER_* 由环境给出）
"""

import functools
import gc
import json
import os
import sys
from pathlib import Path

import cpuinfo
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file

from finetune.checkpoint.optimizer_state import (
    check_resumable,
    iter_optimizer_state,
    load_optimizer_state,
    optimizer_scalars,
)
from finetune.checkpoint.weights import WeightFile
from finetune.process.interruption import leave
from finetune.training.engine import initialize

GLOBAL_BATCH, MICRO_BATCH, STEPS = 4, 2, 7
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TinyModel(torch.nn.Module):
    """形状都不能被 2、4 整除；frozen 不训练。（零维参数 DeepSpeed 自己就不支持。）"""

    def __init__(self, seed: int, width: int = 7):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = torch.nn.Linear(5, 5, bias=False).requires_grad_(False)
        torch.manual_seed(seed)
        self.up = torch.nn.Linear(5, width)
        self.down = torch.nn.Linear(width, 3)

    def forward(self, inputs, targets):
        outputs = self.down(torch.tanh(self.up(self.frozen(inputs))))
        return (outputs.float() - targets).square().mean()


def build_engine(task: dict, seed: int):
    case = task["case"]
    world = dist.get_world_size()
    precision = case.get("precision", "fp32")
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": GLOBAL_BATCH // MICRO_BATCH // world,
        "gradient_clipping": 0.5,
        # 选这组 betas：第 5 步起 fp32 的连乘与 pow 就差末位，看得出偏差修正的计数有没有重放
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "betas": [0.85, 0.98], "eps": 1e-6}},
        "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    config["optimizer"]["params"].update(case.get("optimizer", {}))
    config.update(case.get("config", {}))
    total = task.get("total_steps", 20)
    params = {"total_num_steps": total, "warmup_num_steps": 2, "warmup_max_lr": 0.02, "warmup_min_lr": 0.001}
    config["scheduler"] = {"type": "WarmupDecayLR", "params": params}
    if case.get("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    if precision == "fp16":
        # CPU 上 torch 能算 fp16，只是 DeepSpeed 按硬件指令判定不支持；2^30 的起始 loss scale 使前几步溢出
        get_accelerator().is_fp16_supported = lambda: True
        config["fp16"] = {"enabled": True, "initial_scale_power": 30, "loss_scale_window": 2, "hysteresis": 2}
    model = TinyModel(seed, case.get("width", 7)).to(DTYPES[precision])
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    groups = [{"params": [param for _, param in named], "weight_decay": 0.1}]
    if case.get("groups", 2) == 2:
        groups = [
            {"params": [p for name, p in named if "bias" not in name], "weight_decay": 0.1},
            {"params": [p for name, p in named if "bias" in name], "weight_decay": 0.0},
        ]
        if "second_betas" in case:
            groups[1]["betas"] = case["second_betas"]
    if case.get("own") == "AdamWBF16":
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    config["optimizer"]["type"] = case.get("own", config["optimizer"]["type"])
    return initialize(model, groups, config)


def train(engine, begin: int, end: int, precision: str) -> list[float]:
    """返回每步全部样本的平均损失；第 s 步的样本只由 s 决定，与进程数无关。"""
    losses = []
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(begin, end):
        generator = torch.Generator().manual_seed(1000 + step)
        inputs = torch.randn(GLOBAL_BATCH, 5, generator=generator).to(DTYPES[precision])
        targets = torch.randn(GLOBAL_BATCH, 3, generator=generator)
        total = torch.zeros(1, dtype=torch.float64)
        for micro in range(GLOBAL_BATCH // MICRO_BATCH // world):
            rows = slice((micro * world + rank) * MICRO_BATCH, (micro * world + rank + 1) * MICRO_BATCH)
            loss = engine(inputs[rows], targets[rows])
            engine.backward(loss)
            engine.step()
            total += loss.detach().double()
        dist.all_reduce(total)
        losses.append(total.item() * MICRO_BATCH / GLOBAL_BATCH)
    return losses


def snapshot(engine) -> dict[str, torch.Tensor]:
    """优化器张量与前向所用的权重（`{name}.weight_used`），完整、在 CPU 上；只有 0 号进程非空。"""
    tensors = {}
    for name, tensor in iter_optimizer_state(engine):
        assert (tensor is None) == (dist.get_rank() != 0)
        if tensor is not None:
            tensors[name] = tensor
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            if dist.get_rank() == 0:
                tensors[f"{name}.weight_used"] = param.detach().clone()
    return tensors


def run_task(task: dict) -> None:
    folder = Path(task["folder"])
    precision = task["case"].get("precision", "fp32")
    at = task.get("at", 4)
    engine = build_engine(task, seed=task["seed"])
    report = {}
    if task["action"] == "straight":
        report["losses"] = train(engine, 0, STEPS, precision)
    elif task["action"] == "save":
        report["losses"] = train(engine, 0, at, precision)
        write(folder / "state", snapshot(engine), optimizer_scalars(engine))
        report["losses"] += train(engine, at, STEPS, precision)
    elif task["action"] == "resume":
        restore(engine, folder, restore_lr=task.get("restore_lr", True))
        report["lr"] = [group["lr"] for group in engine.optimizer.param_groups]
        write(folder / f"{task['name']}.loaded", snapshot(engine), {})
        report["losses"] = train(engine, at, STEPS, precision)
    else:
        write(folder / task["name"], {}, collect_errors(engine, task, folder))
        return
    report["scalars"] = optimizer_scalars(engine)
    write(folder / task["name"], snapshot(engine), report)
    engine.destroy()


def restore(engine, folder: Path, edit=None, fail_on_rank: int = -1, restore_lr: bool = True) -> None:
    """从 folder/state.* 恢复；edit 改动标量，fail_on_rank 的进程读不到张量：这两个供错误测试用。"""
    scalars = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if edit is not None:
        edit(scalars)
    file = WeightFile(folder / "state.safetensors")

    def read_slice(name, start, stop):
        missing = "-missing" if dist.get_rank() == fail_on_rank else ""
        return file.read_flat(name + missing, start, stop)

    load_optimizer_state(engine, read_slice, scalars, restore_lr=restore_lr)


def collect_errors(engine, task: dict, folder: Path) -> dict:
    """返回各种错误用法在每个进程上的报错文字：{用法: [rank 0 的, rank 1 的, …]}。"""

    def message(action, *args, **options) -> list[str]:
        try:
            action(*args, **options)
            text = ""
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, text)
        return everyone

    if task["action"] == "unsupported":
        return {"unsupported": message(check_resumable, engine)}
    if task["action"] == "refused":
        return {"refused": message(restore, engine, folder)}

    def reshape(scalars):
        scalars["groups"][0]["params"]["up.weight"] = [7, 6]

    return {
        "groups": message(restore, engine, folder, edit=lambda scalars: scalars["groups"].pop()),
        "shape": message(restore, engine, folder, edit=reshape),
        "rank_1": message(restore, engine, folder, fail_on_rank=1),
    }


def write(path: Path, tensors: dict, report: dict) -> None:
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{path}.safetensors")
        Path(f"{path}.json").write_text(json.dumps(report), encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    # DeepSpeed 每建一个 CPU Adam 就另起进程查一次 CPU，每建一个 ZeRO-3 引擎就整理一次内存：都很慢，与所测无关
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    gc.freeze()
    deepspeed.init_distributed("gloo")
    for task in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(f"[{os.environ['RANK']}] {task['name']} {task['case']}", flush=True)
        run_task(task)
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main()
