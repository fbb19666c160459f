"""--optimizer 的几种与 --grad_accum_dtype：更新、字节、梯度之和、检查，真实的训练续训逐位相同。"""

import shutil

import pytest
import torch
from gradient_sums_worker import SUMS
from launching import launch, run_tasks
from paths import ROOT
from resume_runs import METHODS, NUM_ROWS, SAVED, assert_same_bits, cut_after, flags_of
from train_runs import SIZES, write_rows

from baichuan import BaichuanConfig
from finetune.cli.train_checks import early_problems
from finetune.cli.train_flags import parse_args
from finetune.planning.activations import plan_model
from finetune.planning.memory import STATE_BYTES, checkpoint_bytes, choose_grad_accum_dtype
from finetune.training.adamw_bf16 import AdamWBF16, join, split
from finetune.training.ds_config import optimizer_flag_problems, read_ds_config
from finetune.training.engine import split_groups
from utils import read_json, write_json

ZERO2, ZERO3 = "ds_zero2_no_offload.json", "ds_zero3_offload.json"
WORKER = ROOT / "tests" / "helpers" / "gradient_sums_worker.py"


def parse(*flags: str):
    return parse_args(["--train_path", "d", "--model_name_or_path", "m", "--output_dir", "o", *flags])


# ---------------------------------------------------------------------------------------------------------------------
# AdamWBF16


