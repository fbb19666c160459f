"""sft：监督微调。提示之外的每个目标 token 的交叉熵。"""

from finetune.tasks.task import Task
from finetune.tasks.token_loss import TokenLoss

TASK = Task("sft", open=lambda options: TokenLoss())
