"""各种写法：60 种行的判定，哪些回答训练，没有一个认识的字段悄悄丢掉，docs/data.md 的表。"""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from recorded_tokenizer import RecordedTokenizer

from finetune.data.prompting import IGNORE_INDEX, encode_sample
from finetune.data.rows import RawRow
from finetune.data.samples import FORMATS, RowOptions, Sample, parse_row, row_options

DOCUMENT = ROOT / "docs" / "data.md"
BEGIN, END = "<!-- 各写法的例子：由 tests/data/test_formats.py --write 写成 -->", "<!-- 例子到此 -->"
NO = IGNORE_INDEX


def parse(row, split: str = "train", **options) -> tuple[Sample | None, list[str]]:
    """一行 → (样本, 错误的「行: 字段」)。"""
    content = row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()
    sample, problems = parse_row(RawRow(7, content), "f", split, RowOptions(**options))
    return sample, [f"{problem.line}: {problem.field}" for problem in problems]


def talk(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": text} for role, text in turns]


U, A, S = "user", "assistant", "system"
ONE = ((U, "问"), (A, "答"))
WITH_SYSTEM = ((S, "规"), *ONE)
WITH_HISTORY = ((U, "前"), (A, "先"), *ONE)
FROM = [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]
ROLE = talk(*ONE)

# (行, 判定)：消息是读了；字符串是 第 7 行的这个字段 的错误；["a"] 是读了 ONE，字段 a 计为没有用上
VERDICTS = [
    # instruction/input/output
    ({"instruction": "问", "output": "答"}, ONE),
    ({"instruction": "问", "input": "", "output": "答"}, ONE),
    ({"instruction": None, "input": "问", "output": "答"}, ONE),
    ({"instruction": [], "input": "问", "output": "答"}, ONE),
    ({"instruction": "问", "output": ""}, ((U, "问"), (A, ""))),
    ({"instruction": "问", "output": None}, "output"),
    ({"instruction": "问", "output": []}, "output"),
    ({"instruction": "问"}, "output"),
    ({"instruction": "问", "output": 3}, "output"),
    ({"instruction": "问", "output": ["答"]}, "output"),
    ({"instruction": {"a": "问"}, "output": "答"}, "instruction"),
    ({"instruction": " ", "input": None, "output": "答"}, "instruction"),
    ({"system": "规", "instruction": "问", "output": "答"}, WITH_SYSTEM),
    ({"system": 1, "instruction": "问", "output": "答"}, "system"),
    ({"instruction": "问", "output": "答", "history": [["前", "先"]]}, WITH_HISTORY),
    ({"instruction": "问", "output": "答", "history": None}, ONE),
    ({"instruction": "问", "output": "答", "history": "前"}, "history"),
    ({"instruction": "问", "output": "答", "history": [["前"]]}, "history[0]"),
    ({"instruction": "问", "output": "答", "history": [["前", None]]}, "history[0][1]"),
    ({"instruction": "问", "output": "答", "history": [["", "先"]]}, "history[0][0]"),
    ({"instruction": "问", "output": "答", "response": "答"}, "response"),
    ({"instruction": "问", "output": "答", "text": "全文"}, "text"),
    ({"instruction": "问", "output": "答", "label": False}, "label"),
    ({"instruction": "问", "output": "答", "label": "好"}, ["label"]),
    ({"instruction": "问", "output": "答", "id": 3, "source": "x"}, ["id", "source"]),
    # conversations
    ({"conversations": FROM}, ONE),
    ({"conversations": ROLE}, ONE),
    ({"conversations": FROM, "system": "规", "tools": "[]"}, WITH_SYSTEM),
    ({"conversations": FROM, "tools": "[{}]"}, "tools"),
    ({"conversations": FROM, "images": ["a.png"]}, "images"),
    ({"conversations": FROM, "instruction": None, "output": ""}, ONE),
    ({"conversations": FROM, "output": "答"}, "output"),
    ({"conversations": None, "instruction": "问", "output": "答"}, ONE),
    ({"conversations": []}, "conversations"),
    ({"conversations": "问"}, "conversations"),
    ({"conversations": [FROM[0], 3]}, "conversations[1]"),
    ({"conversations": [FROM[0], {"from": "gpt"}]}, "conversations[1].value"),
    ({"conversations": [FROM[0], {"from": "gpt", "value": None}]}, "conversations[1].value"),
    ({"conversations": [FROM[0], {"from": "gpt", "value": 5}]}, "conversations[1].value"),
    ({"conversations": [FROM[0], {"from": "bing", "value": "答"}]}, ONE),
    ({"conversations": [FROM[0], {"from": "observation", "value": "答"}]}, "conversations[1].from"),
    ({"conversations": FROM[::-1]}, "conversations[0]"),
    ({"conversations": FROM[:1]}, "conversations"),
    ({"conversations": [{"from": "system", "value": "规"}, *FROM], "system": "规"}, "system"),
    ({"conversations": [{**FROM[0], "content": "别的"}, FROM[1]]}, "conversations[0].value"),
    ({"conversations": [{**FROM[0], "markdown": "x"}, FROM[1]]}, ["conversations[].markdown"]),
    ({"conversations": [FROM[0], {**FROM[1], "loss": 0.5}]}, "conversations[1].loss"),
    ({"conversations": [FROM[0], {**FROM[1], "loss": False}]}, "conversations"),
    # messages
    ({"messages": ROLE}, ONE),
    ({"messages": talk((S, "规"), *ONE)}, WITH_SYSTEM),
    ({"messages": [{"role": U, "content": [{"type": "text", "text": "问"}]}, ROLE[1]]}, ONE),
    ({"messages": [{"role": U, "content": [{"type": "image_url"}]}, ROLE[1]]}, "messages[0].content[0]"),
    ({"messages": [ROLE[0], {**ROLE[1], "tool_calls": [{}]}]}, "messages[1].tool_calls"),
    ({"messages": [ROLE[0], {**ROLE[1], "weight": 2}]}, "messages[1].weight"),
    ({"messages": [ROLE[0], {"role": "tool", "content": "答"}]}, "messages[1].role"),
    ({"messages": ROLE, "functions": [{}]}, "functions"),
    # conversation
    ({"conversation": [{"human": "前", "assistant": "先"}, {"human": "问", "assistant": "答"}]}, WITH_HISTORY),
    ({"conversation": [{"human": "问", "assistant": "答"}], "category": "x"}, ["category"]),
    ({"conversation": [{"human": "问"}]}, "conversation[0].assistant"),
    # query、prompt
    ({"query": "问", "response": "答", "history": [["前", "先"]]}, WITH_HISTORY),
    ({"query": "问", "response": "答", "system": "规"}, WITH_SYSTEM),
    ({"query": "问"}, "response"),
    ({"prompt": "问", "response": "答"}, ONE),
    ({"prompt": "问", "completion": "答"}, ONE),
    ({"prompt": "问", "completion": ""}, ((U, "问"), (A, ""))),
    ({"prompt": [{"role": U}], "completion": "答"}, "prompt"),
    ({"prompt": "问", "response": "答", "completion": "答"}, "response"),
    # 别的阶段的，与认不出的
    ({"text": "全文"}, ((A, "全文"),)),
    ({"prompt": "问", "chosen": "好", "rejected": "坏"}, "chosen"),
    ({"question": "问", "answer": "答"}, "instruction"),
    (b'{"instruction": "\xe9\x97\xae", "instruction" : "x", "output": ""}', "instruction"),
    (b'{"messages": [{"role": "user", "role": "user", "content": "a"}]}', "role"),
]


@pytest.mark.parametrize(("row", "verdict"), VERDICTS, ids=[str(row)[:60] for row, _ in VERDICTS])
def test_each_shape_is_read_refused_or_counted(row, verdict):
    sample, problems = parse(row)
    if isinstance(verdict, str):
        assert sample is None
        assert f"7: {verdict}" in problems
    elif isinstance(verdict, list):
        assert (sample.messages, list(sample.unused), problems) == (ONE, verdict, [])
    else:
        assert (sample.messages, sample.unused, problems) == (verdict, (), [])


def test_renaming_is_suggested():
    for row, hint in [
        ({"input": "问", "target": "答"}, "target 改名为 output"),
        ({"question": "问", "answer": "答"}, "question 改名为 instruction"),
        ({"query": "问", "output": "答"}, "output 改名为 response"),
        ({"instruction": "问", "response": "答"}, "response 改名为 output"),
    ]:
        _, problems = parse_row(RawRow(1, json.dumps(row).encode()), "f")
        assert any(hint in problem.remedy for problem in problems), row


@pytest.mark.parametrize("name", ["tools", "label", "tool_calls", "response"])
def test_ignored_fields_are_as_if_absent(name):
    row = {"messages": [ROLE[0], {**ROLE[1], "tool_calls": [{}]}], "tools": [{}], "label": True, "response": "x"}
    others = [other for other in ("tools", "label", "tool_calls", "response") if other != name]
    sample, _ = parse(row, ignore_fields=(*others, name))
    assert sample.messages == ONE
    sample, problems = parse(row, ignore_fields=tuple(others))
    assert sample is None
    assert len(problems) == 1
    assert problems[0].endswith(name)


def test_instruction_and_input_are_joined_with_the_separator():
    options = row_options({"input_separator": "\n", "ignore_fields": "tools, images"})
    assert options == RowOptions("\n", ("tools", "images"))
    assert row_options({}) == RowOptions()
    for row, text in [
        ({"instruction": "甲", "input": "乙", "output": ""}, "甲\n乙"),
        ({"instruction": "甲", "input": None, "output": ""}, "甲"),
        ({"input": "乙", "output": ""}, "乙"),
    ]:
        sample, _ = parse(row, **options._asdict())
        assert sample.messages[0] == (U, text)


# ---- 哪些是目标 ----

THREE = [(U, "一"), (A, "二"), (U, "三"), (A, "四"), (U, "你好"), (A, "你好！")]


def flagged(**flags) -> dict:
    """THREE，各条消息再加上 flags：m1={"loss": False}。"""
    rows = [{**turn, **flags.get(f"m{i}", {})} for i, turn in enumerate(talk(*THREE))]
    return {"messages": rows}


@pytest.mark.parametrize(
    ("row", "options", "trained"),
    [
        (flagged(), {}, None),
        (flagged(m1={"loss": False}), {}, (0, 0, 0, 1, 0, 1)),
        (flagged(m1={"weight": 0}, m3={"weight": 1}), {}, (0, 0, 0, 1, 0, 1)),
        (flagged(m1={"loss": None}), {}, None),
        (flagged(m0={"loss": True}), {}, (1, 1, 0, 1, 0, 1)),
        (flagged(), {"loss_turns": "last"}, (0, 0, 0, 0, 0, 1)),
        (flagged(m3={"loss": True}), {"loss_turns": "last"}, (0, 0, 0, 0, 0, 1)),
        (flagged(), {"train_on_prompt": True}, (1, 1, 1, 1, 1, 1)),
        (flagged(), {"train_on_prompt": True, "loss_turns": "last"}, (1, 0, 1, 0, 1, 1)),
        (flagged(m3={"loss": True}), {"train_on_prompt": True, "loss_turns": "last"}, (1, 0, 1, 0, 1, 1)),
        (flagged(m2={"loss": False}, m3={"weight": 0}), {"train_on_prompt": True}, (1, 1, 0, 0, 1, 1)),
    ],
)
def test_flags_and_options_choose_the_targets(row, options, trained):
    sample, problems = parse(row, **options)
    assert problems == []
    assert sample.trained == (None if trained is None else tuple(map(bool, trained)))


def test_a_pair_and_history_take_their_flags():
    pairs = {"conversation": [{"human": "一", "assistant": "二", "loss": False}, {"human": "三", "assistant": "四"}]}
    assert parse(pairs)[0].trained == (False, False, False, True)
    row = {"query": "三", "response": "四", "history": [["一", "二"]]}
    assert parse(row)[0].trained is None
    assert parse(row, loss_turns="last")[0].trained == (False, False, False, True)
    assert parse({**pairs, "loss": 1})[0].unused == ("loss",)


def labels_of(row, prompt_format: str, **options) -> tuple[list[int], list[int]]:
    sample, problems = parse(row, **options)
    assert problems == []
    item = encode_sample(sample, RecordedTokenizer(), prompt_format, 64, 63)
    return item.input_ids, item.labels


def test_an_untrained_turn_has_no_eos_label():
    # 一 92342 二 92565 三 92514 四 92721 你好 16829 ！ 67
    ids, labels = labels_of(flagged(m1={"loss": False}), "chat")
    assert ids == [195, 92342, 196, 92565, 195, 92514, 196, 92721, 195, 16829, 196, 16829, 67, 2]
    assert labels == [2, NO, NO, NO, NO, NO, NO, 92721, 2, NO, NO, 16829, 67, 2]
    ids, labels = labels_of(flagged(m1={"loss": False}), "plain")
    assert ids == [92342, 92565, 2, 92514, 92721, 2, 16829, 16829, 67, 2]
    assert labels == [NO, NO, NO, NO, 92721, 2, NO, 16829, 67, 2]
    ids, labels = labels_of(flagged(m5={"loss": False}), "chat")
    assert labels == [2, NO, NO, 92565, 2, NO, NO, 92721, 2, NO, NO, NO, NO, NO]


def test_train_on_prompt_trains_each_message_and_its_end():
    row = {"messages": [{"role": S, "content": "一"}, *talk((U, "二"), (A, "三"), (U, "四"), (A, "五"))]}
    ids, labels = labels_of(row, "chat", train_on_prompt=True)
    assert ids == [92342, 195, 92565, 196, 92514, 195, 92721, 196, 92791, 2]
    assert labels == [92342, 195, 92565, 196, 92514, 2, 92721, 196, 92791, 2]
    ids, labels = labels_of(row, "plain", train_on_prompt=True)
    assert ids == labels == [92342, 92565, 92514, 2, 92721, 92791, 2]


# ---- 性质：没有一个认识的字段悄悄丢掉 ----

KNOWN = sorted({name for kind in FORMATS for name in kind.fields} - {"conversations", "messages", "conversation"})
EXTRA = ["tools", "images", "functions", "system_prompt", "label", "id", "source", "loss", "tool_calls", "name"]


class CharTokenizer:
    """一个字一个 id，可以原样解码。"""

    eos_token_id = 2

    def encode_plain(self, text: str) -> list[int]:
        return [ord(char) + 1000 for char in text]

    def encode_user_text(self, text: str) -> tuple[list[int], bool]:
        return self.encode_plain(text), False

    def decode(self, ids) -> str:
        return "".join(chr(index - 1000) for index in ids if index >= 1000)


@st.composite
def marked_rows(draw):
    """随意混合各种写法的一行；每个字符串都有自己的记号 §n§。"""
    count = 0

    def text():
        nonlocal count
        count += 1
        return f"§{count}§"

    def value(depth=0):
        kind = draw(st.integers(0, 9))
        if kind == 0:
            return draw(st.sampled_from([None, "", [], True, 0, 1.5]))
        if kind == 1 and depth < 2:
            return [value(depth + 1) for _ in range(draw(st.integers(0, 2)))]
        if kind == 2 and depth < 2:
            return {draw(st.sampled_from(["type", "text", "role"])): value(depth + 1)}
        return text()

    def turns():
        roles = draw(st.sampled_from([("role", "content"), ("from", "value"), ("human", "assistant")]))
        rows = []
        for index in range(draw(st.integers(1, 4))):
            names = ["user", "assistant"] if roles[0] == "role" else ["human", "gpt"]
            first = text() if roles[0] == "human" else names[index % 2]
            turn = {roles[0]: first, roles[1]: text()}
            if roles[0] == "role" and draw(st.booleans()):
                turn["content"] = [{"type": "text", "text": text()}, {"type": "text", "text": text()}]
            if draw(st.integers(0, 3)) == 0:
                turn[draw(st.sampled_from([*EXTRA, "value", "content", "weight"]))] = value()
            rows.append(turn)
        return rows

    row = {}
    for name in draw(st.sampled_from([kind.fields for kind in FORMATS])):
        if name in ("conversations", "messages", "conversation"):
            row[name] = turns()
        elif name == "history":
            row[name] = [[text(), text()] for _ in range(draw(st.integers(0, 2)))]
        elif name not in ("system", "input") or draw(st.booleans()):
            row[name] = text()
    for name in draw(st.lists(st.sampled_from([*KNOWN, *EXTRA]), max_size=2)):
        row[name] = value()
    return row


def strings(value, field: str):
    """(记号, 最外层的字段)。"""
    if isinstance(value, str) and value.startswith("§"):
        yield value, field
    elif isinstance(value, (list, dict)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from strings(item, f"{field}.{name}")


@settings(max_examples=300, deadline=None)
@given(row=marked_rows(), prompt_format=st.sampled_from(["plain", "chat"]))
def test_every_string_is_trained_on_refused_or_counted(row, prompt_format):
    sample, problems = parse(row)
    if sample is None:
        assert problems
        return
    item = encode_sample(sample, CharTokenizer(), prompt_format, 4096, 4000)
    assert not item.src_truncated
    assert not item.tgt_truncated
    decoded = CharTokenizer().decode(item.input_ids)
    for name, value in row.items():
        for text, place in strings(value, name):
            counted = [unused.rpartition("[].")[2] for unused in sample.unused]
            assert text in decoded or any(part in counted for part in place.split(".")), (text, place, row)


# ---- docs/data.md ----

EXAMPLES = [
    {"instruction": "你好", "input": "", "output": "你好！"},
    {"system": "你是一个有用的助手。", "instruction": "介绍一下你自己", "output": "一"},
    {"instruction": "What is 1+1?", "output": "1+1=2。", "history": [["你好", "你好！"]]},
    {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}]},
    {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！", "loss": True}]},
    {"conversation": [{"human": "你好", "assistant": "你好！"}, {"human": "What is 1+1?", "assistant": "1+1=2。"}]},
    {"query": "你好", "response": "你好！"},
    {"prompt": "你好", "response": "你好！"},
    {"prompt": "你好", "completion": "你好！"},
]


def written_section() -> str:
    """docs/data.md 里各写法的例子。"""
    parts = []
    for row in EXAMPLES:
        sample, problems = parse(row)
        assert problems == []
        lines = [f"**{sample.format}**", "", "```", json.dumps(row, ensure_ascii=False)]
        for prompt_format in ("plain", "chat"):
            ids, labels = labels_of(row, prompt_format)
            cells = [(str(a), str(b)) for a, b in zip(ids, labels, strict=True)]
            widths = [max(map(len, pair)) for pair in cells]
            for name, row_index in (("input_ids", 0), ("labels", 1)):
                numbers = " ".join(pair[row_index].ljust(width) for pair, width in zip(cells, widths, strict=True))
                lines.append(f"{prompt_format:5} {name:9} {numbers}".rstrip())
        parts.append("\n".join([*lines, "```"]))
    return "\n\n".join([BEGIN, *parts, END])


def test_examples_cover_every_format_that_is_read():
    assert {parse(row)[0].format for row in EXAMPLES} == {kind.name for kind in FORMATS if kind.task == "supervised"}


@pytest.mark.parametrize("row", EXAMPLES, ids=lambda row: "、".join(row))
@pytest.mark.parametrize("prompt_format", ["plain", "chat"])
def test_an_example_equals_the_same_conversation_in_our_own_format(row, prompt_format):
    sample, _ = parse(row)
    assert labels_of(row, prompt_format) == labels_of({"conversations": talk(*sample.messages)}, prompt_format)


def test_the_examples_in_the_document_are_those_of_the_code():
    text = DOCUMENT.read_text(encoding="utf-8")
    found = text[text.index(BEGIN) : text.index(END) + len(END)]
    assert found == written_section(), f"请运行 python {Path(__file__).relative_to(ROOT)} --write"


if __name__ == "__main__" and "--write" in sys.argv:
    content = DOCUMENT.read_text(encoding="utf-8")
    start, stop = content.index(BEGIN), content.index(END) + len(END)
    DOCUMENT.write_text(content[:start] + written_section() + content[stop:], encoding="utf-8")
