"""bench 里有哪些程序、怎样分组、要达到什么：只有表，没有动作。"""

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.speed.work import MAX_LEN, MAX_SRC_LEN, ROOT, SAMPLES_PER_STEP, data_path
from finetune.methods.registry import TRAIN_METHODS

PACK_LENGTH = 2048
TRAINED_LAYERS = 2
LEARNING_RATES = {name: method.learning_rate for name, method in TRAIN_METHODS.items()}
OTHER_PROGRAMS = ("hf", "trl", "lf")


@dataclass(frozen=True)
class Program:
    """一个程序的一种设置。options 的含义随 kind：ours 见 ours_spec，其余见 peers.py。"""

    name: str
    text: str
    kind: str  # ours、hf、trl、lf
    method: str = "lora"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def same_function(self) -> bool:
        """第一步的损失应与其他程序相同：样本相同、没有 dropout、没有随机的新参数。"""
        return self.method != "ptuning" and not self.options.get("dropout") and not self.is_uneven

    @property
    def is_uneven(self) -> bool:
        """各步的长度不同（按长度分组）：速度取总和之比，损失不与别的程序比。"""
        return self.options.get("work") == "group"


def ours(name: str, text: str, method: str = "lora", **options: Any) -> Program:
    return Program(name, text, "ours", method, options)


def peer(kind: str, name: str, text: str, method: str = "lora", **options: Any) -> Program:
    shared = {"layout": "padded", "batch_size": SAMPLES_PER_STEP, "accumulation": 1, "amp": True}
    return Program(name, text, kind, method, {**shared, **options})


ONE_BY_ONE = {"batch_size": 1, "accumulation": SAMPLES_PER_STEP}
ONE_PACK = {"layout": "packing", "batch_size": 1, "accumulation": 1}
ANCESTOR = {"argv": ["--gradient_checkpointing", "all"], "levers_off": ["graph_prefix"]}

