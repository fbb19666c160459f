"""数据文件的读取与检查：JSON Lines 或 JSON 数组 → Sample，错误按「文件:行: 字段: 问题: 办法」一次列出。

逐行（数组则逐个元素）读取，内存里不存整份文件。每一行是下面两种之一，多余的字段不影响训练：
    {"instruction": "…", "input": "…", "output": "…"}          instruction 与 input 可缺一，output 可为空字符串
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}
    conversations 也可写成 {"role": "system|user|assistant", "content": "…"}；system 只能在最前，其后一问一答交替。
"""

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

SPLITS = ("train", "eval", "predict")
MAX_ROW_BYTES = 64 * 2**20
MAX_PROBLEMS = 20
_READ_BYTES = 2**20
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_TYPE_NAMES = {
    dict: "对象",
    list: "数组",
    str: "字符串",
    bool: "布尔值",
    int: "数字",
    float: "数字",
    type(None): "null",
}


class Sample(NamedTuple):
    """文件中的一条样本；训练用的 messages 以回答结尾，预测用的以用户消息结尾（回答移到 references）。"""

    messages: tuple[tuple[str, str], ...]  # (role, text)，role ∈ system | user | assistant
    line: int  # 从 1 起的行号；JSON 数组是元素开头所在的行
    path: str
    references: tuple[str, ...] | None = None  # 预测文件的参考答案，没有则为 None
    raw: dict[str, Any] | None = None  # 预测文件的原始字段，供写出预测结果

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"


class Problem(NamedTuple):
    """数据文件里的一处错误。"""

    path: str
    line: int
    field: str
    what: str
    remedy: str

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


def read_samples(path: str | os.PathLike, split: str = "train", max_problems: int = MAX_PROBLEMS) -> list[Sample]:
    """读出文件的全部样本。

    split="train" | "eval"：每行都要有回答（output 为字符串，可为空）。
    split="predict"：回答可缺、可为字符串或字符串的列表（多个参考答案）；对话以回答结尾时，那个回答是参考答案。
    错误汇成一个 ValueError（至多列 max_problems 处，并给出总数）。
    """
    problems = ProblemList(path, max_problems)
    samples: list[Sample] = []
    for row in iter_rows(path):
        found, broken = parse_row(row, str(path), split)
        problems.add(broken)
        if found is not None and not problems.total:
            samples.append(found)
    problems.raise_if_any()
    if not samples:
        raise ValueError(f"数据文件 {path} 里没有任何样本（只有空白），请检查文件内容")
    return samples


# ---- 文件 → 行 ----


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


# ---- 行 → 样本 ----


class _RowError(ValueError):
    """一行里的错误：(字段, 问题, 办法)，可附带行内的行偏移。"""

    def __init__(self, field: str, what: str, remedy: str, line_offset: int = 0):
        super().__init__(field, what, remedy)
        self.field, self.what, self.remedy, self.line_offset = field, what, remedy, line_offset


def parse_row(row: RawRow | Problem, path: str, split: str = "train") -> tuple[Sample | None, list[Problem]]:
    """把一行解析成 (样本, 错误)：有错误时样本为 None。纯函数，可在子进程里调用。"""
    if split not in SPLITS:
        raise ValueError(f"split 应为 {' | '.join(SPLITS)}，实际是 {split!r}")
    if isinstance(row, Problem):
        return None, [row]
    try:
        fields = _decode_row(row.content)
        parse = _parse_conversations if "conversations" in fields else _parse_instruction
        messages, references, errors = parse(fields, split == "predict")
    except _RowError as error:
        return None, [Problem(path, row.line + error.line_offset, error.field, error.what, error.remedy)]
    if errors:
        return None, [Problem(path, row.line, error.field, error.what, error.remedy) for error in errors]
    return Sample(tuple(messages), row.line, path, references, fields if split == "predict" else None), []


def _refuse_constant(name: str) -> None:
    raise _RowError("JSON", f"{name} 不是合法的 JSON 值", "请换成数字、字符串或 null")


def _parse_int(digits: str) -> int:
    if len(digits) > 400:
        raise _RowError("JSON", f"整数有 {len(digits)} 位", "请改成字符串或正常大小的数字")
    return int(digits)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _RowError(repeated[:40], "同一个对象里这个字段出现了两次", "请只保留一个")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_int=_parse_int, parse_constant=_refuse_constant)


def _decode_row(content: bytes) -> dict[str, Any]:
    try:
        text = content.rstrip().decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"第 {error.start + 1} 个字节（0x{content[error.start]:02x}）起不是合法的 UTF-8"
        raise _RowError("编码", what, "请把文件转成 UTF-8（常见的原因是 GBK 编码）") from error
    if "\0" in text:
        raise _RowError("编码", f"第 {text.index(chr(0)) + 1} 个字符是 NUL（\\x00）", "文件可能已损坏，请重新导出")
    try:
        fields = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        what = f"不是合法的 JSON（第 {error.colno} 列：{error.msg}）"
        remedy = "请改正语法；一行要有一个完整的 JSON 对象"
        raise _RowError("JSON", what, remedy, error.lineno - 1) from error
    except RecursionError as error:
        raise _RowError("JSON", "括号嵌套太深", "样本只需要一两层，请检查这一行是怎样生成的") from error
    if not isinstance(fields, dict):
        raise _RowError("行", f"应为 JSON 对象 {{…}}，实际是{_type_name(fields)}", '请写成 {"instruction": …} 的形式')
    return fields


