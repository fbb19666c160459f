"""重复与泄漏的查找：每行只记几个 64 位摘要，超出缓冲就按摘要分片写到匿名的临时文件，内存与行数无关。

摘要取 BLAKE2b 的 64 位：2500 万行里出现一次误判的机会不到 1/50000。
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

TEST_BIT, FILE_SHIFT = 1 << 63, 48  # 位置：最高位是测试集，其次是文件的序号，低 48 位是行号
BUFFER_RECORDS = 2**18
NUM_PARTS = 64
_RECORD = np.dtype([("key", "<u8"), ("answer", "<u8"), ("first", "<u8"), ("second", "<u8"), ("count", "<u8")])


def digest(text: str) -> int:
    """文字的 64 位摘要。"""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class DigestStore:
    """(键, 回答, 位置) 的集合；同键、同回答、同在训练集或测试集的合成一条，记住最前的两个位置与数目。

    内存：缓冲 BUFFER_RECORDS 条（每条 40 字节）及其排序的副本，加上一个分片；临时文件每条 40 字节，放在 TMPDIR。
    同一个键大量重复时也不会让某个分片变大：每次写出之前先合并。
    """

    def __init__(self, buffer_records: int = BUFFER_RECORDS):
        self.buffer_records = buffer_records
        self._buffer: list[np.ndarray] = []
        self._size = 0
        self._parts: list = []

    def add(self, keys: np.ndarray, answers: np.ndarray, positions: np.ndarray) -> None:
        """加入一批；三个数组等长，都是 uint64。"""
        records = np.zeros(len(keys), dtype=_RECORD)
        records["key"], records["answer"], records["first"], records["count"] = keys, answers, positions, 1
        self._buffer.append(records)
        self._size += len(records)
        if self._size >= self.buffer_records:
            self._spill()

    def _take(self) -> np.ndarray:
        merged = _merge(np.concatenate([np.zeros(0, dtype=_RECORD), *self._buffer]))
        self._buffer, self._size = [], 0
        return merged

    def _spill(self) -> None:
        records = self._take()
        if not self._parts:
            self._parts = [tempfile.TemporaryFile() for _ in range(NUM_PARTS)]  # noqa: SIM115 （一直用到 groups 结束）
        # 按键排过序，高位相同的连在一起
        edges = np.searchsorted(records["key"] >> np.uint64(58), np.arange(NUM_PARTS + 1, dtype=np.uint64))
        for part, begin, end in zip(self._parts, edges, edges[1:], strict=False):
            part.write(records[begin:end].tobytes())

    def groups(self) -> Iterator[np.ndarray]:
        """逐片给出合并好的记录，按 (键, 训练在前, 回答) 排序；同一个键总在同一片。"""
        if not self._parts:
            yield self._take()
            return
        self._spill()
        for part in self._parts:
            part.seek(0)
            content = part.read()
            part.close()
            yield _merge(np.frombuffer(content, dtype=_RECORD))
        self._parts = []


def _merge(records: np.ndarray) -> np.ndarray:
    """排序，并把键、回答、所在集合都相同的合成一条。"""
    if not len(records):
        return records
    is_test = records["first"] >= TEST_BIT
    order = np.lexsort((records["first"], records["answer"], is_test, records["key"]))
    records, is_test = records[order], is_test[order]
    is_new = np.ones(len(records), dtype=bool)
    is_new[1:] = (
        (records["key"][1:] != records["key"][:-1])
        | (records["answer"][1:] != records["answer"][:-1])
        | (is_test[1:] != is_test[:-1])
    )
    starts = np.flatnonzero(is_new)
    merged = records[starts]
    merged["count"] = np.add.reduceat(records["count"], starts)
    # 第二个位置：本条自己记着的，与同组下一条的最前位置，取较小者
    sizes = np.diff(np.append(starts, len(records)))
    following = records["first"][np.minimum(starts + 1, len(records) - 1)]
    own = merged["second"]
    both = np.where(own == 0, following, np.minimum(own, following))
    merged["second"] = np.where(sizes > 1, both, own)
    return merged


class Match(NamedTuple):
    """一处跨行的发现：position 处的行与 other 处的行相同，一共涉及 count 行。"""

    position: int
    other: int
    count: int


def compare(prompts: DigestStore, documents: DigestStore, limit: int) -> tuple[dict[str, int], dict[str, list[Match]]]:
    """重复、同一输入不同回答、训练与测试共有 → (各种的总数, 各种最前的 limit 处)；两个集合用过即空。

    duplicate：多余的行数。conflict：训练集里回答不止一种的输入数。
    shared_input、shared_document：测试集中有多少行的输入（文档）在训练集里出现过。documents：不同文档的数目。
    """
    totals: Counter[str] = Counter()
    found: dict[str, list[Match]] = {}

    def note(code: str, positions: np.ndarray, others: np.ndarray, counts: np.ndarray) -> None:
        here = np.argsort(positions, kind="stable")[:limit]
        matches = map(Match, positions[here].tolist(), others[here].tolist(), counts[here].tolist())
        found[code] = sorted([*found.get(code, []), *matches])[:limit]

    for code, store in (("shared_input", prompts), ("shared_document", documents)):
        for records in store.groups():
            if not len(records):
                continue
            starts = np.flatnonzero(np.append(True, records["key"][1:] != records["key"][:-1]))
            is_test = records["first"] >= TEST_BIT
            first = np.minimum.reduceat(records["first"], starts)  # 有训练集的行时必是它的：测试集的最高位是 1
            num_train_answers = np.add.reduceat((~is_test).astype(np.int64), starts)
            num_test_rows = np.add.reduceat(np.where(is_test, records["count"], 0).astype(np.int64), starts)
            first_test = np.minimum.reduceat(np.where(is_test, records["first"], np.uint64(2**64 - 1)), starts)
            shared = (num_train_answers > 0) & (num_test_rows > 0)
            totals[code] += int(num_test_rows[shared].sum())
            note(code, first_test[shared], first[shared], num_test_rows[shared])
            if store is documents:
                totals["documents"] += len(starts)
                continue
            repeated = records[records["count"] > 1]
            totals["duplicate"] += int(repeated["count"].sum()) - len(repeated)
            note("duplicate", repeated["second"], repeated["first"], repeated["count"])
            last_train = np.maximum.reduceat(np.where(is_test, np.uint64(0), records["first"]), starts)
            conflicting = num_train_answers > 1
            totals["conflict"] += int(conflicting.sum())
            note("conflict", last_train[conflicting], first[conflicting], num_train_answers[conflicting])
    return dict(totals), found
