"""把训练器写出的任何检查点（完整模型或适配器）读成可以推理的模型；不认识训练。

先 inspect_checkpoint：只读几个 JSON，找到基座并核对哈希，查出全部用法错误；再读分词器与权重。
"""

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, PeftModelForCausalLM, set_peft_model_state_dict
from torch import nn

from baichuan import BaichuanConfig, BaichuanTokenizer
from finetune.checkpoint.adapter import AdapterFile, adapter_weights, check_adapter, read_adapter_config
from finetune.checkpoint.added_tokens import AddedRows, read_rows
from finetune.checkpoint.base_model import load_base_model, load_config, load_tokenizer
from finetune.checkpoint.manifest import MANIFEST, hash_files
from finetune.checkpoint.output_dir import ADAPTER_CONFIG, RUN_CONFIG, choose_checkpoint
from finetune.checkpoint.weights import weight_files
from finetune.data.prompting import Prompting, requested_prompting, resolve_prompt_format
from utils import read_json

WEIGHT_FILE = re.compile(r"\.(bin|safetensors)(\.index\.json)?$")


class Checkpoint(NamedTuple):
    """一个检查点的全部说明，不含权重。"""

    path: Path
    base_path: Path  # 完整检查点是它自己，适配器是基座
    is_adapter: bool
    run_config: dict[str, Any]  # 没有 run_config.json（官方或合并后的检查点）时为空
    config: BaichuanConfig
    prompting: Prompting  # 提示词格式、族与角色 id
    added: AddedRows | None = None  # 适配器训练过的新词（--add_tokens）；config 的词表里没有它们

    @property
    def grown_config(self) -> BaichuanConfig:
        """接上新词之后的配置。"""
        return self.config if self.added is None else self.added.grown(self.config)

    @property
    def context_length(self) -> int:
        """模型训练时的上下文长度。"""
        lengths = (getattr(self.config, name, None) for name in ("model_max_length", "max_position_embeddings"))
        return next((length for length in lengths if length), 4096)


def inspect_checkpoint(
    path: str | Path,
    base_model_path: str | Path | None = None,
    prompt_format: str = "auto",
    any_base: bool = False,
) -> Checkpoint:
    """读检查点的各个 JSON，找到并核对基座，适配器的张量与它相配；不读权重张量。

    base_model_path：基座移动过时的新位置。基座的 config.json 与权重文件的 SHA-256 必须与训练时记下的一致，
    除非 any_base（有意把适配器放在别的基座上）。path 可以是训练的输出目录，见 choose_checkpoint。
    prompt_format="auto"：取 run_config.json 记下的；没有时看 generation_config.json 有没有角色 id。
    目录不对、文件缺失、基座找不到或被换过时抛 ValueError。
    """
    path = choose_checkpoint(path)
    is_adapter = (path / ADAPTER_CONFIG).is_file()
    run_config = read_json(path / RUN_CONFIG) if (path / RUN_CONFIG).is_file() else {}
    if is_adapter:
        adapter_weights(path)  # 缺少时抛 ValueError
        base_path = find_base_model(path, run_config, base_model_path)
        differing = [] if any_base else base_differences(base_path, run_config)
        if differing:
            raise ValueError(
                f"基座 {base_path} 与训练时的不是同一个：{'、'.join(differing[:5])}（共 {len(differing)} 个文件）；"
                "请用 --base_model_path 给出训练时的基座"
            )
    else:
        if base_model_path is not None:
            raise ValueError(f"{path} 是完整的模型，不需要基座，请去掉 --base_model_path {base_model_path}")
        base_path = path
    weight_files(base_path)  # 缺少权重文件或分片时抛 ValueError
    config = load_config(base_path)
    added = None
    if is_adapter:
        check_adapter(path, config)
        added = read_rows(path, config)
    prompting = find_prompting(base_path, run_config, config, prompt_format)
    return Checkpoint(path, base_path, is_adapter, run_config, config, prompting, added)


def find_base_model(path: Path, run_config: dict[str, Any], base_model_path: str | Path | None) -> Path:
    """适配器的基座目录：先 --base_model_path，再训练时给的路径，再它的绝对路径；都没有时抛 ValueError。"""
    recorded = run_config.get("base_model") or {}
    if base_model_path is not None:
        candidates = [base_model_path]
    else:
        adapter_base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        candidates = [recorded.get("path"), recorded.get("absolute_path"), adapter_base]
    tried = list(dict.fromkeys(str(candidate) for candidate in candidates if candidate))
    for candidate in tried:
        if (Path(candidate) / "config.json").is_file():
            return Path(candidate)
    remedy = "请检查这个路径" if base_model_path is not None else "基座移动过的话，请用 --base_model_path 给出新位置"
    raise ValueError(f"找不到适配器 {path} 的基座（找过：{'、'.join(tried) or '没有记录'}），{remedy}")


