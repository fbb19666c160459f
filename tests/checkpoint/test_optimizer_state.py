"""optimizer_state.py：真实的 DeepSpeed 训练（CPU、gloo，1 与 2 个进程），断点续训与一口气训完逐位比较。"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file

from finetune.process.training_process import free_port

WORKER = ROOT / "tests" / "helpers" / "optimizer_state_worker.py"
AT = 4  # 在第几步之后保存，与 optimizer_state_worker.py 一致
CPU_OFFLOAD = {"device": "cpu", "pin_memory": False}

FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
EIGHT_BITS = {"own": "AdamW8bit", "width": 1401}  # 两个进程时一段也多于 4096 个元素：再少它就不用 8 位

DEFAULT_CASES = {
    "z2-fp32": {"stage": 2},
    "z2-bf16": {"stage": 2, "precision": "bf16"},
    "z2-fp32-offload": {"stage": 2, "offload": True},
    "z3-bf16-offload": {"stage": 3, "precision": "bf16", "offload": True},
    "z2-bf16-sums-fp32": {"stage": 2, "precision": "bf16", "config": FP32_SUMS},
    "z2-adamw-bf16": {"stage": 2, "precision": "bf16", "own": "AdamWBF16"},
    "z2-adamw-8bit": {"stage": 2, "precision": "bf16", **EIGHT_BITS},
    "z3-fp32": {"stage": 3, "zero": {"stage3_param_persistence_threshold": 8}},
}
TORCH_ADAM = {"torch_adam": True}
SLOW_CASES = {
    f"z{stage}-{precision}{'-offload' if offload else ''}": {"stage": stage, "precision": precision, "offload": offload}
    for stage in (1, 2, 3)
    for precision in ("fp32", "bf16")
    for offload in (False, True)
}
SLOW_CASES = {
    **{name: case for name, case in SLOW_CASES.items() if name not in DEFAULT_CASES},
    "z2-fp32-torch": {"stage": 2, "optimizer": TORCH_ADAM},
    "z2-bf16-torch": {"stage": 2, "precision": "bf16", "optimizer": TORCH_ADAM},
    "z3-bf16-torch": {"stage": 3, "precision": "bf16", "optimizer": TORCH_ADAM},
    "z1-fp16": {"stage": 1, "precision": "fp16"},
    "z2-fp16-offload": {"stage": 2, "precision": "fp16", "offload": True},
    "z3-fp16": {"stage": 3, "precision": "fp16"},
    "z1-bf16-grad-bf16": {"stage": 1, "precision": "bf16", "config": {"data_types": {"grad_accum_dtype": "bf16"}}},
    "z2-one-group": {"stage": 2, "groups": 1},
    "z3-one-group": {"stage": 3, "groups": 1, "offload": True},
    "z2-round-robin": {"stage": 2, "precision": "bf16", "zero": {"round_robin_gradients": True}},
    "z2-betas-offload": {"stage": 2, "offload": True, "second_betas": [0.8, 0.99]},
    "z3-betas-offload": {"stage": 3, "precision": "bf16", "offload": True, "second_betas": [0.8, 0.99]},
    "z3-param-offload": {"stage": 3, "precision": "bf16", "offload": True, "zero": {"offload_param": CPU_OFFLOAD}},
    "z3-sub-groups": {"stage": 3, "precision": "bf16", "zero": {"sub_group_size": 20}},
    "z3-sub-groups-offload": {"stage": 3, "offload": True, "zero": {"sub_group_size": 20}},
    "z3-bf16-sums-fp32": {"stage": 3, "precision": "bf16", "config": FP32_SUMS},
    "z2-bf16-offload-sums-fp32": {"stage": 2, "precision": "bf16", "offload": True, "config": FP32_SUMS},
    "z2-adamw-bf16-sums-fp32": {"stage": 2, "precision": "bf16", "own": "AdamWBF16", "config": FP32_SUMS},
    "z3-adamw-bf16": {"stage": 3, "precision": "bf16", "own": "AdamWBF16"},
    "z3-adamw-bf16-sub-groups": {"stage": 3, "precision": "bf16", "own": "AdamWBF16", "zero": {"sub_group_size": 20}},
    "z2-adamw-8bit-fp32": {"stage": 2, **EIGHT_BITS},
    "z3-adamw-8bit": {"stage": 3, "precision": "bf16", **EIGHT_BITS},
    "z2-adamw-8bit-small": {"stage": 2, "own": "AdamW8bit"},
    "z3-not-persistent": {"stage": 3, "precision": "bf16", "zero": {"stage3_param_persistence_threshold": 0}},
}
# 存不了的 → 说明里的话
UNSUPPORTED = {
    "sgd": ({"stage": 2, "config": {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}}, "SGD"),
    "no-zero": ({"stage": 0, "precision": "bf16"}, "ZeRO-1、2、3"),
    "ratio": ({"stage": 3, "zero": {"offload_optimizer": {**CPU_OFFLOAD, "ratio": 0.5}}}, "ratio"),
}


def run_ranks(folder: Path, world: int, tasks: list[dict], timeout: float = 600) -> None:
    """拉起 world 个进程依次做完 tasks；有进程失败则结束其余的并给出它的日志。"""
    order = folder / f"tasks-{time.monotonic_ns()}.json"
    order.write_text(json.dumps(tasks), encoding="utf-8")
    port = free_port()
    # 不设 LOCAL_SIZE：否则每个进程要在 /dev/shm 占 69 MB
    common = {key: value for key, value in os.environ.items() if key != "LOCAL_SIZE"}
    common |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "DEEPSPEED_LOG_LEVEL": "error",
        "PYTHONPATH": str(ROOT),
    }
    logs = [order.with_suffix(f".rank{rank}.log") for rank in range(world)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as stream:
                command = [sys.executable, str(WORKER), str(order)]
                processes.append(subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() not in (None, 0) for process in processes)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        codes = [process.wait() for process in processes]
        for leftover in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            leftover.unlink()
    tails = "\n".join(f"--- rank {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs))
    assert codes == [0] * world, f"退出码 {codes}\n{tails}"


def is_bound(name: str) -> bool:
    """只能用同样的进程数续训：状态按进程分块。"""
    return "width" in {**DEFAULT_CASES, **SLOW_CASES}[name]


def run_matrix(folder: Path, cases: dict[str, dict]) -> Path:
    """四次拉起：各在 2、1 个进程上训练并保存，再由新进程恢复（同样的进程数与另一种进程数）。"""

    def tasks(world: int, action: str, name: str, seed: int, **options) -> list[dict]:
        shared = {"name": name, "seed": seed, **options}
        return [
            {
                **{"case": case, "folder": str(folder / key / f"w{world}"), **shared},
                "action": "refused"
                if action == "resume" and is_bound(key) and not name.endswith(f"-{world}")
                else action,
            }
            for key, case in cases.items()
        ]

    def first(world: int) -> list[dict]:
        return tasks(world, "straight", "straight", 1) + tasks(world, "save", "saved", 1)

    def extra(world: int) -> list[dict]:
        """附在默认那一组里的：换日程、误用、不支持的优化器；省下几次拉起进程的时间。"""
        if cases is not DEFAULT_CASES:
            return []
        if world == 1:
            return tasks(1, "resume", "rescheduled", 2, total_steps=10, restore_lr=False)[-1:]
        name = "z2-fp32-offload"
        base = {
            "case": cases[name],
            "folder": str(folder / name / "w2"),
            "action": "errors",
            "name": "errors",
            "seed": 3,
        }
        refused = [
            base | {"case": case, "action": "unsupported", "name": key} for key, (case, _) in UNSUPPORTED.items()
        ]
        return [*refused, base]

    folder.mkdir(parents=True, exist_ok=True)
    run_ranks(folder, 2, first(2))
    run_ranks(folder, 1, first(1) + tasks(2, "resume", "resumed-on-1", 2))
    run_ranks(folder, 2, tasks(2, "resume", "resumed-on-2", 2) + tasks(1, "resume", "resumed-on-2", 2) + extra(2))
    run_ranks(folder, 1, tasks(1, "resume", "resumed-on-1", 2) + extra(1))
    return folder


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """返回 matrix(case 名) → (结果目录, case)；默认的与慢的各跑一遍，跑过的不再跑。"""
    finished: dict[str, Path] = {}

    def find(name: str) -> tuple[Path, dict]:
        group, cases = ("default", DEFAULT_CASES) if name in DEFAULT_CASES else ("slow", SLOW_CASES)
        if group not in finished:
            finished[group] = tmp_path_factory.mktemp(group)  # 先记下：跑失败也不再跑，其余测试随即因缺文件而失败
            run_matrix(finished[group], cases)
        return finished[group] / name, cases[name]

    return find


def read(path: Path) -> dict:
    return json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))


def assert_same_tensors(one: Path, other: Path) -> None:
    left, right = (load_file(path.with_name(path.name + ".safetensors")) for path in (one, other))
    assert left.keys() == right.keys() and left
    different = [name for name in left if left[name].dtype != right[name].dtype or not left[name].equal(right[name])]
    assert different == []


def cases(names) -> list:
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW_CASES else ()) for name in names]


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", cases([*DEFAULT_CASES, *SLOW_CASES]))
@pytest.mark.parametrize("world", [1, 2])
def test_same_ranks_continue_bit_for_bit(matrix, name, world):
    folder = matrix(name)[0] / f"w{world}"
    straight, saved, resumed = (read(folder / key) for key in ("straight", "saved", f"resumed-on-{world}"))
    assert saved["losses"] == straight["losses"]  # 保存不扰动训练
    assert_same_tensors(folder / "saved", folder / "straight")
    assert_same_tensors(folder / f"resumed-on-{world}.loaded", folder / "state")
    assert resumed["losses"] == straight["losses"][AT:]
    assert_same_tensors(folder / f"resumed-on-{world}", folder / "straight")
    assert resumed["scalars"] == straight["scalars"]


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", cases(name for name in [*DEFAULT_CASES, *SLOW_CASES] if not is_bound(name)))
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_other_ranks_load_the_same_state_and_follow_the_curve(matrix, name, before, after):
    folder, case = matrix(name)
    folder /= f"w{before}"
    assert_same_tensors(folder / f"resumed-on-{after}.loaded", folder / "state")
    straight, resumed = read(folder / "straight"), read(folder / f"resumed-on-{after}")
    tolerance = 1e-5 if case.get("precision", "fp32") == "fp32" else 1e-2
    assert resumed["losses"] == pytest.approx(straight["losses"][AT:], rel=tolerance)
    counters, expected = resumed["scalars"]["engine"], straight["scalars"]["engine"]
    # 全局 batch 是 4 行、微批 2 行：1 个进程每步累积两次
    assert counters == {**expected, "micro_steps": counters["global_steps"] * (2 if after == 1 else 1)}


@pytest.mark.deepspeed
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_blocks_of_8_bits_are_refused_at_other_ranks(matrix, before, after):
    folder = matrix("z2-adamw-8bit")[0] / f"w{before}"
    state, report = load_file(folder / "state.safetensors"), read(folder / "state")
    # 一组 8 × 1401 个矩阵元素，一组 1404 个偏置（不足 4096，仍是 fp32）
    blocks = {f"blocks.0.absmax{n}": (before, -(-8 * 1401 // before // 256)) for n in (1, 2)}
    assert {name: tuple(t.shape) for name, t in state.items() if name.startswith("blocks")} == blocks
    assert report["blocks"] == {name: list(shape) for name, shape in blocks.items()}
    assert {state[f"up.{kind}.state1"].dtype for kind in ("weight", "bias")} == {torch.uint8, torch.float32}
    refused = read(folder / f"resumed-on-{after}")["refused"]
    assert len(refused) == after and all(text.startswith("ValueError") and "进程数" in text for text in refused)


@pytest.mark.deepspeed
def test_16_bit_states_hold_the_rest_of_the_weights(matrix):
    folder, _ = matrix("z2-adamw-bf16")
    state = load_file(folder / "w2" / "state.safetensors")
    kinds = {"master": torch.bfloat16, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
    kinds["compensation"] = torch.int16
    for name in ("up.weight", "down.bias"):
        assert {key: state[f"{name}.{key}"].dtype for key in kinds} == kinds
        assert state[f"{name}.master"].equal(state[f"{name}.weight_used"])
        assert state[f"{name}.compensation"].count_nonzero() > 0


@pytest.mark.deepspeed
def test_state_holds_every_trained_parameter_in_full(matrix):
    folder, _ = matrix("z3-bf16-offload")
    state = load_file(folder / "w2" / "state.safetensors")
    shapes = {"up.weight": (7, 5), "up.bias": (7,), "down.weight": (3, 7), "down.bias": (3,)}
    expected = {f"{name}.{key}": shape for name, shape in shapes.items() for key in ("master", "exp_avg", "exp_avg_sq")}
    tensors = {name: tensor for name, tensor in state.items() if not name.endswith("weight_used")}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    for name in shapes:
        assert state[f"{name}.master"].bfloat16().equal(state[f"{name}.weight_used"])
        assert state[f"{name}.exp_avg_sq"].count_nonzero() == state[f"{name}.exp_avg_sq"].numel()
    scalars = read(folder / "w2" / "state")
    assert scalars["optimizer"] == "DeepSpeedCPUAdam"
    assert [group["params"] for group in scalars["groups"]] == [
        {"up.weight": [7, 5], "down.weight": [3, 7]},
        {"up.bias": [7], "down.bias": [3]},
    ]
    assert [group["hyper"]["weight_decay"] for group in scalars["groups"]] == [0.1, 0.0]
    assert [group["step"] for group in scalars["groups"]] == [AT, AT]
    assert scalars["scheduler"] == {"class": "WarmupDecayLR", "state": {"last_batch_iteration": AT - 1}}
    assert scalars["engine"] == {"global_steps": AT, "global_samples": 4 * AT, "micro_steps": AT, "skipped_steps": 0}


@pytest.mark.deepspeed
def test_learning_rate_follows_a_new_schedule(matrix):
    # 总步数由 20 改为 10：warmup 2 步之后线性下降，last_batch_iteration=3
    folder, _ = matrix(list(DEFAULT_CASES)[-1])
    low, high = 0.001, 0.02
    expected = {"resumed-on-1": low + (high - low) * 17 / 18, "rescheduled": low + (high - low) * 7 / 8}
    for name, rate in expected.items():
        assert read(folder / "w1" / name)["lr"] == pytest.approx([rate, rate], rel=1e-12)


@pytest.mark.deepspeed
@pytest.mark.slow
def test_fp16_overflow_counters_are_restored(matrix):
    folder, _ = matrix("z1-fp16")
    state = read(folder / "w2" / "state")
    assert state["engine"]["skipped_steps"] > 0
    assert state["groups"][0]["step"] == AT - state["engine"]["skipped_steps"]
    assert state["loss_scaler"].keys() == {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"}
    assert state["loss_scaler"]["cur_scale"] < 2**30


@pytest.mark.deepspeed
def test_misuse_is_refused_on_every_rank(matrix):
    folder = matrix("z2-fp32-offload")[0] / "w2"
    errors = read(folder / "errors")
    for key, pattern in {
        "groups": r"优化器有 2 个参数分组，检查点里有 1 个",
        "shape": r"第 0 组的可训练参数与检查点不同（多出、缺少或形状不同）：up\.weight 共 1 个",
    }.items():
        assert all(re.search(pattern, text) and text.startswith("ValueError") for text in errors[key]), errors[key]
    assert "rank 1" in errors["rank_1"][0]
    assert "-missing" in errors["rank_1"][1]
    for name, (_, said) in UNSUPPORTED.items():
        assert all(said in text and "--no-save_trainer_state" in text for text in read(folder / name)["unsupported"])
