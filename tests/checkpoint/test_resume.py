"""resume.py、run_record.py 与 train.py 的续训：真实的 deepspeed 训练，续训与没有打断过的一次逐位相同。

默认的几组在同一组进程里接连运行（打断是真实的信号）；slow 的每一次都是新的进程，覆盖全部 16 种组合。
"""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from asserting import lacks
from launching import run_tasks
from resume_runs import GLOBAL_BATCH, METHODS, NUM_ROWS, SAVED, assert_same_bits, cut_after, flags_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_runs import DS_FILES, SIZES, records_of, write_rows

from finetune import options as option_tables
from finetune.checkpoint.output_dir import hold_output_dir
from finetune.checkpoint.resume import check_same_run, find_resume_point
from finetune.cli.train_flags import TrainOptions
from finetune.methods.registry import TRAIN_METHODS
from finetune.process.random_state import random_state, set_random_state
from utils import read_json, write_json


class Group(NamedTuple):
    """一组进程接连做完的任务。"""

    directory: Path
    results: dict[str, dict]
    base_of: dict[str, Path]

    def output(self, name: str) -> str:
        return self.results[name]["output"]

    def code(self, name: str):
        return self.results[name]["code"]


# ---------------------------------------------------------------------------------------------------------------------
# 默认：一个进程与两个进程的两组


@pytest.fixture(scope="module")
def bases(tiny_checkpoint) -> dict[str, Path]:
    return {method: tiny_checkpoint(arch, **SIZES) for method, (arch, _) in METHODS.items()}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, bases) -> Group:
    directory = tmp_path_factory.mktemp("one-rank")
    rows = write_rows(directory / "rows.json", NUM_ROWS)

    def task(name: str, *more, method: str = "lora", zero: str = "zero2", **options) -> dict:
        return {"flags": flags_of(bases[method], rows, directory / name, zero, method, 1, *more), **options}

    # full 没有 dropout：other ranks 停在第 3 步，由两个进程接着走（见 two_ranks）
    results = run_tasks(
        directory,
        {
            "whole": task("whole"),
            "signal": task("signal", kill={"step": 5, "rank": 0, "signal": "SIGUSR1"}),
            "signal again": task("signal", "--resume", "auto", kill={"step": 7, "rank": 0, "signal": "SIGTERM"}),
            "signal last": task("signal", "--resume", "auto"),
            "longer": task("longer", "--resume", "auto", "--num_train_epochs", 3, copy=[str(directory / "signal"),
                           str(directory / "longer")]),
            "full": task("full", method="full", zero="zero3"),
            "no checkpoint": task("other ranks", "--resume", "auto", method="full",
                                  kill={"step": 3, "rank": 0, "signal": "SIGINT"}),
            "other ranks whole": task("other ranks whole", method="full"),
        },
        1,
    )  # fmt: skip
    return Group(directory, results, bases)


@pytest.fixture(scope="module")
def one_rank_cut(one_rank) -> Group:
    """接着 one_rank 的结果：从第 3 步（一轮的中间）的检查点接着走。"""
    directory = one_rank.directory
    rows, tasks = directory / "rows.json", {}
    for name, method, zero in (("whole", "lora", "zero2"), ("full", "full", "zero3")):
        output = Path(shutil.copytree(directory / name, directory / f"{name}-cut"))
        cut_after(output, 3)
        flags = flags_of(one_rank.base_of[method], rows, output, zero, method, 1)
        tasks[name] = {"flags": [*flags, "--resume", "auto"]}
    # 最新的一个坏了一个字节，次新的没有清单：都跳过，用第 4 步的
    damaged = Path(shutil.copytree(directory / "whole", directory / "damaged"))
    weights = damaged / SAVED[3] / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (damaged / SAVED[2] / "manifest.json").unlink()
    flags = flags_of(one_rank.base_of["lora"], rows, damaged, "zero2", "lora", 1)
    tasks["damaged"] = {"flags": [*flags, "--resume", "auto"]}
    tasks["named damaged"] = {"flags": [*flags, "--resume", str(damaged / "previous-1" / SAVED[3])]}
    flags = flags_of(one_rank.base_of["lora"], rows, directory / "elsewhere", "zero2", "lora", 1)
    tasks["named"] = {"flags": [*flags, "--resume", str(directory / "whole" / SAVED[1])]}
    flags = flags_of(one_rank.base_of["lora"], rows, directory / "signal", "zero2", "lora", 1, "--resume", "auto")
    tasks["finished"] = {"flags": [*flags, "--show_loss_step", "1", "--save_model_step", "2"]}
    tasks["changed"] = {"flags": [*flags, "--seed", "7", "--lora_dim", "4"]}
    workplace = directory / "cut"
    workplace.mkdir()
    before = snapshot(directory / "signal")
    results = run_tasks(workplace, tasks, 1)
    assert snapshot(directory / "signal") == before  # 走完的训练，什么也没有改动
    return Group(directory, results, one_rank.base_of)


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    """每个文件的修改时刻与内容。"""
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in directory.rglob("*")
    }


