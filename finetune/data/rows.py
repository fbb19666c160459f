"""数据文件 → 行：JSON Lines、JSON 数组、CSV 与 TSV（首行是列名）、Parquet、纯文本的 .txt 与它们的目录；不解析行的内容。

除 Parquet 外可用 gzip 压缩。逐行（数组则逐个元素）产出，内存里不存整份文件。表格的一行、.txt 的一篇文档写成一个 JSON
对象，此后与 JSON Lines 的一行无异；目录是其中（连同下级）各个 .txt 依名字的次序首尾相接。
不是 UTF-8、不是这几种文件、一个对象跨了多行，都是一句话的错误，并给出转换的命令。
"""

import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import shlex
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from utils import file_sha256

MAX_ROW_BYTES = 64 * 2**20
MAX_PROBLEMS = 20
# 先看这么多开头来认种类与编码；此后每次读这么多
_HEAD_BYTES = _READ_BYTES = 2**20
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_GZIP, _PARQUET, _ZIP = b"\x1f\x8b", b"PAR1", b"PK\x03\x04"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
TEXT_SUFFIXES = (".txt", ".txt.gz")
TEXT_UNITS = ("line", "blank", "file")  # .txt 的一篇文档：一行；空行隔开的一段；整个文件
_JSON_START = re.compile(rb"\s*(\{|\[\s*\{)")  # 名为 .txt 的 JSON Lines 与数组照常读


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
        """有错误时抛出一个 ValueError，逐条列出；同样的错误写一次，其余只写行号。"""
        if not self.total:
            return
        rest = f"（只列出前 {len(self.kept)} 处）" if self.total > len(self.kept) else ""
        kinds: dict[Problem, list[int]] = {}
        for problem in self.kept:
            kinds.setdefault(problem._replace(line=0), []).append(problem.line)
        listing = "\n".join(
            f"  {kind._replace(line=lines[0])}" + (f"\n    同样的：第 {_ranges(lines[1:])} 行" if lines[1:] else "")
            for kind, lines in kinds.items()
        )
        raise ValueError(f"数据文件 {self.path} 有 {self.total} 处错误{rest}，请改正后重试：\n{listing}")


def _ranges(lines: list[int]) -> str:
    """行号 → 「3、5–9」。"""
    runs: list[list[int]] = []
    for line in lines:
        if runs and line == runs[-1][1] + 1:
            runs[-1][1] = line
        else:
            runs.append([line, line])
    return "、".join(f"{first}" if first == last else f"{first}–{last}" for first, last in runs)


# ---- 打开 ----


def iter_rows(path: str | os.PathLike, text_unit: str | None = "line") -> Iterator[RawRow | Problem]:
    """逐行（数组则逐个元素，.txt 逐篇文档）产出内容，不解析；切不出来的地方产出 Problem。

    目录里的行号接着数；text_unit 见 TEXT_UNITS，None 为 .txt 里也是 JSON。

    Raises:
        ValueError: 根本不能读的文件：没有、不是 UTF-8、不认识的种类、压缩损坏、一个对象跨了多行。
    """
    files, done = files_of(path), 0
    for file in files:
        line = 0
        for row in _iter_file(file, text_unit):
            line = max(line, row.line)
            yield row._replace(line=done + row.line) if done and isinstance(row, RawRow) else row
        done += line


def files_of(path: str | os.PathLike) -> list[str]:
    """一份数据的各个文件：文件就是它自己，目录是其中（连同下级）的 .txt，依名字的次序。

    Raises:
        ValueError: 目录里没有 .txt，或不是可读的普通文件。
    """
    files = [str(path)]
    if os.path.isdir(path):
        files = sorted(str(file) for file in Path(path).rglob("*") if file.name.lower().endswith(TEXT_SUFFIXES))
        if not files:
            raise ValueError(f"数据文件 {path} 是一个目录，请给出目录中的某个文件，或一个有 .txt 的目录")
    for file in files:
        check_file(file)
    return files


def unread_files(path: str | os.PathLike) -> list[str]:
    """一个目录里不读的文件（不是 .txt 的），依名字的次序；不是目录时没有。"""
    inside = [file for file in sorted(Path(path).rglob("*")) if file.is_file()] if os.path.isdir(path) else []
    return [str(file.relative_to(path)) for file in inside if not file.name.lower().endswith(TEXT_SUFFIXES)]


def num_bytes_of_data(path: str | os.PathLike) -> int:
    """一份数据的字节数。"""
    return sum(map(os.path.getsize, files_of(path)))


