"""由文字本身造的练习：回答逐字取自输入，写法很多种，抄写、填空与认词语因此由数据学会，初值与结构都不动。

一行练习是 instruction、input、output，或几轮的 messages；只训练回答（`--task pretrain` 读问答时就是这样），都不用任何
任务的回答。
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from benchmarks.comparison.phrases import BREAKS, Phrases

Row = dict[str, Any]
Made = tuple[str, str, str]  # instruction、input、output
Encode = Callable[[str], list[str]]

MARKS = re.compile(r"[，。；：！？、,;:!?\s]+")
BLANK = "____"
NUMBERS = "一二三四五六七八九"
SAME = "同上"
NAMES = ("部分", "关系", "属性", "原因", "结果", "用途", "时间", "地点", "性质", "数量", "方法", "来源", "对象", "条件")
MOST_LABELS = 4


def clauses_of(text: str) -> list[str]:
    """按标点断开的分句，不含标点与空的。"""
    return [clause for clause in MARKS.split(text) if clause]


def pieces_of(texts: Sequence[str], least: int, most: int) -> list[str]:
    """各段文字 → 片段：相接的整句，合起来 least 至 most 字；互不相同，次序不变。"""
    found: dict[str, None] = {}
    for text in texts:
        piece = ""
        for sentence in re.findall(r"[^，。；！？]*[，。；！？]|[^，。；！？]+$", text):
            if len(piece) + len(sentence) > most:
                piece = ""
            piece += sentence
            if least <= len(piece) <= most and (sentence[-1] in "。！？；" or len(piece) > (least + most) // 2):
                found[piece.strip()] = None
                piece = ""
        if least <= len(piece) <= most:
            found[piece.strip()] = None
    return list(found)


# ---- 练习的各种写法：一个片段 → 一行；片段不合用时返回 None ----


def copy(text: str, rng: random.Random) -> Made:
    """照抄，没有指令：最先学的是它。"""
    return "", text, text


def twice(text: str, rng: random.Random) -> Made:
    """照抄两遍，没有指令：第二遍隔着同样的距离，比第一遍好学，也教第一遍。"""
    return "", text, f"{text}\n{text}"


def repeat(text: str, rng: random.Random) -> Made:
    """照抄。"""
    return rng.choice(("抄写：", "照抄一遍：", "把下面的文字照抄一遍。文本：", "原文：")), text, text


def after(text: str, rng: random.Random) -> Made | None:
    """某几个字后面的几个字。"""
    size = rng.randint(1, 3)
    places = [p for p in range(len(text) - size - 1) if text.count(text[p : p + size]) == 1]
    if not places:
        return None
    place, count = rng.choice(places), rng.randint(2, 8)
    word = text[place : place + size]
    form = rng.choice(("“{}”后面的{}个字是：", "在原文里，紧接着“{}”的{}个字：", "找出“{}”之后的{}个字。"))
    answer = text[place + size : place + size + count]
    return "文本：", f"{text}\n{form.format(word, len(answer))}", answer


def fill(text: str, rng: random.Random) -> Made | None:
    """原文与挖去一段的原文：填上那一段。"""
    size = rng.randint(2, 8)
    if len(text) < size + 6:
        return None
    place = rng.randint(2, len(text) - size - 2)
    begin, end = max(0, place - rng.randint(3, 15)), place + size + rng.randint(2, 10)
    holed = text[begin:place] + BLANK + text[place + size : end]
    return rng.choice(("原文：", "文本：")), f"{text}\n填空：{holed}\n", text[place : place + size]


def quote(text: str, rng: random.Random) -> Made | None:
    """原文与一句的开头：把这一句摘录完。"""
    clauses = [clause for clause in clauses_of(text) if len(clause) >= 5]
    if not clauses:
        return None
    clause = rng.choice(clauses)
    cut = rng.randint(1, 3)
    return "原文：", f"{text}\n摘录：{clause[:cut]}", clause[cut:]


def split(text: str, rng: random.Random) -> Made:
    """按标点分行。"""
    return rng.choice(("按标点分行：", "把下面的文字按标点分开，每行一段。文本：")), text, "\n".join(clauses_of(text))


def find(text: str, rng: random.Random) -> Made | None:
    """含有某个词的分句。"""
    clauses = [clause for clause in clauses_of(text) if len(clause) >= 3]
    if not clauses:
        return None
    clause = rng.choice(clauses)
    begin = rng.randrange(len(clause) - 1)
    word = clause[begin : begin + 2]
    form = rng.choice(("从文本中找出含有“{}”的分句。文本：", "请摘录提到“{}”的各句，一行一句。文本："))
    return form.format(word), text, "\n".join(c for c in clauses_of(text) if word in c)


def cut(text: str, rng: random.Random) -> Made | None:
    """含有某个字的各分句，在这个字处断开，写成「前_字_后」。"""
    inner = [c for clause in clauses_of(text) for c in clause[1:-1]]
    if not inner:
        return None
    char = rng.choice(inner)
    clauses = [clause for clause in clauses_of(text) if char in clause[1:-1]]
    places = [clause.index(char, 1) for clause in clauses]
    form = rng.choice(
        ("在“{0}”处断开含有它的分句，写成“前_{0}_后”，一行一个。文本：", '找出以“{0}”相连的两部分，用"_"连接。文本：')
    )
    lines = [f"{c[:p]}_{char}_{c[p + 1 :]}" for c, p in zip(clauses, places, strict=True)]
    return form.format(char), text, "\n".join(lines)


def label(text: str, rng: random.Random) -> Made | None:
    """各分句分成前后两部分，中间写上指令里给出的标签。"""
    clauses = [clause for clause in clauses_of(text) if len(clause) >= 4]
    if not clauses:
        return None
    names = ["".join(rng.sample(text, 2)) for _ in range(rng.randint(1, 3))]
    name, size = names[0], rng.randint(2, 3)
    given = "、".join(f'"{other}"' for other in rng.sample(names, len(names)))
    form = rng.choice(('标签有{0}，用"{1}"连接各分句的前{2}字与其余，', '关系有{0}，把"{1}"写在各句前{2}字之后，'))
    lines = [f"{c[:size]}_{name}_{c[size:]}" for c in clauses if len(c) > size]
    return form.format(given, name, NUMBERS[size - 1]) + '内部用"_"连接。文本：', text, "\n".join(lines)


def fields(text: str, rng: random.Random) -> Made | None:
    """几个「名：值」的一张单子：给名答值，或给值答名。"""
    clauses = [clause for clause in clauses_of(text) if len(clause) >= 4][:8]
    if len(clauses) < 2:
        return None
    pairs = [(clause[:2], clause[2:14]) for clause in clauses]
    listed = "；".join(f"{name}：{value}" for name, value in pairs)
    name, value = rng.choice(pairs)
    if rng.random() < 0.5:
        return "单子：", f"{listed}\n“{name}”的值：", value
    return "单子：", f"{listed}\n值为“{value}”的：", name


def nth(text: str, rng: random.Random) -> Made | None:
    """第几个分句。"""
    clauses = clauses_of(text)[:9]
    if len(clauses) < 2:
        return None
    place = rng.randrange(len(clauses))
    return f"写出第{NUMBERS[place]}个分句。文本：", text, clauses[place]


def between(text: str, rng: random.Random) -> Made | None:
    """两个词之间的字。"""
    size = rng.randint(2, 10)
    if len(text) < size + 5:
        return None
    place = rng.randint(2, len(text) - size - 2)
    left, right = text[place - 2 : place], text[place + size : place + size + 2]
    return "文本：", f"{text}\n在“{left}”与“{right}”之间的是：", text[place : place + size]


# ---- 断开之后接着抄：要认得分词器的片段 ----


def breaks_of(text: str, encode: Encode) -> list[int]:
    """在这些地方断开，两边的片段与整个的相同。"""
    whole = encode(text)
    return [place for place in range(1, len(text)) if encode(text[:place]) + encode(text[place:]) == whole]


def joined(text: str, rng: random.Random, encode: Encode) -> Made | None:
    """在一处断开，写成「前_后」：隔一个记号，接着刚才抄到的地方。"""
    places = breaks_of(text, encode)
    if not places:
        return None
    place = rng.choice(places)
    return "断开：", text, f"{text[:place]}_{text[place:]}"


def linked(text: str, rng: random.Random, encode: Encode) -> Made | None:
    """在一处断开，中间写上指令给的标签，写成「前_标签_后」：隔几个片段，接着刚才抄到的地方。"""
    places = breaks_of(text, encode)
    if not places:
        return None
    place, name = rng.choice(places), rng.choice(NAMES)
    return f"{name}：", text, f"{text[:place]}_{name}_{text[place:]}"


# ---- 要认得词语的写法（phrases.py） ----


def labelled(found: dict[tuple[str, str], None], name: str) -> str:
    """各对写成「前_标签_后」，一行一个。"""
    return "\n".join(f"{left}_{name}_{right}" for left, right in found)


def among_labels(
    found: dict[tuple[str, str], None], text: str, forms: Sequence[str], rng: random.Random, phrases: Phrases
) -> Made | None:
    """各对写成「前_标签_后」；forms 的 {0} 是要写的标签，{1} 是列出的几个，都是随便取的词语。"""
    names = rng.sample(phrases.words, rng.randint(1, MOST_LABELS))
    given = ", ".join(f'"{name}"' for name in rng.sample(names, len(names)))
    form = rng.choice(forms).format(names[0], given)
    return (form, text, labelled(found, names[0])) if found else None


def words(text: str, rng: random.Random, phrases: Phrases) -> Made | None:
    """文本里的词语，一行一个，不重复。"""
    found = dict.fromkeys(word for clause in phrases.by_clause(text) for word in clause)
    form = rng.choice(("找出文本里的词语，一行一个。文本：", "列出下面这段话里的词语，之间用\\n分割。文本："))
    return (form, text, "\n".join(found)) if found else None


def pairs(text: str, rng: random.Random, phrases: Phrases) -> Made | None:
    """同一个分句里相邻的两个词语，写成「前_标签_后」。"""
    found = dict.fromkeys(pair for clause in phrases.by_clause(text) for pair in pairwise(clause))
    forms = (
        '找出同一个分句里相邻的词语，标签有{1}，写"{0}"，内部用"_"连接，一行一个。文本：',
        '请你列出相邻的两个词语，中间写上{1}里的"{0}"，用"_"连接，之间用\\n分割。文本：',
    )
    return among_labels(found, text, forms, rng, phrases)


def ends(text: str, rng: random.Random, phrases: Phrases) -> Made | None:
    """各分句的头一个与最后一个词语，写成「前_标签_后」。"""
    found = dict.fromkeys((clause[0], clause[-1]) for clause in phrases.by_clause(text) if len(clause) > 1)
    name = rng.choice(phrases.words)
    form = f'写出各分句的头一个与最后一个词语，中间写"{name}"，用"_"连接。文本：'
    return (form, text, labelled(found, name)) if found else None


def halves(text: str, rng: random.Random, phrases: Phrases) -> Made | None:
    """各分句在连得最松的一处断成两段，写成「前_标签_后」。"""
    found = dict.fromkeys(filter(None, map(phrases.halves, BREAKS.split(text))))
    forms = (
        '把各分句分成前后两部分，标签有{1}，写"{0}"，内部用"_"连接，一行一个。文本：',
        '请你把每个分句断成两段，中间写上{1}里的"{0}"，用"_"连接，之间用\\n分割。文本：',
    )
    return among_labels(found, text, forms, rng, phrases)


def following(text: str, rng: random.Random, phrases: Phrases) -> Made | None:
    """一个词语之后的下一个词语。"""
    found = [word for clause in phrases.by_clause(text) for word in clause]
    places = [place for place, word in enumerate(found[:-1]) if found.count(word) == 1]
    if not places:
        return None
    place = rng.choice(places)
    return "文本：", f"{text}\n“{found[place]}”之后的词语是：", found[place + 1]


FORMS: dict[str, Callable[[str, random.Random], Made | None]] = {
    form.__name__: form
    for form in (copy, twice, repeat, after, fill, quote, split, find, cut, label, fields, nth, between)
}
ENCODED_FORMS: dict[str, Callable[[str, random.Random, Encode], Made | None]] = {"joined": joined, "linked": linked}
PHRASE_FORMS: dict[str, Callable[[str, random.Random, Phrases], Made | None]] = {
    form.__name__: form for form in (words, pairs, ends, halves, following)
}

ALL_FORMS = (*FORMS, *ENCODED_FORMS, *PHRASE_FORMS)


def scramble(text: str, rng: random.Random) -> str:
    """打乱标点之间的各字：语言的规律帮不上忙，只能抄。"""
    parts = re.split(f"({MARKS.pattern})", text)
    chars = [char for part in parts[::2] for char in part]
    rng.shuffle(chars)
    drawn = iter(chars)
    return "".join(part if index % 2 else "".join(next(drawn) for _ in part) for index, part in enumerate(parts))


def drawn(texts: Sequence[str], sizes: Sequence[int], encode: Encode, rng: random.Random) -> list[str]:
    """随机的字串，各恰好 sizes 个分词器的片段：语言的规律帮不上忙，只能抄。

    片段按它在文字里的次数的 3/4 次方取：常见的只多一些，少见的也学得到。
    """
    counts = Counter(piece for text in texts for piece in encode(text))
    pieces = sorted(piece for piece in counts if not (piece.isspace() or piece.startswith(("<", "▁"))))
    weights = list(accumulate(counts[piece] ** 0.75 for piece in pieces))

    def string(size: int) -> str:
        while True:  # 相接之后会并成别的片段的不要
            chosen = rng.choices(pieces, cum_weights=weights, k=size)
            if encode("".join(chosen)) == chosen:
                return "".join(chosen)

    return [string(size) for size in sizes]


def drill_rows(
    texts: Sequence[str],
    count: int,
    seed: int,
    *,
    chars: tuple[int, int],
    forms: dict[str, float] | None = None,
    scrambled: float = 0.0,
    encode: Encode = list,
    random_strings: bool = False,
    marked: float = 0.5,
    turns: int = 1,
    questions: int = 1,
) -> list[Row]:
    """由 texts 造 count 行练习；同样的参数同样的行。

    Args:
        chars: 一个片段至少、至多几个字。
        forms: 各种写法（FORMS、ENCODED_FORMS、PHRASE_FORMS 的名字）的份量；缺省 FORMS 的都一样多。
        scrambled: 打乱字序的份额。
        encode: 文字 → 分词器的片段；random_strings 与 ENCODED_FORMS 要用。
        random_strings: 练习的不是文字里的句子，而是随机拼的字串（drawn），chars 是片段数。
        marked: 输入末尾加换行的份额；不加时模型得自己看出输入到哪里为止，真的任务里就是这样。
        turns: 几个练习接成一段对话，各是一轮；短的练习一行一个时，一步里能学的字太少。
        questions: 同一个片段接连问几种写法，各是一轮，后面的以「同上」代替片段：同样的 token 里回答占得多。

    Raises:
        ValueError: 没有这么长的片段，或不认识的写法；questions 多于写法，或与 turns 同用；文字太少，认不出词语。
    """
    forms = forms or dict.fromkeys(FORMS, 1.0)
    if unknown := [name for name in forms if name not in ALL_FORMS]:
        raise ValueError(f"drills 的 forms 里的 {'、'.join(unknown)} 不认识，可选：{'、'.join(ALL_FORMS)}")
    if questions > len(forms):
        raise ValueError(f"drills 的 questions({questions}) 多于写法（{len(forms)} 种），请调小")
    if questions > 1 and turns > 1:
        raise ValueError(f"drills 的 questions({questions}) 与 turns({turns}) 不能同用，请去掉一个")
    rng = random.Random(seed)
    if random_strings:  # 一行里的各轮一样长：隔多远去抄先由同一行里看出来，再学会由字去找
        sizes = [rng.randint(*chars) for _ in range(count)]
        pieces = drawn(texts, [size for size in sizes for _ in range(turns)], encode, rng)
    else:
        pieces = pieces_of(texts, *chars)
    if not pieces:
        raise ValueError(f"drills 要 {chars[0]} 至 {chars[1]} 字的片段，文字里没有，请放宽 chars")
    phrases = Phrases(texts) if any(name in PHRASE_FORMS for name in forms) else None
    if phrases is not None and len(phrases.words) < MOST_LABELS:
        raise ValueError(f"文字里只认出 {len(phrases.words)} 个词语，认词语的写法至少要 {MOST_LABELS} 个，请多给些文字")
    makers = {name: FORMS[name] for name in forms if name in FORMS}
    makers |= {name: partial(ENCODED_FORMS[name], encode=encode) for name in forms if name in ENCODED_FORMS}
    makers |= {name: partial(PHRASE_FORMS[name], phrases=phrases) for name in forms if name in PHRASE_FORMS}

    def piece(number: int) -> str:
        text = pieces[number] if random_strings else rng.choice(pieces)
        return scramble(text, rng) if rng.random() < scrambled else text

    def draw(names: list[str]) -> str:
        return rng.choices(names, [forms[name] for name in names])[0]

    def row(instruction: str, given: str, output: str) -> Row:
        end = "\n" if rng.random() < marked and not given.endswith("\n") else ""
        return {"instruction": instruction, "input": given + end, "output": output}

    def drill(number: int) -> Row:
        text = piece(number)
        return row(*(makers[draw(list(forms))](text, rng) or repeat(text, rng)))

    def asked(number: int) -> Row:
        text, left, rows = piece(number), list(forms), []
        while left and len(rows) < questions:
            left.remove(name := draw(left))
            if (made := makers[name](text, rng)) is not None:
                instruction, given, output = made
                rows.append(row(instruction, given.replace(text, SAME) if rows else given, output))
        return as_messages(rows or [row(*repeat(text, rng))])

    if questions > 1:
        return [asked(number) for number in range(count)]
    if turns == 1:
        return [drill(number) for number in range(count)]
    return [as_messages([drill(row * turns + turn) for turn in range(turns)]) for row in range(count)]


def as_messages(rows: Sequence[Row]) -> Row:
    """几行一问一答 → 一段对话。"""
    messages = []
    for row in rows:
        messages += [
            {"role": "user", "content": row["instruction"] + row["input"]},
            {"role": "assistant", "content": row["output"]},
        ]
    return {"messages": messages}
