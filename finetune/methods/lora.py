"""LoRA，由 peft 实现。"""

from argparse import Namespace

from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from baichuan import BaichuanForCausalLM


def lora_target_modules(model: nn.Module, args: Namespace) -> list[str]:
    """--lora_module_name 所指的线性层的名字。

    Raises:
        ValueError: 某个名字不是模型里的线性层；列出可用的名字。
    """
    linear_names = sorted(
        {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )
    if args.lora_module_name == "all-linear":
        return linear_names
    target_modules = [name.strip() for name in args.lora_module_name.split(",") if name.strip()]
    unknown = [name for name in target_modules if name not in linear_names]
    if unknown or not target_modules:
        raise ValueError(
            f"--lora_module_name 的 {unknown} 不是模型里的线性层，可选：{'、'.join(linear_names)}、all-linear"
        )
    return target_modules


def apply_lora(model: BaichuanForCausalLM, args: Namespace) -> nn.Module:
    """LoRA（Hu 等，2021），由 peft 实现；--lora_module_name 是逗号分隔的模块名，或 all-linear。

    Raises:
        ValueError: 模块名没有匹配到线性层；列出可用的名字。
    """
    config = LoraConfig(
        r=args.lora_dim,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=lora_target_modules(model, args),
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)
