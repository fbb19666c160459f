"""由数据与模型推算：步数、最大的 micro batch、内存、时间。"""

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from finetune.cli.train_flags import TrainOptions
from finetune.data.encoding import SRC_CUT, TGT_CUT, encode_chunk
from finetune.data.mixture import data_name, parse_sources
from finetune.data.packing import deal_step, epoch_steps
from finetune.data.rows import Problem, ProblemList, RawRow, iter_rows
from finetune.data.samples import row_options
from finetune.planning.activations import MicroBatch, PlannedModel, checkpointed_layers
from finetune.planning.flops import forward_flops, recompute_flops, step_flops
from finetune.planning.machine import Machine
from finetune.planning.memory import GIB, Plan, Setup, choose_grad_accum_dtype, plan_memory, setup_of
from finetune.process.precision import choose_precision
from finetune.tasks.registry import TASKS
from finetune.training.options import total_steps

ROWS_SAMPLED = 4000
STEPS_SAMPLED = 100
# 假定的利用率（矩阵乘法速率的份额）：卡上，状态卸载到主机，CPU（对实测的速率）
UTILISATION = {"cuda": 0.40, "offload": 0.20, "cpu": 0.60}
CARD_SIZES = (16, 24, 40, 48, 80, 141)


class DataSample(NamedTuple):
    """抽样编码的数据。"""

    num_rows: int  # 文件的行数
    num_read: int  # 抽取并编码的行数
    lengths: list[int]
    num_targets: list[int]
    num_src_cut: int
    num_tgt_cut: int
    num_skipped: int
    max_len: int  # 一项（样本、块或对）至多多少 token

    @property
    def scale(self) -> float:
        """抽样之数乘它得到全部。"""
        return self.num_rows / self.num_read


class Outcome(NamedTuple):
    """一组参数的推算结果。"""

    plan: Plan
    setup: Setup
    batch: MicroBatch
    steps_per_epoch: int
    num_steps: int
    step_flops: float
    hours: float
    extra_passes: float = 0.0  # 另对全部数据作几遍前向：参考模型的


def sample_data(args: TrainOptions, tokenizer, prompting) -> DataSample:
    """从数据里均匀抽取至多 ROWS_SAMPLED 行（蓄水池抽样，次序固定）并编码；内存里只有抽到的行。

    Raises:
        ValueError: 抽到的行有错，或全部超长而被 --is_skip 丢弃。
    """
    generator, rows, count = random.Random(args.seed), [], 0
    for path, row in weighted_rows(args, generator):
        count += 1
        if len(rows) < ROWS_SAMPLED:
            rows.append((path, row))
        elif (place := generator.randrange(count)) < ROWS_SAMPLED:
            rows[place] = path, row
    options = {"max_len": args.max_len, "max_src_len": args.max_src_len, **prompting._asdict()}
    chunks = []
    row_settings = row_options(vars(args))
    for path in dict.fromkeys(path for path, _ in rows):
        own_rows = [row for other, row in rows if other == path]
        chunks.append(encode_chunk(own_rows, tokenizer, path, "train", options, row_settings))
        problems = ProblemList(path)
        problems.add(chunks[-1].problems)
        problems.raise_if_any()
    columns = {
        name: np.concatenate([np.zeros(0, dtype=int), *(chunk.arrays[name] for chunk in chunks)])
        for name in ("flags", "lengths", "num_targets", "src_lengths")
    }
    flags, lengths = columns["flags"], columns["lengths"]
    keep = np.ones(len(lengths), dtype=bool) if not args.is_skip else (flags & (SRC_CUT | TGT_CUT)) == 0
    if not keep.any():
        raise ValueError(f"数据文件 {data_name(args.train_path)} 里没有可用的样本（空的，或全部超长被 --is_skip 丢弃）")
    kept = SimpleNamespace(
        columns={name: column[keep] for name, column in columns.items()}, max_len=args.max_len, path=""
    )
    kept.lengths, kept.num_targets = kept.columns["lengths"], kept.columns["num_targets"]
    items = TASKS[args.task].group(kept)  # 一步所数的：样本、块或对
    return DataSample(
        num_rows=count,
        num_read=len(rows),
        lengths=items.lengths.tolist(),
        num_targets=items.num_targets.tolist(),
        num_src_cut=int((flags[keep] & SRC_CUT > 0).sum()) // TASKS[args.task].width,
        num_tgt_cut=int((flags[keep] & TGT_CUT > 0).sum()) // TASKS[args.task].width,
        num_skipped=int((~keep).sum()) // TASKS[args.task].width,
        max_len=items.max_len,
    )


def weighted_rows(args: TrainOptions, generator: random.Random) -> Iterator[tuple[str, RawRow | Problem]]:
    """训练数据的 (文件, 行)，各行按它的文件的份量出现，--val_ratio 的份额略去。"""
    for path, weight in parse_sources(args.train_path):
        whole, part = divmod(weight * (1 - (args.val_ratio or 0)), 1)
        for row in iter_rows(path, args.text_unit):
            for _ in range(int(whole) + (part > 0 and generator.random() < part)):
                yield path, row


