"""生成问题生成任务的样例：文档 → 一个能由文档回答的问题；由 make_sample_data.py 调用。

知识短文来自 d2q_nature.txt 与 d2q_society.txt，按篇划分训练与测试；
应用文来自 d2q_forms.txt，每篇的名称与数字都重新抽取。
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from data.source.chooser import Chooser, read_word_lines

INSTRUCTION = "请阅读下面的文档，提出一个能够由文档内容回答的问题。文档："
MIN_LENGTH, MAX_LENGTH = 50, 600
FACT_FILES = ["d2q_nature.txt", "d2q_society.txt"]
FORM_FILE = "d2q_forms.txt"
ROWS_PER_ARTICLE = 3
TEST_ARTICLES_PER_TOPIC = 2


@dataclass
class Sentence:
    text: str
    questions: list[str]


@dataclass
class Article:
    """一篇知识短文或一种应用文。"""

    topic: str
    name: str
    sentences: list[Sentence] = field(default_factory=list)
    slots: list[tuple[str, list[str]]] = field(default_factory=list)


def _sentence(text: str) -> Sentence:
    text, _, questions = text.partition(" => ")
    return Sentence(text, [question.strip() for question in questions.split(" | ")] if questions else [])


def read_facts(path: Path) -> list[Article]:
    """读知识短文；行的写法见文件开头。"""
    articles: list[Article] = []
    topic = ""
    for line in read_word_lines(path):
        if line.startswith("题 "):
            topic = line[2:]
        elif line.startswith("篇 "):
            articles.append(Article(topic, line[2:]))
        else:
            articles[-1].sentences.append(_sentence(line))
    return articles


def read_forms(path: Path) -> list[Article]:
    """读应用文的句式；行的写法见文件开头。"""
    forms: list[Article] = []
    for line in read_word_lines(path):
        kind, text = line.split(" ", 1)
        if kind == "题":
            forms.append(Article(text, text))
        elif kind == "槽":
            name, values = text.split(" ", 1)
            forms[-1].slots.append((name, values.split("/")))
        elif kind == "数":
            name, bounds = text.split(" ", 1)
            low, high, step = map(int, bounds.split("-"))
            forms[-1].slots.append((name, [str(value) for value in range(low, high + 1, step)]))
        elif kind == "句":
            forms[-1].sentences.append(_sentence(text))
        else:
            raise ValueError(f"{path.name}: 不认识的行首词 {kind!r}，请参看文件开头的说明")
    return forms


def _fill(chooser: Chooser, text: str, values: dict[str, str]) -> str:
    text = re.sub(r"\[([^\]]+)\]", lambda match: chooser.pick(match[1].split("/")), text)
    return re.sub(r"\{([^}]+)\}", lambda match: values[match[1]], text)


def _document(
    chooser: Chooser, article: Article, keep: float
) -> tuple[str, list[tuple[str, Sentence]], dict[str, str]]:
    """返回 (文档, [(填好的句子, 原句)], 各槽的值)；第一句必留，其余以概率 keep 留下，不足 50 字则全留。"""
    values: dict[str, str] = {}
    for names, options in article.slots:
        values.update(zip(names.split(","), chooser.pick(options).split(","), strict=True))
    first, *rest = article.sentences
    for kept in ([first] + [s for s in rest if chooser.chance(keep)], article.sentences):
        filled = [(_fill(chooser, sentence.text, values), sentence) for sentence in kept]
        document = "".join(text for text, _ in filled)
        if len(document) >= MIN_LENGTH:
            break
    return document, filled, values


def _row(document: str, question: str) -> dict:
    return {"instruction": INSTRUCTION, "input": document, "output": question}


def _joined(chooser: Chooser, article: Article, document: str, articles: list[Article]) -> str:
    """在文档后接上同主题的一篇或两篇，接到不超过 600 字为止。"""
    document = f"【{article.name}】{document}"
    others = [other for other in articles if other.topic == article.topic and other is not article]
    for other in chooser.some(others, chooser.between(1, 3)):
        longer = f"{document}【{other.name}】{_document(chooser, other, keep=0.9)[0]}"
        if len(longer) > MAX_LENGTH:
            break
        document = longer
    return document


def _fact_rows(chooser: Chooser, articles: list[Article]) -> list[dict]:
    """每篇出 ROWS_PER_ARTICLE 行，问题各不相同；最后一行有一半接上同主题的其他篇，成为较长的文档。"""
    rows = []
    for article in articles:
        asked: set[str] = set()
        documents: set[str] = set()
        while len(documents) < ROWS_PER_ARTICLE:
            document, filled, _ = _document(chooser, article, keep=chooser.pick([0.3, 0.6, 0.9]))
            if len(documents) == ROWS_PER_ARTICLE - 1 and chooser.chance(0.5):
                document = _joined(chooser, article, document, articles)
            question = chooser.pick([question for _, sentence in filled for question in sentence.questions])
            if document in documents or question in asked:
                continue
            asked.add(question)
            documents.add(document)
            rows.append(_row(document, question))
    return rows


def _form_rows(chooser: Chooser, forms: list[Article], count: int, seen: set[str]) -> list[dict]:
    rows: list[dict] = []
    while len(rows) < count:
        form = forms[len(rows) % len(forms)]
        document, filled, values = _document(chooser, form, keep=chooser.pick([0.25, 0.45, 0.65, 1.0]))
        questions = [question for _, sentence in filled for question in sentence.questions]
        if document not in seen and questions and len(document) <= MAX_LENGTH:
            seen.add(document)
            rows.append(_row(document, _fill(chooser, chooser.pick(questions), values)))
    return rows


def make_rows(seed: int, num_train: int, num_test: int) -> tuple[list[dict], list[dict]]:
    """返回 (训练行, 测试行)；每个主题有两篇知识短文只进测试，其余只进训练，文档互不相同。"""
    folder = Path(__file__).resolve().parent / "words"
    articles = [article for name in FACT_FILES for article in read_facts(folder / name)]
    forms = read_forms(folder / FORM_FILE)
    chooser = Chooser(seed)
    # 每个主题都留出篇目给测试：逐主题随机取两篇
    tests: list[Article] = []
    for topic in dict.fromkeys(article.topic for article in articles):
        group = [article for article in articles if article.topic == topic]
        tests += chooser.some(group, TEST_ARTICLES_PER_TOPIC)
    held_out = {article.name for article in tests}
    seen: set[str] = set()
    results = []
    for count, group in (
        (num_train, [article for article in articles if article.name not in held_out]),
        (num_test, tests),
    ):
        rows = _fact_rows(chooser, group)
        rows += _form_rows(chooser, forms, count - len(rows), seen)
        results.append(chooser.some(rows, count))
    return results[0], results[1]