LORA = [
    ours("ours", "本项目，DeepSpeed ZeRO-2"),
    ours("ours_no_sharing", "同上，共用的开头各算各的", levers_off=["shared_prefix"]),
    peer("hf", "hf_bs8", "transformers + peft，batch 8 补齐（缺省）"),
    peer("hf", "hf_bs1", "transformers + peft，batch 1 累积 8", **ONE_BY_ONE),
    peer("hf", "hf_bs1_pure", "同上，不用 autocast，适配器也用计算精度", **ONE_BY_ONE, amp=False),
    peer("hf", "hf_group", "transformers + peft，batch 8 按长度分组", work="group"),
    peer("hf", "hf_flat", "transformers + peft，免补齐（DataCollatorWithFlattening）", layout="flat", amp=False),
    peer("lf", "lf_bs8", "LLaMA-Factory，batch 8 补齐（缺省）"),
    peer("lf", "lf_bs1", "LLaMA-Factory，batch 1 累积 8", **ONE_BY_ONE),
    peer("lf", "lf_packing", "LLaMA-Factory，neat_packing 2048", **ONE_PACK),
    peer("trl", "trl_bs8", "TRL，batch 8 补齐（缺省）"),
    peer("trl", "trl_bs1", "TRL，batch 1 累积 8", **ONE_BY_ONE),
    peer("trl", "trl_packing", "TRL，packing bfd 2048", **ONE_PACK),
]
DROPOUT = [
    ours("ours", "本项目", dropout=0.1),
    peer("hf", "hf_bs8", "transformers + peft，batch 8 补齐", dropout=0.1),
    peer(
        "hf", "hf_bs1_pure", "transformers + peft，batch 1 累积 8，不用 autocast", **ONE_BY_ONE, amp=False, dropout=0.1
    ),
    peer("lf", "lf_bs8", "LLaMA-Factory，batch 8 补齐", dropout=0.1),
    peer("lf", "lf_packing", "LLaMA-Factory，neat_packing 2048", **ONE_PACK, dropout=0.1),
    peer("trl", "trl_packing", "TRL，packing bfd 2048", **ONE_PACK, dropout=0.1),
]
FREEZE = [
    ours("ours_freeze", "本项目，训练末 2 层", "freeze"),
    ours("ours_freeze_no_sharing", "同上，共用的开头各算各的", "freeze", levers_off=["shared_prefix"]),
    ours("ours_freeze_cache", "本项目，--cache_frozen memory，第二轮起", "freeze", argv=["--cache_frozen", "memory"]),
    ours("ours_freeze_graph", "本项目，底层也进计算图", "freeze", levers_off=["graph_prefix"]),
    ours("ours_freeze_ancestor", "本项目，各层都进计算图并重算（ChatGLM-Finetuning 的做法）", "freeze", **ANCESTOR),
    peer("hf", "hf_freeze_ancestor_bs8", "transformers，各层都进计算图并重算，batch 8", "freeze",
         checkpointing=True, input_grads=True),
    peer("hf", "hf_freeze_ancestor_bs1", "同上，batch 1 累积 8", "freeze", **ONE_BY_ONE, amp=False,
         checkpointing=True, input_grads=True),
    peer("hf", "hf_freeze_bs8", "transformers，batch 8 补齐", "freeze"),
    peer("hf", "hf_freeze_bs1", "transformers，batch 1 累积 8，不用 autocast", "freeze", **ONE_BY_ONE, amp=False),
    peer("hf", "hf_freeze_flat", "transformers，免补齐，不用 autocast", "freeze", layout="flat", amp=False),
    peer("lf", "lf_freeze_bs1", "LLaMA-Factory，batch 1 累积 8", "freeze", **ONE_BY_ONE),
]  # fmt: skip
FULL = [
    ours("ours_full", "本项目，DeepSpeed ZeRO-2", "full"),
    ours("ours_full_no_sharing", "同上，共用的开头各算各的", "full", levers_off=["shared_prefix"]),
    ours("ours_full_bare", "本项目，不用 DeepSpeed 的同一个循环", "full", engine="bare"),
    peer("hf", "hf_full_bs8", "transformers，batch 8 补齐（缺省）", "full"),
    peer("hf", "hf_full_bs1", "transformers，batch 1 累积 8，不用 autocast", "full", **ONE_BY_ONE, amp=False),
    peer("hf", "hf_full_flat", "transformers，免补齐，不用 autocast", "full", layout="flat", amp=False),
    peer("lf", "lf_full_bs8", "LLaMA-Factory，batch 8 补齐", "full"),
    peer("lf", "lf_full_bs1", "LLaMA-Factory，batch 1 累积 8", "full", **ONE_BY_ONE),
]
LEVERS = [
    ours("ours", "本项目"),
    ours("no_sharing", "共用的开头各算各的", levers_off=["shared_prefix"]),
    ours("no_packing", "关掉并排：batch 8 补齐", argv=["--no-packing"]),
    ours("no_packing_bs1", "关掉并排：batch 1 累积 8", argv=["--no-packing"], **ONE_BY_ONE),
    ours("all_rows", "最后一层与词表投影在每一行上算", levers_off=["label_rows"]),
    ours("dropout", "LoRA dropout 0.1", dropout=0.1),
    ours("bare_loop", "不用 DeepSpeed 的同一个循环", engine="bare"),
    ours("fp32", "计算精度 fp32", precision="fp32"),
    ours("checkpoint_all", "重算各层", argv=["--gradient_checkpointing", "all"]),
    ours("checkpoint_2", "隔层重算", argv=["--gradient_checkpointing", "2"]),
    ours("checkpoint_attention", "只重算注意力", argv=["--gradient_checkpointing", "attention"]),
]
METHODS = [
    ours("ours", "lora r8"),
    ours("ours_freeze", "freeze，训练末 2 层", "freeze"),
    ours("ours_full", "full", "full"),
    ours("ours_ptuning", "ptuning 第 2 版，16 个前缀", "ptuning"),
    ours("ours_ptuning_bare", "同上，不并排", "ptuning", argv=["--no-packing"]),
]
SPREAD = [
    ours("equal", "8 条等长（232）", work="equal"),
    ours("uneven", "一条 1016，七条 120", work="uneven"),
    ours("uneven_padded", "同上，不并排（补齐）", work="uneven", argv=["--no-packing"]),
]
ROWS = [
    ours("rows_500", "数据 500 行", rows=500),
    ours("rows_20000", "数据 20,000 行", rows=20000),
]
GROUPS = {
    "lora": LORA,
    "dropout": DROPOUT,
    "freeze": FREEZE,
    "full": FULL,
    "levers": LEVERS,
    "methods": METHODS,
    "spread": SPREAD,
    "rows": ROWS,
}


def old_program(stage: str, tree: Path) -> Program:
    """另一份代码（bench.py --old）的一个程序，设置同这一组的第一个。"""
    first = GROUPS[stage][0]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=tree, capture_output=True, text=True)
    return Program("old", f"本项目的另一份代码 {commit.stdout.strip()}", "ours", first.method, first.options)


# ---------------------------------------------------------------------------------------------------------------------
# 规格：交给工人的 JSON


def ours_spec(
    program: Program, layers: int, checkpoint: Path, work: dict[str, Path], precision: str, threads: int, scratch: Path
) -> dict[str, Any]:
    """本项目的规格：train.py 的命令行参数，加上没有命令行开关的几项；layers 是模型的层数。"""
    options = program.options
    argv = {
        "model_name_or_path": checkpoint,
        "train_path": work.get("data") or data_path(),
        "output_dir": scratch / f"out-{program.name}",
        "ds_file": ROOT / "ds_zero2_no_offload.json",
        "train_type": program.method,
        "precision": options.get("precision", precision),
        "max_len": MAX_LEN,
        "max_src_len": MAX_SRC_LEN,
        "per_device_train_batch_size": options.get("batch_size", SAMPLES_PER_STEP),
        "gradient_accumulation_steps": options.get("accumulation", 1),
        "learning_rate": LEARNING_RATES[program.method],
        "prompt_format": "plain",
    }
    if program.method == "lora":
        argv["lora_dropout"] = options.get("dropout", 0.0)
    if program.method == "freeze":
        argv["freeze_module_name"] = last_layers(layers)
    return {
        "kind": "ours" if "rows" not in options else "rows",
        "argv": [part for key, value in argv.items() for part in (f"--{key}", str(value))] + options.get("argv", []),
        "levers_off": options.get("levers_off", []),
        "engine": options.get("engine", "deepspeed"),
        "work": str(work[options.get("work", "real")]),
        "threads": threads,
    }