@pytest.fixture(scope="module")
def two_ranks(one_rank) -> Group:
    directory = one_rank.directory / "two-ranks"
    directory.mkdir()
    rows, tasks = one_rank.directory / "rows.json", {}
    for method, zero in (("ptuning", "zero2"), ("freeze", "zero3")):
        flags = flags_of(one_rank.base_of[method], rows, directory / method, zero, method, 2)
        tasks[method] = {"flags": flags}
        kill = {"step": 5, "rank": 1, "signal": "SIGTERM"}
        flags = flags_of(one_rank.base_of[method], rows, directory / f"{method}-cut", zero, method, 2)
        tasks[f"{method} signal"] = {"flags": flags, "kill": kill}
        tasks[f"{method} resumed"] = {"flags": [*flags, "--resume", "auto"]}
    source = one_rank.directory / "other ranks"
    flags = flags_of(one_rank.base_of["full"], rows, directory / "other", "zero2", "full", 1, "--resume", "auto")
    tasks["other ranks"] = {"flags": flags, "copy": [str(source), str(directory / "other")]}
    refused = [flag if flag != str(directory / "other") else str(directory / "refused") for flag in flags]
    refused[refused.index("--per_device_train_batch_size") + 1] = "4"
    tasks["refused"] = {"flags": refused, "copy": [str(source), str(directory / "refused")]}
    return Group(directory, run_tasks(directory, tasks, 2), one_rank.base_of)


@pytest.mark.deepspeed
def test_saved_and_ended_at_every_signal(one_rank, two_ranks):
    assert {name: one_rank.code(name) for name in ("whole", "signal", "signal again", "signal last")} == {
        "whole": 0,
        "signal": 75,
        "signal again": 75,
        "signal last": 0,
    }, one_rank.results
    assert "收到 SIGUSR1，已保存；用 --resume auto 接着训练：5 步" in one_rank.output("signal")
    assert "收到 SIGTERM，已保存" in one_rank.output("signal again")
    signal_dir = one_rank.directory / "signal"
    assert {path.name for path in signal_dir.glob("epoch-*")} == {*SAVED, "epoch-2-step-5", "epoch-2-step-7"}
    # 信号只到了 1 号进程：0 号进程一起停下
    for method in ("ptuning", "freeze"):
        assert two_ranks.code(f"{method} signal") == 75, two_ranks.output(f"{method} signal")
        assert (two_ranks.directory / f"{method}-cut" / "epoch-2-step-5").is_dir()


