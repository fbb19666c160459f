"""导出与合并的测试共用的夹具。"""

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
