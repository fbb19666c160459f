"""DeepSpeed 的 JSON 的检查：许多值的类型它不看，写错的键有的忽略，有的到建引擎时才报错；这里在读权重之前一次查出。

fp16、bf16、zero_optimization 的键与类型取自 DeepSpeed 自己的 pydantic 模型，其余由这里列出；类型比它严：
它接受 "stage": "2" 与 "enabled": "yes"，这里不接受。
"""

import difflib
from enum import Enum
from types import NoneType
from typing import Any, Union, get_args, get_origin

import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

from utils import is_number, shown

# 键 → 值的类型；object 是不查，int 是整数（可写成 1e9），pydantic 的模型是一节
TOP_LEVEL = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), int),
    **dict.fromkeys(("steps_per_print", "gradient_clipping", "gradient_predivide_factor"), float),
    **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "wall_clock_breakdown"), bool),
    **dict.fromkeys(("memory_breakdown", "dump_state", "prescale_gradients", "managed_gradient_accumulation"), bool),
    **dict.fromkeys(("disable_allgather", "disable_python_gc", "dataloader_drop_last"), bool),
    **dict.fromkeys(("optimizer", "scheduler", "data_types", "flops_profiler", "comms_logger", "tensorboard"), dict),
    **dict.fromkeys(("wandb", "csv_monitor", "comet", "timers", "compile", "aio", "activation_checkpointing"), dict),
    **dict.fromkeys(("autotuning", "checkpoint", "data_efficiency", "hybrid_engine"), dict),
    **dict.fromkeys(("communication_data_type", "gradient_allreduce_op", "log_level"), str),
    **{"fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config, "zero_optimization": DeepSpeedZeroConfig},
}
REMOVED = {
    *("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "nebula"),
    *("progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
}
PARALLEL = {"expert_parallel", "pipeline", "seq_parallel_communication_data_type", "tensor_parallel"}
ADAM_PARAMS = {
    **dict.fromkeys(("lr", "eps", "weight_decay"), float),
    **dict.fromkeys(("torch_adam", "adam_w_mode", "bias_correction", "fp32_optimizer_states"), bool),
    "betas": object,
}
_WARMUP = {"warmup_num_steps": int, "warmup_type": str, "last_batch_iteration": object}
_WARMUP_LR = _WARMUP | {"warmup_min_lr": float, "warmup_max_lr": float}
SCHEDULER_PARAMS = {
    "WarmupLR": _WARMUP_LR,
    "WarmupDecayLR": _WARMUP_LR | {"total_num_steps": int},
    "WarmupCosineLR": _WARMUP | {"warmup_min_ratio": float, "cos_min_ratio": float, "total_num_steps": int},
}
# 位置 → (只能是这些值, 缘由)
ONLY = {
    "zero_optimization.compute_grad_norm": ((True,), "坏的一步由梯度的范数发现，请删去"),
    "gradient_allreduce_op": (("mean",), "求和会让梯度与裁剪随进程数变大"),
    "gradient_predivide_factor": ((1,), "ZeRO 不支持，请删去"),
    "prescale_gradients": ((False,), "ZeRO 不支持，请删去"),
    "managed_gradient_accumulation": ((True,), "累积的边界由训练循环与 DeepSpeed 一起管，请删去"),
    "communication_data_type": (("fp16", "bf16", "fp32"), "DeepSpeed 只认得这三个"),
    "data_types.grad_accum_dtype": (("bf16", "fp16", "fp32"), "梯度按什么相加，DeepSpeed 认得的是这三个"),
    "scheduler.params.warmup_type": (
        ("linear", "log"),
        "DeepSpeed 不认得别的值；想要余弦衰减，请把 scheduler.type 写成 WarmupCosineLR",
    ),
}
# 可以写 "auto" 的键：这里的由 resolve_ds_config 填写，fp16、bf16、zero_optimization 里的用 DeepSpeed 的缺省
FILLED = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("lr", "betas", "eps", "weight_decay"),
    *("total_num_steps", "warmup_num_steps", "warmup_min_ratio", "warmup_min_lr", "warmup_max_lr"),
}


def ds_config_problems(config: dict[str, Any]) -> list[str]:
    """配置里的全部问题（没有则为空）：不认识的键、不对的类型与值、缺少的键、不能用的优化器与学习率调度。"""
    problems = _section_problems("", config, TOP_LEVEL)
    for name, check in (("optimizer", _optimizer_problems), ("scheduler", _scheduler_problems)):
        section = config.get(name, {})
        if not isinstance(section, dict) or not section:
            continue
        problems += _section_problems(f"{name}.", section, {"type": str, "params": dict, "legacy_fusion": bool})
        if isinstance(section.get("params", {}), dict):
            problems += check(section, section.get("params", {}), config)
    for place, (allowed, reason) in ONLY.items():
        value = _value_at(config, place, allowed[0])
        is_told = any(problem.startswith(f"{place} ") for problem in problems)  # 类型就不对
        if value != "auto" and value not in allowed and not is_told:
            problems.append(f"{place} 应为 {' | '.join(map(str, allowed)).lower()}，实际是 {shown(value)}：{reason}")
    zero = config.get("zero_optimization", {})
    if isinstance(zero, dict) and zero.get("stage", 0) in (0, "auto"):
        reason = "不切分时 DeepSpeed 不给梯度的范数，训练状态也存不了；一张卡也请写 2"
        problems.append(f"zero_optimization.stage 应为 1 | 2 | 3，实际是 {zero.get('stage', '没有写')}：{reason}")
    bf16 = "bf16.bf16_optimizer_states", "bf16.bf16_master_weights_and_grads"
    if _value_at(config, bf16[0], False) is True and _value_at(config, bf16[1], False) is not True:
        problems.append(f"{bf16[0]} 要与 {bf16[1]} 一起打开，请都写 true，或删去前者")
    return problems


def _optimizer_problems(section: dict[str, Any], params: dict[str, Any], config: dict[str, Any]) -> list[str]:
    kind = section.get("type")
    if kind in ("Adam", "AdamW"):
        problems = _section_problems("optimizer.params.", params, ADAM_PARAMS)
        betas = params.get("betas", "auto")
        is_pair = isinstance(betas, list) and len(betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in betas)
        if betas != "auto" and not is_pair:
            problems.append(f"optimizer.params.betas 应为 [0, 1) 内的两个数，实际是 {shown(betas)}")
        return problems
    exists = isinstance(kind, str) and (kind.lower() in DEEPSPEED_OPTIMIZERS or hasattr(torch.optim, kind))
    if exists and config.get("zero_allow_untested_optimizer") is True:
        return []
    return [
        f"optimizer.type={kind!r} 不能用，请写 AdamW 或 Adam，或删去整个 optimizer 用本项目自己的"
        + ("；确实要用它，请加上 zero_allow_untested_optimizer: true" if exists else "")
    ]


def _scheduler_problems(section: dict[str, Any], params: dict[str, Any], config: dict[str, Any]) -> list[str]:
    kind = section.get("type")
    if not isinstance(kind, str) or kind not in SCHEDULER_PARAMS:
        return [f"scheduler.type={kind!r} 不支持，可选：{' | '.join(SCHEDULER_PARAMS)}"]
    problems = _section_problems("scheduler.params.", params, SCHEDULER_PARAMS[kind])
    steps = params.get("warmup_num_steps", "auto")
    if is_number(steps) and not (type(steps) is int and steps > 0):
        problems.append(
            f'scheduler.params.warmup_num_steps 应为正整数，实际是 {steps}；由 --warmup_ratio 决定请写 "auto"'
        )
    if "total_num_steps" in SCHEDULER_PARAMS[kind] and "total_num_steps" not in params:
        problems.append('scheduler.params 缺少 total_num_steps，请写 "total_num_steps": "auto"')
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
    values = ((flag, place, _value_at(config, place, "auto")) for place, flag in FIXED_PLACES.items())
    return [(flag, place, value) for flag, place, value in values if value != "auto"]


def _value_at(node: Any, place: str, default: Any) -> Any:
    for name in place.split("."):
        node = node.get(name, default) if isinstance(node, dict) else default
    return node


def _section_problems(prefix: str, section: dict[str, Any], kinds: dict[str, Any], fills: bool = True) -> list[str]:
    """一节里不认识的键与不对的类型；fills=False 的一节里，"auto" 是 DeepSpeed 的缺省。"""
    problems = []
    for name, value in section.items():
        place = f"{prefix}{name}"
        if not prefix and name in REMOVED:
            problems.append(f"{place} 的功能 DeepSpeed 已经删去，请删去这个键")
        elif not prefix and name in PARALLEL:
            problems.append(f"{place} 不能用：这里只做数据并行，请删去这个键")
        elif name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1)
            hint = f"像是 {close[0]} 写错了" if close else f"可用的有 {'、'.join(sorted(kinds)[:8])} 等"
            problems.append(f"{place} 不是认识的键，请改正或删去；{hint}")
        elif value != "auto":
            problems += _value_problems(place, value, kinds[name])
        elif fills and name not in FILLED:
            problems.append(f'{place} 写成 "auto"，不知道该填什么，请写具体的值')
    return problems


