"""选择题的准确率（C-Eval、CMMLU 与同样写法的文件），几个检查点并排：基座知道的，微调之后忘了多少。

python scripts/evaluate_choices.py data/choices/val --checkpoint baichuan2-7B/ output-lora/epoch-2-step-240

题目是 CSV（question、A、B、C、D、answer）的目录或一个文件；例子取旁边的 dev/。写法与结果见 docs/evaluation.md。
"""

import argparse
import re
import sys
from pathlib import Path

from finetune.options import ScriptParser
from finetune.process.threads import begin_loading

if __name__ == "__main__":
    begin_loading()

import torch

from finetune.checkpoint.inspection import inspect_checkpoint
from finetune.cli.predict_checks import choose_device
from finetune.inference.choices import (
    DESCRIPTION,
    evaluate_choices,
    examples_beside,
    read_questions,
    result_tables,
    subject_names,
)
from finetune.options import PRECISIONS
from finetune.process.libraries import LOG_LEVEL_HELP, LOG_LEVELS, quiet_libraries
from finetune.process.threads import choose_threads
from finetune.terminal import note
from utils import write_json


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("questions", type=Path, help="题目：CSV 的目录（如 C-Eval 的 val/、CMMLU 的 test/）或一个 CSV")
    add("--checkpoint", nargs="+", required=True, metavar="目录",
        help="检查点：完整的模型或适配器；有几个时并排，并与第一个相减")  # fmt: skip
    add("--dev", type=Path, help="例子：写法同题目（缺省是题目的目录旁边的 dev/，没有就不用例子）")
    add("--shots", type=int, default=5, help="每题用各科的前几个例子（缺省 %(default)s，上下文放不下时少用）")
    add("--description", default=DESCRIPTION,
        help=r"各题最前面的话，{subject} 是科目，\n 是换行（缺省是 C-Eval 的；CMMLU 的见说明）")  # fmt: skip
    add("--base_model_path", help="适配器的基座移动过时的新位置（缺省用训练时记下的）")
    add("--output_path", type=Path, help="结果写成 JSON，连同逐题的选择与对数概率（缺省不写）")
    add("--batch_size", type=int, default=8, help="一批几题（缺省 %(default)s）")
    add("--precision", choices=PRECISIONS, default="auto", help="计算精度（缺省 %(default)s）")
    add("--device", default="auto", help="auto、cpu、cuda、cuda:1 等（缺省 %(default)s）")
    add("--num_threads", type=int, help="CPU 线程数（缺省由空着的核决定）")
    add("--log_level", choices=LOG_LEVELS, default="info", help=LOG_LEVEL_HELP)
    args = parser.parse_args(argv)
    for name, least in (("shots", 0), ("batch_size", 1), ("num_threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name}({value}) 必须至少为 {least}")
    return args


def run(args: argparse.Namespace) -> None:
    if args.output_path is not None and not args.output_path.resolve().parent.is_dir():
        raise ValueError(f"--output_path 的目录 {args.output_path.resolve().parent} 不存在，请先建好")
    unknown = re.search(r"\{[^{}]*\}?|\}", args.description.replace("{subject}", ""))
    if unknown:
        raise ValueError(f"--description 里的 {unknown[0]} 没有意义，花括号里只能是 {{subject}}（科目）")
    subjects, names = read_questions(args.questions), subject_names(args.questions)
    dev = args.dev or examples_beside(args.questions)
    shots = {} if dev is None else read_questions(dev)
    shots = {subject: shots.get(subject, [])[: args.shots] for subject in subjects}
    few = [subject for subject, examples in shots.items() if len(examples) < args.shots]
    if few:
        note(f"{'、'.join(few)} 不到 {args.shots} 个例子（{dev or '没有 dev/'}），有几个用几个")
    device = choose_device(args.device, 1)
    checkpoints = []
    for path in args.checkpoint:
        is_adapter = (Path(path) / "adapter_config.json").is_file()
        checkpoints.append(inspect_checkpoint(path, args.base_model_path if is_adapter else None))
    if device.type == "cpu":
        torch.set_num_threads(choose_threads(args.num_threads)[0])
    result = evaluate_choices(
        subjects, shots, checkpoints, device,
        precision=args.precision, batch_size=args.batch_size,
        description=args.description.replace(r"\n", "\n"), names=names,
    )  # fmt: skip
    print(result_tables(result, names))
    if args.output_path is not None:
        write_json(args.output_path, result)


def main(argv: list[str] | None = None) -> int:
    """命令行入口；返回退出码。"""
    args = parse_args(argv)
    quiet_libraries(args.log_level)
    try:
        run(args)
    except ValueError as error:
        note(f"错误：{error}")
        return 2
    except OSError as error:
        note(f"错误：{error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
