"""偏好的各阶段共用的：参数，两个回答的对数概率，参考模型，一步的损失与评估。

参考模型是这次训练第一步时的模型，内存里从没有第二个模型：新的 LoRA 关掉就是它；其余的（freeze、full、ptuning、
接着 --adapter_path 的、加了新词的）在第一步之前把全部回答的对数概率算好。续训时同样从基座算起，所以得到同样的参考。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.options import above_zero, at_least, flag
from finetune.tasks.token_loss import TokenLoss
from finetune.terminal import long_job
from utils import global_rank, world_size

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.data.step_loader import StepBatch, StepLoader

DEFAULTS = {"beta": 0.1, "lora_dropout": 0.0, "eval_metric": "loss"}


@dataclass
class PreferenceOptions:
    """偏好的各阶段的参数。"""

    beta: float | None = flag(
        None,
        "dpo、kto：离开参考模型的代价；orpo：比值比一项的权重 λ；simpo：对数概率之差的系数（缺省 0.1，simpo 2.0）",
        kind=float,
        check=above_zero,
    )
    label_smoothing: float = flag(
        0.0,
        "dpo、simpo：偏好标反了的比例，[0, 0.5)（cDPO）",
        check=lambda value: None if 0 <= value < 0.5 else "必须在 [0, 0.5) 内",
    )
    sft_weight: float = flag(
        0.0, "dpo、simpo：加上好的回答的 NLL（一对里各 token 的平均）乘这个权重", check=at_least(0)
    )
    simpo_gamma: float = flag(1.0, "simpo：好坏两个回答至少要差多少", check=at_least(0))


class Answers(NamedTuple):
    """P 对回答：[P, 2]，好的在前；单个的回答是 [P, 1]。"""

    log_probs: Tensor  # 回答各 token 的对数概率之和，fp32
    lengths: Tensor  # 回答的 token 数
    reference: Tensor | None  # 参考模型的 log_probs；没有参考的阶段为 None
    is_desirable: Tensor | None = None  # kto：各行的标注 [P]

    @property
    def means(self) -> Tensor:
        """各 token 的平均对数概率。"""
        return self.log_probs / self.lengths


Figures = dict[str, "Tensor"]  # 名字 → 各对的值 [P]
PairLoss = Callable[[Answers, Any], tuple["Tensor", "Tensor"]]  # (回答, 参数) → (各对的损失 [P], 隐含的奖励 [P, 2])


def logistic(margins: Tensor, smoothing: float) -> Tensor:
    """−(1−ε) log σ(x) − ε log σ(−x)。"""
    from torch.nn.functional import softplus

    return (1 - smoothing) * softplus(-margins) + smoothing * softplus(margins)


def answer_log_probs(module, batch: dict) -> tuple[Tensor, Tensor]:
    """一个 micro batch 的各样本 → (目标的对数概率之和 [n] fp32, 目标数 [n])；batch 见 StepLoader 的 with_samples。"""
    import torch

    inputs = {name: value for name, value in batch.items() if not name.startswith("sample_")}
    counts = batch["sample_targets"]
    losses = module(**inputs, row_losses=True, use_cache=False, return_logits=False).loss
    lengths = torch.tensor(counts, dtype=torch.float32, device=losses.device)
    if not counts:  # 没有样本的 micro batch：仍与模型相连，各进程的反向次数相同
        return losses[:0], lengths
    return -torch.stack([part.sum() for part in losses.split(counts)]), lengths


class PreferenceLoss(TokenLoss):
    """一步的每一对权重相同：损失之和除以全局的对数。

    Args:
        options: train.py 的参数。
        pair_loss: 这一阶段的损失。
        uses_reference: 要不要参考模型。
        width: 一行几个回答：一对是 2，kto 是 1。
    """

    def __init__(self, options, pair_loss: PairLoss, uses_reference: bool, width: int = 2):
        super().__init__()
        self.with_samples = True
        self.options, self.pair_loss, self.uses_reference, self.width = options, pair_loss, uses_reference, width
        # 新词的行关不掉，也在训练
        is_new = options.train_type == "lora" and options.adapter_path is None
        self.is_live = is_new and options.add_tokens is None
        self._sums: dict[str, Tensor] = {}

    def extra_passes(self, num_epochs: float) -> float:
        """参考模型的：每步一次，或第一步之前一遍。"""
        return 0.0 if not self.uses_reference else num_epochs if self.is_live else 1.0

    def start(self, engine, data_sets: Sequence, pad_token_id: int) -> None:
        """第一步之前，权重还是起点的：需要时算好参考模型的对数概率，放进 data_set.reference。集合操作。"""
        if not self.uses_reference or self.is_live:
            return
        for data_set in data_sets:
            data_set.reference = self._all_log_probs(engine, data_set, pad_token_id)

    def _all_log_probs(self, engine, data_set, pad_token_id: int) -> list[float]:
        """data_set 的全部回答的对数概率，依样本的次序；各进程分担，得到同样的结果。集合操作。"""
        import torch
        import torch.distributed as dist

        from finetune.data.step_loader import StepLoader, batch_to_device
        from finetune.training.evaluation import evaluating

        loader = StepLoader(
            data_set,
            batch_size=self.options.per_device_train_batch_size,
            max_len=data_set.max_len,
            seed=None,
            pad_token_id=pad_token_id,
            packing=self.options.packing,
            with_samples=True,
            order=sorted(range(len(data_set)), key=lambda row: -int(data_set.lengths[row])),
            world_size=world_size(),
            rank=global_rank(),
        )
        table = torch.zeros(len(data_set) * self.width, dtype=torch.float64, device=engine.device)
        with evaluating(engine), long_job("参考模型的对数概率", len(data_set), "行") as progress:
            for step in loader.epoch(0):
                for batch in step.micro_batches:
                    found, _ = answer_log_probs(engine, batch_to_device(batch, engine.device))
                    table[torch.tensor(batch["sample_indices"], device=engine.device, dtype=torch.long)] = (
                        found.double()
                    )
                progress.update(min(loader.global_batch_size, len(data_set) - progress.done))
        if dist.is_initialized():
            dist.all_reduce(table)
        return table.tolist()

    def answers(self, engine, batch: dict) -> Answers:
        """现在的模型与参考模型的对数概率；有梯度时只有现在的模型有。"""
        import torch

        reference = None
        if self.uses_reference and self.is_live:
            with torch.no_grad(), engine.module.disable_adapter():
                reference, _ = answer_log_probs(engine.module, batch)
        elif self.uses_reference:
            reference = torch.tensor(batch["sample_reference"], dtype=torch.float32, device=engine.device)
        log_probs, lengths = answer_log_probs(engine, batch)
        answers = (None if one is None else one.view(-1, self.width) for one in (log_probs, lengths, reference))
        labels = batch.get("sample_desirable")
        return Answers(
            *answers, None if labels is None else torch.tensor(labels, device=engine.device, dtype=torch.bool)
        )

    def measure(self, answers: Answers) -> tuple[Tensor, Figures]:
        """各对的损失与要记的各项。"""
        losses, rewards = self.pair_loss(answers, self.options)
        good, bad = rewards.detach().unbind(dim=1)
        figures = {
            "margin": good - bad,
            "accuracy": (good > bad).float(),
            "reward_chosen": good,
            "reward_rejected": bad,
        }
        if answers.reference is not None:
            figures["kl"] = (answers.log_probs.detach() - answers.reference).mean(dim=1)
        return losses, figures

    def loss(self, engine, batch: dict, step: StepBatch) -> Tensor:
        """一个 micro batch 的损失；DeepSpeed 对进程取平均，所以先乘进程数。"""
        losses, figures = self.measure(self.answers(engine, batch))
        self._add(figures)
        return losses.sum() * world_size() / step.num_items

    def _add(self, figures: Figures) -> None:
        for name, values in figures.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + values.double().sum(), count + len(values)

    def figures(self, engine, step: StepBatch) -> dict[str, tuple[float, int]]:
        """这一步要记的各项：(和, 个数)；集合操作。"""
        sums, self._sums = self._sums, {}
        return _over_ranks(sums, engine.device)

    def begin_evaluation(self, engine, loader: StepLoader, should_stop: Callable[[], bool]) -> bool:
        """评估的各批之前要算的；放弃时为假。集合操作。"""
        return True

    def evaluate(self, engine, loader: StepLoader, should_stop: Callable[[], bool], progress) -> dict | None:
        """各对的平均损失与各项，另有好的回答（有的话）每个 token 的 nll；放弃时为 None。在评估模式里调用，集合操作。"""
        from finetune.data.step_loader import batch_to_device

        self._sums = {}
        if not self.begin_evaluation(engine, loader, should_stop):
            return None
        for step in loader.epoch(0):
            if should_stop():
                return None
            for batch in step.micro_batches:
                answers = self.answers(engine, batch_to_device(batch, engine.device))
                losses, figures = self.measure(answers)
                is_good = slice(None) if answers.is_desirable is None else answers.is_desirable
                nll, lengths = -answers.log_probs[is_good, 0], answers.lengths[is_good, 0]
                self._add({"loss": losses, "nll": nll, "tokens": lengths, **figures})
            progress.update(step.num_items)
        sums, self._sums = _over_ranks(self._sums, engine.device), {}
        (total, _), (tokens, _) = sums.pop("nll"), sums.pop("tokens")
        means = {name: total / count for name, (total, count) in sums.items() if count}
        return {**means, "nll": total / tokens} if tokens else means


def _over_ranks(sums: dict[str, tuple[Tensor, int]], device) -> dict[str, tuple[float, int]]:
    """各项在全部进程上的 (和, 个数)。"""
    import torch
    import torch.distributed as dist

    merged = torch.stack([torch.stack([total, torch.full_like(total, count)]) for total, count in sums.values()])
    if dist.is_initialized():
        dist.all_reduce(merged)
    return {name: (total, int(count)) for name, (total, count) in zip(sums, merged.tolist(), strict=True)}
