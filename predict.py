"""用训练好的检查点预测：一条样本、一个文件（可同时评测）、几个检查点的对照、终端对话，或 HTTP 服务。

启动：
    python predict.py --model_path output-baichuan/epoch-2-step-80 --instruction "……" --input "……"
    python predict.py --model_path CKPT --test_path data/spo_1.json --output_path out.jsonl --metric triple_f1
    python predict.py --compare CKPT1 CKPT2 --test_path data/spo_1.json
    python predict.py --model_path CKPT                                   # 终端对话，/clear 清空，/exit 退出
    python predict.py --model_path BASE --adapter CKPT1 CKPT2             # 对话中用 /adapter 切换
    python predict.py --model_path BASE --adapter CKPT1 CKPT2 --serve     # OpenAI 写法的 HTTP 服务，见 docs/serving.md
"""

import argparse
import os
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from arguments import Parser
from chat import chat, note
from checkpoint import RUN_CONFIG
from compare import compare
from data_check import Sample, read_samples
from file_prediction import partial_path, predict_file
from finetune.inference.serve import DEFAULT_ADDRESS, bind, check_installed, serve
from loading import ADAPTER_CONFIG, Checkpoint, base_differences, inspect_checkpoint
from metrics import METRICS
from predictor import SAMPLING_DEFAULTS, Predictor, short_names
from prompting import PROMPT_FORMATS, max_prompt_tokens
from quantization import quantization_problems
from tables import format_table
from utils import PRECISIONS, quiet_libraries, read_json, seed_everything


