"""train.py 的命令行参数：定义与缺省值。"""

import argparse
from argparse import SUPPRESS, Namespace
from collections.abc import Callable

from finetune.cli.parser import BoolFlag, Parser, checkpointing_choice
from finetune.data.prompting import PROMPT_FORMATS
from finetune.methods.registry import TRAIN_METHODS
from finetune.metrics.registry import METRICS
from finetune.process.precision import PRECISIONS

# 两族是同样的三个类，结构由检查点的 config.json 决定；参数留着，命令里写了它
MODEL_FAMILIES = ("baichuan", "baichuan2")
TRAIN_TYPE_ALIASES = {"all": "full"}


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
    add(base, "train_path", required=True, help="训练数据，JSON Lines 或 JSON 数组（必填），格式见 data/README.md")
    add(base, "eval_path", help="评估数据，格式同训练数据；每轮结束时评估（缺省不评估）")
    add(
        base,
        "prompt_format",
        "auto",
        choices=["auto", *PROMPT_FORMATS],
        help="提示格式：plain 为基座模型，chat 为对话模型的角色标记，auto 由检查点决定（缺省 %(default)s）",
    )
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
    add(train, "logging_dir", help="TensorBoard 的目录，SwanLab 的在它下面的 swanlab/（缺省 output_dir/runs）")
    add(
        train,
        "report_to",
        "tensorboard",
        help="曲线写成哪几种，逗号分隔：tensorboard、swanlab（离线，以后可用 swanlab sync 上传；要另装 swanlab）；"
        "train_log.jsonl 总是写（缺省 %(default)s）",
    )
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
    return args


def add_evaluation_flags(add: Callable, group):
    """给一组加上参数；add 是 arguments.build_parser 里的同名函数。"""
    number = {"type": int}
    add(group, "eval_step", 0, **number, help="每隔多少步也评估一次，0 为只在每轮结束时（缺省 %(default)s）")
    add(
        group,
        "eval_metric",
        "nll",
        choices=sorted(METRICS),
        help="按什么定最好的检查点：nll 为目标 token 的平均损失，其余为生成回答之后的指标（缺省 %(default)s）",
    )
    add(group, "eval_max_new_tokens", 128, **number, help="生成的指标：最多生成的 token 数（缺省 %(default)s）")
    add(
        group,
        "early_stopping_patience",
        0,
        **number,
        help="连续多少次评估没有更好就停，0 为不停（缺省 %(default)s）",
    )
    add(
        group,
        "save_total_limit",
        0,
        **number,
        help="最多留多少个检查点，0 为不限；最好的与最新的总是留下（缺省 %(default)s）",
    )
    add(
        group,
        "general_path",
        help="通用文字，UTF-8 纯文本，一行一段：训练前后各算一次 NLL 与离基座的 KL 散度，写进 forgetting.json"
        "（缺省不算；主机内存要 词表 × 8 KiB）",
    )
    add(
        group,
        "forgetting_threshold",
        type=float,
        help="通用文字的 NLL 上升超过多少 nat/token 算遗忘（缺省不判断）",
    )
    add(group, "replay_path", help="重放：训练时混入的通用文字，格式同 --general_path，每个 token 都是目标（缺省不混）")
    add(group, "replay_ratio", type=float, help="重放的条数与训练样本数之比，如 0.1；一条至多 max_len 个 token")
