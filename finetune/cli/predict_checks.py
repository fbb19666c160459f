"""predict.py 的参数互相之间的检查，以及载入任何权重之前能做的全部准备。"""

import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from finetune.checkpoint.options import quantization_problems, skip_bitsandbytes
from finetune.checkpoint.output_dir import ADAPTER_CONFIG, RUN_CONFIG, adapter_problem, choose_checkpoint
from finetune.cli.predict_flags import CheckpointOptions, PredictOptions, parse_args
from finetune.data.prompting import max_prompt_tokens
from finetune.data.rows import check_file
from finetune.data.samples import RowOptions, Sample, read_samples, row_options
from finetune.inference.options import SAMPLING_DEFAULTS, ServeOptions, check_installed
from finetune.options import flags_of, problems_of
from finetune.process.libraries import quiet_libraries
from finetune.process.threads import begin_loading
from finetune.terminal import note
from utils import read_json

if TYPE_CHECKING:
    import torch

    from finetune.checkpoint.inspection import Checkpoint


# 只影响生成的参数
ONLY_GENERATING = ("max_new_tokens", "stop", "do_sample", "repetition_penalty")


class Plan(NamedTuple):
    """载入权重之前已经核对过的一切。"""

    checkpoints: "list[Checkpoint]"  # 一个；--compare 时有几个
    adapters: "dict[str, Checkpoint]"  # --adapter：名字 → 检查点
    device: "torch.device"
    rows: list[Sample]  # 要预测的行；空的是对话或服务
    listener: socket.socket | None = None  # --serve 占住的地址


def option_problems(args: PredictOptions) -> list[str]:
    """只看命令行就能发现的全部问题。"""
    problems = []
    single = args.instruction is not None or args.input is not None
    if single and args.test_path is not None:
        problems.append("--instruction/--input 与 --test_path 不能同时给，请只留一种输入")
    if single and not f"{args.instruction or ''}{args.input or ''}".strip():
        problems.append("--instruction 与 --input 都是空的，请至少填写一个")
    if (args.model_path is None) == (args.compare is None):
        problems.append("请给出 --model_path（一个检查点）或 --compare（两个以上），不能都不给，也不能同时给")
    for name in ("output_path", "metric", "batch_size"):
        is_html = name == "output_path" and args.compare
        is_served = name == "batch_size" and args.serve is not None
        if getattr(args, name) is not None and args.test_path is None and not is_html and not is_served:
            problems.append(f"--{name} 只用于文件预测，请同时给出 --test_path")
    if args.num_gpus < 1 or (args.num_gpus > 1 and (args.test_path is None or args.compare)):
        problems.append(f"--num_gpus({args.num_gpus}) 必须是正整数，大于 1 时只用于 --test_path 的文件预测")
    if args.adapter and len(args.adapter) > 1 and (single or args.test_path is not None):
        problems.append("几个 --adapter 只用于对话（/adapter 切换），预测请只给一个，对照请用 --compare")
    problems += quantization_problems(args)
    problems += compare_problems(args, single) if args.compare else []
    problems += serve_problems(args)
    if any(not text for text in args.stop or ()):
        problems.append("--stop 里有空的文字，请去掉")
    labels = args.label_scores
    if labels is not None and not (single or args.test_path is not None):
        problems.append("--label_scores 不用于对话，请同时给出 --test_path 或 --instruction/--input")
    if labels and (len(set(labels)) < max(2, len(labels))):
        problems.append(f"--label_scores 要两个以上不同的标签，现在是 {labels}")
    useless = [f"--{name}" for name in ONLY_GENERATING if name in args.given]
    if labels is not None and useless:
        problems.append(f"{'、'.join(useless)} 在 --label_scores 时不起作用（不生成，取得分最高的标签），请去掉")
    if args.max_src_len is not None and not single and args.test_path is None:
        problems.append("--max_src_len 在对话中不起作用（对话按上下文长度整轮截断），请去掉它")
    for name in SAMPLING_DEFAULTS:
        if getattr(args, name) is not None and not args.do_sample:
            problems.append(f"--{name} 在贪心生成时不起作用，请加上 --do_sample 或去掉它")
    limits = {
        "batch_size": (lambda value: value >= 1, "必须是正整数"),
        "max_new_tokens": (lambda value: value >= 1, "必须是正整数"),
        "num_threads": (lambda value: value >= 1, "必须是正整数"),
        "max_src_len": (lambda value: value >= 1, "必须是正整数"),
        "temperature": (lambda value: value > 0, "必须大于 0；想要确定的结果请去掉 --do_sample"),
        "top_p": (lambda value: 0 < value <= 1, "必须在 (0, 1] 之内"),
        "top_k": (lambda value: value >= 0, "不能是负数；0 为不限"),
        "repetition_penalty": (lambda value: value > 0, "必须大于 0；1.0 为没有惩罚"),
    }
    for name, (is_valid, requirement) in limits.items():
        value = getattr(args, name)
        if value is not None and not is_valid(value):
            problems.append(f"--{name}({value}) {requirement}")
    return problems