def _value_problems(place: str, value: Any, kind: Any) -> list[str]:
    """值的类型；数要有限且不为负。kind 是类型，或 pydantic 的注解。"""
    if get_origin(kind) is Union:  # Optional[X] → X
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if kind is bool:
        expected = None if isinstance(value, bool) else 'true、false 或 "auto"'
    elif kind in (int, float):
        is_right = is_number(value) and 0 <= value < 1e18 and (kind is float or value == int(value))
        expected = None if is_right else f'不小于 0 的{"整" if kind is int else ""}数或 "auto"'
    elif kind is str:
        expected = None if isinstance(value, str) else "字符串"
    elif isinstance(kind, type) and issubclass(kind, Enum):
        values = [member.value for member in kind]
        is_right = any(value == one and type(value) is type(one) for one in values)
        expected = None if is_right else " | ".join(map(str, values))
    elif isinstance(kind, type) and issubclass(kind, (dict, BaseModel)):
        if isinstance(value, dict):
            return [] if kind is dict else _model_problems(place, value, kind)
        expected = "对象 {…}"
    else:
        expected = None
    return [] if expected is None else [f"{place} 应为 {expected}，实际是 {shown(value)}"]


def _model_problems(place: str, section: dict[str, Any], model: type[BaseModel]) -> list[str]:
    """pydantic 模型的一节：键与类型，都对时再由模型自己核对取值的范围。旧的写法不收。"""
    fields = model.model_fields.items()
    current = [(name, field) for name, field in fields if not (field.json_schema_extra or {}).get("deprecated")]
    kinds = {field.alias or name: field.annotation for name, field in current}
    problems = _section_problems(f"{place}.", section, kinds, fills=False)
    if problems:
        return problems
    try:
        model(**section)
    except ValidationError as error:
        for found in error.errors():
            where = ".".join([place, *map(str, found["loc"])])
            problems.append(f"{where} DeepSpeed 不接受，实际是 {shown(found['input'])}：{found['msg']}")
    return problems