class Plan(NamedTuple):
    """载入权重之前已经核对过的一切。"""

    checkpoints: list[Checkpoint]  # 一个；--compare 时有几个
    adapters: dict[str, Checkpoint]  # --adapter：名字 → 检查点
    device: torch.device
    rows: list[Sample]  # 要预测的行；空的是对话或服务
    listener: socket.socket | None  # --serve 占住的地址


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """定义并解析命令行参数。"""
    parser = Parser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_argument_group("模型")
    model.add_argument(
        "--model_path", help="检查点目录：训练器写的、合并后的，或官方布局的基座（必填，除非用 --compare）"
    )
    model.add_argument(
        "--adapter", nargs="+", metavar="目录",
        help="挂在 --model_path（任何完整的模型）上的适配器；对话时可给几个，用 /adapter 切换",
    )  # fmt: skip
    model.add_argument(
        "--compare", nargs="+", metavar="目录",
        help="同样的提示词依次交给这几个检查点，回答并排显示，并写成 HTML；代替 --model_path",
    )  # fmt: skip
    model.add_argument("--base_model_path", help="适配器的基座移动过时的新位置（缺省按 run_config.json 的记录寻找）")
    model.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N；auto 有 GPU 用 GPU（缺省 auto）")
    model.add_argument(
        "--num_gpus", type=int, default=1, help="文件预测分给几个进程，各用一块 GPU（CPU 上就是几个进程；缺省 1）"
    )
    model.add_argument("--load_in_4bit", action="store_true", help="基座量化成 4 位（nf4），要 bitsandbytes")
    model.add_argument("--load_in_8bit", action="store_true", help="基座量化成 8 位（LLM.int8），要 bitsandbytes")
    model.add_argument("--precision", default="auto", choices=PRECISIONS, help="计算精度，auto 按设备决定（缺省 auto）")
    model.add_argument(
        "--prompt_format", default="auto", choices=("auto", *PROMPT_FORMATS),
        help="提示词格式，auto 取训练时的格式，基座看 generation_config.json（缺省 auto）",
    )  # fmt: skip

    data = parser.add_argument_group("输入与输出（都不给则在终端对话）")
    data.add_argument("--instruction", help="一条样本的指令")
    data.add_argument("--input", help="一条样本的输入，直接接在指令之后")
    data.add_argument("--test_path", help="要预测的文件：JSON 行或 JSON 数组，字段同训练文件，output 可缺，也可是列表")
    data.add_argument(
        "--output_path",
        help="预测结果（JSON 行，次序同输入，加 prediction 字段；缺省为 测试文件名.predictions.jsonl）；"
        "做完的行先在 输出文件名.partial，中断后用同样的命令接着做；"
        "已有的不同的结果改名为 *.previous-N。--compare 时是 HTML（缺省 compare.html）",
    )
    data.add_argument("--metric", choices=list(METRICS), help="按文件里的 output 评测，结果写到 *.metrics.json")
    data.add_argument(
        "--label_scores", nargs="*", metavar="标签",
        help="分类：各标签的得分，即模型恰好回答这个标签（连同 eos）的对数概率（nat，不除以长度），"
        "以及在各标签之间归一化的概率；不写标签时取文件里 output 出现过的全部",
    )  # fmt: skip
    data.add_argument("--batch_size", type=int, help="文件预测每批的行数（缺省 8）")

    service = parser.add_argument_group("服务（代替输入与输出）")
    service.add_argument(
        "--serve", nargs="?", const=DEFAULT_ADDRESS, metavar="主机:端口",
        help="开 OpenAI 写法的 HTTP 服务，模型名是目录名，--adapter 的各是一个模型；要 uvicorn 与 starlette。"
        f"只写 --serve 是 {DEFAULT_ADDRESS}；采样等设置写在请求里，--max_new_tokens 是请求没写 max_tokens 时的值，"
        "--batch_size 是同时生成的请求数（缺省 8）",
    )  # fmt: skip
    service.add_argument("--api_key", help="要求请求带上 Authorization: Bearer 与这个值（缺省不要求）")

    generation = parser.add_argument_group("生成（缺省贪心）")
    generation.add_argument(
        "--max_new_tokens", type=int, help="最多生成的 token 数（缺省 512，上下文不足 1024 的模型取上下文的一半）"
    )
    generation.add_argument(
        "--max_src_len",
        type=int,
        help="提示词的 token 上限，截断规则同训练（缺省取训练时的值，没有则只受上下文长度限制）",
    )
    generation.add_argument("--do_sample", action="store_true", help="采样；不给则贪心")
    generation.add_argument("--temperature", type=float, help="采样温度，大于 0（缺省 1.0，需要 --do_sample）")
    generation.add_argument("--top_p", type=float, help="核采样的累计概率，(0, 1]（缺省 1.0，需要 --do_sample）")
    generation.add_argument("--top_k", type=int, help="只从概率最高的 k 个里采样，0 为不限（缺省 0，需要 --do_sample）")
    generation.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="重复惩罚，1.0 为没有（缺省 1.0，不取检查点自带的值）"
    )
    generation.add_argument(
        "--stop", nargs="+", metavar="文字", help="出现任一文字就停，结果不含它；\\n 是换行（缺省只在 eos 处停）"
    )
    generation.add_argument("--seed", type=int, default=1234, help="采样的随机种子（缺省 1234）")
    return parser.parse_args(argv)