def compare_problems(args: PredictOptions, single: bool) -> list[str]:
    """--compare 特有的问题。"""
    problems = []
    if len(args.compare) < 2:
        problems.append(f"--compare 要两个以上的检查点目录，现在只有 {args.compare[0]}，请再给一个")
    if not single and args.test_path is None:
        problems.append("--compare 需要提示词，请同时给出 --test_path 或 --instruction/--input")
    unused = [name for name in ("adapter", "label_scores") if getattr(args, name) is not None]
    problems += [f"--{name} 不能与 --compare 同用，请去掉它" for name in unused]
    return problems


def serve_problems(args: PredictOptions) -> list[str]:
    """--serve 特有的问题：输入、输出与采样的设置对服务不起作用。"""
    if args.serve is None:
        return ["--api_key 只用于 --serve，请去掉它"] if args.api_key is not None else []
    used = {field.name for field in (*flags_of(CheckpointOptions), *flags_of(ServeOptions))} - {"compare", "num_gpus"}
    used |= {"precision", "batch_size", "max_new_tokens", "log_level"}
    problems = [f"--{name} 对 --serve 不起作用，请去掉它，或写在请求里" for name in args.given if name not in used]
    try:
        check_installed()
    except ValueError as error:
        problems.append(str(error))
    return [*problems, *problems_of(args)]


def first_look(argv: list[str] | None = None) -> None:
    """命令行有错时立即列出并以退出码 2 结束：只看不必载入 torch 就能看的，其余留给 prepare。"""
    args = parse_args(argv)
    problems = option_problems(args)
    if not re.fullmatch(r"auto|cpu|(cuda|npu|xpu|mps|hpu|mlu|sdaa)(:\d+)?", args.device):
        problems.append(f"--device({args.device}) 写法不对，可用 auto、cpu、cuda、cuda:0 等")
    paths = [*(args.compare or ()), *([args.model_path] if args.model_path else ())]
    checks = [(lambda path: choose_checkpoint(path, is_told=False), path) for path in paths]
    if args.test_path is not None:
        checks.append((check_file, args.test_path))
    if args.model_path and args.test_path and Path(args.model_path).is_file() and Path(args.test_path).is_dir():
        problems.append(f"--model_path {args.model_path} 是文件，--test_path {args.test_path} 是目录：两个写反了")
        checks = []
    for check, value in checks:
        try:
            check(value)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        note("错误：\n" + "\n".join(problems))
        raise SystemExit(2)
    skip_bitsandbytes(args)
    begin_loading()
    quiet_libraries(args.log_level)


