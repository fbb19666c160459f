"""行 → Sample：一行 JSON 是哪种写法由它的字段认出，一个文件可以混用；FORMATS 是全部的写法，一种一项。

    {"instruction": "…", "input": "…", "output": "…"}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
    {"conversation": [{"human": "…", "assistant": "…"}, …]}
    {"query": "…", "response": "…"}、{"prompt": "…", "response": "…"}、{"prompt": "…", "completion": "…"}
    {"text": "…"}                                                  一篇文档，每个 token 都是目标
    {以上任何一种的提示, "chosen": "…", "rejected": "…"}              偏好对：回答写成文字，或一条消息

一行属于哪些阶段（--task）见 READS。
都可以再有 system；一问一答的几种可以再有 history（[用户, 回答] 的数组）。值为 null、""、[] 的字段等于没有，只有
回答可以是空字符串。认识而用不上的字段是错误（--ignore_fields 可以略去它），不认识的字段不用，报告里数一次。
错误写作「文件:行: 字段: 问题: 办法」。
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from finetune.data.rows import MAX_PROBLEMS, Problem, ProblemList, RawRow, iter_rows

SPLITS = ("train", "eval", "predict")
LOSS_TURNS = ("all", "last")
SUPERVISED, PREFERENCE, TEXT = "supervised", "preference", "pretrain"  # 行的三类
# 各阶段（--task）读哪些行；kto 的问答要有 label
READS = {
    **dict.fromkeys(("sft", "pretrain"), (SUPERVISED, TEXT)),
    **dict.fromkeys(("dpo", "orpo", "simpo"), (PREFERENCE,)),
    "kto": (SUPERVISED,),
}
DESIRABLE = 32  # kto 的 label，样本的标志之一（见 encoding.py）
# 读模型、编译算子之前先看的行数与字节数
FIRST_ROWS, FIRST_BYTES = 1000, 16 * 2**20
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing"), "assistant"),
    "system": "system",
}
_TOOL_ROLES = ("tool", "function", "observation", "function_call", "tool_call", "tool_response", "function_response")
# 各家的写法里有、而这里用不上的字段：略去它们会改变一行的意思，所以是错误
_UNUSED_IN_ROW = frozenset(
    [
        *("tools", "functions", "function_call", "tool_calls", "system_prompt", "rejected_response", "kto_tag"),
        *("images", "image", "videos", "video", "audios", "audio", "objects"),
    ]
)
_RENAMED = {"system_prompt": "system", "kto_tag": "label"}  # 这里的名字
_UNUSED_IN_TURN = frozenset(
    [
        *("tools", "tool_calls", "function_call", "tool_call_id", "name", "images", "image", "audio"),
        *("refusal", "reasoning_content", "thinking"),
    ]
)
# 问与答常见的别名；只用来说该改成什么
_QUESTIONS = frozenset(["instruction", "query", "prompt", "question", "problem", "source", "问题", "指令", "输入"])
_ANSWERS = frozenset(
    [
        *("output", "response", "completion", "answer", "target", "reply", "summary", "label"),
        *("输出", "回答", "答案"),
    ]
)
_TYPE_NAMES = {
    dict: "对象",
    list: "数组",
    str: "字符串",
    bool: "布尔值",
    int: "数字",
    float: "数字",
    type(None): "null",
}

Message = tuple[str, str]  # (role, text)，role ∈ system | user | assistant


class RowOptions(NamedTuple):
    """怎样读一行；同名的参数存在 run_config.json 里，预测时照用。"""

    input_separator: str = ""  # instruction 与 input 之间
    ignore_fields: tuple[str, ...] = ()  # 当作没有的字段，行里与消息里的都算
    loss_turns: str = "all"  # 训练哪些回答：all | last
    train_on_prompt: bool = False  # 提示也是目标
    task: str = "sft"  # 训练的阶段，决定读哪些行，见 READS
    text_unit: str = "line"  # .txt 的一篇文档，见 rows.TEXT_UNITS
    document_overlap: int = 0  # 长文档切成几段，后一段带着前一段末尾的几个 token
    document_bos: bool = False  # 文档之前加 bos


def row_options(settings: Mapping[str, Any]) -> RowOptions:
    """由 train.py 的参数（或 run_config.json 里记下的）得到；没有记下的取缺省。"""
    return RowOptions(
        input_separator=settings.get("input_separator", ""),
        ignore_fields=tuple(name.strip() for name in settings.get("ignore_fields", "").split(",") if name.strip()),
        loss_turns=settings.get("loss_turns", "all"),
        train_on_prompt=settings.get("train_on_prompt", False),
        **{
            name: settings[name]
            for name in ("task", "text_unit", "document_overlap", "document_bos")
            if name in settings
        },
    )


def separator_choice(value: str) -> str:
    r"""--input_separator 的取值：命令行里的 \n、\t 是换行与制表符。"""
    return value.replace("\\n", "\n").replace("\\t", "\t")


class Sample(NamedTuple):
    """文件中的一条样本；训练用的 messages 以回答结尾，预测用的以用户消息结尾（回答移到 references）。"""

    messages: tuple[Message, ...]
    line: int  # 从 1 起的行号；JSON 数组是元素开头所在的行
    path: str
    references: tuple[str, ...] | None = None  # 预测文件的参考答案，没有则为 None
    raw: dict[str, Any] | None = None  # 预测文件的原始字段，供写出预测结果
    trained: tuple[bool, ...] | None = None  # 各条消息是不是目标；None：全部回答都是，别的都不是
    format: str = ""  # FORMATS 里的名字
    document: str = ""  # 这一行讲的文档：input（没有则 instruction），对话是第一条用户消息
    unused: tuple[str, ...] = ()  # 不认识、没有用上的字段
    rejected: str | None = None  # 偏好对里不好的回答；好的回答在 messages 末尾
    label: bool | None = None  # kto：这个回答好不好

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"


class RowError(ValueError):
    """一行里的错误：(字段, 问题, 办法)，可附带行内的行偏移。"""

    def __init__(self, field: str, what: str, remedy: str, line_offset: int = 0):
        super().__init__(field, what, remedy)
        self.field, self.what, self.remedy, self.line_offset = field, what, remedy, line_offset


def read_samples(
    path: str | os.PathLike,
    split: str = "train",
    max_problems: int = MAX_PROBLEMS,
    options: RowOptions = RowOptions(),
) -> list[Sample]:
    """读出文件的全部样本。

    split="train" | "eval"：每行都要有回答（字符串，可为空）。
    split="predict"：回答可缺、可为字符串或字符串的列表（多个参考答案）；对话以回答结尾时，那个回答是参考答案。
    错误汇成一个 ValueError（至多列 max_problems 处，并给出总数）。
    """
    problems = ProblemList(path, max_problems)
    samples: list[Sample] = []
    for row in iter_rows(path, options.text_unit):
        found, broken = parse_row(row, str(path), split, options)
        problems.add(broken)
        if found is not None and not problems.total:
            samples.append(found)
    problems.raise_if_any()
    if not samples:
        raise ValueError(f"数据文件 {path} 里没有任何样本（只有空白），请检查文件内容")
    return samples


def check_first_rows(
    path: str | os.PathLike,
    options: RowOptions = RowOptions(),
    max_rows: int = FIRST_ROWS,
    max_bytes: int = FIRST_BYTES,
):
    """只检查文件开头的 max_rows 行（不分词）：多数的错误在载入模型、编译算子之前就能说出来。

    Raises:
        ValueError: 文件不能读，或开头的行有错；列法同读完整个文件。
    """
    problems, num_bytes = ProblemList(path), 0
    for count, row in enumerate(iter_rows(path, options.text_unit), 1):
        problems.add(parse_row(row, str(path), "train", options)[1])
        num_bytes += len(row.content) if isinstance(row, RawRow) else 0
        if count == max_rows or num_bytes >= max_bytes:
            break
    problems.raise_if_any()


def parse_row(
    row: RawRow | Problem,
    path: str,
    split: str = "train",
    options: RowOptions = RowOptions(),
) -> tuple[Sample | None, list[Problem]]:
    """把一行解析成 (样本, 错误)：有错误时样本为 None。纯函数，可在子进程里调用。"""
    if split not in SPLITS:
        raise ValueError(f"split 应为 {' | '.join(SPLITS)}，实际是 {split!r}")
    if isinstance(row, Problem):
        return None, [row]
    draft = _Draft(split == "predict", options)
    try:
        fields, draft.has_escapes = _decode_row(row.content)
        raw = fields
        if options.ignore_fields:
            fields = {name: value for name, value in fields.items() if name not in options.ignore_fields}
        kind, unknown = _recognise(fields, draft)
        if not draft.errors:
            kind.read(fields, draft)
        if not draft.errors:
            draft.settle(kind)
    except RowError as error:
        return None, [Problem(path, row.line + error.line_offset, error.field, error.what, error.remedy)]
    if draft.errors:
        return None, [Problem(path, row.line, *error.args) for error in draft.errors]
    return (
        Sample(
            tuple(draft.messages),
            row.line,
            path,
            draft.references,
            raw if draft.is_predict else None,
            draft.trained,
            kind.name,
            draft.document,
            unknown if not draft.unused else (*unknown, *draft.unused),
            draft.rejected,
            fields["label"] if options.task == "kto" and not draft.is_predict else None,
        ),
        [],
    )


# ---- 写法 ----


class Format(NamedTuple):
    """一种写法：怎样认出它，用哪些字段，怎样读。"""

    name: str
    marks: tuple[str, ...]  # 有其中一个字段（不是 null、""、[]），就是这种写法；先列出的优先
    fields: tuple[str, ...]  # 用得上的全部字段；一问一答的，开头两个是问与答
    read: Callable[[dict[str, Any], "_Draft"], None]
    task: str = SUPERVISED  # 哪一类行；现在的阶段不读的（见 READS）是错误
    refusal: str = "问答或对话"  # 不属于现在的阶段时，说它是什么


class _Draft:
    """正在读的一行：消息、目标、参考答案，与途中遇到的错误。"""

    references: tuple[str, ...] | None = None
    trained: tuple[bool, ...] | None = None
    document = ""
    rejected: str | None = None
    field = ""  # 回答在哪个字段里
    unused: tuple[str, ...] = ()
    errors: tuple[RowError, ...] = ()
    has_escapes = True  # 这一行有 \\u 的转义，文字里可能有不成对的代理字符

    def __init__(self, is_predict: bool, options: RowOptions):
        self.is_predict, self.options = is_predict, options
        self.messages: list[Message] = []
        self.flags: dict[int, bool] = {}  # 写明了 loss 或 weight 的消息

    def fail(self, field: str, what: str, remedy: str) -> None:
        self.errors += (RowError(field, what, remedy),)

    def text(self, field: str, value: Any) -> str:
        """value 应是能写成 UTF-8 的字符串；null 与 [] 等于没有，是空字符串。不是的记下错误，返回值不用。"""
        if type(value) is str:
            if self.has_escapes:
                self._check_characters(field, value)
            return value
        if value is not None and value != []:
            self.fail(field, f"应为字符串，实际是{_type_name(value)}", _remedy_of(value))
        return ""

    def _check_characters(self, field: str, value: str) -> None:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            what = f"第 {error.start + 1} 个字符是不成对的代理字符（\\u{ord(value[error.start]):04x}）"
            self.fail(field, what, "表情等字符被截断了，请补全或删去")

    def settle(self, kind: Format) -> None:
        """消息齐了：定下哪些是目标；预测时末尾的回答移作参考答案。"""
        if self.is_predict:
            if self.messages[-1][0] == "assistant":
                self.references = (self.messages.pop()[1],)
            return
        options = self.options
        if kind.task == PREFERENCE or options.task == "kto":  # 只比较最后一个回答
            self.trained = (*[False] * (len(self.messages) - 1), True)
            return
        if not self.flags and options.loss_turns == "all" and not options.train_on_prompt:
            return
        last = len(self.messages) - 1
        chosen = [
            options.loss_turns == "all" or index == last if role == "assistant" else options.train_on_prompt
            for index, (role, _) in enumerate(self.messages)
        ]
        for index, flag in self.flags.items():
            # loss_turns 之外的回答，写明 true 也不训练；写明 false 的总是不训练
            is_other_turn = self.messages[index][0] == "assistant" and index < last and options.loss_turns == "last"
            chosen[index] = flag and not is_other_turn
        self.trained = tuple(chosen)
        if not any(chosen):
            what = "没有一条要训练：要训练的回答都写了 loss: false 或 weight: 0"
            self.fail(self.field, what, "请删去这一行，或改正 loss、weight 与 --loss_turns")


def _is_absent(value: Any) -> bool:
    return value is None or value == "" or value == []


def _is_rows(value: Any) -> bool:
    """像是一份数据的各行。"""
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _recognise(fields: dict[str, Any], draft: _Draft) -> tuple[Format, tuple[str, ...]]:
    """这一行是哪种写法，与不认识的字段；别的写法的、认识而用不上的字段记为错误。"""
    # 不空的多半是真值，先看它：这里每一行都要走
    present = tuple([name for name, value in fields.items() if value or not _is_absent(value)])
    kind, foreign, unused, unknown = _sort_fields(present)
    if kind is None:
        kind = _sort_fields(tuple(fields))[0] or _INSTRUCTION
    if kind is _PROMPT_RESPONSE and "response" not in fields and "completion" in fields:
        kind = _PROMPT_COMPLETION  # 回答是空字符串，没有凭它认出来
    stage = draft.options.task
    if kind.task not in ((SUPERVISED,) if draft.is_predict else READS[stage]):
        readers = [name for name, kinds in READS.items() if kind.task in kinds and (name != "kto" or "label" in fields)]
        tasks = "、".join(f"--task {name}" for name in readers)
        what = f"这一行是{kind.refusal}，" + ("预测不读它" if draft.is_predict else f"--task {stage} 不读它")
        draft.fail(kind.marks[0], what, "请换成问答或对话的写法" if draft.is_predict else f"请换一个文件，或用 {tasks}")
        return kind, unknown
    if stage == "kto" and not draft.is_predict:
        if not isinstance(fields.get("label"), bool):
            seen = _type_name(fields["label"]) if "label" in fields else "没有"
            is_text = str(fields.get("label")).lower() in ("true", "false")
            remedy = "请去掉引号" if is_text else "请补上：这个回答好不好"
            draft.fail("label", f"--task kto 的每一行要有 true 或 false，实际是{seen}", remedy)
        unknown = tuple(name for name in unknown if name != "label")
    elif "label" in fields and isinstance(fields["label"], bool) and not draft.is_predict:
        unused = (*unused, "label")
    for name in unused:
        if name in ("tools", "functions") and isinstance(fields[name], str) and fields[name].strip() in ("[]", "{}"):
            continue
        what, remedy = "认识这个字段，但是用不上", f"去掉它也无妨时加 --ignore_fields {name}，否则请删去这一行"
        if name == "label":
            what, remedy = f"true/false 是 KTO 的标注，--task {stage} 不用它", f"请用 --task kto；{remedy}"
        elif name in _RENAMED:
            remedy = f"请改名为 {_RENAMED[name]}"
        draft.fail(name, what, remedy)
    for name in foreign:
        hint = ""
        if "history" in kind.fields:  # 一问一答的
            question, answer, *_ = kind.fields
            hint = _hint([name], _QUESTIONS, question, fields) or _hint([name], _ANSWERS, answer, fields)
        what = f"不属于 {kind.name} 的写法，不知道用哪个"
        draft.fail(name, what, f"请只保留一种写法{hint}，或加 --ignore_fields {name} 略去它")
    return kind, unknown


@lru_cache(maxsize=4096)
def _sort_fields(
    present: tuple[str, ...],
) -> tuple[Format | None, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """有内容的字段 → (写法, 属于别的写法的, 认识而用不上的, 不认识的)。"""
    names = set(present)
    kind = next((kind for kind in FORMATS if not names.isdisjoint(kind.marks)), None)
    used = kind.fields if kind is not None else ()
    foreign = tuple(name for name in present if name in _ALL_FIELDS and name not in used)
    unused = tuple(name for name in present if name in _UNUSED_IN_ROW)
    unknown = tuple(name for name in present if name not in _ALL_FIELDS and name not in _UNUSED_IN_ROW)
    return kind, foreign, unused, unknown


# ---- 一问一答 ----


def _read_instruction(fields: dict[str, Any], draft: _Draft) -> None:
    """instruction 与 input 相接（--input_separator）是用户的话，output 是回答。"""
    get = fields.get
    instruction = draft.text("instruction", get("instruction"))
    text = draft.text("input", get("input"))
    if not draft.errors and not instruction.strip() and not text.strip():
        if "instruction" in fields or "input" in fields:
            draft.fail("instruction", "instruction 与 input 都是空的", "至少填写一个")
        else:
            what = f"instruction 与 input 都没有，已有的字段：{_names(fields)}"
            nested = next((name for name, value in fields.items() if _is_rows(value)), None)
            remedy = f"至少填写一个{_hint(fields, _QUESTIONS, 'instruction', fields)}"
            draft.fail("instruction", what, f"请把 {nested} 里的列表写成整个文件" if nested else remedy)
    question = instruction + draft.options.input_separator + text if instruction and text else instruction + text
    _single_turn(fields, draft, question, "output")
    draft.document = text if text.strip() else instruction


def _read_pair(question_field: str, answer_field: str) -> Callable[[dict[str, Any], _Draft], None]:
    """question_field 是用户的话、answer_field 是回答的写法。"""

    def read(fields: dict[str, Any], draft: _Draft) -> None:
        question = draft.text(question_field, fields.get(question_field))
        if not draft.errors and not question.strip():
            is_missing = question_field not in fields
            what = f"缺少这个字段，已有的字段：{_names(fields)}" if is_missing else "用户的话是空的"
            draft.fail(question_field, what, "请填写内容，或删去这一行")
        _single_turn(fields, draft, question, answer_field)
        draft.document = question

    return read


def _single_turn(fields: dict[str, Any], draft: _Draft, question: str, answer_field: str) -> None:
    """system、history、问、答 → 消息。"""
    _add_system(fields, draft)
    if "history" in fields and not _is_absent(fields["history"]):
        _add_history(fields["history"], draft)
    draft.messages.append(("user", question))
    draft.field = answer_field
    answer = fields.get(answer_field)
    if type(answer) is str:
        draft.messages.append(("assistant", draft.text(answer_field, answer)))
    elif draft.is_predict:
        if isinstance(answer, list):
            draft.references = tuple(draft.text(f"{answer_field}[{i}]", text) for i, text in enumerate(answer))
            for index, text in enumerate(answer):
                if text is None or text == []:
                    draft.fail(f"{answer_field}[{index}]", f"应为字符串，实际是{_type_name(text)}", "请补上或删去")
        elif answer is not None:
            draft.text(answer_field, answer)
    elif answer_field not in fields:
        hint = _hint(fields, _ANSWERS, answer_field, fields)
        what = f"缺少这个字段，已有的字段：{_names(fields)}"
        draft.fail(answer_field, what, f'请补上{hint}；没有答案就写 ""（目标只有结束符）')
    else:
        remedy = "一行只训练一个回答，请合成一个字符串，或拆成几行" if isinstance(answer, list) and answer else None
        remedy = remedy or ('没有答案就写 ""' if _is_absent(answer) else _remedy_of(answer))
        draft.fail(answer_field, f"应为字符串，实际是{_type_name(answer)}", remedy)


def _add_system(fields: dict[str, Any], draft: _Draft) -> None:
    if "system" in fields:
        text = draft.text("system", fields["system"])
        if text:
            draft.messages.append(("system", text))


def _add_history(history: Any, draft: _Draft) -> None:
    """history：以往各轮的 [用户, 回答]。"""
    remedy = "请写成 [[用户的话, 回答], …]"
    if not isinstance(history, list):
        draft.fail("history", f"应为数组，实际是{_type_name(history)}", remedy)
        return
    for index, pair in enumerate(history):
        place = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            shown = f"{len(pair)} 项的数组" if isinstance(pair, list) else _type_name(pair)
            draft.fail(place, f"应为 [用户的话, 回答]，实际是{shown}", remedy)
            continue
        for number, (role, value) in enumerate(zip(("user", "assistant"), pair, strict=True)):
            text = draft.text(f"{place}[{number}]", value)
            if not isinstance(value, str) and not text and _is_absent(value):
                draft.fail(f"{place}[{number}]", f"应为字符串，实际是{_type_name(value)}", remedy)
            elif role == "user" and isinstance(value, str) and not value.strip():
                draft.fail(f"{place}[0]", "用户消息是空的", "请填写内容，或删去这一轮")
            draft.messages.append((role, text))


# ---- 对话 ----


def _read_turns(field: str) -> Callable[[dict[str, Any], _Draft], None]:
    """field 是消息的数组；每条写成 from/value、role/content，或一轮的 human/assistant。"""

    def read(fields: dict[str, Any], draft: _Draft) -> None:
        draft.field = field
        turns = fields[field]
        if not isinstance(turns, list) or not turns:
            what = f"应为非空的数组，实际是{'空数组' if turns == [] else _type_name(turns)}"
            draft.fail(field, what, '请写成 [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]')
            return
        _add_system(fields, draft)
        messages = draft.messages
        for index, turn in enumerate(turns):
            shape = _PLAIN_TURNS.get(tuple(turn)) if type(turn) is dict and not draft.has_escapes else None
            if shape is not None:  # 最常见的样子：只有角色与文字，都没有毛病
                role, text = turn[shape[0]], turn[shape[1]]
                role = _ROLES.get(role) if type(role) is str else None
                if role is not None and type(text) is str and (role != "user" or text.strip()):
                    messages.append((role, text))
                    continue
            _add_turn(field, index, turn, draft)
        if draft.errors:
            return
        if len(messages) > 1 and messages[0][0] == messages[1][0] == "system":
            draft.fail("system", f"{field} 里也有 system，不知道用哪个", "请只保留一处")
            return
        problem = _order_problem(tuple([role for role, _ in messages]), draft.is_predict)
        if problem is not None:
            index, *said = problem
            draft.fail(field if index is None else f"{field}[{index}]", *said)
            return
        draft.document = messages[0][1] if messages[0][0] == "user" else messages[1][1]

    return read


_TURN_SHAPES = (("role", "content"), ("from", "value"), ("human", "assistant"))
_PLAIN_TURNS = {keys: shape for shape in _TURN_SHAPES[:2] for keys in (shape, shape[::-1])}


@lru_cache(maxsize=4096)
def _sort_turn(present: tuple[str, ...]) -> tuple[tuple[str, str] | None, tuple[str, ...], tuple[str, ...]]:
    """一条消息里不是 null 的字段 → ((角色, 文字) 或 (human, assistant) 两个字段, 认识而多余的, 不认识的)。"""
    names = set(present)
    shape = next((shape for shape in _TURN_SHAPES if not names.isdisjoint(shape)), None)
    others = {name for other in _TURN_SHAPES if other != shape for name in other}
    known = tuple(name for name in present if name in _UNUSED_IN_TURN or name in others)
    used = {*(shape or ()), "loss", "weight", *known}
    return shape, known, tuple(name for name in present if name not in used)


def _add_turn(field: str, index: int, turn: Any, draft: _Draft) -> None:
    """读一条消息（或 human/assistant 的一轮），加进 draft；错误也加进去。"""
    if type(turn) is not dict:
        place = f"{field}[{index}]"
        draft.fail(place, f"应为对象，实际是{_type_name(turn)}", '请写成 {"role": …, "content": …}')
        return
    ignored = draft.options.ignore_fields
    shape, known, unknown = _sort_turn(
        tuple([name for name, value in turn.items() if value is not None and name not in ignored])
    )
    if unknown:
        draft.unused += tuple(
            f"{field}[].{name}"
            for name in unknown
            if not _is_absent(turn[name]) and f"{field}[].{name}" not in draft.unused
        )
    for name in known:
        if not _is_absent(turn[name]):
            remedy = f"去掉它也无妨时加 --ignore_fields {name}，否则请删去这一行"
            draft.fail(f"{field}[{index}].{name}", "认识这个字段，但是用不上", remedy)
    if shape is None:
        names = ("role", "content") if "role" in turn or "content" in turn else ("from", "value")
        missing = next((name for name in names if name not in turn), names[0])
        what = f"缺少这个字段，已有的字段：{_names(turn)}"
        draft.fail(f"{field}[{index}].{missing}", what, "消息写成 role/content 或 from/value")
        return
    role_field, text_field = shape
    flag = _loss_flag(field, index, turn, draft) if "loss" in turn or "weight" in turn else None
    if role_field == "human":
        _add_pair(field, index, turn, flag, draft)
        return
    for name in shape:
        if name not in turn or turn[name] is None:
            what = f"缺少这个字段，已有的字段：{_names(turn)}" if name not in turn else "是 null，没有内容"
            draft.fail(f"{field}[{index}].{name}", what, '请补上；没有内容就写 ""')
            return
    role = turn[role_field]
    if type(role) is not str or role not in _ROLES:
        shown = repr(role)[:40] if isinstance(role, str) else _type_name(role)
        what = f"工具的角色 {shown} 不能训练" if shown.strip("'") in _TOOL_ROLES else f"不认识的角色 {shown}"
        draft.fail(
            f"{field}[{index}].{role_field}", what, "可用 user、assistant、system（或 human、gpt）；请改写或删去这一行"
        )
        return
    text = turn[text_field]
    if type(text) is not str or draft.has_escapes:
        text = _turn_text(f"{field}[{index}].{text_field}", text, draft)
    role = _ROLES[role]
    if role == "user" and not text.strip() and not draft.errors:
        draft.fail(f"{field}[{index}]", "用户消息是空的", "请填写内容，或删去这一轮")
    if flag is not None:
        draft.flags[len(draft.messages)] = flag
    draft.messages.append((role, text))


def _add_pair(field: str, index: int, turn: dict[str, Any], flag: bool | None, draft: _Draft) -> None:
    """一轮 {"human": …, "assistant": …}；预测时最后一轮可以没有 assistant。"""
    for name, role in (("human", "user"), ("assistant", "assistant")):
        place = f"{field}[{index}].{name}"
        value = turn.get(name)
        if value is None:
            if name == "human" or not draft.is_predict:
                draft.fail(place, "没有这个字段或是 null", '请补上；没有内容就写 ""')
            continue
        text = draft.text(place, value)
        if value == []:
            draft.fail(place, "应为字符串，实际是数组", '请补上；没有内容就写 ""')
        elif role == "user" and isinstance(value, str) and not text.strip():
            draft.fail(place, "用户消息是空的", "请填写内容，或删去这一轮")
        if role == "assistant" and flag is not None:
            draft.flags[len(draft.messages)] = flag
        draft.messages.append((role, text))


def _loss_flag(field: str, index: int, turn: dict[str, Any], draft: _Draft) -> bool | None:
    """这条消息写明的 loss（true、false）或 weight（1、0）；没有写或是 null 时为 None。"""
    flags = []
    for name, is_valid, remedy in (
        ("loss", lambda value: type(value) is bool, "请写 true 或 false"),
        ("weight", lambda value: type(value) in (int, float) and value in (0, 1), "请写 0 或 1"),
    ):
        value = turn.get(name)
        if name in draft.options.ignore_fields or _is_absent(value):
            continue
        if not is_valid(value):
            shown = repr(value)[:40] if isinstance(value, (str, int, float)) else _type_name(value)
            draft.fail(f"{field}[{index}].{name}", f"取值 {shown} 不认识", remedy)
        else:
            flags.append(bool(value))
    if len(set(flags)) > 1:
        draft.fail(f"{field}[{index}].weight", "与同一条消息的 loss 相反", "请只保留一个")
    return flags[0] if flags else None


def _turn_text(place: str, value: Any, draft: _Draft) -> str:
    """一条消息的文字：字符串，或 [{"type": "text", "text": …}, …] 依次相接。"""
    if not isinstance(value, list) or not place.endswith(".content"):
        if value == []:
            draft.fail(place, "应为字符串，实际是数组", '没有内容就写 ""')
        return draft.text(place, value)
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else None
            what = f"只能是文字，实际是 {kind!r}" if isinstance(kind, str) else f"应为对象，实际是{_type_name(part)}"
            draft.fail(f"{place}[{index}]", what, '请写成 {"type": "text", "text": …}，图片等请删去')
            continue
        if not isinstance(part.get("text"), str):
            draft.fail(f"{place}[{index}].text", f"应为字符串，实际是{_type_name(part.get('text'))}", "请补上文字")
            continue
        texts.append(draft.text(f"{place}[{index}].text", part["text"]))
        extra = [name for name in part if name not in ("type", "text") and not _is_absent(part[name])]
        draft.unused += tuple(f"content[].{name}" for name in extra if f"content[].{name}" not in draft.unused)
    return "".join(texts)


@lru_cache(maxsize=4096)
def _order_problem(roles: tuple[str, ...], is_predict: bool) -> tuple[int | None, str, str] | None:
    """次序：system 只在最前，其后从用户开始一问一答；训练数据以回答结尾 → 第几条有错、问题、办法，没有则为 None。"""
    start = 1 if roles[0] == "system" else 0
    for index in range(start, len(roles)):
        expected = "assistant" if (index - start) % 2 else "user"
        if roles[index] != expected:
            what = f"这里应是 {expected}，实际是 {roles[index]}"
            return index, what, "system 只能在最前，其后用户与回答要交替，请合并或删去"
    if roles[-1] == "system":
        return None, "只有 system，没有用户消息", "请补上用户消息"
    if roles[-1] == "user" and not is_predict:
        return None, "最后一条是用户消息，没有可学的回答", "请补上回答，或删去最后一条"
    return None


# ---- 文档与偏好对 ----


def _read_text(fields: dict[str, Any], draft: _Draft) -> None:
    """一篇文档：只有一条消息，每个 token 都是目标。"""
    draft.field, text = "text", draft.text("text", fields.get("text"))
    if not draft.errors and not text.strip():
        draft.fail("text", "没有文字", "请填写内容，或删去这一行")
    draft.messages.append(("assistant", text))
    draft.document = text


def _read_preference(fields: dict[str, Any], draft: _Draft) -> None:
    """提示是余下的字段，写法同别的行；chosen 作它的回答，rejected 另存。

    没有别的提示时，chosen 与 rejected 都是整段对话，只有最后一条不同。
    """
    values = {name: fields.get(name) for name in _PREFERENCE}
    prompt = {name: value for name, value in fields.items() if name not in _PREFERENCE}
    kind = _sort_fields(tuple(name for name, value in prompt.items() if not _is_absent(value)))[0]
    if kind is None and all(isinstance(value, list) and len(value) > 1 for value in values.values()):
        if values["chosen"][:-1] != values["rejected"][:-1]:
            draft.fail("rejected", "与 chosen 的提示不同", "两段对话只能有最后一条不同")
            return
        kind, prompt["messages"] = _MESSAGES, values["chosen"][:-1]
        values = {name: value[-1:] for name, value in values.items()}
    if kind is None:
        what = f"只有两个回答，没有提示，已有的字段：{_names(fields)}"
        draft.fail("chosen", what, "请把提示写在 instruction、prompt、messages 之类的字段里")
        return
    chosen, draft.rejected = (_preferred(name, value, draft) for name, value in values.items())
    if kind.read is _READ_PROMPT and isinstance(prompt["prompt"], list):
        kind, prompt = _MESSAGES, {**prompt, "messages": prompt["prompt"]}
    if draft.errors:
        return
    if "history" in kind.fields:  # 一问一答的
        answer = kind.fields[1]
        kind.read({**prompt, answer: chosen}, draft)
    else:
        turns = prompt[kind.fields[0]]
        turns = [*turns, {"role": "assistant", "content": chosen}] if isinstance(turns, list) else turns
        kind.read({**prompt, kind.fields[0]: turns}, draft)
    draft.field = "chosen"
    if not draft.errors and chosen == draft.rejected:
        draft.fail("rejected", "与 chosen 相同，没有可学的偏好", "请改正，或删去这一行")


def _preferred(field: str, value: Any, draft: _Draft) -> str:
    """一个回答：文字，或一条消息（单独的，或只有它的数组）。"""
    if isinstance(value, list) and len(value) == 1:
        [value] = value
    if isinstance(value, dict):
        role_field, name = next((shape for shape in _TURN_SHAPES[:2] if shape[1] in value), ("", ""))
        if not name:
            draft.fail(
                field, f"缺少 content 或 value，已有的字段：{_names(value)}", "消息写成 role/content 或 from/value"
            )
            return ""
        role = value.get(role_field, "assistant")
        if type(role) is not str or _ROLES.get(role) != "assistant":
            shown = repr(role)[:40] if isinstance(role, str) else _type_name(role)
            draft.fail(
                f"{field}.{role_field}",
                f"应是模型的消息，实际是 {shown}",
                "请改为 assistant（或 gpt），或换成模型的回答",
            )
            return ""
        field, value = f"{field}.{name}", value[name]
    if value is None:
        draft.fail(field, "没有这个字段或是 null", "请补上这个回答")
        return ""
    if type(value) is not str:
        draft.fail(field, f"应为字符串，实际是{_type_name(value)}", _remedy_of(value))
        return ""
    return draft.text(field, value)


def _talk(field: str) -> Format:
    return Format(field, (field,), (field, "system"), _read_turns(field))


def _pair(question: str, answer: str, mark: str) -> Format:
    fields = (question, answer, "system", "history")
    return Format(f"{question}/{answer}", (mark,), fields, _read_pair(question, answer))


_INSTRUCTION = Format(
    "instruction/input/output",
    ("instruction", "input", "output"),
    ("instruction", "output", "input", "system", "history"),
    _read_instruction,
)
_PROMPT_COMPLETION = _pair("prompt", "completion", mark="completion")
_PROMPT_RESPONSE = _pair("prompt", "response", mark="prompt")
_READ_PROMPT = _PROMPT_RESPONSE.read
_MESSAGES = _talk("messages")
_PREFERENCE = ("chosen", "rejected")
_PROMPTS = ("conversations", "messages", "conversation", "query", "prompt", "instruction", "input", "system", "history")
FORMATS = (
    Format(
        "chosen/rejected",
        _PREFERENCE,
        (*_PREFERENCE, *_PROMPTS),
        _read_preference,
        PREFERENCE,
        "偏好对（chosen、rejected）",
    ),
    _talk("conversations"),
    _MESSAGES,
    _talk("conversation"),
    _pair("query", "response", mark="query"),
    _PROMPT_COMPLETION,
    _PROMPT_RESPONSE,
    _INSTRUCTION,
    Format("text", ("text",), ("text",), _read_text, TEXT, "纯文本（text）"),
)
_ALL_FIELDS = frozenset(name for kind in FORMATS for name in kind.fields)


# ---- JSON ----


def _refuse_constant(name: str) -> None:
    raise RowError("JSON", f"{name} 不是合法的 JSON 值", "没有内容请写 null，有内容请写成字符串")


def _parse_int(digits: str) -> int:
    if len(digits) > 400:
        raise RowError("JSON", f"整数有 {len(digits)} 位", "请改成字符串或正常大小的数字")
    return int(digits)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RowError(repeated[:40], "同一个对象里这个字段出现了两次", "请只保留一个")
    return fields


_HOOKS = {"parse_int": _parse_int, "parse_constant": _refuse_constant}
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, **_HOOKS)
_SCAN = json.JSONDecoder(**_HOOKS).scan_once


def _decode_row(content: bytes) -> tuple[dict[str, Any], bool]:
    r"""一行 → (字段, 有没有 \u 的转义)。

    多数的行走快的一路：没有钩子，看不见重复的字段，但冒号与字段一样多时不会有重复的。
    """
    try:
        text = content.rstrip().decode()
        fields, end = _SCAN(text, 0)
    except (ValueError, StopIteration, RecursionError):
        return _decode_slowly(content), True
    if end != len(text) or type(fields) is not dict or text.count(":") != _count_keys(fields):
        return _decode_slowly(content), "\\u" in text
    return fields, "\\" in text and "\\u" in text


def _count_keys(fields: dict[str, Any]) -> int:
    """一行与它的各条消息的字段数；更深处的不数。"""
    count = len(fields)
    for value in fields.values():
        if type(value) is list:
            for item in value:
                if type(item) is dict:
                    count += len(item)
    return count


def _decode_slowly(content: bytes) -> dict[str, Any]:
    try:
        text = content.rstrip().decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"第 {error.start + 1} 个字节（0x{content[error.start]:02x}）起不是合法的 UTF-8"
        raise RowError("编码", what, "请把文件转成 UTF-8（常见的原因是 GBK 编码）") from error
    if "\0" in text:
        raise RowError("编码", f"第 {text.index(chr(0)) + 1} 个字符是 NUL（\\x00）", "文件可能已损坏，请重新导出")
    try:
        fields = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        what = f"不是合法的 JSON（第 {error.colno} 列：{error.msg}）"
        remedy = "请改正语法；一行要有一个完整的 JSON 对象"
        raise RowError("JSON", what, remedy, error.lineno - 1) from error
    except RecursionError as error:
        raise RowError("JSON", "括号嵌套太深", "样本只需要一两层，请检查这一行是怎样生成的") from error
    if not isinstance(fields, dict):
        raise RowError("行", f"应为 JSON 对象 {{…}}，实际是{_type_name(fields)}", '请写成 {"instruction": …} 的形式')
    return fields


# ---- 说法 ----


def _type_name(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def _remedy_of(value: Any) -> str:
    """该是字符串的地方不是字符串时的办法；数组与对象加上引号会训练它们的源文，所以不那样说。"""
    if isinstance(value, (list, dict)):
        return "请写成要训练的那一段文字"
    return '请加上引号，没有内容就写 ""'


def _names(fields: dict[str, Any]) -> str:
    names = "、".join(str(name)[:20] for name in list(fields)[:8])
    return (names + ("……" if len(fields) > 8 else "")) or "无"


def _hint(names: Iterable[str], aliases: frozenset[str], meant: str, fields: dict[str, Any]) -> str:
    """names 里有 meant 的别名而没有 meant 时，「（像是该把 x 改名为 y）」。"""
    found = next((name for name in names if name in aliases), None) if meant not in fields else None
    return f"（像是该把 {found} 改名为 {meant}）" if found else ""
