"""分词器：编号与 sentencepiece 逐一相同，控制符号不从文本里来，解码无损，存取往返不变。"""

import copy
import json
import pickle
import shutil
import time
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from baichuan import BaichuanTokenizer

CORPUS = """\
故障现象：车辆行驶中发动机抖动，仪表盘故障灯点亮。
故障原因：火花塞积碳严重，点火线圈损坏。
这款手机外观漂亮，屏幕清晰，电池很耐用。
物流太慢了，客服态度也不好，不会再买。
世界上第二高的山峰是哪座？答：乔戈里峰。
北京是中国的首都，上海是中国最大的城市。
请根据文章写出一个问题：什么是深度学习？
深度学习是机器学习的一个分支，用多层神经网络学习数据的表示。
the model reads a text and writes an answer, 2024-05-06.
你好，很高兴认识你！今天天气怎么样？
"""
ARCH_OF_VERSION = {1: "baichuan-13b", 2: "baichuan2-7b"}
# 用上面的文本训练出的 640 片段词表里的编号（sentencepiece 0.2.3）
GOLDEN_IDS = {
    1: {
        "": [],
        "你好": [464, 560],
        "故障原因：深度学习": [461, 507, 77, 469],
        " a\n\tb  2024": [456, 5, 6, 298, 529, 54, 52, 54, 56],
        "<s>你好</s><unk>": [529, 260, 542, 262, 556, 560, 260, 247, 542, 262, 260, 317, 540, 307, 262],
        "😀": [529, 440, 359, 352, 328],
        "<reserved_106>好<reserved_102>": [529, 199, 560, 195],
    },
    2: {
        "": [],
        "你好": [486],
        "故障原因：深度学习": [458, 492, 70, 465],
        " a\n\tb  2024": [456, 5, 6, 298, 530, 530, 548, 538, 548, 571],
        "<s>你好</s><unk>": [260, 542, 262, 486, 260, 247, 542, 262, 260, 317, 540, 307, 262],
        "😀": [440, 359, 352, 328],
        "<reserved_106>好<reserved_102>": [195, 560, 191],
    },
}
OFFICIAL = ("v2", "v1-reconstructed")


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(CORPUS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, corpus_file):
    """返回 `checkpoint(version) -> Path`：自训分词器的微型检查点。"""
    return lambda version: tiny_checkpoint(
        ARCH_OF_VERSION[version], layers=1, vocab_size=640, train_text=(corpus_file,)
    )


@pytest.fixture(scope="module")
def tokenizers(checkpoint):
    return {version: BaichuanTokenizer.from_pretrained(checkpoint(version)) for version in (1, 2)}


@pytest.fixture(scope="module")
def v2(tokenizers):
    return tokenizers[2]


@pytest.fixture(scope="module")
def official(shared_dir):
    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = BaichuanTokenizer.from_pretrained(shared_dir / "tokenizer" / name)
        return loaded[name]

    return load


def rows_of(shared_dir, name, file="encodings.json"):
    rows = json.loads((shared_dir / "tokenizer" / name / file).read_text(encoding="utf-8"))
    return [row for row in rows if row.get("same_under_all_normalizer_variants", True)]


# ---- 编码 ----


@pytest.mark.parametrize("version", [1, 2])
def test_exact_ids(tokenizers, version):
    tokenizer = tokenizers[version]
    for text, ids in GOLDEN_IDS[version].items():
        assert tokenizer.text_to_ids(text) == ids
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids


@pytest.mark.parametrize("name, num_rows", [("v2", 79), ("v1-reconstructed", 61)])
def test_official_encodings(official, shared_dir, name, num_rows):
    tokenizer = official(name)
    rows = rows_of(shared_dir, name)
    assert len(rows) == num_rows
    for row in rows:
        assert tokenizer(row["text"])["input_ids"] == row["sp_ids"], row["text"]
        assert tokenizer.encode(row["text"], add_special_tokens=False) == row["sp_ids"]
        assert tokenizer.decode(row["sp_ids"]) == row["sp_decode"]
        assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(row["text"])) == row["sp_decode"]
        if name == "v2" and "\u2581" not in row["text"]:
            assert tokenizer.decode(row["sp_ids"]) == row["text"]
    batch = tokenizer([row["text"] for row in rows])
    assert batch["input_ids"] == [row["sp_ids"] for row in rows]


@pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", "a</s>b", " </s> ", "<s>你好</s><unk>", "</s></s>"])
@pytest.mark.parametrize("version", [1, 2])
def test_control_strings_in_text_stay_text(tokenizers, version, text):
    tokenizer = tokenizers[version]
    for ids in (
        tokenizer(text)["input_ids"],
        tokenizer([text, text], padding=True)["input_ids"][1],
        tokenizer(text, text_pair=text)["input_ids"],
        tokenizer([[text]], is_split_into_words=True)["input_ids"][0],
    ):
        assert not {0, 1, 2} & set(ids)
    if version == 2:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\u2581")))
def test_any_text_is_lossless_in_v2(v2, text):
    ids = v2.text_to_ids(text)
    assert ids == v2.sp_model.encode(text) == v2(text)["input_ids"]
    assert v2.decode(ids) == text
    assert not {0, 1, 2} & set(ids)


def test_pair_encoding_concatenates(v2):
    assert v2("你好", "深度学习")["input_ids"] == [486, 465]
    assert v2([("你好", "深度学习")])["input_ids"] == [[486, 465]]


def test_batch_padding_and_tensors(v2):
    batch = v2(["你好", "故障原因：深度学习"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[486, 0, 0, 0], [458, 492, 70, 465]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch["input_ids"].dtype == torch.int64
    assert set(batch) == {"input_ids", "attention_mask"}
    left = v2(["你好", "故障原因：深度学习"], padding=True, padding_side="left")
    assert left["input_ids"] == [[0, 0, 0, 486], [458, 492, 70, 465]]
    assert v2(["你好", ""], padding=True)["input_ids"] == [[486], [0]]
    padded = v2.pad({"input_ids": [[5], [5, 6]]}, pad_to_multiple_of=4)
    assert padded["input_ids"] == [[5, 0, 0, 0], [5, 6, 0, 0]]


def test_truncation(v2):
    assert v2("故障原因：深度学习", truncation=True, max_length=2)["input_ids"] == [458, 492]
    exact = v2(["故障原因：深度学习", "你好"], truncation=True, padding="max_length", max_length=3)["input_ids"]
    assert exact == [[458, 492, 70], [486, 0, 0]]


def test_lone_surrogate_and_wrong_type_are_clear_errors(v2):
    with pytest.raises(ValueError, match=r"第 3 个字符 '\\ud83d'"):
        v2("你好\ud83d")
    with pytest.raises(ValueError, match="int：3"):
        v2.text_to_ids(3)


# ---- bos 与 eos ----


def test_no_bos_eos_by_default(checkpoint, tmp_path):
    assert BaichuanTokenizer(checkpoint(2) / "tokenizer.model").encode("你好") == [486]
    # 只有 tokenizer.model、没有配置文件的目录
    shutil.copy(checkpoint(2) / "tokenizer.model", tmp_path)
    bare = BaichuanTokenizer.from_pretrained(tmp_path)
    assert (bare.add_bos_token, bare.add_eos_token, bare.padding_side) == (False, False, "right")
    assert (bare.pad_token_id, bare.unk_token_id, bare.bos_token_id, bare.eos_token_id) == (0, 0, 1, 2)


def test_bos_eos_as_configured_survive_saving(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint(2), tmp_path / "with-bos")
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True, "add_eos_token": True}))
    tokenizer = BaichuanTokenizer.from_pretrained(path)
    tokenizer.save_pretrained(tmp_path / "again")
    for loaded in (tokenizer, BaichuanTokenizer.from_pretrained(tmp_path / "again")):
        assert loaded.encode("你好") == [1, 486, 2]
        assert loaded.encode("你好", "深度学习") == [1, 486, 2, 1, 465, 2]
        assert loaded.encode("你好", add_special_tokens=False) == [486]
        assert loaded.get_special_tokens_mask([486], [465]) == [1, 0, 1, 1, 0, 1]
        assert loaded.get_special_tokens_mask([1, 486, 2], already_has_special_tokens=True) == [1, 0, 1]
        assert loaded("故障原因：", truncation=True, max_length=3)["input_ids"] == [1, 458, 2]
    assert BaichuanTokenizer.from_pretrained(path, add_bos_token=False, add_eos_token=False).encode("你好") == [486]


# ---- 解码 ----


def test_decode_adds_no_spaces_around_special_ids(v2):
    ids = [1, *v2.text_to_ids("a"), 2, *v2.text_to_ids("b 你好"), 2, 0, 0]
    assert v2.decode(ids) == "<s>a</s>b 你好</s><unk><unk>"
    assert v2.decode(ids, skip_special_tokens=True) == "ab 你好"
    assert v2.batch_decode(torch.tensor([ids, ids]), skip_special_tokens=True) == ["ab 你好"] * 2
    assert v2.decode(486) == "你好"
    assert v2.decode([]) == ""