def test_a_split_weight_is_put_together_bit_for_bit():
    torch.manual_seed(0)
    full = torch.randn(10**5) * torch.logspace(-30, 30, 10**5)
    weight, rest = split(full)
    assert (weight.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
    assert join(weight, rest).equal(full)
    assert ((weight.float() - full).abs() <= full.abs() * 2**-8).all()  # 最近的 bf16：至多半格
    ties = torch.tensor([1 + 2**-8, -1 - 2**-8, 0.0])
    assert join(*split(ties)).equal(ties)


def test_updates_are_those_of_adamw_and_small_ones_are_not_lost():
    """学习率小到 bf16 的权重看不出：200 步之后与 fp32 的 AdamW 只差动量的舍入，bf16 的权重加余数就是那个 fp32。"""
    torch.manual_seed(0)
    start = torch.randn(1000).bfloat16()
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    options = {"lr": 1e-6, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = AdamWBF16([ours], **options), torch.optim.AdamW([theirs], **options)
    for _ in range(200):
        ours.grad = (torch.randn(1000) + 1).bfloat16()
        theirs.grad = ours.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    moved = theirs.detach() - start.float()
    found = join(ours.detach(), optimizers[0].state[ours]["compensation"]) - start.float()
    assert (found - moved).norm() < 0.01 * moved.norm()
    assert ours.detach().equal(split(found + start.float())[0])
    without = start.clone()
    for _ in range(200):
        without += (moved / 200).bfloat16()
    large = start.abs() > 0.25  # 每步不到 1e-6：直接加在 bf16 上，一点也不动
    assert without[large].equal(start[large])


def test_groups_are_split_by_size():
    sizes = [4, 4, 4, 20, 1, 3]
    group = {"params": [torch.nn.Parameter(torch.zeros(size)) for size in sizes], "weight_decay": 0.1, "lr": 2.0}
    found = split_groups([group], limit=8)
    assert [[p.numel() for p in one["params"]] for one in found] == [[4, 4], [4], [20], [1, 3]]
    assert {(one["weight_decay"], one["lr"]) for one in found} == {(0.1, 2.0)}


# ---------------------------------------------------------------------------------------------------------------------
# 梯度之和与字节


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> dict[str, dict]:
    path = tmp_path_factory.mktemp("sums") / "sums.json"
    run = launch([path], num_ranks=1, script=WORKER, launcher=False)
    assert run.returncode == 0, run.tail()
    return read_json(path)


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", SUMS)
def test_sum_of_64_micro_batches(sums, name):
    """1 与 63 个 2⁻⁹：按 fp32 相加是 1.123…（差在一次舍入之内），按 bf16 还是 1。"""
    expected = 1 + 63 * 2**-9
    if " fp32 " in name:
        assert sums[name]["gradient"] == pytest.approx(expected, rel=2**-9)
    else:
        assert sums[name]["gradient"] == pytest.approx(1.0, rel=1e-6)


@pytest.mark.deepspeed
def test_bytes_per_parameter(sums):
    """数真的存储：主权重与权重共用时是 0；8 位的每 256 个元素两个 fp32 的系数。"""
    expected = {
        "adamw fp32 zero2": (2, 4, 4, 8),
        "adamw bf16 zero2": (2, 4, 2, 8),
        "adamw_8bit bf16 zero2": (2, 4, 2, 2 + 8 / 256),
        "adamw_bf16 bf16 zero2": (2, 0, 2, 6),
    }
    assert {name: tuple(sums[name]["bytes"].values()) for name in expected} == expected
    assert STATE_BYTES == {"adamw": 8, "adamw_8bit": 2 + 8 / 256, "adamw_bf16": 6}


# ---------------------------------------------------------------------------------------------------------------------
# 选哪一种


SEVEN_B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--train_type", "lora", "--lora_module_name", "all-linear"], "fp32"),
        (["--train_type", "ptuning", "--prefix_projection", "--prefix_hidden_size", "512"], "fp32"),
        (["--train_type", "freeze", "--freeze_module_name", "layers.31."], "fp32"),
        (["--train_type", "full"], "bf16"),
        (["--train_type", "full", "--optimizer", "adamw_bf16"], "bf16"),
        (["--train_type", "full", "--grad_accum_dtype", "fp32"], "fp32"),
        (["--train_type", "lora", "--grad_accum_dtype", "bf16"], "bf16"),
    ],
)
def test_sums_are_fp32_where_it_costs_little(flags, expected):
    args = parse(*flags)
    model = plan_model(args, BaichuanConfig(vocab_size=125696, position_embedding="rope", norm_head=True, **SEVEN_B))
    for file in (ZERO2, ZERO3):
        config = read_ds_config(ROOT / file)
        assert choose_grad_accum_dtype(args, config, model, "bf16")[0] == expected
        own = {**config, "data_types": {"grad_accum_dtype": "fp16"}}
        assert choose_grad_accum_dtype(args, own, model, "bf16")[0] == "fp16"
    if "--grad_accum_dtype" not in flags:
        assert choose_grad_accum_dtype(args, config, model, "fp32")[0] == "fp32"
        zero1 = {**config, "zero_optimization": {"stage": 1}}
        assert choose_grad_accum_dtype(args, zero1, model, "bf16")[0] == "bf16"
    elif expected == "bf16":
        with pytest.raises(ValueError, match="--grad_accum_dtype bf16"):
            choose_grad_accum_dtype(args, config, model, "fp32")
    assert checkpoint_bytes(model, 2, True) - checkpoint_bytes(model, 2, False) == 12 * model.num_trained
    assert checkpoint_bytes(model, 2, True, "adamw_bf16") - checkpoint_bytes(model, 2, False) == 8 * model.num_trained


def test_flags_against_the_file(tmp_path):
    def problems(changes: dict, *flags: str, file: str = ZERO2) -> str:
        write_json(tmp_path / "ds.json", {**read_json(ROOT / file), **changes})
        args = parse("--ds_file", str(tmp_path / "ds.json"), *flags)
        return "\n".join([*optimizer_flag_problems(read_ds_config(args.ds_file), args), *early_problems(args)])

    bits, halves = ("--optimizer", "adamw_8bit"), ("--optimizer", "adamw_bf16")
    for flags in ((), bits, halves, ("--grad_accum_dtype", "fp32")):
        assert "--optimizer" not in problems({}, *flags) and "grad_accum_dtype" not in problems({}, *flags)
    adam = {"optimizer": {"type": "Adam", "params": {"lr": "auto", "adam_w_mode": True}}}
    assert "optimizer.type" not in problems(adam)
    assert "optimizer.type（Adam）" in problems(adam, *bits) and "adam_w_mode" in problems(adam, *bits)
    assert "optimizer.type（Adam）" in problems(adam, "--optimizer", "adamw")
    assert "ZeRO-2、ZeRO-3" in problems({}, *bits, file=ZERO3)
    assert "ZeRO-2、ZeRO-3" in problems({"zero_optimization": {"stage": 1}}, *halves)
    assert (
        problems({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}, *halves).count("ZeRO")
        == 0
    )
    slow = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}}}
    assert "betas" in problems(slow, *halves) and "betas" not in problems(slow, *bits)
    masters = {"bf16": {"enabled": "auto", "bf16_master_weights_and_grads": True}}
    assert "bf16_master_weights_and_grads" in problems(masters, *bits)
    assert "--precision bf16，得到 fp32" in problems({}, *halves, "--precision", "fp32")
    assert parse(*halves).precision == "bf16" and parse(*bits).precision == "auto"
    sums = {"data_types": {"grad_accum_dtype": "bf16"}}
    assert problems(sums).count("grad_accum_dtype") == 0
    assert "data_types.grad_accum_dtype" in problems(sums, "--grad_accum_dtype", "fp32")
    with pytest.raises(ValueError, match=r"data_types\.grad_accum_dtype"):
        problems({"data_types": {"grad_accum_dtype": "fp8"}})


