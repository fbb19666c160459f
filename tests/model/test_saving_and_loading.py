"""保存与加载：官方的名字与两种格式，坏了的权重，不执行检查点里的代码。"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_models import (
    CASES,
    LOGITS_ATOL,
    assert_close,
    load_golden,
    load_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer

# transformers 5.23 起把 gradient_checkpointing_enable 改了名，5.17 只有旧名
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def raw_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors":
            tensors.update(load_file(path))
        elif path.suffix == ".bin":
            tensors.update(torch.load(path, weights_only=True, map_location="cpu"))
    return tensors


def write_checkpoint(source: Path, target: Path, tensors: dict, form: str = "safetensors") -> Path:
    target.mkdir(parents=True)
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(source / name, target / name)
    if form == "bin":
        torch.save(tensors, target / "pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


@torch.no_grad()
@pytest.mark.parametrize("form", ["checkpoint", "checkpoint-safetensors"])
def test_both_published_forms_load_alike(golden_dir, form):
    for case in CASES:
        golden = load_golden(golden_dir(case, shared_only=True))
        model = load_model(golden, checkpoint=golden.directory / form).eval()
        logits = model(input_ids=golden.tensors["full.input_ids"]).logits
        assert_close(logits, golden.tensors["full.eval_logits"], LOGITS_ATOL)


@torch.no_grad()
def test_save_pretrained_writes_official_names_and_loads_equal(architecture, tmp_path):
    model = load_model(architecture).eval()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    official = {k: v for k, v in raw_tensors(architecture.checkpoint).items() if not k.endswith("rotary_emb.inv_freq")}
    assert saved.keys() - {k for k in saved if k.endswith("rotary_emb.inv_freq")} == official.keys()
    for name, tensor in official.items():
        assert torch.equal(saved[name], tensor), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = architecture.tensors["full.input_ids"]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@torch.no_grad()
def test_sharded_save_loads_equal(architecture, tmp_path):
    model = load_model(architecture).eval()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = architecture.tensors["full.input_ids"]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("present", [True, False], ids=["present", "absent"])
def test_stored_inv_freq_present_or_absent(golden_dir, tmp_path, form, present):
    golden = load_golden(golden_dir("baichuan-7b"))
    tensors = raw_tensors(golden.checkpoint)
    assert sum(name.endswith("rotary_emb.inv_freq") for name in tensors) == 3
    if not present:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}
    checkpoint = write_checkpoint(golden.checkpoint, tmp_path / "checkpoint", tensors, form)
    logits = load_model(golden, checkpoint=checkpoint).eval()(input_ids=golden.tensors["full.input_ids"]).logits
    assert_close(logits, golden.tensors["full.eval_logits"], LOGITS_ATOL)


@torch.no_grad()
@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_position_tables_survive_the_meta_device(architecture, way):
    config = AutoConfig.from_pretrained(architecture.checkpoint, norm_head=architecture.norm_head)
    tensors = {k: v for k, v in raw_tensors(architecture.checkpoint).items() if not k.endswith("rotary_emb.inv_freq")}
    with torch.device("meta"):
        model = BaichuanForCausalLM(config)
    if way == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(tensors, strict=False, assign=way == "assign")
    assert not any(parameter.is_meta for parameter in model.parameters())
    model.eval()
    full = model(input_ids=architecture.tensors["full.input_ids"]).logits
    assert_close(full, architecture.tensors["full.eval_logits"], LOGITS_ATOL)
    long = model(input_ids=architecture.tensors["long.input_ids"]).logits[:, -2:]
    assert_close(long, architecture.tensors["long.eval_last_logits"], LOGITS_ATOL)


def test_a_missing_tensor_is_an_error(architecture, tmp_path):
    tensors = raw_tensors(architecture.checkpoint)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    checkpoint = write_checkpoint(architecture.checkpoint, tmp_path / "checkpoint", tensors)
    with pytest.raises((ValueError, RuntimeError), match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(architecture, checkpoint=checkpoint)


def test_an_unknown_tensor_is_an_error(architecture, tmp_path):
    tensors = raw_tensors(architecture.checkpoint)
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(4, 4)
    checkpoint = write_checkpoint(architecture.checkpoint, tmp_path / "checkpoint", tensors)
    with pytest.raises((ValueError, RuntimeError), match=r"model\.layers\.1\.self_attn\.q_proj\.weight"):
        load_model(architecture, checkpoint=checkpoint)


def test_a_wrong_shape_is_an_error(architecture, tmp_path):
    tensors = raw_tensors(architecture.checkpoint)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    checkpoint = write_checkpoint(architecture.checkpoint, tmp_path / "checkpoint", tensors)
    with pytest.raises((ValueError, RuntimeError), match=r"lm_head\.weight|size mismatch|mismatch"):
        load_model(architecture, checkpoint=checkpoint)


def test_a_missing_shard_is_an_error(golden_dir, tmp_path):
    golden = load_golden(golden_dir("baichuan-13b-oddheads"))
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(golden.checkpoint, checkpoint)
    shard = sorted(path for path in checkpoint.iterdir() if path.suffix in (".bin", ".safetensors"))[-1]
    shard.unlink()
    with pytest.raises((OSError, ValueError), match=shard.name):
        load_model(golden, checkpoint=checkpoint)


def test_bin_files_are_read_without_unpickling_objects(golden_dir, tmp_path):
    """pytorch_model.bin 里的任意对象（此处会写出一个标记文件）不得被还原。"""
    golden = load_golden(golden_dir("baichuan-7b"))
    marker = tmp_path / "executed"

    class Planted:
        def __reduce__(self):
            return (Path.touch, (marker,))

    tensors = {**raw_tensors(golden.checkpoint), "planted": Planted()}
    checkpoint = write_checkpoint(golden.checkpoint, tmp_path / "checkpoint", tensors, "bin")
    with pytest.raises(Exception, match=r"weights_only|Unsupported|Weights only|pickle"):
        load_model(golden, checkpoint=checkpoint)
    assert not marker.exists()


def plant_code(checkpoint: Path, marker: Path) -> None:
    code = (
        f"open({str(marker)!r}, 'w').close()\n"
        "class BaichuanConfig: pass\nclass BaichuanForCausalLM: pass\nclass BaichuanTokenizer: pass\n"
    )
    for kind in ("configuration", "modeling", "tokenization"):
        (checkpoint / f"{kind}_baichuan.py").write_text(code, encoding="utf-8")
    auto_map = {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        "AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None],
    }
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        (checkpoint / name).write_text(json.dumps({**content, "auto_map": auto_map}), encoding="utf-8")


@pytest.mark.parametrize("arch", ["baichuan-7b", "baichuan-13b", "baichuan2-7b", "baichuan2-13b"])
def test_code_in_a_checkpoint_is_never_executed(tiny_checkpoint, tmp_path, arch):
    checkpoint, marker = tmp_path / "checkpoint", tmp_path / "executed"
    shutil.copytree(tiny_checkpoint(arch), checkpoint)
    plant_code(checkpoint, marker)
    assert type(AutoConfig.from_pretrained(checkpoint)) is BaichuanConfig
    assert type(AutoModelForCausalLM.from_pretrained(checkpoint)) is BaichuanForCausalLM
    assert type(AutoTokenizer.from_pretrained(checkpoint)) is BaichuanTokenizer
    assert not marker.exists()


def test_code_in_a_checkpoint_is_mentioned_once(tiny_checkpoint, tmp_path):
    """目录里有代码时说一次：在新进程里看标准错误，两次加载只有一行。"""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("baichuan2-7b"), checkpoint)
    plant_code(checkpoint, tmp_path / "executed")
    program = (
        "import sys\n"
        "from baichuan import BaichuanForCausalLM, BaichuanTokenizer\n"
        "for _ in range(2):\n"
        "    BaichuanTokenizer.from_pretrained(sys.argv[1]); BaichuanForCausalLM.from_pretrained(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(checkpoint)], capture_output=True, text=True, check=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "modeling_baichuan.py" in line]
    assert len(lines) == 1
    assert "不会执行" in lines[0]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("norm_head", [False, True])
@pytest.mark.parametrize("position_embedding", ["rope", "alibi"])
def test_weights_from_scratch(position_embedding, norm_head):
    """13B 的官方代码不初始化 RMSNorm（值可达 1e28）；这里从头建的模型必须可训练。"""
    torch.manual_seed(0)
    config = BaichuanConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        model_max_length=64,
        position_embedding=position_embedding,
        norm_head=norm_head,
    )
    model = BaichuanForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert parameter.eq(1).all(), name
        elif name == "lm_head.weight" and norm_head:
            bound = 64**-0.5  # kaiming_uniform(a=sqrt(5))
            assert parameter.abs().max().item() <= bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
    assert model.model.embed_tokens.weight[0].eq(0).all()
    assert model(input_ids=torch.tensor([[1, 5, 9]]), labels=torch.tensor([[1, 5, 9]])).loss.isfinite()
