"""用训练好的检查点预测：一条样本、一个文件（可同时评测）或在终端里对话。

启动：
    python predict.py --model_path output-baichuan/epoch-2-step-80 --instruction "……" --input "……"
    python predict.py --model_path CKPT --test_path data/spo_1.json --output_path out.jsonl --metric triple_f1
    python predict.py --model_path CKPT                                   # 终端对话，/clear 清空，/exit 退出
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from arguments import Parser
from chat import chat, note
from data_check import Sample, read_samples
from generation import generate_all, make_generation_config, target_nll
from loading import Checkpoint, inspect_checkpoint, load_checkpoint_model, load_checkpoint_tokenizer
from metrics import METRICS
from prompting import PROMPT_FORMATS, encode_prompt, encode_sample, max_prompt_tokens
from tables import format_result
from utils import (
    PRECISIONS,
    TORCH_DTYPES,
    choose_precision,
    cpu_has_native_bf16,
    quiet_libraries,
    seed_everything,
    write_json,
)

SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """定义并解析命令行参数。"""
    parser = Parser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_argument_group("模型")
    model.add_argument("--model_path", required=True, help="检查点目录：训练器写的、合并后的，或官方布局的基座")
    model.add_argument("--base_model_path", help="适配器的基座移动过时的新位置（缺省按 run_config.json 的记录寻找）")
    model.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N；auto 有 GPU 用 GPU（缺省 auto）")
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
        "--output_path", help="预测结果（JSON 行，次序同输入，加 prediction 字段；缺省为 测试文件名.predictions.jsonl）"
    )
    data.add_argument("--metric", choices=list(METRICS), help="按文件里的 output 评测，结果写到 *.metrics.json")
    data.add_argument("--batch_size", type=int, help="文件预测每批的行数（缺省 8）")

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
    for name in ("output_path", "metric", "batch_size"):
        if getattr(args, name) is not None and args.test_path is None:
            problems.append(f"--{name} 只用于文件预测，请同时给出 --test_path")
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


def choose_device(requested: str) -> torch.device:
    """--device 的设备；写法不对或没有这块 GPU 时抛 ValueError。"""
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


def prepare(args: argparse.Namespace) -> tuple[Checkpoint, torch.device, list[Sample]]:
    """载入权重之前的全部检查；问题一次列全，抛一个 ValueError。没有给的参数在这里取缺省值。"""
    problems = option_problems(args)

    def attempt(step, *arguments):
        try:
            return step(*arguments)
        except ValueError as error:
            problems.append(str(error))

    device = attempt(choose_device, args.device)
    rows = []
    if args.test_path is not None:
        args.output_path = args.output_path or f"{Path(args.test_path).stem}.predictions.jsonl"
        args.batch_size = 8 if args.batch_size is None else args.batch_size
        rows = attempt(read_test_rows, args)
    elif args.instruction is not None or args.input is not None:
        rows = [Sample((("user", f"{args.instruction or ''}{args.input or ''}"),), line=1, path="命令行")]
        args.batch_size = 1
    checkpoint = attempt(inspect_checkpoint, args.model_path, args.base_model_path, args.prompt_format)
    if checkpoint is not None:
        length = checkpoint.context_length
        if args.max_new_tokens is None:
            args.max_new_tokens = min(512, length // 2)
        if args.max_src_len is None:
            args.max_src_len = checkpoint.run_config.get("args", {}).get("max_src_len")
        attempt(max_prompt_tokens, length, args.max_new_tokens, checkpoint.prompting.family)
    if problems:
        raise ValueError("\n".join(problems))
    return checkpoint, device, rows


def prediction_dtype(requested: str, device: torch.device) -> torch.dtype:
    """--precision 对应的类型；auto 按实际使用的设备决定，而不是按机器上有没有 GPU。"""
    if requested == "auto" and device.type == "cpu":
        return TORCH_DTYPES["bf16" if cpu_has_native_bf16() else "fp32"]
    return TORCH_DTYPES[choose_precision(requested)[0]]


class Predictor:
    """一个检查点，与把文字变成提示词、把 id 变回文字的设置；先能编码，load_model 之后才能生成。"""

    def __init__(self, args: argparse.Namespace, checkpoint: Checkpoint) -> None:
        self.args, self.checkpoint = args, checkpoint
        self.tokenizer = load_checkpoint_tokenizer(checkpoint)
        family = checkpoint.prompting.family
        self.max_input_tokens = max_prompt_tokens(checkpoint.context_length, args.max_new_tokens, family)

    def load_model(self, device: torch.device) -> None:
        """读权重，定下生成配置。"""
        dtype = prediction_dtype(self.args.precision, device)
        self.model = load_checkpoint_model(self.checkpoint, dtype, device)
        options: dict[str, Any] = {"repetition_penalty": self.args.repetition_penalty}
        if self.args.do_sample:
            given = {name: getattr(self.args, name) for name in SAMPLING_DEFAULTS}
            given = {name: value for name, value in given.items() if value is not None}
            options |= {"do_sample": True, **SAMPLING_DEFAULTS, **given}
        self.generation_config = make_generation_config(self.model, self.args.max_new_tokens, **options)
        kind = f"适配器，基座 {self.checkpoint.base_path}" if self.checkpoint.is_adapter else "完整模型"
        prompt_format = self.checkpoint.prompting.prompt_format
        note(f"已载入 {self.checkpoint.path}（{kind}）；{device}，{dtype}，提示词格式 {prompt_format}")

    def encode(self, messages: tuple[tuple[str, str], ...], **limits: int | None) -> list[int]:
        """对话 → 提示词 id；limits 是 encode_prompt 的 max_src_len（同训练）与 max_input_tokens（上下文长度）。"""
        return encode_prompt(self.tokenizer, messages, **limits, **self.checkpoint.prompting._asdict())

    def decode(self, ids: list[int]) -> str:
        """生成的 id → 文字，不含特殊符号。"""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def encode_rows(self, rows: list[Sample]) -> list[list[int]]:
        """各行的提示词，截断规则同训练；报告截断了多少行。对话格式不合要求时抛 ValueError，带行号。"""
        limits = {"max_src_len": self.args.max_src_len, "max_input_tokens": self.max_input_tokens}
        prompts, num_cut = [], 0
        for row in rows:
            try:
                prompts.append(self.encode(row.messages, **limits))
                num_cut += len(prompts[-1]) < len(self.encode(row.messages))
            except ValueError as error:
                raise ValueError(f"{row.place}: {error}") from error
        if num_cut:
            limit = min(value for value in limits.values() if value is not None)
            note(f"{num_cut} 行的提示词超过 {limit} 个 token，已按训练的规则截断")
        return prompts

    def generate(self, prompts: list[list[int]]) -> list[str]:
        """各提示词的回答，次序同输入；报告没有写完的行数。"""
        with tqdm(
            total=len(prompts), desc="预测", unit="条", dynamic_ncols=True, disable=len(prompts) == 1
        ) as progress:
            results = generate_all(
                self.model, prompts, self.generation_config, self.args.batch_size, on_batch=progress.update
            )
        num_unfinished = sum(len(ids) >= self.args.max_new_tokens for ids in results)
        if num_unfinished:
            note(f"{num_unfinished} 行到 --max_new_tokens({self.args.max_new_tokens}) 还没有写完，可能需要调大")
        return [self.decode(ids) for ids in results]

    def reference_nll(self, rows: list[Sample]) -> dict[str, Any]:
        """参考答案的 NLL；一行有多条参考时取平均每 token 最低的一条。"""
        trained = self.checkpoint.run_config.get("args", {})
        max_len = trained.get("max_len") or self.checkpoint.context_length
        max_src_len = min(self.args.max_src_len or self.max_input_tokens, max_len - 1)
        best_sums, best_counts = [], []
        for row in tqdm(rows, desc="计算 NLL", unit="条", dynamic_ncols=True):
            encoded = [
                encode_sample(
                    row._replace(messages=(*row.messages, ("assistant", reference))),
                    self.tokenizer, max_len=max_len, max_src_len=max_src_len, **self.checkpoint.prompting._asdict(),
                )
                for reference in row.references
            ]  # fmt: skip
            sums, counts = target_nll(self.model, encoded)
            best = min(range(len(sums)), key=lambda k: sums[k] / max(1, counts[k]))
            best_sums.append(sums[best])
            best_counts.append(counts[best])
        return METRICS["nll"](best_sums, best_counts)


def predict_file(predictor: Predictor, rows: list[Sample], prompts: list[list[int]], args: argparse.Namespace) -> None:
    """预测整个文件，写结果；给了 --metric 时评测并打印表。"""
    predictions = predictor.generate(prompts)
    output_path = Path(args.output_path)
    write_json_lines(
        output_path, [{**row.raw, "prediction": text} for row, text in zip(rows, predictions, strict=True)]
    )
    note(f"{len(rows)} 条预测已写到 {output_path}")
    if args.metric is None:
        return
    if args.metric == "nll":
        result = predictor.reference_nll(rows)
    else:
        result = METRICS[args.metric](predictions, [row.references for row in rows])
    metrics_path = output_path.with_suffix(".metrics.json")
    write_json(metrics_path, {**result, "model_path": args.model_path, "test_path": args.test_path})
    print(format_result(result))
    note(f"评测结果已写到 {metrics_path}")


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """先写临时文件再改名：读者看不到写了一半的结果；写不了时删去临时文件，抛 OSError。"""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def main(argv: list[str] | None = None) -> int:
    """命令行入口；返回退出码。"""
    quiet_libraries()
    args = parse_args(argv)
    try:
        checkpoint, device, rows = prepare(args)
        seed_everything(args.seed)
        predictor = Predictor(args, checkpoint)
        prompts = predictor.encode_rows(rows)
        predictor.load_model(device)
    except ValueError as error:
        note(f"错误：\n{error}")
        return 2
    if args.test_path is None and not rows:
        chat(predictor)
    elif args.test_path is None:
        print(predictor.generate(prompts)[0])
    else:
        try:
            predict_file(predictor, rows, prompts, args)
        except OSError as error:
            note(f"错误：写不了 {error.filename or args.output_path}：{error.strerror}，请检查磁盘空间与权限")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
