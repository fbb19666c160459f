"""一个优化步的样本怎样分给各进程、装成 micro batch。

哪些样本组成一步只由 (seed, epoch, step) 决定，与并排（packing）无关；并排既不改变一步算什么，也不改变步数。
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch

from finetune.data.prompting import IGNORE_INDEX, EncodedSample

Dealt = list[list[list[int]]]  # [rank][micro batch][样本下标]
# 共用的开头至少要有这么多 token，一共至少省下这么大的份额，才合并：每多一段，CPU 上注意力就多一组小的矩阵乘法，
# GPU 上要把父段的键再抄一份
MIN_SHARED_TOKENS, MIN_SAVED_SHARE = 16, 0.05


def epoch_steps(num_samples: int, global_batch_size: int, seed: int | None, epoch: int = 0) -> list[list[int]]:
    """一个 epoch 各优化步的样本下标：每个样本恰好出现一次，末尾不足一步的自成较小的一步。

    每个 epoch 的次序不同，只由 seed 与 epoch 决定；seed=None 保持文件次序（评估用）。
    """
    return list(iter_steps(num_samples, global_batch_size, seed, epoch))


def iter_steps(
    num_samples: int, global_batch_size: int, seed: int | None, epoch: int = 0, start_step: int = 0
) -> Iterator[list[int]]:
    """epoch_steps 的各步，从第 start_step 步起，逐步给出。"""
    if num_samples < 1 or global_batch_size < 1:
        raise ValueError(f"样本数({num_samples})与全局 batch({global_batch_size})都必须至少为 1")
    if seed is None:
        order = np.arange(num_samples)
    else:
        order = np.random.default_rng([seed % 2**64, epoch]).permutation(num_samples)
    for begin in range(start_step * global_batch_size, num_samples, global_batch_size):
        yield order[begin : begin + global_batch_size].tolist()


def deal_step(
    lengths: Mapping[int, int] | Sequence[int],
    indices: Sequence[int],
    world_size: int,
    batch_size: int,
    max_tokens: int,
    packing: bool,
) -> Dealt:
    """把一步的样本分给各 rank 的各 micro batch，返回 [rank][micro batch][样本下标]；结果只由参数决定。

    lengths[i] 是样本 i 的 token 数，indices 是这一步的样本。各 rank 的 micro batch 数相同（ZeRO-3 的集合通信要求），
    空列表是没有样本的 micro batch，只在样本数少于 micro batch 总数时出现。
    packing=False：rank r 的第 j 个 micro batch 是 indices[(j * world_size + r) * batch_size :][:batch_size]。
    packing=True：用尽量少的 micro batch，各 rank 的 token 数尽量相等，每个 micro batch 不超过 max_tokens
    （= batch_size * max_len，即用户按 batch_size 许可的显存），总数从不多于不装箱时。
    """
    num_unpacked = -(-len(indices) // (world_size * batch_size))
    if not packing:
        return [
            [list(indices[(j * world_size + r) * batch_size :][:batch_size]) for j in range(num_unpacked)]
            for r in range(world_size)
        ]
    too_long = [i for i in indices if lengths[i] > max_tokens]
    if too_long:
        raise ValueError(
            f"样本 {too_long[0]} 有 {lengths[too_long[0]]} token，超过一个 micro batch 的上限 {max_tokens}"
        )

    longest_first = sorted(indices, key=lambda i: -lengths[i])  # 稳定排序：等长的保持一步之内的次序
    at_least = -(-sum(lengths[i] for i in indices) // (world_size * max_tokens))
    for num_micro in count(max(1, at_least)):
        for deal in (_deal_balanced, _deal_first_fit, _deal_in_turn):
            dealt = deal(lengths, longest_first, world_size, num_micro, max_tokens)
            if dealt is not None:
                return _fill_empty(dealt)
    raise AssertionError("每箱一条时总放得下")


def _deal_balanced(
    lengths: Mapping[int, int] | Sequence[int],
    longest_first: list[int],
    world_size: int,
    num_micro: int,
    max_tokens: int,
) -> Dealt | None:
    """最长的先放：放进 token 最少的 rank 里 token 最少的那一箱（LPT）；放不下返回 None。"""
    dealt: Dealt = [[[] for _ in range(num_micro)] for _ in range(world_size)]
    loads = [[0] * num_micro for _ in range(world_size)]
    for i in longest_first:
        for r in sorted(range(world_size), key=lambda r: sum(loads[r])):
            j = min(range(num_micro), key=loads[r].__getitem__)
            if loads[r][j] + lengths[i] <= max_tokens:
                dealt[r][j].append(i)
                loads[r][j] += lengths[i]
                break
        else:
            return None
    return dealt


def _deal_first_fit(
    lengths: Mapping[int, int] | Sequence[int],
    longest_first: list[int],
    world_size: int,
    num_micro: int,
    max_tokens: int,
) -> Dealt | None:
    """首次适应递减（FFD）：装得更满，再把各箱从大到小分给 token 最少的 rank；放不下返回 None。"""
    bins: list[list[int]] = [[] for _ in range(world_size * num_micro)]
    loads = [0] * len(bins)
    for i in longest_first:
        b = next((b for b, load in enumerate(loads) if load + lengths[i] <= max_tokens), None)
        if b is None:
            return None
        bins[b].append(i)
        loads[b] += lengths[i]
    dealt: Dealt = [[] for _ in range(world_size)]
    rank_loads = [0] * world_size
    for b in sorted(range(len(bins)), key=lambda b: -loads[b]):
        r = min((r for r in range(world_size) if len(dealt[r]) < num_micro), key=rank_loads.__getitem__)
        dealt[r].append(bins[b])
        rank_loads[r] += loads[b]
    return dealt


def _deal_in_turn(
    lengths: Mapping[int, int] | Sequence[int],
    longest_first: list[int],
    world_size: int,
    num_micro: int,
    max_tokens: int,
) -> Dealt | None:
    """轮流放：每箱的条数相等，因此箱数等于不装箱时必定放得下；放不下返回 None。"""
    num_bins = world_size * num_micro
    dealt = [[longest_first[j * world_size + r :: num_bins] for j in range(num_micro)] for r in range(world_size)]
    fits = all(sum(lengths[i] for i in micro) <= max_tokens for rank in dealt for micro in rank)
    return dealt if fits else None


def _fill_empty(dealt: Dealt) -> Dealt:
    """给空箱从样本最多的箱里移来最短的一条；样本不够时空箱留下。"""
    bins = [micro for rank in dealt for micro in rank]
    for empty in (micro for micro in bins if not micro):
        donor = max(bins, key=len)
        if len(donor) > 1:
            empty.append(donor.pop())
    return dealt


def shared_prefixes(samples: Sequence[EncodedSample]) -> list[tuple[int, list[int]]]:
    """并排的样本里哪些有相同的开头（如同样的指令）：[(共用的 token 数, 样本下标)]，每个样本至多在一组里。

    按 token 排序后，相邻的几个为一组，取省下的 token 最多的分法。
    共用的部分止于首个目标的前两个 token：预测首个目标的那一行各样本自己算。
    """
    ids = [np.asarray(sample.input_ids, dtype=">u4") for sample in samples]
    limits = []
    for sample in samples:
        targets = 1 + np.flatnonzero(np.asarray(sample.labels)[1:] != IGNORE_INDEX)  # 首位的标签不作目标
        limits.append(int(targets[0] if len(targets) else len(sample.labels)) - 1)
    order = sorted(range(len(samples)), key=lambda i: ids[i].tobytes())  # 大端：字节的次序就是 token 的次序
    common = []
    for a, b in pairwise(order):
        size = max(0, min(limits[a], limits[b]))
        differs = ids[a][:size] != ids[b][:size]
        common.append(int(differs.argmax()) if differs.any() else size)

    saved, begins = [0], [0]  # 排序后的前 end 个样本至多省多少，最后一组从第几个起
    for end in range(1, len(order) + 1):
        most, chosen, lowest = saved[-1], end - 1, sys.maxsize
        for begin in range(end - 2, -1, -1):
            lowest = min(lowest, common[begin])
            if lowest < MIN_SHARED_TOKENS:
                break
            if saved[begin] + (end - begin - 1) * lowest > most:
                most, chosen = saved[begin] + (end - begin - 1) * lowest, begin
        saved.append(most)
        begins.append(chosen)
    if saved[-1] < MIN_SAVED_SHARE * sum(map(len, ids)):
        return []
    groups, end = [], len(order)
    while end:
        begin = begins[end]
        if end - begin > 1:
            groups.append((min(common[begin : end - 1]), sorted(order[begin:end])))
        end = begin
    return sorted(groups, key=lambda group: group[1])


def collate(samples: Sequence[EncodedSample], pad_token_id: int, packing: bool) -> dict[str, Any]:
    """把一个 micro batch 的样本拼成张量（int64，在 CPU 上）。

    packing=True：各段首尾相接成一行，input_ids、labels [1, T]；document_lengths、document_parents: list[int]，
    各段的长度（和为 T）与父段。先是各组共用的开头（见 shared_prefixes，只算一次），再依次是各样本余下的部分。
    packing=False：右侧补齐到最长的 L：input_ids、attention_mask、labels [b, L]。
    两者都有 target_rows [N]：展平后的行号 i*L+t（packing 时为 t），该行的下一个标签 labels[i, t+1] 是目标；
    模型由此不必向设备要数量。每个样本的首个标签都是 -100，移位不会跨过样本。
    samples 为空时给出一个只有一个 pad、没有目标的样本：各 rank 的 micro batch 数因此总是相同。
    """
    rows = [(np.asarray(sample.input_ids), np.asarray(sample.labels)) for sample in samples]
    rows = rows or [(np.array([pad_token_id]), np.array([IGNORE_INDEX]))]
    parents = [-1] * len(rows)
    if packing:
        rows, parents = cut_prefixes(rows, shared_prefixes(samples))
    lengths = [len(input_ids) for input_ids, _ in rows]
    width = sum(lengths) if packing else max(lengths)
    shape = (1, width) if packing else (len(rows), width)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    begin = 0
    for i, (row_ids, row_labels) in enumerate(rows):
        row, span = (0, slice(begin, begin + len(row_ids))) if packing else (i, slice(0, len(row_ids)))
        input_ids[row, span] = row_ids
        labels[row, span] = row_labels
        labels[row, span.start] = IGNORE_INDEX
        mask[row, span] = 1
        begin += len(row_ids)

    # 首列总是 -100，所以展平后减一不会跑到上一行
    target_rows = np.flatnonzero(labels != IGNORE_INDEX) - 1
    batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
    if packing:
        batch |= {"document_lengths": lengths, "document_parents": parents}
    else:
        batch["attention_mask"] = torch.from_numpy(mask)
    return {**batch, "target_rows": torch.from_numpy(target_rows)}


def cut_prefixes(
    rows: list[tuple[np.ndarray, np.ndarray]], groups: list[tuple[int, list[int]]]
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[int]]:
    """各样本的 (input_ids, labels) → (各段, 各段的父段)：各组共用的开头在前，各样本余下的部分在后。"""
    heads, tails, parents = [], list(rows), [-1] * len(rows)
    for index, (shared, members) in enumerate(groups):
        heads.append(tuple(values[:shared] for values in rows[members[0]]))
        for i in members:
            tails[i], parents[i] = tuple(values[shared:] for values in rows[i]), index
    return heads + tails, [-1] * len(heads) + parents


def whole_samples(batch: dict[str, Any], name: str) -> list[torch.Tensor]:
    """collate 的结果里各样本的 batch[name]（input_ids 或 labels）：去掉补齐，接回共用的开头。"""
    if "document_lengths" not in batch:
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        return [row[:length] for row, length in zip(batch[name], lengths, strict=True)]
    segments, parents = batch[name][0].split(batch["document_lengths"]), batch["document_parents"]
    first = max(parents) + 1
    return [
        torch.cat([segments[parent], segment]) if parent >= 0 else segment
        for segment, parent in zip(segments[first:], parents[first:], strict=True)
    ]
