"""决定每一位的东西：线程数、指令集、矩阵库的设置；记进 run_config.json，续训时能接过来的接过来，不能的说明。"""

import os
import platform
import re

import torch

from finetune.process.accelerator import card_name, has_accelerator
from finetune.process.matmul_on_cpu import products_type
from finetune.process.threads import choose_threads
from utils import broadcast_from_rank_0, log_rank_0

# 矩阵库与 OpenMP 由这些环境变量决定怎样算、怎样分块；留着几个核不改变怎样算
ARITHMETIC_VARIABLES = re.compile(
    "MKL_|OMP_(DYNAMIC|THREAD_LIMIT|SCHEDULE)|ATEN_CPU_CAPABILITY|(ONEDNN|DNNL)_(?!PRIMITIVE_CACHE)"
)
# 续训时与检查点不同就不再逐位相同的各项；线程数接得过来，不在其中
DECIDING = {
    "device": "设备",
    "capability": "指令集",
    "mkl": "MKL",
    "onednn": "oneDNN",
    "variables": "环境变量",
    "products": "bf16 的矩阵乘法",
}


def settle_arithmetic(num_threads: int | None = None):
    """定下线程数与矩阵库的设置；须在第一次矩阵乘法之前调用。

    MKL 缺省看输入的地址选算法：从 safetensors 映射来的权重只对齐到 8 字节，文件头长短不同，结果的末位就不同；
    MKL_CBWR=AUTO 时与地址无关（用户自己设了的不动）。MKL 缺省还可以少用线程，设过线程数就不会。
    """
    os.environ.setdefault("MKL_CBWR", "AUTO")
    torch.set_num_threads(num_threads or torch.get_num_threads())


def settle_threads(requested: int | None):
    """定下每个进程的线程数并说一声，0 号进程选定，各进程相同；集合操作。有加速卡而没有写明时不动。"""
    if requested is None and has_accelerator():
        return
    num_local = int(os.environ.get("LOCAL_SIZE") or 1)
    num_threads, reason = broadcast_from_rank_0(lambda: choose_threads(requested, num_local))
    torch.set_num_threads(num_threads)
    log_rank_0(f"线程：每个进程 {num_threads} 个（{reason}）")


def describe_arithmetic() -> dict:
    """本机此刻的各项，写进 run_config.json。"""
    version = torch.__config__.show()
    libraries = {
        name: found[1] if (found := re.search(pattern, version)) else None
        for name, pattern in (("mkl", r"Math Kernel Library Version (\S+)"), ("onednn", r"MKL-DNN (\S+)"))
    }
    return {
        "num_threads": torch.get_num_threads(),
        "device": card_name() if has_accelerator() else cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **libraries,
        "products": products_type(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if ARITHMETIC_VARIABLES.match(name)},
    }


def cpu_name() -> str:
    """CPU 的型号。"""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            found = re.search(r"model name\s*: (.*)", stream.read())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def adopt_arithmetic(saved: dict, current: dict) -> list[str]:
    """续训：线程数改为检查点的（写回 current）；返回其余与检查点不同、因此不再逐位相同的各项。

    saved、current 是两份 run_config；较早的检查点没有记下这些，返回空的。
    """
    before, now = saved.get("arithmetic"), current["arithmetic"]
    if before is None:
        return []
    torch.set_num_threads(before["num_threads"])
    now["num_threads"] = before["num_threads"]
    differences = [
        f"{what} {before.get(name)} → {now[name]}" for name, what in DECIDING.items() if before.get(name) != now[name]
    ]
    for name, version in current["versions"].items():
        if saved["versions"].get(name) != version:
            differences.append(f"{name} {saved['versions'].get(name)} → {version}")
    if saved["world_size"] != current["world_size"]:
        differences.append(f"进程数 {saved['world_size']} → {current['world_size']}")
    return differences
