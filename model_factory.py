"""由训练参数造模型：读检查点，按 --train_type 包成 freeze、lora、ptuning 或 full，并核对可训练的参数。"""

from collections.abc import Sequence
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from peft import PeftModel, set_peft_model_state_dict
from torch import nn

from baichuan import BaichuanConfig
from finetune.checkpoint.adapter import AdapterFile, check_second_stage
from finetune.checkpoint.added_tokens import AddedRows, first_rows, read_rows
from finetune.checkpoint.base_model import load_base_model, load_tokenizer
from finetune.checkpoint.options import quantization_of, read_words
from finetune.cli.train_flags import TrainOptions
from finetune.methods.registry import apply_method, base_model_of, check_trainable, num_elements
from finetune.process.precision import TORCH_DTYPES
from utils import log_rank_0


def build_model(args: TrainOptions, config: BaichuanConfig, precision: str, ds_config: dict) -> nn.Module:
    """读基座、套上训练方法、打开重算，返回可以交给 DeepSpeed 的模型；precision 是 bf16、fp16 或 fp32。集合操作。"""
    device = torch.device(get_accelerator().current_device_name())
    zero3_config = ds_config if ds_config.get("zero_optimization", {}).get("stage") == 3 else None
    dtype = TORCH_DTYPES[precision]
    model = load_base_model(args.model_name_or_path, config, dtype, device, zero3_config, quantization_of(args))
    if args.add_tokens is not None:
        starting_rows(args, config).attach(model, dtype, device)
    model = apply_method(model, args)
    if args.adapter_path is not None:
        load_adapter(model, Path(args.adapter_path), list(read_words(args.add_tokens)))
    num_trainable = check_trainable(model, args)
    num_total = sum(num_elements(parameter) for parameter in model.parameters())
    log_rank_0(
        f"模型：{config.num_hidden_layers} 层，{config.position_embedding}，norm_head={config.norm_head}；"
        f"可训练 {num_trainable:,} / {num_total:,}（{100 * num_trainable / num_total:.4f}%）"
    )
    if args.gradient_checkpointing != "none":
        enable_gradient_checkpointing(model, args.gradient_checkpointing)
    return model


def starting_rows(args: TrainOptions, config: BaichuanConfig) -> AddedRows:
    """新词的行的起点：--adapter_path 里的，没有时由基座算出。"""
    saved = None if args.adapter_path is None else read_rows(Path(args.adapter_path), config)
    if saved is not None:
        return saved
    tokenizer = load_tokenizer(args.model_name_or_path, config.vocab_size)
    return first_rows(args.model_name_or_path, config, tokenizer, list(read_words(args.add_tokens)))


def enable_gradient_checkpointing(model: nn.Module, choice: str):
    """打开重算：choice 是 all、attention，或每几层一层（正整数）。

    transformers 会顺带让词嵌入的输出需要梯度（可重入的重算才需要），这会把 freeze 的冻结底层全部拉进计算图；
    这里用不可重入的重算，所以撤掉。
    """
    base = base_model_of(model)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.disable_input_require_grads()
    named = {"all": 1, "attention": 0}
    base.model.checkpoint_every = named[choice] if choice in named else int(choice)


def load_adapter(model: PeftModel, path: Path, words: Sequence[str] = ()):
    """把已有适配器的权重读进刚套好的模型（--adapter_path）：第二阶段训练的起点，优化器从头开始。

    Raises:
        ValueError: 不是适配器，或与现在的方法参数不符（列出不同之处），或张量对不上。
    """
    check_second_stage(path, model, words)
    try:
        set_peft_model_state_dict(model, AdapterFile(path).read_all())
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"--adapter_path {path} 的张量与模型不符：{error}") from error
    log_rank_0(f"从适配器 {path} 开始训练，优化器从头")
