"""Llama 布局与官方布局互换：张量逐位相同；适配器在 q、k、v 与 W_pack 之间互换，logits 相同。"""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from finetune.checkpoint.inspection import inspect_checkpoint, load_checkpoint_model
from finetune.checkpoint.manifest import verify_checkpoint
from scripts.export import main as export_main
from scripts.merge_lora import main as merge_main
from utils import read_json, write_json

IDS = torch.tensor([[5, 300, 77, 1200, 9, 640]])


def run(*arguments) -> int:
    return export_main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def llama(tiny_checkpoint, tmp_path_factory):
    """返回 `llama(arch, chat) -> (官方布局的目录, Llama 布局的目录)`，后者由 --to llama 写出。"""

    def make(arch: str, chat: bool = False) -> tuple[Path, Path]:
        base = tiny_checkpoint(arch, chat=chat)
        target = tmp_path_factory.mktemp("llama") / arch
        assert run("--model_path", base, "--to", "llama", "--output_dir", target) == 0
        return base, target

    return make


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(("arch", "chat"), [("baichuan-7b", False), ("baichuan2-7b", True)])
def test_llama_layout_and_back(llama, tmp_path, arch, chat):
    base, source = llama(arch, chat)
    command = ("--from", "llama", "--model_path", source, "--to", "baichuan", "--output_dir", tmp_path / "back")
    assert run(*command) == 2  # 没有 tokenizer.model
    assert run(*command, "--base_model_path", base) == 0
    assert run("--model_path", tmp_path / "back", "--to", "llama", "--output_dir", tmp_path / "again") == 0
    assert run("--model_path", base, "--to", "baichuan", "--output_dir", tmp_path / "normalized") == 0
    for ours, theirs in ((tmp_path / "again", source), (tmp_path / "back", tmp_path / "normalized")):
        found, expected = (load_file(path / "model.safetensors") for path in (ours, theirs))
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert verify_checkpoint(tmp_path / "back") == []
    config = read_json(tmp_path / "back" / "config.json")
    assert (config["model_type"], config["norm_head"], config["position_embedding"]) == ("baichuan", False, "rope")
    found = logits_of(BaichuanForCausalLM.from_pretrained(tmp_path / "back"))
    torch.testing.assert_close(found, logits_of(LlamaForCausalLM.from_pretrained(source)), rtol=0, atol=1e-5)
    texts = "你好 <reserved_106>１"
    tokenizers = [BaichuanTokenizer.from_pretrained(path) for path in (base, tmp_path / "back")]
    assert tokenizers[0](texts)["input_ids"] == tokenizers[1](texts)["input_ids"]
    assert inspect_checkpoint(tmp_path / "back").prompting.prompt_format == ("chat" if chat else "plain")


def test_other_structures_are_refused_by_name(llama, tmp_path, capsys):
    base, source = llama("baichuan2-7b")
    other = Path(shutil.copytree(source, tmp_path / "other"))
    config = read_json(other / "config.json")
    command = ("--model_path", other, "--to", "baichuan", "--output_dir", tmp_path / "out", "--base_model_path", base)
    for name, value in {
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "attention_bias": True,
        "model_type": "mistral",
    }.items():
        write_json(other / "config.json", {**config, name: value})
        assert run("--from", "llama", *command) == 2
        assert name in capsys.readouterr().err
    write_json(other / "config.json", config)
    assert run(*command[:6]) == 2
    assert "--from llama" in capsys.readouterr().err
    weights = load_file(other / "model.safetensors")
    weights.pop("model.layers.1.self_attn.k_proj.weight")
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert run("--from", "llama", *command) == 2
    assert "k_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


LLAMA_ADAPTERS = {
    "qkv": {"target_modules": ["q_proj", "k_proj", "v_proj"]},
    "q and v, patterns": {
        "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "one layer, rslora": {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1], "use_rslora": True},
}


@pytest.mark.parametrize("kind", LLAMA_ADAPTERS)
def test_llama_adapter_and_back(llama, tmp_path, kind):
    base, layout = llama("baichuan2-7b")
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, init_lora_weights=False, **LLAMA_ADAPTERS[kind])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(layout), config)
    model.save_pretrained(tmp_path / "llama")
    expected = logits_of(model)
    command = ("--from", "llama", "--model_path", tmp_path / "llama", "--to", "baichuan")
    assert run(*command, "--output_dir", tmp_path / "packed") == 2  # 没有基座
    assert run(*command, "--output_dir", tmp_path / "packed", "--base_model_path", base) == 0
    plain = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(base), tmp_path / "packed")
    torch.testing.assert_close(logits_of(plain), expected, rtol=0, atol=1e-5)
    ours = load_checkpoint_model(inspect_checkpoint(tmp_path / "packed"), torch.float32, torch.device("cpu"))
    torch.testing.assert_close(logits_of(ours), expected, rtol=0, atol=1e-5)
    merge = ["--model_path", str(tmp_path / "packed"), "--output_dir", str(tmp_path / "merged")]
    assert merge_main(merge) == 0
    merged = logits_of(BaichuanForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    assert run("--model_path", tmp_path / "packed", "--to", "llama_lora", "--output_dir", tmp_path / "again") == 0
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(layout), tmp_path / "again")
    torch.testing.assert_close(logits_of(again), expected, rtol=0, atol=1e-5)


def test_our_adapter_to_llama_and_back_is_the_same_bits(trained, llama, tiny_checkpoint, tmp_path):
    source = trained("baichuan2-7b", "lora", targets=("W_pack", "o_proj"))
    assert run("--model_path", source, "--to", "llama_lora", "--output_dir", tmp_path / "split") == 0
    command = ("--from", "llama", "--to", "baichuan", "--base_model_path", tiny_checkpoint("baichuan2-7b"))
    assert run(*command, "--model_path", tmp_path / "split", "--output_dir", tmp_path / "packed") == 0
    expected, found = (load_file(path / "adapter_model.safetensors") for path in (source, tmp_path / "packed"))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    settings = read_json(tmp_path / "packed" / "adapter_config.json")
    assert (settings["r"], settings["lora_alpha"], sorted(settings["target_modules"])) == (4, 30, ["W_pack", "o_proj"])
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(llama("baichuan2-7b")[1]), tmp_path / "split"
    )  # plain peft
    ours = load_checkpoint_model(inspect_checkpoint(source), torch.float32, torch.device("cpu"))
    torch.testing.assert_close(logits_of(model), logits_of(ours), rtol=0, atol=1e-5)


def test_adapters_that_do_not_fit_are_refused(trained, tiny_checkpoint, tmp_path, capsys):
    base, out = tiny_checkpoint("baichuan2-7b"), ("--output_dir", tmp_path / "out")
    assert run("--model_path", base, "--to", "llama_lora", *out) == 2
    assert "--to llama" in capsys.readouterr().err
    assert run("--model_path", trained("baichuan2-13b", "lora"), "--to", "llama_lora", *out) == 2
    assert "ALiBi" in capsys.readouterr().err
    assert run("--from", "llama", "--model_path", base, "--to", "llama", *out) == 2
    split = tmp_path / "split"
    assert run("--model_path", trained("baichuan2-7b", "lora"), "--to", "llama_lora", "--output_dir", split) == 0
    with pytest.raises(ValueError, match="--from llama"):  # 直接拿来预测
        inspect_checkpoint(split, base)