def data_sha256(path: str | os.PathLike) -> str:
    """一份数据的内容的 SHA-256；目录的由各文件的名字与内容算出。"""
    if not os.path.isdir(path):
        return file_sha256(Path(path))
    names = [[os.path.relpath(file, path), file_sha256(Path(file))] for file in files_of(path)]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _iter_file(path: str, text_unit: str | None) -> Iterator[RawRow | Problem]:
    with open(path, "rb") as raw:
        magic = raw.read(4)
        raw.seek(0)
        if magic == _PARQUET:
            yield from _iter_parquet(path)
            return
        if magic == _ZIP:
            raise ValueError(f"数据文件 {path} 是 zip 或 xlsx，请解压，或在表格软件里另存为 CSV（UTF-8）")
        try:
            yield from _iter_stream(gzip.GzipFile(fileobj=raw) if magic[:2] == _GZIP else raw, path, text_unit)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"数据文件 {path} 的 gzip 压缩已损坏或不完整（{error}），请重新下载") from error


def _iter_stream(stream: BinaryIO, path: str, text_unit: str | None) -> Iterator[RawRow | Problem]:
    head = stream.read(_HEAD_BYTES)
    encoding = found_encoding(head)
    if encoding is not None:
        raise ValueError(f"数据文件 {path} 是 {encoding} 编码，请转成 UTF-8：{conversion(path, encoding)}")
    start = 3 if head[:3] == _UTF8_BOM else 0
    delimiter = _DELIMITERS.get(Path(path[:-3] if path.endswith(".gz") else path).suffix.lower())
    if delimiter is not None:
        stream.seek(start)
        yield from _iter_table(stream, path, delimiter)
        return
    if text_unit and path.lower().endswith(TEXT_SUFFIXES) and not _JSON_START.match(head, start):
        stream.seek(start)
        yield from _iter_documents(stream, path, text_unit)
        return
    first = head[start:].lstrip()[:1]
    stream.seek(start)
    while not first and (block := stream.read(_READ_BYTES)):
        first = block.lstrip()[:1]
    stream.seek(start)
    if first == b"{":
        _refuse_pretty_printed(head[start:], path)
    yield from (_iter_array(stream, path) if first == b"[" else _iter_lines(stream, path))


def found_encoding(head: bytes) -> str | None:
    """文件的开头不是 UTF-8 时，它像是哪种编码：UTF-16（没有 BOM 的分 LE、BE）、GB18030；是 UTF-8 或说不准时为 None。

    有一行带汉字的 UTF-8，就当作 UTF-8 文件里有几行坏了：UTF-8 的字节也常能按 GB18030 解出字来。
    """
    if head[:2] in _UTF16_BOMS:
        return "UTF-16"
    lines = head.split(b"\n")
    lines = lines[:-1] if len(head) >= _HEAD_BYTES and len(lines) > 1 else lines
    strange = [line for line in lines if not line.isascii()]
    zeros = {"UTF-16BE": head[::2].count(0), "UTF-16LE": head[1::2].count(0)}
    if min(zeros.values()) == 0 and max(zeros.values()) * 20 > len(head):
        return max(zeros, key=zeros.get)
    if not strange or any(_decodes(line, "utf-8") for line in strange):
        return None
    return "GB18030" if all(_decodes(line, "gb18030") for line in strange) else None


def _decodes(content: bytes, encoding: str) -> bool:
    try:
        content.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def conversion(path: str, encoding: str) -> str:
    """把文件转成 UTF-8 的一条命令；写到旁边的新文件，不动原来的。"""
    name = Path(path).name
    stem, *suffixes = name.split(".")
    suffixes = [suffix for suffix in suffixes if suffix != "gz"]
    target = Path(path).with_name(".".join([stem, "utf8", *suffixes]))
    unpack = f"gzip -dc {shlex.quote(path)} | " if path.endswith(".gz") else ""
    source = "" if unpack else f"{shlex.quote(path)} "
    return f"{unpack}iconv -f {encoding} -t UTF-8 {source}> {shlex.quote(str(target))}"


def _refuse_pretty_printed(head: bytes, path: str) -> None:
    """一个 JSON 对象写成了多行（缩进过的，或外面包着 {"data": [...]}）：说一句，不逐行报错。"""
    text = head.decode("utf-8", errors="replace").lstrip()
    decoder = json.JSONDecoder()
    try:
        first_line = text.split("\n", 1)[0]
        if decoder.raw_decode(first_line):
            return
    except (ValueError, RecursionError):
        pass
    try:
        value, end = decoder.raw_decode(text)
    except (ValueError, RecursionError) as error:
        # 开头的 1 MiB 里没有写完：缩进过的大文件，错误在末尾
        if len(head) < _HEAD_BYTES or getattr(error, "pos", 0) < 0.9 * len(text):
            return
        value, end = {}, len(text)
    if "\n" not in text[:end]:
        return
    rows = next((name for name, item in value.items() if isinstance(item, list) and _are_rows(item)), None)
    rows = None if rows in ("conversations", "messages", "conversation") else rows
    query = f".{rows}[]" if rows else "."
    target = Path(path).with_suffix(".jsonl")
    raise ValueError(
        f"数据文件 {path} 里一个 JSON 对象写成了多行，请改成每行一个对象："
        f"jq -c {shlex.quote(query)} {shlex.quote(path)} > {shlex.quote(str(target))}"
    )


