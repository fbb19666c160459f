"""train.py 的参数互相之间的检查：在读任何权重之前，一次列出全部问题。"""

import importlib.util
import math
from argparse import Namespace
from pathlib import Path

import torch

from baichuan import BaichuanConfig
from finetune.checkpoint.base_model import checked_skeleton, load_config
from finetune.checkpoint.quantized import quantization_problems
from finetune.data.plain_text import read_texts
from finetune.data.samples import check_first_rows
from finetune.methods.freeze import apply_freeze, freeze_parts
from finetune.methods.lora import lora_target_modules
from finetune.methods.registry import TRAIN_METHODS
from finetune.training.anomaly import spike_choice
from finetune.training.ds_config import read_ds_config
from finetune.training.ds_config_check import fixed_numbers
from finetune.training.log import REPORTS
from utils import log_rank_0


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


def settle_fixed_numbers(args: Namespace, ds_config: dict) -> list[str]:
    """DeepSpeed 配置写了具体的数、命令行没写时，以配置为准并说一声；两处都写而不同是错误，返回全部。"""
    problems = []
    for name, place, value in fixed_numbers(ds_config):
        if name is None:
            log_rank_0(f"注意：{args.ds_file} 的 {place} 写成 {value}，不随命令行变化")
        elif name == "warmup_ratio" and name in args.given:
            problems.append(
                f"--{name} 与 {args.ds_file} 的 {place}（{value}）都写了，后者会盖住前者；"
                '请去掉一个，或把配置里的改成 "auto"'
            )
        elif name == "warmup_ratio":
            log_rank_0(f"注意：预热以 {args.ds_file} 的 {place}（{value}）为准，不是 --{name} {args.warmup_ratio}")
        elif isinstance(getattr(args, name), int) and type(value) is not int:
            problems.append(f"{args.ds_file} 的 {place} 应为整数，实际是 {value}")
        elif getattr(args, name) != value and name in args.given:
            problems.append(
                f"--{name} {getattr(args, name)} 与 {args.ds_file} 的 {place}（{value}）不同；"
                '请去掉一个，或把配置里的改成 "auto"'
            )
        elif getattr(args, name) != value:
            log_rank_0(f"注意：{name} 以 {args.ds_file} 的 {place} 为准：{value}（缺省是 {getattr(args, name)}）")
            setattr(args, name, value)
            args.given = sorted({*args.given, name})  # 配置里另一处再写一个不同的数也是错误
    return problems


def report_problems(report_to: str) -> list[str]:
    """--report_to 的问题：不认识或重复的名字，没有安装 swanlab。"""
    names = report_to.split(",")
    if not set(names) <= set(REPORTS) or len(set(names)) < len(names):
        return [f"--report_to({report_to}) 应为 {'、'.join(REPORTS)} 里的几个，逗号分隔，不重复"]
    if "swanlab" in names and importlib.util.find_spec("swanlab") is None:
        return ["--report_to swanlab 需要 swanlab，请运行 pip install swanlab，或去掉它"]
    return []


