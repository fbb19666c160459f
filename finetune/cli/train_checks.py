"""train.py 的参数互相之间的检查：在读任何权重之前，一次列出全部问题；不必载入 torch 的先看（first_look）。

一个参数自己的检查写在它的字段上，一种方法自己的在 methods/ 里；这里是几组之间的。
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.checkpoint.config_check import check_config_file
from finetune.checkpoint.options import quantization_problems, read_words, skip_bitsandbytes
from finetune.checkpoint.output_dir import ADAPTER_CONFIG, CHECKPOINT_NAME, adapter_problem
from finetune.cli.train_flags import TrainOptions, parse_args
from finetune.data.mixture import parse_sources
from finetune.data.plain_text import read_texts
from finetune.data.prompting import read_template
from finetune.data.samples import check_first_rows, row_options
from finetune.methods.registry import TRAIN_METHODS
from finetune.metrics.registry import METRICS
from finetune.options import flags_of, problems_of
from finetune.process.launching import leave_quietly_on_interrupt
from finetune.process.libraries import quiet_libraries
from finetune.process.threads import keep_few_kernels, stop_spinning
from finetune.tasks.preference import PreferenceOptions
from finetune.tasks.registry import TASKS
from finetune.training.options import spike_choice
from utils import log_rank_0, read_json

if TYPE_CHECKING:
    from baichuan import BaichuanConfig

NEEDS_EVAL_PATH = ("eval_step", "eval_metric", "eval_max_new_tokens", "eval_batch_size", "max_eval_samples")
NEEDS_EVAL_PATH += ("early_stopping_patience",)


def settle_fixed_numbers(args: TrainOptions, ds_config: dict) -> list[str]:
    """DeepSpeed 配置写了具体的数、命令行没写时，以配置为准并说一声；两处都写而不同是错误，返回全部。"""
    from finetune.training.ds_config_check import fixed_numbers

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
            args.given = (*args.given, name)  # 配置里另一处再写一个不同的数也是错误
    return problems


def first_look(argv: list[str] | None = None) -> None:
    """命令行有错时立即列出并以退出码 2 结束：只看不必载入 torch 就能看的，其余留给 validate_args。"""
    leave_quietly_on_interrupt()
    args = parse_args(argv)
    problems = early_problems(args)
    try:
        read_json(args.ds_file)  # 里面写得对不对要问 DeepSpeed，留给 validate_args
    except ValueError as error:
        problems.insert(0, str(error))
    if problems:
        log_rank_0("错误：\n" + "\n".join(problems))
        raise SystemExit(2)
    skip_bitsandbytes(args)
    stop_spinning()
    keep_few_kernels()
    quiet_libraries(args.log_level)
    log_rank_0("载入 torch、transformers 与 deepspeed ……")


def validate_args(args: TrainOptions) -> tuple[dict, "BaichuanConfig"]:
    """检查全部参数，在读任何权重之前；返回 (DeepSpeed 配置, 模型配置)。

    Raises:
        ValueError: 列出全部问题。
    """
    from finetune.checkpoint.base_model import load_config
    from finetune.process.accelerator import has_accelerator
    from finetune.training.ds_config import optimizer_flag_problems, read_ds_config

    problems = []

    def read(function, *values):
        try:
            return function(*values)
        except ValueError as error:
            problems.append(str(error))

    ds_config = read(read_ds_config, args.ds_file)
    if ds_config is not None:
        problems += [*settle_fixed_numbers(args, ds_config), *optimizer_flag_problems(ds_config, args)]
    problems += [*early_problems(args), *quantization_problems(args, ds_config)]
    if args.use_dora and ((ds_config or {}).get("zero_optimization") or {}).get("stage") == 3:
        problems.append("--use_dora 要读基座的权重，不能与 ZeRO-3 同用，请改用 ds_zero2_no_offload.json")
    if args.precision == "fp16" and not has_accelerator():
        problems.append("--precision fp16 需要 GPU，CPU 上请用 bf16 或 fp32（缺省的 auto 会选对）")
    config = read(load_config, args.model_name_or_path)
    if config is not None and not TRAIN_METHODS[args.train_type].problems(args) and not args.dry_run:
        read(check_model, args, config)  # 推算时权重可以还没有下载
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    if args.max_len > config.trained_length:
        log_rank_0(
            f"警告：--max_len {args.max_len} 超过了模型训练时的长度 {config.trained_length}（config.json），"
            "更长的位置它没有见过，请调小，除非有意延长"
        )
    return ds_config, config


def early_problems(args: TrainOptions) -> list[str]:
    """不必载入 torch 就能发现的全部问题：各参数自己的、互相之间的、各文件的。"""
    problems = [
        *problems_of(args),
        *method_problems(args),
        *task_problems(args),
        *file_problems(args),
        *evaluation_problems(args),
        *precision_problems(args),
    ]
    if args.max_src_len >= args.max_len:
        length, remedy = f"{args.max_src_len}", "请调小前者"
        if "max_src_len" not in args.given:
            length, remedy = f"缺省 {length}", f"请写上小些的，如 --max_src_len {max(1, args.max_len * 3 // 4)}"
        problems.append(f"--max_src_len({length}) 必须小于 --max_len({args.max_len})，{remedy}")
    first_path = args.train_path if isinstance(args.train_path, str) else args.train_path[0]
    if Path(args.model_name_or_path).is_file() and Path(first_path).is_dir():
        swapped = f"--train_path {first_path} 是目录，--model_name_or_path {args.model_name_or_path} 是文件"
        return [*problems, f"{swapped}：两个写反了"]

    def read(function, *values):
        try:
            return function(*values)
        except ValueError as error:
            problems.append(str(error))

    if args.prompt_format.endswith(".json"):
        read(read_template, args.prompt_format)
    for path in (*(source.path for source in read(parse_sources, args.train_path) or ()), args.eval_path):
        if path is not None:
            read(check_first_rows, path, row_options(vars(args)))
    for path in (args.general_path, args.replay_path):
        if path is not None:
            read(read_texts, path)
    read(read_words, args.add_tokens)
    read(spike_choice, args.loss_spike_factor)
    read(check_config_file, Path(args.model_name_or_path))
    return problems


def method_problems(args: TrainOptions) -> list[str]:
    """别的方法的参数不起作用；这种方法自己的问题。"""
    problems = []
    for name, method in TRAIN_METHODS.items():
        foreign = [f"--{field.name}" for field in flags_of(method.options) if field.name in args.given]
        if foreign and name != args.train_type:
            problems.append(f"{'、'.join(foreign)} 属于 --train_type {name}，对 {args.train_type} 不起作用，请去掉")
    method = TRAIN_METHODS[args.train_type]
    problems += method.problems(args)
    if args.adapter_path is not None and not method.saves_adapter:
        problems.append(f"--adapter_path 只用于 lora 与 ptuning，--train_type {method.name} 没有适配器，请去掉")
    if args.add_tokens is not None and args.train_type == "ptuning":
        problems.append("--add_tokens 不能与 --train_type ptuning 同用，请换 lora、freeze 或 full")
    if args.cache_frozen != "none" and not args.packing:
        problems.append(f"--cache_frozen {args.cache_frozen} 要开着 --packing，请去掉或改过来")
    return problems


def task_problems(args: TrainOptions) -> list[str]:
    """对这个阶段不起作用的参数。"""
    task, problems = TASKS[args.task], []
    foreign = [field.name for field in flags_of(PreferenceOptions) if field.name not in task.flags]
    foreign = [f"--{name}" for name in foreign if name in args.given]
    if foreign:
        problems.append(f"{'、'.join(foreign)} 对 --task {task.name} 不起作用，请去掉")
    if args.cache_frozen != "none" and task.name != "sft":
        problems.append(f"--cache_frozen {args.cache_frozen} 只用于 --task sft，请去掉")
    if args.document_overlap >= max(1, args.max_len):
        problems.append(f"--document_overlap({args.document_overlap}) 必须小于 --max_len({args.max_len})，请调小前者")
    allowed = {"sft": tuple(METRICS), "pretrain": ("nll",)}.get(task.name, ("loss", "nll"))
    if args.eval_metric not in allowed:
        problems.append(f"--eval_metric {args.eval_metric} 不能用于 --task {task.name}，可用 {'、'.join(allowed)}")
    names = ("loss_turns", "train_on_prompt", "text_unit", "document_overlap", "document_bos")
    useless = [f"--{name}" for name in names if task.is_preference and name in args.given]
    if useless:
        problems.append(f"{'、'.join(useless)} 对 --task {task.name} 不起作用（它只比较最后一个回答），请去掉")
    if task.is_preference and args.replay_path is not None:
        problems.append(f"--replay_path 不能用于 --task {task.name}：它学的是偏好，请去掉")
    return problems


def precision_problems(args: TrainOptions) -> list[str]:
    """与 --precision 不合的参数。"""
    problems = []
    for name, value in (("optimizer", "adamw_bf16"), ("grad_accum_dtype", "bf16")):
        if getattr(args, name) == value and args.precision in ("fp16", "fp32"):
            problems.append(f"--{name} {value} 要 --precision bf16，得到 {args.precision}，请改一个")
    return problems


def file_problems(args: TrainOptions) -> list[str]:
    """目录给错了。"""
    problems = []
    if args.adapter_path is not None:
        problem = adapter_problem("--adapter_path", Path(args.adapter_path), "--model_name_or_path")
        problems += [problem] if problem else []
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        problems.append(f"--output_dir {output_dir} 是一个文件，请给出目录")
    elif not os.access(next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists()), os.W_OK):
        problems.append(f"--output_dir {output_dir} 不能写，请换一个目录，或检查权限与磁盘")
    resume = Path(args.resume)
    if args.resume not in ("no", "auto") and not (CHECKPOINT_NAME.match(resume.name) and resume.is_dir()):
        problems.append(f"--resume {resume} 不是检查点目录（epoch-E-step-S）；要接着最新的，写 --resume auto")
    return problems


def evaluation_problems(args: TrainOptions) -> list[str]:
    """评估、遗忘与重放的参数里不起作用的、缺了一半的。"""
    problems = []
    has_data = args.eval_path is not None or args.val_ratio is not None
    useless = [f"--{name}" for name in NEEDS_EVAL_PATH if name in args.given and not has_data]
    if useless:
        problems.append(f"{'、'.join(useless)} 只在评估时起作用，请加上 --eval_path 或 --val_ratio，或去掉")
    if args.eval_path is not None and args.val_ratio is not None:
        problems.append("--val_ratio 与 --eval_path 只能有一个：前者从训练数据里留出评估集，请去掉一个")
    if "eval_max_new_tokens" in args.given and args.eval_metric == "nll":
        problems.append("--eval_max_new_tokens 在 --eval_metric nll 时不起作用，请去掉，或换一个生成的指标")
    if args.forgetting_threshold is not None and args.general_path is None:
        problems.append("--forgetting_threshold 需要 --general_path，请加上或去掉")
    if (args.replay_path is None) != (args.replay_ratio is None):
        problems.append("--replay_path 与 --replay_ratio 要一起给出（如 --replay_ratio 0.1），请补上或都去掉")
    if args.replay_path is None and "replay_by" in args.given:
        problems.append("--replay_by 只在重放时起作用，请加上 --replay_path 与 --replay_ratio 或去掉")
    if args.replay_by == "tokens" and (args.replay_ratio or 0) >= 1:
        problems.append(
            f"--replay_ratio({args.replay_ratio}) 是目标 token 的份额，必须小于 1；条数之比请加上 --replay_by rows"
        )
    paths = [Path(path).resolve() for path in (args.general_path, args.replay_path) if path]
    if len(paths) == 2 and paths[0] == paths[1]:
        problems.append(f"--general_path 与 --replay_path 是同一个文件 {paths[0]}：训练过的文字不能衡量遗忘，请分开")
    return problems


def check_model(args: TrainOptions, config: "BaichuanConfig"):
    """在动任何东西之前核对：权重文件完整，方法的模块名都能匹配，--adapter_path 接得上；模型在 meta 设备上，不占内存。

    Raises:
        ValueError: 见 checked_skeleton、各方法的 apply 与 check_second_stage。
    """
    from finetune.checkpoint.adapter import check_second_stage
    from finetune.checkpoint.base_model import checked_skeleton

    model = TRAIN_METHODS[args.train_type].apply(checked_skeleton(args.model_name_or_path, config), args)
    has_adapter = args.adapter_path is not None and (Path(args.adapter_path) / ADAPTER_CONFIG).is_file()
    if has_adapter and TRAIN_METHODS[args.train_type].saves_adapter:
        check_second_stage(Path(args.adapter_path), model, list(read_words(args.add_tokens)))
