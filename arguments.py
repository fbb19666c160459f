"""train.py 的命令行参数：定义、缺省值与互相之间的检查。"""

import argparse
import math
import os
from argparse import SUPPRESS, Namespace
from pathlib import Path

import torch

from baichuan import BaichuanConfig
from config_check import fixed_numbers
from data_set import check_first_rows
from evaluation_flags import add_evaluation_flags, evaluation_problems
from finetune.data.mixture import parse_sources
from finetune.data.samples import LOSS_TURNS, row_options, separator_choice
from model_factory import MODEL_FAMILIES, TRAIN_METHODS, check_model, freeze_parts, load_config
from numerics import spike_choice
from prompting import prompt_format_choice, read_template
from quantization import quantization_problems
from utils import PRECISIONS, log_rank_0, read_ds_config

TRAIN_TYPE_ALIASES = {"all": "full"}


class BoolFlag(argparse.Action):
    """布尔参数：--flag、--no-flag，也接受 --flag True|False（按字面解析，不像 type=bool 那样把 "False" 当真）。"""

    TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")

    def __init__(self, option_strings, dest, **kwargs):
        negated = [f"--no-{option[2:]}" for option in option_strings]
        super().__init__([*option_strings, *negated], dest, nargs="?", metavar="True|False", **kwargs)

    def __call__(self, parser, namespace, value, option_string=None):
        if value is not None and value.lower() not in self.TRUE + self.FALSE:
            parser.error(f"{option_string} 只接受 True 或 False，得到 {value!r}")
        is_true = value is None or value.lower() in self.TRUE
        setattr(namespace, self.dest, is_true != option_string.startswith("--no-"))


class Parser(argparse.ArgumentParser):
    """错误信息带上办法的解析器；未知参数与取值错误以退出码 2 结束。"""

    def error(self, message: str):
        if os.environ.get("RANK", "0") == "0":
            self.print_usage()
            print(f"参数错误：{message}。全部参数见 python {self.prog} --help", flush=True)
        raise SystemExit(2)


def checkpointing_choice(value: str) -> str:
    """--gradient_checkpointing 的取值：none、all、attention、正整数；True、False 同 all、none。"""
    value = {"true": "all", "false": "none"}.get(value.lower(), value.lower())
    if value not in ("none", "all", "attention") and not (value.isdecimal() and int(value) > 0):
        raise argparse.ArgumentTypeError(f"应为 none、all、attention 或正整数，得到 {value!r}")
    return value


