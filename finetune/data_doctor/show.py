"""看几行怎样编码：写法、各片段与它们是不是目标、模型看到的文字。

    python data_set.py show data/spo_0.json --model_name_or_path baichuan2-7B/ --rows 1,2

终端里目标是绿色的，别处写在 ⟦ ⟧ 里；是 eos 的标签写成 →eos。退出码：0，有一行读不了则为 2。
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from finetune.data.prompting import IGNORE_INDEX, EncodedSample, encode_samples
from finetune.data.rows import iter_rows
from finetune.data.samples import RowOptions, Sample, parse_row
from finetune.data_doctor.rows import Encoding
from utils import replacing

GREEN, RESET = "\x1b[32m", "\x1b[0m"


def row_numbers(value: str) -> Callable[[int], bool]:
    """--rows 的取值「1,2,10-12」→ 第 n 行要不要看。"""
    ranges = []
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(first) < 1:
            raise argparse.ArgumentTypeError(f"应为从 1 起的行号，如 1,2,10-12，得到 {value!r}")
        ranges.append(range(int(first), int(last or first) + 1))
    return lambda number: any(number in chosen for chosen in ranges)


def show(
    path: str, encoding: Encoding, options: RowOptions, is_wanted: Callable[[int], bool] | None, out: str | None
) -> int:
    """打印各行，写 --json；返回退出码。

    Raises:
        ValueError: 文件不能读，或没有要看的行。
    """
    records = []
    for number, row in enumerate(iter_rows(path, options.text_unit), start=1):
        if is_wanted is not None and not is_wanted(number):
            continue
        sample, problems = parse_row(row, path, "train", options)
        try:
            item = None if sample is None else encode(sample, encoding)
        except ValueError as error:
            item, problems = None, [f"{path}:{row.line}: 提示词: {error}"]
        record = {"line": row.line, "format": sample.format if sample else None}
        record |= {"input_ids": None, "labels": None, "warnings": [str(problem) for problem in problems]}
        if item is not None:
            record |= {"input_ids": list(item.input_ids), "labels": list(item.labels)}
            record["warnings"] = list(warnings_of(sample, item))
        records.append(record)
        print("\n".join(describe(record, sample, encoding, sys.stdout.isatty())), end="\n\n")
    if not records:
        raise ValueError(f"{path} 里没有要看的行，请检查 --rows")
    if out is not None:
        with replacing(out) as stream:
            stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return 2 if any(record["input_ids"] is None for record in records) else 0


def encode(sample: Sample, encoding: Encoding) -> EncodedSample:
    """与训练相同的编码；长文档的第一段，偏好对里好的一个。"""
    limits = {"max_len": encoding.max_len, "max_src_len": encoding.max_src_len}
    return encode_samples(sample, encoding.tokenizer, **limits, **encoding.options)[0]


def warnings_of(sample: Sample, item: EncodedSample) -> Iterator[str]:
    """这一行里没有全部用上，或与字面不同的地方。"""
    if sample.unused:
        yield f"没有用上的字段：{'、'.join(sample.unused)}"
    if item.src_truncated:
        yield "提示超过 --max_src_len，丢弃了较早的轮次，或截去了用户的话的尾部"
    if item.tgt_truncated:
        yield "回答超过 --max_len，截去了尾部，没有结束符"
    if item.has_control_pieces:
        yield "文字里有控制符号，已按普通文字编码"
    if item.num_targets == 0:
        yield "没有任何目标 token，训练会拒绝这一行"


def describe(record: dict[str, Any], sample: Sample | None, encoding: Encoding, is_terminal: bool) -> Iterator[str]:
    """一行的说明，几行文字。"""
    if record["input_ids"] is None:
        yield f"第 {record['line']} 行：读不了"
        yield from record["warnings"]
        return
    ids, labels = record["input_ids"], record["labels"]
    num_targets = sum(label != IGNORE_INDEX for label in labels[1:])
    yield f"第 {record['line']} 行：{record['format']}，{len(ids)} token，其中目标 {num_targets}"
    yield from (f"警告：{warning}" for warning in record["warnings"])
    pieces = encoding.tokenizer.convert_ids_to_tokens(ids)
    is_target = [position > 0 and label != IGNORE_INDEX for position, label in enumerate(labels)]
    shown = []
    for piece, index, label, marked in zip(pieces, ids, labels, is_target, strict=True):
        text = f"{piece!r}:{index}" + ("→eos" if marked and label != index else "")
        shown.append(mark(text, is_terminal) if marked else text)
    yield "片段：" + " ".join(shown)
    yield "文字：" + "".join(spans(ids, is_target, encoding.tokenizer, is_terminal))


def spans(ids: list[int], is_target: list[bool], tokenizer, is_terminal: bool) -> Iterator[str]:
    """模型看到的文字，目标的一段一段标出。"""
    begin = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or is_target[end] != is_target[begin]:
            text = tokenizer.decode(ids[begin:end])
            yield mark(text, is_terminal) if is_target[begin] else text
            begin = end


def mark(text: str, is_terminal: bool) -> str:
    return f"{GREEN}{text}{RESET}" if is_terminal else f"⟦{text}⟧"
