"""微型检查点：官方的文件、键名、张量名与初始化，可由 Auto 类载入，同样的参数得到同样的字节。"""

import hashlib
import json
import math
import subprocess
import sys

import pytest
import sentencepiece
import torch
from paths import ROOT
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import baichuan
from scripts import build_tiny_model as script

SCRIPT = ROOT / "scripts" / "build_tiny_model.py"
ARCHS = ["baichuan-7b", "baichuan-13b", "baichuan2-7b", "baichuan2-13b"]
TEXT = "故障原因：火花塞积碳严重，点火线圈损坏。\n深度学习是机器学习的一个分支。\n你好，很高兴认识你！a model, 2024.\n"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def build(text_file, tmp_path):
    """返回 `build(arch, **options) -> Path`：两层、词表 600 的小检查点。"""

    def make(arch, name="model", **options):
        defaults = {"layers": 2, "hidden_size": 32, "heads": 4, "vocab_size": 600, "train_text": [text_file]}
        return script.build_tiny_model(arch, tmp_path / name, **{**defaults, **options})

    return make


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def hashes(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


# ---- 文件与键名 ----


@pytest.mark.parametrize("arch", ARCHS)
def test_files(build, arch):
    path = build(arch)
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert [file.name for file in path.parent.iterdir()] == ["model"]


COMMON_KEYS = (
    "architectures auto_map bos_token_id eos_token_id hidden_act hidden_size initializer_range intermediate_size "
    "model_type num_attention_heads num_hidden_layers pad_token_id rms_norm_eps tie_word_embeddings torch_dtype "
    "transformers_version use_cache vocab_size"
)
EXTRA_KEYS = {
    "baichuan-7b": "max_position_embeddings",
    "baichuan-13b": "_from_model_config model_max_length norm_head",
    "baichuan2-7b": "_from_model_config max_position_embeddings model_max_length norm_head tokenizer_class",
    "baichuan2-13b": "_from_model_config gradient_checkpointing model_max_length norm_head tokenizer_class",
}


@pytest.mark.parametrize("arch", ARCHS)
def test_config_keys(build, arch):
    config = read_json(build(arch, model_max_length=512) / "config.json")
    assert sorted(config) == sorted(f"{COMMON_KEYS} {EXTRA_KEYS[arch]}".split())
    prefix = "BaiChuan" if arch == "baichuan-7b" else "Baichuan"
    assert config["architectures"] == [f"{prefix}ForCausalLM"]
    assert config["auto_map"] == {
        "AutoConfig": f"configuration_baichuan.{prefix}Config",
        "AutoModelForCausalLM": f"modeling_baichuan.{prefix}ForCausalLM",
    }
    assert (config["hidden_size"], config["intermediate_size"], config["vocab_size"]) == (32, 86, 600)
    assert {config.get("max_position_embeddings", 512), config.get("model_max_length", 512)} == {512}


@pytest.mark.parametrize("arch", ARCHS)
def test_config_keys_are_those_of_the_original_code(golden_dir, arch):
    golden = read_json(golden_dir(arch, shared_only=True) / "checkpoint" / "config.json")
    sizes = {"hidden_size": 64, "intermediate_size": 172, "layers": 3, "heads": 4}
    config = script.model_config(arch, **sizes, vocab_size=512, model_max_length=128, dtype="float32")
    config.pop("norm_head", None)
    assert config == golden


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("vocab_size", [600, 64000, 125696])
def test_architecture_is_inferred_right_for_every_vocabulary(arch, vocab_size):
    sizes = {"hidden_size": 32, "intermediate_size": 86, "layers": 2, "heads": 4, "model_max_length": 64}
    official = script.model_config(arch, **sizes, vocab_size=vocab_size, dtype="float32")
    config = baichuan.BaichuanConfig(**official)
    assert config.norm_head is arch.startswith("baichuan2")
    assert config.position_embedding == ("rope" if arch.endswith("7b") else "alibi")
    # 官方大小的词表已经说明一切，不写自有键
    if vocab_size == script.ARCHITECTURES[arch].official_vocab_size:
        assert not {"norm_head", "position_embedding"} & set(official)


def test_generation_config(build):
    assert read_json(build("baichuan2-13b", "chat2", chat=True) / "generation_config.json") == {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "user_token_id": 195,
        "assistant_token_id": 196,
        "max_new_tokens": 2048,
        "temperature": 0.3,
        "top_k": 5,
        "top_p": 0.85,
        "repetition_penalty": 1.05,
        "do_sample": True,
        "transformers_version": "4.29.2",
    }
    assert read_json(build("baichuan-13b", "chat1", chat=True) / "generation_config.json")["repetition_penalty"] == 1.1
    assert read_json(build("baichuan-7b") / "generation_config.json") == {
        "_from_model_config": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "transformers_version": "4.29.1",
    }


def test_tokenizer_files_are_the_official_ones(build, shared_dir):
    path = build("baichuan2-7b")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert read_json(path / name) == read_json(shared_dir / "tokenizer" / "v2" / name)


# ---- 分词器 ----


@pytest.mark.parametrize("arch, roles", [("baichuan-13b", (102, 103)), ("baichuan2-13b", (106, 107))])
def test_piece_layout(build, arch, roles):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(build(arch) / "tokenizer.model"))
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    assert pieces[:7] == ["<unk>", "<s>", "</s>", "<SEP>", "<CLS>", "\n", "\t"]
    assert pieces[195:197] == [f"<reserved_{number}>" for number in roles]
    assert pieces[200:456] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id()) == (-1, 0, 1, 2)
    assert processor.encode("你好<reserved_106>")[-1] == (199 if arch == "baichuan-13b" else 195)


