"""观察一次真实的训练：LoRA，ZeRO-3 offload，两个进程，26 行，全局 batch 8（每轮 4 步，最后一步 2 行），4 轮。"""

import json
import math
from pathlib import Path

import pytest
import torch
from launching import Launch, launch
from safetensors.torch import load_file
from train_runs import (
    SIZES,
    WORKER,
    ZERO3,
    checkpoints_in,
    flags_of,
    reload_logits,
    write_rows,
)
from train_worker import PROBE_MASK
from transformers import AutoTokenizer

from data_set import BaichuanDataSet
from finetune.checkpoint.base_model import load_config, load_tokenizer
from finetune.checkpoint.manifest import verify_checkpoint
from finetune.data.packing import whole_samples
from finetune.data.prompting import resolve_prompt_format
from utils import read_json

pytestmark = pytest.mark.deepspeed


OBSERVED_ROWS, OBSERVED_EPOCHS, STEPS_PER_EPOCH = 26, 4, 4
NUM_STEPS = OBSERVED_EPOCHS * STEPS_PER_EPOCH
PEAK = 2e-2


class Observed:
    """一次观察的全部结果。"""

    def __init__(self, run: Launch, output: Path, base: Path, seen: list[dict], directory: Path):
        self.run, self.output, self.base, self.seen, self.directory = run, output, base, seen, directory


@pytest.fixture(scope="module")
def observed(tiny_checkpoint, tmp_path_factory) -> Observed:
    directory = tmp_path_factory.mktemp("observed")
    base = tiny_checkpoint("baichuan2-7b", **SIZES)
    flags = flags_of(
        rows=write_rows(directory / "rows.json", OBSERVED_ROWS), model=base, output=directory / "output", ds=ZERO3,
        train_type="lora", lora_module_name="all-linear", lora_dropout=0.5, learning_rate=PEAK, warmup_ratio=0.25,
        weight_decay=0.02, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        num_train_epochs=OBSERVED_EPOCHS, save_model_step=6, show_loss_step=5, gradient_checkpointing=True,
        eval_path=write_rows(directory / "eval.json", 5, start=100),
    )  # fmt: skip
    run = launch(flags, num_ranks=2, script=WORKER, env={"OBSERVE_DIR": str(directory)})
    assert run.returncode == 0, run.tail()
    seen = [read_json(directory / f"seen-{rank}.json") for rank in range(2)]
    return Observed(run, directory / "output", base, seen, directory)


def test_loss_falls(observed):
    losses = observed.run.losses
    assert losses[-1] < losses[0] - 0.5, losses
    evaluated = [record["eval/nll"] for record in observed.run.records if "eval/nll" in record]
    assert len(evaluated) == OBSERVED_EPOCHS
    assert evaluated[-1] < evaluated[0]


def test_global_step_has_one_source(observed):
    """26 行除不尽全局 batch 8：日志、引擎、检查点的步数仍然一致。"""
    assert [record["step"] for record in observed.run.records if "loss" in record] == [1, 5, 10, 15, 16]
    for seen in observed.seen:
        assert [step["step"] for step in seen["steps"]] == list(range(1, NUM_STEPS + 1))
    assert checkpoints_in(observed.output) == [
        "epoch-1-step-4",
        "epoch-2-step-6",
        "epoch-2-step-8",
        "epoch-3-step-12",
        "epoch-4-step-16",
    ]
    for name in checkpoints_in(observed.output):
        run_config = read_json(observed.output / name / "run_config.json")
        assert name == f"epoch-{run_config['epoch']}-step-{run_config['global_step']}"


def test_every_row_once_an_epoch_in_a_new_order(observed):
    orders = []
    for epoch in range(OBSERVED_EPOCHS):
        steps = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
        rows = [[line for seen in observed.seen for _, line in seen["steps"][step]["rows"]] for step in steps]
        assert [len(step) for step in rows] == [8, 8, 8, 2]
        assert sorted(line for step in rows for line in step) == list(range(1, OBSERVED_ROWS + 1))
        orders.append([sorted(step) for step in rows])
    assert len({json.dumps(order) for order in orders}) == OBSERVED_EPOCHS


def test_learning_rate_follows_the_flags(observed):
    """预热 4 步：s/5；之后余弦降到峰值的十分之一。"""
    found = {record["step"]: record["lr"] for record in observed.run.records if "lr" in record}
    for step, rate in found.items():
        progress = (step - 4) / (NUM_STEPS - 4)
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
        assert rate == pytest.approx(PEAK * (step / 5 if step <= 4 else cosine), rel=1e-9)
    ds_config = read_json(observed.output / "ds_config.json")
    assert ds_config["optimizer"]["params"]["weight_decay"] == 0.02
    assert ds_config["train_micro_batch_size_per_gpu"] == 2


def observed_samples(batch: dict, name: str) -> list[list[int]]:
    """记下的 micro batch 里各样本的 input_ids 或 labels，接回共用的开头。"""
    return [values.tolist() for values in whole_samples({**batch, name: torch.tensor(batch[name])}, name)]


