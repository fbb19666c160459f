"""train.py --dry_run：不读权重、不训练，推算步数、显存、主机内存、检查点与时间，与本机比较，列出放得下的改法。

CUDA_VISIBLE_DEVICES=0,1 deepspeed train.py --dry_run …     # 与训练同样的参数；卡数取自启动器
WORLD_SIZE=8 python train.py --dry_run …                    # 没有卡的机器上，按 8 个进程推算
"""

import os
import random
from argparse import Namespace
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from activation_plan import QUANTIZED_BYTES, MicroBatch, PlannedModel, checkpointed_layers, plan_model
from baichuan import BaichuanConfig
from batching import deal_step, epoch_steps
from data_set import encode_chunk
from finetune.data.mixture import parse_sources
from finetune.data.rows import Problem, ProblemList, RawRow, iter_rows
from finetune.data.samples import row_options
from flops import gemm_rate, nominal_rate, recompute_flops, step_flops
from memory_plan import GIB, Plan, Setup, checkpoint_bytes, plan_memory, setup_of
from model_factory import load_tokenizer
from prompting import resolve_prompt_format
from utils import choose_precision, global_rank, log_rank_0, read_ds_config

ROWS_SAMPLED = 4000
STEPS_SAMPLED = 100
# 假定的利用率（矩阵乘法速率的份额）：卡上，状态卸载到主机，CPU（对实测的速率）
UTILISATION = {"cuda": 0.40, "offload": 0.20, "cpu": 0.60}
FP32_SLOWDOWN = 16  # GPU 上 fp32 比 16 位慢的倍数，按标称
OFFLOAD_FILE, NO_OFFLOAD_FILE = "ds_zero3_offload.json", "ds_zero2_no_offload.json"
CARD_SIZES = (16, 24, 40, 48, 80, 141)
EXIT_FITS, EXIT_TOO_LARGE = 0, 1


class DataSample(NamedTuple):
    """抽样编码的数据。"""

    num_rows: int  # 文件的行数
    num_read: int  # 抽取并编码的行数
    lengths: list[int]
    num_targets: list[int]
    num_src_cut: int
    num_tgt_cut: int
    num_skipped: int

    @property
    def scale(self) -> float:
        """抽样之数乘它得到全部。"""
        return self.num_rows / self.num_read


class Machine(NamedTuple):
    """本机：设备、每张卡的显存（没有 GPU 为 None）、主机内存、矩阵乘法的速率。"""

    device: str
    name: str
    device_bytes: int | None
    host_bytes: int
    rate: float
    rate_source: str


class Outcome(NamedTuple):
    """一组参数的推算结果。"""

    plan: Plan
    setup: Setup
    batch: MicroBatch
    steps_per_epoch: int
    num_steps: int
    step_flops: float
    hours: float


def sample_data(args: Namespace, tokenizer, prompting) -> DataSample:
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
    for path in dict.fromkeys(path for path, _ in rows):
        own_rows = [row for other, row in rows if other == path]
        chunks.append(encode_chunk(own_rows, tokenizer, path, "train", options, row_options(vars(args))))
        problems = ProblemList(path)
        problems.add(chunks[-1].problems)
        problems.raise_if_any()
    arrays = {
        name: np.concatenate([chunk.arrays[name] for chunk in chunks]) if chunks else np.zeros(0, dtype=int)
        for name in ("flags", "lengths", "num_targets")
    }
    flags, lengths = arrays["flags"], arrays["lengths"]
    keep = np.ones(len(lengths), dtype=bool) if not args.is_skip else (flags & 3) == 0
    if not keep.any():
        raise ValueError(f"数据文件 {args.train_path} 里没有可用的样本（空的，或全部超长被 --is_skip 丢弃）")
    return DataSample(
        num_rows=count,
        num_read=len(rows),
        lengths=lengths[keep].tolist(),
        num_targets=arrays["num_targets"][keep].tolist(),
        num_src_cut=int((flags[keep] & 1 > 0).sum()),
        num_tgt_cut=int((flags[keep] & 2 > 0).sum()),
        num_skipped=int((~keep).sum()),
    )


