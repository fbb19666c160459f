"""与模型和样本都无关的工具：JSON 文件的原子写、精度选择、DeepSpeed 配置的填写与学习率曲线。"""

import itertools
import json
import math
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deepspeed.runtime import lr_schedules
from paths import ROOT

import train
from baichuan import BaichuanConfig
from finetune.cli.train_flags import parse_args
from finetune.process import accelerator, precision
from finetune.process.precision import choose_precision
from finetune.training import ds_config
from finetune.training.ds_config import read_ds_config, resolve_ds_config
from utils import broadcast_from_rank_0, global_rank, raise_together, read_json, seed_everything, world_size, write_json

DS_FILES = ["ds_zero2_no_offload.json", "ds_zero3_offload.json"]
PEAK, FLOOR = 1e-4, 0.1


def resolve(config: dict, num_steps: int = 100, warmup_ratio: float = 0.1, **changes) -> dict:
    values = {
        "precision": "fp32",
        "batch_size": 2,
        "accumulation_steps": 4,
        "num_ranks": 3,
        "learning_rate": PEAK,
        "weight_decay": 0.05,
        "num_steps": num_steps,
        "warmup_ratio": warmup_ratio,
        **changes,
    }
    return resolve_ds_config(config, **values)


def learning_rates(config: dict, num_steps: int) -> list[float]:
    """真的 DeepSpeed 调度在各步更新时的学习率；与 train.py 一样，第一步之前先走一下。"""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config["optimizer"]["params"]["lr"])
    scheduler = getattr(lr_schedules, config["scheduler"]["type"])(optimizer, **config["scheduler"]["params"])
    scheduler.step()
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


# ---- JSON 文件 ----


