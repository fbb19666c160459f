"""检查点的 config.json 与 tokenizer.model 的检查：transformers 与 sentencepiece 悄悄接受残缺的文件。"""

import difflib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.checkpoint.output_dir import ADAPTER_CONFIG, checkpoints_below
from utils import is_number, read_json, shown

CONFIG_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
CONFIG_LENGTHS = ("max_position_embeddings", "model_max_length")
CONFIG_TOKENS = ("bos_token_id", "eos_token_id")
CONFIG_NUMBERS = ("rms_norm_eps", "initializer_range", "z_loss_weight")
DTYPES = ("float32", "float16", "bfloat16")
CONFIG_SWITCHES = ("norm_head", "tie_word_embeddings", "use_cache")
STRUCTURE_KEYS = {*CONFIG_LENGTHS, "norm_head", "position_embedding", "z_loss_weight"}


def check_config_file(path: Path) -> None:
    """检查点目录里有 config.json，键与值都对；不载入 transformers。

    Raises:
        ValueError: 目录或 config.json 不在，不是 baichuan，或内容损坏。
    """
    if not (path / "config.json").is_file():
        below, adapters = checkpoints_below(path), checkpoints_below(path, ADAPTER_CONFIG)
        if not below and (adapters or (path / ADAPTER_CONFIG).is_file()):
            raise ValueError(
                f"--model_name_or_path {path} 里是适配器{adapters}，不是完整的模型："
                "请用 --adapter_path 给出它，--model_name_or_path 给出它的基座；或先合并"
            )
        raise ValueError(f"--model_name_or_path {path} 里没有 config.json{below}，请给出 Baichuan 检查点的本地目录")
    content = read_json(path / "config.json")
    kind = content.get("model_type", "baichuan") if isinstance(content, dict) else "baichuan"
    if kind != "baichuan":
        remedy = "；Llama 布局的 Baichuan 请先用 scripts/export.py --from llama --to baichuan 转换"
        remedy = remedy if kind == "llama" else ""
        raise ValueError(f"{path / 'config.json'} 的 model_type 是 {kind!r}，本项目只训练 baichuan{remedy}")
    problems = model_config_problems(content)
    if problems:
        raise ValueError(f"{path / 'config.json'} 损坏，请重新下载：{'；'.join(problems)}")
    problems = fixed_problems(content)
    if problems:
        raise ValueError(f"{path / 'config.json'} 写的不是 Baichuan 的结构，本项目不会照它算：{'；'.join(problems)}")


def model_config_problems(content: Any) -> list[str]:
    """config.json 的问题：尺寸的键都要在且为正整数，其余认识的键类型要对，没有像是写错的键。"""
    if not isinstance(content, dict):
        return [f"应为 JSON 对象 {{…}}，实际是 {shown(content)}"]
    problems = [f"缺少 {name}" for name in (*CONFIG_SIZES, "rms_norm_eps") if name not in content]
    rules = [
        (CONFIG_SIZES, lambda value: type(value) is int and 1 <= value < 10**9, "1 到 10^9 的整数"),
        (CONFIG_LENGTHS, lambda value: value is None or (type(value) is int and 1 <= value < 10**9), "正整数"),
        (CONFIG_TOKENS, _is_token, "不小于 0 的整数"),
        (("pad_token_id",), lambda value: value is None or type(value) is int, "整数"),
        (CONFIG_NUMBERS, lambda value: is_number(value) and 0 <= value < 1e6, "不小于 0 的数"),
        (("torch_dtype", "dtype"), lambda value: value is None or value in DTYPES, "、".join(DTYPES)),
        (CONFIG_SWITCHES, lambda value: value is None or isinstance(value, bool), "true 或 false"),
    ]
    for names, is_valid, expected in rules:
        wrong = [name for name in names if name in content and not is_valid(content[name])]
        problems += [f"{name} 应为{expected}，实际是 {shown(content[name])}" for name in wrong]
    for name in content.keys() - STRUCTURE_KEYS:
        # 这几个键决定结构，没有就按缺省读：写错一个字母，模型会悄悄变样
        alike = [known for known in sorted(STRUCTURE_KEYS) if known not in content and _is_alike(name, known)]
        problems += [f"{name} 不是认识的键，像是 {alike[0]} 写错了"] if alike else []
    return problems


def fixed_problems(content: dict[str, Any]) -> list[str]:
    """结构里 Baichuan 固定的几项写成了别的：别的实现会照着算，这里不会；Llama 布局的 config.json 也这样查。"""
    heads, width = content.get("num_attention_heads"), content.get("hidden_size")
    rope = content.get("rope_parameters") or {}
    expected = {
        "hidden_act": "silu",
        "num_key_value_heads": heads,
        "head_dim": width // heads if is_number(heads) and heads and is_number(width) else None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "output_attentions": False,
        "rope_theta": 10000,
        "rope_scaling": None,
    }
    values = {"rope_theta": rope.get("rope_theta"), **content}
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = rope
    return [
        f"{name} 是 {shown(values[name])}，应为 {shown(value)}"
        for name, value in expected.items()
        if values.get(name) not in (None, value)
    ]


def tokenizer_model_problems(content: bytes) -> list[str]:
    """tokenizer.model 的问题：sentencepiece 会接受截断在字段边界上的、混进别的字段的文件，只是少了片段或规范化的规则。

    顶层的字段应是：1 片段（许多）、2 训练设置、3 规范化（各一份），4、5 可有可无；各字段恰好排满整个文件。
    """
    try:
        counts = Counter(_protobuf_fields(content))
    except (ValueError, IndexError) as error:
        return [f"不是完整的 sentencepiece 模型（{error}）"]
    problems = [f"有不认识的字段 {number}" for number in sorted(counts.keys() - {1, 2, 3, 4, 5})]
    problems += [
        f"{name}应有一份，实际有 {counts[n]} 份" for n, name in ((2, "训练设置"), (3, "规范化规则")) if counts[n] != 1
    ]
    return problems


def _protobuf_fields(content: bytes) -> Iterator[int]:
    """protobuf 顶层各字段的编号；不都是带长度的字段，或越过了末尾，抛 ValueError 或 IndexError。"""
    at = 0
    while at < len(content):
        numbers = []
        for _ in range(2):  # 标签与长度，都是变长整数
            value = shift = 0
            while True:
                byte = content[at]
                at += 1
                value |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
            numbers.append(value)
        tag, length = numbers
        if tag & 7 != 2:
            raise ValueError(f"第 {at} 字节处的字段类型是 {tag & 7}")
        at += length
        yield tag >> 3
    if at != len(content):
        raise ValueError("最后一个字段越过了文件末尾")


def _is_token(value: Any) -> bool:
    values = value if isinstance(value, list) and value else [value]
    return all(type(token) is int and 0 <= token < 10**9 for token in values)


def _is_alike(name: str, known: str) -> bool:
    return difflib.SequenceMatcher(None, name.lower(), known).ratio() > 0.85
