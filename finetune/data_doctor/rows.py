"""数据体检的一行：内容上的警告（空回答、写错的字段名、控制符号、损坏的字符）、截断、长度与摘要；都是纯函数。"""

import difflib
import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from finetune.data.prompting import encode_sample
from finetune.data.rows import Problem, RawRow
from finetune.data.samples import FORMATS, RowOptions, Sample, parse_row
from finetune.data_doctor.duplicates import digest

MAX_LABEL_CHARS = 64
_UNLIMITED = 2**40
_FIELDS = {kind.name: kind.fields for kind in FORMATS}
_KNOWN_FIELDS = sorted({name for fields in _FIELDS.values() for name in fields})
_CONTROL_TEXT = re.compile(r"<reserved_\d+>|</?s>|<unk>|<pad>")
# C0 控制字符、零宽与双向控制字符、字节序标记、替换字符；零宽连接符是表情的一部分，不算
_ODD_CHARACTER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u200e\u200f\u202a-\u202e\ufeff\ufffd]")
_READER_CODES = {"JSON": "json", "编码": "encoding", "行": "row", "数组": "array"}


class Encoding(NamedTuple):
    """分词器与训练的编码设置；options 是 encode_sample 的其余参数。"""

    tokenizer: Any
    max_len: int
    max_src_len: int
    options: dict[str, Any]


class ChunkReport(NamedTuple):
    """一批行的检查结果，在子进程里产生；各数组与样本一一对应。"""

    findings: list[Problem]
    lengths: np.ndarray  # [n, 2]：src 与 tgt 截断之前的长度
    digests: np.ndarray  # [n, 3]：提示、回答、文档的摘要
    lines: np.ndarray  # [n]
    answers: list[str | None]  # 没有回答，或太长而不像标签的，是 None
    num_rows: int
    num_bytes: int
    formats: Counter[str]  # 各种写法的行数
    unused: Counter[str]  # 没有用上的字段各在几行里


def examine_rows(
    rows: list[RawRow | Problem],
    path: str,
    split: str,
    encoding: Encoding | None,
    options: RowOptions = RowOptions(),
) -> ChunkReport:
    """检查一批行；纯函数，可以在子进程里运行。split="predict"（测试集）的回答可缺。"""
    findings: list[Problem] = []
    lengths, digests, lines, answers = [], [], [], []
    formats: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    is_plain = encoding is not None and encoding.options["prompt_format"] == "plain"
    for row in rows:
        sample, broken = parse_row(row, path, split, options)
        findings += [problem._replace(code=_READER_CODES.get(problem.field, "field")) for problem in broken]
        if sample is None:
            continue
        formats[sample.format] += 1
        unused.update(sample.unused)
        fields = json.loads(row.content.decode())
        fields = {name: value for name, value in fields.items() if name not in options.ignore_fields}
        prompt = sample.messages if split == "predict" else sample.messages[:-1]
        answer = sample.messages[-1][1] if split != "predict" else (sample.references or (None,))[0]
        findings += _field_findings(fields, sample, answer, is_plain)
        measured, texts = [], {"output": answer}
        if sample.rejected is not None:
            texts["rejected"] = sample.rejected
        for field, text in texts.items():
            whole = sample._replace(messages=(*prompt, ("assistant", text or "")), rejected=None)
            measured.append(_measure(whole, text is not None, split, encoding, findings, field))
        lengths.append(max(measured, key=sum))
        # 没有提示的是一段文字，以它自己为输入：不同的文字不是同一个输入的不同回答
        marks = [repr(value) for value in (sample.rejected, sample.label) if value is not None]  # 不同的不是同样的行
        answered = digest("".join([answer or "", *marks]))
        digests.append((digest(repr(prompt or answer)), answered, digest(_document(sample))))
        lines.append(sample.line)
        answers.append(answer if answer is not None and len(answer) <= MAX_LABEL_CHARS else None)
    return ChunkReport(
        findings,
        np.array(lengths, dtype=np.int64).reshape(-1, 2),
        np.array(digests, dtype=np.uint64).reshape(-1, 3),
        np.array(lines, dtype=np.uint64),
        answers,
        len(rows),
        sum(len(row.content) for row in rows if isinstance(row, RawRow)),
        formats,
        unused,
    )


def _texts(fields: dict[str, Any], sample: Sample) -> Iterator[tuple[str, str]]:
    """这一行用上的 (字段, 文字)；数组的各项写成 conversations[i]。"""
    for name in _FIELDS[sample.format]:
        value = fields.get(name)
        if isinstance(value, list):
            yield from ((f"{name}[{i}]", text) for i, item in enumerate(value) for text in _strings(item))
        elif isinstance(value, str):
            yield name, value


def _strings(value: Any) -> Iterator[str]:
    """value 里的全部字符串。"""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _document(sample: Sample) -> str:
    """这一行讲的文档，忽略空白、全半角与大小写。"""
    return "".join(unicodedata.normalize("NFKC", sample.document).casefold().split())