def test_write_json_is_readable_and_atomic(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"名": "值", "n": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "名": "值",\n  "n": 1\n}\n'
    assert read_json(path) == {"名": "值", "n": 1}
    with pytest.raises(TypeError):
        write_json(path, {"n": object()})
    assert read_json(path) == {"名": "值", "n": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "读不了 .*a.json：No such file or directory"),
        (b"", "a.json 不是合法的 JSON：Expecting value"),
        (b'{"a": 1,}', r"a.json 不是合法的 JSON：.*line 1 column \d"),
        (b"\xff\xfe{", "a.json 不是合法的 JSON：.*utf-8"),
        (b"[" * 200_000, "a.json 不是合法的 JSON"),
    ],
)
def test_read_json_says_what_is_wrong(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")


# ---- 进程 ----


def test_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert (world_size(), global_rank()) == (1, 0)
    monkeypatch.setenv("RANK", "3")
    assert global_rank() == 3  # 分布式还没有建立时，也只有 0 号进程说话


def test_raise_together_keeps_the_cause():
    raise_together(None)
    error = OSError("坏了")
    with pytest.raises(RuntimeError, match=r"^rank 0：坏了$") as caught:
        raise_together(error)
    assert caught.value.__cause__ is error
    assert caught.value.is_agreed


def test_raise_together_keeps_a_mistake_of_the_user_a_value_error():
    with pytest.raises(ValueError, match=r"^坏了$"):
        raise_together(ValueError("坏了"))


def test_broadcast_from_rank_0_in_one_process():
    assert broadcast_from_rank_0(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match=r"^读不了 /no/file：No such file or directory$"):
        broadcast_from_rank_0(lambda: read_json("/no/file"))


def test_seed_everything_seeds_all_three():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(2**40 + 7)
    first = draw()
    assert draw() != first
    seed_everything(2**40 + 7)
    assert draw() == first
    seed_everything(8)
    assert draw() != first


# ---- 精度 ----


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_a_precision_asked_for_is_taken(name):
    assert choose_precision(name) == (name, "由 --precision 指定")


@pytest.mark.parametrize(("speedup", "expected"), [(2.4, "bf16"), (1.0, "bf16"), (0.51, "fp32"), (0.14, "fp32")])
def test_auto_on_a_cpu_measures_the_cpu(monkeypatch, speedup, expected):
    monkeypatch.setattr(accelerator, "get_accelerator", lambda: SimpleNamespace(_name="cpu"))
    monkeypatch.setattr(precision, "cpu_bf16_speedup", lambda: speedup)
    name, reason = choose_precision("auto")
    assert name == expected
    assert f"{speedup:.1f}" in reason or f"{speedup:.2f}" in reason


def test_the_speed_of_bf16_is_measured_and_nothing_else_changes():
    random_state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    precision.cpu_bf16_speedup.cache_clear()
    speedup = precision.cpu_bf16_speedup()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == num_threads
    assert precision.cpu_bf16_speedup() is speedup  # 一个进程只量一次

    # 大一倍的矩阵、墙钟时间说的是同一件事；相差不到 1.5 倍的 CPU 上不比较
    def seconds(dtype):
        matrix, runs = torch.ones(1024, 1024, dtype=dtype), []
        for _ in range(7):
            began = time.perf_counter()
            matrix @ matrix
            runs.append(time.perf_counter() - began)
        return min(runs)

    ratio = seconds(torch.float32) / seconds(torch.bfloat16)
    assert 1 / 1.5 < ratio < 1.5 or (ratio > 1) == (speedup > 1)


@pytest.mark.parametrize(
    ("seconds", "expected"), [({"fp32": 0.03, "bf16": 0.06}, "fp32"), ({"fp32": 0.03, "bf16": 0.02}, "bf16")]
)
def test_auto_on_a_cpu_weighs_a_step_of_a_small_model(monkeypatch, seconds, expected):
    monkeypatch.setattr(precision, "cpu_bf16_speedup", lambda: 6.6)
    monkeypatch.setattr(precision, "step_seconds", lambda config, name: seconds[name])
    small = BaichuanConfig(vocab_size=2000, hidden_size=128, intermediate_size=344, num_attention_heads=4)
    name, reason = choose_precision("auto", small)
    assert name == expected
    assert all(f" {1000 * value:.0f} " in reason for value in seconds.values())
    large = BaichuanConfig(vocab_size=125696)
    assert choose_precision("auto", large) == choose_precision("auto") == ("bf16", choose_precision("auto")[1])


def test_a_resumed_run_takes_the_precision_of_its_checkpoint(tmp_path):
    checkpoint = tmp_path / "epoch-1-step-4"
    checkpoint.mkdir()
    (checkpoint / "run_config.json").write_text('{"precision": "bf16", "args": {}}')
    small = BaichuanConfig(vocab_size=200, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    flags = ["--train_path", "a", "--model_name_or_path", "b", "--output_dir", str(tmp_path)]
    assert train.settle_precision(parse_args([*flags, "--resume", "auto"]), small) == ("bf16", "同检查点")
    assert "毫秒" in train.settle_precision(parse_args(flags), small)[1]
    asked = parse_args([*flags, "--resume", "auto", "--precision", "fp32"])
    assert train.settle_precision(asked, small)[0] == "fp32"


def test_a_step_is_really_taken_and_nothing_else_changes():
    random_state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    config = BaichuanConfig(vocab_size=125696, hidden_size=256, intermediate_size=688, num_attention_heads=4)
    assert 0 < precision.step_seconds(config, "fp32") < 10
    assert (config.vocab_size, config.num_hidden_layers) == (125696, 32)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == num_threads


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_asks_the_gpu(monkeypatch, native, expected):
    monkeypatch.setattr(accelerator, "get_accelerator", lambda: SimpleNamespace(_name="cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
    # 软件模拟的 bf16 不算：V100 上它很慢
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert choose_precision("auto")[0] == expected
    assert "Tesla V100" in choose_precision("auto")[1]


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_another_accelerator_asks_deepspeed(monkeypatch, native, expected):
    card = SimpleNamespace(_name="npu", is_bf16_supported=lambda: native)
    monkeypatch.setattr(accelerator, "get_accelerator", lambda: card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", None)
    assert choose_precision("auto")[0] == expected
    assert "npu" in choose_precision("auto")[1]


# ---- DeepSpeed 配置 ----


@pytest.mark.parametrize("name", DS_FILES)
def test_our_two_files_are_filled_in_completely(name):
    config = read_ds_config(ROOT / name)
    resolved = resolve(config)
    assert "auto" not in json.dumps(resolved)
    assert resolved["train_micro_batch_size_per_gpu"] == 2
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["gradient_clipping"] == 1.0
    assert resolved["optimizer"]["type"] == "AdamW"
    assert resolved["optimizer"]["params"]["lr"] == PEAK
    assert resolved["optimizer"]["params"]["weight_decay"] == 0.05
    assert resolved["optimizer"]["params"]["betas"] == [0.9, 0.95]
    assert resolved["scheduler"]["type"] == "WarmupCosineLR"
    assert resolved["scheduler"]["params"]["total_num_steps"] == 100
    assert resolved["scheduler"]["params"]["warmup_num_steps"] == 10
    assert resolved["zero_optimization"] == config["zero_optimization"]
    assert config["optimizer"]["params"]["lr"] == "auto"  # 原来的字典没有被改


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precision_switches_exactly_one(precision):
    resolved = resolve(read_ds_config(ROOT / DS_FILES[0]), precision=precision)
    assert {name: resolved[name]["enabled"] for name in ("bf16", "fp16")} == {
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
    }
    assert resolved["fp16"]["initial_scale_power"] == 16
    assert resolve({}, precision=precision)[precision if precision != "fp32" else "bf16"]["enabled"] == (
        precision != "fp32"
    )


def test_concrete_values_stay():
    config = {
        "train_batch_size": "auto",
        "gradient_clipping": 0.5,
        "optimizer": {"type": "Adam", "params": {"lr": 3e-3, "weight_decay": "auto"}},
    }
    resolved = resolve(config)
    assert resolved["train_batch_size"] == 24
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["optimizer"]["params"] == {"lr": 3e-3, "weight_decay": 0.05}
    assert (resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"]) == (2, 4)


def test_a_wrong_train_batch_size_is_told():
    assert resolve({"train_batch_size": 24})["train_batch_size"] == 24
    with pytest.raises(ValueError, match=r"train_batch_size 是 16，但 .* = 2 × 4 × 3；请改成"):
        resolve({"train_batch_size": 16})


def test_a_precision_switch_without_effect_is_told(capsys):
    resolve({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, precision="fp32")
    assert capsys.readouterr().out == "注意：精度由 --precision 决定（fp32），配置里的 bf16.enabled=True 不起作用\n"


def test_an_auto_we_do_not_know():
    with pytest.raises(
        ValueError, match='DeepSpeed 配置里的 "reduce_bucket_size": "auto" 不知道该填什么，请写具体的值'
    ):
        resolve({"zero_optimization": {"reduce_bucket_size": "auto"}})


@pytest.mark.parametrize("name", DS_FILES)
def test_cosine_as_warmup_type_is_refused(tmp_path, name):
    """ChatGLM-Finetuning 的配置这样写，DeepSpeed 只警告一句就改用 log。"""
    config = read_json(ROOT / name)
    config["scheduler"]["params"]["warmup_type"] = "cosine"
    write_json(tmp_path / "ds.json", config)
    with pytest.raises(ValueError, match=r"warmup_type.*'cosine'.*WarmupCosineLR") as caught:
        read_ds_config(tmp_path / "ds.json")
    assert str(caught.value).startswith(f"{tmp_path / 'ds.json'}: ")
    assert len(str(caught.value).split("\n")) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "应是一个 JSON 对象，得到 list"),
        (
            {"scheduler": {"type": "OneCycle"}},
            "scheduler.type='OneCycle' 不支持，可选：WarmupLR | WarmupDecayLR | Warmup",
        ),
        ({"scheduler": {"params": {}}}, "scheduler.type=None 不支持"),
        ({"scheduler": {"type": "CosineLR", "params": {}}}, "scheduler.type='CosineLR' 不支持"),
    ],
)
def test_other_mistakes_in_the_file(tmp_path, config, message):
    write_json(tmp_path / "ds.json", config)
    with pytest.raises(ValueError, match=message):
        read_ds_config(tmp_path / "ds.json")


@pytest.mark.parametrize(
    "config",
    [
        {"scheduler": "WarmupLR"},
        {"scheduler": {"type": "WarmupLR", "params": []}},
        {"optimizer": "AdamW"},
        {"zero_optimization": 3},
        {"bf16": True},
    ],
)
def test_a_section_that_is_no_object(tmp_path, config):
    write_json(tmp_path / "ds.json", config)
    with pytest.raises(ValueError, match=next(iter(config))):
        resolve(read_ds_config(tmp_path / "ds.json"))


def test_without_a_compiler_torch_adam_is_used(monkeypatch, capsys):
    config = read_ds_config(ROOT / "ds_zero3_offload.json")
    monkeypatch.setattr(ds_config, "has_cpp_compiler", lambda: False)
    resolved = resolve(config)
    assert resolved["optimizer"]["params"]["torch_adam"] is True
    assert resolved["zero_force_ds_cpu_optimizer"] is False
    assert "没有找到 C++ 编译器" in capsys.readouterr().out
    monkeypatch.setattr(ds_config, "has_cpp_compiler", lambda: True)
    assert "torch_adam" not in resolve(config)["optimizer"]["params"]
    assert "torch_adam" not in config["optimizer"]["params"]


# ---- 学习率 ----


@pytest.mark.parametrize("name", DS_FILES)
@pytest.mark.parametrize(
    ("num_steps", "warmup"),
    [(50, 5), (50, 2), (50, 1), (50, 0), (6, 5), (4, 3), (3, 0), (2, 0), (1, 0), (2, 1), (1, 1)],
)
def test_linear_warmup_then_cosine(name, num_steps, warmup):
    """第 s 步：预热 s/(W+1)，之后从峰值按余弦降到峰值的 cos_min_ratio，最后一步恰在那里。DeepSpeed 的预热至少 2 步。"""
    resolved = resolve(read_ds_config(ROOT / name), num_steps, warmup / num_steps * (1 - 1e-9))
    plateau = max(2, warmup)
    expected = []
    for step in range(1, num_steps + 1):
        if step <= plateau:
            ratio = step / (plateau + 1) if warmup else 1.0
        else:
            progress = (step - plateau) / (num_steps - plateau)
            ratio = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2
        expected.append(PEAK * ratio)
    found = learning_rates(resolved, num_steps)
    assert found == pytest.approx(expected, rel=1e-12)
    assert min(found) > 0
    if num_steps > plateau:
        assert found[-1] == pytest.approx(PEAK * FLOOR, rel=1e-12)
    if warmup == 0:
        assert found[0] == PEAK


def other_scheduler(kind: str) -> dict:
    params = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "warmup_type": "linear"}
    if kind == "WarmupDecayLR":
        params["total_num_steps"] = "auto"
    return {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "scheduler": {"type": kind, "params": params}}


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR"])
def test_warmup_of_the_other_two_schedulers(kind):
    found = learning_rates(resolve(other_scheduler(kind), 50, 0.1), 50)
    assert found[:6] == pytest.approx([PEAK * s / 6 for s in (1, 2, 3, 4, 5, 6)], rel=1e-12)
    assert (found[-1] == pytest.approx(PEAK)) == (kind == "WarmupLR")


@pytest.mark.parametrize("warmup_ratio", [0, 0.1])
def test_linear_decay_really_decays(warmup_ratio):
    """DeepSpeed 的 WarmupDecayLR 衰减到 warmup_min_lr：把它填成峰值，就一点也不衰减了。"""
    found = learning_rates(resolve(other_scheduler("WarmupDecayLR"), 50, warmup_ratio), 50)
    assert found[-1] < 0.2 * PEAK


@pytest.mark.parametrize(("warmup_ratio", "warmup_steps"), [(0.1, 4), (0.25, 10), (0.5, 20)])
def test_warmup_ratio_is_really_used(warmup_ratio, warmup_steps):
    found = learning_rates(resolve(read_ds_config(ROOT / DS_FILES[0]), 40, warmup_ratio), 40)
    rising = [later > earlier for earlier, later in itertools.pairwise(found)]
    assert rising.index(False) in (warmup_steps - 1, warmup_steps)
