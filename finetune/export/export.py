"""把训练器的任何检查点导出成别的工具能直接加载的格式；LoRA 当场合并，gguf_lora 只写适配器。"""

from pathlib import Path

from baichuan import BaichuanConfig
from finetune.checkpoint.inspection import load_checkpoint_tokenizer
from finetune.checkpoint.manifest import write_manifest
from finetune.export.check import Comparison, check_export, encode_check_prompts
from finetune.export.from_llama import from_llama
from finetune.export.gguf import GGUF_TYPES, GgufFile, check_gguf, write_gguf
from finetune.export.gguf_lora import check_gguf_lora, check_lora, write_gguf_lora
from finetune.export.llama import LlamaDirectory, write_llama
from finetune.export.llama_lora import check_lora_layouts, split_lora, write_lora
from finetune.export.model_card import model_card
from finetune.export.tensors import (
    TensorSource,
    WeightDirectory,
    dtype_name,
    open_checkpoint,
    resolve_dtype,
    staged_directory,
    write_baichuan,
)
from finetune.process.precision import NAMED_DTYPES

TARGETS = ("llama", "baichuan", "gguf", "gguf_lora", "llama_lora")


def export(
    model_path: str | Path,
    to: str,
    output_dir: str | Path,
    dtype: str = "auto",
    gguf_type: str | None = None,
    base_model_path: str | Path | None = None,
    check_prompt: list[str] | None = None,
    source_layout: str = "baichuan",
) -> Comparison:
    """导出并核对，返回来源与写出的权重的 logits 之差；各参数与同名命令行选项相同。

    Raises:
        ValueError: 检查点不能这样导出（说明改用什么），或 output_dir 已有内容。
        CheckFailed: 核对不过；OSError: 写盘失败。两种情况都不留下 output_dir。
    """
    if to not in TARGETS:
        raise ValueError(f"--to({to}) 不认识，可选：{'、'.join(TARGETS)}")
    gguf_type = resolve_gguf_type(to, dtype, gguf_type)
    if source_layout == "llama":
        if to != "baichuan":
            raise ValueError(f"--from llama 只转换成 --to baichuan，再由它导出成 {to}")
        return from_llama(model_path, output_dir, dtype, base_model_path, check_prompt)
    checkpoint = open_checkpoint(model_path, base_model_path)
    config = checkpoint.config
    if to in ("llama", "llama_lora") and config.position_embedding == "alibi":
        raise ValueError(
            f"{model_path} 用 ALiBi 位置编码（13B），Llama 没有这种结构，不能导出成 llama；"
            "请改用 --to gguf（llama.cpp 支持 13B），或不导出，用 predict.py --serve"
        )
    is_lora, whole = to.endswith("_lora"), to.removesuffix("_lora")
    if is_lora and checkpoint.added is not None:
        raise ValueError(f"{model_path} 训练过新词，适配器放不下它们，请用 --to {whole}（合并）")
    if to in ("gguf", "gguf_lora"):
        check_gguf(config, gguf_type)
    tokenizer = load_checkpoint_tokenizer(checkpoint)
    prompts = encode_check_prompts(checkpoint.prompting, tokenizer, check_prompt)
    source = TensorSource(checkpoint)
    if is_lora and not source.lora:
        raise ValueError(f"{model_path} 是完整的模型，没有适配器，请用 --to {whole}")
    if is_lora and source.magnitudes:
        raise ValueError(f"{model_path} 是 DoRA，{whole} 的适配器没有它的各行大小，请用 --to {whole}（合并）")
    if to == "gguf_lora":
        check_lora(source, model_path)
    target_dtype = resolve_dtype(dtype, source)
    kind = dtype_name(target_dtype) if gguf_type is None else GGUF_TYPES[gguf_type]
    exported_config = BaichuanConfig.from_dict({**source.config.to_dict(), "norm_head": False})
    name = Path(output_dir).resolve().name
    with staged_directory(output_dir) as directory:
        if to == "llama":
            write_llama(checkpoint, source, tokenizer, directory, target_dtype)
            reader = LlamaDirectory(directory)
        elif to == "baichuan":
            write_baichuan(checkpoint, source, directory, target_dtype, normalize=True)
            reader = WeightDirectory(directory)
        elif to == "gguf":
            path = directory / f"{name}-{gguf_type}.gguf"
            write_gguf(source, tokenizer, checkpoint.prompting, path, gguf_type, name)
            reader = GgufFile(path, config.num_attention_heads)
        if to == "gguf_lora":
            path = directory / f"{name}-lora.gguf"
            write_gguf_lora(source, path, name)
            comparison = check_gguf_lora(source, path, prompts)
        elif to == "llama_lora":
            write_lora(split_lora(source.lora), config, directory, None)
            comparison = check_lora_layouts(source, source.lora, directory, prompts)
        else:
            vector_kind = "float32" if to == "gguf" else kind
            comparison = check_export(source, exported_config, reader.read, prompts, kind, vector_kind)
        (directory / "README.md").write_text(model_card(checkpoint, to, kind, comparison), encoding="utf-8")
        write_manifest(directory, checkpoint.run_config.get("global_step", 0))
    return comparison


def resolve_gguf_type(to: str, dtype: str, gguf_type: str | None) -> str | None:
    """GGUF 的类型：--gguf_type；没有给时随 --dtype，auto 为 f16。

    Raises:
        ValueError: 给了不起作用或互相矛盾的选项。
    """
    if to.endswith("_lora"):
        if gguf_type is not None or dtype != "auto":
            raise ValueError(f"--to {to} 总是 f32，请去掉 --gguf_type 与 --dtype")
        return "f32"
    if to != "gguf":
        if gguf_type is not None:
            raise ValueError(f"--gguf_type 只对 --to gguf 起作用，对 {to} 请用 --dtype")
        return None
    of_dtype = {"auto": "f16", **{name: kind for kind, name in GGUF_TYPES.items() if name in NAMED_DTYPES}}
    if gguf_type is not None and dtype != "auto" and gguf_type != of_dtype[dtype]:
        raise ValueError(f"--dtype {dtype} 与 --gguf_type {gguf_type} 矛盾，请只写 --gguf_type")
    return gguf_type or of_dtype[dtype]
