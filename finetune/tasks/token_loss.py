"""目标 token 的交叉熵：监督微调与继续预训练的损失。"""

import math
from typing import TYPE_CHECKING

from utils import world_size

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.data.step_loader import StepBatch


class TokenLoss:
    """一步的每个目标 token 权重相同：损失之和除以全局目标数 N。

    Args:
        scores_perplexity: 评估时另记困惑度。
    """

    def __init__(self, scores_perplexity: bool = False):
        self.scores_perplexity = scores_perplexity

    with_samples = False  # StepLoader 的同名参数
    partners = eval_partners = None  # 同上

    def extra_passes(self, num_epochs: float) -> float:
        """除了训练自己的，另要对全部训练数据作几遍前向；推算时间用。"""
        return 0.0

    def start(self, engine, data_sets, pad_token_id: int) -> None:
        """第一步之前，权重还是起点的；集合操作。"""

    def prepare(self, engine, step: "StepBatch") -> None:
        """一步的第一次前向之前。"""

    def loss(self, engine, batch: dict, step: "StepBatch") -> "Tensor":
        """一个 micro batch 的损失；DeepSpeed 对进程取平均，所以先乘进程数。"""
        return engine(**batch, num_items_in_batch=step.num_items / world_size(), use_cache=False).loss

    def figures(self, engine, step: "StepBatch") -> dict[str, tuple[float, int]]:
        """这一步除损失之外要记的：名字 → (和, 个数)；集合操作。"""
        return {}

    def scores(self, nll: float) -> dict[str, float]:
        """评估的各项，由目标 token 的平均损失算出。"""
        return {"nll": nll, "perplexity": math.exp(min(nll, 700))} if self.scores_perplexity else {"nll": nll}
