"""两台主机（两个网络命名空间）：跨两台训练、断网、续训；以及 train_multinode.sh 的用法错误。"""

import os
import subprocess

import pytest
from paths import ROOT

from benchmarks.reliability import two_hosts
from utils import read_json, write_json

SCRIPT = ROOT / "scripts" / "train_multinode.sh"


def run_script(*words: str, **variables: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name not in ("NODE_RANK", "MASTER_ADDR")}
    return subprocess.run(
        ["bash", SCRIPT, *words], env=inherited | variables, capture_output=True, text=True, timeout=60
    )


def test_the_script_asks_for_the_model():
    result = run_script()
    assert result.returncode != 0
    assert "检查点目录" in result.stderr


def test_the_script_asks_for_the_hostfile(tmp_path):
    result = run_script("base", HOSTFILE=str(tmp_path / "none"))
    assert result.returncode == 2
    assert f"错误：没有 {tmp_path / 'none'}。请写一个 hostfile" in result.stderr


def test_the_script_asks_for_the_master(tmp_path):
    (tmp_path / "hostfile").write_text("10.0.0.1 slots=1\n10.0.0.2 slots=1\n", encoding="utf-8")
    result = run_script("base", HOSTFILE=str(tmp_path / "hostfile"), NODE_RANK="0")
    assert result.returncode != 0
    assert "0 号机器" in result.stderr


@pytest.mark.slow
@pytest.mark.deepspeed
def test_two_hosts_train_lose_the_link_and_resume(tmp_path):
    if reason := two_hosts.why_not():
        pytest.skip(f"{reason}，跳过两台主机的测试")
    report = two_hosts.run_all(tmp_path)
    write_json(tmp_path / "report.json", report)
    assert report["problems"] == [], "\n".join(report["problems"])
    assert [row[0] for row in read_json(tmp_path / "report.json")["rows"]] == [
        "跨两台训练",
        "第 33 步断网",
        "从第 30 步续训",
    ]
