"""bench 的工人协议：每个程序一个常驻进程，载入一次，按指令一步步走；空闲时阻塞在读管道上，不占 CPU。

本文件只用标准库，在任何一个虚拟环境里都能导入。
"""

import ctypes
import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOAD_TIMEOUT_SECONDS = 900
STEP_TIMEOUT_SECONDS = 600


# ---------------------------------------------------------------------------------------------------------------------
# 工人一侧


class Channel:
    """工人与父进程之间的一问一答，每条一行 JSON；库的打印改道到标准错误，不混进协议。"""

    def __init__(self):
        self._replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        self._commands = os.fdopen(os.dup(0), "r", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, **fields: Any):
        self._replies.write(json.dumps(fields, ensure_ascii=False) + "\n")

    def wait_for_step(self) -> int | None:
        """等下一条 step 指令，返回步号；其间照办 trim；None 表示结束（quit，或父进程不在了）。"""
        for line in self._commands:
            message = json.loads(line)
            if message["command"] == "step":
                return message["index"]
            if message["command"] == "quit":
                return None
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            self.send(trimmed=True)
        return None


class StepMeter:
    """量一步：墙上时间、本进程各线程的 CPU 时间、其间的内存峰值；CUDA 上先同步再读表。"""

    def start(self):
        cuda = _cuda()
        if cuda is not None:
            cuda.synchronize()
            cuda.reset_peak_memory_stats()
        _reset_peak_memory()
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self) -> dict[str, float]:
        """seconds、cpu_seconds、peak_rss_mb，CUDA 上另有 peak_cuda_mb（在用）、peak_reserved_mb（分配器占着）。"""
        cuda = _cuda()
        if cuda is not None:
            cuda.synchronize()
        measured = {
            "seconds": time.perf_counter() - self._wall,
            "cpu_seconds": time.process_time() - self._cpu,
            "peak_rss_mb": peak_memory_mb(),
        }
        if cuda is not None:
            measured["peak_cuda_mb"] = cuda.max_memory_allocated() / 2**20
            measured["peak_reserved_mb"] = cuda.max_memory_reserved() / 2**20
        return measured


def _cuda():
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _reset_peak_memory():
    """把内核记的内存峰值重置为现在的用量；不许写的系统上保留全程的峰值。"""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory_mb() -> float:
    """上次重置以来的常驻内存峰值，MB（2^20 字节）。"""
    return process_memory_mb("VmHWM")


def process_memory_mb(*names: str, pid: int | str = "self") -> float:
    """/proc/PID/status 里几项（VmHWM、RssAnon……）之和，MB（2^20 字节）；进程已结束时为 0。"""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.partition(":")[0] in names) / 1024


def installed_versions(*packages: str) -> dict[str, str]:
    """本进程环境里各包的版本；没有装的不列。"""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def run_worker(programs: dict[str, Callable[[dict[str, Any], Channel], None]]):
    """工人的 main：命令行是一份 JSON 规格，它的 kind 决定运行哪一个；出错时原因交给父进程，回溯留在日志里。"""
    channel, spec = Channel(), json.loads(sys.argv[1])
    try:
        programs[spec["kind"]](spec, channel)
    except Exception as error:
        traceback.print_exc()
        channel.send(error=f"{type(error).__name__}: {error}")
        sys.exit(1)


# ---------------------------------------------------------------------------------------------------------------------
# 父进程一侧


class WorkerFailed(RuntimeError):
    """工人退出、超时或报告了错误；信息里有它的日志的末尾。"""


class Worker:
    """一个常驻的程序。"""

    def __init__(self, name: str, command: list[str], env: dict[str, str], log_path: Path):
        self.name, self.log_path = name, log_path
        self._log = log_path.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=env,
            text=True,
            encoding="utf-8",
            bufsize=1,
        )

    def wait_ready(self) -> dict[str, Any]:
        """等它载入完毕，返回它的自述（versions、num_trainable 等）。"""
        return self._read(LOAD_TIMEOUT_SECONDS)

    def step(self, index: int) -> dict[str, Any]:
        """走第 index 步；返回 StepMeter 的各项、loss、tokens，以及这段时间里别的进程占用的 CPU 份额。"""
        load = os.getloadavg()[0]
        busy, began = busy_cpu_seconds(), time.perf_counter()
        self._write({"command": "step", "index": index})
        measured = self._read(STEP_TIMEOUT_SECONDS)
        elapsed = time.perf_counter() - began
        cores = len(os.sched_getaffinity(0))
        foreign = (busy_cpu_seconds() - busy - measured.get("cpu_seconds", 0.0)) / (elapsed * cores)
        return {**measured, "load_before": load, "foreign_cpu_share": max(0.0, foreign)}

    def trim(self):
        """让空闲的工人把已释放的内存还给系统。"""
        self._write({"command": "trim"})
        self._read(60)

    def close(self):
        """请它结束；10 秒不应则终止。"""
        if self._process.poll() is None:
            try:
                self._write({"command": "quit"})
                self._process.wait(10)
            except (WorkerFailed, subprocess.TimeoutExpired):
                self._process.kill()
        self._process.wait()
        self._log.close()

    def _write(self, message: dict[str, Any]):
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
        except BrokenPipeError as error:
            raise WorkerFailed(self._explain("已退出")) from error

    def _read(self, timeout: float) -> dict[str, Any]:
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        if not ready:
            raise WorkerFailed(self._explain(f"{timeout} 秒没有回答"))
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailed(self._explain("中途退出"))
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerFailed(self._explain(reply["error"]))
        return reply

    def _explain(self, what: str) -> str:
        tail = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-6:]
        return f"{self.name} {what}；日志 {self.log_path} 的末尾：\n  " + "\n  ".join(tail)


def busy_cpu_seconds() -> float:
    """开机以来整机各核忙的时间之和，秒；含虚拟机被别人占走的（steal）。"""
    fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def available_memory_gb() -> float:
    """系统现在还能给出的内存，GB（2^30 字节）。"""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
