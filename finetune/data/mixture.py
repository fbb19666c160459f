"""训练数据的来历：几个文件各以多大的份量合成一份，并从中按文档留出评估集。"""

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from finetune.data.documents import hold_out
from finetune.data.samples import RowOptions

_WEIGHTED = re.compile(r"(?P<path>.+)\*(?P<weight>\d+\.?\d*|\.\d+)")


class Source(NamedTuple):
    """一个文件与它的份量：小于 1 取其中一部分，大于 1 重复。"""

    path: str
    weight: float = 1.0


def parse_sources(values: str | Sequence[str]) -> list[Source]:
    """--train_path 的各项：「文件」或「文件*份量」；照写就存在的路径就是路径，哪怕里面有 *。

    Raises:
        ValueError: 份量不是正数，或同一个文件出现两次。
    """
    sources, problems = [], []
    for value in [values] if isinstance(values, str) else values:
        found = None if os.path.exists(value) else _WEIGHTED.fullmatch(value)
        source = Source(found["path"], float(found["weight"])) if found else Source(value)
        if not found and not os.path.exists(value) and "*" in value and os.path.exists(value.rpartition("*")[0]):
            path, _, weight = value.rpartition("*")
            problems.append(f"--train_path {value} 的份量 {weight!r} 不是数，请写成 {path}*0.5 这样")
        elif not 0 < source.weight < math.inf:
            problems.append(f"--train_path {value} 的份量必须大于 0，请改正或去掉这个文件")
        elif any(os.path.abspath(source.path) == os.path.abspath(other.path) for other in sources):
            problems.append(f"--train_path 里 {source.path} 出现了两次，请只写一次，用 {source.path}*2 表示重复")
        sources.append(source)
    if problems:
        raise ValueError("\n".join(problems))
    return sources


def data_name(train_path: str | Sequence[str]) -> str:
    """--train_path 给人看的样子。"""
    return train_path if isinstance(train_path, str) else "、".join(train_path)


def describe_sources(sources: Sequence[Source], describe: Callable[[str], str]) -> str | list[str]:
    """各文件的说明（如哈希）连同份量；只有一个文件、份量为 1 时就是它的说明。"""
    shown = [describe(path) + (f"*{weight:g}" if weight != 1 else "") for path, weight in sources]
    return shown[0] if len(shown) == 1 else shown


def weighted_indices(num_samples: int, weight: float, seed: int, number: int, width: int = 1) -> np.ndarray:
    """份量 weight 的各样本下标：整数部分是全部重复几遍，小数部分由 seed 与文件的序号 number 选出。

    每 width 个样本是一行，一起取或一起不取。
    """
    num_rows = num_samples // width
    whole, part = divmod(weight, 1)
    chosen = np.random.default_rng([seed % 2**64, number]).permutation(num_rows)[: round(part * num_rows)]
    rows = np.concatenate([np.tile(np.arange(num_rows), int(whole)), np.sort(chosen)])
    return (rows[:, None] * width + np.arange(width)).ravel()


def hold_out_rows(sources: Sequence[Source], ratio: float, seed: int, row_options: RowOptions) -> dict[str, np.ndarray]:
    """--val_ratio：各文件的各行是否留作评估，见 documents.hold_out。"""
    paths = [source.path for source in sources]
    return dict(zip(paths, hold_out(paths, ratio, seed, row_options), strict=True))


def mix(
    data_sets: Sequence, sources: Sequence[Source], seed: int, held: dict[str, np.ndarray] | None = None, width: int = 1
):
    """各文件的 BaichuanDataSet → (训练集, 留出的评估集或 None)；份量只作用于训练的一边，width 见 weighted_indices。

    Raises:
        ValueError: 一边没有样本，或一个文件没有取到一行。
    """
    parts, held_parts = [], []
    for number, (data_set, source) in enumerate(zip(data_sets, sources, strict=True)):
        if held is not None:
            is_held = held[source.path][data_set.rows]
            held_parts.append(data_set.take(np.flatnonzero(is_held)))
            data_set = data_set.take(np.flatnonzero(~is_held))
        if source.weight != 1:
            chosen = weighted_indices(len(data_set), source.weight, seed, number, width)
            if not len(chosen):
                what = f"{source.path}*{source.weight:g} 的份量太小，{len(data_set) // width} 行里没有取到一行"
                raise ValueError(f"--train_path {what}，请调大份量，或去掉这个文件")
            data_set = data_set.take(chosen)
        parts.append(data_set)
    train_set = type(parts[0]).join(parts)
    if not len(train_set):
        raise ValueError("--train_path 留下的训练样本是空的：全部被 --val_ratio 留出，请调小它")
    if held is None:
        return train_set, None
    eval_set = type(parts[0]).join(held_parts)
    if not len(eval_set):
        raise ValueError("--val_ratio 留出的各行都被丢弃了（重复或超长），请调大它，或用 --eval_path 另给评估数据")
    return train_set, eval_set
