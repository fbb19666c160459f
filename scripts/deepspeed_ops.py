"""预编译 DeepSpeed 的 CPU 算子，并清理被杀进程留下的编译锁和共享内存文件。

启动：
    python scripts/deepspeed_ops.py build       # 编译 cpu_adam、fused_adam、shm_comm；有 GPU 或没有编译器时跳过
    python scripts/deepspeed_ops.py clean_shm   # 删除 /dev/shm 中已无进程使用的 deepspeed_allreduce_buffer_*
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CPU_OPS = ("CPUAdamBuilder", "FusedAdamBuilder", "ShareMemCommBuilder")
SHM_NAME = "deepspeed_allreduce_buffer"


def open_paths() -> Iterator[str]:
    """列出本机可见进程打开或映射的文件路径（读 /proc；看不到的进程略过）。"""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for descriptor in (process / "fd").iterdir():
                yield os.readlink(descriptor)
            for line in (process / "maps").read_text(errors="replace").splitlines():
                if SHM_NAME in line:
                    yield line.split(maxsplit=5)[-1]
        except OSError:
            continue  # 进程刚退出，或属于别的用户


def remove_stale_locks(extensions_dir: Path) -> list[Path]:
    """删除编译被中断后留下的 lock 文件，返回被删的路径。

    torch 的 FileBaton 在编译期间一直打开 lock；本机没有进程打开它，就说明持有者已死，此后的编译会永远等它。
    目录在多机共享的文件系统上时看不到别的机器，因此只删十分钟以前的。
    """
    locks = list(extensions_dir.glob("*/*/lock")) + list(extensions_dir.glob("*/lock"))
    if not locks:
        return []
    in_use = set(open_paths())
    stale = [lock for lock in locks if str(lock.resolve()) not in in_use and time.time() - lock.stat().st_mtime > 600]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def clean_shm(shm_dir: Path = Path("/dev/shm"), min_age_seconds: float = 60.0) -> list[Path]:
    """删除本用户名下、已无进程打开或映射、且不是刚建的 DeepSpeed 共享内存文件，返回被删的路径。

    每个 CPU 进程占 69 MB；被杀的进程不会清理，积多了会耗尽内存。
    """
    files = [path for path in shm_dir.glob(f"{SHM_NAME}_{os.getuid()}_*") if path.stat().st_uid == os.getuid()]
    if not files:
        return []
    in_use = set(open_paths())
    now = time.time()
    dead = [path for path in files if str(path) not in in_use and now - path.stat().st_mtime > min_age_seconds]
    for path in dead:
        path.unlink(missing_ok=True)
    return dead


def build_one(op_name: str) -> None:
    """编译并载入一个算子（已编译过时只是载入）。"""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder(op_name).load(verbose=False)


def build_all() -> int:
    """并行编译全部 CPU 算子，每个算子一个进程；返回进程的退出码。"""
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    if torch.cuda.is_available():
        print("检测到 GPU：DeepSpeed 的算子在首次训练时按 GPU 编译，这里不预编译。")
        return 0
    if shutil.which(os.environ.get("CXX") or "c++") is None and shutil.which("g++") is None:
        print("没有找到 C++ 编译器（c++、g++）：不编译 DeepSpeed 的算子，训练改用 torch 的 AdamW。")
        return 0
    extensions_dir = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in remove_stale_locks(extensions_dir):
        print(f"删除了编译中断后留下的锁 {lock}（没有进程在使用它）。")

    start = time.time()
    print(f"编译 DeepSpeed 的 CPU 算子 {', '.join(CPU_OPS)}（首次约 4 分钟，以后几秒）", flush=True)
    children = {
        op: subprocess.Popen(
            [sys.executable, __file__, "build", "--op", op], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for op in CPU_OPS
    }
    failed = []
    for op, child in children.items():
        output, _ = child.communicate()
        if child.returncode != 0:
            failed.append(op)
            print(f"---- {op} 编译失败（退出码 {child.returncode}）----\n{output[-4000:]}", file=sys.stderr)
    if failed:
        print(f"以下算子没有编译成功：{', '.join(failed)}。请按上面的编译器输出修复后重试。", file=sys.stderr)
        return 1
    print(f"算子就绪，用时 {time.time() - start:.0f} 秒。")
    return 0


def main() -> int:
    """解析命令行并执行。"""
    parser = argparse.ArgumentParser(description="预编译 DeepSpeed 的 CPU 算子，清理残留文件")
    parser.add_argument("action", choices=["build", "clean_shm"], help="build 编译算子；clean_shm 清理共享内存文件")
    parser.add_argument("--op", choices=CPU_OPS, help="只编译这一个算子（默认全部，由父进程分派）")
    args = parser.parse_args()
    if args.action == "clean_shm":
        removed = clean_shm()
        if removed:
            print(f"清理了 {len(removed)} 个已无进程使用的共享内存文件（deepspeed_allreduce_buffer_*）。")
        return 0
    if args.op:
        build_one(args.op)
        return 0
    return build_all()


if __name__ == "__main__":
    sys.exit(main())