def test_normalisation_of_each_version(build):
    v1, v2 = (
        sentencepiece.SentencePieceProcessor(model_file=str(build(arch, arch) / "tokenizer.model"))
        for arch in ("baichuan-7b", "baichuan2-7b")
    )
    assert v2.decode(v2.encode("  Ａ  b ")) == "  Ａ  b "
    assert v1.decode(v1.encode("  Ａ  b ")) == "A b"
    assert v1.id_to_piece(v1.encode("，"))[0] == "\u2581"
    assert v2.id_to_piece(v2.encode("，")) == ["，"]
    assert v2.id_to_piece(v2.encode("2024")) == ["2", "0", "2", "4"]


@pytest.mark.parametrize("name, version", [("v1-reconstructed", 1), ("v2", 2)])
def test_user_pieces_are_the_official_ones(shared_dir, name, version):
    official = sentencepiece.SentencePieceProcessor(model_file=str(shared_dir / "tokenizer" / name / "tokenizer.model"))
    pieces = script.official_user_pieces(version)
    assert len(pieces) == {1: 390, 2: 1086}[version]
    assert pieces == official.id_to_piece(list(range(3, 3 + len(pieces))))
    assert official.id_to_piece(3 + len(pieces)) == "<0x00>"


def test_large_vocabulary_uses_the_whole_official_layout(build, capsys):
    path = build("baichuan2-7b", vocab_size=5000)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    assert processor.id_to_piece([195, 1088, 1089, 1344]) == ["<reserved_106>", "<reserved_999>", "<0x00>", "<0xFF>"]
    # 三行文本合并不出 5000 个片段：分词器变小，模型词表仍是 5000
    assert 1345 < processor.get_piece_size() < 5000
    assert read_json(path / "config.json")["vocab_size"] == 5000
    assert (
        f"分词器只有 {processor.get_piece_size()} 个片段，模型词表按 --vocab_size 补大到 5000"
        in capsys.readouterr().out
    )


def test_rare_characters_fall_back_to_bytes(tmp_path):
    # 三千个不同的字远多于小词表能容纳的数目
    chars = "".join(chr(0x4E00 + i) for i in range(3000))
    (tmp_path / "rare.txt").write_text(chars + "\n" + "你好" * 50, encoding="utf-8")
    lines = script.read_training_lines([tmp_path / "rare.txt"])
    content = script.train_tokenizer(2, 600, lines)
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    assert processor.get_piece_size() <= 600
    assert processor.id_to_piece(processor.encode("你")) == ["你"]
    assert processor.decode(processor.encode(chars)) == chars


def test_training_text_formats(tmp_path):
    row = {"instruction": "抽取", "input": "第一行\n第二行", "output": [["头", "尾"]], "id": 3}
    # 行分隔符 U+2028 是 JSON 字符串里的合法字符，不得当成换行
    lines_file, array_file, text_file = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.txt"
    lines_file.write_text(json.dumps(row, ensure_ascii=False) + "\n\n" + '{"x": "甲\u2028乙"}\n', encoding="utf-8")
    array_file.write_text(json.dumps([row]), encoding="utf-8-sig")
    text_file.write_text("纯\t文本\r\n" + "长" * 2001, encoding="utf-8")
    expected = ["抽取", "第一行", "第二行", "头", "尾"]
    assert script.read_training_lines([lines_file]) == [*expected, "甲\u2028乙"]
    assert script.read_training_lines([array_file]) == expected
    assert script.read_training_lines([text_file]) == ["纯", "文本", "长" * 2000, "长"]