def validate_args(args: Namespace) -> tuple[dict, BaichuanConfig]:
    """检查全部参数，在读任何权重之前；返回 (DeepSpeed 配置, 模型配置)。

    Raises:
        ValueError: 列出全部问题。
    """
    problems = []

    def expect(is_valid: bool, message: str):
        if not is_valid:
            problems.append(message)

    def read(function, *values):
        try:
            return function(*values)
        except ValueError as error:
            problems.append(str(error))

    ds_config = read(read_ds_config, args.ds_file)
    if ds_config is not None:
        problems += settle_fixed_numbers(args, ds_config)
    for name in (
        "max_len",
        "max_src_len",
        "num_train_epochs",
        "per_device_train_batch_size",
        "lora_dim",
        "lora_alpha",
        "gradient_accumulation_steps",
        "show_loss_step",
        "pre_seq_len",
        "prefix_hidden_size",
    ):
        expect(getattr(args, name) >= 1, f"--{name}({getattr(args, name)}) 必须至少为 1")
    expect(
        args.max_src_len < args.max_len,
        f"--max_src_len({args.max_src_len}) 必须小于 --max_len({args.max_len})，请调小前者",
    )
    expect(args.max_steps == -1 or args.max_steps >= 1, f"--max_steps({args.max_steps}) 必须为 -1（不限）或至少为 1")
    expect(args.save_model_step >= 0, f"--save_model_step({args.save_model_step}) 必须为 0（每轮）或正数")
    expect(0 < args.learning_rate < math.inf, f"--learning_rate({args.learning_rate}) 必须是大于 0 的有限数")
    expect(0 <= args.weight_decay < math.inf, f"--weight_decay({args.weight_decay}) 必须是不小于 0 的有限数")
    expect(0 <= args.seed < 2**63, f"--seed({args.seed}) 必须在 [0, 2^63) 内")
    for name in ("warmup_ratio", "lora_dropout"):
        expect(0 <= getattr(args, name) < 1, f"--{name}({getattr(args, name)}) 必须在 [0, 1) 内")

    expect(
        args.precision != "fp16" or torch.cuda.is_available(),
        "--precision fp16 需要 GPU，CPU 上请用 bf16 或 fp32（缺省的 auto 会选对）",
    )
    problems += report_problems(args.report_to)
    for method, entry in TRAIN_METHODS.items():
        foreign = [f"--{flag}" for flag in entry.flags if flag in args.given and method != args.train_type]
        expect(not foreign, f"{'、'.join(foreign)} 属于 --train_type {method}，对 {args.train_type} 不起作用，请去掉")
    expect(
        args.train_type != "freeze" or bool(freeze_parts(args)),
        '--train_type freeze 需要 --freeze_module_name，如 "layers.31.,layers.30."（要训练的层）',
    )
    expect(
        "prefix_hidden_size" not in args.given or args.prefix_projection or args.ptuning_version == 1,
        "--prefix_hidden_size 只在 --prefix_projection 或 --ptuning_version 1 时起作用，请去掉或加上其一",
    )
    expect(
        args.ptuning_version == 2 or not args.prefix_projection,
        "--prefix_projection 只用于 --ptuning_version 2（第 1 版的提示总是经过一个 MLP），请去掉",
    )
    expect(
        args.ptuning_version == 2 or args.train_type != "ptuning" or not args.packing,
        "--ptuning_version 1 的提示放在词嵌入处，不能与 --packing 同用，请去掉 --packing",
    )

    expect(
        args.adapter_path is None or args.train_type in ("lora", "ptuning"),
        f"--adapter_path 只用于 lora 与 ptuning，--train_type {args.train_type} 没有适配器，请去掉",
    )
    expect(
        args.adapter_path is None or (Path(args.adapter_path) / "adapter_config.json").is_file(),
        f"--adapter_path {args.adapter_path} 里没有 adapter_config.json，请给出 lora 或 ptuning 的检查点目录",
    )
    expect(
        args.cache_frozen == "none" or (args.train_type == "freeze" and args.packing),
        f"--cache_frozen {args.cache_frozen} 只用于 --train_type freeze，并且要开着 --packing，请去掉或改过来",
    )

    problems += quantization_problems(args, ds_config)
    problems += evaluation_problems(args)
    for path in (args.train_path, args.eval_path):
        if path is not None:
            read(check_first_rows, path)
    output_dir = Path(args.output_dir)
    expect(not output_dir.exists() or output_dir.is_dir(), f"--output_dir {output_dir} 是一个文件，请给出目录")
    read(spike_choice, args.loss_spike_factor)
    config = read(load_config, args.model_name_or_path, args.mode)
    has_what_to_train = args.train_type != "freeze" or freeze_parts(args)
    if config is not None and has_what_to_train and not args.dry_run:  # 推算时权重可以还没有下载
        read(check_model, args, config)
    if problems:
        raise ValueError("\n".join(problems))
    return ds_config, config


NEEDS_EVAL_PATH = ("eval_step", "eval_metric", "eval_max_new_tokens", "early_stopping_patience")


def evaluation_problems(args: Namespace) -> list[str]:
    """这一组参数的全部问题。"""
    problems = []

    def expect(is_valid: bool, message: str):
        if not is_valid:
            problems.append(message)

    for name in ("eval_step", "early_stopping_patience", "save_total_limit"):
        expect(getattr(args, name) >= 0, f"--{name}({getattr(args, name)}) 必须为 0（不用）或正数")
    expect(args.eval_max_new_tokens >= 1, f"--eval_max_new_tokens({args.eval_max_new_tokens}) 必须至少为 1")
    useless = [f"--{name}" for name in NEEDS_EVAL_PATH if name in args.given and args.eval_path is None]
    expect(not useless, f"{'、'.join(useless)} 只在评估时起作用，请加上 --eval_path 或去掉")
    expect(
        "eval_max_new_tokens" not in args.given or args.eval_metric != "nll",
        "--eval_max_new_tokens 在 --eval_metric nll 时不起作用，请去掉，或换一个生成的指标",
    )
    threshold, ratio = args.forgetting_threshold, args.replay_ratio
    expect(
        threshold is None or 0 <= threshold < math.inf,
        f"--forgetting_threshold({threshold}) 必须是不小于 0 的有限数",
    )
    expect(
        threshold is None or args.general_path is not None,
        "--forgetting_threshold 需要 --general_path，请加上或去掉",
    )
    expect(
        (args.replay_path is None) == (ratio is None),
        "--replay_path 与 --replay_ratio 要一起给出（如 --replay_ratio 0.1），请补上或都去掉",
    )
    expect(ratio is None or 0 < ratio < math.inf, f"--replay_ratio({ratio}) 必须是大于 0 的有限数")
    for path in (args.general_path, args.replay_path):
        try:
            if path is not None:
                read_texts(path)
        except ValueError as error:
            problems.append(str(error))
    is_same = (
        args.general_path and args.replay_path and Path(args.general_path).resolve() == Path(args.replay_path).resolve()
    )
    expect(
        not is_same,
        f"--general_path 与 --replay_path 是同一个文件 {args.general_path}：训练过的文字不能衡量遗忘，请分成两个文件",
    )
    return problems
