"""逐步产出本进程的 micro batch，并在后台备好下一步。"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from finetune.data.packing import collate, deal_step, epoch_steps
from finetune.process.accelerator import pin_memory


class StepBatch(NamedTuple):
    """一个优化步里本 rank 的输入。"""

    micro_batches: list[dict[str, Any]]  # collate 的结果；各 rank 个数相同
    num_target_tokens: int  # 这一步所有 rank 的目标 token 数
    num_tokens: int  # 这一步所有 rank 的非补齐 token 数
    rows: list[tuple[str, int]]  # 本 rank 各样本的 (文件, 行号)，依 micro batch 的次序


class StepLoader:
    """按优化步产出本 rank 的 micro batch；这一步计算时，下一步已在后台线程里备好。

    一步含 batch_size × gradient_accumulation_steps × world_size 个样本，装箱与否都一样。
    with_offsets：并排的 micro batch 带着各样本的位置 document_offsets（--cache_frozen 用）。
    次序只由 seed、epoch 与步数决定，从中间续训不必重放前面的步。
    seed=None（评估）按 order 的次序，没有 order 时按文件的。
    有 CUDA 时张量放在锁页内存里，便于异步拷贝。
    """

    def __init__(
        self,
        dataset,
        *,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        max_len: int,
        seed: int | None,
        world_size: int = 1,
        rank: int = 0,
        pad_token_id: int = 0,
        packing: bool = True,
        with_offsets: bool = False,
        order: Sequence[int] | None = None,
    ):
        self.dataset, self.seed, self.packing, self.pad_token_id = dataset, seed, packing, pad_token_id
        self.world_size, self.rank, self.batch_size, self.max_len = world_size, rank, batch_size, max_len
        self.with_offsets = with_offsets
        self.global_batch_size = batch_size * gradient_accumulation_steps * world_size
        self.order = range(len(dataset)) if order is None else order
        self.steps_per_epoch = -(-len(self.order) // self.global_batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[StepBatch]:
        """从第 start_step 步（从 0 起）起，依次产出第 epoch 个 epoch 的各步。"""
        places = epoch_steps(len(self.order), self.global_batch_size, self.seed, epoch)[start_step:]
        steps = [[self.order[place] for place in step] for step in places]
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="step-loader") as background:
            coming = background.submit(self.prepare, steps[0]) if steps else None
            for following in [*steps[1:], None]:
                if coming is None:
                    return
                ready = coming.result()
                coming = background.submit(self.prepare, following) if following is not None else None
                yield ready

    def prepare(self, indices: Sequence[int]) -> StepBatch:
        """备好由这些样本组成的一步。"""
        max_tokens = self.batch_size * self.max_len
        dealt = deal_step(self.dataset.lengths, indices, self.world_size, self.batch_size, max_tokens, self.packing)[
            self.rank
        ]
        micro_batches = [collate([self.dataset[i] for i in micro], self.pad_token_id, self.packing) for micro in dealt]
        if self.with_offsets:
            for batch, micro in zip(micro_batches, dealt, strict=True):
                batch["document_offsets"] = [int(self.dataset.offsets[i]) for i in micro]
        micro_batches = [
            {name: pin_memory(value) if torch.is_tensor(value) else value for name, value in batch.items()}
            for batch in micro_batches
        ]
        return StepBatch(
            micro_batches=micro_batches,
            num_target_tokens=sum(self.dataset.num_targets[i] for i in indices),
            num_tokens=sum(self.dataset.lengths[i] for i in indices),
            rows=[(self.dataset.paths[i], self.dataset.lines[i]) for micro in dealt for i in micro],
        )


def batch_to_device(batch: dict, device: torch.device) -> dict:
    """把一个 micro batch 的张量搬到设备上；来自锁页内存时不等待。"""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