def _are_rows(items: list[Any]) -> bool:
    return bool(items) and all(isinstance(item, dict) for item in items)


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


# ---- 行 ----


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


# ---- 纯文本 ----


def _iter_documents(stream: BinaryIO, path: str, unit: str) -> Iterator[RawRow | Problem]:
    """各篇文档 → {"text": …} 的行；行号是文档开头的行。"""
    start, kept, size = 1, [], 0

    def cut() -> Iterator[RawRow | Problem]:
        if size > MAX_ROW_BYTES:
            yield _too_long(path, start)
        elif kept:
            yield _text_row(path, start, b"".join(kept))

    for number, row in enumerate(iter(lambda: stream.readline(MAX_ROW_BYTES + 1), b""), start=1):
        is_blank = not row.strip()
        if unit == "line" or (unit == "blank" and is_blank):
            yield from cut()
            kept, size = [], 0
        if is_blank and not (kept and unit == "file"):
            continue
        start = start if size else number
        size += len(row)
        if size <= MAX_ROW_BYTES:
            kept.append(row)
    yield from cut()


def _text_row(path: str, line: int, content: bytes) -> RawRow | Problem:
    try:
        text = content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        what = f"第 {error.start + 1} 个字节（0x{content[error.start]:02x}）起不是合法的 UTF-8"
        return Problem(path, line, "编码", what, "请把文件转成 UTF-8（常见的原因是 GBK 编码）")
    return RawRow(line, json.dumps({"text": text}, ensure_ascii=False).encode())


# ---- 表格 ----


def _iter_table(stream: BinaryIO, path: str, delimiter: str) -> Iterator[RawRow | Problem]:
    """CSV 与 TSV：首行是列名，引号按 CSV 的规则（含分隔符、换行的内容要用双引号括起）；行号是这一行开头的行。"""
    csv.field_size_limit(MAX_ROW_BYTES)
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    line = 1
    try:
        header: list[str] | None = None
        for cells in reader:
            if header is None:
                header = [name.strip() for name in cells]
                if len(set(header)) < len(header) or not all(header):
                    yield Problem(path, line, "表头", f"列名有空的或重复的：{header}", "请给每列一个不同的名字")
                    return
            elif cells:
                yield _table_row(path, line, header, cells)
            line = reader.line_num + 1
    except csv.Error as error:
        yield Problem(path, line, "行", f"CSV 格式有误（{error}）", "请检查这一行起的引号是否配对")


def _table_row(path: str, line: int, header: list[str], cells: list[str]) -> RawRow | Problem:
    if len(cells) != len(header):
        what = f"应有 {len(header)} 列（{'、'.join(header)}），实际是 {len(cells)} 列"
        return Problem(path, line, "行", what, "请检查分隔符；内容含分隔符时要用双引号括起")
    try:
        content = json.dumps(dict(zip(header, cells, strict=True)), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Problem(path, line, "编码", "不是合法的 UTF-8 文本", "请把文件转成 UTF-8（常见的原因是 GBK 编码）")
    return RawRow(line, content) if len(content) <= MAX_ROW_BYTES else _too_long(path, line)


def _iter_parquet(path: str) -> Iterator[RawRow | Problem]:
    """Parquet：一行一个对象，行号从 1 起；缺失的值是 null。要 pyarrow。"""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(
            f"读 Parquet 文件 {path} 要 pyarrow，请运行 pip install pyarrow，或另存为 JSON Lines"
        ) from error
    line = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    line += 1
                    content = json.dumps(_plain_value(fields), ensure_ascii=False, default=str).encode()
                    yield RawRow(line, content) if len(content) <= MAX_ROW_BYTES else _too_long(path, line)
    except (ArrowException, OSError) as error:
        raise ValueError(f"Parquet 文件 {path} 已损坏或不完整（{error}），请重新下载") from error


def _plain_value(value: Any) -> Any:
    """Parquet 里的 NaN 也是缺失，写成 null。"""
    if isinstance(value, dict):
        return {name: _plain_value(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain_value(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