def last_layers(layers: int, count: int = TRAINED_LAYERS) -> str:
    """末尾 count 层的 --freeze_module_name。"""
    return ",".join(f"layers.{index}." for index in range(layers - count, layers))


def peer_spec(program: Program, model: Path, work: dict[str, Path], precision: str, threads: int) -> dict[str, Any]:
    """对方的规格，见 peers.py。"""
    return {
        "dropout": 0.0,
        "checkpointing": False,
        **program.options,
        "kind": program.kind,
        "method": program.method,
        "model": str(model),
        "work": str(work[program.options.get("work", "real")]),
        "precision": precision,
        "threads": threads,
        "learning_rate": LEARNING_RATES[program.method],
        "trained_layers": TRAINED_LAYERS,
        "pack_length": PACK_LENGTH,
    }


# ---------------------------------------------------------------------------------------------------------------------
# 要达到的


class Target(NamedTuple):
    """一条要求：quantity 的比值不低于 floor（与 goal）；against 有几个时取其中最大的。"""

    group: str
    vocab: int | None  # None 为任何词表
    precision: str | None
    text: str
    ours: str
    against: tuple[str, ...]
    floor: float
    goal: float


PEERS = tuple(program.name for program in LORA if program.kind in OTHER_PROGRAMS)
FREEZE_PEERS = ("hf_freeze_bs8", "hf_freeze_bs1", "hf_freeze_flat", "lf_freeze_bs1")
FULL_PEERS = tuple(program.name for program in FULL if program.kind in OTHER_PROGRAMS)
TARGETS = [
    Target("lora", 64000, "bf16", "transformers + peft 缺省", "ours", ("hf_bs8",), 3.5, 4.5),
    Target("lora", 64000, "bf16", "LLaMA-Factory 缺省", "ours", ("lf_bs8",), 3.0, 4.0),
    Target("lora", 8000, "bf16", "transformers + peft 缺省", "ours", ("hf_bs8",), 3.0, 4.0),
    Target("lora", 8000, "bf16", "LLaMA-Factory 缺省", "ours", ("lf_bs8",), 3.0, 4.0),
    Target("lora", 8000, "bf16", "TRL 缺省", "ours", ("trl_bs8",), 3.0, 4.0),
    Target("lora", 8000, "bf16", "对方的并排", "ours", ("lf_packing", "trl_packing"), 2.3, 2.8),
    Target("lora", None, "bf16", "任何对方最强的设置", "ours", PEERS, 1.5, 2.0),
    Target("lora", None, "bf16", "另一份代码", "ours", ("old",), 1.0, 1.5),
    Target("lora", None, "fp32", "另一份代码", "ours", ("old",), 1.0, 1.0),
    Target("lora", None, "fp32", "各家缺省（没有直接计算 bf16 的 CPU）", "ours", ("hf_bs8", "lf_bs8"), 2.0, 2.0),
    Target("lora", None, "fp32", "任何对方最强的设置（同上）", "ours", PEERS, 1.0, 1.0),
    Target("freeze", None, None, "自己按 ChatGLM-Finetuning 的做法", "ours_freeze",
           ("ours_freeze_ancestor",), 2.1, 2.1),
    Target("freeze", None, None, "transformers 按 ChatGLM-Finetuning 的做法", "ours_freeze",
           ("hf_freeze_ancestor_bs8", "hf_freeze_ancestor_bs1"), 2.8, 2.8),
    Target("freeze", None, None, "任何对方最强的设置", "ours_freeze", FREEZE_PEERS, 1.0, 1.0),
    Target("freeze", None, None, "另一份代码", "ours_freeze", ("old",), 1.0, 1.3),
    Target("full", None, None, "另一份代码", "ours_full", ("old",), 1.0, 1.3),
    Target("full", None, None, "transformers 缺省", "ours_full", ("hf_full_bs8",), 2.0, 2.0),
    Target("full", None, None, "任何对方最强的设置", "ours_full", FULL_PEERS, 1.3, 1.5),
    Target("full", None, None, "不用 DeepSpeed 的循环（份额 5% 以内）", "ours_full", ("ours_full_bare",), 0.0, 0.95),
    Target("levers", None, None, "不用 DeepSpeed 的循环（份额 5% 以内）", "ours", ("bare_loop",), 0.0, 0.95),
    Target("spread", None, None, "长短不一对等长（差 15% 以内）", "uneven", ("equal",), 0.85, 0.85),
    Target("rows", None, None, "20,000 行对 500 行（差 15% 以内）", "rows_20000", ("rows_500",), 0.85, 0.85),
]  # fmt: skip
