"""导出与合并的测试共用的夹具。"""

import importlib.util
import os
import sys

import pytest
from trained_checkpoints import train_without_deepspeed


@pytest.fixture(scope="session")
def trained(tiny_checkpoint, tmp_path_factory):
    """返回 `trained(arch, method, targets=…, **tiny 的选项) -> Path`；同样的参数只做一次，勿改写。"""
    made = {}

    def make(arch, method, targets=("W_pack",), **options):
        key = (arch, method, targets, *sorted(options.items()))
        if key not in made:
            path = tmp_path_factory.mktemp("trained") / "output" / "epoch-1-step-3"
            made[key] = train_without_deepspeed(tiny_checkpoint(arch, **options), path, method, targets=targets)
        return made[key]

    return make


@pytest.fixture(scope="session")
def gguf():
    return pytest.importorskip("gguf", reason="没有安装 gguf（pip install gguf），跳过 GGUF 的测试")


@pytest.fixture(scope="session")
def llama_cpp(gguf) -> str:
    """能 import llama_cpp 或 xllamacpp 的解释器：环境变量 LLAMA_CPP_PYTHON，或当前的。"""
    python = os.environ.get("LLAMA_CPP_PYTHON")
    if python is None and any(importlib.util.find_spec(name) for name in ("llama_cpp", "xllamacpp")):
        python = sys.executable
    if python is None:
        pytest.skip(
            "没有安装 llama-cpp-python 或 xllamacpp；装在别的环境里时用环境变量 LLAMA_CPP_PYTHON 指出它的解释器"
        )
    return python