def choose_device(requested: str, num_gpus: int) -> "torch.device":
    """--device 的设备；写法不对、没有这块卡或卡不够 num_gpus 块时抛 ValueError。"""
    import torch

    from finetune.process.accelerator import accelerator_name, default_device, device_count

    if requested == "cpu":
        return torch.device("cpu")
    name, count = accelerator_name(), device_count()
    kind, _, index = requested.partition(":")
    if kind not in ("auto", name) or (index and not index.isdecimal()) or requested.startswith("auto:"):
        known = "auto、cpu" + (f"、{name}、{name}:0 等" if count else "（本机没有加速卡）")
        raise ValueError(f"--device({requested}) 不可用，可用 {known}")
    if int(index or 0) >= count > 0:
        raise ValueError(f"--device({requested}) 不可用：本机有 {count} 块卡，请改用 auto 或 cpu")
    if num_gpus > 1 and count and (index or num_gpus > count):
        raise ValueError(f"--num_gpus({num_gpus}) 超过了本机的 {count} 块卡，或 --device({requested}) 只指定了一块")
    return default_device(int(index) if index else None)


def reading_options(args: PredictOptions, checkpoints: "list[Checkpoint]") -> RowOptions:
    """怎样读输入：同训练时的，命令行写明的优先。几个检查点训练时不同而命令行没有写明时抛 ValueError。"""
    recorded = {row_options(checkpoint.run_config.get("args", {})) for checkpoint in checkpoints}
    names = ("input_separator", "ignore_fields")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in names:
        values = sorted({getattr(options, name) for options in recorded})
        if name not in given and len(values) > 1:
            raise ValueError(f"各检查点训练时的 --{name} 不同（{values}），请用 --{name} 写明用哪个")
    first = next(iter(recorded), RowOptions())
    trained = {"input_separator": first.input_separator, "ignore_fields": ",".join(first.ignore_fields)}
    return row_options({**trained, **given})


def read_test_rows(args: PredictOptions, options: RowOptions) -> list[Sample]:
    """读测试文件并检查输出路径与参考答案；不合要求时抛 ValueError。"""
    rows = read_samples(args.test_path, "predict", options=options)
    output_path = Path(args.output_path)
    if output_path.is_dir():
        raise ValueError(f"--output_path({output_path}) 是一个目录，请给出文件名，例如 {output_path / 'out.jsonl'}")
    if output_path.resolve() == Path(args.test_path).resolve():
        raise ValueError(f"--output_path 与 --test_path 是同一个文件 {output_path}，请换一个输出文件")
    try:
        output_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_path 的目录 {output_path.parent} 建不了：{error.strerror}，请换一个位置") from error
    if not os.access(output_path.parent, os.W_OK):
        raise ValueError(f"--output_path 的目录 {output_path.parent} 没有写权限，请换一个位置")
    missing = [row.line for row in rows if not row.references] if args.metric else []
    if missing:
        raise ValueError(
            f"--metric {args.metric} 要求每行都有 output，{args.test_path} 有 {len(missing)} 行没有（第 "
            f"{'、'.join(map(str, missing[:10]))} 行），请补上或去掉 --metric"
        )
    return rows


def inspect_adapters(args: PredictOptions) -> "dict[str, Checkpoint]":
    """--adapter 的各检查点：名字 → 检查点；基座与训练时不同的只提醒。不是适配器、种类不同时抛 ValueError。"""
    from finetune.checkpoint.inspection import base_differences, inspect_checkpoint
    from finetune.inference.predictor import short_names

    adapters = {}
    for name, path in zip(short_names(map(Path, args.adapter)), args.adapter, strict=True):
        if problem := adapter_problem("--adapter", Path(path), "--model_path"):
            raise ValueError(problem)
        checkpoint = inspect_checkpoint(path, args.model_path, args.prompt_format, any_base=True)
        if checkpoint.added is not None:
            raise ValueError(
                f"--adapter {path} 训练过新词（--add_tokens），词表与基座不同：请单独用它，"
                f"--model_path {path} --base_model_path {args.model_path}"
            )
        differing = base_differences(checkpoint.base_path, checkpoint.run_config)
        if differing:
            note(f"注意：适配器 {path} 是在别的基座上训练的（{'、'.join(differing[:3])}），结果可能变差")
        adapters[name] = checkpoint
    if len(adapters) < len(args.adapter):
        raise ValueError("--adapter 里有重复的目录，请去掉")
    kinds = {name: read_json(adapter.path / ADAPTER_CONFIG).get("peft_type") for name, adapter in adapters.items()}
    if len({*kinds.values()}) > 1:
        raise ValueError(f"--adapter 的几个适配器必须是同一种，现在是 {kinds}，请分开使用")
    return adapters