def test_train_log_has_what_was_promised(observed):
    total = 0
    for record in (record for record in observed.run.records if "loss" in record):
        assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "elapsed_seconds"} <= set(
            record
        )
        assert record["epoch"] == record["step"] / STEPS_PER_EPOCH
        assert 0 < record["grad_norm"] < 1e3
        total += record["tokens"]
    lengths = [
        len(ids)
        for seen in observed.seen for step in seen["steps"] for batch in step["batches"]
        if any(label != -100 for label in batch["labels"][0])
        for ids in observed_samples(batch, "input_ids")
    ]  # fmt: skip
    assert total == sum(lengths)
    assert (observed.output / "loss.png").is_file()
    assert list((observed.output / "runs").glob("events.out.tfevents.*"))


def test_both_ranks_have_equally_many_micro_batches(observed):
    for first, second in zip(*(seen["steps"] for seen in observed.seen), strict=True):
        assert len(first["batches"]) == len(second["batches"])
        assert first["targets"] == second["targets"]
        found = sum(
            label != -100 for step in (first, second) for batch in step["batches"] for label in batch["labels"][0]
        )
        assert found == first["targets"]


def test_eos_follows_every_whole_answer_and_no_cut_one(observed):
    config = load_config(observed.base)
    tokenizer = load_tokenizer(observed.base, config.vocab_size)
    prompting = resolve_prompt_format("auto", observed.base, config)
    rows = BaichuanDataSet(
        observed.directory / "rows.json", tokenizer, max_len=96, max_src_len=64, **prompting._asdict()
    )
    cut = {line: rows[i].tgt_truncated for i, line in enumerate(rows.lines)}
    assert 3 <= sum(cut.values()) <= OBSERVED_ROWS - 3  # 两种都有
    eos, num_checked = tokenizer.eos_token_id, 0
    for seen in observed.seen:
        for step in seen["steps"]:
            lines = iter(line for _, line in step["rows"])
            for batch in step["batches"]:
                samples = (observed_samples(batch, name) for name in ("input_ids", "labels"))
                for own_ids, own_labels in zip(*samples, strict=True):
                    if all(label == -100 for label in own_labels):
                        assert own_ids == [tokenizer.pad_token_id]  # 空的 micro batch
                        continue
                    is_cut = cut[next(lines)]
                    assert (own_ids[-1] == eos) is not is_cut
                    assert (own_labels[-1] == eos) is not is_cut
                    assert own_ids.count(eos) == own_labels.count(eos) == (not is_cut)
                    num_checked += 1
            assert next(lines, None) is None
    assert num_checked == OBSERVED_ROWS * OBSERVED_EPOCHS


def test_ranks_start_equal_and_drop_differently(observed):
    first, second = observed.seen
    assert first["initial"] == second["initial"]
    assert len(first["initial"]) == 2 * 2 * 5  # 两层 × A、B × 五个线性层
    assert sum(first["dropout"]) not in (0, 64)
    assert first["dropout"] != second["dropout"]


def test_each_rank_holds_only_its_part(observed):
    for seen in observed.seen:
        assert len(seen["parts"]) > 17
        for name, (whole, local) in seen["parts"].items():
            assert local == math.ceil(whole / 2), name


def test_saved_adapter_is_whole_and_not_zero(observed):
    for name in checkpoints_in(observed.output):
        tensors = load_file(observed.output / name / "adapter_model.safetensors")
        widths = {
            "W_pack": (32, 96),
            "o_proj": (32, 32),
            "gate_proj": (32, 48),
            "up_proj": (32, 48),
            "down_proj": (48, 32),
        }
        expected = {}
        for layer in range(2):
            for module, (inputs, outputs) in widths.items():
                part = "self_attn" if module in ("W_pack", "o_proj") else "mlp"
                prefix = f"base_model.model.model.layers.{layer}.{part}.{module}"
                expected |= {f"{prefix}.lora_A.weight": (8, inputs), f"{prefix}.lora_B.weight": (outputs, 8)}
        assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
        for key, tensor in tensors.items():
            assert tensor.ne(0).float().mean() > 0.9, f"{name} {key}"


def test_checkpoint_gives_the_logits_of_training(observed):
    previous = None
    for name in checkpoints_in(observed.output):
        assert verify_checkpoint(observed.output / name) == []
        expected = load_file(observed.directory / f"{name}.safetensors")["logits"]
        found = reload_logits(observed.output / name, observed.base)
        torch.testing.assert_close(found[PROBE_MASK == 1], expected[PROBE_MASK == 1], rtol=1e-5, atol=2e-5)
        assert previous is None or not torch.allclose(found, previous, atol=1e-3)  # 训练确实在动
        previous = found
        assert AutoTokenizer.from_pretrained(observed.output / name).eos_token_id == 2


def test_run_config_tells_everything(observed):
    run_config = read_json(observed.output / "epoch-4-step-16" / "run_config.json")
    assert (run_config["train_type"], run_config["prompt_format"], run_config["world_size"]) == ("lora", "plain", 2)
    assert run_config["args"]["max_src_len"] == 64
    assert run_config["args"]["learning_rate"] == PEAK
    assert run_config["base_model"]["path"] == str(observed.base)
    assert run_config["base_model"]["absolute_path"] == str(observed.base.resolve())
    assert set(run_config["base_model"]["hashes"]) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
