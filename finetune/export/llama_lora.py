"""LoRA 在两种布局之间：W_pack 上的一个 ↔ q_proj、k_proj、v_proj 上的三个；写成 peft 的适配器，再读回来核对。"""

from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from baichuan import BaichuanConfig
from finetune.checkpoint.adapter import PREFIX
from finetune.export.check import EXACT_TOLERANCE, Comparison, compare_logits, streamed_logits
from finetune.export.llama import PROJECTIONS, llama_config, llama_reader
from finetune.export.tensors import CheckFailed, Lora, TensorSource, read_lora


def split_lora(lora: Lora) -> Lora:
    """W_pack 的 B 的行按 q、k、v 切开，A 共用；别的模块原样。"""
    result: Lora = {}
    for module, (lora_a, lora_b, scaling) in lora.items():
        parts = zip(PROJECTIONS, lora_b.chunk(3), strict=True) if module.endswith("W_pack") else [("W_pack", lora_b)]
        result |= {module.replace("W_pack", name): (lora_a, part, scaling) for name, part in parts}
    return result


def pack_lora(lora: Lora) -> Lora:
    """q、k、v 的（可以缺）合成 W_pack 的：A 上下相接，B 是分块对角；三个的 A 相同时秩不变。"""
    result: Lora = {}
    for module in lora:
        prefix, _, name = module.rpartition(".")
        packed = f"{prefix}.W_pack"
        if name not in PROJECTIONS:
            result[module] = lora[module]
        elif packed not in result:
            parts = {i: lora[f"{prefix}.{p}"] for i, p in enumerate(PROJECTIONS) if f"{prefix}.{p}" in lora}
            result[packed] = _packed(parts)
    return result


def _packed(parts: dict[int, tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float]:
    """q、k、v（0、1、2）里有的那些 → W_pack 的 (A, B, 缩放)。"""
    sides_a, sides_b, scalings = zip(*parts.values(), strict=True)
    if len(parts) == 3 and all(torch.equal(side, sides_a[0]) for side in sides_a) and len(set(scalings)) == 1:
        return sides_a[0], torch.cat(sides_b), scalings[0]
    scaling, width = scalings[0], len(sides_b[0])
    lora_b = torch.zeros(3 * width, sum(map(len, sides_a)))
    column = 0
    for index, (lora_a, part, own) in parts.items():
        lora_b[index * width : (index + 1) * width, column : column + len(lora_a)] = part * (own / scaling)
        column += len(lora_a)
    return torch.cat(sides_a), lora_b, scaling


def write_lora(lora: Lora, config: BaichuanConfig, directory: Path, base: str | None):
    """写成 peft 的适配器；秩、缩放与多数不同的模块写在 rank_pattern、alpha_pattern 里。"""

    def alpha(rank: int, scaling: float) -> float:
        exact = scaling * rank
        return round(exact) if abs(exact - round(exact)) < 1e-9 * exact else exact

    kinds = {module: (len(lora_a), alpha(len(lora_a), scaling)) for module, (lora_a, _, scaling) in lora.items()}
    (rank, common), _ = Counter(kinds.values()).most_common(1)[0]
    names = {module.rpartition(".")[2] for module in lora}
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=common,
        rank_pattern={module: found for module, (found, _) in kinds.items() if found != rank},
        alpha_pattern={module: found for module, (_, found) in kinds.items() if found != common},
        target_modules=sorted(names if len(lora) == len(names) * config.num_hidden_layers else lora),
        inference_mode=True,
    ).save_pretrained(directory)
    tensors = {
        f"{PREFIX}{module}.lora_{side}.weight": tensor.contiguous().clone()
        for module, (*sides, _) in lora.items()
        for side, tensor in zip("AB", sides, strict=True)
    }
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})


def check_lora_layouts(
    source: TensorSource, packed: Path | Lora, split: Path | Lora, prompts: list[list[int]]
) -> Comparison:
    """两种布局的适配器各加在同一个基座上（q、k、v 的由 transformers 的 Llama 算），logits 相同；目录是刚写出的。

    Raises:
        CheckFailed: 不相同。
    """
    llama = LlamaConfig.from_dict(llama_config(source.config, torch.float32))
    if isinstance(packed, Path):
        packed, _ = read_lora(packed, source.config)
    if isinstance(split, Path):
        split, _ = read_lora(split, llama)
    ours = streamed_logits(source.config, source.read_base, prompts, packed)
    theirs = streamed_logits(llama, llama_reader(source), prompts, split)
    comparison = compare_logits(ours, theirs)
    if not comparison.max_difference <= EXACT_TOLERANCE * max(1.0, comparison.max_logit):
        raise CheckFailed(f"两种布局的适配器算出的 logits 不同：{comparison}")
    return comparison
