"""把 LoRA 合并进基座，写成官方布局的目录。"""

from pathlib import Path

from finetune.checkpoint.inspection import load_checkpoint_tokenizer
from finetune.checkpoint.manifest import write_manifest
from finetune.export.check import Comparison, check_export, encode_check_prompts
from finetune.export.tensors import (
    TensorSource,
    WeightDirectory,
    dtype_name,
    open_checkpoint,
    resolve_dtype,
    staged_directory,
    write_baichuan,
)


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
    prompts = encode_check_prompts(checkpoint.prompting, tokenizer, check_prompt)
    source = TensorSource(checkpoint)
    target_dtype = resolve_dtype(dtype, source)
    with staged_directory(output_dir) as directory:
        write_baichuan(checkpoint, source, directory, target_dtype, normalize=False)
        read = WeightDirectory(directory).read
        comparison = check_export(source, source.config, read, prompts, dtype_name(target_dtype))
        write_manifest(directory, checkpoint.run_config.get("global_step", 0))
    return comparison
