"""训练数据：读取、编码、缓存与报告；样本怎样装成 micro batch 见 batching.py，提示词格式见 prompting.py。

python data_set.py check data/spo_0.json --model_name_or_path baichuan2-7B/      # 数据体检，见 data_doctor.py
"""

import copy
import hashlib
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from finetune.data.rows import Problem, ProblemList, RawRow, check_file, iter_rows
from finetune.data.samples import RowOptions, parse_row
from prompting import IGNORE_INDEX, EncodedSample, encode_sample
from token_cache import TokenCache

# 编码规则改变时加一，旧缓存随之作废
ENCODING_VERSION = 2
# 一批至多这么多行、这么多字节；多进程编码时在途的至多这么多字节（一行再长也至少放一行）
ROWS_PER_CHUNK, BYTES_PER_CHUNK, BYTES_IN_FLIGHT = 256, 4 * 2**20, 64 * 2**20
# 读模型、编译算子之前先看的行数与字节数
FIRST_ROWS, FIRST_BYTES = 1000, 16 * 2**20
# 小文件单进程只要一两秒，不值得起子进程
PARALLEL_BYTES = 8 * 2**20
PROGRESS_ROWS_BYTES = 2**20
_SRC_CUT, _TGT_CUT, _CONTROL, _EMPTY_OUTPUT, _SEVERAL_TURNS = 1, 2, 4, 8, 16
# labels 只有三种取值，每个 token 存一字节：不作目标、就是 input_ids 本身、eos（chat 的用户标记处）
_NO_TARGET, _SAME_TARGET, _EOS_TARGET = 0, 1, 2
_PER_SAMPLE = {
    "lengths": "<i4",
    "src_lengths": "<i4",
    "num_targets": "<i4",
    "flags": "|u1",
    "lines": "<i8",
    "rows": "<i8",
}
_ARRAYS = {"input_ids": "<i4", "target_kinds": "|u1", **_PER_SAMPLE}


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
    row_options: RowOptions = RowOptions(),  # noqa: B008 （不可变）
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
            item = encode_sample(sample, tokenizer, **options)
        except ValueError as error:
            problems.append(Problem(path, sample.line, "提示词", str(error), "请改这一行，或换 --prompt_format"))
            continue
        if item.num_targets == 0:
            what = f"截断之后没有任何目标 token（src {item.num_src_tokens} 个 token）"
            problems.append(Problem(path, sample.line, "output", what, "请检查这一行的内容是否全是空白"))
            continue
        encoded.append(item)
        places.append(place)
        content = repr(sample.messages if sample.trained is None else (sample.messages, sample.trained))
        digests.append(hashlib.blake2b(content.encode(), digest_size=16).digest())
        flags.append(
            _SRC_CUT * item.src_truncated
            + _TGT_CUT * item.tgt_truncated
            + _CONTROL * item.has_control_pieces
            + _EMPTY_OUTPUT * (sample.messages[-1][1] == "")
            + _SEVERAL_TURNS * (len(sample.messages) > 2)
        )
    num_bytes = sum(map(_num_bytes, rows))
    arrays = _to_arrays(encoded, flags, places)
    return EncodedChunk(arrays, digests, problems, len(rows), num_bytes, formats, unused)


def _to_arrays(encoded: Sequence[EncodedSample], flags: Sequence[int], rows: Sequence[int]) -> dict[str, np.ndarray]:
    ids = np.array([token for item in encoded for token in item.input_ids], dtype="<i4")
    labels = np.array([label for item in encoded for label in item.labels], dtype="<i4")
    kinds = np.where(labels == IGNORE_INDEX, _NO_TARGET, np.where(labels == ids, _SAME_TARGET, _EOS_TARGET))
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
    return {name: np.asarray(columns[name], dtype=dtype) for name, dtype in _ARRAYS.items()}


