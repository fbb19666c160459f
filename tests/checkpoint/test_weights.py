"""权重的读写：片段读取等于切片；分片与索引同官方布局，读回逐位相同；索引不能指到目录之外。"""

import itertools
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from asserting import lacks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from baichuan import BaichuanForCausalLM
from finetune.checkpoint import weights
from finetune.checkpoint.base_model import checked_skeleton, load_base_model, load_config, load_tokenizer
from finetune.checkpoint.weights import (
    ShardedWriter,
    WeightFile,
    check_weights,
    gathered_tensors,
    load_weights,
    weight_files,
)
from finetune.export.export import export
from utils import read_json, write_json

SHAPES = [(7,), (4, 3), (5, 2, 3), (1, 9), (9, 1), (), (3, 0)]


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def weight_file(request, tmp_path_factory) -> WeightFile:
    path = tmp_path_factory.mktemp("weights") / f"model.{request.param}"
    tensors = {str(shape): torch.randn(shape) for shape in SHAPES}
    if request.param == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return WeightFile(path)


def tensors_of(count: int = 5, rows: int = 10, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}.weight": torch.randn(rows, 4, generator=generator).to(dtype) for i in range(count)}


def write(directory: Path, tensors: dict, max_shard_bytes: int) -> int:
    writer = ShardedWriter(directory, max_shard_bytes=max_shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return writer.close()


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ---- 读一个文件 ----


def test_names_shapes_and_whole_tensors(weight_file):
    assert weight_file.names == {str(shape) for shape in SHAPES}
    for shape in SHAPES:
        assert weight_file.shape(str(shape)) == shape
        assert weight_file.read(str(shape)).shape == shape


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.uint8, torch.bool])
def test_bytes_of_a_tensor(tmp_path, suffix, dtype):
    tensors, path = {"w": torch.zeros(3, 5).to(dtype)}, tmp_path / f"model.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    assert WeightFile(path).nbytes("w") == tensors["w"].nbytes


@settings(max_examples=200, deadline=None)
@given(shape=st.sampled_from([shape for shape in SHAPES if shape and 0 not in shape]), data=st.data())
def test_read_flat_is_a_slice(weight_file, shape, data):
    whole = weight_file.read(str(shape)).reshape(-1)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    found = weight_file.read_flat(str(shape), start, stop)
    assert found.shape == (stop - start,)
    assert torch.equal(found, whole[start:stop])


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 8])
def test_parts_of_all_ranks_make_the_whole(weight_file, shape, num_parts):
    """ZeRO-3 的切法：每段 ⌈n / 进程数⌉ 个元素，末段可短可空。"""
    whole = weight_file.read(str(shape)).reshape(-1)
    size = -(-whole.numel() // num_parts)
    cuts = [min(i * size, whole.numel()) for i in range(num_parts + 1)]
    parts = [weight_file.read_flat(str(shape), a, b) for a, b in itertools.pairwise(cuts) if b > a]
    assert torch.equal(torch.cat([torch.empty(0), *parts]), whole)


@pytest.mark.parametrize("zip_format", [True, False])
def test_bin_old_and_new_form(tmp_path, zip_format):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.arange(6.0).view(2, 3)}, path, _use_new_zipfile_serialization=zip_format)
    assert torch.equal(WeightFile(path).read_flat("w", 1, 5), torch.tensor([1.0, 2, 3, 4]))


