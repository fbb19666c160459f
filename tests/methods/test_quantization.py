"""quantization.py：nf4 与 int8 的基座上训练 LoRA；只量化各层的线性层；存、续训、合并、预测；用不了时说清楚。"""

import importlib.util
import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch
from launching import run_tasks
from paths import ROOT
from resume_runs import NUM_ROWS, assert_same_bits, cut_after, flags_of
from train_runs import write_rows

import predict
from finetune.checkpoint.base_model import load_base_model, load_config
from finetune.checkpoint.inspection import inspect_checkpoint, load_checkpoint_model
from finetune.checkpoint.quantized import (
    CHUNK,
    NUM_BITS,
    empty_layer,
    quantize_in_chunks,
    quantize_into,
    quantize_nf4,
    set_quantized,
)
from finetune.cli.train_checks import validate_args
from finetune.cli.train_flags import parse_args
from finetune.inference.generation import generate_batch, make_generation_config
from model_factory import build_model
from utils import seed_everything

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="没有安装 bitsandbytes，跳过量化的测试")
CPU = torch.device("cpu")
SIZES = {"layers": 2, "hidden_size": 128, "heads": 4, "intermediate_size": 192}


def make_args(base, *flags):
    return parse_args(
        [str(flag) for flag in ("--train_path", "d", "--model_name_or_path", base, "--output_dir", "o", *flags)]
    )


def make(base, quantization, precision="fp32", *flags):
    args = make_args(base, f"--load_in_{quantization}", "--lora_module_name", "all-linear", *flags)
    seed_everything(0)
    return build_model(args, load_config(base), precision, {})


