"""一种训练方法要说清楚的事；各方法写在自己的文件里，registry.py 把它们排成表。"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Prompt(NamedTuple):
    """方法放在样本之前的位置数：推算用。"""

    key_values: int = 0  # 每层的键值前缀（P-Tuning 第 2 版）
    tokens: int = 0  # 词嵌入处的提示（第 1 版）


@dataclass(frozen=True)
class TrainMethod:
    """一种训练方法。

    Args:
        options: 只属于它的参数，一个 dataclass（见 finetune/options.py）。
        apply: (模型, 参数) → 包装好、定好哪些参数可以训练的模型；模型可以在 meta 设备上。
        is_trainable: (参数名, 参数) → 这种方法是不是训练它。
        problems: 它的参数互相之间的问题。
        saves_adapter: 检查点只存适配器，可以用 --adapter_path 接着训练。
        prompt: 样本之前放了什么。
        learning_rate_ratio: (参数名, 参数) → 它的学习率是 --learning_rate 的多少倍。
        smaller: 放不下时它自己还能怎样变小；已经在用的不说。
    """

    name: str
    learning_rate: float
    options: type
    apply: Callable[[Any, Any], Any]
    is_trainable: Callable[[str, Any], bool]
    problems: Callable[[Any], list[str]] = lambda options: []
    saves_adapter: bool = False
    prompt: Callable[[Any], Prompt] = lambda options: Prompt()
    learning_rate_ratio: Callable[[str, Any], float] = lambda name, options: 1.0
    smaller: Callable[[Any], list[str]] = lambda options: []
