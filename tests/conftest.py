"""全部测试共用的夹具：共享资料目录、黄金值目录、现场生成的微型检查点。"""

import os
from pathlib import Path

# 测试不联网；必须在第一次 import transformers 之前设好
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# 逐位比较的几次运行线程数要相同，不随机器忙闲而变
os.environ.setdefault("OMP_NUM_THREADS", "1")
# MKL 在各种 CPU 上用同样的算法：黄金值来自另一种 CPU，缺省时只有 AVX2 的 CPU 上一处的舍入超出界限（2.1e-5 对 2e-5）
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import pytest
import torch
from hypothesis import settings
from paths import LOCAL_GOLDENS, SHARED

from scripts.build_tiny_model import build_tiny_model

# 每例的时限只用来发现挂起：机器忙时几毫秒的例子也会慢；fuzz 供 --hypothesis-profile=fuzz，两核约一分钟
settings.register_profile("default", deadline=30_000)
settings.register_profile("fuzz", deadline=30_000, max_examples=1500)
settings.load_profile("default")


@pytest.fixture(autouse=True, scope="session")
def single_thread():
    """微型模型上多线程只会添乱（两核上慢五倍）；单线程的求和次序也固定。测试拉起的进程不受影响。"""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """共享资料目录 ../shared；不存在时跳过，并在报告里写明。"""
    if not SHARED.is_dir():
        pytest.skip("没有 ../shared，跳过依赖共享资料的测试")
    return SHARED


@pytest.fixture(scope="session")
def golden_dir():
    """返回 `golden_dir(name, shared_only=False) -> Path`：先找 tests/goldens，再找 ../shared/goldens，都没有则跳过。"""

    def find(name: str, shared_only: bool = False) -> Path:
        places = [SHARED / "goldens"] if shared_only else [LOCAL_GOLDENS, SHARED / "goldens"]
        for place in places:
            if (place / name / "golden.json").is_file():
                return place / name
        pytest.skip(f"黄金值 {name} 只在 ../shared/goldens 中，这里没有")

    return find


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """返回 `tiny_checkpoint(arch="baichuan2-7b", **options) -> Path`；同样的参数只生成一次，勿改写其内容。"""
    made: dict[tuple, Path] = {}

    def build(arch: str = "baichuan2-7b", **options) -> Path:
        key = (arch, *sorted((name, repr(value)) for name, value in options.items()))
        if key not in made:
            made[key] = Path(build_tiny_model(arch, tmp_path_factory.mktemp("tiny") / arch, **options))
        return made[key]

    return build
