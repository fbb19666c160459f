"""orpo：比值比的偏好优化（Hong 等，2024），没有参考模型。NLL − λ·log σ(log 比值比)，λ 是 --beta。

NLL 只算好的回答，取它各 token 的平均；比值 odds = p/(1−p)，p 是回答各 token 的几何平均概率。
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.data.grouping import pairs
from finetune.tasks.preference import DEFAULTS, Answers, PreferenceLoss, logistic
from finetune.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor


def orpo_loss(answers: Answers, options) -> tuple[Tensor, Tensor]:
    """各对的损失 [P] 与 λ·平均对数概率 [P, 2]。"""
    import torch

    means = answers.means
    log_odds = means - torch.log(-torch.expm1(means))
    return -means[:, 0] + options.beta * logistic(log_odds[:, 0] - log_odds[:, 1], 0.0), options.beta * means


TASK = Task(
    "orpo",
    open=lambda options: PreferenceLoss(options, orpo_loss, uses_reference=False),
    group=pairs,
    width=2,
    flags=("beta",),
    defaults=DEFAULTS,
    learning_rate_scale=0.05,
    is_preference=True,
)
