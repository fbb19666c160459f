"""训练前后在通用文字上的 NLL 与离基座的 KL：调好的模型忘了多少。"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from finetune.data.packing import collate
from finetune.data.plain_text import general_pieces
from finetune.data.prompting import EncodedSample
from finetune.data.step_loader import batch_to_device
from finetune.terminal import watched
from finetune.training.evaluation import evaluating
from finetune.training.options import ForgettingOptions
from utils import global_rank, log_rank_0, raise_together, world_size, write_failed, write_json

FORGETTING_FILE = "forgetting.json"
# 一次前向的 token 数，一次化为概率的行数：限制 logits 所占的显存
FORWARD_TOKENS, ROWS_PER_CHUNK = 1024, 128


class Forgetting:
    """基座在通用文字上的分布（主机内存里，fp16），与训练之后的比较。

    建立时引擎里必须还是基座（适配器会暂时停用）。各进程分担各条文字，前向的次数相同。集合操作。

    Args:
        engine: DeepSpeed 引擎。
        pieces: general_text.general_pieces 的结果。
        threshold: NLL 上升多少（nat/token）算遗忘；None 为不判断。
    """

    def __init__(self, engine, pieces: Sequence[EncodedSample], pad_token_id: int, threshold: float | None):
        self.threshold, self.pad_token_id = threshold, pad_token_id
        longest_first = sorted(pieces, key=lambda piece: -len(piece.input_ids))
        size = max(1, FORWARD_TOKENS // len(longest_first[0].input_ids))
        batches = [longest_first[start : start + size] for start in range(0, len(longest_first), size)]
        batches += [[]] * (-len(batches) % world_size())  # 空的一批：ZeRO-3 要求各进程前向的次数相同
        self._batches = batches[global_rank() :: world_size()]
        self._base: list[Tensor] = []  # 各块 [行, V]，fp16 的对数概率
        total = torch.zeros(2, dtype=torch.float64)  # NLL 之和、目标数
        module = engine.module
        with module.disable_adapter() if isinstance(module, PeftModel) else nullcontext():
            for log_probs, targets in self._passes(engine):
                self._base.append(log_probs.half().cpu())
                total += torch.tensor([_nll_sum(log_probs, targets), len(targets)], dtype=torch.float64)
        total = _all_reduced(total, engine.device)
        self.num_tokens = int(total[1])
        self.nll_before = (total[0] / total[1]).item()
        log_rank_0(f"通用文字 {self.num_tokens} 个目标 token：基座的 NLL {self.nll_before:.4f}")

    def measure(self, engine) -> dict:
        """现在的 NLL 与 KL(基座‖现在)，nat/token；集合操作。返回 forgetting.json 的内容。"""
        total = torch.zeros(2, dtype=torch.float64)
        for base, (log_probs, targets) in zip(self._base, self._passes(engine), strict=True):
            # 归一化使 fp16 的舍入只在二阶上影响 KL，也不会得到负数
            base = base.to(engine.device).float().log_softmax(dim=-1)
            divergence = (base.exp() * (base - log_probs)).sum(dtype=torch.float64).item()
            total += torch.tensor([_nll_sum(log_probs, targets), divergence], dtype=torch.float64)
        nll_after, divergence = (_all_reduced(total, engine.device) / self.num_tokens).tolist()
        rise = nll_after - self.nll_before
        return {
            "general_nll_before": self.nll_before,
            "general_nll_after": nll_after,
            "kl": divergence,
            "tokens": self.num_tokens,
            "threshold": self.threshold,
            "is_forgetting": None if self.threshold is None else rise > self.threshold,
        }

    def report(self, engine, output_dir: Path):
        """measure() 的结果写进 output_dir/forgetting.json 并打印；集合操作。"""
        found = self.measure(engine)
        error = None
        try:
            if global_rank() == 0:
                write_json(output_dir / FORGETTING_FILE, found)
        except OSError as os_error:
            error = write_failed(os_error)
        raise_together(error)
        before, after = found["general_nll_before"], found["general_nll_after"]
        verdict = {
            None: "",
            True: f"；超过 --forgetting_threshold {self.threshold}：这次训练有遗忘，可试 --replay_path 或更小的学习率",
            False: f"；没有超过 --forgetting_threshold {self.threshold}",
        }[found["is_forgetting"]]
        log_rank_0(
            f"遗忘：通用文字的 NLL {before:.4f} → {after:.4f}（{after - before:+.4f}），"
            f"与基座的 KL {found['kl']:.4f} nat/token{verdict}"
        )

    def _passes(self, engine) -> Iterator[tuple[Tensor, Tensor]]:
        """逐块给出 (对数概率 [行, V] fp32, 目标 [行])；行的次序每次相同。"""
        with evaluating(engine):
            for pieces in watched(self._batches, "遗忘：通用文字", "批"):
                batch = batch_to_device(collate(pieces, self.pad_token_id, packing=False), engine.device)
                labels, rows = batch.pop("labels"), batch.pop("target_rows")
                logits = engine(**batch, use_cache=False).logits
                # P-Tuning 第 1 版的提示也占位置，在最前面
                logits = logits[:, -labels.shape[1] :].flatten(0, 1)
                for chunk in rows.split(ROWS_PER_CHUNK) if len(rows) else ():
                    yield logits[chunk].float().log_softmax(dim=-1), labels.flatten()[chunk + 1]


def _nll_sum(log_probs: Tensor, targets: Tensor) -> float:
    return -log_probs.gather(1, targets[:, None]).sum(dtype=torch.float64).item()


def _all_reduced(total: Tensor, device: torch.device) -> Tensor:
    total = total.to(device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.cpu()


def open_forgetting(options: ForgettingOptions, max_len: int, engine, tokenizer) -> Forgetting | None:
    """--general_path：记下基座在通用文字上的分布；没有要求时为 None。集合操作。"""
    if options.general_path is None:
        return None
    pieces = general_pieces(options.general_path, tokenizer, max_len, options.replay_path)
    return Forgetting(engine, pieces, tokenizer.pad_token_id, options.forgetting_threshold)
