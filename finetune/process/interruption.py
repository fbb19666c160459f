"""中断：收到信号、或启动器消失时，各进程在下一步商定一起停下；信号处理函数只记一个标志。

SIGTERM、SIGINT、SIGUSR1 都当作「存好再停」；第二次 SIGINT（再按一次 Ctrl-C）立即退出。
启动器自己随后补发的 SIGTERM 不算第二次：保存照常完成。
"""

import atexit
import os
import signal
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from utils import raise_together

# 一次通信最多等别的进程多久；保存时别的进程在等 0 号进程写盘，要比它长
WAIT_LIMIT = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", "30")))
# 停下并已保存时的退出码：EX_TEMPFAIL，「暂时失败，可以重来」
EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHER, LAUNCHER_GONE = "deepspeed.launcher.launch", "启动器已消失"
# 下标是各进程之间传的数；几个进程的原因不同时取后面的
REASONS = (None, LAUNCHER_GONE, *(number.name for number in SIGNALS))


class Interruption:
    """装上信号处理函数；agreed() 由所有进程每步调用一次，得到一致的结论。"""

    def __init__(self):
        self.reason: str | None = None  # 各进程商定的原因
        self._own_reason: str | None = None  # 本进程自己的
        self._watched: list[tuple[int, str]] = []
        for number in SIGNALS:
            signal.signal(number, self._remember)
        launchers = _launchers()
        if launchers is None:
            self._own_reason = LAUNCHER_GONE
        for pid in launchers or ():
            self.watch(pid)

    def watch(self, pid: int):
        """盯着一个进程：它一消失，就当作收到信号。"""
        fields = _status_fields(pid)
        if fields:
            self._watched.append((pid, fields[19]))

    def _remember(self, number: int, frame):
        if number == signal.SIGINT and self._own_reason == "SIGINT":
            os._exit(128 + number)
        if self._own_reason is None or number == signal.SIGINT:
            self._own_reason = signal.Signals(number).name

    def agreed(self, device: torch.device, error: Exception | None = None) -> bool:
        """任何一个进程收到信号或失去启动器，所有进程都得到 True；集合操作，每步一次。

        error 是本进程这一步里的错误（0 号进程写日志失败）：搭这一次通信告诉大家，所有进程一起抛出，不留下谁空等。

        Raises:
            AgreedError: 有进程给出了 error。
        """
        if self._own_reason is None and any(not _is_alive(pid, start) for pid, start in self._watched):
            self._own_reason = LAUNCHER_GONE
        number = REASONS.index(self._own_reason) if error is None else len(REASONS)
        code = torch.tensor([number], dtype=torch.float32, device=device)
        if dist.is_initialized():
            dist.all_reduce(code, op=dist.ReduceOp.MAX)
        number = int(code.item())
        if number == len(REASONS):
            raise_together(error)
        self.reason = REASONS[number]
        return self.reason is not None


def limit_waiting():
    """所有通信组都最多等 WAIT_LIMIT：DeepSpeed 自己建的组不理会它的 DEEPSPEED_TIMEOUT，断网之后要等半小时。"""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(WAIT_LIMIT, group)


def leave(code: int) -> NoReturn:
    """结束本进程，退出码 code：销毁通信组，跑完 atexit 的收尾，不经过解释器的收尾。

    DeepSpeed 一直持有各通信组，销毁之后 gloo 的线程也还在；它若在解释器收尾时才放下用过的张量，取不到 GIL，
    C++ 就以 SIGABRT 结束进程：训练做完了，退出码却是错的（最小的程序 130 次退出里 14 次，这样退出 160 次里 0 次）。
    code 为 1 时别的进程可能已经死了，NCCL 的销毁会等它们，所以只销毁 gloo 的。
    """
    if dist.is_initialized() and (code != 1 or dist.get_backend() == "gloo"):
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # 读输出的一端已经关了
            stream.flush()
    os._exit(code)


def _launchers() -> list[int] | None:
    """要盯着的启动器进程：父进程 launch.py 与它上面的 deepspeed；由别的程序启动的为空；launch.py 已经不在了为 None。"""
    parent = os.getppid()
    if LAUNCHER not in _command_line(parent):
        # 这两样只有 launch.py 会给：它在本进程加载的时候就死了
        is_orphan = "CROSS_SIZE" in os.environ and any(word.startswith("--local_rank") for word in sys.argv)
        return None if is_orphan else []
    grandparent = int((_status_fields(parent) or ["", "0"])[1])
    return [parent, grandparent] if grandparent > 1 and "deepspeed" in _command_line(grandparent) else [parent]


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _status_fields(pid: int) -> list[str]:
    """/proc/PID/stat 里进程名之后的各项：第 0 项是状态，第 1 项是父进程，第 19 项是启动时刻；进程不在则为空。"""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _is_alive(pid: int, start: str) -> bool:
    fields = _status_fields(pid)
    return bool(fields) and fields[0] != "Z" and fields[19] == start
