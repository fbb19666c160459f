"""测试拉起的训练进程：train.py 自己的 main()，加速卡是名为 npu 的假卡（底下是 CPU）；产品一碰 torch.cuda 就失败。

    FAKE_NPU_CALLS=FILE python tests/helpers/fake_npu.py <train.py 的参数>

结束时把问过假卡的各个方法的次数写进 FILE。
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

ROOT = Path(__file__).resolve().parents[2]
calls: Counter[str] = Counter()


class FakeNpu(CPU_Accelerator):
    """DeepSpeed 的接口，名字是 npu，张量在 CPU 上；产品的代码问的每一件事都记下。"""

    def __init__(self):
        super().__init__()
        self._name = "npu"
        self.num_pinned = 0

    def __getattribute__(self, name: str):
        if not name.startswith("_") and is_product(sys._getframe(1)):
            calls[name] += 1
        return super().__getattribute__(name)

    def device_count(self):
        return 1

    def is_bf16_supported(self):
        return False

    def pin_memory(self, tensor, *args, **kwargs):
        return tensor.clone()

    def get_rng_state(self, device_index=None):
        return torch.full((16,), 7, dtype=torch.uint8)

    def set_rng_state(self, new_state, device_index=None):
        assert new_state.tolist() == [7] * 16

    def max_memory_allocated(self, device_index=None):
        return 123 * 2**20


def is_product(frame) -> bool:
    """这一帧是产品自己的代码，不是测试的，也不是库的。"""
    path = Path(frame.f_code.co_filename)
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in ("tests", ".venv")


def forbid_cuda():
    """产品的代码调用 torch.cuda 的任何函数都抛 AssertionError；torch 与 DeepSpeed 自己的照常。"""

    def guarded(name: str, original):
        def call(*args, **kwargs):
            assert not is_product(sys._getframe(1)), f"产品调用了 torch.cuda.{name}"
            return original(*args, **kwargs)

        return call

    for name in dir(torch.cuda):
        original = getattr(torch.cuda, name)
        if not name.startswith("_") and callable(original) and not isinstance(original, type):
            setattr(torch.cuda, name, guarded(name, original))


if __name__ == "__main__":
    set_accelerator(FakeNpu())
    forbid_cuda()
    import train
    from finetune.process.interruption import leave

    code = train.run_main()
    Path(os.environ["FAKE_NPU_CALLS"]).write_text(json.dumps(calls), encoding="utf-8")
    leave(code)
