"""训练方法的表，以及各方法共用的：核对可训练的参数。"""

from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

from peft import PeftModel
from torch import nn

from baichuan import BaichuanForCausalLM
from finetune.methods.freeze import apply_freeze, freeze_parts
from finetune.methods.full import apply_full
from finetune.methods.lora import apply_lora
from finetune.methods.ptuning import apply_ptuning


class TrainMethod(NamedTuple):
    """一种训练方法：怎样包装模型、哪些参数可以训练、只属于它的命令行参数、缺省学习率。"""

    apply: Callable[[BaichuanForCausalLM, Namespace], nn.Module]
    is_trainable: Callable[[str, Namespace], bool]
    flags: tuple[str, ...]
    learning_rate: float


TRAIN_METHODS = {
    "freeze": TrainMethod(
        apply=apply_freeze,
        is_trainable=lambda name, args: any(part in name for part in freeze_parts(args)),
        flags=("freeze_module_name",),
        learning_rate=1e-4,
    ),
    "lora": TrainMethod(
        apply=apply_lora,
        is_trainable=lambda name, args: "lora_" in name,
        flags=("lora_dim", "lora_alpha", "lora_dropout", "lora_module_name", "load_in_4bit", "load_in_8bit"),
        learning_rate=2e-4,
    ),
    "ptuning": TrainMethod(
        apply=apply_ptuning,
        is_trainable=lambda name, args: name.startswith("prompt_encoder."),
        flags=("pre_seq_len", "prefix_projection", "prefix_hidden_size", "ptuning_version"),
        learning_rate=5e-3,
    ),
    "full": TrainMethod(
        apply=apply_full,
        is_trainable=lambda name, args: True,
        flags=(),
        learning_rate=1e-5,
    ),
}


def check_trainable(model: nn.Module, args: Namespace) -> int:
    """核对可训练的参数恰好是这种方法的那些，返回可训练的元素数（ZeRO-3 切分的也按完整大小计）。

    Raises:
        ValueError: 没有可训练的参数，或有方法之外的参数可训练，或该训练的被冻结了。
    """
    method = TRAIN_METHODS[args.train_type]
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(f"--train_type {args.train_type} 没有可训练的参数，请检查它的参数")
    outside = [name for name in trainable if not method.is_trainable(name, args)]
    if outside:
        raise ValueError(f"--train_type {args.train_type} 之外的参数可训练：{outside[:5]}")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and method.is_trainable(name, args)]
    if frozen:
        raise ValueError(f"--train_type {args.train_type} 应训练的参数被冻结了：{frozen[:5]}")
    return sum(num_elements(parameter) for parameter in trainable.values())


def num_elements(parameter: nn.Parameter) -> int:
    """参数的元素数；被 ZeRO-3 切分的、4 位量化后打包的都取完整大小。"""
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_numel", parameter.numel()) if state is None else state.shape.numel()


def base_model_of(model: nn.Module) -> BaichuanForCausalLM:
    """PeftModel 里的 BaichuanForCausalLM；不是 PeftModel 时是它自己。"""
    return model.get_base_model() if isinstance(model, PeftModel) else model