def test_decode_keeps_role_pieces_and_clean_up_is_off(v2):
    assert v2.decode([195, 486, 196], skip_special_tokens=True) == "<reserved_106>你好<reserved_107>"
    text = "it is n't , right ?"
    assert v2.decode(v2.encode(text)) == text
    assert v2.decode(v2.encode(text), clean_up_tokenization_spaces=True) == "it isn't, right?"


@pytest.mark.parametrize("text", ["😀", "龘靐", "é😀好", "\U0010ffff\x00", "👨‍👩‍👧"])
@pytest.mark.parametrize("version", [1, 2])
def test_multi_byte_characters_through_byte_pieces(tokenizers, version, text):
    tokenizer = tokenizers[version]
    expected = tokenizer.sp_model.normalize(text).removeprefix("\u2581").replace("\u2581", " ")
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    if version == 2:
        assert expected == text


def test_incomplete_bytes_decode_to_replacement_characters(v2):
    assert v2.encode("😀") == [440, 359, 352, 328]
    assert v2.decode([440, 359]) == "\ufffd\ufffd"
    # 字节被特殊符号隔开就不再是一个字符
    assert v2.decode([440, 359, 2, 352, 328]) == "\ufffd\ufffd</s>\ufffd\ufffd"


def test_dummy_prefix_of_v1_is_dropped_at_the_start_of_each_part(tokenizers):
    v1 = tokenizers[1]
    ids = v1.encode("你好")
    assert v1.convert_ids_to_tokens(ids) == ["▁你", "好"]
    assert v1.decode(ids) == "你好"
    assert v1.decode([1, *ids, 2, *ids]) == "<s>你好</s>你好"
    # 角色片段不是控制符号，其后的句首空格照 sentencepiece 的规则保留
    assert v1.decode([195, *ids]) == v1.sp_model.decode([195, *ids]) == "<reserved_102> 你好"


def test_ids_without_a_piece_decode_as_unk(v2):
    # 模型词表可以补得比片段多，随机权重会生成这些编号
    assert v2.decode([486, 5000]) == "你好<unk>"
    assert v2.decode([486, 5000], skip_special_tokens=True) == "你好"
    assert v2.convert_ids_to_tokens([486, 5000]) == ["你好", "<unk>"]
    with pytest.raises(ValueError, match=r"编号 -100 是负数.*请先去掉 -100"):
        v2.decode([486, -100])


# ---- 角色片段 ----


def test_find_control_pieces(tokenizers):
    v1, v2 = tokenizers[1], tokenizers[2]
    assert v2.find_control_pieces("请写<reserved_106>和<reserved_107>、<reserved_106>") == [
        "<reserved_106>",
        "<reserved_107>",
        "<reserved_106>",
    ]
    for text in ["<reserved_99999>", "<reserved_>", "＜reserved_106＞", "<s></s><unk>", "\n\t<SEP><h1>", ""]:
        assert v2.find_control_pieces(text) == []
    # v1 的规范化把全角尖括号变成半角，sentencepiece 随后照样认出角色片段
    assert v1.text_to_ids("＜reserved_102＞") == [529, 195]
    assert v1.find_control_pieces("＜reserved_102＞") == ["<reserved_102>"]


@pytest.mark.parametrize("version", [1, 2])
def test_encode_plain_spells_role_pieces(tokenizers, version):
    tokenizer = tokenizers[version]
    text = "你好<reserved_102>故障<reserved_106>\n<reserved_102>"
    assert {195, 199 if version == 1 else 191} <= set(tokenizer.text_to_ids(text))
    ids = tokenizer.encode_plain(text)
    assert not tokenizer.reserved_ids & set(ids)
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.text_to_ids(text)) == text
    assert tokenizer.find_control_pieces(text) == ["<reserved_102>", "<reserved_106>", "<reserved_102>"]
    # 其余部分的编号一个不变
    kept = [i for i in tokenizer.text_to_ids(text) if i not in tokenizer.reserved_ids]
    spelled = tokenizer._spell(195)
    assert 5 in ids and len(ids) > len(kept) and len(spelled) > 3
    assert tokenizer.encode_plain("故障原因：\n") == tokenizer.text_to_ids("故障原因：\n")


