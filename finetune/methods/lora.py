"""LoRA（Hu 等，2021）与它的变体，由 peft 实现；基座可以量化（QLoRA，见 checkpoint/quantized.py）。

rsLoRA（Kalajdzievski，2023）改缩放；DoRA（Liu 等，2024）把权重拆成方向与大小，大小也训练；
LoRA+（Hayou 等，2024）让 B 的学习率是 A 的几倍。
"""

from dataclasses import dataclass

from finetune.methods.method import TrainMethod
from finetune.options import above_zero, at_least, flag, share


@dataclass
class LoraOptions:
    """只属于 LoRA 的参数。"""

    lora_dim: int = flag(8, "lora：秩", check=at_least(1))
    lora_alpha: int = flag(30, "lora：缩放系数的分子，实际缩放为 alpha / dim", check=at_least(1))
    lora_dropout: float = flag(0.1, "lora：dropout 概率，[0, 1)", check=share)
    lora_module_name: str = flag("W_pack", "lora：套在哪些线性层上，逗号或空格分隔；all-linear 为全部", is_list=True)
    use_rslora: bool = flag(False, "lora：缩放用 alpha / √dim（rsLoRA），秩大时不会太小（缺省 alpha / dim）")
    use_dora: bool = flag(False, "lora：各行的大小另外训练（DoRA），较慢，常更接近 full（缺省不用）")
    loraplus_ratio: float | None = flag(
        None,
        "lora：B 的学习率是 A 的多少倍（LoRA+），如 16；要 WarmupCosineLR（缺省相同）",
        kind=float,
        check=above_zero,
    )
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
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def lora_learning_rate_ratio(name: str, options: LoraOptions) -> float:
    """LoRA+：B 的学习率是 --learning_rate 的多少倍。"""
    return options.loraplus_ratio or 1.0 if ".lora_B." in name else 1.0


def lora_problems(options: LoraOptions) -> list[str]:
    """量化的基座上没有 DoRA。"""
    if options.use_dora and (options.load_in_4bit or options.load_in_8bit):
        return ["--use_dora 要读基座的权重，不能与 --load_in_4bit、--load_in_8bit 同用，请去掉其一"]
    return []


METHOD = TrainMethod(
    name="lora",
    learning_rate=2e-4,
    options=LoraOptions,
    apply=apply_lora,
    is_trainable=lambda name, options: "lora_" in name,
    problems=lora_problems,
    saves_adapter=True,
    learning_rate_ratio=lora_learning_rate_ratio,
)