@functools.lru_cache(maxsize=1024)
def _meant_field(name: str) -> str | None:
    """字段名像是哪个认识的字段写错了；不像则为 None。"""
    close = difflib.get_close_matches(name.strip().lower()[:40], _KNOWN_FIELDS, n=1, cutoff=0.75)
    return close[0] if close else None


def _field_findings(fields: dict[str, Any], sample: Sample, answer: str | None, is_plain: bool) -> Iterator[Problem]:
    """内容上的发现：空回答、写错的字段名、控制符号、不可见或损坏的字符。"""

    def warn(code: str, field: str, what: str, remedy: str) -> Problem:
        return Problem(sample.path, sample.line, field, what, remedy, "warning", code)

    if answer == "":
        remedy = "确实没有答案的不必改（目标只有结束符），否则请补上或删去这一行"
        yield Problem(sample.path, sample.line, "output", "回答是空的", remedy, "note", "empty_output")
    elif answer is not None and not answer.strip():
        yield warn("blank_output", "output", "回答只有空白", "确实没有答案请写成空的，否则请补上或删去这一行")
    for name in sample.unused:
        meant = _meant_field(name)
        if meant in _FIELDS[sample.format] and meant not in fields:
            yield warn(
                "field_name", name[:40], f"不认识的字段，没有用上；像是 {meant} 写错了", f"请改名为 {meant}，或删去"
            )
    if is_plain and (len(sample.messages) > 2 or sample.messages[0][0] == "system"):
        what = "多轮或有 system 的对话，而提示格式是 plain：各轮之间只有回答之后的 eos"
        yield warn("plain_turns", "提示", what, "模型若是对话模型，请加 --prompt_format chat")
    for field, text in _texts(fields, sample):
        if pieces := _CONTROL_TEXT.findall(text):
            what = f"文字里有控制符号 {'、'.join(sorted(set(pieces))[:5])}（共 {len(pieces)} 处）"
            yield warn("control_token", field, what, "训练时只当普通文字；若是导出时混入的，请删去")
        if match := _ODD_CHARACTER.search(text):
            what = f"第 {match.start() + 1} 个字符是 U+{ord(match[0]):04X}（{_odd_name(match[0])}）"
            yield warn("odd_character", field, what, "请删去，或从原始数据重新导出")


def _odd_name(char: str) -> str:
    if char == "\ufffd":
        return "替换字符，原来的字在某次转码时已经丢失"
    return "看不见的格式字符" if char >= "\u200b" else "控制字符"


def _measure(
    whole: Sample, has_answer: bool, split: str, encoding: Encoding | None, findings: list[Problem], field: str
) -> tuple[int, int]:
    """截断之前的 (src, tgt) 长度；超长、没有目标、提示词不合法记入 findings。没有分词器时按字符数。

    一段文字（继续预训练）切成几段，不截断。
    """
    *prompt, (_, answer) = whole.messages
    if encoding is None:
        return sum(len(text) for _, text in prompt), len(answer)

    def add(severity: str, code: str, field: str, what: str, remedy: str) -> None:
        findings.append(Problem(whole.path, whole.line, field, what, remedy, severity, code))

    max_len, max_src_len, options = encoding.max_len, encoding.max_src_len, encoding.options
    try:
        item = encode_sample(whole, encoding.tokenizer, max_len=_UNLIMITED + 1, max_src_len=_UNLIMITED, **options)
        src, total = item.num_src_tokens, len(item.input_ids)
        kept = item
        if whole.format != "text" and (src > max_src_len or (has_answer and total > max_len)):
            kept = encode_sample(whole, encoding.tokenizer, max_len=max_len, max_src_len=max_src_len, **options)
    except ValueError as error:
        add("error", "prompt", "提示词", str(error), "请改这一行，或换 --prompt_format、调大 --max_src_len")
        return 0, 0
    src_cut, tgt_cut = src - kept.num_src_tokens, (total - src) - (len(kept.input_ids) - kept.num_src_tokens)
    if src_cut:
        what = (
            f"提示 {src} token，超过 --max_src_len({max_src_len})，截去 {src_cut}（先丢较早的轮次，再截用户消息的尾部）"
        )
        add("warning", "src_cut", "提示", what, f"请调大 --max_src_len（这一行要 {src}），或缩短这一行")
    if has_answer and tgt_cut:
        start = encoding.tokenizer.decode(
            item.input_ids[total - tgt_cut : total - tgt_cut + 8], skip_special_tokens=True
        )
        what = f"全长 {total} token，超过 --max_len({max_len})，回答 {total - src} token 截去 {tgt_cut}"
        place = f"（从「{start}」起，连同结束符）" if start else "（只截去结束符）"
        add("warning", "tgt_cut", field, what + place, f"请调大 --max_len（这一行要 {total}），或拆分这一行")
    if kept.num_targets == 0 and split != "predict":
        what = f"截断之后没有任何目标 token（src {kept.num_src_tokens} 个 token）"
        add("error", "no_target", field, what, "请检查这一行的内容是否全是空白")
    if not has_answer:
        return src, 0
    return src, total - src
