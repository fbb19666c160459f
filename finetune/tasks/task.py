"""一个阶段要说清楚的事；各阶段写在自己的文件里，registry.py 把它们排成表。"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Task:
    """一个训练阶段；读哪些行见 finetune/data/samples.py 的 READS。

    Args:
        open: 参数 → 怎样算一步的损失、记录什么（见 token_loss.TokenLoss，它是接口的全部）。
        group: 编码后的样本 → 一步所数的东西（样本、块或对）。
        width: 数据的一行是几个样本：好、坏一对是 2。
        flags: 只属于它（与同类阶段）的参数。
        defaults: 命令行没有写时的值。
        learning_rate_scale: 缺省的学习率是方法的多少倍。
        is_preference: 学偏好：没有重放，评估看这一阶段的损失。
    """

    name: str
    open: Callable[[Any], Any]
    group: Callable[[Any], Any] = lambda data_set: data_set
    width: int = 1
    flags: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    learning_rate_scale: float = 1.0
    is_preference: bool = False
