"""训练中的评估：何时评、评什么、最好的是哪一步、何时停；不改动任何参数、随机状态与训练曲线。"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from finetune.checkpoint.output_dir import BEST_FILE
from finetune.data.options import DataOptions
from finetune.data.prompting import Prompting, encode_prompt
from finetune.data.samples import read_samples, row_options
from finetune.data.step_loader import StepLoader, batch_to_device
from finetune.inference.generation import generate_batch, make_generation_config, plan_batches
from finetune.metrics.registry import LOWER_IS_BETTER, METRICS
from finetune.process.random_state import random_state, set_random_state
from finetune.tasks.token_loss import TokenLoss
from finetune.terminal import long_job
from finetune.training.log import TrainLog
from finetune.training.options import EvaluationOptions
from utils import broadcast_from_rank_0, global_rank, log_rank_0, world_size, write_json


class Evaluation:
    """--eval_path 或 --val_ratio 的评估；两者都没有时 is_due() 总是假。

    Args:
        data_set: 评估的数据；没有则为 None。
        sha256: 它的文件的哈希；换了数据或指标，以前的分数不可比，从头算最好的。
        state: 续训时 state() 存下的；从头开始为 None。
        objective: 这一阶段怎样算损失。
    """

    def __init__(
        self,
        options: EvaluationOptions,
        data: DataOptions,
        data_set,
        tokenizer,
        prompting: Prompting,
        sha256: str | None,
        state: dict | None = None,
        objective: TokenLoss | None = None,
    ):
        self.options, self.data, self.objective = options, data, objective or TokenLoss()
        self.data_set, self.tokenizer = data_set, tokenizer
        self.rows = [] if data_set is None else spread(len(data_set), options.max_eval_samples)
        self.seconds = 0.0  # 至今评估用去的时间
        self._identity = [options.eval_metric, options.eval_max_new_tokens, sha256]
        self._identity += [options.max_eval_samples] if options.max_eval_samples else []
        state = state or {"identity": self._identity, "best": None, "num_worse": 0, "is_owed": False}
        is_same = state["identity"] == self._identity
        self.best: dict | None = state["best"] if is_same else None  # best.json 的内容
        self.num_worse: int = state["num_worse"] if is_same else 0  # 连续多少次评估没有更好
        self.is_owed: bool = state["is_owed"] and data_set is not None  # 一次评估被打断，还没有做
        self._prompts, self._references = [], []
        if data_set is not None and options.eval_metric not in ("nll", "loss"):
            how = row_options(vars(data))
            files = {path: read_samples(path, "predict", options=how) for path in dict.fromkeys(data_set.paths)}
            for index in self.rows:
                row = files[data_set.paths[index]][int(data_set.rows[index])]
                limits = {"max_src_len": data.max_src_len, **prompting._asdict()}
                self._prompts.append(encode_prompt(tokenizer, row.messages, **limits))
                self._references.append(row.references)

    def state(self) -> dict:
        """续训所需的一切，可写成 JSON。"""
        names = ("best", "num_worse", "is_owed")
        return {"identity": self._identity, **{name: getattr(self, name) for name in names}}

    def is_due(self, step: int, is_epoch_end: bool) -> bool:
        """第 step 步之后要不要评估：每轮结束、每 --eval_step 步、欠着的时候。"""
        is_eval_step = self.options.eval_step > 0 and step % self.options.eval_step == 0
        return self.data_set is not None and (is_epoch_end or is_eval_step or self.is_owed)

    @property
    def has_stopped(self) -> bool:
        """连续 --early_stopping_patience 次没有更好，该停了。"""
        return 0 < self.options.early_stopping_patience <= self.num_worse

    def run(self, engine, log: TrainLog, checkpoint: str, epoch: float, should_stop: Callable[[], bool]) -> bool:
        """评估一次，写进日志；返回是否比以往好：分数更好，或分数相同而 NLL 更低。集合操作。

        Args:
            checkpoint: 这一步的检查点的目录名；超过以往时它就是最好的。
            should_stop: 每批之前由所有进程调用，一致地为真时放弃：返回 False，记为欠着，续训时补上。
        """
        step, metric = engine.global_steps, self.options.eval_metric
        self.is_owed = True
        began = time.perf_counter()
        scores = self._scores(engine, should_stop)
        seconds = time.perf_counter() - began
        self.seconds += seconds
        if scores is None:
            log_rank_0(f"评估 {self.data_set.path}：被打断，续训时补上")
            return False
        self.is_owed = False
        log.write({"step": step, "epoch": epoch, **{f"eval/{name}": value for name, value in scores.items()}}, step)
        found = {"metric": metric, "score": scores[metric], "nll": scores.get("nll", math.inf)}
        is_better = self._is_better(found)
        if is_better:
            self.best, self.num_worse = {"checkpoint": checkpoint, "step": step, **found}, 0
        else:
            self.num_worse += 1
        self._print(step, scores, is_better, seconds)
        return is_better

    def _is_better(self, found: dict) -> bool:
        """found 有 score 与 nll；生成的指标常有相同的分数（训练之初都是 0），这时 NLL 低的好。"""
        if not math.isfinite(found["score"]):
            return False
        if self.best is None or found["score"] == self.best["score"]:
            return self.best is None or found["nll"] < self.best["nll"]
        return (found["score"] < self.best["score"]) is (self.options.eval_metric in {*LOWER_IS_BETTER, "loss"})

    def _print(self, step: int, scores: dict[str, float], is_better: bool, seconds: float):
        metric = self.options.eval_metric
        text = f"评估 {self.data_set.path}：步 {step}"
        text += f"，目标 token 的平均损失 {scores['nll']:.4f}" if "nll" in scores else ""
        text += "".join(f"，{name} {scores[name]:.4f}" for name in ("loss", "accuracy", "margin") if name in scores)
        if "perplexity" in scores:
            text += f"，困惑度 {scores['perplexity']:.2f}"
        if metric not in ("nll", "loss"):
            interval = f"[{scores[f'{metric}_ci_low']:.4f}, {scores[f'{metric}_ci_high']:.4f}]"
            text += f"，{metric} {scores[metric]:.4f}，95% 区间 {interval}"
        text += f"；{len(self.rows)} 行，{seconds:.1f} 秒"
        best = "" if self.best is None else f"（最好的是第 {self.best['step']} 步：{self.best['score']:.4f}）"
        log_rank_0(text + ("，至今最好" if is_better else best))
        if self.has_stopped:
            log_rank_0(f"连续 {self.num_worse} 次评估没有更好（--early_stopping_patience），到此为止")

    def _scores(self, engine, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """{指标: 分数}，总有 nll；生成的指标另有区间。放弃时为 None。"""
        metric, data, pad_token_id = self.options.eval_metric, self.data, self.tokenizer.pad_token_id
        batch_size = self.options.eval_batch_size
        if self.objective.with_samples:
            return self._preference_scores(engine, should_stop)
        nll = evaluate_nll(
            engine, self.data_set, batch_size, self.data_set.max_len, pad_token_id, data.packing, should_stop, self.rows
        )
        if nll is None or metric == "nll":
            return None if nll is None else self.objective.scores(nll)
        generated = generate_on_all_ranks(
            engine, self._prompts, self.options.eval_max_new_tokens, batch_size, should_stop
        )
        if generated is None:
            return None

        def measure() -> dict[str, float]:
            predictions = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in generated]
            found = METRICS[metric](predictions, self._references)
            names = {"score": "", "ci_low": "_ci_low", "ci_high": "_ci_high"}
            return {f"{metric}{suffix}": found[name] for name, suffix in names.items()}

        return {**self.objective.scores(nll), **broadcast_from_rank_0(measure)}

    def _preference_scores(self, engine, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """偏好各阶段的评估。"""
        data_set, rows = self.data_set, self.rows
        loader = StepLoader(
            data_set,
            batch_size=self.options.eval_batch_size,
            max_len=data_set.max_len,
            seed=None,
            pad_token_id=self.tokenizer.pad_token_id,
            packing=self.data.packing,
            with_samples=True,
            partners=self.objective.eval_partners,
            order=sorted(rows, key=lambda row: -int(data_set.lengths[row])),
            world_size=world_size(),
            rank=global_rank(),
        )
        with evaluating(engine), long_job("评估：偏好", len(rows), "行") as progress:
            return self.objective.evaluate(engine, loader, should_stop, progress)

    def write_best(self, output_dir: Path):
        """把最好的检查点写进 output_dir/best.json；它还没有（或不在这个目录）时没有这个文件。只在 0 号进程调用。"""
        path = output_dir / BEST_FILE
        if self.best is not None and (output_dir / self.best["checkpoint"]).is_dir():
            write_json(path, self.best)
        else:
            path.unlink(missing_ok=True)


def spread(num_rows: int, limit: int | None) -> list[int]:
    """均匀隔开的至多 limit 行（None 为全部）的下标，从小到大。"""
    num_kept = min(num_rows, limit or num_rows)
    return [index * num_rows // num_kept for index in range(num_kept)]


@contextmanager
def evaluating(engine):
    """在评估模式里做事，之后回到训练模式，并恢复随机状态。"""
    state = random_state()
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train()
        set_random_state(state)


def evaluate_nll(
    engine,
    dataset,
    batch_size: int,
    max_len: int,
    pad_token_id: int,
    packing: bool,
    should_stop: Callable[[], bool] = lambda: False,
    rows: Sequence[int] | None = None,
) -> float | None:
    """各目标 token 的平均负对数似然（nats）；行分给各进程，每行恰好算一次，长的先算。集合操作。

    Args:
        engine: DeepSpeed 引擎。
        dataset: BaichuanDataSet。
        should_stop: 见 Evaluation.run；放弃时返回 None。
        rows: 只算这些行；缺省全部。
        其余: 与训练相同。
    """
    rows = range(len(dataset)) if rows is None else rows
    loader = StepLoader(
        dataset,
        batch_size=batch_size,
        max_len=max_len,
        seed=None,
        pad_token_id=pad_token_id,
        packing=packing,
        order=sorted(rows, key=lambda row: -dataset.lengths[row]),
        world_size=world_size(),
        rank=global_rank(),
    )
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)  # 损失之和、目标数（各进程相同）
    with evaluating(engine), long_job("评估：损失", len(rows), "行") as progress:
        for step in loader.epoch(0):
            if should_stop():
                return None
            for batch in step.micro_batches:
                batch = batch_to_device(batch, engine.device)
                total[0] += engine(**batch, num_items_in_batch=1, use_cache=False, return_logits=False).loss
            total[1] += step.num_target_tokens
            progress.update(min(loader.global_batch_size, len(rows) - progress.done))
    loss_sum = total[:1].clone()
    if dist.is_initialized():
        dist.all_reduce(loss_sum)
    return (loss_sum[0] / total[1]).item()


def generate_on_all_ranks(
    engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[list[int]] | None:
    """全部提示词的贪心续写，次序与输入相同，各进程得到同样的结果；集合操作，放弃时返回 None。

    怎样成批与进程数无关，各批轮流分给各进程：每行恰好计一次，结果不随进程数而变。
    """
    config = make_generation_config(engine.module, max_new_tokens)
    synced_gpus = engine.zero_optimization_stage() == 3 and world_size() > 1
    batches = plan_batches(prompts, batch_size)
    mine: dict[int, list[int]] = {}
    with evaluating(engine), long_job("评估：生成", len(prompts), "行") as progress:
        for first in range(0, len(batches), world_size()):
            if should_stop():
                return None
            # 末尾不够分时重算最后一批，结果相同：ZeRO-3 要求各进程生成的次数与前向的次数都相同
            batch = batches[min(first + global_rank(), len(batches) - 1)]
            ids = generate_batch(engine.module, [prompts[i] for i in batch], config, synced_gpus=synced_gpus)
            mine |= dict(zip(batch, ids, strict=True))
            progress.update(sum(len(done) for done in batches[first : first + world_size()]))
    everyone: list[dict] = [mine]
    if dist.is_initialized():
        everyone = [{}] * world_size()
        dist.all_gather_object(everyone, mine)
    results = {index: ids for part in everyone for index, ids in part.items()}
    return [results[index] for index in range(len(prompts))]
