"""把 DuIE、AdvertiseGen、TNEWS、ChnSentiCorp 的公开文件转换成本项目的 instruction/input/output 行。

    python scripts/convert_dataset.py --dataset duie --input_path duie_train.json --output_path data/duie_0.json

数据集由用户自行下载。逐行读写，内存里不存整份文件；先写临时文件，完整之后才改名。
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.rows import Problem, ProblemList, RawRow, check_file, iter_rows
from finetune.options import ScriptParser
from utils import replacing

# 官方的 15 个类（CLUE 的 labels.json 没有 105 与 111）
TNEWS_LABELS = {
    "100": ("news_story", "故事"),
    "101": ("news_culture", "文化"),
    "102": ("news_entertainment", "娱乐"),
    "103": ("news_sports", "体育"),
    "104": ("news_finance", "财经"),
    "106": ("news_house", "房产"),
    "107": ("news_car", "汽车"),
    "108": ("news_edu", "教育"),
    "109": ("news_tech", "科技"),
    "110": ("news_military", "军事"),
    "112": ("news_travel", "旅游"),
    "113": ("news_world", "国际"),
    "114": ("news_stock", "股票"),
    "115": ("news_agriculture", "农业"),
    "116": ("news_game", "游戏"),
}
SENTIMENTS = {"0": "负面", "1": "正面"}
NOT_UTF8 = ("不是合法的 UTF-8 文本", "请把文件转成 UTF-8（常见的原因是 GBK 编码）")
CSV_LAYOUTS = [("label", "review"), ("label", "text_a"), ("qid", "label", "text_a")]


class FieldError(ValueError):
    """一行里某个字段的错误，参数依次是字段、问题、办法。"""


class Record(NamedTuple):
    """源文件的一行：行号（从 1 起）与各字段。"""

    line: int
    fields: dict[str, Any]


class Converted(NamedTuple):
    input: str
    output: str
    num_dropped: int = 0  # 不能写成一行三段的三元组


# ---- 各数据集：一行的字段 → Converted ----


def _text(fields: dict[str, Any], name: str, remedy: str = "请检查文件是否属于 --dataset 指定的数据集") -> str:
    if name not in fields:
        raise FieldError(name, f"缺少这个字段，已有的字段：{'、'.join(fields) or '无'}", remedy)
    if not isinstance(fields[name], str):
        raise FieldError(name, f"应为字符串，实际是 {fields[name]!r}", remedy)
    return fields[name].strip()


def _is_writable(part: str) -> bool:
    """三元组的一段不能为空，也不能含换行或下划线（评测先作 NFKC 规范化，全角下划线也算）。"""
    return bool(part) and "_" not in unicodedata.normalize("NFKC", part) and len(part.splitlines()) == 1


def convert_duie(fields: dict[str, Any]) -> Converted:
    """DuIE 1.0/2.0：text 与 spo_list → 文本与每行一个的「主体_关系_客体」。

    2.0 的客体是 {"@value": 值, "inWork": 值, …}：@value 之外的槽各成一个三元组，关系写作「关系@槽名」。
    重复的三元组只留一个；spo_list 为空则输出为空。
    """
    text = _text(fields, "text")
    if "spo_list" not in fields:
        raise FieldError("spo_list", "缺少这个字段", "官方测试集不含标注，请换用 train 或 dev 文件")
    if not isinstance(fields["spo_list"], list):
        raise FieldError("spo_list", f"应为数组，实际是 {fields['spo_list']!r}", "请检查文件是否属于 DuIE")
    triples: dict[str, None] = {}
    num_dropped = 0
    for number, spo in enumerate(fields["spo_list"]):
        for parts in _duie_triples(spo, f"spo_list[{number}]"):
            if all(map(_is_writable, parts)):
                triples["_".join(parts)] = None
            else:
                num_dropped += 1
    return Converted(text, "\n".join(triples), num_dropped)


def _duie_triples(spo: Any, field: str) -> Iterator[tuple[str, str, str]]:
    if not isinstance(spo, dict):
        raise FieldError(field, f"应为对象，实际是 {spo!r}", "请检查文件是否属于 DuIE")
    for name in ("subject", "predicate"):
        if not isinstance(spo.get(name), str):
            raise FieldError(f"{field}.{name}", f"应为字符串，实际是 {spo.get(name)!r}", "请补全这个字段")
    slots = spo.get("object")
    if isinstance(slots, str):
        slots = {"@value": slots}
    if not isinstance(slots, dict) or "@value" not in slots:
        remedy = 'DuIE 2.0 应为 {"@value": …}，1.0 应为字符串'
        raise FieldError(f"{field}.object", f"没有 @value，实际是 {slots!r}", remedy)
    for slot, value in slots.items():
        if not isinstance(value, str):
            raise FieldError(f"{field}.object.{slot}", f"应为字符串，实际是 {value!r}", "请补全这个字段")
        relation = spo["predicate"].strip() + ("" if slot == "@value" else f"@{slot}")
        # 官方文件用空字符串表示没有这个槽
        if value.strip() or slot == "@value":
            yield spo["subject"].strip(), relation, value.strip()


def convert_advertisegen(fields: dict[str, Any]) -> Converted:
    """AdvertiseGen：content（商品属性）→ summary（广告文案）。"""
    return Converted(_text(fields, "content"), _text(fields, "summary"))


def convert_tnews(fields: dict[str, Any]) -> Converted:
    """TNEWS（CLUE）：sentence → 中文类名；keywords 不用。"""
    label = _text(fields, "label", "官方测试集不含标注，请换用 train 或 dev 文件")
    if label not in TNEWS_LABELS:
        raise FieldError("label", f"不认识的类别 {label!r}", f"应为 {'、'.join(TNEWS_LABELS)} 之一")
    description, name = TNEWS_LABELS[label]
    if fields.get("label_desc", description) != description:
        raise FieldError("label_desc", f"{fields['label_desc']!r} 与 label {label} 不符", f"应为 {description}")
    return Converted(_text(fields, "sentence"), name)


def convert_chnsenticorp(fields: dict[str, Any]) -> Converted:
    """ChnSentiCorp：review 或 text_a → 正面或负面。"""
    label = _text(fields, "label")
    if label not in SENTIMENTS:
        raise FieldError(
            "label", f"应为 0（负面）或 1（正面），实际是 {label!r}", "请改正；官方测试集若无标注则不能转换"
        )
    return Converted(_text(fields, "review" if "review" in fields else "text_a"), SENTIMENTS[label])


# ---- 文件 → 行 ----


def read_json_records(path: str) -> Iterator[Record | Problem]:
    """读 JSON lines（JSON 数组也可），逐行产出；坏行产出 Problem。"""
    for row in iter_rows(path, text_unit=None):
        if not isinstance(row, RawRow):
            yield row
            continue
        try:
            fields = json.loads(row.content.decode("utf-8"))
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
        except json.JSONDecodeError as error:
            what = f"不是合法的 JSON（第 {error.colno} 列：{error.msg}）"
            yield Problem(path, row.line, "JSON", what, "每行应是一个完整的 JSON 对象")
        except UnicodeError:
            yield Problem(path, row.line, "编码", *NOT_UTF8)
        except RecursionError:
            yield Problem(path, row.line, "JSON", "括号嵌套太深", "请检查这一行是怎样生成的")
        else:
            if isinstance(fields, dict):
                yield Record(row.line, fields)
            else:
                yield Problem(path, row.line, "行", f"应为 JSON 对象，实际是 {type(fields).__name__}", "请检查文件格式")


def read_table_records(path: str) -> Iterator[Record | Problem]:
    """读有表头的 CSV（引号按 CSV 规则）或 TSV（引号是普通字符），由表头判断；行号是该行开头所在的行。"""
    check_file(path)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        header_line = stream.readline()
        is_tsv = "\t" in header_line
        header = tuple(name.strip() for name in header_line.strip().split("\t" if is_tsv else ","))
        if header not in CSV_LAYOUTS:
            layouts = "；".join("、".join(names) for names in CSV_LAYOUTS)
            yield Problem(path, 1, "表头", f"不认识的列名 {'、'.join(header)!r}", f"应为：{layouts}")
            return
        if is_tsv:
            reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.reader(stream, strict=True)
        line = 2
        try:
            for cells in reader:
                if cells:
                    yield _table_record(path, line, header, cells)
                line = reader.line_num + 2
        except csv.Error as error:
            yield Problem(path, line, "行", f"CSV 格式有误（{error}）", "请检查这一行起的引号是否配对")


def _table_record(path: str, line: int, header: tuple[str, ...], cells: list[str]) -> Record | Problem:
    if len(cells) != len(header):
        what = f"应有 {len(header)} 列（{'、'.join(header)}），实际是 {len(cells)} 列"
        return Problem(path, line, "行", what, "请检查分隔符；CSV 的正文含逗号时要用双引号括起")
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError:
        return Problem(path, line, "编码", *NOT_UTF8)
    return Record(line, dict(zip(header, cells, strict=True)))


class Dataset(NamedTuple):
    read: Callable[[str], Iterator[Record | Problem]]
    convert: Callable[[dict[str, Any]], Converted]
    instruction: str


DATASETS = {
    "duie": Dataset(
        read_json_records,
        convert_duie,
        "请抽取文本中的实体关系，每行写一个三元组，格式为“主体_关系_客体”；没有则不输出。文本：",
    ),
    "advertisegen": Dataset(read_json_records, convert_advertisegen, "请根据商品属性写一段广告文案。商品属性："),
    "tnews": Dataset(
        read_json_records,
        convert_tnews,
        f"请判断新闻标题的类别，只回答以下类别之一：{'、'.join(name for _, name in TNEWS_LABELS.values())}。标题：",
    ),
    "chnsenticorp": Dataset(
        read_table_records, convert_chnsenticorp, "请判断下面评论的情感倾向，只回答“正面”或“负面”。评论："
    ),
}


# ---- 转换 ----


def convert_records(path: str, dataset: str, counts: Counter, limit: int | None = None) -> Iterator[Converted]:
    """逐行转换；有错误时读完全部再抛 ValueError（至多列 20 处）。输入或文案为空白的行跳过，都计入 counts。

    limit 不为 None 时，写够 limit 行就停，不再检查后面的行。
    """
    source = DATASETS[dataset]
    problems = ProblemList(path)
    for record in source.read(path):
        if isinstance(record, Problem):
            problems.add([record])
            continue
        counts["read"] += 1
        try:
            converted = source.convert(record.fields)
        except FieldError as error:
            problems.add([Problem(path, record.line, *error.args)])
            continue
        counts["dropped_triples"] += converted.num_dropped
        if not converted.input or not (converted.output or dataset == "duie"):  # DuIE 的空输出是没有三元组
            counts["blank"] += 1
        elif not problems.total:
            yield converted
            counts["written"] += 1
            if counts["written"] == limit:
                return
    problems.raise_if_any()


def sample_records(records: Iterable[Converted], limit: int, seed: int) -> list[Converted]:
    """蓄水池抽样：等概率抽取 limit 行，保持原来的次序；内存里只有 limit 行。"""
    generator = random.Random(seed)
    kept: list[tuple[int, Converted]] = []
    for index, record in enumerate(records):
        if index < limit:
            kept.append((index, record))
        elif (place := int(generator.random() * (index + 1))) < limit:
            kept[place] = (index, record)
    return [record for _, record in sorted(kept, key=lambda pair: pair[0])]


def convert_file(
    dataset: str,
    input_path: str,
    output_path: str,
    instruction: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> Counter:
    """转换一个文件，返回计数 read、written、blank、dropped_triples；出错时不留下输出文件。"""
    if limit is not None and limit < 1:
        raise ValueError(f"--limit({limit}) 应为正整数，不限行数请去掉它")
    if seed is not None and limit is None:
        raise ValueError(f"--seed({seed}) 只在给出 --limit 时有作用，请补上 --limit 或去掉 --seed")
    if instruction is None:
        instruction = DATASETS[dataset].instruction
    target = Path(output_path)
    if target.is_dir():
        raise ValueError(f"--output_path({target}) 是一个目录，请给出文件名")
    if target.exists() and os.path.exists(input_path) and os.path.samefile(target, input_path):
        raise ValueError(f"--output_path({target}) 与 --input_path 是同一个文件，请换一个文件名")
    counts: Counter = Counter()
    if seed is None:
        records: Iterable[Converted] = convert_records(input_path, dataset, counts, limit)
    else:
        records = sample_records(convert_records(input_path, dataset, counts), limit, seed)
        counts["written"] = len(records)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as stream:
            for record in records:
                row = {"instruction": instruction, "input": record.input, "output": record.output}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            if not counts["written"]:
                raise ValueError(f"数据文件 {input_path} 里没有可以转换的行，没有写出 {target}")
    except OSError as error:
        raise ValueError(f"写 {target} 失败（{error.strerror}），请检查磁盘空间与目录权限") from error
    return counts


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(description="把公开数据集转换成 instruction/input/output 行")
    parser.add_argument("--dataset", choices=list(DATASETS), required=True, help="数据集的名字")
    parser.add_argument("--input_path", required=True, help="下载的原始文件（train 或 dev）")
    parser.add_argument("--output_path", required=True, help="写出的 JSON lines 文件，已有的会被替换")
    parser.add_argument("--instruction", help="每行的 instruction，默认用该数据集自带的一句")
    parser.add_argument("--limit", type=int, help="至多写出的行数，默认全部；不给 --seed 时取前面的行")
    parser.add_argument("--seed", type=int, help="随机抽取 --limit 行的种子，保持原来的次序；默认不抽取")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    try:
        counts = convert_file(**vars(options))
    except ValueError as error:
        print(f"错误：{error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(
        f"已写出 {options.output_path}：读入 {counts['read']} 行，写出 {counts['written']} 行，"
        f"跳过空白的输入或文案 {counts['blank']} 行，舍去含下划线、换行或空段的三元组 {counts['dropped_triples']} 个"
    )


if __name__ == "__main__":
    main()
