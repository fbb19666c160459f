"""给人看的文字：终端的表格按全角字符的显示宽度对齐，说明写到标准错误；报告的 Markdown 表。"""

import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from utils import global_rank, log_rank_0

# 不在终端里时，一件长的活多久之后说第一声，以后隔多久说一声
SECONDS_BEFORE_FIRST_LINE, SECONDS_PER_LINE = 4.0, 10.0
LARGE_UNITS = ("B", "token")  # 数目大的单位：写成 1.5M
Item = TypeVar("Item")


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


class LongJob:
    """一件长的活做到了哪里：终端里是进度条；日志里过几秒第一行，以后每 10 秒一行。走标准错误，只有 0 号进程显示。"""

    def __init__(self, title: str, total: int, unit: str, done: int = 0, is_hidden: bool = False):
        self.title, self.total, self.unit, self.done, self._begun_at = title, total, unit, done, done
        self._scale = unit in LARGE_UNITS
        self._bar = tqdm(
            total=total, initial=done, desc=title, unit=unit, unit_scale=self._scale, dynamic_ncols=True, leave=False,
            disable=True if is_hidden or global_rank() != 0 else None,  # None：不在终端里就不画
        )  # fmt: skip
        self._is_silent = is_hidden or not self._bar.disable
        self._started = time.monotonic()
        self._due = self._started + SECONDS_BEFORE_FIRST_LINE

    def update(self, number: int = 1, note: str = "") -> None:
        """又做完了 number 个；note 附在后面，如此刻的损失。"""
        self.done += number
        if note and not self._bar.disable:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(number)
        now = time.monotonic()
        if self._is_silent or now < self._due or self.done >= self.total:
            return
        self._due, spent = now + SECONDS_PER_LINE, now - self._started
        left = spent * (self.total - self.done) / max(1, self.done - self._begun_at)
        done, total = (tqdm.format_sizeof(n) if self._scale else str(n) for n in (self.done, self.total))
        tail = f"，{note}" if note else ""
        message = f"{self.title} {done}/{total} {self.unit}，已 {spent:.0f} 秒，约剩 {left:.0f} 秒{tail}"
        log_rank_0(message, file=sys.stderr)

    def close(self) -> None:
        """收起进度条。"""
        self._bar.close()


@contextmanager
def long_job(title: str, total: int, unit: str, **options) -> Iterator[LongJob]:
    """见 LongJob；离开时收起进度条。"""
    job = LongJob(title, total, unit, **options)
    try:
        yield job
    finally:
        job.close()


def watched(items: Sequence[Item], title: str, unit: str) -> Iterator[Item]:
    """逐个给出 items，显示做到了第几个；见 LongJob。"""
    with long_job(title, len(items), unit) as job:
        for item in items:
            yield item
            job.update()
