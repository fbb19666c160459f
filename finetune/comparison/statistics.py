"""比较的统计：跨种子的分数与区间、方法之间的配对自助法、Holm 校正、各格数值的汇总；纯函数，只用保存下来的计数。"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.metrics.bootstrap import resample_sums
from finetune.metrics.registry import SCORERS

# 2,000 次时，同样的数据换个自助法的种子，p 在 0.015 与 0.023 之间跳；校正后的结论会变
NUM_RESAMPLES = 20000


def resampled_scores(
    per_seed: Sequence[dict[str, Any]], metric: str, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, np.ndarray]:
    """几个种子的平均分，与两层自助法（先抽行，再抽种子）的 [num_resamples] 个平均分。

    per_seed：各种子的 per_row（同一测试文件）。行的抽样对各种子、各方法相同，种子的抽样也相同，差值因此是配对的。
    """
    scorer = SCORERS[metric]
    counts = [np.asarray(part["counts"], float) for part in per_seed]
    assert len({part.shape for part in counts}) == 1, "各种子的测试行必须相同"
    score = float(np.mean([scorer(part.sum(axis=0, keepdims=True))[0] for part in counts]))
    drawn = np.stack([scorer(resample_sums(part, num_resamples, seed)) for part in counts])  # [种子, 重抽]
    picks = np.random.default_rng(seed + 1).integers(len(counts), size=(num_resamples, len(counts)))
    return score, drawn[picks, np.arange(num_resamples)[:, None]].mean(axis=1)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% 百分位区间。"""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def paired_difference(first: tuple[float, np.ndarray], second: tuple[float, np.ndarray]) -> dict[str, float]:
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


def mean(values: Sequence[float | None]) -> float | None:
    """平均；没有值时为 None。"""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def label_shares(per_row: dict[str, Any]) -> list[float]:
    """label_f1 的逐行计数 → 各标签在测试行里的份额。"""
    expected = [index for index, name in enumerate(per_row["columns"]) if name.endswith(".expected")]
    return [float(share) for share in np.asarray(per_row["counts"], float)[:, expected].mean(axis=0)]


def summarize(plan: dict, results: list[dict], details: dict[str, dict], base: dict | None) -> dict[str, Any]:
    """全部汇总 → {"cells": {(任务, 方法): 汇总}, "pairs": {任务: [比较]}}；只用已做完的正式格子。

    汇总里有 score、ci_low、ci_high、by_seed、各项开销与遗忘的平均、other（别的任务：分数）与 vs_base（同基座之差）。
    """
    from finetune.comparison.plan import cell_of

    cells: dict[tuple[str, str], dict[str, Any]] = {}
    pairs: dict[str, list[dict[str, Any]]] = {}
    for task in plan["tasks"]:
        name, drawn = task["name"], {}
        base_entry = (base or {}).get("forgetting", {}).get("other_tasks", {}).get(name)
        base_drawn = None
        if base_entry is not None:
            base_drawn = resampled_scores([base_entry["test_per_row"]] * len(plan["seeds"]), task["metric"])
        for method in plan["methods"]:
            rows = [r for r in results if (r["stage"], r["task"], r["method"]) == ("final", name, method)]
            if not rows:
                continue
            rows.sort(key=lambda row: row["seed"])  # 做完的次序各方法不同；比较按种子配对
            own = [details[cell_of(row).name] for row in rows]
            drawn[method] = resampled_scores([detail["per_row"] for detail in own], task["metric"])
            low, high = interval(drawn[method][1])
            forgetting = [row["forgetting"] for row in rows]
            cells[name, method] = {
                "score": drawn[method][0],
                "ci_low": low,
                "ci_high": high,
                "seeds": [row["seed"] for row in rows],
                "by_seed": [row["score"] for row in rows],
                "label_shares": label_shares(own[0]["per_row"]) if task["metric"] == "label_f1" else None,
                "learning_rate": rows[0]["learning_rate"],
                "tokens": [detail["tokens"] for detail in own],
                "losses": [detail["losses"] for detail in own],
                **{key: mean([row[key] for row in rows]) for key in COSTS},
                "ranges": {key: (min(row[key] for row in rows), max(row[key] for row in rows)) for key in COSTS},
                "nll_before": mean([entry["general_nll_before"] for entry in forgetting]),
                "nll_after": mean([entry["general_nll_after"] for entry in forgetting]),
                "kl": mean([entry["kl"] for entry in forgetting]),
                "other": {
                    other: mean([entry["other_tasks"][other]["score"] for entry in forgetting])
                    for other in forgetting[0]["other_tasks"]
                },
                "vs_base": None if base_drawn is None else paired_difference(drawn[method], base_drawn),
            }
        names = list(drawn)
        found = [
            {"first": a, "second": b, **paired_difference(drawn[a], drawn[b])}
            for index, a in enumerate(names)
            for b in names[index + 1 :]
            if cells[name, a]["seeds"] == cells[name, b]["seeds"]
        ]
        for entry, adjusted in zip(found, holm([entry["p_value"] for entry in found]), strict=True):
            entry["p_holm"] = adjusted
        pairs[name] = found
    return {"cells": cells, "pairs": pairs}


COSTS = ("trainable_parameters", "peak_memory_mb", "seconds", "tokens_per_second", "checkpoint_bytes")
