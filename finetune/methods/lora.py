"""LoRA（Hu 等，2021），由 peft 实现；基座可以量化（QLoRA，见 checkpoint/quantized.py）。"""

from dataclasses import dataclass

from finetune.methods.method import TrainMethod
from finetune.options import at_least, flag, share


@dataclass
class LoraOptions:
    """只属于 LoRA 的参数。"""

    lora_dim: int = flag(8, "lora：秩", check=at_least(1))
    lora_alpha: int = flag(30, "lora：缩放系数的分子，实际缩放为 alpha / dim", check=at_least(1))
    lora_dropout: float = flag(0.1, "lora：dropout 概率，[0, 1)", check=share)
    lora_module_name: str = flag("W_pack", "lora：套在哪些线性层上，逗号或空格分隔；all-linear 为全部", is_list=True)
    load_in_4bit: bool = flag(False, "lora：基座量化成 4 位（nf4，QLoRA），要 bitsandbytes（缺省不量化）")
    load_in_8bit: bool = flag(False, "lora：基座量化成 8 位（LLM.int8），要 bitsandbytes（缺省不量化）")


def lora_target_modules(model, options: LoraOptions) -> list[str]:
    """--lora_module_name 所指的线性层的名字。

    Raises:
        ValueError: 某个名字不是模型里的线性层；列出可用的名字。
    """
    from torch import nn

    linear_names = sorted(
        {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )
    if options.lora_module_name == "all-linear":
        return linear_names
    target_modules = [name.strip() for name in options.lora_module_name.split(",") if name.strip()]
    unknown = [name for name in target_modules if name not in linear_names]
    if unknown or not target_modules:
        raise ValueError(
            f"--lora_module_name 的 {unknown} 不是模型里的线性层，可选：{'、'.join(linear_names)}、all-linear"
        )
    return target_modules


def apply_lora(model, options: LoraOptions):
    """在 --lora_module_name 所指的线性层旁加上低秩矩阵，其余冻结。"""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        r=options.lora_dim,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=lora_target_modules(model, options),
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


METHOD = TrainMethod(
    name="lora",
    learning_rate=2e-4,
    options=LoraOptions,
    apply=apply_lora,
    is_trainable=lambda name, options: "lora_" in name,
    saves_adapter=True,
)
