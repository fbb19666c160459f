"""预编译 DeepSpeed 的 CPU 算子，并清理被杀进程留下的编译锁和共享内存文件。

启动：
    python scripts/deepspeed_ops.py build       # 编译 cpu_adam、fused_adam、shm_comm；有 GPU 或没有编译器时跳过
    python scripts/deepspeed_ops.py clean_shm   # 删除 /dev/shm 中已无进程使用的 deepspeed_allreduce_buffer_*
"""

import os
import shutil
import subprocess
import sys
import time

from finetune.options import ScriptParser
from finetune.process.stale_files import remove_dead_shared_memory, remove_stale_locks

CPU_OPS = ("CPUAdamBuilder", "FusedAdamBuilder", "ShareMemCommBuilder")


def build_one(op_name: str) -> None:
    """编译并载入一个算子（已编译过时只是载入）。"""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder(op_name).load(verbose=False)


def build_all() -> int:
    """并行编译全部 CPU 算子，每个算子一个进程；返回进程的退出码。"""
    import torch

    if torch.cuda.is_available():
        print("检测到 GPU：DeepSpeed 的算子在首次训练时按 GPU 编译，这里不预编译。")
        return 0
    if shutil.which(os.environ.get("CXX") or "c++") is None and shutil.which("g++") is None:
        print("没有找到 C++ 编译器（c++、g++）：不编译 DeepSpeed 的算子，训练改用 torch 的 AdamW。")
        return 0
    for lock in remove_stale_locks():
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
    parser = ScriptParser(description="预编译 DeepSpeed 的 CPU 算子，清理残留文件")
    parser.add_argument("action", choices=["build", "clean_shm"], help="build 编译算子；clean_shm 清理共享内存文件")
    parser.add_argument("--op", choices=CPU_OPS, help="只编译这一个算子（默认全部，由父进程分派）")
    args = parser.parse_args()
    if args.action == "clean_shm":
        removed = remove_dead_shared_memory()
        if removed:
            print(f"清理了 {len(removed)} 个已无进程使用的共享内存文件（deepspeed_allreduce_buffer_*）。")
        return 0
    if args.op:
        build_one(args.op)
        return 0
    return build_all()


if __name__ == "__main__":
    sys.exit(main())
