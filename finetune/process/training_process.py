"""一次真实的 deepspeed 训练：拉起、等到某个时刻、向某个进程发信号、等它结束；供中断的工具与测试使用。

全部进程（deepspeed → launch.py → 各 rank）在同一个进程组里，结束时不留下任何进程与共享内存文件。
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from finetune.process.stale_files import DEEPSPEED_BUFFER, SHM_DIRECTORY

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("runner", "launcher", "rank", "group")


class Ended(NamedTuple):
    """训练结束的样子。"""

    returncode: int | None  # None：没有在限期内结束，已被杀掉
    output: str
    seconds: float  # 从开始等到全部进程消失


class TrainingProcess:
    """运行 `deepspeed train.py FLAGS`，num_ranks 个 CPU 进程。

    Args:
        flags: train.py 的参数。
        log_path: stdout 与 stderr 写进这个文件。
        command: train.py 的参数之前的全部词；缺省是 `deepspeed --master_port 端口 train.py`。
        env: 另加的环境变量。
    """

    def __init__(
        self,
        flags: Sequence,
        num_ranks: int,
        log_path: Path,
        *,
        command: Sequence[str] = (),
        env: dict[str, str] | None = None,
        port: int | None = None,
    ):
        self.port, self.log_path, self.num_ranks = port or free_port(), log_path, num_ranks
        command = command or [deepspeed_command(), "--master_port", str(self.port), "train.py"]
        with log_path.open("wb") as stream:
            self.process = subprocess.Popen(
                [*command, *map(str, flags)],
                cwd=ROOT,
                env=cpu_environment(num_ranks) | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # 后台运行的 shell 让子进程忽略 SIGINT，会一路传到 deepspeed
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def text(self) -> str:
        """到此刻为止的输出。"""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, condition: Callable[[], bool], timeout: float, interval: float = 0.02) -> bool:
        """等到 condition() 为真；训练先结束了或超时，返回 False。"""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if condition():
                return True
            if self.process.poll() is not None and not self.alive():
                return condition()
            time.sleep(interval)
        return False

    def wait_for(self, text: str, timeout: float = 180) -> bool:
        """等到输出里出现 text（正则）。"""
        return self.wait_until(lambda: re.search(text, self.text()) is not None, timeout)

    def alive(self) -> dict[int, str]:
        """进程组里还活着的进程：{pid: 命令行}。"""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                fields = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if int(fields[2]) == self.process.pid and fields[0] not in "ZX":
                    words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    found[int(process.name)] = " ".join(words)
        return found

    def ranks(self) -> list[int]:
        """各训练进程的 pid，按 rank 排列。"""
        found = {}
        for pid, command in self.alive().items():
            match = re.search(r"--local_rank=(\d+)", command)
            if match and "deepspeed.launcher" not in command:
                found[int(match[1])] = pid
        return [found[rank] for rank in sorted(found)]

    def launcher(self) -> int | None:
        """launch.py 的 pid。"""
        pids = [pid for pid, command in self.alive().items() if "deepspeed.launcher.launch" in command]
        return min(pids, default=None)

    def send(self, target: str, number: int, rank: int = 0) -> list[int]:
        """把信号发给 runner（deepspeed）、launcher（launch.py）、rank（第几个）或 group（整个进程组）→ 收到的 pid。"""
        if target == "group":
            pids = list(self.alive())
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            return pids
        ranks = self.ranks() if target == "rank" else []
        pid = {"runner": self.process.pid, "launcher": self.launcher()}.get(target)
        if target == "rank" and ranks:
            pid = ranks[rank % len(ranks)]
        if pid is None:
            return []
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        return [pid]

    def wait(self, timeout: float = 300, leave_compilers: bool = False) -> Ended:
        """等全部进程消失（启动器死后 rank 可能还在保存）；到限期就杀掉，returncode 为 None。

        leave_compilers: 只等 deepspeed、launch.py 与各 rank；被杀的 rank 拉起的编译器还活着，留给 kill()。
        """
        start = time.monotonic()

        def is_over() -> bool:
            if self.process.poll() is None:
                return False
            return not (self.ranks() or self.launcher()) if leave_compilers else not self.alive()

        in_time = self.wait_until(is_over, timeout, 0.05)
        ended = Ended(self.process.returncode if in_time else None, self.text(), time.monotonic() - start)
        if not (in_time and leave_compilers):
            self.kill()
        return ended

    def kill(self):
        """杀掉整个进程组，清理它的共享内存文件。"""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        clean_shm(self.port)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()


def cpu_environment(num_ranks: int) -> dict[str, str]:
    """N 个 CPU 进程的环境。"""
    outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in outer}
    return inherited | {
        "LOCAL_SIZE": str(num_ranks),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(num_ranks))),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def free_port() -> int:
    """一个此刻空闲的端口。"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def deepspeed_command() -> str:
    """deepspeed 启动器的路径；先找这个解释器旁边的。"""
    found = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert found, "找不到 deepspeed 命令"
    return found


def clean_shm(port: int):
    """删去这个端口的共享内存文件：刚启动就被杀的进程各留下 69 MB。"""
    for path in SHM_DIRECTORY.glob(f"{DEEPSPEED_BUFFER}*_{port}_*"):
        path.unlink(missing_ok=True)
