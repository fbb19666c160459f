"""生成评论情感分类任务的样例：评论 → 正面或负面；由 make_sample_data.py 调用。

除直接的褒贬外，还有转折（虽然……但是……）、预期与实际相反、反语三类难例；结尾与标签一致。
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from data.source.chooser import Chooser, read_word_lines

INSTRUCTION = "下面是一条用户评论，请判断它的情感倾向，只回答“正面”或“负面”。评论："
LABELS = {"+": "正面", "-": "负面"}
# 让步在前、态度在后；{0} 为与标签相反的分句，{1} 为与标签一致的分句
CONTRASTS = [
    "虽然{0}，但{1}",
    "{0}，不过{1}",
    "尽管{0}，但是{1}",
    "说实话，{0}，可是{1}",
    "{0}，这一点暂且不提，关键是{1}",
]
# 预期与实际相反；{0} 为被否定的说法，{1} 为实际情况
REVERSALS = [
    "之前看评论说{0}，实际完全不是这样，{1}",
    "有人说{0}，我遇到的恰恰相反，{1}",
    "本来还以为{0}，没想到{1}",
    "都说{0}，亲自试过才知道并非如此，{1}",
]
SHORTS = {
    "+": [
        "没有什么可挑剔的",
        "一点也不后悔",
        "比想象中好得多",
        "挑不出毛病",
        "出乎意料地好",
        "不愧是老牌子",
        "不错不错",
    ],
    "-": [
        "没有一处让人满意",
        "一点也不推荐",
        "远没有说的那么好",
        "谈不上好",
        "根本不值这个价",
        "毫无诚意",
        "没什么值得夸的",
    ],
}
CONCESSIONS = {
    "+": ["小毛病可以忽略", "瑕不掩瑜", "整体还是满意的", "总的来说利大于弊"],
    "-": ["一票否决", "优点再多也没用", "整体还是失望", "功不抵过"],
}
SCORES = {"+": ["五分好评", "满分", "给五星"], "-": ["只能给一星", "零分", "一星都嫌多"]}


@dataclass
class Domain:
    name: str
    openers: list[str] = field(default_factory=list)
    clauses: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: {"+": [], "-": []})
    endings: dict[str, list[str]] = field(default_factory=lambda: {"+": [], "-": []})
    ironies: list[str] = field(default_factory=list)


def read_domains(path: Path) -> list[Domain]:
    """读 cls.txt；行的写法见该文件开头。"""
    domains: list[Domain] = []
    for line in read_word_lines(path):
        kind, text = line.split(" ", 1)
        if kind == "域":
            domains.append(Domain(text))
        elif kind == "引":
            domains[-1].openers.append(text)
        elif kind in LABELS:
            aspect, clause = text.split(" ", 1)
            domains[-1].clauses[kind].append((aspect, clause))
        elif kind in ("结+", "结-"):
            domains[-1].endings[kind[1]].append(text)
        elif kind == "反语":
            domains[-1].ironies.append(text)
        else:
            raise ValueError(f"{path.name}: 不认识的行首词 {kind!r}，请参看文件开头的说明")
    return domains


class Review:
    """一条评论的取材：同一方面只说一次，免得自相矛盾。"""

    def __init__(self, chooser: Chooser, domain: Domain, label: str):
        self.chooser, self.domain, self.label = chooser, domain, label
        self.opposite = "-" if label == "+" else "+"
        self._used: set[str] = set()

    def expand(self, text: str) -> str:
        """把 {甲/乙} 换成其中之一。"""
        return re.sub(r"\{([^}]*)\}", lambda match: self.chooser.pick(match[1].split("/")), text)

    def clause(self, label: str) -> str:
        aspect, clause = self.chooser.pick([c for c in self.domain.clauses[label] if c[0] not in self._used])
        self._used.add(aspect)
        return self.expand(clause)

    def opener(self) -> str:
        return self.expand(self.chooser.pick(self.domain.openers))

    def ending(self) -> str:
        return self.expand(self.chooser.pick(self.domain.endings[self.label]))


def _plain(review: Review) -> str:
    chooser = review.chooser
    sentences = [review.opener()] if chooser.chance(0.75) else []
    sentences += [review.clause(review.label) for _ in range(chooser.between(1, 3))]
    if chooser.chance(0.8):
        sentences.append(review.ending())
    joint = chooser.pick(["。", "。", "；"])
    return "。".join(sentences[:1]) + "。" + joint.join(sentences[1:]) if len(sentences) > 2 else "，".join(sentences)


def _contrast(review: Review) -> str:
    chooser = review.chooser
    opener = f"{review.opener()}。" if chooser.chance(0.5) else ""
    # 让步只留分句的前半，轻重才分明
    conceded = review.clause(review.opposite).split("，")[0]
    body = chooser.pick(CONTRASTS).format(conceded, review.clause(review.label))
    closing = review.ending() if chooser.chance(0.6) else chooser.pick(CONCESSIONS[review.label])
    return f"{opener}{body}。{closing}"


def _reversal(review: Review) -> str:
    chooser = review.chooser
    opener = f"{review.opener()}。" if chooser.chance(0.5) else ""
    # 被否定的说法与实际情况说的是同一方面，才构成反转
    aspects = [a for a, _ in review.domain.clauses["+"] if any(a == b for b, _ in review.domain.clauses["-"])]
    aspect = chooser.pick(aspects)
    said, fact = (
        review.expand(chooser.pick([c for a, c in review.domain.clauses[sign] if a == aspect]))
        for sign in (review.opposite, review.label)
    )
    # 分句的后半是细节，转述别人的说法时只留前半
    return f"{opener}{chooser.pick(REVERSALS).format(said.split('，')[0], fact)}。{review.ending()}"


def _short(review: Review) -> str:
    chooser = review.chooser
    parts = [chooser.pick(SHORTS[review.label]), review.clause(review.label)]
    if chooser.chance(0.5):
        parts.append(chooser.pick(SCORES[review.label]) if chooser.chance(0.5) else review.ending())
    return chooser.pick(["，", "！"]).join(parts)


def _irony(review: Review) -> str:
    # 反语只有负面；正面的同类难例是双重否定
    chooser = review.chooser
    if review.label == "-":
        sentence = chooser.pick(review.domain.ironies).rstrip("。")
        return f"{review.opener()}。{sentence}。{review.ending()}"
    doubled = chooser.pick(
        ["不能说不好", "没有不满意的地方", "找不到不推荐的理由", "谁说便宜没好货", "挑剔如我也无话可说"]
    )
    return f"{review.opener()}。{doubled}，{review.clause('+')}，{review.ending()}"


WRITERS = [(_plain, 45), (_contrast, 25), (_reversal, 12), (_short, 10), (_irony, 8)]


def make_rows(seed: int, num_train: int, num_test: int) -> tuple[list[dict], list[dict]]:
    """返回 (训练行, 测试行)，全部输入互不相同；两份各自正负各半。"""
    domains = read_domains(Path(__file__).parent / "words" / "cls.txt")
    chooser = Chooser(seed)
    rows: dict[str, dict] = {}
    by_label: dict[str, list[dict]] = {"+": [], "-": []}
    while len(rows) < num_train + num_test:
        label = "+-"[len(rows) % 2]
        domain = domains[len(rows) // 2 % len(domains)]
        text = chooser.weighted(WRITERS)(Review(chooser, domain, label))
        text += "" if text[-1] in "。！？" else chooser.pick(["。", "。", "！", ""])
        if text not in rows:
            rows[text] = {"instruction": INSTRUCTION, "input": text, "output": LABELS[label]}
            by_label[label].append(rows[text])
    halves = [chooser.some(by_label[label], len(by_label[label])) for label in "+-"]
    train = [row for half in halves for row in half[: num_train // 2]]
    test = [row for half in halves for row in half[num_train // 2 :]]
    return chooser.some(train, num_train), chooser.some(test, num_test)