# ---------------------------------------------------------------------------------------------------------------------
# 续训


RUNS = {
    "lora 8bit": ("lora", "adamw_8bit", "fp32"),
    "lora bf16": ("lora", "adamw_bf16", "bf16"),
    "full 8bit": ("full", "adamw_8bit", "fp32"),
    "full bf16": ("full", "adamw_bf16", "bf16"),
    "lora adamw": ("lora", "adamw", "bf16"),  # 梯度按 fp32 相加
}


def train_cut_and_resume(tmp_path, tiny_checkpoint, num_ranks: int) -> dict[str, str]:
    """每种训练一次；在第 3 步切断再续训，与没有打断过的逐位相同；返回续训的输出。"""
    rows, tasks = write_rows(tmp_path / "rows.json", NUM_ROWS), {}
    for name, (method, optimizer, precision) in RUNS.items():
        base = tiny_checkpoint(METHODS[method][0], **SIZES)
        flags = flags_of(base, rows, tmp_path / name, "zero2", method, num_ranks, "--optimizer", optimizer)
        tasks[name] = {
            "flags": [*flags, "--precision", precision, "--grad_accum_dtype", "fp32" if "adamw" in name else "auto"]
        }
    found = run_tasks(tmp_path, tasks, num_ranks)
    assert {name: one["code"] for name, one in found.items()} == dict.fromkeys(RUNS, 0), found
    for name, task in tasks.items():
        shutil.copytree(tmp_path / name, tmp_path / f"{name} whole")
        cut_after(tmp_path / name, 3)
        task["flags"] += ["--resume", "auto"]
    workplace = tmp_path / "cut"
    workplace.mkdir()
    found = run_tasks(workplace, tasks, num_ranks)
    assert {name: one["code"] for name, one in found.items()} == dict.fromkeys(RUNS, 0), found
    for name in RUNS:
        assert "step 3 from" in found[name]["output"]
        for saved in SAVED[1:]:
            assert_same_bits(tmp_path / name / saved, tmp_path / f"{name} whole" / saved)
    return {name: one["output"] for name, one in found.items()}


@pytest.mark.deepspeed
def test_resumed_runs_are_the_same_bits(tmp_path, tiny_checkpoint):
    outputs = train_cut_and_resume(tmp_path, tiny_checkpoint, 1)
    assert "梯度按 fp32 相加" in outputs["lora adamw"] and "梯度按 bf16 相加" in outputs["full bf16"]
    resolved = read_json(tmp_path / "full bf16" / "ds_config.json")
    assert resolved["optimizer"]["type"] == "AdamWBF16"
    assert read_json(tmp_path / "full 8bit" / "ds_config.json")["optimizer"]["type"] == "AdamW8bit"
    assert read_json(tmp_path / "lora adamw" / "ds_config.json")["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.slow
@pytest.mark.deepspeed
def test_resumed_runs_are_the_same_bits_on_two_ranks(tmp_path, tiny_checkpoint):
    train_cut_and_resume(tmp_path, tiny_checkpoint, 2)
