"""逐步产出本进程的 micro batch，并在后台备好下一步。"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from finetune.data.packing import collate, deal_step, iter_steps
from finetune.data.prompting import EncodedSample
from finetune.process.accelerator import pin_memory


class StepBatch(NamedTuple):
    """一个优化步里本 rank 的输入。"""

    micro_batches: list[dict[str, Any]]  # collate 的结果；各 rank 个数相同
    num_target_tokens: int  # 这一步所有 rank 的目标 token 数
    num_tokens: int  # 这一步所有 rank 的非补齐 token 数
    rows: list[tuple[str, int]]  # 本 rank 各样本的 (文件, 行号)，依 micro batch 的次序
    num_items: int  # 这一步的损失除以它：所有 rank 的目标 token 数，或（with_samples 时）行数
    partners: Sequence[dict[str, Any]] = ()  # kto：同样的行配上别的行的回答，依 micro_batches 的次序


class StepLoader:
    """按优化步产出本 rank 的 micro batch；这一步计算时，下一步已在后台线程里备好。

    一步含 batch_size × gradient_accumulation_steps × world_size 个样本，装箱与否都一样。
    dataset 可以是分成组的（见 grouping.py）：一步数的是组，一组总在同一个 micro batch 里。
    with_offsets：并排的 micro batch 带着各样本的位置 document_offsets（--cache_frozen 用）。
    with_samples：micro batch 带着各样本的下标 sample_indices、目标数 sample_targets，数据集有 reference 时还有
    sample_reference（偏好的各阶段用）；num_items 是行数。
    partners：(数据集, 一步的下标) → 各行的搭档（键, 样本），见 finetune/tasks/kto.py。
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
        with_samples: bool = False,
        partners: Callable[[Any, Sequence[int]], dict[int, tuple[Any, EncodedSample]]] | None = None,
        order: Sequence[int] | None = None,
    ):
        self.dataset, self.seed, self.packing, self.pad_token_id = dataset, seed, packing, pad_token_id
        self.world_size, self.rank, self.batch_size, self.max_len = world_size, rank, batch_size, max_len
        self.with_offsets, self.with_samples, self.partners = with_offsets, with_samples, partners
        self.global_batch_size = batch_size * gradient_accumulation_steps * world_size
        self.order = range(len(dataset)) if order is None else order
        self.steps_per_epoch = -(-len(self.order) // self.global_batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[StepBatch]:
        """从第 start_step 步（从 0 起）起，依次产出第 epoch 个 epoch 的各步。"""
        places = iter_steps(len(self.order), self.global_batch_size, self.seed, epoch, start_step)
        steps = ([self.order[place] for place in step] for step in places)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="step-loader") as background:
            coming = None
            for step in steps:
                ready, coming = coming, background.submit(self.prepare, step)
                if ready is not None:
                    yield ready.result()
            if coming is not None:
                yield coming.result()

    def prepare(self, indices: Sequence[int]) -> StepBatch:
        """备好由这些样本组成的一步。"""
        max_tokens = self.batch_size * self.max_len
        lengths = {i: int(self.dataset.lengths[i]) for i in indices}
        num_targets = sum(int(self.dataset.num_targets[i]) for i in indices)
        dealt = deal_step(lengths, indices, self.world_size, self.batch_size, max_tokens, self.packing)[self.rank]
        micro_batches, rows = [], []
        for micro in dealt:
            samples = []
            for i in micro:
                item = self.dataset[i]
                samples += item if isinstance(item, list) else [item]
                rows += self.dataset.places(i) if isinstance(item, list) else [self.dataset.place(i)]
            batch = collate(samples, self.pad_token_id, self.packing)
            if self.with_offsets:
                batch["document_offsets"] = [int(self.dataset.offsets[i]) for i in micro]
            if self.with_samples:
                batch |= self._about([member for i in micro for member in self.dataset.members(i)], samples)
                if self.dataset.is_desirable is not None:
                    batch["sample_desirable"] = [bool(self.dataset.is_desirable[i]) for i in micro]
            micro_batches.append(pinned(batch))
        return StepBatch(
            micro_batches=micro_batches,
            num_target_tokens=num_targets,
            num_tokens=sum(lengths.values()) if self.packing else self._num_tokens_unpacked(indices),
            rows=rows,
            num_items=len(indices) if self.with_samples else num_targets,
            partners=[] if self.partners is None else self._partner_batches(indices, dealt),
        )

    def _num_tokens_unpacked(self, indices: Sequence[int]) -> int:
        """不并排时各样本自成一行：共用的提示各算一次。"""
        lengths = getattr(self.dataset, "whole_lengths", self.dataset.lengths)
        return sum(int(lengths[i]) for i in indices)

    def _partner_batches(self, indices: Sequence[int], dealt: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        found, batches = self.partners(self.dataset, indices), []
        for micro in dealt:
            keys, samples = [found[i][0] for i in micro], [found[i][1] for i in micro]
            batches.append(pinned(collate(samples, self.pad_token_id, self.packing) | self._about(keys, samples)))
        return batches

    def _about(self, keys: list, samples: list[EncodedSample]) -> dict[str, list]:
        """一个 micro batch 的各样本：在 dataset.reference 里的键、目标数、参考模型的对数概率。"""
        about = {"sample_indices": keys, "sample_targets": [sample.num_targets for sample in samples]}
        if self.dataset.reference is not None:
            about["sample_reference"] = [self.dataset.reference[key] for key in keys]
        return about


def pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """张量放在锁页内存里。"""
    return {name: pin_memory(value) if torch.is_tensor(value) else value for name, value in batch.items()}


def batch_to_device(batch: dict, device: torch.device) -> dict:
    """把一个 micro batch 的张量搬到设备上；来自锁页内存时不等待。"""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
