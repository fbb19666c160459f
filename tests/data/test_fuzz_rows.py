"""随机的数据文件与对话：只允许 ValueError，结果与独立的解析一致，编码的不变式成立。

缺省每种一百例；更久：pytest tests/data/test_fuzz_rows.py --hypothesis-profile=fuzz。失败的例子会缩小后打印。
"""

import json
from pathlib import Path

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from baichuan import BaichuanTokenizer
from benchmarks.reliability.damage_kinds import FILE_SURGERY, GPT, HUMAN, ROW_SURGERY, damage_bytes
from benchmarks.reliability.damage_oracle import data_messages
from finetune.data import rows as reader
from finetune.data.prompting import IGNORE_INDEX, PROMPT_FAMILIES, PROMPT_FORMATS, encode_prompt, encode_sample
from finetune.data.samples import Sample, read_samples
from finetune.data_doctor.check import check_files

# 普通的字、空白、引号与括号、控制字符、表情、控制符号的写法及其片段
PIECES = [*("水温", "高", " ", "\n", "\t", "a", "Z9", "，", "。", "🚗", "é", "\u200b", "＜", "\\", '"', "'", "{", "]")]
PIECES += [*("</s>", "<s>", "<unk>", "<reserved_106>", "<reserved_999>", "<reserved_", ",", "\x01", "\u2028")]
PIECES += ["𠮷", "ﬁ", "\ufffd"]
FIELDS = ["instruction", "input", "output", "conversations", "id", "role", "from", "value", "content", "输出"]
ROLE_NAMES = ["human", "gpt", "user", "assistant", "system", "User", "", "tool"]

TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
ANYTHING = st.recursive(
    st.sampled_from([None, True, False, 0, -1, 1.5, 1e300, 10**300]) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=3),
    max_leaves=8,
)
TRIPLES = st.fixed_dictionaries({"instruction": TEXTS.map("问{}".format), "input": TEXTS, "output": TEXTS})
# 一半另有一条消息：在最前可能合法，在最后必不合法
ROUNDS = st.lists(TEXTS, min_size=2, max_size=6).map(lambda texts: texts[: len(texts) // 2 * 2])
EXTRA_TURNS = st.tuples(st.booleans(), st.sampled_from(ROLE_NAMES), TEXTS)
LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\n\n"])
# 末一项占 64 MiB，由 test_damage.py 试
WHOLE_FILES = [change for name, (change, _) in FILE_SURGERY.items() if "64 MiB" not in name]


@st.composite
def talks(draw) -> dict:
    turns = [{**(HUMAN, GPT)[i % 2], "value": f"你好{text}"} for i, text in enumerate(draw(ROUNDS))]
    for is_first, role, text in draw(st.lists(EXTRA_TURNS, max_size=1)):
        turns.insert(0 if is_first else len(turns), {"from": role, "value": text})
    return {"conversations": turns}


@st.composite
def files(draw) -> bytes:
    """行或数组，各种写法；一部分夹一行坏的、整份动一处手术，或损坏几个字节。"""
    if draw(st.integers(0, 19)) == 19:
        return draw(st.binary(max_size=200))
    rows = draw(st.lists(TRIPLES | talks() | TRIPLES | talks() | ANYTHING, min_size=1, max_size=5))
    style = {"ensure_ascii": draw(st.booleans()), "separators": draw(st.sampled_from([(",", ":"), (" , ", " : ")]))}
    if draw(st.booleans()):
        content = json.dumps(rows, indent=draw(st.sampled_from([None, 0, 1, "\t"])), **style).encode()
    else:
        lines = [json.dumps(row, **style).encode() for row in rows]
        if draw(st.integers(0, 6)) == 6:
            lines.append(draw(st.sampled_from(list(ROW_SURGERY.values())))(draw(TRIPLES)))
        content = draw(LINE_ENDS).join(lines) + draw(st.sampled_from([b"", b"\n"]))
        if draw(st.integers(0, 6)) == 6:
            try:
                content = draw(st.sampled_from(WHOLE_FILES))(content)
            except UnicodeDecodeError:  # 坏的那一行是 GBK，换不了编码
                event("surgery_impossible")
    rng = draw(st.randoms(use_true_random=False))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2])) if content else 0):
        content = damage_bytes(content, rng)[0] if content else content
    return content


