"""比较所用的数据：按文档拆出测试、验证、预训练与训练的行，核对没有泄漏，按 token 数取训练行；不认识模型。"""

import json
import random
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.documents import near_groups, plain_text
from finetune.data.samples import read_samples
from utils import replacing

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


class Parts(NamedTuple):
    """一个任务的四份行，文档互不相同。"""

    test: list[Row]  # 一个文档一行，output 是它全部的参考答案
    dev: list[Row]  # 「训练文件里留出的一份」：只用来选学习率
    pretrain: list[Row]  # 基座预训练时见过的格式
    train: list[Row]


def document_text(row: Row) -> str:
    """一行所属的文档：input（没有时用 instruction）NFKC 规范化，去掉全部空白。"""
    return plain_text(row.get("input") or row.get("instruction") or "")


def read_rows(path: Path, max_input_chars: int | None = None, max_output_chars: int | None = None) -> list[Row]:
    """读出 instruction / input / output 的行，略去太长的与空回答的；不合要求时抛 ValueError。"""
    rows = [sample.raw for sample in read_samples(path, split="predict")]
    strange = [number for number, row in enumerate(rows, 1) if not isinstance(row.get("output"), str)]
    if strange:
        raise ValueError(f"{path} 第 {strange[0]} 行没有字符串的 output；比较只用 instruction/input/output 的行")
    kept = [
        {name: row.get(name) or "" for name in ("instruction", "input", "output")}
        for row in rows
        if row["output"]
        and len(row.get("input") or "") <= (max_input_chars or sys.maxsize)
        and len(row["output"]) <= (max_output_chars or sys.maxsize)
    ]
    if not kept:
        raise ValueError(f"{path} 的 {len(rows)} 行全部超过 max_input_chars 或 max_output_chars，请调大")
    return kept


def split_by_document(rows: Sequence[Row], test: int, dev: int, pretrain: int, seed: int) -> Parts:
    """按文档随机拆成四份，相近的文档算一个；test、dev、pretrain 是文档数，其余归 train。不够分时抛 ValueError。

    test 里相近的几个文档只留一个，它的几行并成一行。
    """
    groups: dict[int, list[Row]] = {}
    for row, group in zip(rows, near_groups(map(document_text, rows)), strict=True):
        groups.setdefault(group, []).append(row)
    needed = test + dev + pretrain
    if len(groups) <= needed:
        raise ValueError(
            f"只有 {len(groups)} 个互不相近的文档，不够分出 {needed} 个（test {test}、dev {dev}、pretrain {pretrain}）"
            "再训练，请减少它们，或放宽 max_input_chars"
        )
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    cuts = [0, test, test + dev, needed, len(order)]
    parts = [[row for group in order[a:b] for row in group] for a, b in pairwise(cuts)]
    for part in parts[2:]:
        random.Random(seed + 1).shuffle(part)  # 同一文档的几行分散开
    return Parts([merge_document(group) for group in order[:test]], *parts[1:])


def merge_document(group: Sequence[Row]) -> Row:
    """一组里第一个文档的几行并成一行，output 是它全部的回答。"""
    own = [row for row in group if document_text(row) == document_text(group[0])]
    return {**own[0], "output": list(dict.fromkeys(row["output"] for row in own))}


def check_leakage(parts: dict[str, Sequence[Row]], name: str) -> int:
    """各份之间没有相同或相近的文档，返回互不相近的文档总数。

    Raises:
        ValueError: 有；指出哪两份、第几行与原文。
    """
    places = [(part, number, row) for part, rows in parts.items() for number, row in enumerate(rows, start=1)]
    groups = near_groups(document_text(row) for _, _, row in places)
    for (part, number, row), group in zip(places, groups, strict=True):
        other, line, _ = places[group]
        if other != part:
            raise ValueError(
                f"泄漏：{name} 的 {part} 第 {number} 行与 {other} 第 {line} 行是相同或相近的文档"
                f"（{(row.get('input') or row['instruction'])[:30]}……），请重新拆分"
            )
    return len(set(groups))


def without_near(texts: Sequence[str], others: Sequence[str]) -> list[str]:
    """texts 里与 others 的任何一个都不相近的，次序不变。"""
    groups = near_groups(map(plain_text, [*others, *texts]))
    taken = set(groups[: len(others)])
    return [text for text, group in zip(texts, groups[len(others) :], strict=True) if group not in taken]


def take_tokens(lengths: Sequence[int], budget: int, epochs: int = 1) -> int:
    """开头多少行、重复 epochs 遍恰好不超过 budget 个 token。不够时抛 ValueError。"""
    total, count = 0, 0
    for length in lengths:
        if (total + length) * epochs > budget:
            break
        total, count = total + length, count + 1
    if not count:
        raise ValueError(f"第一行就有 {lengths[0]} token，超过 {budget} 的预算，请调大 train_tokens")
    if count == len(lengths) and total * epochs < 0.9 * budget:
        raise ValueError(
            f"训练行一共 {total} token × {epochs} 遍，不到预算 {budget} 的九成，请调大 epochs 或调小 train_tokens"
        )
    return count


def shuffled_labels(rows: Sequence[Row], seed: int) -> list[Row]:
    """各行的 output 互相调换：输入与回答不再相干，回答的分布不变。"""
    outputs = [row["output"] for row in rows]
    random.Random(seed).shuffle(outputs)
    return [{**row, "output": output} for row, output in zip(rows, outputs, strict=True)]


def split_text(path: Path, held_out_chars: int) -> tuple[list[str], list[str]]:
    """通用文字 → (训练的行, 末尾留出的行)；留出的行里，与训练的行相同或相近的略去。留不出时抛 ValueError。"""
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    cut, size = len(lines), 0
    while cut and size < held_out_chars:
        cut -= 1
        size += len(lines[cut])
    if not cut:
        raise ValueError(f"{path} 只有 {size} 字，不够留出 {held_out_chars} 字，请调小 held_out_chars")
    held_out = without_near([line for line in lines[cut:] if line], [line for line in lines[:cut] if line])
    if not held_out:
        raise ValueError(
            f"{path} 末尾 {size} 字的各行都与前面的相同或相近，没有可留出的；请换文字，或调大 held_out_chars"
        )
    return lines[:cut], held_out


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """写成 JSON 行；先写临时文件再改名。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def prepare_task(task: dict[str, Any], seed: int, directory: Path) -> dict[str, int]:
    """拆一个任务，核对泄漏，写出 directory/{test,dev,pretrain,train}.json → 各份的行数与互不相近的文档总数。"""
    rows = read_rows(ROOT / task["path"], task.get("max_input_chars"), task.get("max_output_chars"))
    parts = split_by_document(rows, task["test"], task["dev"], task.get("pretrain", 0), seed)
    num_documents = check_leakage(parts._asdict(), task["name"])
    for part, part_rows in parts._asdict().items():
        write_rows(directory / f"{part}.json", part_rows)
    return {**{part: len(part_rows) for part, part_rows in parts._asdict().items()}, "documents": num_documents}
