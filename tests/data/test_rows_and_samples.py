"""data_check：两种文件、两种样本写法，以及每一种坏行的报错。"""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.data import rows as rows_module
from finetune.data.samples import Sample, read_samples

ROW = {"instruction": "抽取：", "input": "水温高", "output": "水温_故障_高"}
FIXED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def write(tmp_path):
    """write(内容) -> 路径；内容是字节、字符串，或逐行写成 JSON 的列表。"""

    def make(content, name: str = "rows.json") -> Path:
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def messages_of(path: Path, split: str = "train") -> list:
    return [sample.messages for sample in read_samples(path, split)]


def talk(*turns: tuple[str, str]) -> dict:
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


# ---- 好的文件 ----


def test_json_lines_rows_become_user_and_assistant_messages(write):
    path = write(
        [ROW, {"instruction": "", "input": "只有输入", "output": ""}, {"instruction": "只有指令", "output": "x"}]
    )
    kind = {"format": "instruction/input/output"}
    assert read_samples(path) == [
        Sample((("user", "抽取：水温高"), ("assistant", "水温_故障_高")), 1, str(path), document="水温高", **kind),
        Sample((("user", "只有输入"), ("assistant", "")), 2, str(path), document="只有输入", **kind),
        Sample((("user", "只有指令"), ("assistant", "x")), 3, str(path), document="只有指令", **kind),
    ]
    assert read_samples(path)[2].place == f"{path}:3"


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_gives_the_same_samples_with_line_numbers(write, indent):
    rows = [ROW, {**ROW, "input": '引号"与\\反斜杠、[方]{花}括号，'}, ROW]
    text = json.dumps(rows, ensure_ascii=False, indent=indent)
    samples = read_samples(write(text, "array.json"))
    assert [sample.messages for sample in samples] == messages_of(write(rows))
    assert [sample.line for sample in samples] == ([1, 1, 1] if indent is None else [2, 7, 12])


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\n",
        json.dumps(ROW).encode() + b"\r\n\r\n",
        b"\n  \n" + json.dumps(ROW).encode(),
        b"\xef\xbb\xbf \r\n[" + json.dumps(ROW).encode() + b"]\r\n",
    ],
    ids=["BOM", "CRLF", "空行与没有换行的末行", "BOM 与数组"],
)
def test_harmless_variations_of_a_file_are_read(write, content):
    assert messages_of(write(content)) == [(("user", "抽取：水温高"), ("assistant", "水温_故障_高"))]


def test_line_numbers_count_blank_lines(write):
    row = json.dumps(ROW)
    assert [sample.line for sample in read_samples(write(f"{row}\n\n\n{row}\n"))] == [1, 4]


def test_both_ways_to_write_conversations_are_equal(write):
    path = write(
        [
            talk(("system", "你是助手"), ("human", "你好"), ("gpt", "你好！"), ("human", "再见"), ("gpt", "")),
            {
                "id": 7,
                "conversations": [
                    {"role": role, "content": text}
                    for role, text in [
                        ("system", "你是助手"),
                        ("user", "你好"),
                        ("assistant", "你好！"),
                        ("user", "再见"),
                        ("assistant", ""),
                    ]
                ],
            },
        ]
    )
    first, second = messages_of(path)
    assert first == second
    assert first == (
        ("system", "你是助手"),
        ("user", "你好"),
        ("assistant", "你好！"),
        ("user", "再见"),
        ("assistant", ""),
    )


@pytest.mark.parametrize(
    ("row", "num_messages", "references"),
    [
        ({"instruction": "问", "input": "题"}, 1, None),
        ({"instruction": "问", "output": None}, 1, None),
        ({"instruction": "问", "output": ""}, 1, ("",)),
        ({"instruction": "问", "output": "答"}, 1, ("答",)),
        ({"instruction": "问", "output": ["答一", "答二"]}, 1, ("答一", "答二")),
        (talk(("human", "甲"), ("gpt", "乙"), ("human", "丙")), 3, None),
        (talk(("human", "甲"), ("gpt", "乙")), 1, ("乙",)),
    ],
)
def test_prediction_files_may_lack_answers_and_keep_their_fields(write, row, num_messages, references):
    row = {**row, "id": "r-1"}
    (sample,) = read_samples(write([row]), "predict")
    assert (len(sample.messages), sample.messages[-1][0]) == (num_messages, "user")
    assert (sample.references, sample.raw) == (references, row)


