"""把 LoRA 检查点合并进基座，写成官方布局的完整检查点，并证明合并前后的 logits 相同。

python scripts/merge_lora.py --model_path output-lora/epoch-3-step-240 --output_dir baichuan2-7B-merged
"""

import argparse
import sys

from finetune.options import ScriptParser
from finetune.process.threads import begin_loading

if __name__ == "__main__":
    begin_loading()

from finetune.export.merge import merge_lora
from finetune.export.tensors import run_command
from finetune.process.libraries import LOG_LEVEL_HELP, LOG_LEVELS, quiet_libraries
from finetune.process.precision import NAMED_DTYPES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model_path", required=True, help="train.py 写出的 LoRA 检查点目录")
    add("--output_dir", required=True, help="合并后的检查点写在哪里；不能已有内容")
    add("--base_model_path", help="基座移动过时的新位置（缺省用训练时记下的）")
    add(
        "--dtype",
        choices=["auto", *NAMED_DTYPES],
        default="auto",
        help="写出的精度；auto 是基座自己的（缺省 %(default)s）",
    )
    add("--check_prompt", nargs="+", metavar="文本", help="核对 logits 用的提示词（缺省用自带的几句）")
    add("--log_level", choices=LOG_LEVELS, default="info", help=LOG_LEVEL_HELP)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """命令行入口；返回退出码。"""
    args = parse_args(argv)
    options = vars(args).copy()
    quiet_libraries(options.pop("log_level"))

    def merge():
        comparison = merge_lora(**options)
        print(f"核对（未合并的适配器对合并后的检查点）：{comparison}")
        print(f"已写到 {args.output_dir}")

    return run_command(merge)


if __name__ == "__main__":
    sys.exit(main())
