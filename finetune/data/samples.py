"""行 → Sample：认出一行的写法，错误按「文件:行: 字段: 问题: 办法」一次列出。

每一行是下面两种之一，多余的字段不影响训练：
    {"instruction": "…", "input": "…", "output": "…"}          instruction 与 input 可缺一，output 可为空字符串
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}
    conversations 也可写成 {"role": "system|user|assistant", "content": "…"}；system 只能在最前，其后一问一答交替。
"""

import json
import os
from typing import Any, NamedTuple

from finetune.data.rows import MAX_PROBLEMS, Problem, ProblemList, RawRow, iter_rows

# 读模型、编译算子之前先看的行数与字节数
FIRST_ROWS, FIRST_BYTES = 1000, 16 * 2**20


def check_first_rows(
    path: str | os.PathLike, max_rows: int = FIRST_ROWS, max_bytes: int = FIRST_BYTES, split: str = "train"
):
    """只检查文件开头的 max_rows 行（不分词）：多数的错误在载入模型、编译算子之前就能说出来。

    Raises:
        ValueError: 文件不能读，或开头的行有错；列法同读完整个文件。
    """
    problems, num_bytes = ProblemList(path), 0
    for count, row in enumerate(iter_rows(path), 1):
        problems.add(parse_row(row, str(path), split)[1])
        num_bytes += len(row.content) if isinstance(row, RawRow) else 0
        if count == max_rows or num_bytes >= max_bytes:
            break
    problems.raise_if_any()


SPLITS = ("train", "eval", "predict")
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