def option_problems(args: argparse.Namespace) -> list[str]:
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
    if args.max_src_len is not None and not single and args.test_path is None:
        problems.append("--max_src_len 在对话中不起作用（对话按上下文长度整轮截断），请去掉它")
    for name in SAMPLING_DEFAULTS:
        if getattr(args, name) is not None and not args.do_sample:
            problems.append(f"--{name} 在贪心生成时不起作用，请加上 --do_sample 或去掉它")
    limits = {
        "batch_size": (lambda value: value >= 1, "必须是正整数"),
        "max_new_tokens": (lambda value: value >= 1, "必须是正整数"),
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


def compare_problems(args: argparse.Namespace, single: bool) -> list[str]:
    """--compare 特有的问题。"""
    problems = []
    if len(args.compare) < 2:
        problems.append(f"--compare 要两个以上的检查点目录，现在只有 {args.compare[0]}，请再给一个")
    if not single and args.test_path is None:
        problems.append("--compare 需要提示词，请同时给出 --test_path 或 --instruction/--input")
    unused = [name for name in ("adapter", "metric", "label_scores") if getattr(args, name) is not None]
    problems += [f"--{name} 不能与 --compare 同用，请去掉它" for name in unused]
    return problems


def serve_problems(args: argparse.Namespace) -> list[str]:
    """--serve 特有的问题：输入、输出与采样的设置对服务不起作用。"""
    if args.serve is None:
        return ["--api_key 只用于 --serve，请去掉它"] if args.api_key is not None else []
    problems = ["--api_key 是空的，请写明或去掉它"] if args.api_key == "" else []
    inputs = ("instruction", "input", "test_path", "output_path", "compare", "metric", "label_scores", "max_src_len")
    problems += [f"--{name} 不能与 --serve 同用，请去掉它" for name in inputs if getattr(args, name) is not None]
    sampling = [name for name in (*SAMPLING_DEFAULTS, "stop") if getattr(args, name) is not None]
    sampling += ["do_sample"] * args.do_sample + ["repetition_penalty"] * (args.repetition_penalty != 1)
    problems += [f"--{name} 对 --serve 不起作用，请写在请求里" for name in sampling]
    try:
        check_installed()
    except ValueError as error:
        problems.append(str(error))
    return problems


def choose_device(requested: str, num_gpus: int) -> torch.device:
    """--device 的设备；写法不对、没有这块 GPU 或 GPU 不够 num_gpus 块时抛 ValueError。"""
    if num_gpus > 1 and requested != "cpu" and (requested not in ("auto", "cuda") or torch.cuda.is_available()):
        if requested not in ("auto", "cuda"):
            raise ValueError(f"--num_gpus {num_gpus} 时 --device({requested}) 只能是 auto、cuda 或 cpu")
        if num_gpus > torch.cuda.device_count():
            raise ValueError(f"--num_gpus({num_gpus}) 超过了本机的 {torch.cuda.device_count()} 块 GPU，请调小")
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise ValueError(f"--device({requested}) 写法不对，可用 auto、cpu、cuda、cuda:0 等") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device({requested}) 不支持，可用 auto、cpu、cuda、cuda:0 等")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device({requested}) 不可用：本机有 {torch.cuda.device_count()} 块 GPU，请改用 auto 或 cpu")
    return device


def read_test_rows(args: argparse.Namespace) -> list[Sample]:
    """读测试文件并检查输出路径与参考答案；不合要求时抛 ValueError。"""
    rows = read_samples(args.test_path, split="predict")
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


def inspect_adapters(args: argparse.Namespace) -> dict[str, Checkpoint]:
    """--adapter 的各检查点：名字 → 检查点；基座与训练时不同的只提醒。不是适配器、种类不同时抛 ValueError。"""
    adapters = {}
    for name, path in zip(short_names(map(Path, args.adapter)), args.adapter, strict=True):
        if not (Path(path) / ADAPTER_CONFIG).is_file():
            raise ValueError(f"--adapter {path} 里没有 {ADAPTER_CONFIG}，请给出 lora 或 ptuning 的检查点目录")
        checkpoint = inspect_checkpoint(path, args.model_path, args.prompt_format, any_base=True)
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


def label_set(args: argparse.Namespace, rows: list[Sample]) -> list[str]:
    """没有写明标签的 --label_scores：文件里 output 出现过的全部；没有文件，或不足两个时抛 ValueError。"""
    if args.test_path is None:
        raise ValueError("--label_scores 没有写标签，也没有 --test_path 可以从中取，请在它后面写明两个以上的标签")
    labels = sorted({text for row in rows for text in row.references or ()})
    if len(labels) < 2:
        raise ValueError(f"--label_scores 要两个以上的标签，{args.test_path} 的 output 里只有 {labels}，请在它后面写明")
    return labels


def recorded_in(adapter: Checkpoint) -> str:
    """适配器的基座记在它的哪个文件里，括号里的一句；没有记录时为空。"""
    return f"（记在 {adapter.path / RUN_CONFIG}）" if adapter.run_config.get("base_model") else ""


