"""DeepSpeed 的 JSON：读取、检查、填好 auto。"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from finetune.training.ds_config_check import ds_config_problems
from utils import log_rank_0, read_json

# 配置里没有写时用的；与两份自带的 JSON 相同
GRADIENT_CLIPPING = 1.0
OPTIMIZER = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": "auto"},
}
MAX_BETA = 0.99  # adamw_bf16：1 − beta 小于约 2⁻⁷ 时，乘 beta 会舍入回原来的 bf16
# --optimizer → 换上的 optimizer.type；不在其中的由 DeepSpeed 按配置建
OWN_OPTIMIZERS = {"adamw_8bit": "AdamW8bit", "adamw_bf16": "AdamWBF16"}
GROUP_ELEMENTS = 1 << 28  # 它们的一组至多这么多元素：更新时的临时量只有一组的，bitsandbytes 的下标是 32 位的
SCHEDULER = {
    "type": "WarmupCosineLR",
    "params": {
        "total_num_steps": "auto",
        "warmup_num_steps": "auto",
        "warmup_min_ratio": "auto",
        "warmup_type": "linear",
        "cos_min_ratio": 0.1,
    },
}


def read_ds_config(path: str | Path) -> dict:
    """读 DeepSpeed 的 JSON 并检查；没有写的优化器与学习率调度用本项目自己的，并说一声。

    Raises:
        ValueError: 不是合法的 JSON 对象，或有不认识的键、不对的类型、不能用的优化器或学习率调度；全部列出。
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} 应是一个 JSON 对象，得到 {type(config).__name__}")
    problems = ds_config_problems(config)
    if problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    for name, own in (("optimizer", OPTIMIZER), ("scheduler", SCHEDULER)):
        if not config.get(name):
            log_rank_0(f"注意：{path} 没有写 {name}，用本项目自己的：{json.dumps(own)}")
            config[name] = own
    if config.get("gradient_clipping", "auto") == "auto":
        log_rank_0(f"注意：{path} 没有写 gradient_clipping，梯度的范数裁剪到 {GRADIENT_CLIPPING}；写 0 则不裁剪")
    return config | {"zero_optimization": _without_auto(config["zero_optimization"])}


def optimizer_flag_problems(config: dict, args) -> list[str]:
    """--optimizer、--grad_accum_dtype（StepOptions）与配置说的不同、用不了的地方。"""
    section, zero, name = config["optimizer"], config["zero_optimization"], args.optimizer
    problems = []
    if "optimizer" in args.given and section["type"] != "AdamW":
        problems.append(
            f"--optimizer {name} 与 {args.ds_file} 的 optimizer.type（{section['type']}）不同；"
            '请去掉前者，或把配置里的改成 "AdamW"'
        )
    accumulation = config.get("data_types", {}).get("grad_accum_dtype", args.grad_accum_dtype)
    if args.grad_accum_dtype not in ("auto", accumulation):
        problems.append(
            f"--grad_accum_dtype {args.grad_accum_dtype} 与 {args.ds_file} 的 data_types.grad_accum_dtype"
            f"（{accumulation}）不同；请去掉一个"
        )
    if name not in OWN_OPTIMIZERS:
        return problems
    useless = sorted(section.get("params", {}).keys() - OPTIMIZER["params"].keys())
    if useless:
        problems.append(f"--optimizer {name} 没有 optimizer.params 的 {'、'.join(useless)}，请从 {args.ds_file} 里删去")
    if zero["stage"] == 1 or is_offloaded(zero, "optimizer") or is_offloaded(zero, "param"):
        problems.append(f"--optimizer {name} 只用于不卸载的 ZeRO-2、ZeRO-3，请改用 ds_zero2_no_offload.json")
    if config.get("bf16", {}).get("bf16_master_weights_and_grads") is True:
        problems.append(
            f"--optimizer {name} 自己定主权重的精度，请从 {args.ds_file} 里删去 bf16.bf16_master_weights_and_grads"
        )
    betas = section.get("params", {}).get("betas", "auto")
    if name == "adamw_bf16" and betas != "auto" and max(betas) > MAX_BETA:
        problems.append(
            f"--optimizer adamw_bf16 的动量是 bf16，optimizer.params.betas 至多 {MAX_BETA}（再大，衰减会被舍掉），"
            f"{args.ds_file} 里是 {betas}；请改成 {OPTIMIZER['params']['betas']}"
        )
    return problems


def is_offloaded(zero: dict[str, Any], what: str) -> bool:
    """zero_optimization 一节里 optimizer 或 param 是否卸载。"""
    return (zero.get(f"offload_{what}") or {}).get("device", "none") not in ("none", None)


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """去掉 "auto"：DeepSpeed 于是用它的缺省。"""
    return {k: _without_auto(v) if isinstance(v, dict) else v for k, v in section.items() if v != "auto"}


def has_cpp_compiler() -> bool:
    """有没有编译器：DeepSpeed 自带的 Adam 要在首次使用时编译，在 GPU 上还要 CUDA 工具包（nvcc）。"""
    from finetune.process.accelerator import accelerator_name

    compiler = os.environ.get("CXX") or "g++"
    has_host_compiler = any(shutil.which(name) for name in (compiler, "c++", "clang++"))
    if accelerator_name() != "cuda":
        return has_host_compiler
    from torch.utils.cpp_extension import CUDA_HOME

    return has_host_compiler and CUDA_HOME is not None


