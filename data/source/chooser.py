"""样例数据生成器共用的随机抽取与词表读取。

只用 random.Random(seed).random()：Python 保证它在各版本给出同一序列，而 choice、sample 的取法可能随版本改变。
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class Chooser:
    """按整数种子抽取，同一种子在 Python 3.10–3.12 上给出同样的结果。"""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def below(self, stop: int) -> int:
        """返回 [0, stop) 中的整数。"""
        return int(self._random.random() * stop)

    def between(self, low: int, high: int) -> int:
        """返回 [low, high] 中的整数，两端都可取到。"""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        """以给定概率返回 True。"""
        return self._random.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """抽取一个元素。"""
        return items[self.below(len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """不放回地抽取 count 个元素（不足则全取），次序随机。"""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(min(count, len(pool)))]

    def weighted(self, items: Sequence[tuple[T, int]]) -> T:
        """按整数权重抽取，items 为 (元素, 权重) 的序列。"""
        rest = self.below(sum(weight for _, weight in items))
        for item, weight in items:
            if rest < weight:
                return item
            rest -= weight
        raise AssertionError("权重之和与抽取的位置不符")


def read_word_lines(path: Path) -> list[str]:
    """读词表文件的行，去掉空行与 # 开头的说明行。"""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("# ")]
