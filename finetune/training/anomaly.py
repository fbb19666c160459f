"""数值：每一步的损失与梯度范数是不是有限数，损失有没有突然变大；坏的一步在更新权重之前停下，并写下那一批数据。"""

import math
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finetune.data.packing import whole_samples
from finetune.data.prompting import IGNORE_INDEX
from finetune.data.step_loader import StepBatch
from finetune.training.options import spike_choice
from utils import global_rank, log_rank_0, raise_together, world_size, write_json

# output_dir 里放坏的一批数据的目录
BAD_STEPS = "bad_steps"
# fp16 的溢出：最近这么多步里超过几次、或连续几次算多
OVERFLOW_WINDOW, MANY_OVERFLOWS, MANY_IN_A_ROW = 100, 10, 10
# 损失的近来平均：前 50 步是算术平均，之后是 50 步的指数平均；前 10 步不判断
SPIKE_WINDOW, SPIKE_WARMUP = 50, 10
# 出现 NaN 与无穷时还能怎么办，随正在用的精度
OTHER_WAYS = {
    "fp16": "调小 --learning_rate，或换 --precision bf16 或 fp32",
    "bf16": "调小 --learning_rate，或换 --precision fp32",
    "fp32": "或调小 --learning_rate",
}


class OverflowCount:
    """fp16 的溢出次数；溢出的一步不更新权重，只调小损失缩放，头几步有几次是正常的。"""

    def __init__(self, state: dict | None = None):
        state = state or {"total": 0, "in_a_row": 0, "quiet": 0, "recent": []}
        self.total, self.in_a_row, self._quiet = state["total"], state["in_a_row"], state["quiet"]
        self._recent = deque(state["recent"], maxlen=OVERFLOW_WINDOW)

    def add(self, is_overflow: bool) -> bool:
        """记一步；多得该说一声时返回真，说过之后 100 步内不再说。"""
        self._recent.append(int(is_overflow))
        self.total += is_overflow
        self.in_a_row = self.in_a_row + 1 if is_overflow else 0
        self._quiet = max(0, self._quiet - 1)
        is_many = sum(self._recent) > MANY_OVERFLOWS or self.in_a_row >= MANY_IN_A_ROW
        if not is_overflow or not is_many or self._quiet:
            return False
        self._quiet = OVERFLOW_WINDOW
        return True

    def message(self) -> str:
        """给人看的一句话，带着办法。"""
        return (
            f"警告：fp16 的梯度最近 {len(self._recent)} 步里溢出 {sum(self._recent)} 次（连续 {self.in_a_row} 次，共 "
            f"{self.total} 次），这些步没有更新权重；请换 --precision bf16 或 fp32，或调小 --learning_rate"
        )

    def state(self) -> dict:
        """续训所需。"""
        return {
            "total": self.total,
            "in_a_row": self.in_a_row,
            "quiet": self._quiet,
            "recent": list(self._recent),
        }


class LossSpike:
    """--loss_spike_factor：损失超过近来平均的 factor 倍就是突然变大；factor 为 0 时不看。"""

    def __init__(self, factor: float, state: dict | None = None):
        self.factor = factor
        self.num_steps, self.mean = (state["num_steps"], state["mean"]) if state else (0, 0.0)

    def add(self, loss: float) -> bool:
        """记一步，返回它是否突然变大；变大的一步只按 factor 倍计入平均，免得盖住下一次。"""
        limit = self.factor * self.mean
        is_spike = self.factor > 0 and self.num_steps >= SPIKE_WARMUP and loss > limit
        self.num_steps += 1
        self.mean += ((limit if is_spike else loss) - self.mean) / min(self.num_steps, SPIKE_WINDOW)
        return is_spike

    def state(self) -> dict:
        """续训所需。"""
        return {"num_steps": self.num_steps, "mean": self.mean}