def test_encode_plain_neutralises_full_width_brackets_in_v1(tokenizers):
    ids = tokenizers[1].encode_plain("＜reserved_102＞")
    assert 195 not in ids
    assert tokenizers[1].decode(ids) == "<reserved_102>"


def test_encode_plain_with_official_files(official):
    v2, v1 = official("v2"), official("v1-reconstructed")
    assert v2.reserved_ids == frozenset(range(101, 1089))
    assert v1.reserved_ids == frozenset(range(93, 393))
    assert v2.text_to_ids("<reserved_106>") == [195]
    assert v2.convert_ids_to_tokens(v2.encode_plain("<reserved_106>")) == ["<", "res", "erved", "_", "1", "0", "6", ">"]
    spelled = v1.convert_ids_to_tokens(v1.encode_plain("＜reserved_102＞你好"))
    assert spelled == ["▁", "<", "res", "erved", "_", "1", "0", "2", ">", "你好"]


PIECES = [
    "<reserved_106>",
    "<reserved_102>",
    "<reserved_",
    "106>",
    "＜reserved_102＞",
    "<",
    " ",
    "好",
    "\n",
    "</s>",
    "1",
]


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from(PIECES), max_size=8))
def test_no_combination_of_text_yields_a_role_id(tokenizers, parts):
    text = "".join(parts)
    for version, tokenizer in tokenizers.items():
        ids = tokenizer.encode_plain(text)
        assert not tokenizer.reserved_ids & set(ids)
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.text_to_ids(text))
        if version == 2:
            assert tokenizer.decode(ids) == text


# ---- 词表与新词 ----


def test_vocabulary(v2):
    assert (len(v2), v2.vocab_size) == (640, 640)
    vocab = v2.get_vocab()
    assert len(vocab) == 640 and sorted(vocab.values()) == list(range(640))
    assert [vocab[piece] for piece in ("<unk>", "<s>", "</s>", "\n", "\t", "<reserved_106>", "你好")] == [
        0,
        1,
        2,
        5,
        6,
        195,
        486,
    ]
    assert v2.convert_tokens_to_ids(["你好", "不存在的词"]) == [486, 0]
    assert v2.convert_ids_to_tokens([5, 195, 486]) == ["\n", "<reserved_106>", "你好"]
    assert sorted(v2.all_special_ids) == [0, 1, 2]


def test_official_vocabulary_sizes(official):
    assert [(len(official(name)), official(name).vocab_size) for name in OFFICIAL] == [(125696,) * 2, (64000,) * 2]
    assert official("v2").model_max_length == 4096


def test_added_words_match_but_added_special_tokens_do_not(checkpoint, tmp_path):
    tokenizer = BaichuanTokenizer.from_pretrained(checkpoint(2))
    assert tokenizer.add_tokens(["[新词]", "[新词]甲"]) == 2
    assert tokenizer.add_special_tokens({"pad_token": "[PAD]"}) == 1
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, BaichuanTokenizer.from_pretrained(tmp_path)):
        assert (len(loaded), loaded.vocab_size, loaded.pad_token_id) == (643, 640, 642)
        assert loaded.encode("你好[新词]你好[新词]甲") == [486, 640, 486, 641]
        assert loaded.decode([486, 640, 486, 642]) == "你好[新词]你好[PAD]"
        assert loaded.decode([486, 640, 486, 642], skip_special_tokens=True) == "你好[新词]你好"
        assert 642 not in loaded.encode("[PAD]")
        assert loaded.encode_plain("[新词]") == [640]
        assert 642 not in loaded.encode_plain("[PAD]")


# ---- 存取 ----


def test_save_and_load_round_trip(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(2))
    assert type(tokenizer) is BaichuanTokenizer
    tokenizer.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    assert (tmp_path / "tokenizer.model").read_bytes() == (checkpoint(2) / "tokenizer.model").read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert set(config.pop("added_tokens_decoder")) == {"0", "1", "2"}
    assert config == {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": 4096,
        "pad_token": "<unk>",
        "sp_model_kwargs": {},
        "tokenizer_class": "BaichuanTokenizer",
        "unk_token": "<unk>",
    }
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is BaichuanTokenizer
    for text, ids in GOLDEN_IDS[2].items():
        assert again.encode(text) == ids


def test_save_works_after_the_source_is_gone(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint(2), tmp_path / "source")
    tokenizer = BaichuanTokenizer.from_pretrained(source)
    shutil.rmtree(source)
    tokenizer.save_pretrained(tmp_path / "target", filename_prefix="副本")
    copied = (tmp_path / "target" / "副本-tokenizer.model").read_bytes()
    assert copied == (checkpoint(2) / "tokenizer.model").read_bytes()


