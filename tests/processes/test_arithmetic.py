"""process/arithmetic.py：决定每一位的各项记得下来，续训接得过来，接不过来的说明。"""

import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

from finetune.process.arithmetic import adopt_arithmetic, describe_arithmetic, settle_arithmetic


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """测试里改了的线程数与环境变量都改回来。"""
    monkeypatch.delenv("MKL_CBWR", raising=False)
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def run_config(**changes) -> dict:
    return {"arithmetic": describe_arithmetic() | changes, "versions": {"torch": "2.13.0"}, "world_size": 2}


def test_settled_arithmetic_is_recorded(monkeypatch):
    settle_arithmetic(3)
    found = describe_arithmetic()
    assert (found["num_threads"], found["variables"]["MKL_CBWR"]) == (3, "AUTO")
    assert found["capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["onednn"].startswith("v") and found["device"]
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    settle_arithmetic()
    assert describe_arithmetic()["variables"]["MKL_CBWR"] == "COMPATIBLE"
    assert torch.get_num_threads() == 3


def test_resume_adopts_the_threads_and_names_what_it_cannot():
    saved, current = run_config(num_threads=2), run_config(num_threads=5)
    assert adopt_arithmetic(saved, current) == []
    assert (torch.get_num_threads(), current["arithmetic"]["num_threads"]) == (2, 2)
    current = run_config(capability="AVX512", variables={}) | {"versions": {"torch": "2.14.0"}, "world_size": 1}
    saved["arithmetic"]["variables"] = {"MKL_CBWR": "AUTO"}
    differences = "\n".join(adopt_arithmetic(saved, current))
    for words in ("AVX512", "MKL_CBWR", "torch 2.13.0 → 2.14.0", "2 → 1"):
        assert words in differences


def test_an_older_checkpoint_without_the_record_is_accepted():
    saved = run_config()
    del saved["arithmetic"]
    assert adopt_arithmetic(saved, run_config()) == []


PRODUCTS = """
import hashlib, sys
from safetensors.torch import load_file
from finetune.process.arithmetic import settle_arithmetic
settle_arithmetic(1)
for path in sys.argv[1:]:
    tensors = load_file(path)
    for name in ("a", "b"):
        print(tensors[name].data_ptr() % 64, hashlib.sha256((tensors[name] @ tensors["x"]).numpy()).hexdigest())
"""


def test_the_layout_of_a_weights_file_does_not_change_the_bits(tmp_path):
    """同样的张量，文件头长短不同，映射来的地址对齐就不同；乘积的每一位应相同。"""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    weight, vector = torch.randn(64, 48, generator=generator), torch.randn(48, generator=generator)
    paths = []
    for length in range(0, 64, 8):
        paths.append(tmp_path / f"{length}.safetensors")
        save_file({"a": weight, "b": weight.clone(), "x": vector}, paths[-1], metadata={"note": "x" * length})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("MKL_CBWR", None)
    command = [sys.executable, "-c", PRODUCTS, *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len({place for place, _ in lines}) > 1
    assert len({digest for _, digest in lines}) == 1