class NumberWatch:
    """照看一次训练的损失与梯度范数；所有进程得到同样的结论，一起停下。

    Args:
        output_dir: 坏的一批数据写在 output_dir/bad_steps/；None 为不写。
        tokenizer: 把那一批解码成文字。
        loss_spike_factor: 见 spike_choice。
        state: 续训时 state() 存下的；从头开始为 None。
    """

    def __init__(
        self, output_dir: Path | None = None, tokenizer=None, loss_spike_factor: str = "0", state: dict | None = None
    ):
        self.output_dir, self.tokenizer = output_dir, tokenizer
        factor, self.stops_at_spike = spike_choice(loss_spike_factor)
        state = state or {}
        self.spike = LossSpike(factor, state.get("spike"))
        self.overflows = OverflowCount(state.get("overflows"))

    def state(self) -> dict:
        """续训所需；各进程相同。"""
        return {"spike": self.spike.state(), "overflows": self.overflows.state()}

    def check_loss(self, micro_losses: list[Tensor], engine, step: StepBatch) -> float:
        """各进程平均后的这一步的损失；在更新之前调用。

        Raises:
            AgreedError: 损失为 NaN 或无穷，或突然变大而 --loss_spike_factor 要求停下；有步数、进程、数据行与办法。
        """
        step_loss = torch.zeros((), device=engine.device)
        for loss in micro_losses:
            step_loss += loss
        losses = [torch.zeros_like(step_loss) for _ in range(world_size())]
        dist.all_gather(losses, step_loss)
        losses = torch.stack(losses).tolist()
        bad_ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        number = engine.global_steps + 1
        if bad_ranks:
            is_here = global_rank() in bad_ranks
            value = losses[global_rank()]
            raise_together(self._not_finite("损失", value, number, engine, step, micro_losses) if is_here else None)
        mean = sum(losses) / len(losses)
        usual = self.spike.mean
        if self.spike.add(mean):
            what = (
                f"第 {number} 步的损失 {mean:.4f} 是近来平均 {usual:.4f} 的 {mean / usual:.2f} 倍"
                f"（--loss_spike_factor {self.spike.factor:g}）"
            )
            if self.stops_at_spike:
                told = self._write_batch("损失突然变大", mean, number, engine, step, micro_losses)
                raise_together(
                    RuntimeError(
                        f"{what}，没有更新权重；数据行：{rows_of(step)}。{told}请检查这些行，调小 --learning_rate"
                    )
                )
            log_rank_0(f"警告：{what}；0 号进程的数据行：{rows_of(step)}")
        return mean

    def check_grad_norm(self, engine, step: StepBatch, micro_losses: list[Tensor]) -> float:
        """这一步裁剪前的梯度范数；在 engine.step() 之后调用。

        DeepSpeed 在范数不是有限数时不更新；fp16 是正常的缩放调整，只计数，多了说一声，其他精度到此为止。

        Raises:
            AgreedError: bf16、fp32 的梯度范数为 NaN 或无穷。
        """
        norm = engine.get_global_grad_norm()
        norm = float("nan") if norm is None else float(norm)
        is_overflow = bool(getattr(engine.optimizer, "overflow", False))
        if engine.fp16_enabled():
            if self.overflows.add(is_overflow):
                log_rank_0(self.overflows.message())
        elif is_overflow:
            raise_together(self._not_finite("梯度范数", norm, engine.global_steps, engine, step, micro_losses))
        return norm

    def _not_finite(self, what: str, value: float, number: int, engine, step: StepBatch, micro_losses) -> RuntimeError:
        """一条说得清的错误：哪一步、哪些行、什么精度、怎么办；哪个进程由 raise_together 加在前面。"""
        told = self._write_batch(what, value, number, engine, step, micro_losses)
        return RuntimeError(
            f"第 {number} 步的{what}是 {value}，没有更新权重；"
            f"精度 {precision_of(engine)}，本进程的数据行：{rows_of(step)}。{told}"
            f"请检查这些行与基座权重，{OTHER_WAYS[precision_of(engine)]}"
        )

    def _write_batch(self, what: str, value: float, number: int, engine, step: StepBatch, micro_losses) -> str:
        """把本进程这一步的数据写进 bad_steps/，返回错误信息里的一句话；写不下也不掩盖原来的错误。"""
        if self.output_dir is None:
            return ""
        path = self.output_dir / BAD_STEPS / f"step-{number}-rank-{global_rank()}.json"
        content = {
            "step": number,
            "rank": global_rank(),
            "what": what,
            "value": finite_or_text(value),
            "precision": precision_of(engine),
            "micro_batches": describe_batch(step, [loss.item() for loss in micro_losses], self.tokenizer),
        }
        try:
            path.parent.mkdir(exist_ok=True)
            write_json(path, content)
        except OSError as error:
            return f"这一批数据没能写进 {path}（{error.strerror}）。"
        return f"这一批数据写在 {path}。"


def describe_batch(step: StepBatch, micro_losses: list[float], tokenizer) -> list[dict[str, Any]]:
    """一步的各 micro batch：损失（每个目标 token 的平均；偏好的是各行之和），各样本的行、token、标签与文字。"""
    rows = iter(f"{path}:{line}" for path, line in step.rows)
    described = []
    for batch, loss in zip(step.micro_batches, micro_losses, strict=True):
        ids, labels = whole_samples(batch, "input_ids"), whole_samples(batch, "labels")
        samples = [
            {
                "row": next(rows, None),  # 空的 micro batch 是一个 pad，没有行
                "input_ids": sample_ids.tolist(),
                "labels": sample_labels.tolist(),
                "text": None if tokenizer is None else tokenizer.decode(sample_ids.tolist()),
            }
            for sample_ids, sample_labels in zip(ids, labels, strict=True)
        ]
        num_targets = int((batch["labels"] != IGNORE_INDEX).sum())
        total = loss * step.num_items / world_size()
        mean = total if "sample_indices" in batch else total / max(1, num_targets)
        described.append({"loss": finite_or_text(mean), "num_targets": num_targets, "samples": samples})
    return described


def finite_or_text(value: float) -> float | str:
    """JSON 没有 NaN 与无穷：写成文字。"""
    return value if math.isfinite(value) else str(value)


def rows_of(step: StepBatch) -> str:
    """本进程这一步的数据行，至多 8 处。"""
    return "、".join(f"{path}:{line}" for path, line in step.rows[:8]) + ("……" if len(step.rows) > 8 else "")


def precision_of(engine) -> str:
    """引擎的计算精度。"""
    return "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
