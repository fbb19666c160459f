"""几个样本为一组，一步数的是组：继续预训练的一块，偏好的一对。"""

from collections.abc import Iterator

import numpy as np

from finetune.data.prompting import EncodedSample
from finetune.data.samples import DESIRABLE


class GroupedDataSet:
    """BaichuanDataSet 的样本依次分成组；接口同它，一项是一组的各样本。

    Args:
        starts: 各组第一个样本的下标与样本的总数，[组数 + 1]。
        max_len: 一组至多多少 token。
        num_shared: 各组里只算一次的 token 数（共用的提示），不计入 lengths。
    """

    def __init__(self, data_set, starts: np.ndarray, max_len: int, num_shared: np.ndarray | int = 0):
        self.data_set, self.starts, self.max_len, self.path = data_set, starts, max_len, data_set.path
        self.lengths, self.num_targets = (
            np.add.reduceat(data_set.columns[name], starts[:-1], dtype=np.int32) for name in ("lengths", "num_targets")
        )
        self.whole_lengths = self.lengths.copy()  # 不并排时算的
        self.lengths -= num_shared
        self.reference = None  # 参考模型的对数概率，见 finetune/tasks/preference.py
        self.is_desirable: np.ndarray | None = None  # kto：各组的标注

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> list[EncodedSample]:
        return [self.data_set[member] for member in self.members(index)]

    def members(self, index: int) -> range:
        """一组的各样本的下标。"""
        return range(int(self.starts[index]), int(self.starts[index + 1]))

    def places(self, index: int) -> list[tuple[str, int]]:
        """一组里各样本的 (文件, 行号)，相同的只写一次。"""
        return list(dict.fromkeys(self.data_set.place(member) for member in self.members(index)))


def singles(data_set) -> GroupedDataSet:
    """一个样本自成一组。"""
    grouped = GroupedDataSet(data_set, np.arange(len(data_set.columns["lengths"]) + 1), data_set.max_len)
    if "flags" in data_set.columns:
        grouped.is_desirable = data_set.columns["flags"] & DESIRABLE > 0
    return grouped


def pairs(data_set) -> GroupedDataSet:
    """好、坏两个回答为一对；并排时共用的提示只算一次（首个目标的前一行各自算）。"""
    from finetune.data.packing import MIN_SHARED_TOKENS  # 它要 torch，检查参数时还没有载入

    starts = np.arange(0, len(data_set.columns["lengths"]) + 1, 2)
    num_shared = np.maximum(0, data_set.columns["src_lengths"][::2] - 1)
    num_shared[num_shared < MIN_SHARED_TOKENS] = 0
    return GroupedDataSet(data_set, starts, 2 * data_set.max_len, num_shared)


def blocks(data_set) -> GroupedDataSet:
    """依次装进至多 max_len 个 token 的块，放不下就另起一块。"""
    starts = np.fromiter(_block_starts(data_set.columns["lengths"], data_set.max_len), dtype=np.int64)
    return GroupedDataSet(data_set, starts, data_set.max_len)


def _block_starts(lengths: np.ndarray, max_len: int) -> Iterator[int]:
    load = max_len
    for index, length in enumerate(map(int, lengths)):
        if load + length > max_len:
            yield index
            load = 0
        load += length
    yield len(lengths)