class BaichuanDataSet:
    """一份数据文件的全部样本，编码后以 numpy 数组存放（每个 token 5 字节）。

    参数与 encode_sample 相同；is_skip 丢弃超长的行（默认截断），drop_duplicates 丢弃内容完全相同的行（默认保留）。
    cache_dir 给出时，编码结果按数据内容、分词器与设置缓存，换了任何一项都会重新编码。
    num_workers：编码的进程数，None 为按 CPU 核数自动决定，1 为不起子进程。
    文件有错、没有样本、全部超长都抛 ValueError，一次列出至多 20 处。
    """

    def __init__(
        self,
        path: str | os.PathLike,
        tokenizer,
        *,
        prompt_format: str,
        max_len: int,
        max_src_len: int,
        family: str = "baichuan2",
        user_token_id: int = 195,
        assistant_token_id: int = 196,
        template: dict[str, str] | None = None,
        row_options: RowOptions = RowOptions(),  # noqa: B008 （不可变）
        is_skip: bool = False,
        drop_duplicates: bool = False,
        cache_dir: str | os.PathLike | None = None,
        num_workers: int | None = None,
        show_progress: bool = False,
    ):
        if max_src_len >= max_len:
            raise ValueError(f"--max_src_len({max_src_len}) 必须小于 --max_len({max_len})，请调小前者")
        self.path, self.max_len, self.eos_token_id = str(path), max_len, tokenizer.eos_token_id
        options = {
            "prompt_format": prompt_format,
            "max_len": max_len,
            "max_src_len": max_src_len,
            "family": family,
            "user_token_id": user_token_id,
            "assistant_token_id": assistant_token_id,
            "template": template,
        }
        choices = {"is_skip": is_skip, "drop_duplicates": drop_duplicates}
        check_file(path)
        self.cache_note = "未使用"
        cached = None
        if cache_dir is not None:
            settings = {"version": ENCODING_VERSION, **options, **choices, **row_options._asdict()}
            cache = TokenCache(cache_dir, self.path, tokenizer, json.loads(json.dumps(settings)))
            cached, self.cache_note = cache.load()
        if cached is None:
            cached = _encode_file(
                *(self.path, tokenizer, options, row_options),
                *(is_skip, drop_duplicates, num_workers, show_progress),
            )
            if cache_dir is not None:
                self.cache_note += cache.save(*cached)
        arrays, self.counts = cached
        self.prompt_format = prompt_format
        self.paths: list[str] = []
        self._set_arrays(arrays)

    def _set_arrays(self, arrays: dict[str, np.ndarray], path: str | None = None):
        self._arrays = arrays
        self.paths += [path or self.path] * (len(arrays["lengths"]) - len(self.paths))
        # 各样本在全部 token 里的起点，[样本数 + 1]
        self.offsets = np.concatenate([[0], np.cumsum(self._arrays["lengths"], dtype=np.int64)])
        self.lengths: list[int] = self._arrays["lengths"].tolist()
        self.num_targets: list[int] = self._arrays["num_targets"].tolist()
        self.lines: list[int] = self._arrays["lines"].tolist()

    def append(self, samples: Sequence[EncodedSample], path: str):
        """在末尾接上 path 里的样本（重放的通用文字）；它们与原有的一起洗牌、装箱。"""
        added = _to_arrays(samples, [0] * len(samples), range(len(samples)))
        self._set_arrays({name: np.concatenate([self._arrays[name], added[name]]) for name in _ARRAYS}, path)

    def take(self, indices: np.ndarray) -> "BaichuanDataSet":
        """其中的这些样本（可以重复），依 indices 的次序；自己不变。"""
        taken = copy.copy(self)
        begins, lengths = self.offsets[:-1][indices], self._arrays["lengths"][indices].astype(np.int64)
        tokens = np.repeat(begins - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        taken.paths = [self.paths[index] for index in indices]
        taken._set_arrays(
            {name: array[indices if name in _PER_SAMPLE else tokens] for name, array in self._arrays.items()}
        )
        return taken

    @staticmethod
    def join(parts: Sequence["BaichuanDataSet"]) -> "BaichuanDataSet":
        """几份首尾相接成一份；一份时就是它自己。"""
        if len(parts) == 1:
            return parts[0]
        joined = copy.copy(parts[0])
        joined.path = "、".join(part.path for part in parts)
        joined.paths = [path for part in parts for path in part.paths]
        joined._set_arrays({name: np.concatenate([part._arrays[name] for part in parts]) for name in _ARRAYS})
        return joined

    @property
    def rows(self) -> np.ndarray:
        """各样本在它的文件里是第几行（从 0 起，数组则是第几个元素）。"""
        return self._arrays["rows"]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> EncodedSample:
        """第 index 个样本；input_ids 与 labels 是 int32 数组。"""
        begin, end = self.offsets[index], self.offsets[index + 1]
        input_ids, kinds = self._arrays["input_ids"][begin:end], self._arrays["target_kinds"][begin:end]
        labels = np.where(
            kinds == _SAME_TARGET, input_ids, np.where(kinds == _EOS_TARGET, self.eos_token_id, IGNORE_INDEX)
        )
        flags = int(self._arrays["flags"][index])
        return EncodedSample(
            input_ids=input_ids,
            labels=labels.astype(np.int32),
            num_targets=self.num_targets[index],
            num_src_tokens=int(self._arrays["src_lengths"][index]),
            src_truncated=bool(flags & _SRC_CUT),
            tgt_truncated=bool(flags & _TGT_CUT),
            has_control_pieces=bool(flags & _CONTROL),
            line=self.lines[index],
        )

    @property
    def statistics(self) -> dict[str, Any]:
        """各项统计：行数、空输出、重复、截断、跳过、含控制符号的行数，token 长度的分位数，目标 token 的份额。"""
        flags, lengths = self._arrays["flags"], self._arrays["lengths"]
        num_tokens, num_targets = int(lengths.sum()), int(self._arrays["num_targets"].sum())
        return {
            **self.counts,
            "num_samples": len(self),
            "num_empty_outputs": int((flags & _EMPTY_OUTPUT > 0).sum()),
            "num_src_truncated": int((flags & _SRC_CUT > 0).sum()),
            "num_tgt_truncated": int((flags & _TGT_CUT > 0).sum()),
            "num_control_rows": int((flags & _CONTROL > 0).sum()),
            "num_conversations": int((flags & _SEVERAL_TURNS > 0).sum()),
            "num_tokens": num_tokens,
            "num_target_tokens": num_targets,
            "target_share": num_targets / num_tokens,
            "length_percentiles": {p: int(np.percentile(lengths, p, method="lower")) for p in (50, 90, 95, 99, 100)},
        }

    def report(self) -> str:
        """中文的数据报告，几行文字。"""
        found = self.statistics
        duplicates = f"重复 {found['num_duplicates']}（{'已丢弃' if found['duplicates_dropped'] else '保留'}）"
        skipped = f"，因超长跳过 {found['num_skipped']} 行" if found["num_skipped"] else ""
        p50, p90, p95, p99, longest = found["length_percentiles"].values()
        lines = [
            f"数据报告：{self.path}",
            f"  文件 {found['num_rows']} 行，样本 {len(self)} 条{skipped}",
            f"  写法：{_listing(found['formats'], '行')}",
            f"  空输出 {found['num_empty_outputs']}（目标只有 eos），{duplicates}",
            f"  截断：src {found['num_src_truncated']} 条，tgt {found['num_tgt_truncated']} 条（截短的 tgt 没有 eos）",
            f"  长度（token）：p50 {p50}，p90 {p90}，p95 {p95}，p99 {p99}，最长 {longest}（上限 {self.max_len}）",
            f"  共 {found['num_tokens']} token，其中目标 {found['num_target_tokens']}（{found['target_share']:.1%}）",
        ]
        if found["num_control_rows"]:
            lines.append(f"  {found['num_control_rows']} 条的文本里有 <reserved_N> 之类的控制符号，已按普通文字编码")
        if found["unused_fields"]:
            lines.append(f"  没有用上的字段：{_listing(found['unused_fields'], '行')}")
        if found["num_conversations"] and self.prompt_format == "plain":
            lines.append(
                f"  警告：{found['num_conversations']} 条是多轮或有 system 的对话，而提示格式是 plain：各轮之间只有"
                "回答之后的 eos，system 与用户的话直接相接；模型若是对话模型，请加 --prompt_format chat"
            )
        return "\n".join([*lines, f"  分词缓存：{self.cache_note}"])


def _listing(counts: dict[str, int], unit: str) -> str:
    """{名字: 数目} → 「a 3 行、b 2 行」，多的在前，至多十项。"""
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    return "、".join(f"{name} {count} {unit}" for name, count in ranked[:10]) + ("……" if len(ranked) > 10 else "")


def _encode_file(
    path: str,
    tokenizer,
    options: dict[str, Any],
    row_options: RowOptions,
    is_skip: bool,
    drop_duplicates: bool,
    workers: int | None,
    progress: bool,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """读取并编码整个文件，返回 (各数组, 行数统计)。"""
    problems = ProblemList(path)
    seen: set[bytes] = set()
    counts = {"num_rows": 0, "num_duplicates": 0, "num_skipped": 0, "duplicates_dropped": drop_duplicates}
    formats: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    kept: list[dict[str, np.ndarray]] = []
    file_bytes = os.path.getsize(path)
    bar = tqdm(
        total=file_bytes,
        unit="B",
        unit_scale=True,
        desc=f"分词 {Path(path).name}",
        disable=True if not progress or file_bytes < PROGRESS_ROWS_BYTES else None,  # None：不是终端时不显示
    )
    with bar:
        encode = partial(
            encode_chunk, tokenizer=tokenizer, path=path, split="train", options=options, row_options=row_options
        )
        for chunk in _encode_chunks(_chunks(iter_rows(path)), path, encode, workers):
            bar.update(chunk.num_bytes)
            chunk.arrays["rows"] += counts["num_rows"]
            counts["num_rows"] += chunk.num_rows
            formats += chunk.formats
            unused += chunk.unused
            problems.add(chunk.problems)
            keep = np.ones(len(chunk.digests), dtype=bool)
            for i, digest in enumerate(chunk.digests):
                duplicate = digest in seen
                counts["num_duplicates"] += duplicate
                keep[i] = not (duplicate and drop_duplicates)
                seen.add(digest)
            if is_skip:
                overlong = keep & (chunk.arrays["flags"] & (_SRC_CUT | _TGT_CUT) > 0)
                counts["num_skipped"] += int(overlong.sum())
                keep &= ~overlong
            if not problems.total:
                kept.append(_select(chunk.arrays, keep))
    problems.raise_if_any()
    if not counts["num_rows"]:
        raise ValueError(f"数据文件 {path} 里没有任何样本（只有空白），请检查文件内容")
    arrays = {name: np.concatenate([part[name] for part in kept]) for name in _ARRAYS}
    if not len(arrays["lengths"]):
        raise ValueError(f"数据文件 {path} 的 {counts['num_skipped']} 行全部超长，被 --is_skip 丢弃，请调大 --max_len")
    return arrays, {**counts, "formats": dict(formats), "unused_fields": dict(unused)}


def _select(arrays: dict[str, np.ndarray], keep: np.ndarray) -> dict[str, np.ndarray]:
    if keep.all():
        return arrays
    by_token = np.repeat(keep, arrays["lengths"])
    return {name: array[keep if name in _PER_SAMPLE else by_token] for name, array in arrays.items()}


def _chunks(rows: Iterator[RawRow | Problem]) -> Iterator[list[RawRow | Problem]]:
    """把行分批：行数与字节数都有上限。"""
    chunk, num_bytes = [], 0
    for row in rows:
        chunk.append(row)
        num_bytes += _num_bytes(row)
        if len(chunk) == ROWS_PER_CHUNK or num_bytes >= BYTES_PER_CHUNK:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _num_bytes(row: RawRow | Problem) -> int:
    return len(row.content) if isinstance(row, RawRow) else 0


def check_first_rows(path: str | os.PathLike, row_options: RowOptions = RowOptions()):  # noqa: B008 （不可变）
    """只检查文件开头的 FIRST_ROWS 行（不分词）：多数的错误在载入模型、编译算子之前就能说出来。

    Raises:
        ValueError: 文件不能读，或开头的行有错；列法同读完整个文件。
    """
    problems, num_bytes = ProblemList(path), 0
    for count, row in enumerate(iter_rows(path), 1):
        problems.add(parse_row(row, str(path), "train", row_options)[1])
        num_bytes += _num_bytes(row)
        if count == FIRST_ROWS or num_bytes >= FIRST_BYTES:
            break
    problems.raise_if_any()


_worker_encode = None  # 只在子进程里有值


def _start_worker(encode) -> None:
    global _worker_encode
    _worker_encode = encode


def _work(rows: list[RawRow | Problem]) -> EncodedChunk:
    return _worker_encode(rows)


def _encode_chunks(
    chunks: Iterable[list], path: str, encode: Callable[..., EncodedChunk], workers: int | None
) -> Iterator[EncodedChunk]:
    """依次编码各批；文件较大时用多个进程，次序不变，在途的批数有限。"""
    if workers is None:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(16, cores // local_ranks) if os.path.getsize(path) >= PARALLEL_BYTES else 1
    if workers <= 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(encode, chunks)
        return
    # spawn 会在每个子进程里重新导入 torch 与 deepspeed，比分词还慢；子进程不碰 torch 与 CUDA，fork 是安全的
    pending: deque = deque()  # (结果, 那一批的字节数)
    in_flight = 0
    # encode 经 initargs 随 fork 继承：若随任务传递，每批都要序列化一次分词器
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encode,))
    try:
        for chunk in chunks:
            pending.append((pool.submit(_work, chunk), sum(map(_num_bytes, chunk))))
            in_flight += pending[-1][1]
            while len(pending) > 4 * workers or (in_flight > BYTES_IN_FLIGHT and len(pending) > 1):
                coming, num_bytes = pending.popleft()
                in_flight -= num_bytes
                yield coming.result()
        while pending:
            yield pending.popleft()[0].result()
    except BrokenProcessPool as error:
        raise RuntimeError(f"编码 {path} 的子进程意外退出（多半是内存不足），请减少 rank 数或增加内存后重试") from error
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    import sys

    from data_doctor import main

    sys.exit(main())