def skip_ops_without_compiler():
    """没有编译器时，让 DeepSpeed 的 CPU 通信退回 gloo，不去编译它的共享内存算子；须在 init_distributed 之前调用。"""
    if not has_cpp_compiler():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def resolve_ds_config(
    config: dict,
    precision: str,
    batch_size: int,
    accumulation_steps: int,
    num_ranks: int,
    learning_rate: float,
    weight_decay: float,
    num_steps: int,
    warmup_ratio: float,
    optimizer: str = "adamw",
    grad_accum_dtype: str | None = None,
) -> dict:
    """填好配置里的 "auto"，返回新的字典；原来写了具体值的地方不动。

    学习率：第 s 步（从 1 起）预热时为 s/(W+1)，W 是预热步数（1 按 2 算）；之后按调度衰减，最后一步为调度的下限。
    DeepSpeed 的预热从 0 起且至少 2 步，所以这里把起点设为 1/(W+1)；W = 0 时起点为 1，即没有预热。

    Args:
        config: read_ds_config 的结果。
        batch_size、accumulation_steps、num_ranks: 一个优化器步有三者之积个样本。
        num_steps: 优化器步的总数；warmup_ratio: 预热步数占它的比例。
        optimizer: --optimizer；grad_accum_dtype: 梯度按什么相加，None 是权重的精度。
    """
    warmup_steps = round(num_steps * warmup_ratio)
    warmup_start = 1.0 / (max(2, warmup_steps) + 1) if warmup_steps else 1.0
    # WarmupDecayLR 衰减到预热的起点，起点就是峰值的话一点也不衰减
    decays_to_start = config.get("scheduler", {}).get("type") == "WarmupDecayLR"
    warmup_start_lr = learning_rate * (0.1 if decays_to_start and not warmup_steps else warmup_start)
    auto_values = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": batch_size * accumulation_steps * num_ranks,
        "gradient_clipping": GRADIENT_CLIPPING,
        "lr": learning_rate,
        "betas": OPTIMIZER["params"]["betas"],
        "eps": OPTIMIZER["params"]["eps"],
        "weight_decay": weight_decay,
        "total_num_steps": num_steps,
        "warmup_num_steps": max(1, warmup_steps),
        "warmup_min_ratio": warmup_start,
        "warmup_min_lr": warmup_start_lr,
        "warmup_max_lr": learning_rate,
    }

    def fill(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {name: fill(value, name) for name, value in node.items()}
        if node == "auto":
            if key not in auto_values:
                raise ValueError(f'DeepSpeed 配置里的 "{key}": "auto" 不知道该填什么，请写具体的值')
            return auto_values[key]
        return node

    resolved = {name: fill(value, name) for name, value in config.items() if name not in ("bf16", "fp16")}
    total = batch_size * accumulation_steps * num_ranks
    if resolved.get("train_batch_size", total) != total:
        raise ValueError(
            f"DeepSpeed 配置的 train_batch_size 是 {resolved['train_batch_size']}，但 per_device_train_batch_size × "
            f'gradient_accumulation_steps × 进程数 = {batch_size} × {accumulation_steps} × {num_ranks}；请改成 "auto"'
        )
    for name in ("bf16", "fp16"):
        switch = config.get(name, {}).get("enabled", "auto")
        if switch != "auto" and switch != (precision == name):
            log_rank_0(f"注意：精度由 --precision 决定（{precision}），配置里的 {name}.enabled={switch} 不起作用")
    resolved.setdefault("gradient_clipping", GRADIENT_CLIPPING)
    resolved.setdefault("train_micro_batch_size_per_gpu", batch_size)
    resolved.setdefault("gradient_accumulation_steps", accumulation_steps)
    resolved["bf16"] = {"enabled": precision == "bf16", **_without_enabled(config.get("bf16", {}))}
    resolved["fp16"] = {"enabled": precision == "fp16", **_without_enabled(config.get("fp16", {}))}
    if optimizer in OWN_OPTIMIZERS:
        resolved["optimizer"] = {**resolved["optimizer"], "type": OWN_OPTIMIZERS[optimizer]}
        resolved["zero_allow_untested_optimizer"] = True
    if optimizer == "adamw_bf16":
        resolved["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    if grad_accum_dtype is not None:
        resolved["data_types"] = {**resolved.get("data_types", {}), "grad_accum_dtype": grad_accum_dtype}
    if resolved.get("optimizer", {}).get("type") in ("Adam", "AdamW") and not has_cpp_compiler():
        log_rank_0("没有找到 C++ 编译器，DeepSpeed 自带的 Adam 编译不了：改用 torch 的 AdamW（同样的更新，稍慢）")
        resolved["optimizer"]["params"]["torch_adam"] = True
        resolved["zero_force_ds_cpu_optimizer"] = False
    return resolved


def _without_enabled(section: dict) -> dict:
    return {name: value for name, value in section.items() if name != "enabled"}
