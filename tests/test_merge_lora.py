"""scripts/merge_lora.py：合并后的 logits 与适配器相同，只舍入一次，出错时什么都不留下。"""

import importlib.util
import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from baichuan import BaichuanForCausalLM
from checkpoint import file_sha256, verify_checkpoint
from loading import inspect_checkpoint, load_checkpoint_model
from utils import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("baichuan-7b", "baichuan-13b", "baichuan2-7b", "baichuan2-13b")
LINEAR = ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[5, 300, 77, 1200, 9, 640]])


def load_script(name):
    """按文件载入 scripts/ 下的脚本。"""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return module


script = load_script("merge_lora")


def train_without_deepspeed(base: Path, path: Path, method: str, dtype=torch.float32, targets=("W_pack",)) -> Path:
    """train.py 布局的检查点，权重是随机改动过的：full、freeze 是完整模型，lora、ptuning 是适配器。"""
    torch.manual_seed(0)
    model = BaichuanForCausalLM.from_pretrained(base, dtype=dtype)
    if method in ("full", "freeze"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if method == "full" or "layers.1." in name:
                    parameter += 0.02 * torch.randn_like(parameter)
    elif method == "lora":
        config = LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=30, target_modules=list(targets), init_lora_weights=False
        )
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(0.2)
    else:
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model.save_pretrained(path)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(base / name, path / name)
    prompting = inspect_checkpoint(base).prompting
    run_config = {
        "args": {"train_path": "data/spo_0.json", "learning_rate": 0.0002},
        "train_type": method,
        **prompting._asdict(),
        "base_model": {
            "path": "gone/",
            "absolute_path": str(base),
            "hashes": {file.name: file_sha256(file) for file in sorted(base.iterdir())},
        },
        "data": {"data/spo_0.json": "ab" * 32},
        "epoch": 1,
        "global_step": 3,
    }
    write_json(path / "run_config.json", run_config)
    return path


@pytest.fixture(scope="session")
def trained(tiny_checkpoint, tmp_path_factory):
    """返回 `trained(arch, method, targets=…, **tiny 的选项) -> Path`；同样的参数只做一次，勿改写。"""
    made = {}

    def make(arch, method, targets=("W_pack",), **options):
        key = (arch, method, targets, *sorted(options.items()))
        if key not in made:
            path = tmp_path_factory.mktemp("trained") / "output" / "epoch-1-step-3"
            made[key] = train_without_deepspeed(tiny_checkpoint(arch, **options), path, method, targets=targets)
        return made[key]

    return make


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
    assert checkpoint.prompting == ("chat", "baichuan2", 195, 196)
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
    monkeypatch.setattr(sys.modules["export_source"], "MAX_SHARD_BYTES", 300_000)
    script.merge_lora(trained("baichuan-13b", "lora"), tmp_path / "merged")
    names = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert torch.isfinite(logits_of(tmp_path / "merged")).all()


# ---- 用法错误 ----


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_full_checkpoints_have_nothing_to_merge(trained, tmp_path, method):
    with pytest.raises(ValueError, match=rf"是{method} 训练出的完整模型，没有适配器可以合并.*scripts/export\.py"):
        script.merge_lora(trained("baichuan2-7b", method), tmp_path / "merged")


def test_base_model_has_nothing_to_merge(tiny_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="是完整模型，没有适配器可以合并"):
        script.merge_lora(tiny_checkpoint("baichuan-7b"), tmp_path / "merged")


def test_ptuning_is_refused_with_the_reason(trained, tmp_path):
    with pytest.raises(ValueError, match=r"P-Tuning 检查点（PREFIX_TUNING）.*没有可以合并的矩阵。.*predict\.py.*lora"):
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
    write_json(checkpoint / "adapter_config.json", {**config, "use_dora": True})
    with pytest.raises(ValueError, match="use_dora=True 不是本项目训练出的设置，不能合并"):
        script.merge_lora(checkpoint, tmp_path / "merged")
    write_json(checkpoint / "adapter_config.json", {**config, "r": 8})
    with pytest.raises(ValueError, match="秩 8 不相配"):
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
    assert "核对（未合并的适配器对合并后的检查点）：" in output
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
