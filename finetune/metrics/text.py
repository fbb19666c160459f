"""生成：ROUGE、BLEU-4 与 distinct-2，按中文的字切分。"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.metrics.bootstrap import (
    Reference,
    Scorer,
    as_references,
    build_result,
    resample_sums,
    safe_divide,
    score_with_interval,
)

BLEU_COLUMNS = [f"correct{n}" for n in range(1, 5)] + [f"total{n}" for n in range(1, 5)] + ["hyp_len", "ref_len"]


def segment(text: str) -> list[str]:
    """中文切分：sacreBLEU 的 zh 切分器，汉字与标点一字一个，连续的西文与数字算一个词。ROUGE、BLEU、distinct 都用它。

    以 sacrebleu 2.6.0 为准：U+2001 到 U+2A6D 的符号（℃、“、Ⅲ、①）也一字一个；扩展 B 区起的汉字（U+20000 以上）与假名、
    谚文不切，连成一个词。
    """
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    return TokenizerZh()(text).split()


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """最长公共子序列的长度（Hyyrö 2004 的位并行算法：整数的第 i 位对应 first 的第 i 个词）。"""
    positions: dict[str, int] = {}
    for place, token in enumerate(first):
        positions[token] = positions.get(token, 0) | 1 << place
    mask = (1 << len(first)) - 1
    state = mask
    for token in second:
        matched = state & positions.get(token, 0)
        state = ((state + matched) | (state - matched)) & mask
    return len(first) - state.bit_count()


def ngrams(tokens: Sequence[str], size: int) -> Counter:
    """n 元组的计数。"""
    return Counter(zip(*(tokens[shift:] for shift in range(size)), strict=False))


def rouge_f1(prediction: Sequence[str], reference: Sequence[str]) -> tuple[float, float, float]:
    """一对词序列的 ROUGE-1、ROUGE-2、ROUGE-L 的 F1（Lin 2004，beta = 1）；两者都空时为 1。"""
    if not prediction and not reference:
        return 1.0, 1.0, 1.0
    scores = []
    for size in (1, 2):
        found, expected = ngrams(prediction, size), ngrams(reference, size)
        total = found.total() + expected.total()
        scores.append(2 * (found & expected).total() / total if total else 0.0)
    scores.append(2 * lcs_length(prediction, reference) / (len(prediction) + len(reference)))
    return scores[0], scores[1], scores[2]


def _score_bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU 的十列充分统计量 → 语料级 BLEU-4，公式与平滑（exp）都由 sacreBLEU 计算，除以 100。

    全部预测都没有四个词时，只算到有的阶（effective order），全对就是 1；有四元组时与不用它相同。
    """
    from sacrebleu.metrics import BLEU

    def one(row: list[int]) -> float:
        statistics = (row[:4], row[4:8], row[8], row[9])
        return BLEU.compute_bleu(*statistics, smooth_method="exp", effective_order=True).score / 100.0

    return np.asarray([one(row) for row in sums.round().astype(int).tolist()])


def rouge(
    predictions: Sequence[str],
    references: Sequence[Reference],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """生成任务的 ROUGE-1/2/L（各行 F1 的平均，Lin 2004）、BLEU-4（语料级，Papineni 2002，sacreBLEU）与 distinct-2。

    切分见 segment，不做其他规范化。一行有多条参考时 ROUGE 取各指标最高者，BLEU 按多参考的定义计算。
    distinct-2（Li 2016）是全部预测里不同二元组数与二元组总数之比；重抽行会凭空造出重复，所以区间按行分摊计算：
    一个二元组的 1 分由出现它的各行均分，点估计不变。
    返回 score（ROUGE-L）、ci_low、ci_high、num_rows、details（五个分数各带区间、空回答数）、per_row。
    """
    from sacrebleu.metrics import BLEU

    listed = as_references(predictions, references)
    bleu = BLEU(tokenize="zh", effective_order=True)
    tokens = [segment(prediction) for prediction in predictions]
    bigrams = [ngrams(row, 2) for row in tokens]
    num_rows_with = Counter(bigram for row in bigrams for bigram in row)
    rows = []
    for prediction, words, pairs, options in zip(predictions, tokens, bigrams, listed, strict=True):
        best = np.max([rouge_f1(words, segment(option)) for option in options], axis=0)
        stats = bleu.sentence_score(prediction, options)
        distinct = sum(1.0 / num_rows_with[pair] for pair in pairs)
        rows.append([*best, *stats.counts, *stats.totals, stats.sys_len, stats.ref_len, distinct, pairs.total()])
    # 第一列恒为 1，列和就是行数，均值因此也是列和的函数
    counts = np.column_stack([np.ones(len(rows)), np.asarray(rows, float)])
    sums = resample_sums(counts, num_resamples, seed)
    scorers: dict[str, Scorer] = {
        "rouge1": lambda s: s[:, 1] / s[:, 0],
        "rouge2": lambda s: s[:, 2] / s[:, 0],
        "rougeL": score_rouge_l,
        "bleu4": lambda s: _score_bleu(s[:, 4:14]),
        "distinct2": lambda s: safe_divide(s[:, 14], s[:, 15]),
    }
    details: dict[str, Any] = {name: score_with_interval(scorer, counts, sums) for name, scorer in scorers.items()}
    details["empty_predictions"] = sum(not row for row in tokens)
    columns = ["rows", "rouge1", "rouge2", "rougeL", *BLEU_COLUMNS, "distinct_bigrams", "bigrams"]
    return build_result("rouge", score_rouge_l, columns, counts, sums, details)


def score_rouge_l(sums: np.ndarray) -> np.ndarray:
    return sums[:, 3] / sums[:, 0]