@pytest.mark.deepspeed
def test_resumed_after_signals_is_bit_equal(one_rank, two_ranks):
    whole, resumed = one_rank.directory / "whole", one_rank.directory / "signal"
    assert f"resume: step 5 from {resumed / 'epoch-2-step-5'}\n" in one_rank.output("signal again")
    assert f"resume: step 7 from {resumed / 'epoch-2-step-7'}\n" in one_rank.output("signal last")
    assert_same_bits(resumed / SAVED[3], whole / SAVED[3])
    assert records_of(resumed) == records_of(whole)
    for method in ("ptuning", "freeze"):
        whole, resumed = two_ranks.directory / method, two_ranks.directory / f"{method}-cut"
        assert two_ranks.code(f"{method} resumed") == 0, two_ranks.output(f"{method} resumed")
        assert_same_bits(resumed / SAVED[3], whole / SAVED[3])
        assert records_of(resumed) == records_of(whole)


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", ["whole", "full"])
def test_resumed_from_the_middle_of_an_epoch_is_bit_equal(one_rank_cut, name):
    whole, resumed = one_rank_cut.directory / name, one_rank_cut.directory / f"{name}-cut"
    assert one_rank_cut.code(name) == 0, one_rank_cut.output(name)
    assert f"resume: step 3 from {resumed / SAVED[0]}\n" in one_rank_cut.output(name)
    assert f" {resumed / '.tmp-epoch-2-step-6'}" in one_rank_cut.output(name)
    for saved in SAVED:
        assert_same_bits(resumed / saved, whole / saved)
    assert records_of(resumed) == records_of(whole)
    assert sorted(path.name for path in resumed.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.deepspeed
def test_tensorboard_is_cut_back_too(one_rank_cut):
    def points(output: Path) -> list[tuple[int, float]]:
        events = EventAccumulator(str(output / "runs"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars("train/loss")]

    assert points(one_rank_cut.directory / "whole-cut") == points(one_rank_cut.directory / "whole")


@pytest.mark.deepspeed
def test_the_log_has_every_step_once(one_rank):
    records = records_of(one_rank.directory / "whole")
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 4, 6, 8]
    assert [record["step"] for record in records if "eval/nll" in record] == [4, 8]


@pytest.mark.deepspeed
def test_auto_without_a_checkpoint_starts_afresh(one_rank):
    assert "resume: step 0, fresh start\n" in one_rank.output("no checkpoint")
    assert "resume: step 0, fresh start\n" in one_rank.output("whole")
    assert one_rank.code("no checkpoint") == 75


@pytest.mark.deepspeed
def test_auto_on_a_finished_run_says_so(one_rank_cut):
    """什么也没有改动，在 one_rank_cut 里核对。"""
    saved = one_rank_cut.directory / "signal" / SAVED[3]
    assert re.search(rf"resume: {saved} .* 8 .* 8 ", one_rank_cut.output("finished"))
    assert one_rank_cut.code("finished") == 0


@pytest.mark.deepspeed
def test_a_changed_flag_is_refused_with_the_list(one_rank_cut):
    output = one_rank_cut.output("changed")
    assert one_rank_cut.code("changed") == 2
    assert re.search(r"\n--lora_dim：.* 8，.* 4\n--seed：.* 1234，.* 7\n", output)
    assert "Traceback" not in output


@pytest.mark.deepspeed
def test_more_epochs_rebuild_the_schedule(one_rank):
    assert re.search("resume: .* 8 .* 12", one_rank.output("longer"))
    assert one_rank.code("longer") == 0, one_rank.output("longer")
    records = records_of(one_rank.directory / "longer")
    rates = {record["step"]: record["lr"] for record in records if "lr" in record}
    assert list(rates) == [1, 2, 4, 6, 8, 10, 12]
    # 新的日程：预热 round(1.2) 步，峰值 5e-3，余弦到十分之一；前 8 步的记录仍是旧的日程
    assert rates[10] > rates[8]
    assert rates[12] < rates[10]
    assert rates[12] == pytest.approx(5e-4, rel=0.1)


@pytest.mark.deepspeed
def test_damaged_checkpoints_are_skipped_and_told(one_rank_cut):
    damaged, output = one_rank_cut.directory / "damaged", one_rank_cut.output("damaged")
    assert one_rank_cut.code("damaged") == 0, output
    assert f" {damaged / SAVED[3]}：adapter_model.safetensors: " in output
    assert re.search(rf" {damaged / SAVED[2]}：.*manifest\.json", output)
    assert f"resume: step 4 from {damaged / SAVED[1]}\n" in output
    # 起点之后的移到一边，不丢
    assert f"{SAVED[2]}、{SAVED[3]} 移到了 {damaged / 'previous-1'}" in output
    assert {path.name for path in (damaged / "previous-1").iterdir()} == set(SAVED[2:])
    assert_same_bits(damaged / SAVED[3], one_rank_cut.directory / "whole" / SAVED[3])
    assert one_rank_cut.code("named damaged") == 2
    assert f"--resume {damaged / 'previous-1' / SAVED[3]} 不能用：" in one_rank_cut.output("named damaged")


@pytest.mark.deepspeed
def test_a_named_checkpoint_of_another_directory(one_rank_cut):
    directory = one_rank_cut.directory
    assert f"resume: step 4 from {directory / 'whole' / SAVED[1]}\n" in one_rank_cut.output("named")
    assert_same_bits(directory / "elsewhere" / SAVED[3], directory / "whole" / SAVED[3])
    whole = [record for record in records_of(directory / "whole") if record["step"] > 4]
    assert records_of(directory / "elsewhere") == whole


@pytest.mark.deepspeed
def test_other_ranks_keep_the_curve(one_rank, two_ranks):
    assert "resume: 全局 batch 保持 4，gradient_accumulation_steps 改为 2\n" in two_ranks.output("other ranks")
    assert two_ranks.code("other ranks") == 0, two_ranks.output("other ranks")
    assert_same_curve(two_ranks.directory / "other", one_rank.directory / "other ranks whole")
    run_config = read_json(two_ranks.directory / "other" / SAVED[3] / "run_config.json")
    assert (run_config["global_batch_size"], run_config["world_size"]) == (GLOBAL_BATCH, 2)
    assert run_config["args"]["gradient_accumulation_steps"] == 2
    assert two_ranks.code("refused") == 2
    assert "全局 batch 是 4，不能被 per_device_train_batch_size × 进程数 = 4 × 2 整除" in two_ranks.output("refused")


def assert_same_curve(found: Path, expected: Path):
    """损失与评估处处相差不到 1e-4。"""
    for ours, theirs in zip(records_of(found), records_of(expected), strict=True):
        assert ours["step"] == theirs["step"]
        key = "loss" if "loss" in theirs else "eval/nll"
        assert ours[key] == pytest.approx(theirs[key], abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# 不起进程的


def fake_checkpoint(directory: Path, **changes) -> tuple[Path, dict]:
    """只有 run_config.json 的检查点目录，与一次新运行的 run_config。"""
    run_config = {
        "args": {"lora_dim": 8, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "output_dir": "a"},
        "data": {"train": "aa"},
        "base_model": {"hashes": {"config.json": "bb"}},
        "adapter": {},
        "ds_file": {"zero_optimization": {"stage": 2}},
        "precision": "fp32",
        "global_batch_size": 8,
    }
    directory.mkdir(parents=True)
    write_json(directory / "run_config.json", run_config)
    return directory, json.loads(json.dumps(run_config)) | changes


def args_of(run_config: dict) -> TrainOptions:
    return TrainOptions(**run_config["args"], train_path="rows.json", model_name_or_path="base", ds_file="ds.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": "xx"}}, "训练数据 rows.json 的内容变了"),
        ({"base_model": {"hashes": {}}}, "基座 base 的文件变了"),
        ({"adapter": {"adapter_model.safetensors": "xx"}}, "起点的适配器 None 的文件变了"),
        ({"ds_file": {}}, "DeepSpeed 配置 ds.json 的内容变了"),
        ({"precision": "bf16"}, "精度：检查点是 fp32，现在是 bf16"),
    ],
)
def test_another_input_is_refused(tmp_path, changes, message):
    directory, run_config = fake_checkpoint(tmp_path / "epoch-1-step-3", **changes)
    with pytest.raises(ValueError, match=message):
        check_same_run(directory, args_of(run_config), run_config)


