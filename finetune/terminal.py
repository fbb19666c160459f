"""给人看的文字：终端的表格按全角字符的显示宽度对齐，说明写到标准错误；报告的 Markdown 表。"""

import sys
import unicodedata
from collections.abc import Iterable, Sequence


def note(message: str) -> None:
    """给人看的一行，走标准错误：标准输出只有模型的回答。"""
    print(message, file=sys.stderr, flush=True)


def display_width(text: str) -> int:
    """等宽终端里的显示宽度：全角字符占两列。"""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def visible(text: str) -> str:
    """终端里不移动光标的文字：制表符换成四个空格，回车与其余控制字符换成看得见的符号（␍、␛ 等），换行留着。"""
    shown = []
    for char in text.replace("\r\n", "\n").replace("\t", " " * 4):
        if char in "\x85\u2028\u2029":
            char = "␤"
        elif unicodedata.category(char) == "Cc" and char != "\n":
            char = chr(0x2400 + ord(char)) if char < " " else "\ufffd"
        shown.append(char)
    return "".join(shown)


def shorten(name: str, width: int = 20) -> str:
    """表里的名字：至多 width 列，长的截断并以 … 结尾；空的写成（空）。"""
    name = visible(name).replace("\n", "␤") or "（空）"
    if display_width(name) <= width:
        return name
    while display_width(name) > width - 1:
        name = name[:-1]
    return f"{name}…"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """按显示宽度对齐的文本表，第一列左对齐，其余右对齐。"""
    widths = [max(display_width(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = []
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            blank = " " * (width - display_width(cell))
            padded.append(blank + cell if column else cell + blank)
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def markdown_table(header: Sequence, rows: Iterable[Sequence]) -> str:
    """表头与各行 → Markdown 的表。"""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("\n", " ") for cell in line) + " |" for line in lines)
