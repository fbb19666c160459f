"""选择题：各科的准确率、各科平均与全部题的准确率，以及同样的题上两个检查点之差，各附 95% 自助区间。"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.metrics.bootstrap import resample_sums

Correct = Mapping[str, Sequence[bool]]  # 科目 → 各题对不对
MEAN, ALL = "mean", "all"  # 各科等权的平均，与全部题一题一份的准确率


def accuracies(correct: Correct, num_resamples: int, seed: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """各科、mean 与 all 的准确率 → (分数, 各次重抽的分数 [num_resamples])；在各科之内重抽题。

    同样的种子与题数抽到同样的题：两个检查点的差因此是配对的。没有题时抛 ValueError。
    """
    if not correct or not all(len(answers) for answers in correct.values()):
        raise ValueError("没有可评分的题：各科都要至少一题")
    if taken := {MEAN, ALL} & correct.keys():
        raise ValueError(f"科目不能叫 {'、'.join(taken)}：它们是平均与总数的名字，请改名")
    counts = {name: np.asarray(answers, float)[:, None] for name, answers in correct.items()}
    sums = {name: resample_sums(part, num_resamples, seed + i)[:, 0] for i, (name, part) in enumerate(counts.items())}
    total = sum(len(part) for part in counts.values())
    scores = {name: float(part.mean()) for name, part in counts.items()}
    drawn = {name: sums[name] / len(part) for name, part in counts.items()}
    scores |= {MEAN: float(np.mean(list(scores.values()))), ALL: sum(float(p.sum()) for p in counts.values()) / total}
    return scores, {**drawn, MEAN: np.mean(list(drawn.values()), axis=0), ALL: sum(sums.values()) / total}


def with_intervals(scores: dict[str, float], drawn: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """各名字的 score、ci_low、ci_high。"""
    ends = {name: np.percentile(values, [2.5, 97.5]) for name, values in drawn.items()}
    return {name: {"score": scores[name], "ci_low": float(a), "ci_high": float(b)} for name, (a, b) in ends.items()}


def accuracy(correct: Correct, num_resamples: int = 1000, seed: int = 0) -> dict[str, dict[str, float]]:
    """科目、mean、all → score、ci_low、ci_high。"""
    return with_intervals(*accuracies(correct, num_resamples, seed))


def accuracy_change(first: Correct, second: Correct, num_resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """同样的题上 second - first；形状同 accuracy。题不同时抛 ValueError。"""
    if [(name, len(part)) for name, part in first.items()] != [(name, len(part)) for name, part in second.items()]:
        raise ValueError("两个检查点答的不是同样的题，不能相减")
    (old, old_drawn), (new, new_drawn) = (accuracies(part, num_resamples, seed) for part in (first, second))
    return with_intervals({name: new[name] - old[name] for name in new}, {n: new_drawn[n] - old_drawn[n] for n in new})