def build_parser(only_given: bool = False) -> argparse.ArgumentParser:
    """全部参数；only_given 时不带缺省值，解析结果里只有命令行写出的那些。"""
    parser = Parser(
        prog="train.py",
        description="用 DeepSpeed 微调 Baichuan 与 Baichuan2（7B、13B）",
        argument_default=SUPPRESS if only_given else None,
        allow_abbrev=False,
    )

    def add(group, name, default=None, *, help, **kwargs):
        if only_given:
            default, kwargs["required"] = SUPPRESS, False
        if kwargs.get("action") is not BoolFlag:
            kwargs.setdefault("type", type(default) if default not in (None, SUPPRESS) else str)
        group.add_argument(f"--{name}", default=default, help=help, **kwargs)

    def typed(value_type):
        return {"type": value_type}

    base = parser.add_argument_group("模型与数据")
    add(base, "model_name_or_path", required=True, help="Baichuan 检查点的本地目录（必填）")
    add(
        base,
        "mode",
        "baichuan",
        choices=list(MODEL_FAMILIES),
        help="模型族；结构以检查点的 config.json 为准（缺省 %(default)s）",
    )
    add(
        base,
        "train_path",
        required=True,
        nargs="+",
        metavar="文件",
        help="训练数据（必填），写法见 docs/data.md；可以有几个，'文件*0.5' 取其中一半的行，'文件*3' 重复三遍",
    )
    add(base, "eval_path", help="评估数据，格式同训练数据；每轮结束时评估（缺省不评估）")
    add(
        base,
        "val_ratio",
        **typed(float),
        help="不给 --eval_path 时，从训练数据里按文档留出这么大份额的行作评估，(0, 1)；"
        "同一篇或相近的文档总在同一边，十万行以上只看相同的（缺省不留）",
    )
    add(
        base,
        "prompt_format",
        "auto",
        type=prompt_format_choice,
        metavar="auto|plain|chat|文件.json",
        help="提示格式：plain 为基座模型，chat 为对话模型的角色标记，auto 由检查点决定；"
        "或一个模板文件，见 docs/data.md（缺省 %(default)s）",
    )
    add(
        base,
        "input_separator",
        "",
        type=separator_choice,
        metavar="文字",
        help=r"instruction 与 input 之间的文字，\n 是换行（缺省为空：直接相接）",
    )
    add(
        base,
        "ignore_fields",
        "",
        help="当作没有的字段，逗号分隔，如 tools,images；认识而用不上的字段要这样写明才略去（缺省没有）",
    )
    add(
        base,
        "loss_turns",
        "all",
        choices=LOSS_TURNS,
        help="训练哪些回答：all 全部（连 history 里的），last 只有最后一个；"
        "消息里写明的 loss、weight 优先（缺省 %(default)s）",
    )
    add(base, "train_on_prompt", False, action=BoolFlag, help="提示（system 与用户的话）也是目标；缺省只训练回答")
    add(base, "max_len", 1024, **typed(int), help="一个样本的最大长度，token（缺省 %(default)s）")
    add(base, "max_src_len", 768, **typed(int), help="提示部分的最大长度，token，须小于 max_len（缺省 %(default)s）")
    add(base, "is_skip", False, action=BoolFlag, help="超长的样本丢弃；缺省截断")
    add(base, "drop_duplicates", False, action=BoolFlag, help="内容完全相同的样本只留一个；缺省都保留")
    add(base, "cache_dir", help="分词结果的缓存目录，按内容、分词器与设置区分（缺省不缓存）")
    add(
        base,
        "packing",
        True,
        action=BoolFlag,
        help="把一步的样本并排放进尽量少的 micro batch，各看各的，相同的开头（如同样的指令）只算一次，结果与不并排相同"
        "（缺省开；P-Tuning 第 1 版不支持，自动关）",
    )

    method = parser.add_argument_group("训练方法")
    add(
        method,
        "train_type",
        "lora",
        choices=[*TRAIN_METHODS, *TRAIN_TYPE_ALIASES],
        help="训练方法；all 同 full（缺省 %(default)s）",
    )
    add(method, "freeze_module_name", help='freeze：要训练的参数名片段，逗号分隔，如 "layers.31.,layers.30."')
    add(method, "lora_dim", 8, **typed(int), help="lora：秩（缺省 %(default)s）")
    add(method, "lora_alpha", 30, **typed(int), help="lora：缩放系数的分子，实际缩放为 alpha / dim（缺省 %(default)s）")
    add(method, "lora_dropout", 0.1, **typed(float), help="lora：dropout 概率，[0, 1)（缺省 %(default)s）")
    add(
        method,
        "lora_module_name",
        "W_pack",
        help="lora：套在哪些线性层上，逗号分隔；all-linear 为全部（缺省 %(default)s）",
    )
    add(method, "load_in_4bit", False, action=BoolFlag, help="lora：基座量化成 4 位（nf4，QLoRA），要 bitsandbytes")
    add(method, "load_in_8bit", False, action=BoolFlag, help="lora：基座量化成 8 位（LLM.int8），要 bitsandbytes")
    add(method, "pre_seq_len", 16, **typed(int), help="ptuning：前缀的长度，token（缺省 %(default)s）")
    add(method, "prefix_projection", False, action=BoolFlag, help="ptuning：前缀经过一个两层 MLP 产生；缺省直接训练")
    add(
        method,
        "prefix_hidden_size",
        512,
        **typed(int),
        help="ptuning：上述 MLP 的宽度（缺省 %(default)s：7B 约训练 1.4 亿参数；取模型宽度 4096 则约 10.9 亿）",
    )
    add(
        method,
        "ptuning_version",
        2,
        **typed(int),
        choices=[1, 2],
        help="ptuning：2 在每层放可训练的键值，1 只在词嵌入处放可训练的提示（缺省 %(default)s）",
    )
    add(
        method,
        "adapter_path",
        help="lora、ptuning：从已有的适配器检查点开始新的一轮训练，优化器从头（缺省从随机的适配器开始）",
    )

    train = parser.add_argument_group("训练过程")
    add(train, "output_dir", required=True, help="检查点与日志的目录（必填）；已有上一次的结果会移到 previous-N/")
    add(train, "num_train_epochs", 3, **typed(int), help="轮数（缺省 %(default)s）")
    add(train, "max_steps", -1, **typed(int), help="优化器步数的上限，-1 为不限（缺省 %(default)s）")
    add(
        train,
        "per_device_train_batch_size",
        4,
        **typed(int),
        help="每个进程一个 micro batch 的样本数（缺省 %(default)s）",
    )
    add(train, "gradient_accumulation_steps", 4, **typed(int), help="梯度累积的次数（缺省 %(default)s）")
    add(
        train,
        "learning_rate",
        **typed(float),
        help="峰值学习率（缺省随方法："
        + "，".join(f"{name} {entry.learning_rate:g}" for name, entry in TRAIN_METHODS.items())
        + "）",
    )
    add(train, "weight_decay", 0.1, **typed(float), help="权重衰减，只作用于矩阵，不作用于 RMSNorm（缺省 %(default)s）")
    add(train, "warmup_ratio", 0.1, **typed(float), help="预热占总步数的比例，[0, 1)（缺省 %(default)s）")
    add(train, "seed", 1234, **typed(int), help="随机种子（缺省 %(default)s）")
    add(train, "precision", "auto", choices=PRECISIONS, help="计算精度；auto 取设备算得快的（缺省 %(default)s）")
    add(train, "ds_file", "ds_zero2_no_offload.json", help="DeepSpeed 配置（缺省 %(default)s）")
    add(
        train,
        "gradient_checkpointing",
        "none",
        nargs="?",
        const="all",
        type=checkpointing_choice,
        metavar="none|all|attention|N",
        help="反向时重算激活以省显存：all 每一层（只写参数名即 all），N 每 N 层一层，attention 只重算注意力"
        "（缺省 %(default)s）",
    )
    add(
        train,
        "cache_frozen",
        "none",
        choices=["none", "memory", "disk"],
        help="freeze：把冻结底层的输出存在内存（/dev/shm）或磁盘（output_dir），从第二轮起不再算底层"
        "（缺省 %(default)s；需要 全部 token 数 × 隐藏宽度 × 2 字节）",
    )
    add(train, "show_loss_step", 10, **typed(int), help="每隔多少步显示并记录一次（缺省 %(default)s）")
    add(
        train, "save_model_step", 0, **typed(int), help="每隔多少步存一次检查点，0 为只在每轮结束时（缺省 %(default)s）"
    )
    add(
        train,
        "loss_spike_factor",
        "0",
        help="一步的损失超过近来平均的多少倍时警告，如 3；写成 3,stop 则在更新之前停下；0 为不看（缺省 %(default)s）",
    )
    add(
        train,
        "resume",
        "no",
        help="no 从头训练；auto 接着 output_dir 里最新的完整检查点；或给出检查点目录（缺省 %(default)s）",
    )
    add(
        train,
        "save_trainer_state",
        True,
        action=BoolFlag,
        help="检查点里存续训所需的优化器状态（每个可训练参数 12 字节）；--no-save_trainer_state 只存模型（缺省存）",
    )
    add_evaluation_flags(add, parser.add_argument_group("评估、遗忘与重放"))
    add(train, "logging_dir", help="TensorBoard 的目录（缺省 output_dir/runs）")
    add(
        train,
        "dry_run",
        False,
        action=BoolFlag,
        help="只推算 token、步数、显存、主机内存与时间，不读权重也不训练；退出码 0 放得下，1 放不下",
    )
    add(train, "local_rank", -1, **typed(int), help="由 deepspeed 启动器传入，不必自己写")
    return parser


