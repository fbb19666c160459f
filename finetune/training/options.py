"""训练过程、日志、评估、遗忘与重放的参数。"""

import importlib.util
import math
from argparse import ArgumentTypeError
from dataclasses import dataclass

from finetune.metrics.registry import METRICS
from finetune.options import PRECISIONS, above_zero, at_least, flag, plausible_rate, share
from finetune.process.libraries import LOG_LEVEL_HELP, LOG_LEVELS


def checkpointing_choice(value: str) -> str:
    """--gradient_checkpointing 的取值：none、all、attention、正整数；True、False 同 all、none。"""
    value = {"true": "all", "false": "none"}.get(value.lower(), value.lower())
    if value not in ("none", "all", "attention") and not (value.isdecimal() and int(value) > 0):
        raise ArgumentTypeError(f"应为 none、all、attention 或正整数，得到 {value!r}")
    return value


OPTIMIZERS = ("adamw", "adamw_8bit", "adamw_bf16")
REPORTS = ("tensorboard", "swanlab")


def report_requirement(value: str) -> str | None:
    """--report_to 的要求：认识、不重复，要的库装了。"""
    names = value.split(",")
    if not set(names) <= set(REPORTS) or len(set(names)) < len(names):
        return f"必须是 {'、'.join(REPORTS)} 里的几个，逗号分隔，不重复"
    if "swanlab" in names and importlib.util.find_spec("swanlab") is None:
        return "需要 swanlab，请运行 pip install swanlab"
    return None


@dataclass
class StepOptions:
    """一步怎样走、走多少步。"""

    num_train_epochs: int = flag(3, "轮数", check=at_least(1), changes_training=False)
    max_steps: int = flag(
        -1,
        "优化器步数的上限，-1 为不限",
        check=lambda value: None if value == -1 or value >= 1 else "必须为 -1（不限）或至少为 1",
        changes_training=False,
    )
    per_device_train_batch_size: int = flag(4, "每个进程一个 micro batch 的样本数", check=at_least(1))
    gradient_accumulation_steps: int = flag(
        4,
        "梯度累积的次数",
        check=at_least(1),
        changes_training=False,  # 续训比较的是全局 batch
    )
    learning_rate: float = flag(None, "峰值学习率（缺省随方法，见 docs/methods.md）", kind=float, check=plausible_rate)
    weight_decay: float = flag(0.1, "权重衰减，只作用于矩阵，不作用于 RMSNorm", check=at_least(0))
    warmup_ratio: float = flag(0.1, "预热占总步数的比例，[0, 1)", check=share)
    optimizer: str = flag(
        "adamw",
        "优化器：adamw；adamw_8bit 的动量存成 8 位（要 bitsandbytes）；adamw_bf16 的权重、梯度与动量都是 bf16，"
        "权重舍掉的位另存，小的更新不丢（全参数的 7B 推算约 77 GiB）",
        choices=OPTIMIZERS,
    )
    grad_accum_dtype: str = flag(
        "auto",
        "--precision bf16 时几个 micro batch 的梯度按什么相加；auto：fp32 多占的不到推算内存的 5% 就用 fp32",
        choices=("auto", "fp32", "bf16"),
    )
    seed: int = flag(1234, "随机种子", check=lambda value: None if 0 <= value < 2**63 else "必须在 [0, 2^63) 内")
    precision: str = flag(
        "auto",
        "计算精度；auto 取设备算得快的",
        choices=PRECISIONS,
        changes_training=False,  # 续训比较的是结果
    )
    ds_file: str = flag(
        "ds_zero2_no_offload.json",
        "DeepSpeed 配置",
        changes_training=False,  # 续训比较的是内容
    )
    gradient_checkpointing: str = flag(
        "none",
        "反向时重算激活以省显存：all 每一层（只写参数名即 all），N 每 N 层一层，attention 只重算注意力",
        kind=checkpointing_choice,
        changes_training=False,
        nargs="?",
        const="all",
        metavar="none|all|attention|N",
    )


def total_steps(steps_per_epoch: int, options: StepOptions) -> int:
    """一共走几个优化器步。"""
    steps = steps_per_epoch * options.num_train_epochs
    return steps if options.max_steps == -1 else min(steps, options.max_steps)


