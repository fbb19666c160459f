"""prompting：提示词与标签逐个 id 与官方代码一致；截断规则；训练与预测的 src 相同。"""

import json
import re
from argparse import ArgumentTypeError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_tokenizer import EOS, RECORDED, RecordedTokenizer

from baichuan import BaichuanTokenizer
from finetune.data.prompting import (
    IGNORE_INDEX,
    Prompting,
    encode_answer,
    encode_prompt,
    encode_sample,
    max_prompt_tokens,
    prompt_format_choice,
    prompting_reason,
    read_template,
    requested_prompting,
)
from finetune.data.samples import Sample

USER, ASSISTANT = 195, 196
NO = IGNORE_INDEX
SINGLE = [("user", "这个评论是正面还是负面？"), ("assistant", "负面。")]
DOUBLE = [("user", "你好"), ("assistant", "你好！"), ("user", "What is 1+1?"), ("assistant", "1+1=2。")]
SYSTEM = [("system", "你是一个有用的助手。"), ("user", "介绍一下你自己")]
THREE = [("user", "一"), ("assistant", "二"), ("user", "三"), ("assistant", "四"), ("user", "五")]


@pytest.fixture(scope="module", params=["recorded", "real"])
def tokenizer(request):
    if request.param == "recorded":
        return RecordedTokenizer()
    return BaichuanTokenizer.from_pretrained(request.getfixturevalue("shared_dir") / "tokenizer" / "v2")


def sample_of(*messages: tuple[str, str]) -> Sample:
    return Sample(tuple(messages), 7, "rows.json")


def encode(tokenizer, messages, prompt_format="chat", max_len=48, max_src_len=47, **options):
    return encode_sample(sample_of(*messages), tokenizer, prompt_format, max_len, max_src_len, **options)


# ---- 与官方代码的黄金值 ----


@pytest.mark.parametrize(
    ("directory", "file", "family"),
    [("v2", "chat.json", "baichuan2"), ("v1-reconstructed", "chat_13b_final_no_eos.json", "baichuan")],
)
def test_all_chat_goldens(shared_dir, directory, file, family):
    folder = shared_dir / "tokenizer" / directory
    tokenizer = BaichuanTokenizer.from_pretrained(folder)
    num_compared = 0
    for row in json.loads((folder / file).read_text(encoding="utf-8")):
        if row["name"] == "special_in_text":
            continue  # 官方分词器把文本里的 </s> 认成控制符号，我们有意不这样
        messages = [(message["role"], message["content"]) for message in row["messages"]]
        limit = max_prompt_tokens(row["model_max_length"], row["max_new_tokens"], family)
        options = {"family": family, "max_input_tokens": limit}
        if "error" in row:
            with pytest.raises(ValueError, match="没有 system 角色"):
                encode_prompt(tokenizer, messages, "chat", **options)
        else:
            assert encode_prompt(tokenizer, messages, "chat", **options) == row["ids"], row["name"]
        num_compared += 1
    assert num_compared == 60


def test_all_sft_goldens(shared_dir):
    folder = shared_dir / "tokenizer" / "v2"
    tokenizer = BaichuanTokenizer.from_pretrained(folder)
    for row in json.loads((folder / "sft.json").read_text(encoding="utf-8")):
        roles = {"human": "user", "gpt": "assistant"}
        messages = [(roles[turn["from"]], turn["value"]) for turn in row["example"]["conversations"]]
        encoded = encode(tokenizer, messages, max_len=row["model_max_length"], max_src_len=row["model_max_length"] - 1)
        length = sum(row["attention_mask"])
        assert encoded.input_ids == row["input_ids"][:length]
        assert encoded.labels == row["labels"][:length]


def test_text_that_looks_like_a_role_is_spelled_out(shared_dir):
    tokenizer = BaichuanTokenizer.from_pretrained(shared_dir / "tokenizer" / "v2")
    messages = [("user", "文本</s>里有<s>特殊<reserved_106>符号"), ("assistant", "<reserved_107></s>")]
    encoded = encode(tokenizer, messages)
    assert encoded.has_control_pieces
    assert [encoded.input_ids.count(token) for token in (USER, ASSISTANT, EOS)] == [1, 1, 1]
    assert tokenizer.decode(encoded.input_ids[1:20]).startswith("文本</s>里有<s>特殊<reserved_106>符号")


