"""抽取：三元组 F1。"""

import unicodedata
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


def parse_triples(text: str, separator: str = "_") -> tuple[set[tuple[str, str, str]], int]:
    """把一行一个「头_关系_尾」的文本解析为三元组集合（重复只留一个），并返回格式不对的行数。

    先规范化（normalize），再按分隔符切；不是恰好三段或有空段的非空行算格式不对。空文本是空集合。
    """
    triples, malformed = set(), 0
    for line in text.splitlines():
        parts = tuple(normalize(part) for part in unicodedata.normalize("NFKC", line).split(separator))
        if len(parts) == 3 and all(parts):
            triples.add(parts)
        elif line.strip():
            malformed += 1
    return triples, malformed


def score_triples(sums: np.ndarray) -> np.ndarray:
    """列 tp、predicted、expected、malformed → 微平均 F1；两边都没有三元组时，没有格式不对的行为 1，有则为 0。"""
    return safe_divide(2 * sums[:, 0], sums[:, 1] + sums[:, 2], empty=_is_clean(sums))


def _is_clean(sums: np.ndarray) -> np.ndarray:
    return ~sums[:, 3:].any(axis=1)


def triple_f1(
    predictions: Sequence[str],
    references: Sequence[Reference],
    *,
    separator: str = "_",
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """三元组抽取的微平均精确率、召回率与 F1（信息抽取的通行定义：头、关系、尾全等才算对），另按关系分列。

    规范化见 normalize；同一行里重复的三元组只算一次；格式不对的行不成其为三元组，不进精确率，单独计数。
    参考与预测都为空的行不增减计数，算整行全对；有格式不对的行就不算。有多条参考时取该行 F1 最高的一条（相同取前者）。
    返回 score（F1）、ci_low、ci_high、num_rows、details（precision、recall、per_relation、各种计数）、per_row。
    """
    listed = as_references(predictions, references)
    rows, relations = [], {}
    malformed_references, empty_rows, empty_correct, exact = 0, 0, 0, 0
    for prediction, options in zip(predictions, listed, strict=True):
        found, bad = parse_triples(prediction, separator)
        parsed = [parse_triples(option, separator) for option in options]
        malformed_references += sum(bad for _, bad in parsed)
        # max 取第一个最大值
        expected = max((triples for triples, _ in parsed), key=lambda triples: _row_f1(found, triples, bad))
        rows.append((len(found & expected), len(found), len(expected), bad))
        exact += found == expected and not bad
        empty_rows += not expected
        empty_correct += not expected and not found and not bad
        for column, triples in enumerate((found & expected, found, expected)):
            for _, relation, _ in triples:
                relations.setdefault(relation, [0, 0, 0])[column] += 1
    counts = np.asarray(rows, float)
    sums = resample_sums(counts, num_resamples, seed)
    by_support = sorted(relations.items(), key=lambda item: (-item[1][2], item[0]))
    per_relation = {relation: class_scores(*numbers) for relation, numbers in by_support}
    tp, predicted, expected, malformed = (int(value) for value in counts.sum(axis=0))
    details = {
        "precision": score_with_interval(
            lambda s: safe_divide(s[:, 0], s[:, 1], empty=0.0 if expected else _is_clean(s)), counts, sums
        ),
        "recall": score_with_interval(lambda s: safe_divide(s[:, 0], s[:, 2], empty=1.0), counts, sums),
        "exact_match": exact / len(rows),
        "correct": tp,
        "predicted": predicted,
        "expected": expected,
        "malformed_lines": malformed,
        "malformed_reference_lines": malformed_references,
        "empty_reference_rows": empty_rows,
        "empty_reference_rows_correct": empty_correct,
        "per_relation": per_relation,
    }
    return build_result(
        "triple_f1", score_triples, ["correct", "predicted", "expected", "malformed"], counts, sums, details
    )


def _row_f1(found: set, expected: set, bad: int) -> float:
    return 2 * len(found & expected) / (len(found) + len(expected)) if found or expected else float(not bad)
