"""比较的基座所用的抄写练习：由给出的文字造行，回答逐字取自输入；小模型只有见得多了才学会从输入里抄片段。

短的练习（drilling）把几个字照抄一遍，多半是打散的字；长的（copying）有四种：整段照抄、按标点分行、找出含某个词的分句、
把分句在某个字处断开写成「前_字_后」。都只用于预训练。
"""

import random
import re
from collections.abc import Sequence

Row = dict[str, str]

MARKS = re.compile(r"[，。；：！？、,;:!?\s]+")
CUTS = ("的", "是", "在", "了", "和", "不", "有", "为", "到", "无")
MIN_CHARS, MAX_CHARS = 8, 60
DRILL_CHARS, DRILL_RANDOM = (3, 16), 0.7
REPEAT = "把下面的文字照抄一遍。文本："
SPLIT = "把下面的文字按标点分开，每行一段。文本："
DRILL = "抄写："
FIND = "从文本中找出含有“{}”的分句。文本："
CUT = "从文本中找出含有“{0}”的分句，在第一个“{0}”处断开，每行写一个，格式为“前_{0}_后”。文本："


def clauses_of(text: str) -> list[str]:
    """按标点断开的分句，不含标点与空的。"""
    return [clause for clause in MARKS.split(text) if clause]


def fragments(texts: Sequence[str]) -> list[str]:
    """各段文字 → 片段：相接的整句，合起来 MIN_CHARS 至 MAX_CHARS 字；互不相同，次序不变。"""
    found: dict[str, None] = {}
    for text in texts:
        piece = ""
        for sentence in re.findall(r"[^，。；！？]*[，。；！？]|[^，。；！？]+$", text):
            if len(piece) + len(sentence) > MAX_CHARS:
                piece = ""
            piece += sentence
            if MIN_CHARS <= len(piece) <= MAX_CHARS and sentence[-1] in "。！？；":
                found[piece.strip()] = None
                piece = ""
        if MIN_CHARS <= len(piece) <= MAX_CHARS:
            found[piece.strip()] = None
    return list(found)


def exercise(text: str, rng: random.Random) -> Row:
    """一个片段的一行练习；片段不合某种练习时换成分行。"""
    clauses = clauses_of(text)
    kind = rng.choice(("repeat", "split", "find", "cut", "cut"))
    if kind == "repeat":
        # 一半打乱各字：语言的规律帮不上忙，只能抄
        text = "".join(rng.sample(text, len(text))) if rng.random() < 0.5 else text
        return {"instruction": REPEAT, "input": text, "output": text}
    if kind == "find" and len(clauses) > 1:
        clause = rng.choice(clauses)
        begin = rng.randrange(max(1, len(clause) - 1))
        word = clause[begin : begin + 2]
        output = "\n".join(clause for clause in clauses if word in clause)
        return {"instruction": FIND.format(word), "input": text, "output": output}
    if kind == "cut":
        cuts = [c for c in CUTS if any(c in clause[1:-1] for clause in clauses)]
        if cuts:
            cut = rng.choice(cuts)
            found = [clause for clause in clauses if cut in clause[1:-1]]
            places = [clause.index(cut, 1) for clause in found]
            output = "\n".join(f"{c[:p]}_{cut}_{c[p + 1 :]}" for c, p in zip(found, places, strict=True))
            return {"instruction": CUT.format(cut), "input": text, "output": output}
    return {"instruction": SPLIT, "input": text, "output": "\n".join(clauses)}


def drilling_rows(texts: Sequence[str], count: int, seed: int) -> list[Row]:
    """由 texts 的字造 count 行短的练习：七成是随机的字，其余是相接的一段。"""
    text = "".join("".join(texts).split())
    if len(text) < DRILL_CHARS[1]:
        raise ValueError(f"synthetic 的 drilling 要有文字可抄，现在只有 {len(text)} 字，请调大 general_chars")
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        size = rng.randint(*DRILL_CHARS)
        begin = rng.randint(0, len(text) - size)
        piece = "".join(rng.choices(text, k=size)) if rng.random() < DRILL_RANDOM else text[begin : begin + size]
        rows.append({"instruction": DRILL, "input": piece, "output": piece})
    return rows


def copying_rows(texts: Sequence[str], count: int, seed: int) -> list[Row]:
    """由 texts 造 count 行；同样的参数得到同样的行。片段不够时抛 ValueError。"""
    pieces = [piece for piece in fragments(texts) if len(clauses_of(piece)) > 0]
    if len(pieces) < count:
        raise ValueError(
            f"synthetic 的 copying({count}) 超过文字里的片段数 {len(pieces)}，请调小它或调大 general_chars"
        )
    rng = random.Random(seed)
    return [exercise(piece, rng) for piece in rng.sample(pieces, count)]