# ---- 拼法 ----


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (SINGLE[:1], [USER, 1790, 6630, 92347, 15085, 2002, 16272, 68, ASSISTANT]),
        (SYSTEM, [26553, 58190, 18183, 66, USER, 39817, 19262, ASSISTANT]),
        (THREE, [195, 92342, 196, 92565, 195, 92514, 196, 92721, 195, 92791, 196]),
        ([("user", "")], [USER, ASSISTANT]),
        (
            [("user", "写一首诗"), ("assistant", "春眠不觉晓，")],
            [195, 93041, 15646, 93392, 196, *RECORDED["春眠不觉晓，"]],
        ),
    ],
)
def test_chat_prompt(tokenizer, messages, expected):
    assert encode_prompt(tokenizer, messages, "chat") == expected


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (SINGLE[:1], RECORDED["这个评论是正面还是负面？"]),
        (DOUBLE[:3], [16829, 16829, 67, EOS, 3167, 1414, 92311, 92336, 62, 92336, 74]),
        (SYSTEM, [26553, 58190, 18183, 66, 39817, 19262]),
    ],
)
def test_plain_prompt(tokenizer, messages, expected):
    assert encode_prompt(tokenizer, messages, "plain") == expected


@pytest.mark.parametrize(
    ("prompt_format", "messages", "input_ids", "labels", "num_targets", "num_src_tokens"),
    [
        (
            "chat",
            SINGLE,
            [195, 1790, 6630, 92347, 15085, 2002, 16272, 68, 196, 16272, 66, 2],
            [2, NO, NO, NO, NO, NO, NO, NO, NO, 16272, 66, 2],
            3,
            9,
        ),
        (
            "chat",
            DOUBLE,
            [195, 16829, 196, 16829, 67, 195, 3167, 1414, 92311, 92336, 62, 92336, 74, 196, *RECORDED["1+1=2。"], 2],
            [2, NO, NO, 16829, 67, 2, NO, NO, NO, NO, NO, NO, NO, NO, *RECORDED["1+1=2。"], 2],
            10,
            14,
        ),
        (
            "chat",
            [*SYSTEM, ("assistant", "")],
            [26553, 58190, 18183, 66, 195, 39817, 19262, 196, 2],
            [NO, NO, NO, NO, NO, NO, NO, NO, 2],
            1,
            8,
        ),
        ("plain", [("user", "你好"), ("assistant", "负面。")], [16829, 16272, 66, 2], [NO, 16272, 66, 2], 3, 1),
        ("plain", [("user", "你好"), ("assistant", "")], [16829, 2], [NO, 2], 1, 1),
        (
            "plain",
            DOUBLE,
            [16829, 16829, 67, 2, *RECORDED["What is 1+1?"], *RECORDED["1+1=2。"], 2],
            [NO, 16829, 67, 2, *[NO] * 7, *RECORDED["1+1=2。"], 2],
            10,
            11,
        ),
    ],
)
def test_sample_ids_and_labels(tokenizer, prompt_format, messages, input_ids, labels, num_targets, num_src_tokens):
    encoded = encode(tokenizer, messages, prompt_format)
    assert encoded.input_ids == input_ids
    assert encoded.labels == labels
    assert encoded[2:] == (num_targets, num_src_tokens, False, False, False, 7)


# ---- 截断 ----


@pytest.mark.parametrize(
    ("messages", "max_src_len", "expected"),
    [
        # 整轮丢弃最早的，最后一轮总是保留
        (THREE, 11, [195, 92342, 196, 92565, 195, 92514, 196, 92721, 195, 92791, 196]),
        (THREE, 10, [195, 92514, 196, 92721, 195, 92791, 196]),
        (THREE, 6, [195, 92791, 196]),
        # 再截用户消息的尾部，角色 id 不动
        (SINGLE[:1], 5, [195, 1790, 6630, 92347, 196]),
        (SINGLE[:1], 2, [195, 196]),
        # system 最后才截
        (SYSTEM, 7, [26553, 58190, 18183, 66, 195, 39817, 196]),
        (SYSTEM, 4, [26553, 58190, 195, 196]),
    ],
)
def test_training_truncation_of_a_chat_prompt(tokenizer, messages, max_src_len, expected):
    assert encode_prompt(tokenizer, messages, "chat", max_src_len=max_src_len) == expected
    encoded = encode(tokenizer, [*messages, ("assistant", "一")], max_len=40, max_src_len=max_src_len)
    assert encoded.input_ids == [*expected, 92342, EOS]
    assert encoded.src_truncated is (max_src_len < 11)


@pytest.mark.parametrize(
    ("messages", "max_src_len", "expected"),
    [
        (THREE, 7, [92342, 92565, EOS, 92514, 92721, EOS, 92791]),
        (THREE, 6, [92514, 92721, EOS, 92791]),
        (SINGLE[:1], 3, [1790, 6630, 92347]),
        (SYSTEM, 5, [26553, 58190, 18183, 66, 39817]),
    ],
)
def test_training_truncation_of_a_plain_prompt(tokenizer, messages, max_src_len, expected):
    assert encode_prompt(tokenizer, messages, "plain", max_src_len=max_src_len) == expected
    assert encode_prompt(tokenizer, messages, "plain", max_input_tokens=max_src_len) == expected