# ---- 坏行 ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"instruction": "问"}', r"rows.json:1: output: 缺少这个字段，已有的字段：instruction: 请补上"),
        ('{"instruction": "问", "output": null}', r":1: output: 应为字符串，实际是null: "),
        ('{"instruction": "问", "output": ["答"]}', r":1: output: 应为字符串，实际是数组: "),
        (
            '{"instruction": 3, "input": {}, "output": ""}',
            r":1: instruction: 应为字符串，实际是数字[^\n]*\n.*:1: input: .*对象",
        ),
        ('{"instruction": "", "input": " ", "output": "答"}', r":1: instruction: instruction 与 input 都是空的: "),
        ('{"question": "问", "output": "答"}', r"instruction 与 input 都没有，已有的字段：question、output: "),
        ('{"instruction": "问", "output": "\\ud83d"}', r":1: output: 第 1 个字符是不成对的代理字符（\\ud83d）"),
        ('{"output": "a", "instruction": "问", "output": "b"}', r":1: output: 同一个对象里这个字段出现了两次: "),
        ('{"instruction": "问", "output": "答"', r":1: JSON: 不是合法的 JSON（第 \d+ 列：Expecting ',' delimiter）: "),
        ("{'instruction': '问'}", r":1: JSON: 不是合法的 JSON（第 2 列：Expecting property name"),
        ('{"instruction": "问", "output": "答"} {}', r":1: JSON: 不是合法的 JSON（第 \d+ 列：Extra data）"),
        ('"一句话"', r":1: 行: 应为 JSON 对象 {…}，实际是字符串: "),
        ('{"instruction": "问", "output": "答", "score": NaN}', r":1: JSON: NaN 不是合法的 JSON 值: "),
        (f'{{"instruction": "问", "output": "", "n": {"9" * 5000}}}', r":1: JSON: 整数有 5000 位: "),
        ('{"n": ' + "[" * 200_000, r":1: JSON: 括号嵌套太深: "),
        (
            '{"instruction": "故障", "output": ""}\n'.encode() + b'{"instruction": "\xb9\xca\xd5\xcf", "output": ""}',
            r":2: 编码: 第 18 个字节（0xb9）起不是合法的 UTF-8: .*GBK",
        ),
        (b'{"instruction": "a\x00b", "output": ""}', r":1: 编码: 第 19 个字符是 NUL（\\x00）: "),
        ('{"conversations": []}', r":1: conversations: 应为非空的数组，实际是空数组: "),
        ('{"conversations": "你好"}', r":1: conversations: 应为非空的数组，实际是字符串: "),
        ('{"conversations": [1]}', r":1: conversations\[0\]: 应为对象，实际是数字: "),
        ('{"conversations": [{"from": "human"}]}', r":1: conversations\[0\].value: 缺少这个字段，已有的字段：from: "),
        ('{"conversations": [{"role": "bot", "content": ""}]}', r":1: conversations\[0\].role: 不认识的角色 'bot': "),
        ('{"conversations": [{"from": [], "value": ""}]}', r":1: conversations\[0\].from: 不认识的角色 数组: "),
        (
            '{"conversations": [{"from": "human", "value": 1}]}',
            r":1: conversations\[0\].value: 应为字符串，实际是数字: ",
        ),
        (
            json.dumps({**talk(("human", "甲"), ("gpt", "乙")), "output": "丙"}),
            r":1: output: .*不知道用哪个: .*--ignore_fields output",
        ),
        (
            json.dumps(talk(("human", "甲"), ("gpt", "乙"), ("gpt", "丙"))),
            r"conversations\[2\]: 这里应是 user，实际是 assistant",
        ),
        (json.dumps(talk(("gpt", "乙"))), r"conversations\[0\]: 这里应是 user，实际是 assistant: "),
        (
            json.dumps(talk(("human", "甲"), ("system", "乙"))),
            r"conversations\[1\]: 这里应是 assistant，实际是 system: ",
        ),
        (json.dumps(talk(("human", "甲"))), r":1: conversations: 最后一条是用户消息，没有可学的回答: "),
        (json.dumps(talk(("system", "甲"))), r":1: conversations: 只有 system，没有用户消息: "),
        (json.dumps(talk(("human", " "), ("gpt", "乙"))), r":1: conversations\[0\]: 用户消息是空的: "),
    ],
)
def test_broken_row_is_reported_with_file_line_and_field(write, content, message):
    with pytest.raises(ValueError, match=message):
        read_samples(write(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"instruction": "问", "output": "答"}', r":1: 数组: 数组没有结束的 \]，文件可能不完整: "),
        ('[{"instruction": "问",\n "output": "答', r":2: 数组: 引号没有配对，到文件末尾仍在字符串里: "),
        ('[{"instruction": "问", "output": "答"},\n]', r":2: 数组: 两个逗号之间（或末尾逗号之后）没有内容: "),
        ('[{"instruction": "问", "output": "答"}]\n{}', r":1: 数组: 数组的 \] 之后还有内容: "),
        (
            '[\n{"instruction": "问", "output": "答"}\n{"output": 1}]',
            r":3: JSON: 不是合法的 JSON（第 1 列：Extra data）: ",
        ),
        ("[\n" + "[" * 200_000 + "]" * 200_000 + "]", r":2: JSON: 括号嵌套太深: "),
        ("[1]", r":1: 行: 应为 JSON 对象 {…}，实际是数字: "),
    ],
)
def test_broken_array_is_reported(write, content, message):
    with pytest.raises(ValueError, match=message):
        read_samples(write(content))


