"""kto：前景理论的偏好优化（Ethayarajh 等，2024）。每行一个回答，标注好或不好。

好的回答 1 − σ(β·(r − z))，不好的 1 − σ(β·(z − r))；r 是回答对参考模型的对数比，z 是离参考模型的 KL 的估计：一步的
每个提示配上这一步前一行的回答（首行配末行的；只有一行时配文件里前一行的），它们的对数比在整个全局 batch 上的平均，
不小于 0，不传梯度。评估的 z 是整个评估集的。
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune.data.grouping import GroupedDataSet, singles
from finetune.data.prompting import IGNORE_INDEX, EncodedSample
from finetune.tasks.preference import DEFAULTS, Answers, Figures, PreferenceLoss
from finetune.tasks.task import Task
from utils import log_rank_0, world_size

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.data.step_loader import StepBatch, StepLoader

Key = tuple[int, int]  # (提示的行, 回答的行)


def partners(data_set: GroupedDataSet, indices: Sequence[int]) -> dict[int, tuple[Key, EncodedSample]]:
    """一步的各行 → 同样的提示，配上前一行的回答。"""
    return _mismatched(data_set, _keys(data_set, indices))


def neighbours(data_set: GroupedDataSet, indices: Sequence[int]) -> dict[int, tuple[Key, EncodedSample]]:
    """评估时配文件里前一行的回答：与怎样成批无关。"""
    return _mismatched(data_set, [_neighbour(data_set, row) for row in indices])


def _keys(data_set: GroupedDataSet, indices: Sequence[int]) -> list[Key]:
    if len(indices) == 1:  # 配上自己的回答，z 就是它自己的对数比
        return [_neighbour(data_set, indices[0])]
    return [(row, indices[place - 1]) for place, row in enumerate(indices)]


def _neighbour(data_set: GroupedDataSet, row: int) -> Key:
    return row, (row - 1) % len(data_set)


def _mismatched(data_set: GroupedDataSet, keys: Sequence[Key]) -> dict[int, tuple[Key, EncodedSample]]:
    found = Mismatched(data_set, keys)
    return {key[0]: (key, sample) for key, [sample] in zip(keys, found, strict=True)}


class Mismatched:
    """第 i 项：第 keys[i][0] 行的提示配上第 keys[i][1] 行的回答，长于 max_len 的截去尾部；接口同 GroupedDataSet。"""

    reference = is_desirable = None

    def __init__(self, data_set: GroupedDataSet, keys: Sequence[Key]):
        self.data_set, self.keys, self.max_len = data_set, keys, data_set.max_len
        columns = data_set.data_set.columns
        prompts, answers = np.array(keys).T
        src, tgt = columns["src_lengths"][prompts], (columns["lengths"] - columns["src_lengths"])[answers]
        tgt = np.minimum(tgt, self.max_len - src)
        self.lengths = self.whole_lengths = src + tgt
        self.num_targets = tgt - (src == 0)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> list[EncodedSample]:
        ([prompt], [answer]), num_targets = (self.data_set[row] for row in self.keys[index]), self.num_targets[index]
        src = prompt.input_ids[: prompt.num_src_tokens]
        tgt = answer.input_ids[answer.num_src_tokens :][: self.max_len - len(src)]
        labels = np.concatenate([np.full(len(src), IGNORE_INDEX, dtype=tgt.dtype), tgt])
        return [prompt._replace(input_ids=np.concatenate([src, tgt]), labels=labels, num_targets=int(num_targets))]

    def members(self, index: int) -> tuple[int]:
        return (index,)

    def places(self, index: int) -> list[tuple[str, int]]:
        return self.data_set.places(self.keys[index][0])


class KtoLoss(PreferenceLoss):
    """每一行权重相同，一步的 z 是整个全局 batch 的。"""

    partners, eval_partners = staticmethod(partners), staticmethod(neighbours)

    def __init__(self, options):
        super().__init__(options, pair_loss=None, uses_reference=True, width=1)
        self.divergence: Tensor | None = None  # 这一步的 z

    def extra_passes(self, num_epochs: float) -> float:
        """另有各轮的搭档：现在的模型与参考模型各一遍。"""
        return super().extra_passes(num_epochs) + 2 * num_epochs

    def start(self, engine, data_sets: Sequence, pad_token_id: int) -> None:
        """另外算好每一步的搭档的；搭档随各轮的次序而变。"""
        share = data_sets[0].is_desirable.mean()
        if share in (0, 1):
            seen, missing, remedy = ("true", "不好的", "，或改用 --task sft") if share else ("false", "好的", "")
            log_rank_0(f"警告：训练数据的 label 全是 {seen}，没有{missing}回答可比；请补上{missing}行{remedy}")
        if self.options.eval_metric == "nll" and not all(data_set.is_desirable.any() for data_set in data_sets[1:]):
            raise ValueError(
                "评估数据没有 label 是 true 的行，--eval_metric nll 无从算起，请补上，或用 --eval_metric loss"
            )
        super().start(engine, data_sets, pad_token_id)
        if self.is_live:
            return
        from finetune.data.packing import epoch_steps

        options = self.options
        size = options.per_device_train_batch_size * options.gradient_accumulation_steps * world_size()
        for number, data_set in enumerate(data_sets):
            keys = {_neighbour(data_set, row) for row in range(len(data_set))} if number else set()
            for epoch in range(0 if number else options.num_train_epochs):
                for step in epoch_steps(len(data_set), size, options.seed, epoch):
                    keys.update(_keys(data_set, step))
            ordered = sorted(keys)
            found = self._all_log_probs(engine, Mismatched(data_set, ordered), pad_token_id)
            data_set.reference = {
                **dict(enumerate(data_set.reference)),
                **dict(zip(ordered, found, strict=True)),
            }

    def prepare(self, engine, step: StepBatch) -> None:
        """算这一步的 z；集合操作。"""
        self.divergence = self._estimate(engine, [step])

    def begin_evaluation(self, engine, loader: StepLoader, should_stop: Callable[[], bool]) -> bool:
        """算整个评估集的 z：与怎样成批、几个进程无关。"""
        self.divergence = self._estimate(engine, loader.epoch(0), should_stop)
        return self.divergence is not None

    def _estimate(
        self, engine, steps: Iterable[StepBatch], should_stop: Callable[[], bool] = lambda: False
    ) -> Tensor | None:
        """这些步的 z；放弃时为 None。"""
        import torch
        import torch.distributed as dist

        from finetune.data.step_loader import batch_to_device

        total, count = torch.zeros((), dtype=torch.float64, device=engine.device), 0
        with torch.no_grad():
            for step in steps:
                if should_stop():
                    return None
                count += step.num_items
                for batch in step.partners:
                    answers = self.answers(engine, batch_to_device(batch, engine.device))
                    total += (answers.log_probs - answers.reference).double().sum()
        if dist.is_initialized():
            dist.all_reduce(total)
        return (total / count).clamp(min=0).float()

    def measure(self, answers: Answers) -> tuple[Tensor, Figures]:
        """各行的损失与要记的各项；好与不好的奖励只在各自的行里平均。"""
        import torch

        beta, is_good, divergence = self.options.beta, answers.is_desirable, self.divergence
        rewards = beta * (answers.log_probs - answers.reference)[:, 0]
        signs = torch.where(is_good, 1.0, -1.0)
        margins = signs * (rewards - beta * divergence)
        losses = 1 - torch.sigmoid(margins)
        rewards, margins = rewards.detach(), margins.detach()
        return losses, {
            "margin": margins,
            "accuracy": (margins > 0).float(),
            "reward_chosen": rewards[is_good],
            "reward_rejected": rewards[~is_good],
            "kl": divergence.expand(len(rewards)),
        }


TASK = Task(
    "kto",
    open=KtoLoss,
    group=singles,
    flags=("beta",),
    defaults=DEFAULTS,
    learning_rate_scale=0.05,
    is_preference=True,
)
