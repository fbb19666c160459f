"""P-Tuning：第 2 版在每层前放可训练的键值（Liu 等，2021），第 1 版只在词嵌入处放可训练的提示；由 peft 实现。"""

from dataclasses import dataclass

from finetune.methods.method import Prompt, TrainMethod
from finetune.options import at_least, flag


@dataclass
class PtuningOptions:
    """只属于 P-Tuning 的参数。"""

    pre_seq_len: int = flag(16, "ptuning：前缀的长度，token", check=at_least(1))
    prefix_projection: bool = flag(False, "ptuning：前缀经过一个两层 MLP 产生；缺省直接训练")
    prefix_hidden_size: int = flag(
        512,
        "ptuning：上述 MLP 的宽度（缺省 512：7B 约训练 1.4 亿参数；取模型宽度 4096 则约 10.9 亿）",
        check=at_least(1),
    )
    ptuning_version: int = flag(2, "ptuning：2 在每层放可训练的键值，1 只在词嵌入处放可训练的提示", choices=(1, 2))


def apply_ptuning(model, options: PtuningOptions):
    """放上可训练的前缀或提示，模型本身冻结。"""
    from peft import PrefixTuningConfig, PromptEncoderConfig, TaskType, get_peft_model

    shared = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": options.pre_seq_len}
    if options.ptuning_version == 1:
        config = PromptEncoderConfig(encoder_hidden_size=options.prefix_hidden_size, **shared)
    else:
        config = PrefixTuningConfig(
            prefix_projection=options.prefix_projection, encoder_hidden_size=options.prefix_hidden_size, **shared
        )
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model.prompt_encoder.to(model.get_base_model().dtype)
    return model


def ptuning_problems(options) -> list[str]:
    """两个版本各自用不上的参数；options 是 train.py 的全部参数（要看 given 与 packing）。"""
    is_first = options.ptuning_version == 1
    problems = []
    if "prefix_hidden_size" in options.given and not (options.prefix_projection or is_first):
        problems.append(
            "--prefix_hidden_size 只在 --prefix_projection 或 --ptuning_version 1 时起作用，请去掉或加上其一"
        )
    if is_first and options.prefix_projection:
        problems.append("--prefix_projection 只用于 --ptuning_version 2（第 1 版的提示总是经过一个 MLP），请去掉")
    if is_first and options.packing:
        problems.append("--ptuning_version 1 的提示放在词嵌入处，不能与 --packing 同用，请去掉 --packing")
    return problems


def prompt_of(options: PtuningOptions) -> Prompt:
    """第 2 版占每层的键值，第 1 版占词嵌入处的位置。"""
    is_first = options.ptuning_version == 1
    return Prompt(tokens=options.pre_seq_len) if is_first else Prompt(key_values=options.pre_seq_len)


METHOD = TrainMethod(
    name="ptuning",
    learning_rate=5e-3,
    options=PtuningOptions,
    apply=apply_ptuning,
    is_trainable=lambda name, options: name.startswith("prompt_encoder."),
    problems=ptuning_problems,
    saves_adapter=True,
    prompt=prompt_of,
    smaller=lambda options: ["去掉 --prefix_projection"] if options.prefix_projection else [],
)
