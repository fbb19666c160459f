"""写 llama.cpp 的 LoRA 适配器文件：不合并，基座的一个 GGUF 可以同时挂几个适配器。

W_pack 的 A 由 q、k、v 共用，B 的行按 q、k、v 切开；q、k 的行与基座的 GGUF 同样改排。总是 f32：适配器很小。
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from baichuan import BaichuanConfig
from finetune.export.check import Comparison, compare_logits, streamed_logits
from finetune.export.gguf import gguf_names, gguf_tensors, import_gguf, unpermute_rows
from finetune.export.tensors import CheckFailed, TensorSource

Lora = dict[str, tuple[Tensor, Tensor, float]]  # 模块名 → (A [r, in], B [out, r], 缩放)


def check_lora(source: TensorSource, model_path: str | Path):
    """能不能写成 llama.cpp 的适配器。

    Raises:
        ValueError: 不是 LoRA 检查点，或各模块的秩、缩放不同。
    """
    if not source.lora:
        raise ValueError(f"{model_path} 是完整的模型，没有适配器，请用 --to gguf")
    if source.magnitudes:
        raise ValueError(f"{model_path} 是 DoRA，llama.cpp 的适配器没有它的大小，请用 --to gguf（合并）")
    if len({(len(lora_a), scaling) for lora_a, _, scaling in source.lora.values()}) > 1:
        raise ValueError(
            f"{model_path} 各模块的秩或缩放不同（rank_pattern、alpha_pattern），llama.cpp 的适配器只有一个缩放，"
            "请用 --to gguf（合并）"
        )


def lora_tensors(config: BaichuanConfig, lora: Lora) -> Iterator[tuple[str, Tensor]]:
    """适配器 → GGUF 里的 (名字, 张量)，各模块先 lora_a 后 lora_b。"""
    for module, (lora_a, lora_b, _) in lora.items():
        name = f"{module}.weight"
        for gguf_name, part in zip(gguf_names(name), gguf_tensors(config, name, lora_b), strict=True):
            yield f"{gguf_name}.lora_a", lora_a
            yield f"{gguf_name}.lora_b", part


def write_gguf_lora(source: TensorSource, path: Path, name: str):
    """写一个适配器文件；llama.cpp 的缩放是 alpha / r，各模块的 r 与缩放都相同。"""
    gguf = import_gguf()
    lora_a, _, scaling = next(iter(source.lora.values()))
    writer = gguf.GGUFWriter(path, "baichuan")
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scaling * len(lora_a))
        for tensor_name, tensor in lora_tensors(source.config, source.lora):
            writer.add_tensor(tensor_name, tensor.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_gguf_lora(path: Path, config: BaichuanConfig, modules: list[str]) -> Lora:
    """读回适配器，名字与排列还原成官方的；modules 是要读的模块。

    Raises:
        CheckFailed: q、k、v 的 A 不相同，或有别的张量。
    """
    gguf = import_gguf()
    reader = gguf.GGUFReader(path)
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    alpha = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    lora: Lora = {}
    for module in modules:
        names = gguf_names(f"{module}.weight")
        sides_a = [found.pop(f"{name}.lora_a") for name in names]
        sides_b = [found.pop(f"{name}.lora_b") for name in names]
        if any(not torch.equal(side, sides_a[0]) for side in sides_a):
            raise CheckFailed(f"写出的 {module} 的 q、k、v 没有共用 A")
        if len(names) == 3:
            sides_b[:2] = [unpermute_rows(part, config.num_attention_heads) for part in sides_b[:2]]
        lora[module] = (sides_a[0], torch.cat(sides_b), alpha / len(sides_a[0]))
    if found:
        raise CheckFailed(f"写出的适配器里有多余的 {sorted(found)[:3]}")
    return lora


def check_gguf_lora(source: TensorSource, path: Path, prompts: list[list[int]]) -> Comparison:
    """核对写出的适配器：每个张量与来源逐位相同，加在基座上的 logits 相同；返回 logits 之差。

    Raises:
        CheckFailed: 不相同。
    """
    written = read_gguf_lora(path, source.config, list(source.lora))
    for module, (lora_a, lora_b, scaling) in source.lora.items():
        found_a, found_b, found_scaling = written[module]
        is_same = torch.equal(lora_a, found_a) and torch.equal(lora_b, found_b)
        if not is_same or abs(found_scaling - scaling) > 1e-6 * abs(scaling):
            raise CheckFailed(f"写出的 {module} 的适配器与来源不同")
    expected = streamed_logits(source.config, source.read_base, prompts, source.lora)
    return compare_logits(expected, streamed_logits(source.config, source.read_base, prompts, written))