def parse_args(argv: list[str] | None = None) -> Namespace:
    """解析命令行；args.given 是命令行明确写出的参数名。"""
    args = build_parser().parse_args(argv)
    args.given = sorted(vars(build_parser(only_given=True).parse_args(argv)))
    args.train_type = TRAIN_TYPE_ALIASES.get(args.train_type, args.train_type)
    if args.learning_rate is None:
        args.learning_rate = TRAIN_METHODS[args.train_type].learning_rate
    if args.ptuning_version == 1 and args.train_type == "ptuning" and "packing" not in args.given:
        args.packing = False
    if len(args.train_path) == 1:
        [args.train_path] = args.train_path
    return args


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
    if args.prompt_format.endswith(".json"):
        read(read_template, args.prompt_format)
    expect(
        args.val_ratio is None or args.eval_path is None,
        "--val_ratio 与 --eval_path 只能有一个：前者从训练数据里留出评估集，请去掉一个",
    )
    expect(args.val_ratio is None or 0 < args.val_ratio < 1, f"--val_ratio({args.val_ratio}) 必须在 (0, 1) 内")
    sources = read(parse_sources, args.train_path) or []
    for path in (*(source.path for source in sources), args.eval_path):
        if path is not None:
            read(check_first_rows, path, row_options(vars(args)))
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
