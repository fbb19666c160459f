"""first_difference.py：两份记录的第一处不同，名字、种类与退出码。"""

import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from benchmarks.reliability.first_difference import first_difference, verdict

SCRIPT = """
import sys
import torch

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
secret = torch.ones(8)
for step in range(3):
    if step == 1 and sys.argv[1] == "silent":
        secret.numpy()[3] = 2.0  # 不经过 torch 的改写
    x = torch.full((4, 8), 0.5 + (step == 2 and sys.argv[1] == "scale") * 2**-20) * secret
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 1 and sys.argv[1] == "more":
        x.exp()
"""


def record(directory: Path, name: str, level: str = "op") -> Path:
    script, output = directory / "script.py", directory / f"{name}-{level}.txt"
    script.write_text(SCRIPT, encoding="utf-8")
    tool = ROOT / "benchmarks" / "reliability" / "first_difference.py"
    subprocess.run([sys.executable, tool, "record", "--level", level, output, script, name], check=True)
    return output


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("records")
    return {name: record(directory, name) for name in ("plain", "scale", "silent", "more")}


def test_equal_runs_have_no_difference(recorded, tmp_path):
    assert first_difference(recorded["plain"], record(tmp_path, "plain"))[1] == []


@pytest.mark.parametrize(
    ("name", "step", "operator", "says"),
    [
        ("scale", "2", "full", "输出不同"),  # 标量的参数不是张量：看到的是这个算子的输出
        ("silent", "1", "mul", "输入已经不同"),
        ("more", "2", None, "次序"),
    ],
)
def test_the_first_difference_is_named(recorded, name, step, operator, says):
    ours, theirs = first_difference(recorded["plain"], recorded[name])[1][-1]
    assert ours.step == step
    assert operator is None or ours.name == theirs.name == operator
    assert says in verdict(ours, theirs)


def test_the_step_level_names_modules_and_optimizer_state(tmp_path):
    lines = record(tmp_path, "plain", "step").read_text(encoding="utf-8").splitlines()
    kinds = {(line.split("\t")[1], line.split("\t")[2]) for line in lines}
    assert {("0", "module 输出"), ("Sequential", "module 输入"), ("更新之前", "group0.0 grad")} <= kinds
    assert {("更新之后", "group0.3 weight"), ("更新之后", "group0.3 exp_avg_sq")} <= kinds
    assert not any("addmm" in line for line in lines)
