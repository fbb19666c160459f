"""把训练器的任何检查点（full、freeze、lora 或基座）导出成别的工具能直接加载的格式；LoRA 当场合并。

python scripts/export.py --model_path output-lora/epoch-3-step-240 --to llama --output_dir baichuan2-7B-llama

llama：LlamaForCausalLM 目录（7B），给读 Llama 的引擎；baichuan：官方布局，词表投影已归一化；
gguf：llama.cpp 的文件（7B、13B）；gguf_lora、llama_lora：只有 LoRA 检查点的适配器，配基座的 gguf 或 llama。
--from llama --to baichuan：反过来，Llama 布局的 Baichuan（LLaMAfied）或它的 LoRA 变成官方布局。
"""

import argparse
import sys

from finetune.options import ScriptParser
from finetune.process.threads import begin_loading

if __name__ == "__main__":
    begin_loading()

from finetune.export.export import TARGETS, export
from finetune.export.gguf import GGUF_TYPES
from finetune.export.tensors import run_command
from finetune.process.libraries import LOG_LEVEL_HELP, LOG_LEVELS, quiet_libraries
from finetune.process.precision import NAMED_DTYPES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_path", required=True, help="检查点目录：full、freeze、lora 训练的，或没有训练过的基座")
    add("--to", required=True, choices=TARGETS, help="导出的格式")
    add("--from", dest="source_layout", choices=["baichuan", "llama"], default="baichuan",
        help="--model_path 的布局（缺省 %(default)s）；llama 只能 --to baichuan")  # fmt: skip
    add("--output_dir", required=True, help="写在哪里；不能已有内容")
    add("--dtype", choices=["auto", *NAMED_DTYPES], default="auto",
        help="写出的精度；auto 是基座自己的，对 gguf 是 f16（缺省 %(default)s）")  # fmt: skip
    add("--gguf_type", choices=list(GGUF_TYPES), help="gguf 的类型（缺省随 --dtype）；q8_0 约为 f16 的一半大")
    add("--base_model_path", help="适配器的基座移动过时的新位置（缺省用训练时记下的）；"
        "--from llama 时是官方布局的目录：适配器要它，没有 tokenizer.model 的从它取")  # fmt: skip
    add("--check_prompt", nargs="+", metavar="文本", help="核对 logits 用的提示词（缺省用自带的几句）")
    add("--log_level", choices=LOG_LEVELS, default="info", help=LOG_LEVEL_HELP)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """命令行入口；返回退出码。"""
    args = parse_args(argv)
    options = vars(args).copy()
    quiet_libraries(options.pop("log_level"))

    def run():
        comparison = export(**options)
        print(f"核对（来源对写出的权重）：{comparison}")
        print(f"已写到 {args.output_dir}")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