def base_differences(base_path: Path, run_config: dict[str, Any]) -> list[str]:
    """基座与训练时的不同之处：config.json 与权重文件同记下的 SHA-256 逐一比较（各文件并行），返回不同的文件。"""
    hashes = (run_config.get("base_model") or {}).get("hashes") or {}
    names = [name for name in sorted(hashes) if name == "config.json" or WEIGHT_FILE.search(name)]

    present = [name for name in names if (base_path / name).is_file()]
    found = dict(zip(present, hash_files([base_path / name for name in present]), strict=True))
    return [
        f"{name}（不存在）" if name not in found else f"{name}（内容不同）"
        for name in names
        if found.get(name) != hashes[name]
    ]


def weights_fingerprint(checkpoint: Checkpoint) -> str:
    """检查点（与它的基座）权重的指纹，不读权重：有清单的取清单，没有的取各文件的名字、大小与修改时间。"""
    digest = hashlib.sha256()
    for directory in dict.fromkeys((checkpoint.path, checkpoint.base_path)):
        if (directory / MANIFEST).is_file():
            digest.update((directory / MANIFEST).read_bytes())
            continue
        for path in sorted(path for path in directory.iterdir() if WEIGHT_FILE.search(path.name)):
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def find_prompting(
    base_path: Path, run_config: dict[str, Any], config: BaichuanConfig, prompt_format: str
) -> Prompting:
    """检查点的提示方式：训练时记下的；没有记录时由 generation_config.json 决定。prompt_format 不是 auto 时以它为准。"""
    recorded = {name: run_config[name] for name in Prompting._fields if name in run_config}
    prompting = resolve_prompt_format("auto", base_path, config)._replace(**recorded)
    return requested_prompting(prompting, prompt_format)


def load_checkpoint_tokenizer(checkpoint: Checkpoint) -> BaichuanTokenizer:
    """检查点的分词器；适配器目录里没有时用基座的。与词表不相配时抛 ValueError。"""
    has_tokenizer = (checkpoint.path / "tokenizer.model").is_file()
    path = checkpoint.path if has_tokenizer else checkpoint.base_path
    tokenizer = load_tokenizer(path, checkpoint.grown_config.vocab_size)
    if checkpoint.added is not None and len(tokenizer) != checkpoint.added.end:
        raise ValueError(
            f"{checkpoint.path} 训练过新词，到 {checkpoint.added.end - 1} 号为止，分词器却有 {len(tokenizer)} 个词："
            "added_tokens.json 不完整，请换一个检查点"
        )
    return tokenizer


def load_checkpoint_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, quantization: str | None = None
) -> nn.Module:
    """读权重，返回评估模式、全部冻结的模型；适配器是 PeftModel，没有合并。

    quantization：4bit、8bit，见 quantization.py；None 为不量化。权重文件损坏或与 config.json 不符时抛 ValueError。
    """
    model = load_base_model(checkpoint.base_path, checkpoint.config, dtype, device, quantization=quantization)
    if checkpoint.added is not None:
        checkpoint.added.attach(model, dtype, device)
    if checkpoint.is_adapter:
        return attach_adapter(model, checkpoint, dtype, device)
    return model.requires_grad_(False).eval()


def attach_adapter(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, name: str = "default"
) -> PeftModel:
    """在模型上再挂一个适配器，名为 name；返回评估模式、全部冻结的 PeftModel。

    适配器损坏，或与模型不相配时抛 ValueError。
    """
    config, state = read_adapter_config(checkpoint.path), AdapterFile(checkpoint.path).read_all()
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            # 与训练时一样不把适配器升到 fp32，logits 才与训练时相同
            model = PeftModelForCausalLM(model, config, name, autocast_adapter_dtype=False)
        set_peft_model_state_dict(model, state, name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"适配器 {checkpoint.path} 损坏，或与基座 {checkpoint.base_path} 不相配：{error}") from error
    model.to(device=device, dtype=dtype)
    return model.requires_grad_(False).eval()