@needs_bitsandbytes
def test_importing_says_nothing():
    """peft 会导入 bitsandbytes；它在一些 CPU 上的提示不显示。"""
    run = subprocess.run([sys.executable, "-c", "import model_factory"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "gemm_4bit" not in run.stdout + run.stderr
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").level == logging.ERROR


# ---- 模型 ----


@needs_bitsandbytes
@pytest.mark.parametrize("arch", ["baichuan2-7b", "baichuan-13b"])
@pytest.mark.parametrize("quantization", NUM_BITS)
def test_only_the_linear_layers_are_quantized(tiny_checkpoint, quantization, arch, capsys):
    import bitsandbytes

    base = tiny_checkpoint(arch, **SIZES)
    plain = load_base_model(base, load_config(base), torch.bfloat16, CPU)
    model = make(base, quantization, "bf16").get_base_model()
    kind = bitsandbytes.nn.Linear4bit if quantization == "4bit" else bitsandbytes.nn.Linear8bitLt
    found = {name for name, module in model.named_modules() if type(module) is kind}
    layers = ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert found == {f"model.layers.{index}.{name}.base_layer" for index in range(2) for name in layers}
    kept = {name: p for name, p in model.named_parameters() if "base_layer" not in name and "lora_" not in name}
    expected = dict(plain.named_parameters())
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < kept.keys()
    assert all(torch.equal(value, expected[name]) and value.dtype == torch.bfloat16 for name, value in kept.items())
    # 「可训练 n / 总数」里的总数是没有打包的元素数
    total = sum(p.numel() for p in plain.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"可训练 {trained:,} / {total + trained:,}" in capsys.readouterr().out


@needs_bitsandbytes
@pytest.mark.parametrize(("quantization", "most"), [("4bit", 0.2), ("8bit", 0.02)])
def test_quantized_logits_are_near(tiny_checkpoint, quantization, most):
    base = tiny_checkpoint("baichuan2-7b", **SIZES)
    config, ids = load_config(base), torch.arange(5, 37)[None]
    with torch.no_grad():
        expected = load_base_model(base, config, torch.float32, CPU)(ids).logits
        model = load_base_model(base, config, torch.float32, CPU, quantization=quantization).eval()
        found = model(ids).logits
    assert 0 < (found - expected).norm() / expected.norm() < most


@needs_bitsandbytes
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", NUM_BITS)
def test_training_lowers_the_loss(tiny_checkpoint, quantization, precision):
    """中间评估一次：CPU 上推理之后仍能训练。重算打开，与不重算一样能反向。"""
    base = tiny_checkpoint("baichuan2-7b", **SIZES)
    model = make(base, quantization, precision, "--gradient_checkpointing", "--lora_dropout", 0).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids, losses = torch.arange(5, 37)[None], []
    for step in range(12):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step == 5:
            with torch.no_grad():
                model.eval()(ids)
            model.train()
    assert losses[-1] < losses[0] - 1
    assert losses == sorted(losses, reverse=True) or losses[-1] < 0.7 * losses[0]


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", NUM_BITS)
def test_a_weight_in_chunks_has_the_bits_of_the_whole(quantization, dtype):
    """两段多、末尾不足一块的一个权重：与 bitsandbytes 一次量化的逐位相同，前向也相同。"""
    weight = torch.randn(1001, 300, generator=torch.Generator().manual_seed(0))
    assert weight.numel() > 2 * CHUNK and weight.numel() % 64
    whole, chunks = (empty_layer(torch.nn.Linear(300, 1001, bias=False), dtype, quantization) for _ in range(2))
    quantize_into(whole, weight.to(dtype), CPU)
    set_quantized(chunks, *quantize_in_chunks(weight, dtype, quantization), dtype)
    assert type(chunks.weight) is type(whole.weight)
    assert torch.equal(chunks.weight.data, whole.weight.data)
    if quantization == "4bit":
        states = [layer.weight.quant_state for layer in (whole, chunks)]
        for name in ("shape", "dtype", "blocksize", "quant_type", "nested"):
            assert getattr(states[0], name) == getattr(states[1], name), name
        for one, other in zip(
            *([s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code] for s in states), strict=True
        ):
            assert torch.equal(one, other)
        assert chunks.quant_state is chunks.weight.quant_state and chunks.weight.module is chunks
    else:
        assert torch.equal(chunks.weight.CB, whole.weight.CB) and torch.equal(chunks.weight.SCB, whole.weight.SCB)
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(chunks(x), whole(x))


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_codes_at_the_bounds(dtype):
    """正在两个码的界上的、差一位的，零、负零、很小与很大的、不是数的：与 bitsandbytes 的逐位相同。"""
    from bitsandbytes import functional

    code = functional.get_4bit_type("nf4", device="cpu")
    bounds = (code[:-1] + code[1:]) / 2
    near = [bounds, *(torch.nextafter(bounds, torch.tensor(end)) for end in (-2.0, 2.0)), code]
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-30, 1.0])
    row = torch.cat([*near, special])
    row = torch.cat([row, torch.ones(2 * 64 - len(row))])
    rows = [row, -row, row * 0.0313, row * 6e4, torch.zeros(128), torch.full((128,), torch.inf)]
    rows.append(torch.cat([torch.tensor([torch.nan]), row[1:]]))
    rows.append(torch.randn(128 * 500, generator=torch.Generator().manual_seed(0)))
    values = torch.cat(rows).to(dtype)
    packed, scales = quantize_nf4(values)
    expected, state = functional.quantize_4bit(values, blocksize=64, quant_type="nf4")
    assert len(set(packed.flatten().tolist())) > 200  # 各种码都出现
    assert torch.equal(packed, expected)
    assert torch.equal(scales.nan_to_num(-1), state.absmax.nan_to_num(-1))


# ---- 训练、续训、合并、预测 ----


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.deepspeed
def test_train_resume_merge_predict(tiny_checkpoint, tmp_path, capsys):
    """真实的训练进程：8 步，停在第 3 步之后续训，逐位相同；只存适配器；合并进没有量化的基座；两种基座都能预测。"""
    base = tiny_checkpoint("baichuan2-7b", **SIZES)
    rows = write_rows(tmp_path / "rows.json", NUM_ROWS)

    def flags(name, quantization, *more):
        return flags_of(base, rows, tmp_path / name, "zero2", "lora", 1, f"--load_in_{quantization}", *more)

    names = {f"{quantization}": {"flags": flags(quantization, quantization)} for quantization in NUM_BITS}
    results = run_tasks(tmp_path, names, 1)
    assert {name: result["code"] for name, result in results.items()} == {"4bit": 0, "8bit": 0}
    tasks = {}
    for name in names:
        output = shutil.copytree(tmp_path / name, tmp_path / f"{name}-cut")
        cut_after(output, 3)
        tasks[name] = {"flags": flags(f"{name}-cut", name, "--resume", "auto")}
    tasks["changed"] = {"flags": [*flags("4bit-cut", "8bit"), "--resume", "auto"]}
    results = run_tasks(tmp_path, tasks, 1)
    assert {name: result["code"] for name, result in results.items()} == {"4bit": 0, "8bit": 0, "changed": 2}
    assert "--load_in_4bit：检查点是 True，现在是 False" in results["changed"]["output"]
    from finetune.export.merge import merge_lora

    for name in names:
        assert_same_bits(tmp_path / f"{name}-cut" / "epoch-2-step-8", tmp_path / name / "epoch-2-step-8")
        records = [json.loads(line) for line in (tmp_path / name / "train_log.jsonl").read_text().splitlines()]
        losses = [record["loss"] for record in records if "loss" in record]
        assert losses[-1] < losses[0] - 0.2
        checkpoint = tmp_path / name / "epoch-2-step-8"
        assert (checkpoint / "adapter_model.safetensors").is_file()
        assert not list(checkpoint.glob("model*.safetensors"))
        merged = tmp_path / f"{name}-merged"
        merge_lora(checkpoint, merged, dtype="float32")
        prompts = [[5, 6, 7], [9, 10]]
        answers = []
        for path in (checkpoint, merged):
            model = load_checkpoint_model(inspect_checkpoint(path), torch.float32, CPU)
            answers.append([generate_batch(model, [p], make_generation_config(model, 6))[0] for p in prompts])
        assert answers[0] == answers[1]
        command = ["--model_path", str(checkpoint), "--device", "cpu", "--input", "甲", "--max_new_tokens", "4"]
        assert predict.main(command) == 0
        assert predict.main([*command, f"--load_in_{name}"]) == 0
    assert "已载入" in capsys.readouterr().err


@needs_bitsandbytes
def test_predict_on_a_quantized_base(tiny_checkpoint, tmp_path, capsys):
    from generating import make_adapter

    base = tiny_checkpoint("baichuan2-7b", **SIZES)
    adapter = make_adapter(base, tmp_path / "adapter")
    checkpoint = inspect_checkpoint(adapter, base)
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        expected = load_checkpoint_model(checkpoint, torch.float32, CPU)(ids).logits
        found = load_checkpoint_model(checkpoint, torch.float32, CPU, "8bit")(ids).logits
    assert 0 < (found - expected).norm() / expected.norm() < 0.02
    assert predict.main(["--model_path", str(base), "--adapter", str(adapter), "--load_in_4bit", "--device", "cpu",
                         "--input", "甲", "--max_new_tokens", "2"]) == 0  # fmt: skip


# ---- 用不了 ----


def refused(base, tmp_path, *flags):
    rows = write_rows(tmp_path / "rows.json", 1)
    args = parse_args([str(flag) for flag in ("--train_path", rows, "--model_name_or_path", base, "--output_dir",
                       tmp_path / "out", *flags)])  # fmt: skip
    with pytest.raises(ValueError) as caught:
        validate_args(args)
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load_in_4bit", "--load_in_8bit"], "--load_in_4bit 与 --load_in_8bit 只能给一个"),
        (["--load_in_4bit", "--ds_file", ROOT / "ds_zero3_offload.json"], "--load_in_4bit 不能与 ZeRO-3 同用"),
        (
            ["--load_in_8bit", "--train_type", "full"],
            "--load_in_8bit 属于 --train_type lora，对 full 不起作用，请去掉",
        ),
        (["--load_in_4bit", "--train_type", "ptuning"], "--load_in_4bit 属于 --train_type lora，对 ptuning 不起作用"),
        (
            ["--load_in_4bit", "--train_type", "freeze", "--freeze_module_name", "layers.1."],
            "--load_in_4bit 属于 --train_type lora，对 freeze 不起作用",
        ),
    ],
)
def test_what_cannot_be_quantized_is_refused(tiny_checkpoint, tmp_path, flags, message):
    assert message in refused(tiny_checkpoint("baichuan2-7b"), tmp_path, *flags)


def test_without_bitsandbytes(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    base = tiny_checkpoint("baichuan2-7b")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find_spec(name, *a)
    )
    message = "--load_in_4bit 需要 bitsandbytes，请先 pip install bitsandbytes=="
    assert message in refused(base, tmp_path, "--load_in_4bit")
    assert predict.main(["--model_path", str(base), "--input", "甲", "--load_in_4bit"]) == 2
    assert message in capsys.readouterr().err
