"""样本 → input_ids 与 labels 的数组：一批行的编码，整个文件的编码。"""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune.data.parallel import choose_workers, map_chunks, num_bytes_of, split_chunks
from finetune.data.prompting import IGNORE_INDEX, EncodedSample, encode_samples
from finetune.data.rows import Problem, ProblemList, RawRow, iter_rows, num_bytes_of_data
from finetune.data.samples import DESIRABLE, RowOptions, parse_row
from finetune.terminal import long_job

# 编码规则改变时加一，旧缓存随之作废
ENCODING_VERSION = 4
PROGRESS_ROWS_BYTES = 2**20
SRC_CUT, TGT_CUT, CONTROL, EMPTY_OUTPUT, SEVERAL_TURNS = 1, 2, 4, 8, 16
# labels 只有三种取值，每个 token 存一字节：不作目标、就是 input_ids 本身、eos（chat 的用户标记处）
NO_TARGET, SAME_TARGET, EOS_TARGET = 0, 1, 2
PER_SAMPLE = {
    **{"lengths": "<i4", "src_lengths": "<i4", "num_targets": "<i4", "flags": "|u1"},
    **{"lines": "<i8", "rows": "<i8"},  # 行号（从 1 起），第几行（从 0 起；一行的数组里各元素的行号相同）
}
ARRAYS = {"input_ids": "<i4", "target_kinds": "|u1", **PER_SAMPLE}


class EncodedChunk(NamedTuple):
    """一批行的编码结果，在子进程里产生。"""

    arrays: dict[str, np.ndarray]
    digests: list[bytes]  # 与样本一一对应，用来找重复
    problems: list[Problem]
    num_rows: int
    num_bytes: int
    formats: Counter[str]  # 各种写法的行数
    unused: Counter[str]  # 没有用上的字段各在几行里


def encode_chunk(
    rows: Sequence[RawRow | Problem],
    tokenizer,
    path: str,
    split: str,
    options: dict[str, Any],
    row_options: RowOptions = RowOptions(),
) -> EncodedChunk:
    """解析并编码一批行；纯函数，只用到 json、sentencepiece 与 numpy，可以在 fork 出的子进程里运行。"""
    problems: list[Problem] = []
    encoded: list[EncodedSample] = []
    digests: list[bytes] = []
    flags: list[int] = []
    places: list[int] = []
    formats: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    for place, row in enumerate(rows):
        sample, broken = parse_row(row, path, split, row_options)
        problems += broken
        if sample is None:
            continue
        formats[sample.format] += 1
        if sample.unused:
            unused.update(sample.unused)
        try:
            items = encode_samples(sample, tokenizer, row_options.document_overlap, row_options.document_bos, **options)
        except ValueError as error:
            problems.append(Problem(path, sample.line, "提示词", str(error), "请改这一行，或换 --prompt_format"))
            continue
        if any(item.num_targets == 0 for item in items):
            what = f"截断之后没有任何目标 token（src {items[0].num_src_tokens} 个 token）"
            field = "text" if sample.format == "text" else "output"
            problems.append(Problem(path, sample.line, field, what, "请检查这一行的内容是否全是空白"))
            continue
        encoded += items
        places += [place] * len(items)
        content = repr(sample.messages if sample.trained is None else (sample.messages, sample.trained))
        content += "".join(repr(value) for value in (sample.rejected, sample.label) if value is not None)
        digests += [_digest(content if index == 0 else f"{content}{index}") for index in range(len(items))]
        flags += [
            SRC_CUT * any(item.src_truncated for item in items)
            + TGT_CUT * any(item.tgt_truncated for item in items)
            + CONTROL * items[0].has_control_pieces
            + EMPTY_OUTPUT * ("" in (sample.messages[-1][1], sample.rejected))
            + SEVERAL_TURNS * (len(sample.messages) > 2)
            + DESIRABLE * bool(sample.label)
        ] * len(items)
    arrays = to_arrays(encoded, flags, places)
    return EncodedChunk(arrays, digests, problems, len(rows), num_bytes_of(rows), formats, unused)


def _digest(content: str) -> bytes:
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def to_arrays(encoded: Sequence[EncodedSample], flags: Sequence[int], rows: Sequence[int]) -> dict[str, np.ndarray]:
    ids = np.array([token for item in encoded for token in item.input_ids], dtype="<i4")
    labels = np.array([label for item in encoded for label in item.labels], dtype="<i4")
    kinds = np.where(labels == IGNORE_INDEX, NO_TARGET, np.where(labels == ids, SAME_TARGET, EOS_TARGET))
    columns = {
        "input_ids": ids,
        "target_kinds": kinds,
        "lengths": [len(item.input_ids) for item in encoded],
        "src_lengths": [item.num_src_tokens for item in encoded],
        "num_targets": [item.num_targets for item in encoded],
        "flags": flags,
        "lines": [item.line for item in encoded],
        "rows": rows,
    }
    return {name: np.asarray(columns[name], dtype=dtype) for name, dtype in ARRAYS.items()}


