"""scripts/*.sh 与 .ci/run：语法、说明的参数都存在；启动脚本真的训练一步（慢）。"""

import os
import re
import subprocess

import pytest
from paths import ROOT

from finetune.methods.registry import TRAIN_METHODS
from finetune.process.training_process import free_port

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
    assert result.returncode != 0
    assert "检查点目录" in result.stderr


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
