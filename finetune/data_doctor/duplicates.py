"""重复与泄漏的查找：每行三个 64 位摘要与一个位置，都在内存里，每行 32 字节（2500 万行 800 MB，比较时另要约两倍）。

摘要取 BLAKE2b 的 64 位：2500 万行里出现一次误判的机会不到 1/50000。
"""

import hashlib
from typing import NamedTuple

import numpy as np

TEST_BIT, FILE_SHIFT = 1 << 63, 48  # 位置：最高位是测试集，其次是文件的序号，低 48 位是行号


def digest(text: str) -> int:
    """文字的 64 位摘要。"""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Match(NamedTuple):
    """一处跨行的发现：position 处的行与 other 处的行相同，一共涉及 count 行。"""

    position: int
    other: int
    count: int


def compare(rows: np.ndarray, limit: int) -> tuple[dict[str, int], dict[str, list[Match]]]:
    """重复、同一输入不同回答、训练与测试共有 → (各种的总数, 各种最前的 limit 处)。

    rows：[n, 4] uint64，各行的输入、回答、文档的摘要与位置。
    duplicate：多余的行数。conflict：训练集里回答不止一种的输入数。
    shared_input、shared_document：测试集中有多少行的输入（文档）在训练集里出现过。documents：不同文档的数目。
    """
    prompts, answers, documents, positions = rows[np.argsort(rows[:, 3])].T  # 测试集的最高位是 1，都在训练集之后
    is_test = positions >= TEST_BIT
    totals: dict[str, int] = {}
    found: dict[str, list[Match]] = {}

    def note(code: str, total: int, here: np.ndarray, other: np.ndarray, counts: np.ndarray) -> None:
        first = np.argsort(here)[:limit]
        columns = positions[here[first]], positions[other[first]], counts[first]
        totals[code], found[code] = int(total), list(map(Match, *(column.tolist() for column in columns)))

    def note_shared(code: str, keys: np.ndarray) -> int:
        order, starts, counts = _group(keys)
        num_test = np.add.reduceat(is_test[order].astype(np.int64), starts)
        shared = (num_test > 0) & (num_test < counts)
        first_test = order[(starts + counts - num_test)[shared]]
        note(code, num_test[shared].sum(), first_test, order[starts[shared]], num_test[shared])
        return len(starts)

    note_shared("shared_input", prompts)
    order, starts, counts = _group(prompts, answers, is_test)
    repeated = starts[counts > 1]
    note("duplicate", len(order) - len(starts), order[repeated + 1], order[repeated], counts[counts > 1])
    distinct = np.sort(order[starts])  # 每种（输入、回答）最前的一行
    distinct = distinct[~is_test[distinct]]
    order, starts, counts = _group(prompts[distinct])
    several = counts > 1
    first, last = distinct[order[starts[several]]], distinct[order[(starts + counts - 1)[several]]]
    note("conflict", several.sum(), last, first, counts[several])
    totals["documents"] = note_shared("shared_document", documents)
    return totals, found


def _group(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """各键都相同的行成一组 → (按组排好的行号，组内次序不变；各组在其中的起点；各组的行数)。"""
    order = np.lexsort(keys)
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = np.any([key[order[1:]] != key[order[:-1]] for key in keys], axis=0)
    starts = np.flatnonzero(is_new)
    return order, starts, np.diff(starts, append=len(order))
