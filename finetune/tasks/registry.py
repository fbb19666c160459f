"""训练阶段的表，与选哪一个。"""

from dataclasses import dataclass

from finetune.options import flag
from finetune.tasks import dpo, kto, orpo, pretrain, sft, simpo

TASKS = {module.TASK.name: module.TASK for module in (sft, pretrain, dpo, orpo, simpo, kto)}


@dataclass
class TaskChoice:
    """选哪一个阶段。"""

    task: str = flag(
        "sft",
        "训练的阶段：sft 监督微调，pretrain 继续预训练，dpo、orpo、simpo、kto 偏好优化；见 docs/stages.md",
        choices=tuple(TASKS),
    )