def test_one_broken_element_does_not_hide_the_next(write):
    good = json.dumps(ROW)
    with pytest.raises(ValueError, match="有 2 处错误，") as caught:
        read_samples(write(f'[{good},\n{{"output": }},\n{good},\n{{"output": ""}}\n]'))
    assert [line.split(": ")[0].rsplit(":")[-1] for line in str(caught.value).splitlines()[1:]] == ["2", "4"]


def test_at_most_twenty_problems_are_listed_with_the_total(write):
    with pytest.raises(ValueError, match=r"有 30 处错误（只列出前 20 处），请改正后重试：") as caught:
        read_samples(write([ROW, *[{"output": "x"}] * 30]))
    first, others = str(caught.value).splitlines()[1:]
    assert ":2: instruction: " in first
    assert others == "    同样的：第 3–21 行"


def test_problems_of_a_kind_are_written_once(write):
    bad = {"output": "x"}
    with pytest.raises(ValueError, match=r"有 5 处错误，") as caught:
        read_samples(write([bad, ROW, bad, {**ROW, "output": 3}, bad, bad]))
    first, others, output = str(caught.value).splitlines()[1:]
    assert ":1: instruction: " in first
    assert others == "    同样的：第 3、5–6 行"
    assert ":4: output: " in output


def test_overlong_line_is_skipped_in_pieces_and_reported(write, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 1 << 20)
    long_row = json.dumps({**ROW, "input": "x" * (3 << 20)})
    with pytest.raises(
        ValueError, match=r"有 3 处错误[^\n]*\n.*:1: 行: 一行（或数组的一个元素）超过 1 MiB[^\n]*\n.*:3: "
    ):
        read_samples(write(f"{long_row}\n{json.dumps(ROW)}\n{{}}\n"))
    with pytest.raises(ValueError, match=r":2: 行: 一行（或数组的一个元素）超过 1 MiB"):
        read_samples(write(f"[{json.dumps(ROW)},\n{long_row}]"))


# ---- 不能读的文件 ----


def test_files_that_cannot_be_read_give_a_reason(tmp_path, write):
    with pytest.raises(ValueError, match=r"找不到数据文件 .*none.json（No such file"):
        read_samples(tmp_path / "none.json")
    with pytest.raises(ValueError, match="是一个目录，请给出目录中的某个文件"):
        read_samples(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="不是普通文件（可能是管道或设备）"):
        read_samples(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"是空的（0 字节），没有任何样本"):
        read_samples(write(b""))
    with pytest.raises(ValueError, match=r"里没有任何样本（只有空白）"):
        read_samples(write(b"\xef\xbb\xbf \n\n"))
    with pytest.raises(ValueError, match=r"里没有任何样本"):
        read_samples(write(b"[ ]"))
    with pytest.raises(ValueError, match=r"是 UTF-16 编码，.*iconv -f UTF-16 -t UTF-8 .*rows.json > .*rows.utf8.json"):
        read_samples(write(json.dumps(ROW).encode("utf-16")))
    with pytest.raises(ValueError, match=r"split 应为 train \| eval \| predict，实际是 'test'"):
        read_samples(write([ROW]), "test")


# ---- 性质 ----

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
ROWS = st.lists(
    st.fixed_dictionaries({"instruction": TEXTS.map("问".__add__), "input": TEXTS, "output": TEXTS}),
    min_size=1,
    max_size=6,
)


@FIXED
@given(rows=ROWS, block=st.integers(1, 40), indent=st.sampled_from([None, 0, 1]), ascii_only=st.booleans())
def test_array_is_cut_the_same_whatever_the_block_size(write, rows, block, indent, ascii_only):
    expected = [(("user", row["instruction"] + row["input"]), ("assistant", row["output"])) for row in rows]
    path = write(json.dumps(rows, ensure_ascii=ascii_only, indent=indent), "array.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "_READ_BYTES", block)
        samples = read_samples(path)
    assert [sample.messages for sample in samples] == expected
    lines = path.read_text(encoding="utf-8").split("\n")
    assert all(lines[sample.line - 1].lstrip("[ ,").startswith("{") for sample in samples)
    assert messages_of(write(rows)) == expected


@FIXED
@given(rows=ROWS, array=st.booleans(), place=st.floats(0, 1), junk=st.binary(max_size=3), cut=st.integers(0, 3))
def test_damaged_files_raise_value_error_or_still_hold_samples(write, rows, array, place, junk, cut):
    whole = json.dumps(rows) if array else "\n".join(map(json.dumps, rows))
    content = whole.encode()
    at = int(place * len(content))
    path = write(content[:at] + junk + content[at + cut :])
    for split in ("train", "predict"):
        try:
            assert read_samples(path, split)
        except ValueError as error:
            assert "数据文件" in str(error)