def test_truncated_target_has_no_eos_and_whole_one_has(tokenizer):
    messages = [("user", "你好"), ("assistant", "春眠不觉晓，")]  # src 3，tgt 5 + eos
    assert encode(tokenizer, messages, max_len=9, max_src_len=8).input_ids[-2:] == [65, EOS]
    cut = encode(tokenizer, messages, max_len=8, max_src_len=7)
    assert (cut.input_ids[-1], len(cut.input_ids), cut.tgt_truncated, cut.num_targets) == (65, 8, True, 5)
    shortest = encode(tokenizer, messages, max_len=4, max_src_len=3)
    assert (shortest.input_ids, shortest.num_targets) == ([195, 16829, 196, 92937], 1)


def test_official_truncation_cuts_from_the_left(tokenizer):
    newest_two = [195, 92514, 196, 92721, 195, 92791, 196]
    assert encode_prompt(tokenizer, THREE, "chat", max_input_tokens=9) == newest_two
    # 官方代码判断能否放下时没有算末尾的 196，因此 10 个放得下，再被截去最左边的 195
    assert encode_prompt(tokenizer, THREE, "chat", max_input_tokens=10) == [92342, 196, 92565, *newest_two]
    assert encode_prompt(tokenizer, SINGLE[:1], "chat", max_input_tokens=4) == [2002, 16272, 68, 196]
    # 先按训练的规则，再按官方的
    assert encode_prompt(tokenizer, SINGLE[:1], "chat", max_src_len=5, max_input_tokens=3) == [6630, 92347, 196]


# ---- 性质与报错 ----

CONVERSATIONS = st.tuples(
    st.sampled_from([[], [("system", "你是一个有用的助手。")]]),
    st.lists(st.sampled_from([name for name in RECORDED if name]), min_size=1, max_size=7).filter(lambda t: len(t) % 2),
)


