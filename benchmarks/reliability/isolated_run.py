"""在 fork 出的子进程里运行一个函数：挂起、崩溃与被信号杀死都不影响本进程。"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch


def run_isolated(function: Callable[[], Any], timeout_s: float) -> tuple[str, Any]:
    """在 fork 出的子进程里运行 → (accepted | rejected | crash | hang | killed, 返回值或说明)。"""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(function, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout_s):
            process.kill()
            return "hang", f"{timeout_s:g} 秒没有结束"
        return receiver.recv()
    except EOFError:
        process.join()
        return "killed", f"子进程被信号 {-(process.exitcode or 0)} 结束"
    finally:
        process.join()
        receiver.close()


def _child(function: Callable[[], Any], sender) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)
    try:
        sender.send(("accepted", function()))
    except ValueError as error:  # 用户的错误：train.py 与 predict.py 只打印说明
        sender.send(("rejected", str(error)) if len(str(error)) > 8 else ("crash", traceback.format_exc()))
    except BaseException:
        sender.send(("crash", traceback.format_exc()))
