"""--add_tokens：词表之外的新词。每个新词在词嵌入与词表投影各有一行，与方法一起训练，词表原有的行不动。

一行的起点是它代替的片段的平均。适配器检查点把这些行存成 added_rows.safetensors，完整模型的直接接进两个张量；
两种都有 added_tokens.json。
"""

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer
from finetune.checkpoint.options import read_words
from finetune.checkpoint.output_dir import RUN_CONFIG
from finetune.checkpoint.weights import WeightFile, model_files
from finetune.methods.registry import is_added
from utils import read_json

ROWS_FILE = "added_rows.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class AddedRows(NamedTuple):
    """新词的行：从 first 号起，官方张量名 → [n, H]；词表投影的是归一化之前的。"""

    first: int
    rows: dict[str, Tensor]

    @property
    def end(self) -> int:
        """最后一个新词的下一号。"""
        return self.first + len(self.rows.get(EMBEDDING, ()))

    def grown(self, config: BaichuanConfig) -> BaichuanConfig:
        """接上新词之后的配置；config 是基座的。"""
        result = copy.deepcopy(config)
        result.vocab_size = max(config.vocab_size, self.end)
        return result

    def grow(self, name: str, tensor: Tensor) -> Tensor:
        """官方名字的张量接上（或换成）新词的行；别的张量原样。"""
        if name not in self.rows:
            return tensor
        rows = self.rows[name]
        return torch.cat([tensor[: self.first], rows, tensor[self.first + len(rows) :]])

    def attach(self, model: BaichuanForCausalLM, dtype: torch.dtype, device: torch.device):
        """放进模型，成为两个参数。"""
        model.add_rows(self.first, *(self.rows[name].to(device=device, dtype=dtype) for name in (EMBEDDING, HEAD)))

    def save(self, directory: Path):
        """写成 added_rows.safetensors；没有新词时不写。"""
        if not self.rows:
            return
        save_file({"ids": torch.arange(self.first, self.end), **self.rows}, directory / ROWS_FILE, {"format": "pt"})


def rows_in(module: nn.Module) -> dict[str, nn.Parameter]:
    """模型里新词的两个参数：官方张量名 → 参数；没有加过新词时为空。"""
    return {
        name.removeprefix("base_model.model.").replace("added_rows", "weight"): parameter
        for name, parameter in module.named_parameters()
        if is_added(name)
    }


def read_rows(path: Path, config: BaichuanConfig) -> AddedRows | None:
    """适配器检查点里的新词；没有时为 None。config 是基座的。

    Raises:
        ValueError: run_config.json 说有而文件不在，或文件损坏、与基座不相配。
    """
    recorded = read_json(path / RUN_CONFIG).get("added_tokens") if (path / RUN_CONFIG).is_file() else None
    if not (path / ROWS_FILE).is_file():
        if recorded:
            raise ValueError(f"{path} 训练过 {len(recorded)} 个新词，却没有 {ROWS_FILE}：检查点不完整，请换一个")
        return None
    file = WeightFile(path / ROWS_FILE)
    ids = file.read("ids").tolist() if "ids" in file.names else []
    shapes = {name: file.shape(name) for name in file.names - {"ids"}}
    is_run = bool(ids) and ids == list(range(ids[0], ids[0] + len(ids))) and ids[0] <= config.vocab_size
    if not is_run or shapes != dict.fromkeys((EMBEDDING, HEAD), (len(ids), config.hidden_size)):
        raise ValueError(f"{path / ROWS_FILE} 与基座不相配（ids {ids[:3]}，{shapes}），请检查基座是不是训练时的那个")
    return AddedRows(ids[0], {name: file.read(name) for name in (EMBEDDING, HEAD)})


def add_words(tokenizer: BaichuanTokenizer, path: str | None) -> BaichuanTokenizer:
    """把 --add_tokens 的新词接在分词器的末尾，编号连续。

    Raises:
        ValueError: 有的词本来就是一个 token（文件:行）。
    """
    words = read_words(path)
    problems = [
        f"{path}:{line}: {word!r} 本来就是一个 token（{ids[0]} 号），请去掉"
        for word, line in words.items()
        if len(ids := tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))) == 1
    ]
    if problems:
        raise ValueError("\n".join(problems[:10]))
    tokenizer.add_tokens(list(words))
    return tokenizer


def first_rows(base: str | Path, config: BaichuanConfig, tokenizer: BaichuanTokenizer, words: list[str]) -> AddedRows:
    """训练的起点：每个新词是它代替的片段的平均，由基座的文件读出那几行；tokenizer 里还没有这些词。

    NormHead 只用各行的方向：取各片段方向的平均，长度取它们的平均长度（优化器的步长与别的行相称）。
    """
    files = {name: file for file in model_files(base) for name in file.names}
    width = config.hidden_size
    pieces = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word)) for word in words]

    def row(name: str, ids: list[int]) -> Tensor:
        found = torch.stack([files[name].read_flat(name, i * width, (i + 1) * width) for i in ids]).float()
        if name == EMBEDDING or not config.norm_head:
            return found.mean(0)
        direction = nn.functional.normalize(found).mean(0)
        return nn.functional.normalize(direction, dim=0) * found.norm(dim=1).mean()

    return AddedRows(
        len(tokenizer), {name: torch.stack([row(name, ids) for ids in pieces]) for name in (EMBEDDING, HEAD)}
    )
