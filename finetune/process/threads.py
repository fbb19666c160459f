"""CPU 线程数：从空着的核里选；等待的线程不空转，旁边有别的程序时才不互相拖慢。不载入 torch。"""

import math
import os
import sys
import time
from pathlib import Path

# 看多久的 CPU 时间
SAMPLE_SECONDS = 0.3
# oneDNN 至多留这么多个核：一层的前向与反向（几十个样本并排）用到的形状都在内，各层才不必重新生成；
# 每步的长度不同，上一步的核几乎不再有用，而每个约 1 MB，它缺省留 1024 个
KERNELS_KEPT = 256


def stop_spinning() -> None:
    """OpenMP 的线程等活时睡下而不空转；用户自己设了的不动。须在载入 torch 之前。

    torch 的安装包带的是 GNU 的 OpenMP（前一项），MKL 版带的是 Intel 的（后一项）。
    """
    if os.environ.get("OMP_WAIT_POLICY") is None and os.environ.get("GOMP_SPINCOUNT") is None:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("KMP_BLOCKTIME", "0")


def keep_few_kernels() -> None:
    """限制 oneDNN 留着的核；用户自己设了的不动。须在第一次矩阵乘法之前。"""
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))


def begin_loading() -> None:
    """脚本的第一句，在载入 torch 之前：OpenMP 不空转，并说一声要等几秒。"""
    stop_spinning()
    keep_few_kernels()
    print("载入 torch 与 transformers ……", file=sys.stderr, flush=True)


def allowed_cores() -> int:
    """本进程可以用的核数：亲和性与 cgroup 的限额里小的。"""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # 没有限额时写的是 max
        return cores


def idle_cores() -> float:
    """整台机器此刻空着几个核：一小段时间里各核空闲的份额之和。"""

    def read() -> tuple[int, int]:
        times = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return times[3] + times[4], sum(times)

    try:
        idle, total = read()
        time.sleep(SAMPLE_SECONDS)
        later_idle, later_total = read()
    except (OSError, ValueError, IndexError):
        return math.inf
    share = (later_idle - idle) / max(1, later_total - total)
    return share * (os.cpu_count() or 1)


def choose_threads(requested: int | None, num_processes: int = 1) -> tuple[int, str]:
    """每个进程几个线程 → (个数, 理由)：先 --num_threads，再 OMP_NUM_THREADS，再看空着的核。"""
    if requested is not None:
        return requested, "由 --num_threads 指定"
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return int(os.environ["OMP_NUM_THREADS"]), "由 OMP_NUM_THREADS 指定"
    cores, idle = allowed_cores(), idle_cores()
    free = min(cores, max(1, math.floor(idle + 0.5)))
    shown = f"，此刻空着 {idle:.1f} 个" if idle < math.inf else ""
    return max(1, free // num_processes), f"可用 {cores} 个核{shown}，{num_processes} 个进程"