def _type_name(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def _text_errors(field: str, value: Any) -> list[_RowError]:
    """value 应是能写成 UTF-8 的字符串；返回错误（没有则为空）。"""
    if not isinstance(value, str):
        return [_RowError(field, f"应为字符串，实际是{_type_name(value)}", '请加上引号，没有内容就写 ""')]
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"第 {error.start + 1} 个字符是不成对的代理字符（\\u{ord(value[error.start]):04x}）"
        return [_RowError(field, what, "表情等字符被截断了，请补全或删去")]
    return []


def _parse_instruction(fields: dict[str, Any], predict: bool) -> tuple[list, tuple[str, ...] | None, list[_RowError]]:
    """instruction/input/output 的一行 → (messages, references, errors)；用户消息是 instruction 与 input 直接相接。"""
    instruction, input_text = fields.get("instruction", ""), fields.get("input", "")
    errors = [*_text_errors("instruction", instruction), *_text_errors("input", input_text)]
    if not errors and not (instruction.strip() or input_text.strip()):
        missing = "instruction" not in fields and "input" not in fields
        what = (
            f"instruction 与 input 都没有，已有的字段：{_names(fields)}" if missing else "instruction 与 input 都是空的"
        )
        errors.append(_RowError("instruction", what, "至少填写一个"))
    output = fields.get("output")
    references = None
    if "output" not in fields:
        if not predict:
            what = f"缺少这个字段，已有的字段：{_names(fields)}"
            errors.append(_RowError("output", what, '请补上；没有答案就写 ""（目标只有结束符）'))
    elif predict and isinstance(output, list):
        errors += [error for i, text in enumerate(output) for error in _text_errors(f"output[{i}]", text)]
        references = tuple(output)
    elif not (predict and output is None):
        errors += _text_errors("output", output)
        references = (output,)
    if errors:
        return [], None, errors
    messages = [("user", instruction + input_text)]
    return (messages, references, []) if predict else ([*messages, ("assistant", output)], None, [])


def _parse_conversations(fields: dict[str, Any], predict: bool) -> tuple[list, tuple[str, ...] | None, list[_RowError]]:
    """conversations 的一行 → (messages, references, errors)。"""
    turns = fields["conversations"]
    mixed = [name for name in ("instruction", "input", "output") if name in fields]
    if mixed:
        what = f"与 {'、'.join(mixed)} 同时出现，不知道用哪个"
        return [], None, [_RowError("conversations", what, "请只保留一种写法")]
    if not isinstance(turns, list) or not turns:
        what = f"应为非空的数组，实际是{'空数组' if turns == [] else _type_name(turns)}"
        return [], None, [_RowError("conversations", what, '请写成 [{"from": "human", "value": …}, …]')]
    errors: list[_RowError] = []
    messages = [_parse_turn(f"conversations[{i}]", turn, errors) for i, turn in enumerate(turns)]
    if errors:
        return [], None, errors
    errors = _order_errors([role for role, _ in messages], predict)
    errors += [
        _RowError(f"conversations[{i}]", "用户消息是空的", "请填写内容，或删去这一轮")
        for i, (role, text) in enumerate(messages)
        if role == "user" and not text.strip()
    ]
    if errors or not predict or messages[-1][0] == "user":
        return messages, None, errors
    return messages[:-1], (messages[-1][1],), []


def _parse_turn(place: str, turn: Any, errors: list[_RowError]) -> tuple[str, str]:
    """一条消息 → (role, text)；错误加进 errors，此时的返回值不用。"""
    if not isinstance(turn, dict):
        errors.append(_RowError(place, f"应为对象，实际是{_type_name(turn)}", '请写成 {"from": …, "value": …}'))
        return "", ""
    role_key, text_key = ("role", "content") if "role" in turn else ("from", "value")
    for key in (role_key, text_key):
        if key not in turn:
            what = f"缺少这个字段，已有的字段：{_names(turn)}"
            errors.append(_RowError(f"{place}.{key}", what, "消息写成 from/value 或 role/content"))
            return "", ""
    role = turn[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        shown = repr(role)[:40] if isinstance(role, str) else _type_name(role)
        remedy = "可用 human、gpt、system 或 user、assistant、system"
        errors.append(_RowError(f"{place}.{role_key}", f"不认识的角色 {shown}", remedy))
        return "", ""
    errors += _text_errors(f"{place}.{text_key}", turn[text_key])
    return _ROLES[role], turn[text_key]


def _order_errors(roles: list[str], predict: bool) -> list[_RowError]:
    """检查次序：system 只在最前，其后从用户开始一问一答；训练数据以回答结尾。"""
    expected = "user"
    for i, role in enumerate(roles):
        if role == "system" and i == 0:
            continue
        if role != expected:
            what = f"这里应是 {expected}，实际是 {role}"
            return [_RowError(f"conversations[{i}]", what, "system 只能在最前，其后用户与回答要交替，请合并或删去")]
        expected = "assistant" if role == "user" else "user"
    if roles[-1] == "system":
        return [_RowError("conversations", "只有 system，没有用户消息", "请补上用户消息")]
    if roles[-1] == "user" and not predict:
        return [_RowError("conversations", "最后一条是用户消息，没有可学的回答", "请补上回答，或删去最后一条")]
    return []


def _names(fields: dict[str, Any]) -> str:
    names = "、".join(str(name)[:20] for name in list(fields)[:8])
    return (names + ("……" if len(fields) > 8 else "")) or "无"