def test_given_tokenizer_is_copied(build, text_file):
    source = build("baichuan2-7b", "source") / "tokenizer.model"
    path = build("baichuan2-13b", tokenizer_model=source, train_text=None, vocab_size=None)
    assert (path / "tokenizer.model").read_bytes() == source.read_bytes()
    num_pieces = sentencepiece.SentencePieceProcessor(model_file=str(source)).get_piece_size()
    assert read_json(path / "config.json")["vocab_size"] == num_pieces
    with pytest.raises(ValueError, match=rf"--vocab_size\(300\).* {num_pieces}"):
        build("baichuan2-13b", "other", tokenizer_model=source, train_text=None, vocab_size=300)
    with pytest.raises(ValueError, match="--tokenizer_model 与 --train_text 只能给一个"):
        build("baichuan2-13b", "other", tokenizer_model=source)


def test_official_tokenizer(shared_dir, build):
    model = shared_dir / "tokenizer" / "v2" / "tokenizer.model"
    options = {"tokenizer_model": model, "train_text": None, "vocab_size": None, "hidden_size": 8, "heads": 2}
    path = build("baichuan2-7b", layers=1, **options)
    config = read_json(path / "config.json")
    assert config["vocab_size"] == 125696
    assert "norm_head" not in config
    assert AutoConfig.from_pretrained(path).norm_head is True
    assert AutoTokenizer.from_pretrained(path).encode("你好") == [16829]


# ---- 权重 ----


def layer_names(layer, inv_freq=False):
    names = ["self_attn.W_pack.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.down_proj.weight"]
    names += ["mlp.up_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight"]
    names += ["self_attn.rotary_emb.inv_freq"] if inv_freq else []
    return [f"model.layers.{layer}.{name}" for name in names]


OUTER_NAMES = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize("arch", ARCHS)
def test_initialisation(build, arch):
    path = build(arch, hidden_size=64)
    tensors = load_file(path / "model.safetensors")
    assert sorted(tensors) == sorted([*OUTER_NAMES, *layer_names(0), *layer_names(1)])
    assert tensors["model.layers.0.self_attn.W_pack.weight"].shape == (192, 64)
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (64, 172)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        if "norm" in name:
            assert torch.equal(tensor, torch.ones(64))
        elif name == "lm_head.weight" and arch.startswith("baichuan2"):
            assert tensor.abs().max() <= 1 / math.sqrt(64)
            assert tensor.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.02)
        else:
            assert tensor[1:].std().item() == pytest.approx(0.02, rel=0.06)
    assert not tensors["model.embed_tokens.weight"][0].any()
    assert tensors["model.embed_tokens.weight"][1:].any(dim=1).all()


def test_bin_format_of_v1_7b_holds_inv_freq(build):
    path = build("baichuan-7b", format="bin", dtype="bfloat16")
    tensors = torch.load(path / "pytorch_model.bin", weights_only=True)
    assert sorted(tensors) == sorted([*OUTER_NAMES, *layer_names(0, True), *layer_names(1, True)])
    inv_freq = tensors["model.layers.1.self_attn.rotary_emb.inv_freq"]
    assert torch.equal(inv_freq, 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8)))
    assert {tensor.dtype for name, tensor in tensors.items() if "inv_freq" not in name} == {torch.bfloat16}
    other = torch.load(build("baichuan-13b", "13b", format="bin") / "pytorch_model.bin", weights_only=True)
    assert sorted(other) == sorted([*OUTER_NAMES, *layer_names(0), *layer_names(1)])


