"""哪些行讲的是同一篇文档：相同或相近的文字算一篇；按文档留出评估集，两边没有同一篇。"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from finetune.data.rows import iter_rows
from finetune.data.samples import RowOptions, parse_row

# 两篇文档相近：片段较少的一篇，它的 SHINGLE 字片段有 NEAR_SHARE 以上也在另一篇里
SHINGLE = 12
NEAR_SHARE = 0.5
MAX_NEAR_ROWS = 100_000  # 行数再多，只把完全相同的文字算作一篇
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def plain_text(text: str) -> str:
    """NFKC 规范化，去掉全部空白。"""
    return "".join(unicodedata.normalize("NFKC", text).split())


def near_groups(texts: Iterable[str]) -> list[int]:
    """各文档所属的组，组号是组里最前一个文档的下标；相同与相近的同组，可以传递。texts 须是 plain_text 的结果。"""
    firsts: dict[str, int] = {}
    which = [firsts.setdefault(text, index) for index, text in enumerate(texts)]
    # 不足 SHINGLE 字的只有一个片段，就是它自己：只会与相同的同组
    indices = [index for text, index in firsts.items() if len(text) >= SHINGLE]
    documents = [text for text in firsts if len(text) >= SHINGLE]
    groups = _near_documents(documents) if documents else []
    merged = {index: indices[group] for index, group in zip(indices, groups, strict=True)}
    return [merged.get(index, index) for index in which]


def _near_documents(documents: Sequence[str]) -> list[int]:
    """互不相同、都不短于 SHINGLE 的文档各属于哪组。

    相近的两篇，较小的 A 至少有一半多的片段在另一篇里，所以 A 的任意一半（向上取整）片段里必有一个也在另一篇里：
    取 A 最罕见的一半去找候选，再数共有的片段。
    """
    owners, runs, starts = _shingles(documents)
    counts = np.diff(starts)  # 各种片段出现在几篇文档里
    sizes = np.bincount(owners, minlength=len(documents))
    order = np.lexsort((counts[runs], owners))  # 各文档的片段，由罕见到常见
    own_runs = np.split(runs[order], np.cumsum(sizes)[:-1])
    roots = np.arange(len(documents))
    settled = np.zeros(len(counts), dtype=bool)  # 有这种片段的文档已经同在一组

    for index, own in enumerate(own_runs):
        rarest = own[: -(-len(own) // 2)]
        rarest = rarest[(counts[rarest] > 1) & ~settled[rarest]]
        if not len(rarest):
            continue
        holders = np.concatenate([owners[starts[run] : starts[run + 1]] for run in rarest])
        holders = holders[roots[holders] != roots[index]]
        if not len(holders):
            settled[rarest] = True
            continue
        candidates = np.unique(holders)
        own_sorted = np.sort(own)
        for other in candidates[sizes[candidates] >= sizes[index]]:
            if roots[other] == roots[index]:
                continue
            places = np.searchsorted(own_sorted, own_runs[other])
            places[places == len(own_sorted)] = 0
            common = np.count_nonzero(own_sorted[places] == own_runs[other])
            if common > NEAR_SHARE * min(sizes[index], sizes[other]):
                first, second = sorted((roots[index], roots[other]))
                roots[roots == second] = first
    return roots.tolist()


def _shingles(documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """全部片段，同一篇里重复的只留一个 → (所在的文档, 片段的种类, 各种片段的起点)，依种类排列。"""
    codes = np.frombuffer("".join(documents).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    owners = np.repeat(np.arange(len(documents), dtype=np.int32), [len(text) for text in documents])
    num_places = len(codes) - SHINGLE + 1
    hashes = np.zeros(num_places, dtype=np.uint64)
    for offset in range(SHINGLE):
        hashes = hashes * _MULTIPLIER + codes[offset : num_places + offset]
    is_inside = owners[:num_places] == owners[SHINGLE - 1 :]
    hashes, owners = hashes[is_inside], owners[:num_places][is_inside]
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    is_new_hash = np.concatenate([[True], hashes[1:] != hashes[:-1]])
    is_new = is_new_hash | np.concatenate([[True], owners[1:] != owners[:-1]])
    runs = np.cumsum(is_new_hash)[is_new] - 1
    starts = np.concatenate([np.flatnonzero(np.diff(runs, prepend=-1)), [len(runs)]])
    return owners[is_new], runs, starts


def documents_of(path: str, options: RowOptions) -> Iterator[str]:
    """文件各行的文档，依行的次序；有错的行是空串（编码时会报出来）。"""
    for row in iter_rows(path, options.text_unit):
        sample, _ = parse_row(row, path, "train", options)
        yield "" if sample is None else plain_text(sample.document)


def hold_out(paths: Sequence[str], ratio: float, seed: int, options: RowOptions) -> list[np.ndarray]:
    """按文档随机留出约 ratio 的行 → 各文件各行是否留出；同一篇文档的行在同一边，留出的不多于 ratio。

    Raises:
        ValueError: 文件不能读，或没有一篇小得能留出来。
    """
    documents, ends = [], []
    is_large = False
    for path in paths:
        for text in documents_of(path, options):
            documents.append(text)
            if len(documents) == MAX_NEAR_ROWS + 1:  # 从此只记摘要，内存不随文字增长
                is_large = True
                documents = [_digest(text) for text in documents]
            elif is_large:
                documents[-1] = _digest(text)
        ends.append(len(documents))
    if is_large:
        first: dict[bytes, int] = {}
        groups = [first.setdefault(text, index) for index, text in enumerate(documents)]
    else:
        groups = near_groups(documents)
    names, members = np.unique(groups, return_inverse=True)
    sizes = np.bincount(members)
    wanted = max(1, round(ratio * len(groups)))
    is_held, total = np.zeros(len(names), dtype=bool), 0
    for group in np.random.default_rng(seed % 2**64).permutation(len(names)):
        if total + sizes[group] <= wanted and len(names) > 1:
            is_held[group], total = True, total + sizes[group]
    if not total:
        raise ValueError(
            f"--val_ratio {ratio} 留不出评估集：{len(groups)} 行只有 {len(names)} 篇互不相近的文档，最小的一篇有 "
            f"{sizes.min() if len(sizes) else 0} 行，请调大它，或用 --eval_path 另给评估数据"
        )
    return np.split(is_held[members], ends[:-1])


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