def encode_file(
    path: str,
    tokenizer,
    options: dict[str, Any],
    row_options: RowOptions = RowOptions(),
    is_skip: bool = False,
    drop_duplicates: bool = False,
    workers: int | None = None,
    progress: bool = False,
    spool_dir: str | os.PathLike | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """读取并编码整个文件，返回 (各数组, 行数统计)。

    spool_dir：各数组放在这个目录的临时文件里（没有名字，随进程消失），内存不随文件增长；缺省在内存里。
    """
    problems = ProblemList(path)
    seen: set[bytes] = set()  # 要丢弃重复的行时
    firsts: list[np.ndarray] = []  # 只数重复的行时：各行的摘要，每行 8 字节
    counts = {"num_rows": 0, "num_duplicates": 0, "num_skipped": 0, "duplicates_dropped": drop_duplicates}
    formats: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    kept = _Spool(spool_dir)
    file_bytes = num_bytes_of_data(path)
    is_hidden = not progress or file_bytes < PROGRESS_ROWS_BYTES
    with long_job(f"分词 {Path(path).name}", file_bytes, "B", is_hidden=is_hidden) as job:
        encode = partial(
            encode_chunk, tokenizer=tokenizer, path=path, split="train", options=options, row_options=row_options
        )
        rows = iter_rows(path, row_options.text_unit)
        for chunk in map_chunks(encode, split_chunks(rows), path, choose_workers(path, workers)):
            job.update(chunk.num_bytes)
            chunk.arrays["rows"] += counts["num_rows"]
            counts["num_rows"] += chunk.num_rows
            formats += chunk.formats
            unused += chunk.unused
            problems.add(chunk.problems)
            keep = np.ones(len(chunk.digests), dtype=bool)
            is_first = np.diff(chunk.arrays["rows"], prepend=-1) != 0  # 一行的几个样本一同留下或丢弃，只计一次
            if not drop_duplicates:
                firsts.append(np.frombuffer(b"".join(chunk.digests), dtype="<u8")[::2][is_first])
            for i, digest in enumerate(chunk.digests if drop_duplicates else ()):
                keep[i] = digest not in seen
                counts["num_duplicates"] += int(is_first[i] and not keep[i])
                seen.add(digest)
            if is_skip:
                overlong = keep & (chunk.arrays["flags"] & (SRC_CUT | TGT_CUT) > 0)
                counts["num_skipped"] += int((overlong & is_first).sum())
                keep &= ~overlong
            if not problems.total:
                kept.append(_select(chunk.arrays, keep))
    problems.raise_if_any()
    if not counts["num_rows"]:
        raise ValueError(f"数据文件 {path} 里没有任何样本（只有空白），请检查文件内容")
    if firsts:
        digests = np.concatenate(firsts)
        firsts.clear()
        digests.sort()
        counts["num_duplicates"] = int(np.count_nonzero(digests[1:] == digests[:-1]))
        del digests
    arrays = kept.arrays()
    if not len(arrays["lengths"]):
        raise ValueError(f"数据文件 {path} 的 {counts['num_skipped']} 行全部超长，被 --is_skip 丢弃，请调大 --max_len")
    return arrays, {**counts, "formats": dict(formats), "unused_fields": dict(unused)}


class _Spool:
    """依次接起各批的数组：在内存里，或在 directory 的临时文件里。"""

    def __init__(self, directory: str | os.PathLike | None):
        self.parts: list[dict[str, np.ndarray]] = []
        self.files = None
        if directory is None:
            return
        try:
            os.makedirs(directory, exist_ok=True)
            self.files = {name: tempfile.TemporaryFile(dir=directory) for name in ARRAYS}  # noqa: SIM115  映射之后也开着
        except OSError as error:
            raise ValueError(f"{directory} 不能写：{error.strerror}，请换一个目录或检查权限与磁盘") from error

    def append(self, arrays: dict[str, np.ndarray]):
        if self.files is None:
            self.parts.append(arrays)
            return
        for name, file in self.files.items():
            file.write(arrays[name].tobytes())

    def arrays(self) -> dict[str, np.ndarray]:
        if self.files is None:
            return {name: np.concatenate([part[name] for part in self.parts]) for name in ARRAYS}
        found = {}
        for name, dtype in ARRAYS.items():
            self.files[name].flush()
            is_empty = not self.files[name].tell()  # 空的文件不能映射
            found[name] = np.zeros(0, dtype) if is_empty else np.memmap(self.files[name], dtype=dtype, mode="r")
        return found


def _select(arrays: dict[str, np.ndarray], keep: np.ndarray) -> dict[str, np.ndarray]:
    if keep.all():
        return arrays
    by_token = np.repeat(keep, arrays["lengths"])
    return {name: array[keep if name in PER_SAMPLE else by_token] for name, array in arrays.items()}
