"""比较的统计：跨种子的分数与区间、方法之间的配对自助法、Holm 校正、各格数值的汇总；纯函数，只用保存下来的计数。"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from finetune.comparison.plan import methods_of
from finetune.metrics.bootstrap import resample_sums
from finetune.metrics.registry import SCORERS

# 2,000 次时，同样的数据换个自助法的种子，p 在 0.015 与 0.023 之间跳；校正后的结论会变
NUM_RESAMPLES = 20000
# 主分数所用的列；没有写的指标用全部的列
SCORED_COLUMNS = {"triple_f1": (0, 1, 2), "rouge": (0, 3)}
COSTS = ("trainable_parameters", "peak_memory_mb", "seconds", "tokens_per_second", "checkpoint_bytes")
Columns = list[str | list[float]]  # 逐行计数的各列：全是一位数的列是一串数字，其余是数的列表
Drawn = tuple[float, np.ndarray]  # 平均分，与各次重抽的平均分


def compact_counts(per_row: dict[str, Any], metric: str) -> Columns:
    """指标的 per_row → 重写报告够用的各列：主分数不用的列写成 0，末尾的略去。"""
    counts = np.asarray(per_row["counts"], float)
    if kept := SCORED_COLUMNS.get(metric):
        counts = counts[:, : kept[-1] + 1] * np.isin(np.arange(kept[-1] + 1), kept)
    digits = set(range(10))
    return ["".join(f"{v:.0f}" for v in column) if set(column) <= digits else column.tolist() for column in counts.T]


def restored_counts(columns: Columns) -> np.ndarray:
    """compact_counts 的结果 → 计数 [行, 列]。"""
    return np.array([[float(value) for value in column] for column in columns]).T


def resampled_scores(per_seed: Sequence[Columns], metric: str, num_resamples: int = NUM_RESAMPLES) -> Drawn:
    """几个种子的平均分，与两层自助法（先抽行，再抽种子）的 [num_resamples] 个平均分。

    per_seed：各种子在同一测试文件上的计数。行的抽样对各种子、各方法相同，种子的抽样也相同，差值因此是配对的。
    """
    scorer, counts = SCORERS[metric], [restored_counts(columns) for columns in per_seed]
    score = float(np.mean([scorer(part.sum(axis=0, keepdims=True))[0] for part in counts]))
    sums = np.hsplit(resample_sums(np.hstack(counts), num_resamples, 0), len(counts))
    drawn = np.stack([scorer(part) for part in sums])  # [种子, 重抽]
    picks = np.random.default_rng(1).integers(len(counts), size=(num_resamples, len(counts)))
    return score, drawn[picks, np.arange(num_resamples)[:, None]].mean(axis=1)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% 百分位区间。"""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def paired_difference(first: Drawn, second: Drawn) -> dict[str, float]:
    """两个 resampled_scores 之差（first - second）：差、95% 区间、双侧 p 值（Koehn 2004 的配对自助法，加种子一层）。"""
    difference = first[1] - second[1]
    low, high = interval(difference)
    tail = min((difference <= 0).sum(), (difference >= 0).sum())
    p_value = min(1.0, 2.0 * (float(tail) + 1.0) / (len(difference) + 1.0))
    return {"difference": first[0] - second[0], "ci_low": low, "ci_high": high, "p_value": p_value}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm（1979）逐步校正后的 p 值，次序不变。"""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def summarize(plan: dict, results: list[dict], base: dict | None) -> dict[str, Any]:
    """全部汇总 → {"cells": {(任务, 方法): 汇总}, "pairs": {任务: [比较]}, "chance": {任务: 分数}}；只用做完的正式格子。

    汇总里有 score、ci_low、ci_high、by_seed、各项开销与遗忘的平均、other（别的任务：分数）与 vs_base（同基座之差）。
    """
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    pairs: dict[str, list[dict[str, Any]]] = {}
    metrics = {task["name"]: task["metric"] for task in plan["tasks"]}
    for name, metric in metrics.items():
        done: dict[str, dict[int, Columns]] = {}  # 方法 → 种子 → 计数

        def drawn(method: str, seeds: Sequence[int], done=done, metric=metric) -> Drawn:
            return resampled_scores([done[method][seed] for seed in seeds], metric)

        for method in methods_of(plan, name):
            rows = [r for r in results if (r["stage"], r["task"], r["method"]) == ("final", name, method)]
            if rows:
                rows.sort(key=lambda row: row["seed"])  # 做完的次序各方法不同；比较按种子配对
                done[method] = {row["seed"]: row["per_row"] for row in rows}
                base_drawn = None
                if base is not None:
                    own = base["forgetting"]["other_tasks"][name]["test_per_row"]
                    base_drawn = resampled_scores([own] * len(rows), metric)
                cells[name, method] = summarize_cell(rows, drawn(method, list(done[method])), base_drawn)
        pairs[name] = []
        for first, second in combinations(done, 2):
            if shared := [seed for seed in done[first] if seed in done[second]]:
                found = paired_difference(drawn(first, shared), drawn(second, shared))
                pairs[name].append({"first": first, "second": second, "seeds": shared, **found})
        for entry, adjusted in zip(pairs[name], holm([entry["p_value"] for entry in pairs[name]]), strict=True):
            entry["p_holm"] = adjusted
    chance = {name: chance_score(metrics[name], cell["counts"]) for (name, _), cell in cells.items()}
    return {"cells": cells, "pairs": pairs, "chance": chance}


def chance_score(metric: str, counts: np.ndarray) -> float | None:
    """分类任务上碰运气（各标签机会相等）的宏 F1（期望），由一格的计数得到；别的任务为 None。"""
    if metric != "label_f1":
        return None
    shares = counts[:, 3::3].mean(axis=0)  # 各标签在测试行里的份额，也就是总猜它时的准确率
    recall = 1 / len(shares)
    return mean(2 * share * recall / (share + recall) for share in shares)


def summarize_cell(rows: list[dict], drawn: Drawn, base_drawn: Drawn | None) -> dict[str, Any]:
    """一个任务上一种方法各种子的行（按种子排好）→ 汇总。"""
    low, high = interval(drawn[1])
    forgetting = [row["forgetting"] for row in rows]
    return {
        **{"score": drawn[0], "ci_low": low, "ci_high": high, "by_seed": [row["score"] for row in rows]},
        "seeds": [row["seed"] for row in rows],
        **{key: [row[key] for row in rows] for key in ("tokens", "losses")},
        "learning_rate": rows[0]["learning_rate"],
        **{key: mean(row[key] for row in rows) for key in COSTS},
        "test_nll": mean(row["test_nll"] for row in rows),
        "ranges": {key: (min(row[key] for row in rows), max(row[key] for row in rows)) for key in COSTS},
        **{key: mean(part[key] for part in forgetting) for key in ("general_nll_before", "general_nll_after", "kl")},
        "rise": mean(part["general_nll_after"] - part["general_nll_before"] for part in forgetting),
        "other": {
            other: mean(part["other_tasks"][other]["score"] for part in forgetting)
            for other in forgetting[0]["other_tasks"]
        },
        "vs_base": None if base_drawn is None else paired_difference(drawn, base_drawn),
        "counts": restored_counts(rows[0]["per_row"]),
    }