@pytest.mark.parametrize("format, stem", [("safetensors", "model"), ("bin", "pytorch_model")])
def test_shards(build, format, stem):
    suffix = "." + format
    whole = build("baichuan2-7b", "whole", format=format)
    sharded = build("baichuan2-7b", "sharded", format=format, max_shard_size="80KB")
    index = read_json(sharded / f"{stem}{suffix}.index.json")
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"{stem}-{n:05d}-of-{len(files):05d}{suffix}" for n in range(1, len(files) + 1)]
    assert len(files) > 2
    read = load_file if format == "safetensors" else lambda file: torch.load(file, weights_only=True)
    expected = read(whole / f"{stem}{suffix}")
    assert sorted(index["weight_map"]) == sorted(expected)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    for file in files:
        tensors = read(sharded / file)
        assert sorted(tensors) == sorted(name for name, place in index["weight_map"].items() if place == file)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_auto_classes_load_it(build, arch, format):
    path = build(arch, format=format, max_shard_size="100KB")
    model, loading = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    assert type(model) is baichuan.BaichuanForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert type(tokenizer) is baichuan.BaichuanTokenizer
    batch = tokenizer("故障原因：", return_tensors="pt")
    logits = model(**batch).logits
    assert logits.shape == (1, batch["input_ids"].shape[1], 600)
    assert logits.isfinite().all()


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_same_options_same_bytes(build, format):
    first, second = (build("baichuan-7b", name, format=format) for name in ("first", "second"))
    assert hashes(first) == hashes(second)
    other = hashes(build("baichuan-7b", "other", format=format, seed=1))
    assert [name for name, value in hashes(first).items() if value != other[name]] == [
        "model.safetensors" if format == "safetensors" else "pytorch_model.bin"
    ]


# ---- 错误与命令行 ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"arch": "baichuan3"}, r"--arch\(baichuan3\) 不认识，可选：baichuan-7b"),
        ({"layers": 0, "vocab_size": -5}, r"--layers\(0\) 必须是正整数；--vocab_size\(-5\) 必须是正整数"),
        ({"heads": 5}, r"--hidden_size\(32\) 必须能被 --heads\(5\) 整除"),
        ({"heads": 32}, "旋转位置要求每个头的宽度是偶数，现在是 1"),
        ({"vocab_size": 400}, r"--vocab_size\(400\) 太小，.*至少需要 520"),
        ({"dtype": "int8", "format": "gguf"}, r"--dtype\(int8\) 不认识.*；--format\(gguf\) 不认识"),
        ({"arch": "baichuan-7b", "chat": True}, "Baichuan-7B 只有基座模型"),
        ({"max_shard_size": "5XB"}, r"--max_shard_size\(5XB\) 的写法不对"),
        ({"train_text": ["没有.json"]}, "训练分词器的文本文件不存在：没有.json"),
        ({"train_text": None, "tokenizer_model": "没有.model"}, r"--tokenizer_model\(没有.model\) 不存在"),
        ({"train_text": None, "tokenizer_model": __file__}, "不是可用的 sentencepiece 模型"),
    ],
)
def test_bad_options(build, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(options.pop("arch", "baichuan2-7b"), **options)
    assert list(tmp_path.iterdir()) == []


def test_bad_training_text(tmp_path):
    (tmp_path / "bad.json").write_text('{"a": "好"}\n{"a": \n', encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    (tmp_path / "gbk.txt").write_bytes("你好".encode("gbk"))
    with pytest.raises(ValueError, match=r"bad.json:2: 不是合法的 JSON"):
        script.read_training_lines([tmp_path / "bad.json"])
    with pytest.raises(ValueError, match="里没有文字"):
        script.read_training_lines([tmp_path / "empty.txt"])
    with pytest.raises(ValueError, match="不是 UTF-8 文本"):
        script.read_training_lines([tmp_path / "gbk.txt"])


def test_missing_project_data(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"\*\.json.*--train_text"):
        script.default_training_files()


def test_existing_directory(build):
    path = build("baichuan2-7b")
    with pytest.raises(ValueError, match=r"config\.json 等 6 项.*--overwrite"):
        build("baichuan2-7b")
    build("baichuan2-7b", format="bin", overwrite=True)
    assert (path / "pytorch_model.bin").is_file() and not (path / "model.safetensors").exists()
    (path / "论文.docx").write_text("x")
    with pytest.raises(ValueError, match=r"论文\.docx"):
        build("baichuan2-7b", overwrite=True)
    assert (path / "论文.docx").is_file()


def test_nothing_half_written_is_left(build, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        build("baichuan2-7b")
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, text_file):
    command = [sys.executable, str(SCRIPT), "--arch", "baichuan2-7b", "--output_dir", "baichuan2-6B/", "--layers", "3"]
    command += ["--vocab_size", "600", "--train_text", str(text_file), "--dtype", "bfloat16", "--chat"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "已生成 baichuan2-6B：3 层，宽 64，词表 600，bfloat16" in done.stdout
    assert "user_token_id" in read_json(tmp_path / "baichuan2-6B" / "generation_config.json")
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "错误：--output_dir(" in again.stderr and "Traceback" not in again.stderr