def label_set(args: PredictOptions, rows: list[Sample]) -> list[str]:
    """没有写明标签的 --label_scores：文件里 output 出现过的全部；没有文件，或不足两个时抛 ValueError。"""
    if args.test_path is None:
        raise ValueError("--label_scores 没有写标签，也没有 --test_path 可以从中取，请在它后面写明两个以上的标签")
    labels = sorted({text for row in rows for text in row.references or ()})
    if len(labels) < 2:
        raise ValueError(f"--label_scores 要两个以上的标签，{args.test_path} 的 output 里只有 {labels}，请在它后面写明")
    return labels


def recorded_in(adapter: "Checkpoint") -> str:
    """适配器的基座记在它的哪个文件里，括号里的一句；没有记录时为空。"""
    return f"（记在 {adapter.path / RUN_CONFIG}）" if adapter.run_config.get("base_model") else ""


def prepare(args: PredictOptions) -> Plan:
    """载入权重之前的全部检查；问题一次列全，抛一个 ValueError。没有给的参数在这里取缺省值。"""
    from finetune.checkpoint.inspection import inspect_checkpoint
    from finetune.inference.serve import bind

    problems = option_problems(args)

    def attempt(step, *arguments):
        try:
            return step(*arguments)
        except ValueError as error:
            problems.append(str(error))

    device = attempt(choose_device, args.device, args.num_gpus)
    args.stop = [text.replace("\\n", "\n") for text in args.stop or ()]
    args.batch_size = 8 if args.batch_size is None else args.batch_size
    if args.model_path is not None:
        args.model_path = str(attempt(choose_checkpoint, args.model_path) or args.model_path)
    for paths in (args.compare or [], args.adapter or []):
        paths[:] = [str(attempt(choose_checkpoint, path) or path) for path in paths]
    checkpoints = []
    for path in args.compare or ([args.model_path] if args.model_path else []):
        is_adapter = (Path(path) / ADAPTER_CONFIG).is_file()
        base = args.base_model_path if is_adapter or not args.compare else None
        checkpoints.append(attempt(inspect_checkpoint, path, base, args.prompt_format))
    if args.adapter and checkpoints and checkpoints[0] is not None and checkpoints[0].is_adapter:
        problems.append(
            f"--adapter 要挂在完整的模型上，而 --model_path {args.model_path} 是适配器；"
            f"请改成它的基座：--model_path {checkpoints[0].base_path}{recorded_in(checkpoints[0])}"
        )
    adapters = (attempt(inspect_adapters, args) if args.adapter and not problems else None) or {}
    found = [checkpoint for checkpoint in checkpoints if checkpoint is not None]
    rows, options = [], RowOptions()
    if args.test_path is not None or args.instruction is not None or args.input is not None:
        options = attempt(reading_options, args, [*adapters.values()] or found) or options
    if args.test_path is not None:
        default = "compare.html" if args.compare else f"{Path(args.test_path).stem}.predictions.jsonl"
        args.output_path = args.output_path or default
        rows = attempt(read_test_rows, args, options) or []
    elif args.instruction is not None or args.input is not None:
        parts = [text for text in (args.instruction, args.input) if text]
        rows = [Sample((("user", options.input_separator.join(parts)),), line=1, path="命令行")]
        args.output_path = args.output_path or "compare.html"
    if args.label_scores == [] and rows and not args.compare:
        args.label_scores = attempt(label_set, args, rows)
    if found:
        shortest = min(checkpoint.context_length for checkpoint in found)
        if args.max_new_tokens is None:
            args.max_new_tokens = min(512, shortest // 2)
        attempt(max_prompt_tokens, shortest, args.max_new_tokens, found[0].prompting.family)
    listener = attempt(bind, args.serve) if args.serve is not None and not problems else None
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return Plan(checkpoints, adapters, device, rows, listener)