def weighted_rows(args: Namespace, generator: random.Random) -> Iterator[tuple[str, RawRow | Problem]]:
    """训练数据的 (文件, 行)，各行按它的文件的份量出现，--val_ratio 的份额略去。"""
    for path, weight in parse_sources(args.train_path):
        whole, part = divmod(weight * (1 - (getattr(args, "val_ratio", None) or 0)), 1)
        for row in iter_rows(path):
            for _ in range(int(whole) + (part > 0 and generator.random() < part)):
                yield path, row


def find_machine(model: PlannedModel, precision: str) -> Machine:
    """看看本机有什么；没有 GPU 时量一下 CPU 的矩阵乘法。"""
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # 容器的上限
    if limit.is_file() and limit.read_text().strip().isdecimal():
        host_bytes = min(host_bytes, int(limit.read_text()))
    if not torch.cuda.is_available():
        rate = gemm_rate(model.shape._replace(hidden=1024, intermediate=1024), 256, precision, seconds=0.5)
        return Machine("cpu", "CPU", None, host_bytes, rate, "刚刚量得的矩阵乘法")
    found = torch.cuda.get_device_properties(0)
    rate = nominal_rate(found.name)
    if rate is None:
        return Machine(
            "cuda",
            found.name,
            found.total_memory,
            host_bytes,
            gemm_rate(model.shape, 4096, precision, "cuda"),
            "刚刚量得的矩阵乘法",
        )
    rate = rate / FP32_SLOWDOWN if precision == "fp32" else rate
    return Machine("cuda", found.name, found.total_memory, host_bytes, rate, "标称")