def test_save_into_bad_places(v2, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="是一个文件，请给出目录"):
        v2.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="保存分词器的目录不存在"):
        v2.save_vocabulary(tmp_path / "absent")


@pytest.mark.parametrize("version", [1, 2])
def test_pickle_and_deepcopy(tokenizers, version):
    tokenizer = tokenizers[version]
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        for text, ids in GOLDEN_IDS[version].items():
            assert other.encode(text) == ids
        assert other.get_vocab() == tokenizer.get_vocab()
        assert other.decode([1, 2]) == "<s></s>"


def test_stray_file_names_do_not_confuse_the_loader(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint(2), tmp_path / "stray")
    (path / "tokenizer.model.bak").write_bytes(b"x")
    assert BaichuanTokenizer.from_pretrained(path).encode("你好") == [486]
    assert BaichuanTokenizer.from_pretrained(str(path / "tokenizer.model")).encode("你好") == [486]


def test_code_in_the_checkpoint_is_never_executed(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint(2), tmp_path / "with-code")
    marker = tmp_path / "executed"
    for name in ("tokenization_baichuan.py", "configuration_baichuan.py", "modeling_baichuan.py"):
        (path / name).write_text(f"open({str(marker)!r}, 'w').close()\nraise RuntimeError('executed')\n")
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert type(tokenizer) is BaichuanTokenizer
    assert tokenizer.encode("你好") == [486]
    assert not marker.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"找不到分词器文件 tokenizer.model（查找位置：.*broken/tokenizer.model）"),
        (b"", "是空的（0 字节）"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:79\nsize 2001107\n", "只是 Git LFS 指针"),
        (b"<!DOCTYPE html><html>404</html>", "不是可用的 sentencepiece 模型（31 字节"),
        ("cut", "不是可用的 sentencepiece 模型"),
    ],
)
def test_unusable_model_file(checkpoint, tmp_path, content, message):
    path = shutil.copytree(checkpoint(2), tmp_path / "broken")
    if content is None:
        (path / "tokenizer.model").unlink()
    else:
        whole = (path / "tokenizer.model").read_bytes()
        (path / "tokenizer.model").write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    for load in (BaichuanTokenizer.from_pretrained, AutoTokenizer.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(path)


# ---- 速度 ----


def seconds_to_encode(tokenizer, text):
    start = time.process_time()
    tokenizer(text)
    return time.process_time() - start


def test_speed_small(v2):
    text = CORPUS * 800
    size = len(text.encode("utf-8"))
    assert size > 500_000
    # 10 MB 须在 20 秒内，按大小折算
    assert seconds_to_encode(v2, text) < 20 * size / 1e7


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
def test_speed_ten_megabytes(official, shared_dir, name):
    text = (shared_dir / "data" / "general_0.txt").read_text(encoding="utf-8")
    text = (text * 3).encode("utf-8")[:10_000_000].decode("utf-8", errors="ignore")
    assert len(text.encode("utf-8")) > 9_999_990
    assert seconds_to_encode(official(name), text) < 20
    assert official(name).encode_plain(text) == sentencepiece.SentencePieceProcessor(
        model_file=str(shared_dir / "tokenizer" / name / "tokenizer.model")
    ).encode(text)


# ---- 加入词表的新词 ----


@pytest.mark.parametrize("arch", ["baichuan2-7b", "baichuan-7b"])
def test_added_words_are_honoured_and_role_pieces_still_are_not(tiny_checkpoint, tmp_path, arch):
    base = Path(shutil.copytree(tiny_checkpoint(arch), tmp_path / "base"))
    size = BaichuanTokenizer.from_pretrained(base).vocab_size
    (base / "added_tokens.json").write_text(json.dumps({"[三元组]": size, "[无]": size + 1}), encoding="utf-8")
    tokenizer = BaichuanTokenizer.from_pretrained(base)
    text = "怠速[三元组]抖动 [无]。"
    ids = tokenizer.encode_plain(text)
    assert ids == tokenizer(text)["input_ids"]
    assert [index for index in ids if index >= size] == [size, size + 1]
    mixed = text + "<reserved_106>"
    assert tokenizer.reserved_ids.isdisjoint(tokenizer.encode_plain(mixed))
    assert tokenizer.find_control_pieces(mixed) == ["<reserved_106>"]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert BaichuanTokenizer.from_pretrained(tmp_path / "saved").encode_plain(text) == ids  # added_tokens_decoder
