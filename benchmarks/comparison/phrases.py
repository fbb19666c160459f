"""由文字自身的统计认出的词语：几个字常连在一起、左右的邻字又各式各样的就是；不用词典，也不用标注。"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

BREAKS = re.compile(r"[^\u4e00-\u9fffA-Za-z0-9]+")
HAN = re.compile(r"[\u4e00-\u9fff]")
MOST_CHARS = 6
LEAST_COUNT = 6
LEAST_ENTROPY = 1.2  # 左右邻字的分布的熵，取小的一边
LEAST_PMI = 2.5  # 最松的一处两边的点互信息


def entropy(neighbours: Counter) -> float:
    total = sum(neighbours.values())
    return -sum(count / total * math.log(count / total) for count in neighbours.values())


class Phrases:
    """texts 里的词语，与相邻两个字连得多紧。"""

    def __init__(self, texts: Sequence[str]):
        counts: Counter[str] = Counter()
        before: dict[str, Counter] = defaultdict(Counter)
        after: dict[str, Counter] = defaultdict(Counter)
        for clause in (clause for text in texts for clause in BREAKS.split(text)):
            for size in range(1, MOST_CHARS + 1):
                for place in range(len(clause) - size + 1):
                    gram = clause[place : place + size]
                    counts[gram] += 1
                    if size > 1:  # 分句的开头与末尾各算一个没有见过的邻字
                        end = place + size
                        before[gram][clause[place - 1] if place else counts[gram]] += 1
                        after[gram][clause[end] if end < len(clause) else counts[gram]] += 1
        self.counts = counts
        self.total = sum(count for gram, count in counts.items() if len(gram) == 1)
        self.words = [
            gram
            for gram, count in counts.items()
            if len(gram) > 1
            and count >= LEAST_COUNT
            and HAN.search(gram)
            and min(entropy(before[gram]), entropy(after[gram])) >= LEAST_ENTROPY
            and min(self.bond(gram[:cut], gram[cut:]) for cut in range(1, len(gram))) >= LEAST_PMI
        ]
        self.known = frozenset(self.words)

    def bond(self, left: str, right: str) -> float:
        """left 与 right 的点互信息（没有相邻过的按 0.1 次算）。"""
        together = max(self.counts[left + right], 0.1)
        return math.log(together * self.total / (self.counts[left] * self.counts[right]))

    def spans(self, clause: str) -> list[tuple[int, int]]:
        """分句里的词语的起止，从左到右、长的先取、互不重叠。"""
        found, place = [], 0
        while place < len(clause):
            for size in range(MOST_CHARS, 1, -1):
                if clause[place : place + size] in self.known:
                    found.append((place, place + size))
                    place += size
                    break
            else:
                place += 1
        return found

    def by_clause(self, text: str) -> list[list[str]]:
        """各分句里的词语。"""
        return [[clause[a:b] for a, b in self.spans(clause)] for clause in BREAKS.split(text)]

    def halves(self, clause: str) -> tuple[str, str] | None:
        """在最松的一处断开，不断在词语里面，左边至少两个字，右边至少一个；断不开时 None。"""
        inside = {place for a, b in self.spans(clause) for place in range(a + 1, b)}
        places = [place for place in range(2, len(clause) - 1) if place not in inside]
        if not places:
            return None
        cut = min(places, key=lambda place: self.bond(clause[place - 1], clause[place]))
        return clause[:cut], clause[cut:]
