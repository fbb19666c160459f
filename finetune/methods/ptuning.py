"""P-Tuning：第 2 版在每层前放可训练的键值，第 1 版只在词嵌入处放可训练的提示。"""

from argparse import Namespace

from peft import PrefixTuningConfig, PromptEncoderConfig, TaskType, get_peft_model
from torch import nn

from baichuan import BaichuanForCausalLM


def apply_ptuning(model: BaichuanForCausalLM, args: Namespace) -> nn.Module:
    """P-Tuning：第 2 版在每层前放可训练的键值（Liu 等，2021），第 1 版只在词嵌入处放可训练的提示。"""
    shared = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": args.pre_seq_len}
    if args.ptuning_version == 1:
        config = PromptEncoderConfig(encoder_hidden_size=args.prefix_hidden_size, **shared)
    else:
        config = PrefixTuningConfig(
            prefix_projection=args.prefix_projection, encoder_hidden_size=args.prefix_hidden_size, **shared
        )
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model.prompt_encoder.to(model.get_base_model().dtype)
    return model
