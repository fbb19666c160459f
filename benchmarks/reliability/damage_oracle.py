"""损坏战役的独立判断：不用项目的读取代码，另写一遍「这份文件是否还合法、结构是否还与原来相同」。"""

import json
from pathlib import Path
from typing import Any

import torch

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# 官方布局里没有冗余的键：少了它们，config.json 就成了另一种合法的结构
STRUCTURE_KEYS = ("max_position_embeddings", "model_max_length", "norm_head")


# ---- 数据 ----


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("重复的键")
    return dict(pairs)


def _refuse(name: str) -> None:
    raise ValueError(name)


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)


def data_messages(content: bytes) -> list[tuple] | None:
    """数据文件里各行的消息；有任何一行不合法，或没有样本，返回 None。"""
    try:
        text = content.decode("utf-8-sig")
        if "\0" in text or not text.strip():
            return None
        if text.lstrip("\r\n\t ").startswith("["):
            rows = _parse(text)
        else:
            rows = [_parse(line) for line in text.split("\n") if line.strip()]
        return [_row_messages(row) for row in rows] or None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _row_messages(row: dict[str, Any]) -> tuple:
    if "conversations" not in row:
        instruction, text, output = row.get("instruction", ""), row.get("input", ""), row["output"]
        messages = (("user", instruction + text), ("assistant", output))
        if not (instruction.strip() or text.strip()):
            raise ValueError("空的输入")
    else:
        if {"instruction", "input", "output"} & row.keys():
            raise ValueError("混用")
        messages = tuple(
            (ROLES[turn["role"]], turn["content"]) if "role" in turn else (ROLES[turn["from"]], turn["value"])
            for turn in row["conversations"]
        )
        talk = messages[1:] if messages[0][0] == "system" else messages
        if not talk or len(talk) % 2 or [role for role, _ in talk] != ["user", "assistant"] * (len(talk) // 2):
            raise ValueError("次序")
        if any(role == "user" and not text.strip() for role, text in talk):
            raise ValueError("空的用户消息")
    for _, text in messages:
        text.encode()  # 半个代理字符在这里抛 UnicodeEncodeError
    return messages


# ---- JSON ----


def _shape(node: Any) -> Any:
    """JSON 的骨架：键与类型，不含值；整数与小数同类，长度不同的数组不同。"""
    if isinstance(node, dict):
        return {key: _shape(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_shape(value) for value in node]
    return "number" if isinstance(node, (int, float)) and not isinstance(node, bool) else type(node).__name__


def judge_json(original: Path, damaged: Path, optional_keys: bool = False) -> tuple[str, str]:
    """被接受、而内容已变的 JSON：骨架不变只是值变了，算仍然合法；optional_keys 时少几个键也合法。"""
    before = json.loads(original.read_bytes())
    try:
        after = _parse(damaged.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return "failed", f"不合法的 JSON 被接受：{error}"
    optional = STRUCTURE_KEYS if not optional_keys else None
    difference = _difference(_shape(before), _shape(after), optional)
    return (
        ("failed", f"结构性的损坏被悄悄接受：{difference}")
        if difference
        else ("well_formed", "只有值变了，或少了可缺的键")
    )


def _difference(before: Any, after: Any, optional: tuple[str, ...] | None) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        if added := after.keys() - before.keys():
            return f"多出 {sorted(added)}"
        missing = [key for key in before.keys() - after.keys() if optional is not None and key not in optional]
        if missing:
            return f"缺少 {sorted(missing)}"
        return next((d for key in after if (d := _difference(before[key], after[key], optional))), "")
    is_auto = optional is None and isinstance(before, str) and sorted((before, str(after))) == ["number", "str"]
    return "" if before == after or is_auto else f"{before} 变成 {after}"  # "auto" 可以换成具体的数


# ---- 外来的检查点 ----


def judge_foreign(original: Path, damaged: Path) -> tuple[str, str]:
    """被接受、而读出的内容已变的外来文件：结构与原来相同才算仍然合法。"""
    if not damaged.is_file():
        if original.name in ("generation_config.json", "tokenizer_config.json"):
            return "well_formed", "这个文件可以没有（基座模型就没有）"
        return "failed", "缺了文件却被接受"
    if original.suffix == ".json":
        return judge_json(original, damaged)
    structure = {".safetensors": _safetensors, ".bin": _torch_file, ".model": _sentencepiece}[original.suffix]
    try:
        same = structure(original) == structure(damaged)
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        return "failed", f"独立的解析读不出这个文件：{error}"
    return ("well_formed", "结构与原来相同，只有值变了") if same else ("failed", "结构变了却被接受")


def _safetensors(path: Path) -> Any:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    return {name: {k: v for k, v in entry.items() if k != "data_offsets"} for name, entry in header.items()}, len(
        content
    ) - size


def _torch_file(path: Path) -> Any:
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return {name: (tuple(tensor.shape), tensor.dtype, tensor.stride()) for name, tensor in tensors.items()}


def _sentencepiece(path: Path) -> list[tuple[int, int]]:
    """protobuf 顶层各字段的 (编号, 次数)：片段数不变，训练与规范化的设置都在。"""
    content, at, counts = path.read_bytes(), 0, {}

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(content):
        tag = varint()
        number, wire = tag >> 3, tag & 7
        if wire == 2:
            at += varint()
        elif wire == 0:
            varint()
        else:
            at += {1: 8, 5: 4}[wire]
        counts[number] = counts.get(number, 0) + 1
    if at != len(content):
        raise ValueError("最后一个字段越过了文件末尾")
    return sorted(counts.items())
