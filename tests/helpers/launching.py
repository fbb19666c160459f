"""测试用：把训练作为真实的 deepspeed 进程拉起（N 个 CPU rank），返回退出码、输出与训练记录，不留下任何东西。"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from paths import ROOT

from finetune.process import training_process
from finetune.process.training_process import clean_shm, deepspeed_command, free_port
from utils import write_json

RESUME_WORKER = Path(__file__).with_name("resume_worker.py")


class Launch(NamedTuple):
    """一次启动的结果。"""

    returncode: int
    output: str  # stdout 与 stderr，先后如实
    records: list[dict]  # output_dir/train_log.jsonl；没有则为空
    seconds: float

    def tail(self, length: int = 4000) -> str:
        """断言失败时给人看的输出末尾。"""
        return f"退出码 {self.returncode}，{self.seconds:.0f} 秒\n…{self.output[-length:]}"

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records if "loss" in record]


def launch(
    flags: Sequence,
    *,
    num_ranks: int = 1,
    script: str | Path = "train.py",
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    timeout: float = 300,
    master_port: int | None = None,
    launcher: bool = True,
) -> Launch:
    """运行 `deepspeed SCRIPT FLAGS`，num_ranks 个进程；超时杀掉整个进程组并让测试失败。

    Args:
        flags: 脚本的参数，逐个转成字符串。
        master_port: 缺省取一个空闲端口。
        launcher: False 时不经 deepspeed 启动器，直接拉起各 rank（省去启动器自己的几秒）。
    """
    port = master_port or free_port()
    words = [str(flag) for flag in flags]
    environment = cpu_environment(num_ranks) | (env or {})
    if launcher:
        commands = [([deepspeed_command(), "--master_port", str(port), str(script), *words], environment)]
    else:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
        shared |= {"LOCAL_WORLD_SIZE": str(num_ranks), "CROSS_RANK": "0", "CROSS_SIZE": "1"}
        commands = [
            ([sys.executable, "-u", str(script), *words], environment | shared | {"RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(num_ranks)
        ]
    returncode, output, seconds = run_group(commands, cwd, timeout, port)
    log = Path(cwd, words[words.index("--output_dir") + 1], "train_log.jsonl") if "--output_dir" in words else None
    lines = log.read_text(encoding="utf-8").splitlines() if log is not None and log.is_file() else []
    return Launch(returncode, output, [json.loads(line) for line in lines], seconds)


def run_group(commands: list[tuple[list[str], dict]], cwd: Path, timeout: float, port: int) -> tuple[int, str, float]:
    """同时运行几个命令，各在自己的进程组；返回 (第一个非零的退出码或 0, 全部输出, 秒)。"""
    start = time.monotonic()
    processes: list[subprocess.Popen] = []
    with tempfile.TemporaryFile() as output:
        try:
            for command, environment in commands:
                processes.append(
                    subprocess.Popen(
                        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                        stderr=subprocess.STDOUT, start_new_session=True,
                    )
                )  # fmt: skip
            codes = wait_all(processes, start + timeout)
        finally:
            for process in processes:
                kill_group(process)
            clean_shm(port)
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    if codes is None:
        pytest.fail(f"{timeout:.0f} 秒没有结束：{commands[0][0]}\n…{text[-4000:]}")
    return next((code for code in codes if code), 0), text, time.monotonic() - start


def wait_all(processes: list[subprocess.Popen], deadline: float) -> list[int] | None:
    """等全部结束；有一个非零退出后，其余再等 20 秒（正常时它们会跟着报错）。超时返回 None。"""
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return codes
        if any(codes):
            deadline = min(deadline, time.monotonic() + 20)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)


def kill_group(process: subprocess.Popen):
    """杀掉进程组里还活着的：启动器死后，它的 rank 会成为孤儿继续跑。"""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def cpu_environment(num_ranks: int) -> dict[str, str]:
    """N 个 CPU 进程的环境；机器上有 GPU 时要有足够的张数。"""
    if torch.cuda.is_available() and torch.cuda.device_count() < num_ranks:
        pytest.skip(f"需要 {num_ranks} 个 GPU（或一台没有 GPU 的机器）")
    return training_process.cpu_environment(num_ranks)


def run_tasks(directory: Path, tasks: dict, num_ranks: int, **options) -> dict[str, dict]:
    """用 resume_worker.py 在同一组进程里逐个做 tasks → 它写的 {任务名: 结果}。"""
    write_json(directory / "tasks.json", tasks)
    files = [directory / "tasks.json", directory / "results.json"]
    run = launch(files, num_ranks=num_ranks, script=RESUME_WORKER, launcher=False, **options)
    assert run.returncode == 0, run.tail()
    return json.loads((directory / "results.json").read_text(encoding="utf-8"))