def test_a_flag_that_the_record_lacks_counts_as_its_default(tmp_path):
    directory, run_config = fake_checkpoint(tmp_path / "epoch-1-step-3")
    check_same_run(directory, args_of(run_config), run_config)
    run_config["args"]["lora_dropout"] = 0.2
    with pytest.raises(ValueError, match=r"--lora_dropout：检查点是 0\.1，现在是 0\.2"):
        check_same_run(directory, args_of(run_config), run_config)


def test_a_bf16_run_that_does_not_record_how_gradients_add_goes_on_in_bf16(tmp_path):
    directory, run_config = fake_checkpoint(tmp_path / "epoch-1-step-3")
    for number, start in enumerate(("auto", "auto", "fp32")):  # 第二次接着的是第一次记下的
        saved = json.loads((directory / "run_config.json").read_text(encoding="utf-8"))
        write_json(directory / "run_config.json", saved | {"precision": "bf16"})
        now = json.loads(json.dumps(run_config)) | {"precision": "bf16"}
        args = args_of(now)
        args.grad_accum_dtype = now["args"]["grad_accum_dtype"] = start
        if number == 2:
            with pytest.raises(ValueError, match="--grad_accum_dtype：检查点是 'bf16'，现在是 'fp32'"):
                check_same_run(directory, args, now)
            continue
        check_same_run(directory, args, now)
        assert args.grad_accum_dtype == now["args"]["grad_accum_dtype"] == "bf16"
        write_json(directory / "run_config.json", now)


def test_the_global_batch_survives_two_changes_of_ranks(tmp_path, capsys):
    """换进程数续训后存下的 run_config 仍是原来的全局 batch，再换回来时不会变成另一次训练。"""
    directory, run_config = fake_checkpoint(tmp_path / "epoch-1-step-3", global_batch_size=16)  # 两个进程时的样子
    run_config["args"]["gradient_accumulation_steps"] = 8
    args = args_of(run_config)
    check_same_run(directory, args, run_config)
    assert args.gradient_accumulation_steps == 4
    assert run_config["global_batch_size"] == 8
    assert run_config["args"]["gradient_accumulation_steps"] == 4
    assert "resume: 全局 batch 保持 8，gradient_accumulation_steps 改为 4" in capsys.readouterr().out


def test_logging_flags_are_free():
    expected = {"show_loss_step", "save_model_step", "logging_dir", "num_train_epochs", "eval_path", "output_dir"}
    free = {field.name for field in option_tables.flags_of(TrainOptions) if not field.metadata["changes_training"]}
    assert expected <= free
    assert not free & {"seed", "learning_rate", "lora_dim", "max_len", "packing", "train_type"}


