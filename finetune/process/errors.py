"""各库的错误说给人听：显存不够、通信断了、磁盘满、损失缩放到底，各带办法。"""

import torch
import torch.distributed as dist

from utils import write_failed

OUT_OF_MEMORY = (
    "显存不够。依次试：加 --gradient_checkpointing；--per_device_train_batch_size 1 并用 --gradient_accumulation_steps "
    "补足；调小 --max_len；--ds_file ds_zero3_offload.json；换 lora 或 freeze"
)


def lost_connection(error: BaseException) -> str | None:
    """error 若是进程间通信断了（别的进程死了、网络断了、等到了时限），返回给人看的说明，否则为 None。

    还没连上时（端口被占、没有权限、连不到 0 号机器）说明怎样换端口。
    """
    words = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "TCPStore", "wait timeout")
    is_network = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    if not (is_network or isinstance(error, dist.DistError)):
        return None
    if not dist.is_initialized():
        return (
            f"各进程没有连上：{str(error).splitlines()[0]}\n"
            "端口被占用就换一个 --master_port；小于 1024 的端口（如 520）要 root；多机时检查地址与防火墙"
        )
    return (
        f"与其他进程的通信断了：有进程已死（看它自己的输出），或机器之间的网络中断。{str(error).splitlines()[0]}\n"
        "已有的检查点没有受影响，请排除原因后用 --resume auto 接着训练"
    )


def explain(error: BaseException) -> str | None:
    """一个库的错误的说明与办法；不认识的为 None（该打印回溯）。"""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    if "loss scale already at minimum" in str(error):
        return "fp16 的损失缩放已到最小，梯度仍然溢出。请换 --precision bf16 或 fp32，或调小 --learning_rate"
    if isinstance(error, OSError) and error.strerror:  # 磁盘满、变成只读、挂载点消失
        return str(write_failed(error))
    return lost_connection(error)
