"""适配器的张量恰好是配置在基座上要的那些：预测、合并、导出与 --adapter_path 用同一个核对，否则拒绝。"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from baichuan import BaichuanForCausalLM
from finetune.checkpoint.adapter import canonical_name, check_second_stage
from finetune.checkpoint.inspection import inspect_checkpoint, load_checkpoint_model
from finetune.export.tensors import TensorSource, open_checkpoint
from finetune.methods.lora import LoraOptions, apply_lora
from scripts.merge_lora import main as merge_main
from utils import read_json, write_json

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 300, 77, 1200, 9, 640]])
KEY = "base_model.model.model.layers.{}.self_attn.W_pack.lora_{}.weight"


@pytest.fixture
def base(tiny_checkpoint) -> Path:
    return tiny_checkpoint("baichuan2-7b")


def write_adapter(base: Path, path: Path, config=None, **settings) -> Path:
    """由 peft 自己写出的适配器，没有 run_config.json，值都不为零。"""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["W_pack"], "init_lora_weights": False, **settings}
    config = config or LoraConfig(task_type="CAUSAL_LM", **settings)
    model = get_peft_model(BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    write_json(path / "adapter_config.json", {**read_json(path / "adapter_config.json"), "base_model_name_or_path": ""})
    return path


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, adapter).eval()(IDS).logits


def our_logits(base: Path, adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_checkpoint_model(inspect_checkpoint(adapter, base), torch.float32, CPU)(IDS).logits


def rename(adapter: Path, change) -> Path:
    file = adapter / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)
    return adapter


def refuse(base: Path, adapter: Path, *parts: str):
    """预测、合并与第二阶段都拒绝，说明里有 parts。"""
    skeleton = BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = LoraOptions(lora_dim=4, lora_alpha=16)
    attempts = [
        lambda: inspect_checkpoint(adapter, base),
        lambda: open_checkpoint(adapter, base),
        lambda: check_second_stage(adapter, apply_lora(skeleton, options)),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError) as error:
            attempt()
        assert all(part in str(error.value) for part in parts), error.value


# ---- 张量 ----


def test_an_adapter_without_tensors_is_refused(base, tmp_path, capsys):
    adapter = write_adapter(base, tmp_path / "adapter")
    save_file({}, adapter / "adapter_model.safetensors")
    refuse(base, adapter, "缺少 8 个（共 8 个）", KEY.format(0, "A"), KEY.format(0, "B"))
    arguments = ["--model_path", str(adapter), "--base_model_path", str(base), "--output_dir", str(tmp_path / "out")]
    assert merge_main(arguments) == 2
    assert "缺少 8 个（共 8 个）" in capsys.readouterr().err


def test_missing_and_extra_tensors_are_counted(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter")
    rename(adapter, lambda name: name.replace("layers.3.", "layers.9."))
    refuse(base, adapter, "缺少 2 个（共 8 个）", "多出 2 个", KEY.format(9, "A"))


def test_an_adapter_of_a_shallower_model_is_refused(tiny_checkpoint, tmp_path):
    adapter = write_adapter(tiny_checkpoint("baichuan2-7b", layers=2), tmp_path / "adapter")
    refuse(tiny_checkpoint("baichuan2-7b"), adapter, "缺少 4 个（共 8 个）", KEY.format(2, "A"))


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.removeprefix("base_model.model."),
    ],
)
def test_wrapped_names_are_understood(base, tmp_path, change):
    adapter = write_adapter(base, tmp_path / "adapter")
    expected = peft_logits(base, adapter)
    rename(adapter, change)
    assert torch.equal(our_logits(base, adapter), expected)
    assert len(TensorSource(open_checkpoint(adapter, base)).lora) == 4


def test_two_names_for_one_tensor_are_refused(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "module." + KEY.format(0, "A"): tensors[KEY.format(0, "A")].clone()}, file)
    refuse(base, adapter, "module." + KEY.format(0, "A"), "同一个张量")


def test_canonical_name_leaves_module_names_alone():
    assert canonical_name(KEY.format(0, "A")) == KEY.format(0, "A")
    assert canonical_name("prompt_embeddings") == "prompt_embeddings"
    assert (
        canonical_name("base_model.model.lm_head.modules_to_save.default.weight") == "base_model.model.lm_head.weight"
    )


def test_adapter_model_bin_is_read(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter")
    expected = our_logits(base, adapter)
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    assert torch.equal(our_logits(base, adapter), expected)
    assert len(TensorSource(open_checkpoint(adapter, base)).lora) == 4


def test_adapter_model_bin_runs_no_code(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()

    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"x": Touch()}, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin"):
        inspect_checkpoint(adapter, base)
    assert not (tmp_path / "ran").exists()


# ---- P-Tuning ----


@pytest.mark.parametrize(
    ("options", "part"),
    [({"layers": 2}, "num_layers 是 4，基座是 2"), ({"hidden_size": 32}, "token_dim 是 64，基座是 32")],
)
def test_ptuning_sizes_are_compared_before_the_weights(tiny_checkpoint, base, tmp_path, options, part):
    adapter = write_adapter(base, tmp_path / "a", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert torch.equal(our_logits(base, adapter), peft_logits(base, adapter))
    other = Path(shutil.copytree(tiny_checkpoint("baichuan2-7b", **options), tmp_path / "other"))
    (other / "model.safetensors").write_bytes(b"")  # 还没有读到它
    with pytest.raises(ValueError) as error:
        inspect_checkpoint(adapter, other)
    assert part in str(error.value)


def test_a_prefix_without_its_tensor_is_refused(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "a", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    rename(adapter, lambda name: "embeddings")
    with pytest.raises(
        ValueError, match=r"缺少 1 个（共 1 个），如 \['prompt_embeddings'\]；多出 1 个，如 \['embeddings'\]"
    ):
        inspect_checkpoint(adapter, base)


# ---- 别的训练器的设置 ----

SETTINGS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "layers": {"layers_to_transform": [0, 2]},
    "patterns": {"rank_pattern": {"layers.1.self_attn.W_pack": 2}, "alpha_pattern": {"layers.2.self_attn.W_pack": 3}},
    "tokens": {"trainable_token_indices": [5, 6]},
}
MERGED = {"rslora", "dora", "layers", "patterns"}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_others_give_the_logits_of_peft_or_a_reason(base, tmp_path, name):
    adapter = write_adapter(base, tmp_path / "adapter", **SETTINGS[name])
    expected = peft_logits(base, adapter)
    assert torch.equal(our_logits(base, adapter), expected)
    arguments = ["--model_path", str(adapter), "--base_model_path", str(base), "--output_dir", str(tmp_path / "out")]
    assert merge_main(arguments) == (0 if name in MERGED else 2)
    if name in MERGED:
        with torch.no_grad():
            actual = BaichuanForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(IDS).logits
        assert (actual - expected).abs().max() < 1e-4
    # 第二阶段：每一个都指名拒绝
    model = apply_lora(BaichuanForCausalLM.from_pretrained(base), LoraOptions(lora_dim=4, lora_alpha=16))
    with pytest.raises(ValueError) as error:
        check_second_stage(adapter, model)
    assert next(iter(SETTINGS[name])) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"peft_type": "ADALORA"}, ["'ADALORA'"]),
        ({"target_modules": ["W_pack", "lm_head"]}, ["target_modules", "lm_head"]),
        ({"enable_lora": [True, False, True]}, ["enable_lora="]),
        ({"r": "four"}, ["r 应为正整数"]),
    ],
)
def test_configurations_that_cannot_be_used_are_refused_by_name(base, tmp_path, changes, parts):
    adapter = write_adapter(base, tmp_path / "adapter")
    write_json(adapter / "adapter_config.json", {**read_json(adapter / "adapter_config.json"), **changes})
    with pytest.raises(ValueError) as error:
        inspect_checkpoint(adapter, base)
    assert all(part in str(error.value) for part in parts), error.value


def test_settings_of_an_old_peft_that_do_nothing_are_harmless(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter")
    kept = ("peft_type", "task_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path", "bias")
    config = read_json(adapter / "adapter_config.json")
    old = {name: config[name] for name in kept} | {"enable_lora": None, "merge_weights": False, "lora_dropout": 0.05}
    (adapter / "adapter_config.json").write_text(json.dumps(old), encoding="utf-8")
    assert torch.equal(our_logits(base, adapter), peft_logits(base, adapter))
    model = apply_lora(BaichuanForCausalLM.from_pretrained(base), LoraOptions(lora_dim=4, lora_alpha=16))
    check_second_stage(adapter, model)
