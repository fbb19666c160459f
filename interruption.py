"""中断：收到信号、或启动器消失时，各进程在下一步商定一起停下；信号处理函数只记一个标志。

SIGTERM、SIGINT、SIGUSR1 都当作「存好再停」；第二次 SIGINT（再按一次 Ctrl-C）立即退出。
启动器自己随后补发的 SIGTERM 不算第二次：保存照常完成。
"""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

# 停下并已保存时的退出码：EX_TEMPFAIL，「暂时失败，可以重来」
EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interruption:
    """装上信号处理函数；agreed() 由所有进程每步调用一次，得到一致的结论。"""

    def __init__(self):
        self.reason: str | None = None
        self._launcher = _launcher_processes()
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame):
        if number == signal.SIGINT and self.reason == "SIGINT":
            os._exit(128 + number)
        if self.reason is None or number == signal.SIGINT:
            self.reason = signal.Signals(number).name

    def agreed(self, device: torch.device) -> bool:
        """任何一个进程收到信号或失去启动器，所有进程都得到 True；集合操作，每步一次。"""
        if self.reason is None and any(not _is_alive(pid, start) for pid, start in self._launcher):
            self.reason = "启动器已消失"
        flag = torch.tensor([float(self.reason is not None)], device=device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def _launcher_processes() -> list[tuple[int, str]]:
    """要盯着的启动器进程 (pid, 启动时刻)：父进程；父进程是 deepspeed 的 launch.py 时，还有它上面的 deepspeed。"""
    parent = os.getppid()
    watched = [parent]
    if "deepspeed.launcher.launch" in _command_line(parent):
        grandparent = _status_fields(parent)[1]
        if "deepspeed" in _command_line(int(grandparent)):
            watched.append(int(grandparent))
    return [(pid, _status_fields(pid)[19]) for pid in watched if pid > 1 and _status_fields(pid)]


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
