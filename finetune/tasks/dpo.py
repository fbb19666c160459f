"""dpo：直接偏好优化（Rafailov 等，2023）。−log σ(β·Δ)，Δ 是好、坏两个回答对参考模型的对数比之差。

label_smoothing 是 cDPO（Mitchell，2023）；sft_weight 加上好的回答的 NLL（RPO，Pang 等，2024）。
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.data.grouping import pairs
from finetune.tasks.preference import DEFAULTS, Answers, PreferenceLoss, logistic
from finetune.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor


def dpo_loss(answers: Answers, options) -> tuple[Tensor, Tensor]:
    """各对的损失 [P] 与隐含的奖励 β·log(π/π_ref) [P, 2]。"""
    rewards = options.beta * (answers.log_probs - answers.reference)
    losses = logistic(rewards[:, 0] - rewards[:, 1], options.label_smoothing)
    return losses - options.sft_weight * answers.means[:, 0], rewards


TASK = Task(
    "dpo",
    open=lambda options: PreferenceLoss(options, dpo_loss, uses_reference=True),
    group=pairs,
    width=2,
    flags=("beta", "label_smoothing", "sft_weight"),
    defaults=DEFAULTS,
    learning_rate_scale=0.05,
    is_preference=True,
)
