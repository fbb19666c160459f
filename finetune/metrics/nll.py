"""目标 token 的平均负对数似然。"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.metrics.bootstrap import build_result, resample_sums, safe_divide


def score_nll(sums: np.ndarray) -> np.ndarray:
    return safe_divide(sums[:, 0], sums[:, 1], empty=float("nan"))


def nll(
    loss_sums: Sequence[float],
    token_counts: Sequence[int],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """目标 token 的平均负对数似然（nat/token）：全部行的损失之和除以目标 token 总数，每个 token 等权。

    loss_sums：各行目标 token 的负对数似然之和；token_counts：各行的目标 token 数。困惑度在 details.perplexity。
    """
    if len(loss_sums) != len(token_counts) or not len(loss_sums):
        raise ValueError(f"损失有 {len(loss_sums)} 行，token 数有 {len(token_counts)} 行，两者必须等长且非空")
    if not sum(token_counts):
        raise ValueError("没有目标 token，算不出 NLL；请检查测试文件的 output")
    counts = np.column_stack([np.asarray(loss_sums, float), np.asarray(token_counts, float)])
    sums = resample_sums(counts, num_resamples, seed)
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(score_nll(counts.sum(axis=0, keepdims=True))[0]))
    details = {"perplexity": perplexity, "num_target_tokens": int(counts[:, 1].sum())}
    return build_result("nll", score_nll, ["loss_sum", "target_tokens"], counts, sums, details)