def prepare(args: argparse.Namespace) -> Plan:
    """载入权重之前的全部检查；问题一次列全，抛一个 ValueError。没有给的参数在这里取缺省值。"""
    problems = option_problems(args)

    def attempt(step, *arguments):
        try:
            return step(*arguments)
        except ValueError as error:
            problems.append(str(error))

    device = attempt(choose_device, args.device, args.num_gpus)
    args.stop = [text.replace("\\n", "\n") for text in args.stop or ()]
    args.batch_size = 8 if args.batch_size is None else args.batch_size
    rows = []
    if args.test_path is not None:
        default = "compare.html" if args.compare else f"{Path(args.test_path).stem}.predictions.jsonl"
        args.output_path = args.output_path or default
        rows = attempt(read_test_rows, args) or []
    elif args.instruction is not None or args.input is not None:
        rows = [Sample((("user", f"{args.instruction or ''}{args.input or ''}"),), line=1, path="命令行")]
        args.output_path = args.output_path or "compare.html"
    if args.label_scores == [] and rows and not args.compare:
        args.label_scores = attempt(label_set, args, rows)
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
    if found:
        shortest = min(checkpoint.context_length for checkpoint in found)
        if args.max_new_tokens is None:
            args.max_new_tokens = min(512, shortest // 2)
        attempt(max_prompt_tokens, shortest, args.max_new_tokens, found[0].prompting.family)
    listener = attempt(bind, args.serve) if args.serve is not None and not problems else None
    if problems:
        raise ValueError("\n".join(problems))
    return Plan(checkpoints, adapters, device, rows, listener)


def model_names(args: argparse.Namespace, adapters: dict[str, Checkpoint]) -> dict[str, str | None]:
    """--serve 的模型名（目录名）→ 适配器的名字，None 是 --model_path 本身。"""
    paths = [Path(args.model_path), *(adapter.path for adapter in adapters.values())]
    return dict(zip(short_names(paths), (None, *adapters), strict=True))


def run(args: argparse.Namespace, plan: Plan) -> None:
    """按命令行做事：对照、文件、一条样本、服务，或对话。"""
    if args.compare:
        predictors = [Predictor(args, checkpoint) for checkpoint in plan.checkpoints]
        compare(predictors, plan.rows, plan.device, Path(args.output_path))
        return
    predictor = Predictor(args, plan.checkpoints[0], plan.adapters)
    prompts = predictor.encode_rows(plan.rows)
    if args.test_path is not None:
        predict_file(predictor, plan.rows, prompts, plan.device, args.num_gpus)
        return
    predictor.load_model(plan.device)
    if plan.listener is not None:
        serve(predictor, model_names(args, plan.adapters), plan.listener, args.api_key)
        return
    if not plan.rows:
        chat(predictor)
        return
    [record] = predictor.predict(plan.rows, prompts)
    print(record["prediction"])
    if args.label_scores:
        lines = [
            [name, f"{score['log_prob']:.4f}", f"{score['probability']:.4f}"]
            for name, score in record["label_scores"].items()
        ]
        print(format_table(["标签", "对数概率", "归一化概率"], lines))


def main(argv: list[str] | None = None) -> int:
    """命令行入口；返回退出码。"""
    quiet_libraries()
    args = parse_args(argv)
    kept = ""
    try:
        plan = prepare(args)
        seed_everything(args.seed)
        if args.test_path is not None and not args.compare:
            kept = f"；做完的行留在 {partial_path(Path(args.output_path))}，用同样的命令可以接着做"
        run(args, plan)
    except ValueError as error:
        note(f"错误：\n{error}")
        return 2
    except torch.OutOfMemoryError:
        note(f"错误：显存不够，请调小 --batch_size（现在是 {args.batch_size}）或 --max_new_tokens{kept}")
        return 1
    except OSError as error:
        note(f"错误：写不了 {error.filename or args.output_path}：{error.strerror}，请检查磁盘空间与权限{kept}")
        return 1
    except RuntimeError as error:
        if not args.num_gpus > 1:
            raise
        note(f"错误：{error}{kept}")
        return 1
    except KeyboardInterrupt:
        note(f"已停下{kept}")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
