"""rsLoRA、DoRA、LoRA+：存下的适配器由 peft 原样读回得到训练时的 logits，合并与导出得到同样的 token，续训逐位相同。"""

import json
from pathlib import Path

import pytest
import torch
from golden_models import greedy
from launching import launch, run_tasks
from peft import PeftModel
from resume_runs import assert_same_bits
from safetensors.torch import load_file
from train_runs import SIZES, WORKER, ZERO3, flags_of, reload_logits, write_rows
from train_worker import PROBE_IDS, PROBE_MASK
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from finetune.checkpoint.base_model import load_config
from finetune.cli.train_checks import early_problems, validate_args
from finetune.cli.train_flags import parse_args
from finetune.export.export import export
from finetune.export.merge import merge_lora
from finetune.methods.lora import METHOD
from finetune.training.engine import open_engine, parameter_groups
from model_factory import build_model

VARIANTS = {"rslora": ["--use_rslora", "--loraplus_ratio", "16"], "dora": ["--use_dora"]}


def variant_flags(name: str, rows: Path, base: Path, output: Path, **options) -> list[str]:
    options = {"train_type": "lora", "num_train_epochs": 2, "learning_rate": 1e-2, **options}
    flags = flags_of(rows=rows, model=base, output=output, **options)
    return [*flags, "--lora_module_name", "all-linear", "--gradient_accumulation_steps", "1", *VARIANTS[name]]


def greedy_tokens(model) -> list[list[int]]:
    return [greedy(model, ids[None], max_new_tokens=8)[0].tolist() for ids in PROBE_IDS]


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", VARIANTS)
def test_saved_merged_and_exported_are_the_trained_model(tiny_checkpoint, tmp_path, name):
    base = tiny_checkpoint("baichuan2-7b", **SIZES)
    output = tmp_path / "output"
    run = launch(
        variant_flags(name, write_rows(tmp_path / "rows.json", 6), base, output),
        script=WORKER,
        env={"OBSERVE_DIR": str(tmp_path)},
        launcher=False,
    )
    assert run.returncode == 0, run.tail()
    checkpoint = output / "epoch-2-step-4"
    expected = load_file(tmp_path / f"{checkpoint.name}.safetensors")["logits"][PROBE_MASK == 1]
    found = reload_logits(checkpoint, base)[PROBE_MASK == 1]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        untrained = plain.eval()(input_ids=PROBE_IDS, attention_mask=PROBE_MASK).logits[PROBE_MASK == 1]
    assert (untrained - expected).abs().max() > 0.1

    tokens = greedy_tokens(PeftModel.from_pretrained(plain, checkpoint).eval())
    merge_lora(checkpoint, tmp_path / "merged")
    export(checkpoint, "llama", tmp_path / "llama", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32).eval()
    assert greedy_tokens(merged) == tokens == greedy_tokens(llama)


@pytest.mark.deepspeed
def test_each_resumes_bit_equal_and_keeps_its_rates(tiny_checkpoint, tmp_path):
    base, rows = tiny_checkpoint("baichuan2-7b", **SIZES), write_rows(tmp_path / "rows.json", 13)
    tasks = {}
    for name in VARIANTS:
        whole = variant_flags(name, rows, base, tmp_path / name)
        cut = variant_flags(name, rows, base, tmp_path / f"{name}-cut")
        tasks |= {
            name: {"flags": whole},
            f"{name} killed": {"flags": cut, "kill": {"step": 5, "rank": 0, "signal": "SIGTERM"}},
            f"{name} resumed": {"flags": [*cut, "--resume", "auto"]},
        }
    results = run_tasks(tmp_path, tasks, 1)
    assert {name: result["code"] for name, result in results.items()} == {
        name: 75 if name.endswith("killed") else 0 for name in tasks
    }, results
    for name in VARIANTS:
        assert_same_bits(tmp_path / f"{name}-cut" / "epoch-2-step-8", tmp_path / name / "epoch-2-step-8")
    state = json.loads((tmp_path / "rslora/epoch-1-step-4/trainer_state/state.json").read_text(encoding="utf-8"))
    slow, fast = state["optimizer"]["groups"]
    assert fast["hyper"]["lr"] == pytest.approx(16 * slow["hyper"]["lr"])
    assert all(".lora_A." in parameter for parameter in slow["params"])
    assert all(".lora_B." in parameter for parameter in fast["params"])


def test_the_configuration_and_the_groups(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("baichuan2-7b", **SIZES)
    args = parse_args(variant_flags("rslora", Path("-"), base, Path("-")))
    model = build_model(args, load_config(base), "fp32", {})
    config = model.active_peft_config
    assert (config.use_rslora, config.use_dora) == (True, False)
    groups = parameter_groups(model, 0.1, lambda name: METHOD.learning_rate_ratio(name, args))
    assert [(group.get("ratio"), len(group["params"])) for group in groups] == [(None, 10), (16.0, 10)]
    ds_config = {"optimizer": {"params": {"lr": 1e-3}}, "scheduler": {"type": "WarmupLR"}}
    with pytest.raises(ValueError, match=r"--loraplus_ratio .*WarmupLR"):
        open_engine(model, 0.1, ds_config, False, lambda name: METHOD.learning_rate_ratio(name, args))


def test_wrong_flags_are_told(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("baichuan2-7b", **SIZES)
    rows = write_rows(tmp_path / "rows.json", 3)
    for flags, named in (
        (["--train_type", "full", "--use_dora"], "--use_dora"),
        (["--train_type", "lora", "--use_dora", "--load_in_8bit"], "--load_in_8bit"),
        (["--train_type", "lora", "--loraplus_ratio", "0"], "--loraplus_ratio(0.0)"),
    ):
        args = parse_args([*flags_of(rows=rows, model=base, output=tmp_path / "out"), *flags])
        assert any(named in problem for problem in early_problems(args))
    args = parse_args([*flags_of(rows=rows, model=base, output=tmp_path / "out", ds=ZERO3), "--use_dora"])
    with pytest.raises(ValueError, match=r"--use_dora .*ZeRO-3"):
        validate_args(args)