def test_other_things_in_a_bin_are_not_tensors(tmp_path):
    torch.save({"w": torch.ones(2), "epoch": 3}, tmp_path / "pytorch_model.bin")
    assert WeightFile(tmp_path / "pytorch_model.bin").names == {"w"}


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), 3])
def test_a_bin_that_is_no_dictionary(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin（\d+ 字节）"):
        WeightFile(tmp_path / "pytorch_model.bin")


def test_a_safetensors_header_that_lies(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 400)
    with pytest.raises(ValueError, match=r"model\.safetensors（\d+ 字节）"):
        WeightFile(tmp_path / "model.safetensors")


# ---- 哪些文件 ----


def test_safetensors_come_before_bin_and_single_before_shards(tmp_path):
    for name in ("pytorch_model.bin", "a.bin", "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "a.bin"}}', encoding="utf-8")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert weight_files(tmp_path) == [tmp_path / "pytorch_model.bin"]
    (tmp_path / "pytorch_model.bin").unlink()
    assert weight_files(tmp_path) == [tmp_path / "a.bin"]


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "."])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_must_not_point_outside(tmp_path, index, outside):
    directory = tmp_path / "m"
    (directory / "sub").mkdir(parents=True)
    save_file({"w": torch.ones(1)}, tmp_path / "secret.safetensors")
    save_file({"w": torch.ones(1)}, directory / "sub" / "model.safetensors")
    save_file({"v": torch.ones(1)}, directory / "good.safetensors")
    weight_map = {"v": "good.safetensors", "w": outside}
    (directory / index).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"不是本目录下的文件名，拒绝读取") as caught:
        weight_files(directory)
    assert repr(outside) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", r"没有 weight_map，请重新下载这个文件"),
        ('{"weight_map": {}}', r"没有 weight_map"),
        ('{"weight_map": ["a"]}', r"没有 weight_map"),
        ("{", r"index\.json 不是合法的 JSON"),
        ("[]", r"index\.json"),
        ('{"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}', r"缺少权重分片 \['a\.safetensors', 'b\.saf"),
    ],
)
def test_a_broken_index(tmp_path, content, message):
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        weight_files(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, tensors_of(), max_shard_bytes=200)
    (tmp_path / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(ValueError) as caught:
        check_weights(tmp_path, {})
    assert lacks(str(caught.value), tmp_path, "['model-00002-of-00005.safetensors']") == []


def test_check_weights_needs_every_tensor_of_the_index(tmp_path):
    """索引里有、分片里却没有的张量，按缺少报告。"""
    write(tmp_path, tensors_of(2), max_shard_bytes=200)
    save_file({"other": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r" 1 .*\['layer\.1\.weight'\]；.* 1 .*\['other'\]"):
        check_weights(tmp_path, {name: (10, 4) for name in tensors_of(2)})


# ---- 写 ----


def test_one_shard_has_no_index(tmp_path):
    tensors = tensors_of()
    assert write(tmp_path, tensors, max_shard_bytes=10**6) == 5
    assert names_in(tmp_path) == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_shards_and_index_have_the_official_layout(tmp_path):
    tensors = tensors_of()  # 各 160 字节
    assert write(tmp_path, tensors, max_shard_bytes=320) == 5
    shards = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names_in(tmp_path) == [*shards, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index == {
        "metadata": {"total_size": 800},
        "weight_map": {f"layer.{i}.weight": shards[i // 2] for i in range(5)},
    }
    assert weight_files(tmp_path) == [tmp_path / shard for shard in shards]
    for shard in shards:
        with open(tmp_path / shard, "rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        assert header["__metadata__"] == {"format": "pt"}  # transformers 不认没有它的文件


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    limit=st.integers(1, 200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shard_size_reads_back_bit_for_bit(tmp_path_factory, sizes, limit, dtype):
    directory = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": torch.randn(size).to(dtype) for i, size in enumerate(sizes)}
    assert write(directory, tensors, limit) == len(sizes)
    found = {}
    for path in weight_files(directory):
        shard = load_file(path)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= limit
        found |= shard
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_in_parts_and_more_names_than_a_header_holds(tmp_path):
    whole = torch.randn(7, 4).bfloat16()
    writer = ShardedWriter(tmp_path)
    writer.add("parts", *whole.split(3))
    names = [f"{'x' * 150}{i}" for i in range(400)]  # 一个约 250 字节，一片的文件头放不下
    for name in names:
        writer.add(name, torch.tensor(len(name)))
    assert writer.close() == 401
    files = weight_files(tmp_path)
    assert len(files) == 2 and torch.equal(load_file(files[0])["parts"], whole)
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert found.keys() == {"parts", *names} and all(found[name] == len(name) for name in names)


def test_a_view_is_written_as_its_own_tensor(tmp_path):
    whole = torch.randn(6, 4)
    write(tmp_path, {"a": whole.t(), "b": whole[2:4].clone()}, 10**6)
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["a"], whole.t())
    assert torch.equal(found["b"], whole[2:4])


def test_written_model_is_read_by_transformers_and_by_us(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("baichuan2-13b", layers=2, hidden_size=32)
    model = BaichuanForCausalLM.from_pretrained(source, dtype=torch.float32)
    write(tmp_path, dict(model.named_parameters()), max_shard_bytes=50_000)
    model.config.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    ours = BaichuanForCausalLM(model.config)
    load_weights(ours, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert torch.equal(ours.state_dict()[name], tensor)


# ---- ZeRO-3 的一段 ----


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_rank_reads_only_its_part(tmp_path, monkeypatch, num_ranks):
    """DeepSpeed 的切分：第 r 个进程持有展平后的 [r·k, (r+1)·k)，尾部补零；这里不用启动进程就能看各段。"""
    tensors = {"weight": torch.randn(5, 3), "bias": torch.randn(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    parts: dict[str, list] = {"weight": [], "bias": []}
    for rank in range(num_ranks):
        model = torch.nn.Linear(3, 5)
        for name, parameter in model.named_parameters():
            size = -(-tensors[name].numel() // num_ranks)
            parameter.ds_tensor, parameter.ds_numel = torch.full((size,), torch.nan), tensors[name].numel()
        monkeypatch.setattr(weights, "global_rank", lambda rank=rank: rank)
        load_weights(model, tmp_path)
        for name, parameter in model.named_parameters():
            parts[name].append(parameter.ds_tensor)
    for name, whole in tensors.items():
        flat = torch.cat(parts[name])
        assert torch.equal(flat[: whole.numel()], whole.reshape(-1))
        assert not flat[whole.numel() :].any()


def test_gathered_tensors_are_copies_on_rank_0(monkeypatch):
    model = torch.nn.Linear(3, 2)
    found = dict(gathered_tensors(model.named_parameters()))
    assert list(found) == ["weight", "bias"]
    assert torch.equal(found["weight"], model.weight)
    found["weight"].zero_()
    assert model.weight.any()
    monkeypatch.setattr(weights, "global_rank", lambda: 1)
    assert list(gathered_tensors(model.named_parameters())) == [("weight", None), ("bias", None)]


# ---- 量化过的检查点 ----

# W_pack.weight 换成的张量：{名字的结尾: 类型}
QUANTIZED_LAYOUTS = {
    "official-4bits": {"weight.data": torch.uint8, "weight.quant_state": torch.float32},
    "gptq": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.half},
    "int8": {"weight": torch.int8},
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("layout", QUANTIZED_LAYOUTS)
def test_quantized_weights_are_refused_in_one_sentence(tiny_checkpoint, tmp_path, layout, suffix):
    base = Path(shutil.copytree(tiny_checkpoint("baichuan2-7b"), tmp_path / "base"))
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        stem = name.removesuffix("weight")
        parts = QUANTIZED_LAYOUTS[layout] if stem.endswith("W_pack.") else {name.removeprefix(stem): tensor.dtype}
        tensors |= {stem + part: tensor.to(dtype).clone() for part, dtype in parts.items()}
    (base / "model.safetensors").unlink()
    if suffix == "bin":
        torch.save(tensors, base / "pytorch_model.bin")
    else:
        save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"量化过的权重（model\.layers\.0.*W_pack.*--load_in_4bit") as error:
        checked_skeleton(base, load_config(base))
    assert "\n" not in str(error.value)
    assert "重新下载" not in str(error.value)


def test_a_leftover_quantization_config_is_said_and_not_written_on(tiny_checkpoint, tmp_path, capsys):
    base = Path(shutil.copytree(tiny_checkpoint("baichuan2-7b"), tmp_path / "base"))
    settings = {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
    write_json(base / "config.json", {**read_json(base / "config.json"), "quantization_config": settings})
    config = load_config(base)
    assert capsys.readouterr().err.count("quantization_config") == 1
    load_base_model(base, config, torch.float32, torch.device("cpu")).config.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in read_json(tmp_path / "saved" / "config.json")
    export(base, "baichuan", tmp_path / "exported")
    assert "quantization_config" not in read_json(tmp_path / "exported" / "config.json")


# ---- 别的训练器存下的名字与设置 ----


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_wrapped_names_are_read(tiny_checkpoint, tmp_path, prefix, suffix):
    source = tiny_checkpoint("baichuan2-7b")
    base = Path(shutil.copytree(source, tmp_path / "base"))
    tensors = {prefix + name: tensor for name, tensor in load_file(source / "model.safetensors").items()}
    (base / "model.safetensors").unlink()
    if suffix == "bin":
        torch.save(tensors, base / "pytorch_model.bin")
    else:
        save_file(tensors, base / "model.safetensors")
    model, expected = (
        load_base_model(path, load_config(path), torch.float32, torch.device("cpu")) for path in (base, source)
    )
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    export(base, "baichuan", tmp_path / "exported")
    assert load_file(tmp_path / "exported" / "model.safetensors").keys() == dict(expected.named_parameters()).keys()


def test_the_same_tensor_twice_is_refused(tiny_checkpoint, tmp_path):
    base = Path(shutil.copytree(tiny_checkpoint("baichuan2-7b"), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["module.lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"module\.lm_head\.weight.*同一个张量"):
        checked_skeleton(base, load_config(base))


def test_auto_map_with_a_repository_is_not_followed(tiny_checkpoint, tmp_path):
    base = Path(shutil.copytree(tiny_checkpoint("baichuan2-7b"), tmp_path / "base"))
    for name, value in {
        "config.json": {"AutoConfig": "owner/repo--configuration_baichuan.BaichuanConfig"},
        "tokenizer_config.json": {"AutoTokenizer": ["owner/repo--tokenization_baichuan.BaichuanTokenizer", None]},
    }.items():
        write_json(base / name, {**read_json(base / name), "auto_map": value})
    config = load_config(base)
    load_tokenizer(base, config.vocab_size).save_pretrained(tmp_path / "saved")
    load_base_model(base, config, torch.float32, torch.device("cpu")).config.save_pretrained(tmp_path / "saved")
    export(base, "baichuan", tmp_path / "exported")
    for name in ("saved/config.json", "saved/tokenizer_config.json", "exported/config.json"):
        assert "auto_map" not in read_json(tmp_path / name)


# config.json 里的一项 → 拒绝时指出的名字；None 为照常读
ODD_SETTINGS = [
    ({"gradient_checkpointing": [False], "_from_model_config": True, "transformers_version": "4.29.2"}, None),
    ({"pad_token_id": None, "eos_token_id": [2], "use_cache": False, "torch_dtype": None}, None),
    ({"num_key_value_heads": 4, "rope_theta": 10000.0, "rope_scaling": None}, None),
    ({"num_key_value_heads": 2}, "num_key_value_heads"),
    ({"rope_theta": 500000.0}, "rope_theta"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"torch_dtype": "auto"}, "torch_dtype"),
    ({"z_loss_weight": None}, "z_loss_weight"),
    ({"output_attentions": True}, "output_attentions"),
]


@pytest.mark.parametrize(("settings", "name"), ODD_SETTINGS, ids=str)
def test_odd_settings_are_read_or_refused_by_name(tiny_checkpoint, tmp_path, settings, name):
    base = Path(shutil.copytree(tiny_checkpoint("baichuan2-7b"), tmp_path / "base"))
    write_json(base / "config.json", {**read_json(base / "config.json"), **settings})
    if name is not None:
        with pytest.raises(ValueError, match=name):
            load_config(base)
        return
    load_base_model(base, load_config(base), torch.float32, torch.device("cpu"))
