"""训练方法的表，以及各方法共用的：选哪一种、核对可训练的参数。"""

from dataclasses import dataclass

from finetune.methods import freeze, full, lora, ptuning
from finetune.options import flag

TRAIN_METHODS = {module.METHOD.name: module.METHOD for module in (freeze, lora, ptuning, full)}
TRAIN_TYPE_ALIASES = {"all": "full"}


@dataclass
class MethodChoice:
    """选哪一种方法、从哪里接着。"""

    train_type: str = flag("lora", "训练方法；all 同 full", choices=(*TRAIN_METHODS, *TRAIN_TYPE_ALIASES))
    adapter_path: str | None = flag(
        None, "lora、ptuning：从已有的适配器检查点开始新的一轮训练，优化器从头（缺省从随机的适配器开始）"
    )


def apply_method(model, options):
    """套上 --train_type 的方法；新词的行（--add_tokens）总是可以训练。options 是 train.py 的全部参数。"""
    model = TRAIN_METHODS[options.train_type].apply(model, options)
    for name, parameter in model.named_parameters():
        if is_added(name):
            parameter.requires_grad_(True)
    return model


def is_added(name: str) -> bool:
    """参数名是不是新词的行，见 BaichuanForCausalLM.add_rows。"""
    return name.endswith(".added_rows")


def check_trainable(model, options: MethodChoice) -> int:
    """核对可训练的参数恰好是这种方法的那些（与新词的行），返回可训练的元素数（ZeRO-3 切分的也按完整大小计）。

    Raises:
        ValueError: 没有可训练的参数，或有方法之外的参数可训练，或该训练的被冻结了。
    """
    method = TRAIN_METHODS[options.train_type]
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(f"--train_type {method.name} 没有可训练的参数，请检查它的参数")
    outside = [name for name in trainable if not (method.is_trainable(name, options) or is_added(name))]
    if outside:
        raise ValueError(f"--train_type {method.name} 之外的参数可训练：{outside[:5]}")
    frozen = [
        name for name, p in model.named_parameters() if not p.requires_grad and method.is_trainable(name, options)
    ]
    if frozen:
        raise ValueError(f"--train_type {method.name} 应训练的参数被冻结了：{frozen[:5]}")
    return sum(num_elements(parameter) for parameter in trainable.values())


def num_elements(parameter) -> int:
    """参数的元素数；被 ZeRO-3 切分的、4 位量化后打包的都取完整大小。"""
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_numel", parameter.numel()) if state is None else state.shape.numel()


def base_model_of(model):
    """PeftModel 里的 BaichuanForCausalLM；不是 PeftModel 时是它自己。"""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