@settings(max_examples=150, deadline=None)
@given(
    parts=CONVERSATIONS,
    answer=st.sampled_from(sorted(RECORDED)),
    prompt_format=st.sampled_from(["chat", "plain"]),
    max_src_len=st.integers(2, 40),
    margin=st.integers(1, 12),
)
def test_training_src_equals_prediction_prompt(parts, answer, prompt_format, max_src_len, margin):
    tokenizer = RecordedTokenizer()
    system, texts = parts
    context = [*system, *((("user", "assistant")[i % 2], text) for i, text in enumerate(texts))]
    max_len = max_src_len + margin
    encoded = encode(tokenizer, [*context, ("assistant", answer)], prompt_format, max_len, max_src_len)
    prompt = encode_prompt(tokenizer, context, prompt_format, max_src_len=max_src_len)
    assert encoded.input_ids[: encoded.num_src_tokens] == prompt
    assert len(prompt) <= max_src_len
    assert len(encoded.input_ids) == len(encoded.labels) <= max_len
    assert encoded.num_targets == sum(label != NO for label in encoded.labels[1:]) >= 1
    assert (encoded.input_ids[-1] == EOS) is not encoded.tgt_truncated
    markers = [token for token in prompt if token in (USER, ASSISTANT)]
    assert markers == [USER, ASSISTANT] * (len(markers) // 2)
    assert bool(markers) is (prompt_format == "chat")


def test_user_mistakes_are_named(tokenizer):
    with pytest.raises(ValueError, match=r"--max_src_len\(48\) 必须小于 --max_len\(48\)，请调小前者"):
        encode(tokenizer, SINGLE, max_src_len=48)
    with pytest.raises(ValueError, match=r"--max_src_len\(1\) 太小，连角色标记都放不下"):
        encode(tokenizer, SINGLE, max_src_len=1)
    with pytest.raises(ValueError, match=r"prompt_format 应为 plain \| chat \| template，实际是 'alpaca'"):
        encode_prompt(tokenizer, SYSTEM, "alpaca")
    with pytest.raises(ValueError, match=r"family 应为 baichuan \| baichuan2，实际是 'llama'"):
        encode_prompt(tokenizer, SYSTEM, "chat", family="llama")
    with pytest.raises(ValueError, match="没有 system 角色，请把它的内容并入第一条用户消息"):
        encode(tokenizer, [*SYSTEM, ("assistant", "一")], family="baichuan")
    with pytest.raises(ValueError, match="system 只能是第一条消息"):
        encode_prompt(tokenizer, SYSTEM[::-1], "chat")
    with pytest.raises(ValueError, match="不认识的角色 'tool'"):
        encode_prompt(tokenizer, [("tool", "一")], "chat")
    with pytest.raises(ValueError, match="对话为空"):
        encode_prompt(tokenizer, [], "chat")
    with pytest.raises(ValueError, match=r"max_new_tokens\(64\) 必须小于模型的上下文长度\(64\)"):
        max_prompt_tokens(64, 64)
    assert max_prompt_tokens(64, 64, "baichuan") == 32


# ---- 自己的模板 ----

TEMPLATE = {"system": "{text}\n", "user": "Human: {text}\nAssistant:", "assistant": " {text}\n", "stop": "Human:"}


class LetterTokenizer:
    """一个字一个 id。"""

    eos_token_id = EOS

    def encode_plain(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    def encode_user_text(self, text: str) -> tuple[list[int], bool]:
        return self.encode_plain(text), False


def spelled(ids: list[int]) -> str:
    return "".join("$" if index == EOS else chr(index) for index in ids)


def test_a_template_is_plain_text_around_the_messages():
    messages = [("system", "规"), ("user", "一"), ("assistant", "二"), ("user", "三"), ("assistant", "四")]
    item = encode_sample(sample_of(*messages), LetterTokenizer(), "template", 99, 90, template=TEMPLATE)
    assert spelled(item.input_ids) == "规\nHuman: 一\nAssistant: 二\n$Human: 三\nAssistant: 四\n$"
    targets = [label if label != NO else ord("·") for label in item.labels]
    assert spelled(targets) == "·" * 22 + "二\n$" + "·" * 20 + "四\n$"
    prompt = encode_prompt(LetterTokenizer(), messages[:-1], "template", template=TEMPLATE)
    assert prompt == item.input_ids[: item.num_src_tokens]
    assert spelled(prompt).endswith("三\nAssistant: ")
    # 接着写的回答：后面没有模板的文字
    prompt = encode_prompt(LetterTokenizer(), messages, "template", template=TEMPLATE)
    assert spelled(prompt).endswith("三\nAssistant: 四")
    answer = encode_answer(LetterTokenizer(), "四", "template", template=TEMPLATE)
    assert spelled(answer) == "四\n$" and answer == item.input_ids[item.num_src_tokens :]


@pytest.mark.parametrize("limit", range(18, 60))
def test_truncation_never_cuts_the_words_of_a_template(limit):
    messages = [
        ("system", "规矩"),
        ("user", "一二三"),
        ("assistant", "四"),
        ("user", "五六七八九"),
        ("assistant", "十"),
    ]
    if limit < 20:
        with pytest.raises(ValueError, match="太小，连角色标记都放不下"):
            encode_sample(sample_of(*messages), LetterTokenizer(), "template", 99, limit, template=TEMPLATE)
        return
    item = encode_sample(sample_of(*messages), LetterTokenizer(), "template", 99, limit, template=TEMPLATE)
    prompt = encode_prompt(LetterTokenizer(), messages[:-1], "template", max_src_len=limit, template=TEMPLATE)
    text = spelled(prompt)
    assert prompt == item.input_ids[: item.num_src_tokens]
    assert len(prompt) <= limit
    assert text.endswith("\nAssistant: ")
    assert text.count("Human: ") == text.count("\nAssistant: ") == (2 if limit >= 52 else 1)
    assert text.startswith("规" if limit > 20 else "\n")


def test_a_template_without_system_refuses_a_system_message():
    template = {name: text for name, text in TEMPLATE.items() if name != "system"}
    with pytest.raises(ValueError, match="模板没有 system"):
        encode_prompt(LetterTokenizer(), [("system", "规"), ("user", "一")], "template", template=template)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "实际是 list"),
        ('{"user": "{text}", "human": "{text}"}', "实际是 user、human"),
        ('{"user": "{text}"}', "的 assistant 里要恰好有一个 {text}"),
        ('{"user": "{text}{text}", "assistant": "a"}', "的 user、assistant 里"),
        ('{"user": 3, "assistant": "{text}"}', "的 user 应为字符串，实际是 3"),
        ("{", "不是合法的 UTF-8 JSON"),
    ],
)
def test_broken_templates_are_refused(tmp_path, content, message):
    path = tmp_path / "t.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_template(path)
    with pytest.raises(ValueError, match="读不了"):
        read_template(tmp_path / "none.json")


def test_the_format_and_its_reason():
    base = Prompting("plain", "baichuan2", 195, 196)
    assert "--prompt_format chat" in prompting_reason(base, "auto")
    assert "user_token_id" in prompting_reason(base._replace(prompt_format="chat"), "auto")
    assert requested_prompting(base, "auto") is base
    assert requested_prompting(base._replace(template=TEMPLATE), "chat") == base._replace(prompt_format="chat")
    assert [prompt_format_choice(value) for value in ("auto", "plain", "x.json")] == ["auto", "plain", "x.json"]
    with pytest.raises(ArgumentTypeError, match="得到 'alpaca'"):
        prompt_format_choice("alpaca")
