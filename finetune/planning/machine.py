"""这台机器：显存、主机内存、算得多快。"""

import os
from pathlib import Path
from typing import NamedTuple

from finetune.planning.activations import PlannedModel
from finetune.planning.flops import gemm_rate, nominal_rate
from finetune.process import accelerator

FP32_SLOWDOWN = 16  # GPU 上 fp32 比 16 位慢的倍数，按标称


class Machine(NamedTuple):
    """本机：设备、每张卡的显存（没有 GPU 为 None）、主机内存、矩阵乘法的速率。"""

    device: str
    name: str
    device_bytes: int | None
    host_bytes: int
    rate: float
    rate_source: str


def find_machine(model: PlannedModel, precision: str) -> Machine:
    """看看本机有什么；没有 GPU 时量一下 CPU 的矩阵乘法。"""
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # 容器的上限
    if limit.is_file() and limit.read_text().strip().isdecimal():
        host_bytes = min(host_bytes, int(limit.read_text()))
    if not accelerator.has_accelerator():
        rate = gemm_rate(model.shape._replace(hidden=1024, intermediate=1024), 256, precision, seconds=0.5)
        return Machine("cpu", "CPU", None, host_bytes, rate, "刚刚量得的矩阵乘法")
    name, total_bytes = accelerator.card_name(), accelerator.total_card_bytes()
    rate = nominal_rate(name)
    if rate is None:
        return Machine(
            "cuda",
            name,
            total_bytes,
            host_bytes,
            gemm_rate(model.shape, 4096, precision, accelerator.default_device()),
            "刚刚量得的矩阵乘法",
        )
    rate = rate / FP32_SLOWDOWN if precision == "fp32" else rate
    return Machine("cuda", name, total_bytes, host_bytes, rate, "标称")
