"""bench 的工人：本项目自己，经 train.py 的 build_engine 与 train_step；由 bench.py 启动，不单独运行。

python benchmarks/speed/ours.py '{"kind": "ours", …}'      # 规格见 programs.py
"""

import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.speed import work as bench_work
from benchmarks.speed.protocol import Channel, StepMeter, installed_versions, run_worker
from finetune.planning.flops import gemm_rate
from finetune.process.training_process import free_port

# 数据规模的比较：每条指令走这么多步，约合 500 行走一轮
WINDOW_STEPS = 62
PACKAGES = ("torch", "transformers", "peft", "deepspeed")


class Rows:
    """已编码的样本，形式与 BaichuanDataSet 相同，供 StepLoader 使用。"""

    def __init__(self, rows: list[dict[str, list[int]]]):
        self._rows = rows
        self.lengths = [len(row["input_ids"]) for row in rows]
        self.num_targets = [sum(label != -100 for label in row["labels"]) for row in rows]
        self.offsets = [0, *itertools.accumulate(self.lengths)]

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, index: int) -> tuple[str, int]:
        return "bench", index + 1

    def __getitem__(self, index: int) -> SimpleNamespace:
        return bench_work.as_sample(self._rows[index])


class BareEngine:
    """不用 DeepSpeed 的同一个循环：同样的模型、fp32 主权重的 AdamW、同样的裁剪，接口够 train_step 用。

    用来量 DeepSpeed 在一步里的份额。
    """

    def __init__(self, model, groups: list[dict], args):
        import torch

        self.module, self.device = model, next(model.parameters()).device
        self.optimizer = SimpleNamespace(overflow=False)
        self.global_steps, self._is_boundary, self._norm = 0, False, 0.0
        self._weights = [parameter for group in groups for parameter in group["params"]]
        self._masters = [p.detach().float().clone() if p.dtype != torch.float32 else p for p in self._weights]
        masters = iter(self._masters)
        groups = [{**group, "params": [next(masters) for _ in group["params"]]} for group in groups]
        self._adam = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
        model.train()

    def __call__(self, **batch):
        return self.module(**batch)

    def get_lr(self) -> list[float]:
        return [self._adam.param_groups[0]["lr"]]

    def set_gradient_accumulation_boundary(self, is_boundary: bool):
        self._is_boundary = is_boundary

    def backward(self, loss, scale_wrt_gas: bool = False):
        loss.backward()

    def step(self):
        import torch

        if not self._is_boundary:
            return
        for master, weight in zip(self._masters, self._weights, strict=True):
            master.grad = weight.grad.to(master.dtype)
        self._norm = float(torch.nn.utils.clip_grad_norm_(self._masters, 1.0))
        self._adam.step()
        for master, weight in zip(self._masters, self._weights, strict=True):
            weight.grad = master.grad = None
            if master is not weight:
                weight.data.copy_(master)
        self.global_steps += 1

    def get_global_grad_norm(self) -> float:
        return self._norm

    def fp16_enabled(self) -> bool:
        return False

    def bfloat16_enabled(self) -> bool:
        return False


def single_process_environment():
    """一个进程的分布式环境：端口取空闲的，各工人互不相干。"""
    port = free_port()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def switch_off(levers: list[str]):
    """关掉没有命令行开关的几项，在造模型之前调用。

    Raises:
        ValueError: 不认识的名字。
    """
    from finetune.data import packing

    for lever in levers:
        if lever == "shared_prefix":
            packing.MIN_SHARED_TOKENS = sys.maxsize
        elif lever not in ("label_rows", "graph_prefix"):
            raise ValueError(f"不认识的开关 {lever}")


def share_lora_start():
    """train.build_model 造出的 LoRA 从与对方相同的 A 走起。"""
    import train
    from benchmarks.speed.random_weights import fill_lora

    build_model = train.build_model

    def build_and_fill(*arguments):
        model = build_model(*arguments)
        fill_lora(model)
        return model

    train.build_model = build_and_fill


def open_engine(spec: dict[str, Any], num_steps: int):
    """按规格造引擎 → (engine, args, config)。"""
    single_process_environment()
    import deepspeed
    import torch

    import train
    from finetune.cli.train_checks import validate_args
    from finetune.cli.train_flags import parse_args
    from finetune.training.engine import parameter_groups
    from utils import seed_everything

    torch.set_num_threads(spec["threads"])
    switch_off(spec["levers_off"])
    share_lora_start()
    args = parse_args(spec["argv"])
    ds_config, config = validate_args(args)
    ds_config.pop("scheduler", None)  # 各程序都用不变的学习率
    deepspeed.init_distributed()
    if spec["engine"] == "bare":
        seed_everything(args.seed)
        model = train.build_model(args, config, args.precision, ds_config)
        engine = BareEngine(model, parameter_groups(model, args.weight_decay), args)
    else:
        engine, _ = train.build_engine(args, config, ds_config, args.precision, num_steps)
    if "graph_prefix" in spec["levers_off"]:
        engine.module.enable_input_require_grads()  # 词嵌入的输出要梯度，底层就都进计算图
    return engine, args, config


