"""DeepSpeed 的 JSON 的检查：DeepSpeed 悄悄忽略写错的键，许多值的类型也不看；这里在读权重之前一次查出，返回全部问题。"""

import difflib
from typing import Any

from utils import is_number, shown

TOP_LEVEL = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "scheduler", "fp16", "bf16", "bfloat16", "torch_autocast", "zero_optimization", "data_types"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown"),
    *("communication_data_type", "seq_parallel_communication_data_type", "prescale_gradients", "sparse_gradients"),
    *("gradient_predivide_factor", "gradient_allreduce_op", "disable_allgather", "disable_python_gc", "dump_state"),
    *("memory_breakdown", "dataloader_drop_last", "log_level", "timers", "compile", "aio", "activation_checkpointing"),
    *("flops_profiler", "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "autotuning", "checkpoint"),
    *("elasticity", "compression_training", "data_efficiency", "curriculum_learning", "pipeline", "hybrid_engine"),
    *("tensor_parallel", "expert_parallel", "weight_quantization", "datastates_checkpointing", "nebula"),
    *("managed_gradient_accumulation", "use_data_before_expert_parallelism"),
}
ADAM_PARAMS = {
    *("lr", "betas", "eps", "weight_decay", "bias_correction", "adam_w_mode", "torch_adam", "amsgrad", "fused"),
    *("adamw_mode", "fp32_optimizer_states", "set_grad_none"),
}
FP16_KEYS = {
    *("enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"),
    *("consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads"),
}
BF16_KEYS = {
    *("enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads"),
    *("bf16_optimizer_states",),
}
_WARMUP = {"warmup_num_steps", "warmup_type", "last_batch_iteration"}
SCHEDULER_PARAMS = {
    "WarmupLR": _WARMUP | {"warmup_min_lr", "warmup_max_lr"},
    "WarmupDecayLR": _WARMUP | {"warmup_min_lr", "warmup_max_lr", "total_num_steps"},
    "WarmupCosineLR": _WARMUP | {"warmup_min_ratio", "cos_min_ratio", "total_num_steps"},
}
# 各处出现的键，按值的类型；一律也可写 "auto"
NUMBERS = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("steps_per_print", "gradient_predivide_factor", "lr", "eps", "weight_decay", "total_num_steps", "cos_min_ratio"),
    *("warmup_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_min_ratio", "loss_scale", "initial_scale_power"),
    *("loss_scale_window", "hysteresis", "min_loss_scale", "stage", "reduce_bucket_size", "allgather_bucket_size"),
    *("sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "buffer_count"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance", "buffer_size", "max_in_cpu", "ratio"),
}
SWITCHES = {
    *("enabled", "auto_cast", "torch_adam", "adam_w_mode", "bias_correction", "amsgrad", "prescale_gradients"),
    *("allgather_partitions", "reduce_scatter", "overlap_comm", "contiguous_gradients", "round_robin_gradients"),
    *("pin_memory", "pipeline_read", "pipeline_write", "fast_init", "wall_clock_breakdown", "memory_breakdown"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "sparse_gradients", "dump_state"),
    *("stage3_gather_16bit_weights_on_model_save", "elastic_checkpoint", "ignore_unused_parameters"),
}
SECTIONS = {
    *("optimizer", "scheduler", "params", "fp16", "bf16", "zero_optimization", "offload_optimizer", "offload_param"),
}


def ds_config_problems(config: dict[str, Any]) -> list[str]:
    """配置里的全部问题（没有则为空）：不认识的键、不对的类型、缺少的键、不支持的学习率调度。"""
    problems = [*_unknown("", config, TOP_LEVEL), *_wrong_values("", config)]
    if problems:
        return problems
    for name, known in (("fp16", FP16_KEYS), ("bf16", BF16_KEYS)):
        problems += _unknown(f"{name}.", config.get(name, {}), known)
    optimizer, scheduler = config.get("optimizer", {}), config.get("scheduler", {})
    for name, section in (("optimizer", optimizer), ("scheduler", scheduler)):
        problems += _unknown(f"{name}.", section, {"type", "params", "legacy_fusion"})
        if not isinstance(section.get("type", ""), str):
            problems.append(f"{name}.type 应为字符串，实际是 {shown(section.get('type'))}")
    if problems:
        return problems
    if optimizer.get("type") in ("Adam", "AdamW"):
        params = optimizer.get("params", {})
        problems += _unknown("optimizer.params.", params, ADAM_PARAMS)
        betas = params.get("betas", [0.9, 0.999])
        if not (isinstance(betas, list) and len(betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in betas)):
            problems.append(f"optimizer.params.betas 应为 [0, 1) 内的两个数，实际是 {shown(betas)}")
    if not scheduler:
        return problems
    kind, params = scheduler.get("type"), scheduler.get("params", {})
    if kind not in SCHEDULER_PARAMS:
        return [*problems, f"scheduler.type={kind!r} 不支持，可选：{' | '.join(SCHEDULER_PARAMS)}"]
    problems += _unknown("scheduler.params.", params, SCHEDULER_PARAMS[kind])
    if "total_num_steps" in SCHEDULER_PARAMS[kind] and "total_num_steps" not in params:
        problems.append('scheduler.params 缺少 total_num_steps，请写 "total_num_steps": "auto"')
    warmup_type = params.get("warmup_type", "linear")
    if warmup_type not in ("linear", "log"):
        problems.append(
            f"scheduler.params.warmup_type={warmup_type!r} 不是 DeepSpeed 认得的值（linear | log）；"
            "想要余弦衰减，请把 scheduler.type 写成 WarmupCosineLR"
        )
    return problems


# 配置里的位置 → 决定同一个数的命令行参数；None 为没有对应的参数
FIXED_PLACES = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "optimizer.params.lr": "learning_rate",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_num_steps": "warmup_ratio",
    "scheduler.params.total_num_steps": None,
}


def fixed_numbers(config: dict[str, Any]) -> list[tuple[str | None, str, float]]:
    """配置里写成具体的数（不是 "auto"）、命令行也决定的地方：[(参数名, 位置, 值)]。"""
    found = []
    for place, flag in FIXED_PLACES.items():
        node: Any = config
        for name in place.split("."):
            node = node.get(name, "auto") if isinstance(node, dict) else "auto"
        if node != "auto":
            found.append((flag, place, node))
    return found


def _unknown(prefix: str, section: dict[str, Any], known: set[str]) -> list[str]:
    problems = []
    for name in section:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"像是 {close[0]} 写错了" if close else f"可用的有 {'、'.join(sorted(known)[:8])} 等"
            problems.append(f"{prefix}{name} 不是认识的键，DeepSpeed 会悄悄忽略它；{hint}")
    return problems


def _wrong_values(prefix: str, section: dict[str, Any]) -> list[str]:
    """逐层核对值的类型；数要有限且不为负。"""
    problems = []
    for name, value in section.items():
        place = f"{prefix}{name}"
        if name in SECTIONS and not isinstance(value, dict):
            problems.append(f"{place} 应为对象 {{…}}，实际是 {shown(value)}")
        elif name in NUMBERS and value != "auto" and not (is_number(value) and 0 <= value < 1e18):
            problems.append(f'{place} 应为不小于 0 的数或 "auto"，实际是 {shown(value)}')
        elif name in SWITCHES and value != "auto" and not isinstance(value, bool):
            problems.append(f'{place} 应为 true、false 或 "auto"，实际是 {shown(value)}')
        elif isinstance(value, dict):
            problems += _wrong_values(f"{place}.", value)
    return problems
