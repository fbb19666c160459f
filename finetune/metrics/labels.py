"""分类：标签宏平均 F1。"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.metrics.bootstrap import (
    Reference,
    as_references,
    build_result,
    class_scores,
    normalize,
    resample_sums,
    safe_divide,
    score_with_interval,
)


def score_labels(sums: np.ndarray) -> np.ndarray:
    """列 correct、各标签的 (tp, predicted, expected) → 宏平均 F1；一次都没出现的标签不进平均。"""
    per_label = sums[:, 1:].reshape(len(sums), -1, 3)
    total = per_label[:, :, 1] + per_label[:, :, 2]
    f1 = safe_divide(2 * per_label[:, :, 0], total)
    return safe_divide(f1.sum(axis=1), (total > 0).sum(axis=1))


def label_f1(
    predictions: Sequence[str],
    references: Sequence[Reference],
    *,
    labels: Sequence[str] | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """分类的宏平均 F1（各标签 F1 的算术平均，同 scikit-learn 的 macro）与准确率。

    规范化见 normalize。labels 缺省为参考中出现过的全部标签；标签以外的回答算错并单独计数，它不成为新的一类。
    一行有多条参考时命中任意一条算对，未命中按第一条计。
    返回 score（宏 F1）、ci_low、ci_high、num_rows、details（accuracy、out_of_label、per_label 等）、per_row。
    """
    listed = [[normalize(text) for text in options] for options in as_references(predictions, references)]
    given = sorted({text for options in listed for text in options}) if labels is None else labels
    names = [normalize(label) for label in given]
    unknown = sorted({text for options in listed for text in options} - set(names))
    if unknown:
        raise ValueError(f"参考里有不在标签集合 {names} 中的标签 {unknown[:5]}；请补全 labels 或修正测试文件")
    index = {label: position for position, label in enumerate(names)}
    counts = np.zeros((len(listed), 1 + 3 * len(names)))
    outside = Counter()
    for row, (prediction, options) in enumerate(zip(predictions, listed, strict=True)):
        answer = normalize(prediction)
        expected = answer if answer in options else options[0]
        counts[row, 1 + 3 * index[expected] + 2] = 1
        if answer not in index:
            outside[answer] += 1
            continue
        counts[row, 1 + 3 * index[answer] + 1] = 1
        if answer == expected:
            counts[row, [0, 1 + 3 * index[answer]]] = 1
    sums = resample_sums(counts, num_resamples, seed)
    totals = counts.sum(axis=0)
    per_label = {label: class_scores(*totals[1 + 3 * k : 4 + 3 * k]) for label, k in index.items()}
    details = {
        "accuracy": score_with_interval(lambda s: s[:, 0] / len(listed), counts, sums),
        "out_of_label": sum(outside.values()),
        "out_of_label_kinds": len(outside),
        "out_of_label_examples": [answer for answer, _ in outside.most_common(5)],
        "per_label": per_label,
    }
    columns = ["correct", *(f"{label}.{part}" for label in names for part in ("correct", "predicted", "expected"))]
    return build_result("label_f1", score_labels, columns, counts, sums, details)
