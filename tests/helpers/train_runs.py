"""train.py 的测试共用：小数据、参数、各方法的结构、读回检查点。"""

import json
from pathlib import Path

import torch
from paths import ROOT
from peft import PeftModel
from train_worker import PROBE_IDS, PROBE_MASK
from transformers import AutoModelForCausalLM

WORKER = ROOT / "tests" / "helpers" / "train_worker.py"
ZERO2, ZERO3 = ROOT / "ds_zero2_no_offload.json", ROOT / "ds_zero3_offload.json"
DS_FILES = {"zero2": ZERO2, "zero3": ZERO3}
SIZES = {"layers": 2, "hidden_size": 32, "heads": 4, "intermediate_size": 48}
RELATIVE = 1e-5
CLOCKS = ("tokens_per_second", "elapsed_seconds", "memory_mb")


def write_rows(path: Path, num_rows: int, start: int = 0) -> Path:
    """项目自己的数据里的若干行。"""
    lines = (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[start : start + num_rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def flags_of(*, rows: Path, model: Path, output: Path, ds: Path = ZERO2, **options) -> list[str]:
    """train.py 的参数；options 是其余的 --名字 值，True 只写名字。"""
    options = {"max_len": 96, "max_src_len": 64, "precision": "fp32", "show_loss_step": 1, **options}
    flags = ["--train_path", str(rows), "--model_name_or_path", str(model), "--output_dir", str(output)]
    flags += ["--ds_file", str(ds)]
    for name, value in options.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flags


def records_of(output: Path) -> list[dict]:
    """train_log.jsonl，去掉与时钟有关的几项。"""
    lines = (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in lines]


def checkpoints_in(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if path.is_dir() and "epoch-" in path.name)


def reload_logits(checkpoint: Path, base: Path) -> torch.Tensor:
    """用 transformers 或 peft 的 from_pretrained 原样读回，算与训练引擎相同的输入。"""
    if (checkpoint / "adapter_config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, checkpoint)
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(input_ids=PROBE_IDS, attention_mask=PROBE_MASK).logits


# (结构, 方法, 它的参数)：四种方法分在四种结构上
GRADIENT_ROWS = {
    "freeze": ("baichuan-13b", ["--freeze_module_name", "layers.1.,lm_head"]),
    "lora": ("baichuan2-7b", ["--lora_module_name", "all-linear", "--lora_dropout", "0"]),
    "ptuning": ("baichuan2-13b", ["--pre_seq_len", "5", "--prefix_projection", "--prefix_hidden_size", "24"]),
    "full": ("baichuan-7b", []),
}
