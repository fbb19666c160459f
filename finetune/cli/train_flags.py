"""train.py 的全部参数：各间屋子的参数合成一份。"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.checkpoint.options import ModelOptions, SaveOptions
from finetune.checkpoint.output_dir import RUN_CONFIG, iter_checkpoints
from finetune.cli.other_names import TRAIN_NAMES
from finetune.cli.parser import Parser
from finetune.data.options import DataOptions
from finetune.methods.registry import TRAIN_METHODS, TRAIN_TYPE_ALIASES, MethodChoice
from finetune.options import at_least, flag, flags_of
from finetune.tasks.preference import PreferenceOptions
from finetune.tasks.registry import TASKS, TaskChoice
from finetune.training.options import EvaluationOptions, ForgettingOptions, LogOptions, StepOptions
from utils import read_json


@dataclass
class RunOptions:
    """怎样运行。"""

    config: str | None = flag(
        None,
        "参数写在这个文件里：YAML、JSON，或一次训练留下的 run_config.json（照样再来一次）；命令行胜过它（缺省没有）",
        changes_training=False,
    )
    dry_run: bool = flag(
        False,
        "只推算 token、步数、显存、主机内存与时间，不读权重也不训练；退出码 0 放得下，1 放不下（缺省训练）",
        changes_training=False,
    )
    num_threads: int | None = flag(
        None,
        "每个进程的 CPU 线程数；没有加速卡时它决定末位，续训时同检查点（缺省先看 OMP_NUM_THREADS，再由空着的核决定）",
        kind=int,
        check=at_least(1),
        changes_training=False,
    )
    local_rank: int = flag(-1, "由 deepspeed 启动器传入，不必自己写（缺省 -1）", changes_training=False)


# 帮助里的标题 → 其下的各组
GROUPS = {
    "模型与数据": (ModelOptions, DataOptions),
    "训练的阶段": (TaskChoice, PreferenceOptions),
    "训练方法": (MethodChoice, *(method.options for method in TRAIN_METHODS.values())),
    "训练过程": (StepOptions, SaveOptions, LogOptions, RunOptions),
    "评估、遗忘与重放": (EvaluationOptions, ForgettingOptions),
}


@dataclass
class TrainOptions(*reversed([options for group in GROUPS.values() for options in group])):
    """train.py 的全部参数，次序同帮助（dataclass 从末尾的基类数起）；要其中一组的函数可以直接拿它。"""

    given: tuple[str, ...] = ()  # 命令行明确写出的参数名


def build_parser() -> Parser:
    """train.py 的解析器；结果里只有命令行写出的参数。"""
    description = "用 DeepSpeed 微调 Baichuan 与 Baichuan2（7B、13B）"
    return Parser("train.py", description, GROUPS, TRAIN_NAMES, settled_defaults)


def settled_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """参数 → 随方法与阶段而定的缺省。"""
    train_type = values.get("train_type", TrainOptions.train_type)
    method = TRAIN_METHODS[TRAIN_TYPE_ALIASES.get(train_type, train_type)]
    task = TASKS[values.get("task", TrainOptions.task)]
    return {"learning_rate": method.learning_rate * task.learning_rate_scale, **task.defaults}


def describe_flags(options: TrainOptions) -> str:
    """最后定下的参数，一组一行，写明的前面有 *；别的方法、别的阶段的，没有值的略去。"""
    hidden = {field.name for field in flags_of(PreferenceOptions)} - set(TASKS[options.task].flags)
    hidden |= {"config", "local_rank", *(["replay_by"] if options.replay_path is None else [])}
    others = {method.options for name, method in TRAIN_METHODS.items() if name != options.train_type}
    lines = ["参数（* 是写明的，其余是缺省）："]
    for title, classes in GROUPS.items():
        names = [field.name for group in classes if group not in others for field in flags_of(group)]
        values = {name: getattr(options, name) for name in names if name not in hidden}
        marks = {name: "*" if name in options.given else "" for name in values}
        words = [f"{marks[name]}{name} {value}" for name, value in values.items() if value not in (None, "")]
        lines.append(f"  {title}：{'，'.join(words)}")
    return "\n".join(lines)


def recorded_run(options: SaveOptions) -> dict[str, Any]:
    """--resume 接着的那一次训练的 run_config.json；从头训练、还没有检查点时为空。"""
    if options.resume == "no":
        return {}
    newest = next((path for _, _, path in iter_checkpoints(Path(options.output_dir))), None)
    directory = newest if options.resume == "auto" else Path(options.resume)
    if directory is None or not (directory / RUN_CONFIG).is_file():
        return {}
    return read_json(directory / RUN_CONFIG)


def parse_args(argv: list[str] | None = None) -> TrainOptions:
    """解析命令行，补上随方法而定的缺省。"""
    found, given = build_parser().read(argv)
    options = TrainOptions(**found, given=given)
    if len(options.train_path) == 1:
        [options.train_path] = options.train_path
    options.train_type = TRAIN_TYPE_ALIASES.get(options.train_type, options.train_type)
    for name, value in settled_defaults(found).items():
        if name not in options.given:
            setattr(options, name, value)
    if options.replay_path is not None and "replay_by" not in options.given:
        recorded = recorded_run(options).get("args")
        options.replay_by = "tokens" if recorded is None else recorded.get("replay_by", "rows")
    if options.optimizer == "adamw_bf16" and "precision" not in options.given:
        options.precision = "bf16"
    if options.train_type == "ptuning" and options.ptuning_version == 1 and "packing" not in options.given:
        options.packing = False
    return options
