"""simpo：没有参考模型的偏好优化（Meng 等，2024）。−log σ(β·Δ − γ)，Δ 是好、坏两个回答平均对数概率之差。"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.data.grouping import pairs
from finetune.tasks.preference import DEFAULTS, Answers, PreferenceLoss, logistic
from finetune.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor


def simpo_loss(answers: Answers, options) -> tuple[Tensor, Tensor]:
    """各对的损失 [P] 与奖励 β·平均对数概率 [P, 2]。"""
    rewards = options.beta * answers.means
    losses = logistic(rewards[:, 0] - rewards[:, 1] - options.simpo_gamma, options.label_smoothing)
    return losses - options.sft_weight * answers.means[:, 0], rewards


TASK = Task(
    "simpo",
    open=lambda options: PreferenceLoss(options, simpo_loss, uses_reference=False),
    group=pairs,
    width=2,
    flags=("beta", "label_smoothing", "sft_weight", "simpo_gamma"),
    defaults={**DEFAULTS, "beta": 2.0},
    learning_rate_scale=0.05,
    is_preference=True,
)
