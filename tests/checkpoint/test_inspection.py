"""loading.py：找到基座、核对哈希、认出提示词格式、读回权重；每种错误都说清楚。"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from baichuan import BaichuanForCausalLM
from finetune.checkpoint.inspection import (
    base_differences,
    inspect_checkpoint,
    load_checkpoint_model,
    load_checkpoint_tokenizer,
    weights_fingerprint,
)
from finetune.checkpoint.output_dir import choose_checkpoint
from utils import file_sha256

CPU = torch.device("cpu")


@pytest.fixture
def base(tiny_checkpoint, tmp_path) -> Path:
    """可以改写的基座。"""
    return Path(shutil.copytree(tiny_checkpoint("baichuan2-7b"), tmp_path / "base"))


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    """训练器布局的 LoRA 检查点，B 不为零。"""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["W_pack"], init_lora_weights=False)
    model = get_peft_model(BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    path = tmp_path / "output" / "epoch-1-step-3"
    model.save_pretrained(path)
    shutil.copy(base / "tokenizer.model", path)
    shutil.copy(base / "tokenizer_config.json", path)
    hashed = [file for file in sorted(base.iterdir()) if file.suffix in (".json", ".model", ".safetensors")]
    write_run_config(path, base, {file.name: file_sha256(file) for file in hashed})
    return path


def write_run_config(path, base, hashes, **extra):
    run_config = {
        "args": {"max_len": 64, "max_src_len": 48},
        "prompt_format": "plain",
        "family": "baichuan2",
        "user_token_id": 195,
        "assistant_token_id": 196,
        "base_model": {"path": "gone/", "absolute_path": str(base), "hashes": hashes},
        **extra,
    }
    (path / "run_config.json").write_text(json.dumps(run_config), encoding="utf-8")


def test_adapter_gives_the_logits_of_peft(base, adapter):
    checkpoint = inspect_checkpoint(adapter)
    assert checkpoint.is_adapter
    assert checkpoint.base_path == base
    assert checkpoint.prompting == ("plain", "baichuan2", 195, 196, None)
    assert checkpoint.context_length == 4096
    model = load_checkpoint_model(checkpoint, torch.float32, CPU)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        base_logits = plain(ids).logits.clone()
        expected = PeftModel.from_pretrained(plain, adapter).eval()(ids).logits
        assert torch.equal(model(ids).logits, expected)
    assert (expected - base_logits).abs().max() > 1e-2
    assert load_checkpoint_tokenizer(checkpoint).vocab_file == str(adapter / "tokenizer.model")


def test_base_is_looked_for_as_given_then_as_absolute_then_must_be_told(base, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "gone")
    assert inspect_checkpoint(adapter).base_path == Path("gone")
    shutil.rmtree(tmp_path / "gone")
    assert inspect_checkpoint(adapter).base_path == base
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"epoch-1-step-3 .*gone/、.*base.*--base_model_path"):
        inspect_checkpoint(adapter)
    assert inspect_checkpoint(adapter, tmp_path / "moved").base_path == tmp_path / "moved"
    with pytest.raises(ValueError, match="：nowhere）"):
        inspect_checkpoint(adapter, "nowhere")


def test_another_base_is_noticed(base, adapter, tiny_checkpoint):
    other = tiny_checkpoint("baichuan2-7b", seed=7)
    with pytest.raises(ValueError, match=r"不是同一个：model\.safetensors（内容不同）（共 1 个文件）"):
        inspect_checkpoint(adapter, other)
    (base / "generation_config.json").write_text("{}")  # 不是 config 也不是权重，可以改
    assert inspect_checkpoint(adapter).base_path == base
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"不是同一个：model\.safetensors（不存在）"):
        inspect_checkpoint(adapter)


def test_full_checkpoint_needs_no_run_config(base, tiny_checkpoint):
    checkpoint = inspect_checkpoint(base)
    assert not checkpoint.is_adapter
    assert checkpoint.run_config == {}
    model = load_checkpoint_model(checkpoint, torch.float32, CPU)
    expected = BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="--base_model_path"):
        inspect_checkpoint(base, tiny_checkpoint("baichuan2-7b"))


def test_prompt_format(base, adapter, tiny_checkpoint):
    assert inspect_checkpoint(base).prompting.prompt_format == "plain"
    assert inspect_checkpoint(tiny_checkpoint("baichuan2-7b", chat=True)).prompting.prompt_format == "chat"
    assert inspect_checkpoint(base, prompt_format="chat").prompting.prompt_format == "chat"
    assert inspect_checkpoint(tiny_checkpoint("baichuan-13b", chat=True)).prompting == (
        "chat",
        "baichuan",
        195,
        196,
        None,
    )
    # 训练时记下的优先于基座的 generation_config.json
    (base / "generation_config.json").write_text('{"user_token_id": 5, "assistant_token_id": 6}')
    assert inspect_checkpoint(base).prompting == ("chat", "baichuan2", 5, 6, None)
    assert inspect_checkpoint(adapter).prompting == ("plain", "baichuan2", 195, 196, None)


def test_adapter_without_run_config(base, adapter):
    (adapter / "run_config.json").unlink()
    # peft 自己记着基座的路径
    assert inspect_checkpoint(adapter).base_path == base


def test_wrong_directories(adapter, tmp_path):
    with pytest.raises(ValueError, match="nothing 不存在，请给出检查点目录"):
        inspect_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"run_config\.json 不是目录"):
        inspect_checkpoint(adapter / "run_config.json")
    with pytest.raises(ValueError, match=r"config\.json.*adapter_config\.json"):
        inspect_checkpoint(tmp_path)
    adapter.rename(adapter.parent / ".tmp-epoch-1-step-3")
    with pytest.raises(ValueError, match="没有写完的检查点"):
        inspect_checkpoint(adapter.parent / ".tmp-epoch-1-step-3")


def test_an_output_directory_stands_for_its_best_or_newest_checkpoint(adapter, capsys):
    output = adapter.parent
    shutil.copytree(adapter, output / "epoch-2-step-6")
    assert inspect_checkpoint(output).path == output / "epoch-2-step-6"
    assert "epoch-2-step-6（最新的一个）" in capsys.readouterr().err
    best = {"checkpoint": adapter.name, "metric": "label_f1", "score": 0.87}
    (output / "best.json").write_text(json.dumps(best), encoding="utf-8")
    assert inspect_checkpoint(output).path == adapter
    assert f"{adapter.name}（最好的一个：label_f1 0.8700）" in capsys.readouterr().err
    shutil.rmtree(adapter)  # 记着的已经删去：退回最新的
    assert choose_checkpoint(output, is_told=False) == output / "epoch-2-step-6"
    assert capsys.readouterr().err == ""


def test_broken_adapter(adapter, tiny_checkpoint):
    (adapter / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors（6 字节）损坏"):
        load_checkpoint_model(inspect_checkpoint(adapter), torch.float32, CPU)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"却没有 adapter_model\.safetensors"):
        inspect_checkpoint(adapter)


def test_adapter_of_another_size(adapter, tiny_checkpoint):
    other = tiny_checkpoint("baichuan2-7b", hidden_size=32)
    write_run_config(adapter, other, {})
    with pytest.raises(ValueError, match=r"lora_A\.weight 的形状是 \(4, 64\)，应为 \(4, 32\)"):
        load_checkpoint_model(inspect_checkpoint(adapter), torch.float32, CPU)


def test_any_base_is_allowed_when_asked_for(adapter, tiny_checkpoint):
    other = tiny_checkpoint("baichuan2-7b", seed=7)
    checkpoint = inspect_checkpoint(adapter, other, any_base=True)
    assert checkpoint.base_path == other
    assert base_differences(other, checkpoint.run_config) == ["model.safetensors（内容不同）"]


def test_weights_fingerprint(base, adapter):
    before = weights_fingerprint(inspect_checkpoint(adapter))
    assert before == weights_fingerprint(inspect_checkpoint(adapter))
    (adapter / "manifest.json").write_text("{}")
    after = weights_fingerprint(inspect_checkpoint(adapter))
    assert after != before != weights_fingerprint(inspect_checkpoint(base))
