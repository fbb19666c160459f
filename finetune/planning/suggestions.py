"""放得下的改法，以及都放不下时还能试的。"""

import os
from dataclasses import replace
from itertools import product
from pathlib import Path

from finetune.cli.train_flags import TrainOptions
from finetune.methods.registry import TRAIN_METHODS
from finetune.planning.activations import QUANTIZED_BYTES, PlannedModel
from finetune.planning.estimate import DataSample, Outcome, evaluate, fits, largest_micro_batch
from finetune.planning.machine import Machine
from finetune.planning.memory import SMALL_SHARE, setup_of
from finetune.process.precision import choose_precision
from finetune.training.ds_config import optimizer_flag_problems, read_ds_config

OFFLOAD_FILE, NO_OFFLOAD_FILE = "ds_zero3_offload.json", "ds_zero2_no_offload.json"


def suggestions(
    args: TrainOptions, ds_config: dict, model: PlannedModel, sample: DataSample, machine: Machine, cards: int
) -> list[tuple[str, Outcome]]:
    """放得下的改法：重算、micro batch、卸载、量化、优化器、加卡（没有 GPU 时减少进程）的各种组合。

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
    has_many = 2 * model.num_trained > SMALL_SHARE * model.num_total and choose_precision(args.precision)[0] == "bf16"
    optimizers = dict.fromkeys([args.optimizer, *(["adamw_bf16"] if has_many else [])])
    if on_cards:
        other_cards = [n for n in (2, 4, 8) if n > cards]
    else:
        one_host = cards <= int(os.environ.get("LOCAL_WORLD_SIZE") or 8)
        other_cards = [n for n in (1, 2, 4) if n < cards and cards % n == 0 and one_host]
    sizes = dict.fromkeys([batch_size, 1])
    choices = product([cards, *other_cards], ds_configs, checkpointings, sizes, quantizations, optimizers)
    for num_cards, ds_file, checkpointing, size, quantization, optimizer in choices:
        if quantization and stages[ds_file] == 3:
            continue
        given = args.given if optimizer == args.optimizer else (*args.given, "optimizer")
        if optimizer_flag_problems(ds_configs[ds_file], replace(args, optimizer=optimizer, given=given)):
            continue
        variant = replace(
            args,
            gradient_checkpointing=checkpointing,
            optimizer=optimizer,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation * (batch_size // size) * max(1, cards // num_cards),
        )
        more_accumulation = f" --gradient_accumulation_steps {variant.gradient_accumulation_steps}"
        if variant.gradient_accumulation_steps == accumulation:
            more_accumulation = ""
        processes = f"{num_cards} 张卡" if on_cards else f"LOCAL_SIZE={num_cards}（{num_cards} 个进程）"
        changes = [
            processes + more_accumulation * (size == batch_size) if num_cards != cards else "",
            f"--ds_file {ds_file}" if ds_file else "",
            f"--gradient_checkpointing {checkpointing}" if checkpointing != args.gradient_checkpointing else "",
            f"--load_in_{quantization}" if quantization else "",
            f"--optimizer {optimizer}" if optimizer != args.optimizer else "",
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


def last_resorts(args: TrainOptions, machine: Machine, outcome: Outcome) -> str:
    """suggestions 一个也没有时还能试的；已经在用的不提。"""
    ways = [*TRAIN_METHODS[args.train_type].smaller(args), "调小 --max_len"]
    if machine.device_bytes is not None and outcome.plan.device_bytes > machine.device_bytes:
        ways.append("换更大的卡")
    if outcome.plan.host_bytes > machine.host_bytes:
        ways.append("换内存更大的机器")
    return "；".join(ways)
