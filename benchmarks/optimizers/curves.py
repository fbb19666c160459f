"""--optimizer 的几种与 fp32 的 AdamW 比：同样的数据与次序，微型基座全参数训练，几个种子的损失曲线；另数它们占的字节。

    python benchmarks/optimizers/curves.py --base 微型检查点 --output benchmarks/optimizers/results  # 约一小时
    python benchmarks/optimizers/curves.py --base 微型检查点 --output /tmp/curves --steps 20           # 小的形式

都经 train.py 的 build_engine 与 train_step，ds_zero2_no_offload.json，一个进程。每有一个结果就写一次 curves.json 与
curves.md，再次运行同样的命令接着做。判据：几个种子的平均与 fp32 AdamW 的之差，不超过 fp32 AdamW 的几个种子的最大与最小
之差。退出码 0 表示全在其内。
"""

import argparse
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from statistics import mean

import deepspeed
import torch

import train
from baichuan import BaichuanConfig, BaichuanForCausalLM
from benchmarks.speed.bench import machine
from benchmarks.speed.ours import single_process_environment
from benchmarks.speed.protocol import installed_versions
from finetune.cli.train_checks import validate_args
from finetune.cli.train_flags import parse_args
from finetune.data.prompting import resolve_prompt_format
from finetune.data.step_loader import StepLoader, batch_to_device
from finetune.process.interruption import leave
from finetune.tasks.token_loss import TokenLoss
from finetune.terminal import markdown_table
from utils import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
# 名字 → (--optimizer, --precision)；第一个是比的标准，末一个是 bf16 的计算自己带来的差
KINDS = {
    "adamw，fp32": ("adamw", "fp32"),
    "adamw_8bit，fp32": ("adamw_8bit", "fp32"),
    "adamw_bf16": ("adamw_bf16", "bf16"),
    "adamw，bf16": ("adamw", "bf16"),
}
SEEDS = (1, 2, 3)
LAST = 50  # 曲线末尾取这么多步的平均
FIGURES = {"last": f"末 {LAST} 步的训练损失", "held_out": "没有训练过的 100 行的 NLL"}


def counted_bytes(engine) -> dict[str, float]:
    """一步的反向之后、更新之前，可训练的权重、主权重、梯度、状态各占的字节，除以可训练的参数数；共用的存储只算一次。"""
    zero, seen = engine.optimizer, set()

    def size(tensors) -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
        new = {pointer: nbytes for pointer, nbytes in storages.items() if pointer not in seen}
        seen.update(new)
        return sum(new.values())

    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    masters = zero.single_partition_of_fp32_groups
    states = [zero.optimizer.state[master] for master in masters]
    found = {
        "权重": size(trained),
        "主权重": size(masters),
        "梯度": size(gradient for group in zero.averaged_gradients.values() for gradient in group),
        "状态": size(t for state in states for key, t in state.items() if torch.is_tensor(t) and "qmap" not in key),
    }
    count = sum(parameter.numel() for parameter in trained)
    return {name: nbytes / count for name, nbytes in found.items()}


