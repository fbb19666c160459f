"""test_resume.py 拉起的进程：在同一组进程里逐个运行 train.run_main()，可在给定的一步给自己发真实的信号。

    python tests/resume_worker.py TASKS.json RESULTS.json
TASKS.json 是 {任务名: {"flags": [...], "kill": {"step": 3, "rank": 1, "signal": "SIGUSR1"}, "copy": [旧, 新]}}；
kill、copy 可缺。copy 在运行之前由 0 号进程把目录「旧」复制成「新」。
RESULTS.json 是 {任务名: {"code": 退出码, "output": 0 号进程的输出}}。
"""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import train
from finetune.process.interruption import leave
from utils import global_rank

train_step = train.train_step


def with_signal(kill: dict | None):
    """train_step 走完 kill["step"] 之后，由 kill["rank"] 给自己发信号。"""

    def step_then_signal(engine, step, *args):
        result = train_step(engine, step, *args)
        if kill and engine.global_steps == kill["step"] and global_rank() == kill["rank"]:
            os.kill(os.getpid(), getattr(signal, kill["signal"]))
        return result

    return step_then_signal


def run_task(task: dict) -> dict:
    """运行一个任务 → {"code", "output"}；没有说明的异常记下回溯。"""
    if "copy" in task and global_rank() == 0:
        shutil.copytree(*task["copy"])
    if dist.is_initialized():
        dist.barrier()
    sys.argv = ["train.py", *task["flags"]]
    train.train_step = with_signal(task.get("kill"))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            code = train.run_main()
        except BaseException:
            code = "traceback"
            print(traceback.format_exc())
    return {"code": code, "output": output.getvalue()}


def main():
    torch.set_num_threads(1)
    tasks_path, results_path = map(Path, sys.argv[1:])
    tasks = json.loads(tasks_path.read_text(encoding="utf-8"))
    results = {name: run_task(task) for name, task in tasks.items()}
    if global_rank() == 0:
        results_path.write_text(json.dumps(results, ensure_ascii=False), encoding="utf-8")
    leave(0)


if __name__ == "__main__":
    main()
