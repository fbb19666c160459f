"""各指标共用：规范化、自助法的区间、结果的排法。"""

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# 参考答案：一条字符串，或多条等价答案的列表（取最好的一条）
Reference = str | Sequence[str]
Scorer = Callable[[np.ndarray], np.ndarray]


def normalize(text: str) -> str:
    """三元组与标签比较前的规范化：NFKC（全角转半角、兼容字形合一），首尾去空白，内部连续空白并成一个空格。"""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def safe_divide(numerator: np.ndarray, denominator: np.ndarray, empty: float | np.ndarray = 0.0) -> np.ndarray:
    """逐元素相除，分母为零处取 empty（一个数，或逐元素）。"""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, empty, float), where=denominator != 0)


def resample_sums(counts: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """有放回地重抽行，返回每次重抽的列和；counts [行, 列] → [num_resamples, 列]。同一种子、同样的行数抽到同样的行。"""
    rng = np.random.default_rng(seed)
    num_rows = len(counts)
    blocks = []
    for start in range(0, num_resamples, 100):
        block = min(100, num_resamples - start)
        # 重抽 n 行等价于给每行一个多项分布的权重，于是整块是一次矩阵乘
        weights = rng.multinomial(num_rows, np.full(num_rows, 1.0 / num_rows), size=block)
        blocks.append(weights @ counts)
    return np.concatenate(blocks)


def score_with_interval(scorer: Scorer, counts: np.ndarray, sums: np.ndarray) -> dict[str, float]:
    """一个分数及其 95% 百分位自助区间；sums 是 resample_sums 的结果，scorer 把 [m, 列] 的列和变成 [m] 个分数。"""
    score = float(scorer(counts.sum(axis=0, keepdims=True))[0])
    low, high = np.percentile(scorer(sums), [2.5, 97.5])
    return {"score": score, "ci_low": float(low), "ci_high": float(high)}


def as_references(predictions: Sequence[Any], references: Sequence[Reference]) -> list[list[str]]:
    """检查两列等长且非空，并把每行参考统一成非空列表；不合要求时抛 ValueError。"""
    if len(predictions) != len(references):
        raise ValueError(f"预测有 {len(predictions)} 行，参考有 {len(references)} 行，两者必须一一对应")
    if not predictions:
        raise ValueError("没有可评测的行：预测与参考都是空的，请检查测试文件")
    listed = [[item] if isinstance(item, str) else list(item) for item in references]
    for row, item in enumerate(listed):
        if not item or not all(isinstance(text, str) for text in item):
            raise ValueError(f"第 {row + 1} 行的参考应是字符串或非空的字符串列表，现在是 {references[row]!r}")
    return listed


def build_result(
    metric: str, scorer: Scorer, columns: list[str], counts: np.ndarray, sums: np.ndarray, details: dict
) -> dict[str, Any]:
    """各指标共同的返回格式；主分数由 scorer 给出，per_row 留作配对自助法。"""
    return {
        "metric": metric,
        **score_with_interval(scorer, counts, sums),
        "num_rows": len(counts),
        "details": details,
        "per_row": {"columns": columns, "counts": np.round(counts, 8).tolist()},
    }


def class_scores(correct: float, predicted: float, expected: float) -> dict[str, float]:
    """一个关系或标签的精确率、召回率、F1 与三个计数。"""
    return {
        "precision": float(safe_divide(correct, predicted)),
        "recall": float(safe_divide(correct, expected)),
        "f1": float(safe_divide(2 * correct, predicted + expected)),
        "correct": int(correct),
        "predicted": int(predicted),
        "expected": int(expected),
    }
