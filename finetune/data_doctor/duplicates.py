"""重复与泄漏的查找：每行三个 64 位摘要与一个位置，都在内存里，每行 32 字节（2500 万行 800 MB，比较时另要约两倍）。

摘要取 BLAKE2b 的 64 位：2500 万行里出现一次误判的机会不到 1/50000。
"""

import hashlib

import numpy as np

TEST_BIT, FILE_SHIFT = 1 << 63, 48  # 位置：最高位是测试集，其次是文件的序号，低 48 位是行号
LINE_MASK = (1 << FILE_SHIFT) - 1


def digest(text: str) -> int:
    """文字的 64 位摘要。"""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def compare(rows: np.ndarray) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """重复、同一输入不同回答、训练与测试共有 → (各种的总数, 各种的每一处)。

    rows：[n, 4] uint64，各行的输入、回答、文档的摘要与位置。
    duplicate：多余的行。conflict：训练集里回答不止一种的输入，每种输入一处。
    shared_input、shared_document：测试集中输入（文档）在训练集里出现过的行。documents：不同文档的数目。
    每一处是 [位置, 与它相同的最前一行的位置, 一共涉及几行]，按位置排列，[m, 3] uint64。
    """
    prompts, answers, documents, positions = rows[np.argsort(rows[:, 3])].T  # 测试集的最高位是 1，都在训练集之后
    is_test = positions >= TEST_BIT
    found: dict[str, np.ndarray] = {}

    def note(code: str, here: np.ndarray, other: np.ndarray, counts: np.ndarray) -> None:
        columns = [positions[here], positions[other], counts.astype(np.uint64)]
        found[code] = np.column_stack(columns)[np.argsort(here)]

    def note_shared(code: str, keys: np.ndarray) -> int:
        order, starts, counts = _group(keys)
        num_test = np.add.reduceat(is_test[order].astype(np.int64), starts)
        members = np.repeat((num_test > 0) & (num_test < counts), counts) & is_test[order]
        note(code, order[members], np.repeat(order[starts], counts)[members], np.repeat(num_test, counts)[members])
        return len(starts)

    note_shared("shared_input", prompts)
    order, starts, counts = _group(prompts, answers, is_test)
    extra = np.ones(len(order), dtype=bool)
    extra[starts] = False
    note("duplicate", order[extra], np.repeat(order[starts], counts)[extra], np.repeat(counts, counts)[extra])
    distinct = np.sort(order[starts])  # 每种（输入、回答）最前的一行
    distinct = distinct[~is_test[distinct]]
    order, starts, counts = _group(prompts[distinct])
    several = counts > 1
    first, last = distinct[order[starts[several]]], distinct[order[(starts + counts - 1)[several]]]
    note("conflict", last, first, counts[several])
    num_documents = note_shared("shared_document", documents)
    return {**{code: len(matches) for code, matches in found.items()}, "documents": num_documents}, found


def _group(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """各键都相同的行成一组 → (按组排好的行号，组内次序不变；各组在其中的起点；各组的行数)。"""
    order = np.lexsort(keys)
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = np.any([key[order[1:]] != key[order[:-1]] for key in keys], axis=0)
    starts = np.flatnonzero(is_new)
    return order, starts, np.diff(starts, append=len(order))
