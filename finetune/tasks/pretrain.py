"""pretrain：继续预训练。文档并排装进 max_len 的块，各看各的，每个 token 都是目标；也读问答与对话，只训练回答。"""

from finetune.data.grouping import blocks
from finetune.tasks.task import Task
from finetune.tasks.token_loss import TokenLoss

TASK = Task("pretrain", open=lambda options: TokenLoss(scores_perplexity=True), group=blocks)
