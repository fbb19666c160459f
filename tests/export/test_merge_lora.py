"""scripts/merge_lora.py：合并后的 logits 与适配器相同，只舍入一次，出错时什么都不留下。"""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from trained_checkpoints import ARCHITECTURES, train_without_deepspeed

from baichuan import BaichuanForCausalLM
from finetune.checkpoint.inspection import inspect_checkpoint, load_checkpoint_model
from finetune.checkpoint.manifest import verify_checkpoint
from finetune.export import tensors
from scripts import merge_lora as script
from utils import read_json, write_json

LINEAR = ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[5, 300, 77, 1200, 9, 640]])


def logits_of(path):
    model = load_checkpoint_model(inspect_checkpoint(path), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("targets", [("W_pack",), tuple(LINEAR)], ids=["W_pack", "all-linear"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_merged_logits_equal_the_adapters(trained, tiny_checkpoint, tmp_path, arch, targets):
    checkpoint = trained(arch, "lora", targets=targets)
    comparison = script.merge_lora(checkpoint, tmp_path / "merged")
    assert comparison.max_difference < 1e-4
    assert comparison.agreement == 1.0
    base = BaichuanForCausalLM.from_pretrained(tiny_checkpoint(arch), dtype=torch.float32).eval()
    with torch.no_grad():
        base_logits = base(IDS).logits.clone()
        expected = PeftModel.from_pretrained(base, checkpoint).eval()(IDS).logits
    actual = logits_of(tmp_path / "merged")
    assert (actual - expected).abs().max() < 1e-4
    assert (base_logits - expected).abs().max() > 1e-2
    assert verify_checkpoint(tmp_path / "merged") == []


def test_files_and_loading_with_the_package(trained, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("baichuan2-7b", chat=True, max_shard_size="300KB")
    script.merge_lora(trained("baichuan2-7b", "lora", chat=True, max_shard_size="300KB"), tmp_path / "merged")
    merged = tmp_path / "merged"
    assert sorted(path.name for path in merged.iterdir()) == [
        "config.json", "generation_config.json", "manifest.json", "model.safetensors", "run_config.json",
        "special_tokens_map.json", "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    for name in ("generation_config.json", "special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    config, original = read_json(merged / "config.json"), read_json(base / "config.json")
    original.pop("auto_map")  # 目录里没有官方代码
    assert config == {**original, "position_embedding": "rope", "norm_head": True}
    checkpoint = inspect_checkpoint(merged)
    assert not checkpoint.is_adapter
    assert checkpoint.prompting == ("chat", "baichuan2", 195, 196, None)
    assert checkpoint.run_config["merged_from"].endswith("epoch-1-step-3")
    unchanged = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(merged / "model.safetensors")
    assert torch.equal(tensors[unchanged], BaichuanForCausalLM.from_pretrained(base).state_dict()[unchanged])


@pytest.mark.parametrize(
    ("requested", "expected"), [("auto", "bfloat16"), ("float16", "float16"), ("float32", "float32")]
)
def test_dtype_is_rounded_once(tiny_checkpoint, tmp_path, requested, expected):
    base = tiny_checkpoint("baichuan2-7b", dtype="bfloat16")
    checkpoint = train_without_deepspeed(base, tmp_path / "output" / "epoch-1-step-3", "lora")
    script.merge_lora(checkpoint, tmp_path / "merged", dtype=requested)
    name = "model.layers.2.self_attn.W_pack.weight"
    merged = load_file(tmp_path / "merged" / "model.safetensors")[name]
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    lora_a, lora_b = (adapter[f"base_model.model.{name.removesuffix('weight')}lora_{side}.weight"] for side in "AB")
    weight = load_file(base / "model.safetensors")[name].float()
    dtype = getattr(torch, expected)
    assert merged.dtype == dtype
    assert torch.equal(merged, torch.addmm(weight, lora_b, lora_a, alpha=30 / 4).to(dtype))
    assert read_json(tmp_path / "merged" / "config.json")["torch_dtype"] == expected


def test_small_shards_are_indexed(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "MAX_SHARD_BYTES", 300_000)
    script.merge_lora(trained("baichuan-13b", "lora"), tmp_path / "merged")
    names = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert torch.isfinite(logits_of(tmp_path / "merged")).all()


# ---- 用法错误 ----


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_full_checkpoints_have_nothing_to_merge(trained, tmp_path, method):
    with pytest.raises(ValueError, match=rf"是{method} .*scripts/export\.py"):
        script.merge_lora(trained("baichuan2-7b", method), tmp_path / "merged")


def test_base_model_has_nothing_to_merge(tiny_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="是完整模型，没有适配器可以合并"):
        script.merge_lora(tiny_checkpoint("baichuan-7b"), tmp_path / "merged")


def test_ptuning_is_refused_with_the_reason(trained, tmp_path):
    with pytest.raises(ValueError, match=r"PREFIX_TUNING.*predict\.py.*lora"):
        script.merge_lora(trained("baichuan2-7b", "ptuning"), tmp_path / "merged")


def test_moved_and_other_base(trained, tiny_checkpoint, tmp_path):
    checkpoint = Path(shutil.copytree(trained("baichuan2-7b", "lora"), tmp_path / "epoch-1-step-3"))
    run_config = read_json(checkpoint / "run_config.json")
    run_config["base_model"]["absolute_path"] = "also-gone/"
    write_json(checkpoint / "run_config.json", run_config)
    adapter_config = read_json(checkpoint / "adapter_config.json")
    write_json(checkpoint / "adapter_config.json", {**adapter_config, "base_model_name_or_path": None})
    with pytest.raises(ValueError, match="请用 --base_model_path 给出新位置"):
        script.merge_lora(checkpoint, tmp_path / "merged")
    with pytest.raises(ValueError, match=r"不是同一个：model\.safetensors（内容不同）"):
        script.merge_lora(checkpoint, tmp_path / "merged", tiny_checkpoint("baichuan2-7b", seed=7))
    script.merge_lora(checkpoint, tmp_path / "merged", tiny_checkpoint("baichuan2-7b"))
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_output_dir_is_never_overwritten(trained, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="已有内容，不会覆盖，请换一个目录"):
        script.merge_lora(trained("baichuan2-7b", "lora"), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_adapter_settings_outside_the_formula_are_refused(trained, tmp_path):
    checkpoint = Path(shutil.copytree(trained("baichuan2-7b", "lora"), tmp_path / "epoch-1-step-3"))
    config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    write_json(checkpoint / "adapter_config.json", {**config, "init_lora_weights": "pissa"})
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        script.merge_lora(checkpoint, tmp_path / "merged")
    write_json(checkpoint / "adapter_config.json", {**config, "r": 8})
    with pytest.raises(ValueError, match=r"lora_A\.weight 的形状是 \(4, 64\)，应为 \(8, 64\)"):
        script.merge_lora(checkpoint, tmp_path / "merged")


def test_nan_leaves_nothing(trained, tiny_checkpoint, tmp_path):
    checkpoint = Path(shutil.copytree(trained("baichuan2-7b", "lora"), tmp_path / "epoch-1-step-3"))
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    next(iter(adapter.values()))[0, 0] = float("nan")
    save_file(adapter, checkpoint / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="来源就有 NaN"):
        script.merge_lora(checkpoint, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-1-step-3"]


# ---- 命令行 ----


def test_command_line(trained, tmp_path, capsys):
    checkpoint = trained("baichuan2-7b", "lora")
    arguments = ["--model_path", str(checkpoint), "--output_dir", str(tmp_path / "merged")]
    assert script.main([*arguments, "--check_prompt", "你好", "发动机故障"]) == 0
    output = capsys.readouterr().out
    assert "核对（" in output
    assert "贪心 token 相同 100.0%" in output
    assert script.main(arguments) == 2
    assert "错误：\n--output_dir" in capsys.readouterr().err


def test_full_disk_leaves_nothing(trained, tmp_path, capsys):
    checkpoint = trained("baichuan2-7b", "lora")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code = script.main(["--model_path", str(checkpoint), "--output_dir", str(tmp_path / "merged")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert "请检查磁盘空间与权限" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