@st.composite
def conversations(draw) -> tuple[tuple[str, str], ...]:
    """以回答结尾，可有 system；有时混进一条次序不对的消息。"""
    messages = [(("user", "assistant")[i % 2], text) for i, text in enumerate(draw(ROUNDS))]
    messages = [("system", text) for text in draw(st.lists(TEXTS, max_size=1))] + messages
    if draw(st.integers(0, 9)) == 9:
        role = draw(st.sampled_from(["system", "user", "assistant"]))
        messages.insert(draw(st.integers(0, len(messages) - 1)), (role, draw(TEXTS)))
    return tuple(messages)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "rows.json"


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint) -> BaichuanTokenizer:
    return BaichuanTokenizer.from_pretrained(tiny_checkpoint("baichuan2-7b", layers=1, hidden_size=16, heads=2))


def read_or_refuse(path: Path, split: str) -> list | None:
    """各样本的消息；读取拒绝时为 None，说明里须提到数据文件。"""
    try:
        return [sample.messages for sample in read_samples(path, split)]
    except ValueError as error:
        assert "数据文件" in str(error)
        return None


@given(content=files(), block=st.integers(1, 60))
def test_reader_agrees_with_the_oracle_and_the_doctor_whatever_the_block_size(path, content, block):
    path.write_bytes(content)
    expected = data_messages(content)
    event("rejected" if expected is None else "read")
    assert read_or_refuse(path, "train") == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_READ_BYTES", block)
        assert read_or_refuse(path, "train") == expected
    read_or_refuse(path, "predict")
    reports, _ = check_files([str(path)], str(path), None, 20, workers=1)
    assert any(severity == "error" for severity, _ in reports[0].counts) == (expected is None)


@given(
    messages=conversations(),
    prompt_format=st.sampled_from(PROMPT_FORMATS),
    family=st.sampled_from(PROMPT_FAMILIES),
    max_src_len=st.sampled_from([1, 2, 5, 20, 60, 200]),
    margin=st.sampled_from([1, 2, 10, 100]),
    limit=st.sampled_from([None, 1, 10, 50]),
)
def test_encoding_keeps_its_promises(tokenizer, messages, prompt_format, family, max_src_len, margin, limit):
    """长度、角色 id、结束符、标签；预测的提示词与训练的 src 相同。"""
    options = {"prompt_format": prompt_format, "family": family}
    max_len = max_src_len + margin
    try:
        item = encode_sample(
            Sample(messages, 1, "fuzz"), tokenizer, max_len=max_len, max_src_len=max_src_len, **options
        )
    except ValueError:
        event("refused")
        return
    event("encoded")
    ids, labels = list(item.input_ids), list(item.labels)
    assert len(ids) == len(labels) <= max_len
    assert item.num_src_tokens <= max_src_len
    assert item.num_targets == sum(label != IGNORE_INDEX for label in labels[1:])
    # 文字里写的控制符号不成角色 id
    allowed = {195, 196} if prompt_format == "chat" else set()
    assert {token for token in ids if token in tokenizer.reserved_ids} <= allowed
    eos = tokenizer.eos_token_id
    assert prompt_format == "plain" or ids.count(eos) <= (ids[-1] == eos)
    assert item.tgt_truncated != (ids[-1] == eos and labels[-1] == eos)
    for token, label in zip(ids, labels, strict=True):
        assert label in (IGNORE_INDEX, token) or (token == 195 and label == eos)
    # v1 的官方代码不用第一条用户消息之前的回答；这样的行读取时就会拒绝
    starts_with_user = next(role for role, _ in messages if role != "system") == "user"
    if messages[-2][0] == "user" and starts_with_user:
        prompt = encode_prompt(tokenizer, messages[:-1], max_src_len=max_src_len, **options)
        assert prompt == ids[: item.num_src_tokens]
    try:
        encode_prompt(tokenizer, messages, max_input_tokens=limit, **options)
    except ValueError:
        event("prompt_refused")
