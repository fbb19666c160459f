"""LlamaForCausalLM 布局的目录（7B）：W_pack 拆成 q、k、v，词表投影已归一化。"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from baichuan import BaichuanConfig, BaichuanTokenizer
from finetune.checkpoint.inspection import Checkpoint
from finetune.export.fast_tokenizer import write_fast_tokenizer
from finetune.export.tensors import (
    ALL_ROWS,
    TensorSource,
    WeightDirectory,
    dtype_name,
    normalized_head,
    write_tensors,
)
from utils import read_json, write_json

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def llama_config(config: BaichuanConfig, dtype: torch.dtype) -> dict:
    """LlamaForCausalLM 的 config.json。"""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.trained_length,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_attention_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype_name(dtype),
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def llama_reader(source: TensorSource) -> Callable[..., Tensor]:
    """基座的张量，按 Llama 的名字：W_pack 的一段是 q、k 或 v，词表投影已归一化，fp32。"""

    def read(name: str, rows: slice = ALL_ROWS) -> Tensor:
        for index, projection in enumerate(PROJECTIONS):
            if projection in name:
                return source.read_base(name.replace(projection, "W_pack")).chunk(3)[index][rows].float()
        return normalized_head(source.config, name, source.read_base(name, rows).float())

    return read


def write_llama(
    checkpoint: Checkpoint, source: TensorSource, tokenizer: BaichuanTokenizer, directory: Path, dtype: torch.dtype
):
    """LlamaForCausalLM 的目录：W_pack 拆成 q、k、v，词表投影已归一化，快速分词器带对话模板。"""
    config = source.config

    def convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name.endswith("W_pack.weight"):
            names = [name.replace("W_pack", projection) for projection in PROJECTIONS]
            return dict(zip(names, tensor.chunk(3), strict=True))
        return {name: normalized_head(config, name, tensor)}

    write_json(directory / "config.json", llama_config(config, dtype))
    generation_path = checkpoint.base_path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    special["pad_token_id"] = config.pad_token_id
    generation = {key: value for key, value in generation.items() if key != "_from_model_config"}
    write_json(directory / "generation_config.json", {**special, **generation})
    write_fast_tokenizer(tokenizer, checkpoint.prompting, directory, config.trained_length)
    write_tensors(source, directory, dtype, convert)


class LlamaDirectory(WeightDirectory):
    """读回 LlamaForCausalLM 目录的张量，名字还原成官方的。"""

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """官方名字 → 张量的这些行；W_pack 由 q、k、v 拼回。"""
        if name.endswith("W_pack.weight"):
            return torch.cat([super(LlamaDirectory, self).read(name.replace("W_pack", p)) for p in PROJECTIONS])[rows]
        return super().read(name, rows)