def largest_micro_batch(args: TrainOptions, sample: DataSample, cards: int) -> tuple[MicroBatch, bool]:
    """真的排出头 STEPS_SAMPLED 步（与训练同样的次序与装箱）→ (最坏的 micro batch，是否有一步含几个)。

    最坏的一个由 token 最多的与目标最多的合成。
    """
    global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * cards
    copies = -(-global_batch // len(sample.lengths))
    lengths, targets = sample.lengths * copies, sample.num_targets * copies
    max_tokens = args.per_device_train_batch_size * sample.max_len
    num_steps = STEPS_SAMPLED if args.max_steps == -1 else min(STEPS_SAMPLED, args.max_steps)
    largest, most_targets, accumulates = [0], 0, False
    for indices in epoch_steps(len(lengths), global_batch, args.seed)[:num_steps]:
        dealt = deal_step(lengths, indices, cards, args.per_device_train_batch_size, max_tokens, args.packing)
        accumulates = accumulates or len(dealt[0]) > 1
        for micro in (micro for rank in dealt for micro in rank if micro):
            widths = [lengths[i] for i in micro]
            widths = widths if args.packing else [max(widths)] * len(widths)
            largest = max(largest, widths, key=sum)
            most_targets = max(most_targets, sum(targets[i] for i in micro))
    return MicroBatch(largest, most_targets, args.packing), accumulates


def evaluate(
    args: TrainOptions,
    ds_config: dict,
    model: PlannedModel,
    sample: DataSample,
    machine: Machine,
    cards: int,
    dealt: tuple[MicroBatch, bool] | None = None,
) -> Outcome:
    """推算一组参数；dealt 是 largest_micro_batch 的结果，缺省现算。"""
    cards_per_node = min(cards, int(os.environ.get("LOCAL_WORLD_SIZE") or 8))
    precision, _ = choose_precision(args.precision)
    grad_accum_dtype, _ = choose_grad_accum_dtype(args, ds_config, model, precision)
    setup = setup_of(ds_config, precision, cards, cards_per_node, machine.device, args.optimizer, grad_accum_dtype)
    batch, accumulates = dealt or largest_micro_batch(args, sample, cards)
    num_tokens = int(sum(sample.lengths) * sample.scale)
    plan = plan_memory(model, batch, setup, args.gradient_checkpointing, num_tokens, accumulates)
    if args.cache_frozen == "memory":
        plan.host["冻结底层的缓存"] = num_tokens * model.shape.hidden * setup.element_bytes
    global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * cards
    steps_per_epoch = -(-round(len(sample.lengths) * sample.scale) // global_batch)
    num_steps = total_steps(steps_per_epoch, args)
    trained_layers = len(model.layers) - model.first_trained_layer
    flops = step_flops(model.shape, sample.lengths, sum(sample.num_targets), args.train_type, trained_layers)
    flops += recompute_flops(
        model.shape,
        sample.lengths,
        len(checkpointed_layers(model, args.gradient_checkpointing)),
        args.gradient_checkpointing == "attention",
    )
    flops *= sample.scale / steps_per_epoch
    passes = TASKS[args.task].open(args).extra_passes(num_steps / steps_per_epoch)
    pass_flops = forward_flops(model.shape, sample.lengths, sum(sample.num_targets)) * sample.scale
    # 没有 GPU 时各进程分享同样的核
    rate = machine.rate * utilisation(setup) * (cards if machine.device == "cuda" else 1)
    hours = (num_steps * flops + passes * pass_flops) / rate / 3600
    return Outcome(plan, setup, batch, steps_per_epoch, num_steps, flops, hours, passes)


def utilisation(setup: Setup) -> float:
    """假定的利用率。"""
    is_offloaded = setup.offload_optimizer or setup.offload_param
    return UTILISATION["cpu" if setup.device == "cpu" else "offload" if is_offloaded else "cuda"]


def plan_on_cards(
    args: TrainOptions, ds_config: dict, model: PlannedModel, sample: DataSample, machine: Machine, cards: int
) -> Outcome:
    """没有 GPU 的机器上，同样的参数换成每个进程一张卡；--precision auto 按直接计算 bf16 的卡。"""
    variant = replace(args, precision="bf16" if args.precision == "auto" else args.precision)
    return evaluate(variant, ds_config, model, sample, machine._replace(device="cuda"), cards)


def cards_that_fit(plan: Plan) -> list[int]:
    """CARD_SIZES 里放得下的，GB；实际可用的略少于标称。"""
    return [card for card in CARD_SIZES if plan.device_bytes <= 0.97 * card * GIB]


def fits(outcome: Outcome, machine: Machine) -> bool:
    """放不放得下：显存与主机内存都够。"""
    device_fits = machine.device_bytes is None or outcome.plan.device_bytes <= machine.device_bytes
    return device_fits and outcome.plan.host_bytes <= machine.host_bytes
