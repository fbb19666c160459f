"""训练中的评估：目标 token 的平均负对数似然；不改动任何参数、随机状态与训练曲线。"""

from contextlib import contextmanager

import torch
import torch.distributed as dist

from batching import StepLoader
from utils import global_rank, world_size


@contextmanager
def evaluating(engine):
    """在评估模式里做事，之后回到训练模式，并恢复随机状态。"""
    cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    cpu_state = torch.get_rng_state()
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train()
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state)


def evaluate_nll(engine, dataset, batch_size: int, max_len: int, pad_token_id: int, packing: bool) -> float:
    """整份数据各目标 token 的平均负对数似然（nats）；行分给各进程，每行恰好算一次。集合操作。

    Args:
        engine: DeepSpeed 引擎。
        dataset: BaichuanDataSet。
        其余: 与训练相同。
    """
    loader = StepLoader(
        dataset,
        batch_size=batch_size,
        max_len=max_len,
        seed=None,
        pad_token_id=pad_token_id,
        packing=packing,
        world_size=world_size(),
        rank=global_rank(),
    )
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)  # 损失之和、目标数（各进程相同）
    with evaluating(engine):
        for step in loader.epoch(0):
            for batch in step.micro_batches:
                batch = batch_to_device(batch, engine.device)
                total[0] += engine(**batch, num_items_in_batch=1, use_cache=False, return_logits=False).loss
            total[1] += step.num_target_tokens
    loss_sum = total[:1].clone()
    if dist.is_initialized():
        dist.all_reduce(loss_sum)
    return (loss_sum[0] / total[1]).item()


def batch_to_device(batch: dict, device: torch.device) -> dict:
    """把一个 micro batch 的张量搬到设备上；来自锁页内存时不等待。"""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
