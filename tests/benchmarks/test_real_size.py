"""real_size.py：小模型走同样的路；做过的阶段不再做；每步都是同样的两行；自己的内存数得对。"""

import subprocess
import sys
import time

import pytest
from paths import ROOT

from benchmarks.real_size.real_size import Meter, RealSize, parse_args, tree
from finetune.data.packing import epoch_steps
from utils import read_json, write_json

SKIPPED = ("hash", "dry_run", "merge", "export_llama", "export_gguf", "predict")


def arguments(tmp_path, *flags):
    places = ["--work_dir", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    return parse_args(["--model", "toy", "--steps", "30", "--threads", "1", *places, *flags])


def test_an_interrupted_run_goes_on_with_the_stages_that_are_missing(tmp_path):
    """做过的阶段在结果文件里：这里只有写、训练（存好再停）与续训真的做。"""
    args = arguments(tmp_path, "--method", "lora", "--layers", "2", "--precision", "fp32")
    run = RealSize(args)
    assert run.result["stages"] == [] and run.result["machine"]["cores"] >= 1
    done = [{"name": name, "seconds": 1.0, "own_peak_mb": 2, "planned_mb": None} for name in SKIPPED]
    args.results.mkdir()
    write_json(run.result_path, {**run.result, "planned_mb": 700, "stages": done})
    RealSize(args).run()
    found = read_json(args.results / "toy-lora.json")["stages"]
    assert [stage["name"] for stage in found] == [*SKIPPED, "write", "load", "train", "save", "resume"]
    stages = {stage["name"]: stage for stage in found}
    losses = stages["train"]["losses"], stages["resume"]["losses"]
    assert all(losses) and sum(map(len, losses)) == 30
    assert losses[1][-1] < losses[0][0] - 0.01 and abs(losses[0][0] - 7.6 - 0.5) < 1  # ln 2000 = 7.6
    assert stages["train"]["planned_mb"] == stages["resume"]["planned_mb"] == 700
    assert all(stages[name]["own_peak_mb"] > 100 for name in ("train", "resume"))
    assert not (tmp_path / "work" / "toy-lora").exists()


def test_each_step_is_the_same_two_rows(tmp_path):
    run = RealSize(arguments(tmp_path, "--method", "freeze"))
    flags = list(map(str, run.train_flags()))
    assert flags[flags.index("--freeze_module_name") + 1] == "layers.31."
    rows = run.data.read_text("utf-8").splitlines()
    assert len(rows) == 60 and len(set(rows)) == 2
    seed = int(flags[flags.index("--seed") + 1])
    assert all(rows[first] != rows[second] for first, second in epoch_steps(60, 2, seed))


def test_own_memory_is_that_of_the_whole_tree_without_mapped_files(tmp_path):
    log = tmp_path / "log"
    log.touch()
    child = "held = bytearray(80 * 2**20); print('ready', flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        meter = Meter(process.pid, log)
        meter.look()
        assert len(tree(process.pid)) == 2
        process.stdin.close()
        process.wait()
        time.sleep(0.01)
        meter.look()
    stage = meter.stage("held")
    assert 80 <= stage["own_peak_mb"] < 140 and stage["planned_mb"] is None
    assert meter.samples[-1][1] == 0


def test_a_fork_that_shares_the_pages_is_not_counted_twice():
    program = "import os; held = bytearray(80 * 2**20); os.fork() or input(); print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        assert tree(process.pid) == [process.pid]
        process.stdin.write(b"\n\n")


@pytest.mark.slow
def test_every_stage(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/real_size/real_size.py"), "--model", "toy", "--method", "qlora"]
    flags = ["--steps", "30", "--threads", "1", "--work_dir", str(tmp_path / "work"), "--results", str(tmp_path)]
    subprocess.run([*command, *flags, "--checkpoint", str(tmp_path / "base")], cwd=ROOT, check=True)
    result = read_json(tmp_path / "toy-qlora.json")
    assert {stage["name"] for stage in result["stages"]} == {*SKIPPED, "write", "load", "train", "save", "resume"}
    assert (tmp_path / "base" / "config.json").is_file()
