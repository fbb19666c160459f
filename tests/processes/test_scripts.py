"""scripts/*.sh 与 .ci/run：语法、说明的参数都存在；启动脚本真的训练一步（慢）。"""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
from contextlib import suppress

import pytest
from paths import ROOT

from finetune.checkpoint.output_dir import iter_checkpoints
from finetune.methods.registry import TRAIN_METHODS
from finetune.process.accelerator import has_accelerator
from finetune.process.interruption import EXIT_INTERRUPTED
from finetune.process.training_process import free_port
from utils import read_json

SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_flags_of_train_exist(script):
    from finetune.cli.train_flags import build_parser

    text = script.read_text(encoding="utf-8")
    command = text[text.find("--train_path") :].split("\n\n)")[0] if "--train_path" in text else ""
    command = command.split("predict.py")[0]
    known = set(build_parser()._option_string_actions) | {"--master_port", "--num_gpus"}
    assert set(re.findall(r"--[a-z_]+", command)) - known == set()


def test_every_method_has_a_launcher():
    names = {path.name for path in SCRIPTS}
    assert {f"train_{method}.sh" for method in TRAIN_METHODS} <= names


def test_launcher_without_a_checkpoint_says_what_to_give():
    result = subprocess.run(["bash", ROOT / "scripts" / "train_lora.sh"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "检查点目录" in result.stderr


@pytest.mark.skipif(has_accelerator(), reason="这台机器有卡")
def test_launcher_given_cards_that_are_not_there_says_so():
    command = ["bash", ROOT / "scripts" / "train_lora.sh", "model"]
    result = subprocess.run(command, env={**os.environ, "GPUS": "5"}, capture_output=True, text=True)
    assert result.returncode == 2
    assert "GPUS=5" in result.stderr
    assert "LOCAL_SIZE" in result.stderr


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("method", TRAIN_METHODS)
def test_launcher_trains_and_saves(method, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("baichuan2-7b", layers=32, hidden_size=32, heads=2)
    port = free_port()
    environment = {**os.environ, "LOCAL_SIZE": "1", "PORT": str(port), "OUTPUT_DIR": str(tmp_path / "output")}
    script = ROOT / "scripts" / f"train_{method}.sh"
    command = ["bash", script, base, "baichuan2", "--max_steps", "1", "--precision", "fp32", "--max_len", "256",
               "--max_src_len", "128"]  # fmt: skip
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert (tmp_path / "output" / "epoch-1-step-1" / "run_config.json").is_file()


SHORT = ["--precision", "fp32", "--max_len", "128", "--max_src_len", "96", "--show_loss_step", "1"]


def script_command(base, *more: str) -> list[str]:
    """bash scripts/train_lora.sh 检查点 参数…；第二个位置直接写参数。"""
    return ["bash", str(ROOT / "scripts" / "train_lora.sh"), str(base), *SHORT, *more]


def script_environment(directory, num_processes: int) -> dict[str, str]:
    outer = {name: value for name, value in os.environ.items() if name not in ("PORT", "GPUS", "DS_ACCELERATOR")}
    return {**outer, "LOCAL_SIZE": str(num_processes), "OUTPUT_DIR": str(directory), "TRAIN_PATH": "data/cls_0.json"}


@pytest.mark.slow
@pytest.mark.deepspeed
def test_local_size_decides_how_many_processes(tiny_checkpoint, tmp_path):
    if has_accelerator():
        pytest.skip("有加速卡的机器上由 GPUS 决定")
    command = script_command(tiny_checkpoint("baichuan2-7b"), "--max_steps", "1")
    result = subprocess.run(
        command, env=script_environment(tmp_path / "out", 2), capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert read_json(tmp_path / "out" / "run_config.json")["world_size"] == 2


EVALUATES = ["--eval_path", "data/cls_1.json", "--eval_step", "2", "--eval_metric", "label_f1"]
EVALUATES += ["--eval_batch_size", "2", "--max_eval_samples", "20", "--eval_max_new_tokens", "32"]
# 什么时候按：屏幕上有这些字，或 output_dir 里正在写检查点；多给的参数；退出码；屏幕上的说明
MOMENTS = {
    "load": ("载入 torch", [], 130, "已停下"),
    "train": ("步 3/", [], EXIT_INTERRUPTED, "收到 SIGINT，已保存"),
    "evaluate": ("评估：生成", EVALUATES, EXIT_INTERRUPTED, "收到 SIGINT，已保存"),
    "save": (".tmp-", ["--save_model_step", "2"], EXIT_INTERRUPTED, "收到 SIGINT，已保存"),
}


def in_a_terminal(command: list[str], environment: dict[str, str], directory, moment: str) -> tuple[int, str]:
    """在真的伪终端里运行，到 moment 按一次 Ctrl-C → (退出码, 屏幕上的全部文字)。"""
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # 在后台运行的测试会继承「忽略」，终端里的 shell 不会
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))  # 宽是 0 时不画进度条
        os.execvpe("bash", command, environment)
    screen, is_pressed = b"", False
    with suppress(OSError):  # 另一端关了
        while True:
            if select.select([terminal], [], [], 0.002)[0]:
                if not (chunk := os.read(terminal, 65536)):
                    break
                screen += chunk
            seen = any(directory.glob(".tmp-*")) if moment == ".tmp-" else moment.encode() in screen
            if seen and not is_pressed:
                os.write(terminal, b"\x03")
                is_pressed = True
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), screen.decode("utf-8", "replace")


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("name", MOMENTS)
def test_ctrl_c_in_a_terminal_waits_for_the_checkpoint(name, tiny_checkpoint, tmp_path):
    """载入、训练、评估、保存时按 Ctrl-C：脚本等训练存好才结束，退出码是训练的；--resume auto 接着做。"""
    if has_accelerator():
        pytest.skip("脚本在有加速卡的机器上要另给 GPUS")
    moment, more, expected, said = MOMENTS[name]
    base, output = tiny_checkpoint("baichuan2-7b"), tmp_path / "out"
    environment = script_environment(output, 1)
    command = script_command(base, "--max_steps", "200", *more)
    code, screen = in_a_terminal(command, environment, output, moment)
    assert code == expected, screen[-3000:]
    assert said in screen and "Traceback" not in screen
    steps = [step for step, _, checkpoint in iter_checkpoints(output) if (checkpoint / "manifest.json").is_file()]
    assert (steps == []) == (name == "load") and max(steps, default=0) < 200
    again = script_command(base, "--max_steps", str(max(steps, default=0) + 1), "--resume", "auto", *more)
    result = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    where = f"step {steps[0]} from" if steps else "step 0, fresh start"
    assert f"resume: {where}" in result.stdout