def run(kind: str, seed: int, base: Path, steps: int) -> dict:
    """一次训练 → 损失曲线、没有训练过的行的 NLL、占的字节。"""
    optimizer, precision = KINDS[kind]
    with tempfile.TemporaryDirectory() as directory:
        flags = ["--train_path", ROOT / "data" / "spo_0.json", "--eval_path", ROOT / "data" / "spo_1.json"]
        flags += ["--model_name_or_path", base, "--output_dir", directory, "--train_type", "full", "--seed", seed]
        flags += ["--ds_file", ROOT / "ds_zero2_no_offload.json", "--optimizer", optimizer, "--precision", precision]
        flags += ["--max_len", 96, "--max_src_len", 64, "--learning_rate", 2e-3]
        args = parse_args([str(flag) for flag in flags])
        ds_config, config = validate_args(args)
        tokenizer = train.load_tokenizer(args.model_name_or_path, config.vocab_size)
        prompting = resolve_prompt_format(args.prompt_format, args.model_name_or_path, config)
        train_set, eval_set = train.load_data(args, tokenizer, prompting)
    engine, _ = train.build_engine(args, config, ds_config, precision, steps)
    shared = {"max_len": train_set.max_len, "pad_token_id": tokenizer.pad_token_id, "batch_size": 8}
    loader = StepLoader(train_set, seed=seed, **shared)
    losses = []
    while len(losses) < steps:
        for step in loader.epoch(len(losses) // loader.steps_per_epoch):
            losses.append(train.train_step(engine, step)[0])
            if len(losses) == steps:
                break
    held_out = StepLoader(eval_set, seed=None, gradient_accumulation_steps=-(-len(eval_set) // 8), **shared)
    [step] = held_out.epoch(0)
    engine.eval()
    with torch.no_grad():
        batches = [batch_to_device(batch, engine.device) for batch in step.micro_batches]
        found = sum(TokenLoss().loss(engine, batch, step).item() for batch in batches)
    engine.train()
    two = StepLoader(train_set, seed=seed, gradient_accumulation_steps=2, **shared)
    counted = count_after_backward(engine, two.prepare(range(16)))
    curve = [round(mean(losses[start : start + 10]), 5) for start in range(0, steps, 10)]  # 每 10 步的平均
    return {"curve": curve, "last": mean(losses[-LAST:]), "held_out": found, "bytes": counted}


def count_after_backward(engine, step) -> dict[str, float]:
    """再走一步的反向，数一数，不更新。"""
    for index, batch in enumerate(step.micro_batches):
        engine.set_gradient_accumulation_boundary(index == len(step.micro_batches) - 1)
        engine.backward(TokenLoss().loss(engine, batch_to_device(batch, engine.device), step), scale_wrt_gas=False)
    return counted_bytes(engine)


def report(result: dict) -> tuple[str, bool]:
    """Markdown，与是否全在种子的差之内。"""
    rows, good = [], True
    runs = {kind: [result["runs"].get(f"{kind} {seed}") for seed in SEEDS] for kind in KINDS}
    runs = {kind: found for kind, found in runs.items() if all(found)}
    reference = runs.get(next(iter(KINDS)))
    for kind, found in runs.items():
        row = [kind]
        for figure in FIGURES:
            values = [one[figure] for one in found]
            expected = [one[figure] for one in reference or found]
            spread, difference = max(expected) - min(expected), mean(values) - mean(expected)
            good = good and abs(difference) <= spread
            row += ["、".join(f"{value:.4f}" for value in values), f"{difference:+.4f}（许 {spread:.4f}）"]
        rows.append(row)
    header = ["优化器，精度", *(name for text in FIGURES.values() for name in (f"{text}，种子 1、2、3", "平均之差"))]
    sizes = [[kind, *(f"{size:.2f}" for size in found[0]["bytes"].values()),
              f"{sum(found[0]['bytes'].values()):.2f}"] for kind, found in runs.items()]  # fmt: skip
    lines = [
        "# 优化器：损失曲线与字节",
        f"由 `python benchmarks/optimizers/curves.py` 写成；{result['steps']} 步，全参数，"
        f"{result['parameters']:,} 个参数，每步 8 行，{result['machine']['cpu']}，{result['commit']}，"
        f"torch {result['versions']['torch']}，"
        f"deepspeed {result['versions']['deepspeed']}，bitsandbytes {result['versions']['bitsandbytes']}。",
        markdown_table(header, rows),
        "「许」是 fp32 AdamW 的三个种子的最大与最小之差；种子定数据的次序。",
        "每个可训练的参数的字节，数真的存储：两个 micro batch 的反向之后、更新之前，ZeRO-2，一个进程"
        "（不含更新时的临时量：adamw 在 bf16 时另要拼接的 2 与 fp32 梯度 4）。",
        markdown_table(["优化器，精度", "权重", "主权重", "梯度", "状态", "合计"], sizes),
    ]
    return "\n\n".join(lines) + "\n", good


def described(args: argparse.Namespace) -> dict:
    """这一份结果是在哪里、由哪一份代码量的。"""
    with torch.device("meta"):
        model = BaichuanForCausalLM(BaichuanConfig.from_pretrained(args.base))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return {
        "steps": args.steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "machine": machine(),
        "commit": commit.stdout.strip(),
        "versions": installed_versions("torch", "deepspeed", "transformers", "bitsandbytes"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="微型检查点的目录")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    single_process_environment()
    deepspeed.init_distributed()
    path = args.output / "curves.json"
    result = read_json(path) if path.is_file() else {"runs": {}}
    if not result["runs"]:
        result |= described(args)
    good = False
    for kind, seed in product(KINDS, SEEDS):
        if f"{kind} {seed}" not in result["runs"]:
            result["runs"][f"{kind} {seed}"] = run(kind, seed, args.base, args.steps)
            args.output.mkdir(parents=True, exist_ok=True)
            write_json(path, result)
        text, good = report(result)
        (args.output / "curves.md").write_text(text, encoding="utf-8")
        print(f"{kind} {seed}: {result['runs'][f'{kind} {seed}']['last']:.4f}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    leave(main())