def largest_micro_batch(args: Namespace, sample: DataSample, cards: int) -> tuple[MicroBatch, bool]:
    """真的排出头 STEPS_SAMPLED 步（与训练同样的次序与装箱）→ (最坏的 micro batch，是否有一步含几个)。

    最坏的一个由 token 最多的与目标最多的合成。
    """
    global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * cards
    copies = -(-global_batch // len(sample.lengths))
    lengths, targets = sample.lengths * copies, sample.num_targets * copies
    max_tokens = args.per_device_train_batch_size * args.max_len
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
    args: Namespace,
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
    setup = setup_of(ds_config, precision, cards, cards_per_node, machine.device)
    batch, accumulates = dealt or largest_micro_batch(args, sample, cards)
    num_tokens = int(sum(sample.lengths) * sample.scale)
    plan = plan_memory(model, batch, setup, args.gradient_checkpointing, num_tokens, accumulates)
    if args.cache_frozen == "memory":
        plan.host["冻结底层的缓存"] = num_tokens * model.shape.hidden * setup.element_bytes
    global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * cards
    steps_per_epoch = -(-round(len(sample.lengths) * sample.scale) // global_batch)
    num_steps = steps_per_epoch * args.num_train_epochs
    num_steps = num_steps if args.max_steps == -1 else min(num_steps, args.max_steps)
    trained_layers = len(model.layers) - model.first_trained_layer
    flops = step_flops(model.shape, sample.lengths, sum(sample.num_targets), args.train_type, trained_layers)
    flops += recompute_flops(
        model.shape,
        sample.lengths,
        len(checkpointed_layers(model, args.gradient_checkpointing)),
        args.gradient_checkpointing == "attention",
    )
    flops *= sample.scale / steps_per_epoch
    # 没有 GPU 时各进程分享同样的核
    rate = machine.rate * utilisation(setup) * (cards if machine.device == "cuda" else 1)
    return Outcome(plan, setup, batch, steps_per_epoch, num_steps, flops, num_steps * flops / rate / 3600)


def utilisation(setup: Setup) -> float:
    """假定的利用率。"""
    is_offloaded = setup.offload_optimizer or setup.offload_param
    return UTILISATION["cpu" if setup.device == "cpu" else "offload" if is_offloaded else "cuda"]


def plan_on_cards(
    args: Namespace, ds_config: dict, model: PlannedModel, sample: DataSample, machine: Machine, cards: int
) -> Outcome:
    """没有 GPU 的机器上，同样的参数换成每个进程一张卡；--precision auto 按直接计算 bf16 的卡。"""
    variant = Namespace(**{**vars(args), "precision": "bf16" if args.precision == "auto" else args.precision})
    return evaluate(variant, ds_config, model, sample, machine._replace(device="cuda"), cards)


def cards_that_fit(plan: Plan) -> list[int]:
    """CARD_SIZES 里放得下的，GB；实际可用的略少于标称。"""
    return [card for card in CARD_SIZES if plan.device_bytes <= 0.97 * card * GIB]


def fits(outcome: Outcome, machine: Machine) -> bool:
    """放不放得下：显存与主机内存都够。"""
    device_fits = machine.device_bytes is None or outcome.plan.device_bytes <= machine.device_bytes
    return device_fits and outcome.plan.host_bytes <= machine.host_bytes


# ---------------------------------------------------------------------------------------------------------------------
# 改法


def suggestions(
    args: Namespace, ds_config: dict, model: PlannedModel, sample: DataSample, machine: Machine, cards: int
) -> list[tuple[str, Outcome]]:
    """放得下的改法：重算、micro batch、卸载、量化、加卡（没有 GPU 时减少进程）的各种组合。

    卡数少的、改得少的、快的在前；没有 GPU 时进程数不算代价。减少进程时由累积保持一步的样本数。
    """
    batch_size, accumulation, found = args.per_device_train_batch_size, args.gradient_accumulation_steps, []
    on_cards = machine.device == "cuda"
    ds_configs = {"": ds_config}
    current = setup_of(ds_config, "bf16", 1, 1, "cuda")
    can_quantize = args.train_type == "lora" and model.quantized_bytes is None
    if not current.offload_param and model.quantized_bytes is None and Path(OFFLOAD_FILE).is_file():
        ds_configs[OFFLOAD_FILE] = read_ds_config(OFFLOAD_FILE)  # 量化的权重不能切分
    if current.stage == 3 and can_quantize and Path(NO_OFFLOAD_FILE).is_file():
        ds_configs[NO_OFFLOAD_FILE] = read_ds_config(NO_OFFLOAD_FILE)
    stages = {name: setup_of(config, "bf16", 1, 1, "cuda").stage for name, config in ds_configs.items()}
    dealt = {}  # 装箱只随卡数与 micro batch 变
    checkpointings = dict.fromkeys([args.gradient_checkpointing, "none", "attention", "2", "all"])
    quantizations = ["", *QUANTIZED_BYTES] if can_quantize else [""]
    if on_cards:
        other_cards = [n for n in (2, 4, 8) if n > cards]
    else:
        one_host = cards <= int(os.environ.get("LOCAL_WORLD_SIZE") or 8)
        other_cards = [n for n in (1, 2, 4) if n < cards and cards % n == 0 and one_host]
    choices = product([cards, *other_cards], ds_configs, checkpointings, dict.fromkeys([batch_size, 1]), quantizations)
    for num_cards, ds_file, checkpointing, size, quantization in choices:
        if quantization and stages[ds_file] == 3:
            continue
        variant = Namespace(**{**vars(args), "gradient_checkpointing": checkpointing})
        variant.per_device_train_batch_size = size
        variant.gradient_accumulation_steps = accumulation * (batch_size // size) * max(1, cards // num_cards)
        more_accumulation = f" --gradient_accumulation_steps {variant.gradient_accumulation_steps}"
        if variant.gradient_accumulation_steps == accumulation:
            more_accumulation = ""
        processes = f"{num_cards} 张卡" if on_cards else f"LOCAL_SIZE={num_cards}（{num_cards} 个进程）"
        changes = [
            processes + more_accumulation * (size == batch_size) if num_cards != cards else "",
            f"--ds_file {ds_file}" if ds_file else "",
            f"--gradient_checkpointing {checkpointing}" if checkpointing != args.gradient_checkpointing else "",
            f"--load_in_{quantization}" if quantization else "",
            f"--per_device_train_batch_size {size}{more_accumulation}" if size != batch_size else "",
        ]
        changes = [change for change in changes if change]
        if (num_cards, size) not in dealt:
            dealt[num_cards, size] = largest_micro_batch(variant, sample, num_cards)
        planned = model._replace(quantized_bytes=QUANTIZED_BYTES[quantization]) if quantization else model
        outcome = evaluate(variant, ds_configs[ds_file], planned, sample, machine, num_cards, dealt[num_cards, size])
        if changes and fits(outcome, machine):
            found.append((num_cards if on_cards else 0, len(changes), outcome.hours, "，".join(changes), outcome))
    found.sort(key=lambda item: item[:4])
    return [(label, outcome) for *_, label, outcome in found]


def last_resorts(args: Namespace, machine: Machine, outcome: Outcome) -> str:
    """suggestions 一个也没有时还能试的；已经在用的不提。"""
    ways = {"full": ["换 --train_type lora 或 freeze"], "freeze": ["少选几层或换 --train_type lora"]}.get(
        args.train_type, []
    )
    ways += ["去掉 --prefix_projection"] if args.train_type == "ptuning" and args.prefix_projection else []
    ways.append("调小 --max_len")
    if machine.device_bytes is not None and outcome.plan.device_bytes > machine.device_bytes:
        ways.append("换更大的卡")
    if outcome.plan.host_bytes > machine.host_bytes:
        ways.append("换内存更大的机器")
    return "；".join(ways)


# ---------------------------------------------------------------------------------------------------------------------
# 报告


def dry_run(args: Namespace, ds_config: dict, config: BaichuanConfig) -> int:
    """打印推算；返回退出码：0 放得下，1 放不下。只有 0 号进程做事。

    Raises:
        ValueError: 分词器或数据有错，或 DeepSpeed 的配置不是 ZeRO-2、ZeRO-3。
    """
    if global_rank() != 0:
        return EXIT_FITS
    tokenizer = load_tokenizer(args.model_name_or_path, args.mode, config.vocab_size)
    prompting = resolve_prompt_format(args.prompt_format, args.model_name_or_path, config)
    sample = sample_data(args, tokenizer, prompting)
    model = plan_model(args, config)
    machine = find_machine(model, choose_precision(args.precision)[0])
    cards = int(os.environ.get("WORLD_SIZE") or 1)
    outcome = evaluate(args, ds_config, model, sample, machine, cards)
    is_fitting = fits(outcome, machine)
    on_cards = machine.device == "cuda"
    on_other = None if on_cards else plan_on_cards(args, ds_config, model, sample, machine, cards)
    log_rank_0("\n".join(describe(args, model, sample, machine, outcome, on_other)))
    found = suggestions(args, ds_config, model, sample, machine, cards)
    # 没有 GPU 时只说本机，换成卡的话见「若每个进程一张卡」一行
    place, order = ("", "卡少的、改得少的、快的") if on_cards else ("本机（没有 GPU）", "改得少的、快的")
    if is_fitting:
        faster = [
            (label, better)  # 量化会改变结果，放得下就不提
            for label, better in found
            if better.setup.cards == cards and better.hours < 0.97 * outcome.hours and "--load_in" not in label
        ]
        log_rank_0(f"结论：{place}放得下" + ("；还可以更快：" if faster else ""))
        found = faster[:3]
    elif found:
        log_rank_0(f"结论：{place}放不下。下面的改法放得下（{order}在前）：")
    else:
        log_rank_0(f"结论：{place}放不下，能推算的改法都不够。还可以试：{last_resorts(args, machine, outcome)}")
    where = "每张卡" if on_cards else "每个进程"
    for number, (label, better) in enumerate(found[:6], start=1):
        log_rank_0(
            f"  {number}. {label}：{where} {gib(better.plan.device_bytes)}，主机 {gib(better.plan.host_bytes)}，"
            f"{duration(better.hours)}"
        )
    return EXIT_FITS if is_fitting else EXIT_TOO_LARGE


def describe(
    args: Namespace,
    model: PlannedModel,
    sample: DataSample,
    machine: Machine,
    outcome: Outcome,
    on_other: Outcome | None = None,
) -> list[str]:
    """推算的正文，一行一项；on_other 是没有 GPU 时 plan_on_cards 的结果。"""
    plan, setup, batch = outcome.plan, outcome.setup, outcome.batch
    read = "全部读了" if sample.num_read == sample.num_rows else f"均匀抽取 {sample.num_read} 行"
    num_tokens, num_targets = sum(sample.lengths) * sample.scale, sum(sample.num_targets) * sample.scale
    where = "每张卡" if machine.device == "cuda" else "每个进程（没有 GPU，都在主机内存里）"
    offload = "，卸载到主机" if setup.offload_optimizer or setup.offload_param else ""
    size = checkpoint_bytes(model, setup.element_bytes, args.save_trainer_state)
    lines = [
        "推算（--dry_run）：没有读权重，也不训练",
        f"数据：{args.train_path} {sample.num_rows} 行（{read}），约 {num_tokens:,.0f} token，目标占 "
        f"{num_targets / num_tokens:.1%}；截断 src {sample.num_src_cut * sample.scale:.0f} 条、"
        f"tgt {sample.num_tgt_cut * sample.scale:.0f} 条，超长丢弃 {sample.num_skipped * sample.scale:.0f} 条",
        f"步数：每轮 {outcome.steps_per_epoch}，共 {outcome.num_steps}；最大的 micro batch {sum(batch.lengths)} token"
        f"（上限 {args.per_device_train_batch_size * args.max_len}），其中目标 {batch.num_targets}",
        f"模型：{model.num_total:,} 个参数，可训练 {model.num_trained:,}；{args.train_type}，{setup.precision}，"
        f"ZeRO-{setup.stage}{offload}，{setup.cards} 个进程，--gradient_checkpointing {args.gradient_checkpointing}",
        f"{where}的峰值：{gib(plan.device_bytes)}",
        *(f"    {name} {gib(number)}" for name, number in plan.device.items()),
        f"每台主机的峰值：{gib(plan.host_bytes)}",
        *(f"    {name} {gib(number)}" for name, number in plan.host.items()),
        f"检查点：每个 {gib(size)}" + ("（含训练状态）" if args.save_trainer_state else "（只有模型）"),
        f"计算：每步 {outcome.step_flops / 1e12:.3g} TFLOP；按 {machine.name} {machine.rate / 1e12:.3g} TFLOP/s"
        f"（{machine.rate_source}）、利用率 {utilisation(setup):.0%}（假定），全部{duration(outcome.hours)}",
    ]
    if machine.device_bytes is not None:
        lines.append(f"本机：{machine.name}，显存 {gib(machine.device_bytes)}，主机内存 {gib(machine.host_bytes)}")
    else:
        lines.append(f"本机：没有 GPU，主机内存 {gib(machine.host_bytes)}")
    if on_other is not None:
        sizes = "、".join(f"{card} GB" for card in cards_that_fit(on_other.plan))
        lines.append(
            f"若每个进程一张卡（{on_other.setup.precision}）：每张卡的峰值 {gib(on_other.plan.device_bytes)}，"
            + (f"放得进 {sizes}" if sizes else f"一张卡都放不进（到 {CARD_SIZES[-1]} GB）")
        )
    return lines


def gib(number: float) -> str:
    """字节数写成 GiB；不到 0.1 GiB 的写成 MiB。"""
    if number < 0.1 * GIB:
        return f"{number / 2**20:.3g} MiB"
    return f"{number / GIB:.2f} GiB" if number < 100 * GIB else f"{number / GIB:.0f} GiB"


def duration(hours: float) -> str:
    """小时写成人读的时间。"""
    if hours * 3600 < 1:
        return "不到 1 秒"
    return "约 " + (
        f"{hours:.1f} 小时" if hours >= 1 else f"{hours * 60:.1f} 分钟" if hours * 60 >= 1 else f"{hours * 3600:.0f} 秒"
    )