def build(spec: dict[str, Any]):
    """引擎，与从 work 文件读样本的 StepLoader → (engine, loader, 冻结底层的缓存或 None)。"""
    work = json.loads(Path(spec["work"]).read_text(encoding="utf-8"))
    engine, args, _ = open_engine(spec, len(work["steps"]))
    import torch

    from finetune.methods.frozen_cache import open_frozen_cache

    rows = Rows([row for step in work["steps"] for row in step])
    cache = (
        None if spec["engine"] == "bare" else open_frozen_cache(args.cache_frozen, Path(args.output_dir), engine, rows)
    )
    loader = open_loader(rows, args, seed=None)
    if cache is not None:  # 先走完第一轮：量的是第二轮起的速度
        with torch.no_grad():
            for index in range(loader.steps_per_epoch):
                for batch in loader.prepare(step_samples(loader, index)).micro_batches:
                    engine.module(**batch, use_cache=False)
    return engine, loader, cache


def open_loader(data_set, args, seed: int | None):
    """按 train.py 的参数备步。"""
    from finetune.data.step_loader import StepLoader

    return StepLoader(
        data_set,
        batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_len=args.max_len,
        seed=seed,
        packing=args.packing,
        with_offsets=args.cache_frozen != "none",
    )


def step_samples(loader, index: int) -> range:
    """第 index 步的样本下标。"""
    return range(loader.global_batch_size * index, loader.global_batch_size * (index + 1))


def describe(engine) -> dict[str, Any]:
    """载入之后的自述。"""
    num_trainable = sum(parameter.numel() for parameter in engine.module.parameters() if parameter.requires_grad)
    return {"ready": True, "versions": installed_versions(*PACKAGES), "num_trainable": num_trainable}


def serve_gemm(spec: dict[str, Any], channel: Channel):
    """每条指令量一次矩阵乘法的速率。"""
    import torch

    torch.set_num_threads(spec["threads"])
    channel.send(ready=True, versions=installed_versions("torch"))
    while channel.wait_for_step() is not None:
        meter = StepMeter()
        meter.start()
        rate = gemm_rate(bench_work.Shape(*spec["shape"]), spec["rows"], spec["precision"])
        channel.send(**meter.stop(), gemm_flops=rate)


def serve_ours(spec: dict[str, Any], channel: Channel):
    """每条指令走一个优化器步。"""
    engine, loader, cache = build(spec)
    import train

    channel.send(**describe(engine))
    while (index := channel.wait_for_step()) is not None:
        meter = StepMeter()
        meter.start()
        step = loader.prepare(step_samples(loader, index))
        if "label_rows" in spec["levers_off"]:
            for batch in step.micro_batches:
                batch["return_logits"] = True  # 最后一层与词表投影在每一行上算
        loss, _, grad_norm = train.train_step(engine, step)
        channel.send(**meter.stop(), loss=loss, grad_norm=grad_norm, tokens=step.num_tokens)
    if cache is not None:
        cache.remove()


def serve_rows(spec: dict[str, Any], channel: Channel):
    """真正的数据集与后台备步：每条指令从一轮的不同位置起走 WINDOW_STEPS 个优化器步。"""
    engine, args, config = open_engine(spec, WINDOW_STEPS)
    import train
    from finetune.checkpoint.base_model import load_tokenizer
    from finetune.data.prompting import resolve_prompt_format

    tokenizer = load_tokenizer(args.model_name_or_path, config.vocab_size)
    prompting = resolve_prompt_format(args.prompt_format, args.model_name_or_path, config)
    data_set, _ = train.load_data(args, tokenizer, prompting)
    loader = open_loader(data_set, args, args.seed)
    channel.send(**describe(engine))
    last_start = max(0, loader.steps_per_epoch - WINDOW_STEPS)
    while (index := channel.wait_for_step()) is not None:
        meter, tokens = StepMeter(), 0
        meter.start()
        steps = loader.epoch(0, start_step=last_start * (index % 8) // 7)
        for step in itertools.islice(steps, WINDOW_STEPS):
            loss, _, grad_norm = train.train_step(engine, step)
            tokens += step.num_tokens
        steps.close()
        channel.send(**meter.stop(), loss=loss, grad_norm=grad_norm, tokens=tokens)


if __name__ == "__main__":
    run_worker({"gemm": serve_gemm, "ours": serve_ours, "rows": serve_rows})