def spike_choice(value: str) -> tuple[float, bool]:
    """--loss_spike_factor 的取值「3」或「3,stop」→ (倍数, 是否停下)。

    Raises:
        ValueError: 倍数不是 0 或大于 1 的有限数，或逗号之后不是 stop。
    """
    number, comma, action = value.partition(",")
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not (factor == 0 or 1 < factor < math.inf) or (comma and (action != "stop" or factor == 0)):
        raise ValueError(
            f"--loss_spike_factor {value!r} 应为 0（不看）、大于 1 的数（如 3），或后面加上 ,stop（如 3,stop）"
        )
    return factor, bool(comma)


@dataclass
class LogOptions:
    """显示与记录。"""

    show_loss_step: int = flag(10, "每隔多少步显示并记录一次", check=at_least(1), changes_training=False)
    loss_spike_factor: str = flag(
        "0",
        "一步的损失超过近来平均的多少倍时警告，如 3；写成 3,stop 则在更新之前停下；0 为不看",
        changes_training=False,
    )
    log_level: str = flag("info", LOG_LEVEL_HELP, choices=LOG_LEVELS, changes_training=False)
    logging_dir: str | None = flag(
        None, "TensorBoard 的目录，SwanLab 的在它下面的 swanlab/（缺省 output_dir/runs）", changes_training=False
    )
    report_to: str = flag(
        "tensorboard",
        "曲线写成哪几种，逗号分隔：tensorboard、swanlab（离线，以后可用 swanlab sync 上传；要另装 swanlab）；"
        "train_log.jsonl 总是写",
        check=report_requirement,
        changes_training=False,
    )


@dataclass
class EvaluationOptions:
    """训练中的评估；--eval_path 在 DataOptions。"""

    eval_step: int = flag(
        0, "每隔多少步也评估一次，0 为只在每轮结束时", check=at_least(0, "（0 为不用）"), changes_training=False
    )
    eval_metric: str = flag(
        "nll",
        "按什么定最好的检查点：nll 为目标 token 的平均损失，loss 为偏好各阶段自己的损失（它们的缺省），"
        "其余为生成回答之后的指标（缺省 nll）",
        choices=("loss", *sorted(METRICS)),
        changes_training=False,
    )
    eval_max_new_tokens: int = flag(128, "生成的指标：最多生成的 token 数", check=at_least(1), changes_training=False)
    eval_batch_size: int = flag(
        16, "评估时每个进程一批的行数，各批按长度排好；显存不够时调小", check=at_least(1), changes_training=False
    )
    max_eval_samples: int | None = flag(
        None, "只用评估数据里均匀隔开的这么多行（缺省全用）", kind=int, check=at_least(1), changes_training=False
    )
    early_stopping_patience: int = flag(
        0, "连续多少次评估没有更好就停，0 为不停", check=at_least(0, "（0 为不用）"), changes_training=False
    )


@dataclass
class ForgettingOptions:
    """遗忘的度量与重放。"""

    general_path: str | None = flag(
        None,
        "通用文字，UTF-8 纯文本，一行一段：训练前后各算一次 NLL 与离基座的 KL 散度，写进 forgetting.json"
        "（缺省不算；主机内存要 词表 × 8 KiB）",
        changes_training=False,
    )
    forgetting_threshold: float | None = flag(
        None,
        "通用文字的 NLL 上升超过多少 nat/token 算遗忘（缺省不判断）",
        kind=float,
        check=at_least(0),
        changes_training=False,
    )
    replay_path: str | None = flag(
        None,
        "重放：训练时混入的通用文字，格式同 --general_path，每个 token 都是目标（缺省不混）",
        changes_training=False,  # 续训比较的是内容的哈希
    )
    replay_ratio: float | None = flag(
        None,
        "重放占全部目标 token 的份额，(0, 1)，如 0.1；写了 --replay_by rows 时是条数与训练样本数之比。"
        "一条至多 max_len 个 token（缺省不混）",
        kind=float,
        check=above_zero,
    )
    replay_by: str = flag(
        "rows",  # 没有记下它的检查点是按条数的；命令行不写时由 parse_args 定
        "--replay_ratio 按什么算：tokens 为目标 token 的份额，rows 为条数之比"
        "（写了 --replay_path 时缺省 tokens，续训时同检查点）",
        choices=("tokens", "rows"),
    )
