"""--from llama：Llama 布局的 Baichuan（LLaMAfied 的 7B）与它的 LoRA，变成官方布局。"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from baichuan import BaichuanConfig, BaichuanTokenizer
from finetune.checkpoint.config_check import fixed_problems, model_config_problems
from finetune.checkpoint.inspection import inspect_checkpoint
from finetune.checkpoint.manifest import write_manifest
from finetune.checkpoint.output_dir import ADAPTER_CONFIG
from finetune.checkpoint.weights import check_weights
from finetune.data.prompting import resolve_prompt_format
from finetune.export.check import Comparison, check_export, encode_check_prompts
from finetune.export.llama import LlamaDirectory, llama_config
from finetune.export.llama_lora import check_lora_layouts, pack_lora, write_lora
from finetune.export.tensors import (
    ALL_ROWS,
    TensorSource,
    WeightDirectory,
    dtype_name,
    official_config,
    read_lora,
    resolve_dtype,
    staged_directory,
    write_tensors,
)
from utils import read_json, shown, write_json

# 两种布局的 config.json 意思相同的键
KEPT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
KEPT += ("max_position_embeddings", "rms_norm_eps", "initializer_range", "use_cache", "tie_word_embeddings")
KEPT += ("bos_token_id", "eos_token_id", "pad_token_id")


def from_llama(
    model_path: str | Path, output_dir: str | Path, dtype: str, base_model_path: str | Path | None, texts: Any
) -> Comparison:
    """转换并核对，返回 Llama 布局与官方布局的 logits 之差；参数同 export。

    Raises:
        ValueError: 不是 Baichuan 的 Llama 布局，或缺少分词器、基座；CheckFailed: 核对不过，不留下 output_dir。
    """
    path = Path(model_path)
    if not (path / ADAPTER_CONFIG).is_file():
        return _whole_model(path, output_dir, dtype, base_model_path, texts)
    if base_model_path is None or dtype != "auto":
        raise ValueError(f"{path} 是适配器：请用 --base_model_path 给出官方布局的基座，不写 --dtype（总是 float32）")
    base = inspect_checkpoint(base_model_path)
    if base.is_adapter or base.config.position_embedding != "rope":
        raise ValueError(f"--base_model_path {base_model_path} 应是完整的 7B：13B 的 ALiBi 不是 Llama 的结构")
    lora, magnitudes = read_lora(path, LlamaConfig.from_dict(llama_config(base.config, torch.float32)))
    if magnitudes:
        raise ValueError(f"{path} 是 DoRA：q、k、v 各行的大小要连同基座才能换布局，请在原来的工具里合并之后再转换")
    prompts = encode_check_prompts(base.prompting, BaichuanTokenizer.from_pretrained(base.path), texts)
    with staged_directory(output_dir) as directory:
        write_lora(pack_lora(lora), base.config, directory, str(base_model_path))
        comparison = check_lora_layouts(TensorSource(base), directory, lora, prompts)
        write_manifest(directory, 0)
    return comparison


def _whole_model(
    path: Path, output_dir: str | Path, dtype: str, base_model_path: str | Path | None, texts: Any
) -> Comparison:
    source = LlamaSource(path)
    places = [place for place in (path, base_model_path) if place and (Path(place) / "tokenizer.model").is_file()]
    if not places:
        raise ValueError(f"{path} 里没有 tokenizer.model，请用 --base_model_path 给出一个有它的官方目录")
    tokenizer = BaichuanTokenizer.from_pretrained(places[0])
    if len(tokenizer) > source.baichuan.vocab_size:
        raise ValueError(f"{places[0]} 的分词器有 {len(tokenizer)} 个词，{path} 只有 {source.baichuan.vocab_size} 行")
    prompting = resolve_prompt_format("auto", path, source.baichuan)
    prompts = encode_check_prompts(prompting, tokenizer, texts)
    target_dtype = resolve_dtype(dtype, source)
    with staged_directory(output_dir) as directory:
        tokenizer.save_pretrained(directory)
        if (path / "generation_config.json").is_file():
            shutil.copyfile(path / "generation_config.json", directory / "generation_config.json")
        raw = {name: getattr(source.baichuan, name) for name in (*KEPT, "model_type", "hidden_act")}
        write_json(directory / "config.json", official_config(raw, source.baichuan, target_dtype))
        write_tensors(source, directory, target_dtype, lambda name, tensor: {name: tensor})
        kind = dtype_name(target_dtype)
        comparison = check_export(source, source.baichuan, WeightDirectory(directory).read, prompts, kind)
        write_manifest(directory, 0)
    return comparison


class LlamaSource:
    """Llama 布局的目录，同 TensorSource：read 按官方名字，read_base 按 Llama 的名字（核对时由 Llama 的层来算）。

    词表投影在 Llama 布局里没有 NormHead，转换之后也没有（norm_head=false），函数才不变。

    Raises:
        ValueError: 结构不是 Baichuan-7B 与 Baichuan2-7B 的，指出哪一项；或权重与 config.json 不符。
    """

    def __init__(self, path: Path):
        raw = read_json(path / "config.json")
        problems = structure_problems(raw)
        if problems:
            raise ValueError(f"{path / 'config.json'} 不是 Llama 布局的 Baichuan：{'；'.join(problems)}")
        self.config = LlamaConfig.from_dict(raw)
        self.config.norm_head, self.lora, self.magnitudes = False, {}, {}
        with torch.device("meta"):
            skeleton = LlamaForCausalLM(self.config)
        check_weights(path, {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()})
        self._weights = LlamaDirectory(path)
        self.read_base = self._weights.read
        self.dtype = self.read_base("lm_head.weight").dtype
        self.names = [
            name.replace("q_proj", "W_pack")
            for name, _ in skeleton.named_parameters()
            if not name.endswith(("k_proj.weight", "v_proj.weight"))
        ]
        shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        packed = (3 * self.config.hidden_size, self.config.hidden_size)
        self.shapes = {name: shapes.get(name, packed) for name in self.names}
        values = {name: getattr(self.config, name) for name in KEPT}
        self.baichuan = BaichuanConfig(**values, position_embedding="rope", norm_head=False)

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """官方名字的张量的这些行，fp32。"""
        return self._weights.read(name, rows).float()


def structure_problems(raw: Any) -> list[str]:
    """Llama 的 config.json 里 Baichuan 没有的结构。"""
    if not isinstance(raw, dict) or raw.get("model_type") != "llama":
        return [f"model_type 是 {shown(raw.get('model_type') if isinstance(raw, dict) else raw)}，应为 llama"]
    return [*model_config_problems(raw), *fixed_problems(raw)]
