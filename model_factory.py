"""由训练参数造模型：读检查点，按 --train_type 包成 freeze、lora、ptuning 或 full，并核对可训练的参数。"""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    TaskType,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer
from config_check import model_config_problems, tokenizer_model_problems
from quantization import load_quantized, quantization_of
from utils import freed_blocks_returned, log_rank_0, read_json
from weights import check_weights, load_weights

# 词表比分词器大一些是常有的补齐；分词器不到词表的这个比例就提醒
UNUSED_ROWS_ALLOWED = 0.9


class ModelFamily(NamedTuple):
    """一个模型族的三个类。结构（rope/alibi、NormHead）由检查点的 config.json 决定，不由族名决定。"""

    config_class: type
    model_class: type
    tokenizer_class: type


class TrainMethod(NamedTuple):
    """一种训练方法：怎样包装模型、哪些参数可以训练、只属于它的命令行参数、缺省学习率。"""

    apply: Callable[[BaichuanForCausalLM, Namespace], nn.Module]
    is_trainable: Callable[[str, Namespace], bool]
    flags: tuple[str, ...]
    learning_rate: float


def apply_freeze(model: BaichuanForCausalLM, args: Namespace) -> nn.Module:
    """只训练名字里含 --freeze_module_name 任一片段的参数（名字沿用官方张量名）。

    Raises:
        ValueError: 某个片段一个参数也没匹配到；列出模型里有什么。
    """
    names = [name for name, _ in model.named_parameters()]
    unmatched = [part for part in freeze_parts(args) if not any(part in name for name in names)]
    if unmatched:
        modules = sorted({name.split(".weight")[0].replace("model.layers.", "layers.") for name in names})
        layers = model.config.num_hidden_layers
        others = [name for name in modules if not name.startswith("layers.")]
        parts = sorted({name.split(".", 2)[2] for name in modules if name.startswith("layers.")})
        raise ValueError(
            f"--freeze_module_name 的 {unmatched} 没有匹配到任何参数；"
            f"模型有 layers.0. 到 layers.{layers - 1}.（注意末尾的点），每层有 {parts}，此外还有 {others}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in freeze_parts(args)))
    return model


def freeze_parts(args: Namespace) -> list[str]:
    """--freeze_module_name 按逗号切开，去掉空白与空项。"""
    return [part.strip() for part in (args.freeze_module_name or "").split(",") if part.strip()]


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


def apply_full(model: BaichuanForCausalLM, args: Namespace) -> nn.Module:
    """全部参数都训练。"""
    return model.requires_grad_(True)


MODEL_FAMILIES = {
    "baichuan": ModelFamily(BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer),
    "baichuan2": ModelFamily(BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer),
}
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


def load_config(path: str | Path, mode: str) -> BaichuanConfig:
    """读检查点的 config.json。

    Raises:
        ValueError: 目录或 config.json 不在，或不是 baichuan。
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"--model_name_or_path {path} 里没有 config.json，请给出 Baichuan 检查点的本地目录")
    problems = model_config_problems(read_json(path / "config.json"))
    if problems:
        raise ValueError(f"{path / 'config.json'} 损坏，请重新下载：{'；'.join(problems)}")
    try:
        config = MODEL_FAMILIES[mode].config_class.from_pretrained(path)
    except ValueError:
        raise
    except Exception as error:  # 内容来自外面，transformers 对坏的值抛各种异常
        raise ValueError(f"{path / 'config.json'} 读不了：{error}") from error
    if config.model_type != "baichuan":
        raise ValueError(f"{path / 'config.json'} 的 model_type 是 {config.model_type!r}，本项目只训练 baichuan")
    return config


def load_tokenizer(path: str | Path, mode: str, vocab_size: int) -> BaichuanTokenizer:
    """读检查点的分词器，并核对它与词表大小相配。

    Raises:
        ValueError: tokenizer.model 不在或损坏，或分词器的词比模型的词表多。
    """
    try:
        tokenizer = MODEL_FAMILIES[mode].tokenizer_class.from_pretrained(path)
    except ValueError:
        raise
    except Exception as error:  # 内容来自外面，transformers 对坏的 JSON 抛各种异常
        raise ValueError(f"{path} 里没有可用的分词器（tokenizer.model、tokenizer_config.json）：{error}") from error
    problems = tokenizer_model_problems((Path(path) / "tokenizer.model").read_bytes())
    if problems:
        raise ValueError(f"{Path(path) / 'tokenizer.model'} 损坏，请重新下载：{'；'.join(problems)}")
    for name, expected in (("bos", tokenizer.sp_model.bos_id()), ("eos", tokenizer.sp_model.eos_id())):
        token, found = getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")
        if found != expected:
            raise ValueError(
                f"{path} 的 {name}_token 是 {token!r}（{found} 号），tokenizer.model 里是 {expected} 号："
                "tokenizer_config.json 或 special_tokens_map.json 损坏，请重新下载"
            )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{path} 的分词器有 {len(tokenizer)} 个词，config.json 的 vocab_size 只有 {vocab_size}："
            "分词器与权重不是一套"
        )
    if len(tokenizer) < UNUSED_ROWS_ALLOWED * vocab_size:
        log_rank_0(
            f"警告：{path} 的分词器只有 {len(tokenizer)} 个词，config.json 的 vocab_size 是 {vocab_size}："
            "一代是 64,000，二代是 125,696，请确认 tokenizer.model 与权重是一套",
            sys.stderr,  # predict.py 的标准输出只有回答
        )
    return tokenizer


def checked_skeleton(path: str | Path, config: BaichuanConfig) -> BaichuanForCausalLM:
    """没有存储的模型（meta 设备），并核对权重文件的名字与形状与它一致；只读文件头。

    Raises:
        ValueError: 权重文件缺少、损坏，或与 config.json 不符。
    """
    with torch.device("meta"):
        skeleton = BaichuanForCausalLM(config)
    check_weights(path, {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()})
    return skeleton


def check_model(args: Namespace, config: BaichuanConfig):
    """在动任何东西之前核对：权重文件完整，方法的模块名都能匹配。

    Raises:
        ValueError: 见 checked_skeleton、apply_freeze、lora_target_modules。
    """
    skeleton = checked_skeleton(args.model_name_or_path, config)
    if args.train_type == "freeze":
        apply_freeze(skeleton, args)
    elif args.train_type == "lora":
        lora_target_modules(skeleton, args)


def load_base_model(
    path: str | Path,
    config: BaichuanConfig,
    dtype: torch.dtype,
    device: torch.device,
    zero3_config: dict | None = None,
    quantization: str | None = None,
) -> BaichuanForCausalLM:
    """造模型并读入权重；没有复制整个模型的一步。

    Args:
        dtype、device: 权重的类型与位置（ZeRO-3 的位置由 DeepSpeed 决定）。
        zero3_config: ZeRO-3 的 DeepSpeed 配置：各层一造出来就切分，每个进程只读自己的一段；其他情况为 None。
        quantization: 4bit、8bit，见 quantization.py；None 为不量化。

    Raises:
        ValueError: 权重文件缺少、损坏，或与 config.json 不符。
    """
    code = sorted(file.name for file in Path(path).glob("*.py"))
    if code:
        log_rank_0(f"{path} 里有代码（{'、'.join(code)}）：本项目用自己的实现，不会执行它们")
    skeleton = checked_skeleton(path, config)
    if quantization is not None:
        model = load_quantized(skeleton, path, dtype, device, quantization)
    elif zero3_config is None:
        model = skeleton.to(dtype).to_empty(device=device)
    else:
        import deepspeed

        # 类型由配置里的 bf16、fp16 定；不传 dtype：没有 fp16 的设备（CPU）上 DeepSpeed 0.19.8 会把它当作 bf16
        with no_init_weights(), freed_blocks_returned(), deepspeed.zero.Init(config_dict_or_path=zero3_config):
            model = BaichuanForCausalLM(config)
    assert next(model.parameters()).dtype == dtype, "模型的类型与 --precision 不符"
    if quantization is None:
        load_weights(model, path)
    if (Path(path) / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path)
        except Exception as error:  # 内容来自外面，transformers 对坏的值抛各种异常
            raise ValueError(f"{Path(path) / 'generation_config.json'} 损坏，请重新下载：{error}") from error
    model.config.dtype = dtype
    model.name_or_path = str(path)  # peft 把它写进 adapter_config.json
    return model


def build_model(
    args: Namespace, config: BaichuanConfig, dtype: torch.dtype, device: torch.device, zero3_config: dict | None
) -> nn.Module:
    """读基座、套上训练方法、打开重算，返回可以交给 DeepSpeed 的模型。"""
    model = load_base_model(args.model_name_or_path, config, dtype, device, zero3_config, quantization_of(args))
    model = TRAIN_METHODS[args.train_type].apply(model, args)
    if args.adapter_path is not None:
        load_adapter(model, Path(args.adapter_path))
    num_trainable = check_trainable(model, args)
    num_total = sum(num_elements(parameter) for parameter in model.parameters())
    log_rank_0(
        f"模型：{config.num_hidden_layers} 层，{config.position_embedding}，norm_head={config.norm_head}；"
        f"可训练 {num_trainable:,} / {num_total:,}（{100 * num_trainable / num_total:.4f}%）"
    )
    if args.gradient_checkpointing != "none":
        enable_gradient_checkpointing(model, args.gradient_checkpointing)
    return model


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


def load_adapter(model: PeftModel, path: Path):
    """把已有适配器的权重读进刚套好的模型（--adapter_path）：第二阶段训练的起点，优化器从头开始。

    Raises:
        ValueError: 不是适配器，或与现在的方法参数不符（列出不同之处），或张量对不上。
    """
    try:
        saved = PeftConfig.from_pretrained(path)
        state = load_file(path / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"--adapter_path {path} 不是本项目或 peft 存下的适配器：{error}") from error
    current = model.active_peft_config
    names = ("peft_type", "r", "lora_alpha", "target_modules", "num_virtual_tokens", "prefix_projection")
    differences = [
        f"{name}：适配器是 {getattr(saved, name, None)}，现在是 {getattr(current, name, None)}"
        for name in names
        if getattr(saved, name, None) != getattr(current, name, None)
    ]
    if getattr(current, "prefix_projection", False):
        differences.append("prefix_projection 的 MLP 没有存在适配器里，只能不带 --prefix_projection 接着训练")
    if differences:
        raise ValueError(f"--adapter_path {path} 与现在的参数不符：" + "；".join(differences))
    try:
        result = set_peft_model_state_dict(model, state)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"--adapter_path {path} 的张量与模型不符：{error}") from error
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = sorted(trainable & set(result.missing_keys))
    # 提示类的适配器由 peft 另行读进 prompt_encoder，形状不符时它自己会报错
    if not current.is_prompt_learning and (missing or result.unexpected_keys):
        raise ValueError(f"--adapter_path {path} 的张量与模型不符：缺 {missing[:3]}，多 {result.unexpected_keys[:3]}")
    log_rank_0(f"从适配器 {path} 开始训练，优化器从头")


def base_model_of(model: nn.Module) -> BaichuanForCausalLM:
    """PeftModel 里的 BaichuanForCausalLM；不是 PeftModel 时是它自己。"""
    return model.get_base_model() if isinstance(model, PeftModel) else model
