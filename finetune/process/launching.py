"""启动：没有启动器时自成一个进程；载入库的几秒里按 Ctrl-C 立即结束；进程数与 LOCAL_SIZE 不同时说一声。不载入 torch。"""

import os
import signal
import socket
import sys
from pathlib import Path


def join_or_stand_alone() -> None:
    """`python train.py`：没有启动器（deepspeed、torchrun、mpirun、srun）给出编号时，自己就是唯一的进程。"""
    if any(name in os.environ for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")):
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **address}


def leave_quietly_on_interrupt() -> None:
    """训练还没有开始，没有什么可存：Ctrl-C 立即结束，不打印回溯；Interruption 之后换成自己的处理。"""

    def leave(number: int, frame):
        if os.environ.get("RANK", "0") == "0":
            print("已停下：训练还没有开始", file=sys.stderr, flush=True)
        os._exit(128 + number)

    signal.signal(signal.SIGINT, leave)


def process_count_note() -> str | None:
    """LOCAL_SIZE 要的 CPU 进程数与启动器在本机起的不同时，一句说明；相同、没有写 LOCAL_SIZE 时为 None。

    启动器改写了本进程的 LOCAL_SIZE，用户写的只在启动器自己的环境里。
    """
    try:
        content = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return None
    environment = dict(item.partition(b"=")[::2] for item in content.split(b"\0"))
    num_processes = int(os.environ.get("LOCAL_SIZE", "1"))
    wanted = environment.get(b"LOCAL_SIZE", b"").decode()
    if not wanted.isdecimal() or int(wanted) == num_processes:
        return None
    visible = environment.get(b"CUDA_VISIBLE_DEVICES")
    reason = f"CUDA_VISIBLE_DEVICES={visible.decode()} 列了几张卡就起几个" if visible else "--num_gpus 等参数先算"
    return (
        f"注意：LOCAL_SIZE={wanted}，启动器却起了 {num_processes} 个进程：{reason}；"
        "没有 GPU 时请去掉它，要几个进程只写 LOCAL_SIZE"
    )