@pytest.mark.parametrize("name", ["epoch-1-step-3", "wrong-name"])
def test_a_named_directory_must_be_a_whole_checkpoint(tmp_path, name):
    (tmp_path / name).mkdir()
    reason = "没有 manifest.json" if name.startswith("epoch") else "不是检查点目录"
    with pytest.raises(ValueError, match=f"--resume .*{name} 不能用：{reason}"):
        find_resume_point(str(tmp_path / name), tmp_path)


def test_random_state_goes_round():
    import random

    import numpy as np

    random.gauss(0, 1)
    np.random.randn(3)
    state = random_state()
    expected = (torch.rand(3), np.random.randn(3), random.gauss(0, 1), random.random())
    set_random_state(state)
    found = (torch.rand(3), np.random.randn(3), random.gauss(0, 1), random.random())
    assert torch.equal(found[0], expected[0])
    assert (found[1] == expected[1]).all()
    assert found[2:] == expected[2:]


# ---------------------------------------------------------------------------------------------------------------------
# 较慢的：每一次都是新的进程


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("zero", DS_FILES)
@pytest.mark.parametrize("method", TRAIN_METHODS)
def test_resume_is_bit_equal_for_every_combination(bases, tmp_path, method, zero, num_ranks):
    rows = write_rows(tmp_path / "rows.json", NUM_ROWS)
    whole = flags_of(bases[method], rows, tmp_path / "whole", zero, method, num_ranks)
    cut = flags_of(bases[method], rows, tmp_path / "cut", zero, method, num_ranks)
    kill = {"step": 5, "rank": num_ranks - 1, "signal": "SIGTERM"}
    results = run_tasks(tmp_path, {"cut": {"flags": cut, "kill": kill}, "whole": {"flags": whole}}, num_ranks)
    assert {name: result["code"] for name, result in results.items()} == {"whole": 0, "cut": 75}, results
    results = run_tasks(tmp_path, {"resumed": {"flags": [*cut, "--resume", "auto"]}}, num_ranks)
    assert results["resumed"]["code"] == 0, results
    assert f"resume: step 5 from {tmp_path / 'cut' / 'epoch-2-step-5'}\n" in results["resumed"]["output"]
    assert_same_bits(tmp_path / "cut" / SAVED[3], tmp_path / "whole" / SAVED[3])
    assert records_of(tmp_path / "cut") == records_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize(("zero", "ranks"), list(itertools.product(DS_FILES, [(1, 2), (2, 1)])))
def test_other_ranks_keep_the_curve_in_new_processes(bases, tmp_path, zero, ranks):
    """换一个进程数，再换回来：损失处处相差不到 1e-4。"""
    first, second = ranks
    rows = write_rows(tmp_path / "rows.json", NUM_ROWS)
    flags = flags_of(bases["full"], rows, tmp_path / "cut", zero, "full", first)
    whole = flags_of(bases["full"], rows, tmp_path / "whole", zero, "full", first)
    kill = {"step": 2, "rank": 0, "signal": "SIGTERM"}
    run_tasks(tmp_path, {"cut": {"flags": flags, "kill": kill}, "whole": {"flags": whole}}, first)
    kill = {"step": 5, "rank": second - 1, "signal": "SIGTERM"}
    results = run_tasks(tmp_path, {"other": {"flags": [*flags, "--resume", "auto"], "kill": kill}}, second)
    assert results["other"]["code"] == 75, results
    results = run_tasks(tmp_path, {"back": {"flags": [*flags, "--resume", "auto"]}}, first)
    assert results["back"]["code"] == 0, results
    assert_same_curve(tmp_path / "cut", tmp_path / "whole")


def test_the_combinations_name_every_method():
    assert set(METHODS) == set(TRAIN_METHODS)


def test_two_runs_do_not_share_an_output_dir(tmp_path, capsys):
    """另一个进程占着时等一会儿，说明在等；还占着就拒绝，它一结束就能用。"""
    code = (
        "import fcntl, os, sys, time; fd = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(fd, fcntl.LOCK_EX);"
        "print('ready', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(ValueError, match=f"--output_dir {tmp_path}"):
            hold_output_dir(tmp_path, wait_seconds=0.5)
        assert lacks(capsys.readouterr().out, tmp_path, " 0 秒") == []
    finally:
        other.kill()
        other.wait()
    hold_output_dir(tmp_path, wait_seconds=0.5)
    hold_output_dir(tmp_path, wait_seconds=0.5)  # 同一个进程再来一次（测试里接连训练）不算别人
