"""数据文件 → 一行行的原始内容：JSON Lines 或 JSON 数组，逐行（数组则逐个元素）读取，内存里不存整份文件。"""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

MAX_ROW_BYTES = 64 * 2**20
MAX_PROBLEMS = 20
_READ_BYTES = 2**20
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


class Problem(NamedTuple):
    """数据文件里的一处错误（读取），或一处发现（数据体检：severity 可为 note、warning）；code 供程序使用。"""

    path: str
    line: int
    field: str
    what: str
    remedy: str
    severity: str = "error"
    code: str = "field"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.field}: {self.what}: {self.remedy}"


class RawRow(NamedTuple):
    line: int
    content: bytes


class ProblemList:
    """收集错误：记住前 max_problems 处，其余只计数。"""

    def __init__(self, path: str | os.PathLike, max_problems: int = MAX_PROBLEMS):
        self.path, self.max_problems, self.total = str(path), max_problems, 0
        self.kept: list[Problem] = []

    def add(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.total += 1
            if len(self.kept) < self.max_problems:
                self.kept.append(problem)

    def raise_if_any(self) -> None:
        """有错误时抛出一个 ValueError，逐条列出。"""
        if not self.total:
            return
        rest = f"（只列出前 {len(self.kept)} 处）" if self.total > len(self.kept) else ""
        listing = "\n".join(f"  {problem}" for problem in self.kept)
        raise ValueError(f"数据文件 {self.path} 有 {self.total} 处错误{rest}，请改正后重试：\n{listing}")


def iter_rows(path: str | os.PathLike) -> Iterator[RawRow | Problem]:
    """逐行（数组则逐个元素）产出内容，不解析；切不出来的地方产出 Problem；根本不能读的文件抛 ValueError。"""
    check_file(path)
    with open(path, "rb") as stream:
        head = stream.read(3)
        if head[:2] in _UTF16_BOMS:
            raise ValueError(f"数据文件 {path} 是 UTF-16 编码，请另存为 UTF-8")
        stream.seek(3 if head == _UTF8_BOM else 0)
        start = stream.tell()
        first = b""
        while not first and (block := stream.read(_READ_BYTES)):
            first = block.lstrip()[:1]
        stream.seek(start)
        yield from (_iter_array(stream, str(path)) if first == b"[" else _iter_lines(stream, str(path)))


def check_file(path: str | os.PathLike) -> None:
    """必须是可读的非空普通文件；先看类型再打开，否则打开 FIFO 会一直等下去。"""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"找不到数据文件 {path}（{getattr(error, 'strerror', None) or error}），请检查路径") from error
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"数据文件 {path} 是一个目录，请给出目录中的某个文件")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"数据文件 {path} 不是普通文件（可能是管道或设备），请先存成文件")
    if status.st_size == 0:
        raise ValueError(f"数据文件 {path} 是空的（0 字节），没有任何样本")
    if not os.access(path, os.R_OK):
        raise ValueError(f"没有读取数据文件 {path} 的权限，请检查文件权限")


def _too_long(path: str, line: int) -> Problem:
    return Problem(path, line, "行", f"一行（或数组的一个元素）超过 {MAX_ROW_BYTES >> 20} MiB", "请拆成多条样本")


def _iter_lines(stream, path: str) -> Iterator[RawRow | Problem]:
    line = 0
    while content := stream.readline(MAX_ROW_BYTES + 1):
        line += 1
        if len(content) > MAX_ROW_BYTES:
            while not content.endswith(b"\n") and (content := stream.readline(_READ_BYTES)):
                pass
            yield _too_long(path, line)
        elif content.strip():
            yield RawRow(line, content)


def _iter_array(stream, path: str) -> Iterator[RawRow | Problem]:
    """按括号的深度把 JSON 数组切成元素，不解析内容：一个元素写坏了，其余的照常检查。"""
    outside, inside = re.compile(rb'["\[\]{},]'), re.compile(rb'["\\]')
    element = bytearray()
    line, depth, in_string, skip, count = 1, 0, False, 0, 0

    def start_line() -> int:
        """攒下的元素第一个非空白字节所在的行。"""
        return line + element.count(b"\n", 0, len(element) - len(element.lstrip()))

    def cut() -> RawRow | Problem:
        nonlocal line
        content, start = bytes(element), start_line()
        line += content.count(b"\n")
        element.clear()
        if content.strip():
            return RawRow(start, content.strip())
        return Problem(path, start, "数组", "两个逗号之间（或末尾逗号之后）没有内容", "请删去多余的逗号")

    while block := stream.read(_READ_BYTES):
        position, copied = skip, 0
        skip = 0
        while match := (inside if in_string else outside).search(block, position):
            position, symbol = match.end(), match.group()
            if symbol == b"\\":
                position += 1  # 转义符连同后一个字节一起越过，后者可能在下一块里
            elif symbol == b'"':
                in_string = not in_string
            elif symbol in b"[{":
                depth += 1
                if depth == 1:
                    element += block[copied : match.start()]
                    line += element.count(b"\n")
                    element.clear()
                    copied = match.end()
            elif symbol == b"," and depth == 1:
                element += block[copied : match.start()]
                copied = match.end()
                count += 1
                yield cut()
            elif symbol in b"]}":
                depth -= 1
                if depth == 0:
                    element += block[copied : match.start()]
                    if count or element.strip():
                        yield cut()
                    rest = block[match.end() :] + stream.read(_READ_BYTES)
                    if rest.strip():
                        yield Problem(path, line, "数组", "数组的 ] 之后还有内容", "请删去，或改成每行一个 JSON 对象")
                    return
        skip = max(0, position - len(block))
        element += block[copied:]
        if len(element) > MAX_ROW_BYTES:
            yield _too_long(path, start_line())
            return
    if element.strip():
        yield cut()
    what = "引号没有配对，到文件末尾仍在字符串里" if in_string else "数组没有结束的 ]，文件可能不完整"
    yield Problem(path, line, "数组", what, "请检查文件末尾，或重新导出")
