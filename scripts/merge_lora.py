"""把 LoRA 检查点合并进基座，写成官方布局的完整检查点，并证明合并前后的 logits 相同。

python scripts/merge_lora.py --model_path output-lora/epoch-3-step-240 --output_dir baichuan2-7B-merged
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from export_check import Comparison, check_export, encode_check_prompts
from export_source import (
    DTYPES,
    TensorSource,
    WeightDirectory,
    dtype_name,
    open_checkpoint,
    resolve_dtype,
    run_command,
    staged_directory,
    write_baichuan,
)

from checkpoint import write_manifest
from loading import load_checkpoint_tokenizer


def merge_lora(
    model_path: str | Path,
    output_dir: str | Path,
    base_model_path: str | Path | None = None,
    dtype: str = "auto",
    check_prompt: list[str] | None = None,
) -> Comparison:
    """合并并核对，返回核对的结果；各参数与同名命令行选项相同。

    以 fp32 合并，舍入一次成 dtype（auto 是基座自己的）。核对时以 fp32 分别计算「基座 + 适配器（不合并）」与写出的目录。

    Raises:
        ValueError: 不是 LoRA 检查点，或基座不对，或 output_dir 已有内容。
        CheckFailed: 核对不过；OSError: 写盘失败。两种情况都不留下 output_dir。
    """
    checkpoint = open_checkpoint(model_path, base_model_path)
    if not checkpoint.is_adapter:
        method = checkpoint.run_config.get("train_type")
        kind = f"{method} 训练出的完整模型" if method else "完整模型"
        raise ValueError(
            f"{model_path} 是{kind}，没有适配器可以合并，直接使用即可；要换精度或格式请用 scripts/export.py"
        )
    tokenizer = load_checkpoint_tokenizer(checkpoint)
    prompts = encode_check_prompts(checkpoint, tokenizer, check_prompt)
    source = TensorSource(checkpoint)
    target_dtype = resolve_dtype(dtype, source)
    with staged_directory(output_dir) as directory:
        write_baichuan(checkpoint, source, directory, target_dtype, normalize=False)
        read = WeightDirectory(directory).read
        comparison = check_export(source, source.config, read, prompts, dtype_name(target_dtype))
        write_manifest(directory, checkpoint.run_config.get("global_step", 0))
    return comparison


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model_path", required=True, help="train.py 写出的 LoRA 检查点目录")
    add("--output_dir", required=True, help="合并后的检查点写在哪里；不能已有内容")
    add("--base_model_path", help="基座移动过时的新位置（缺省用训练时记下的）")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="写出的精度；auto 是基座自己的（缺省 %(default)s）")
    add("--check_prompt", nargs="+", metavar="文本", help="核对 logits 用的提示词（缺省用自带的几句）")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """命令行入口；返回退出码。"""
    args = parse_args(argv)

    def merge():
        comparison = merge_lora(**vars(args))
        print(f"核对（未合并的适配器对合并后的检查点）：{comparison}")
        print(f"已写到 {args.output_dir}")

    return run_command(merge)


if __name__ == "__main__":
    sys.exit(main())
