"""重放占多少：分类任务上，不同的 --replay_ratio 的分数与遗忘，连同旧的按条数混入。

    python benchmarks/comparison/replay_share.py --cls ../shared/data/cls_0.json \\
        --general ../shared/data/general_0.txt --work WORK --out benchmarks/comparison/results/replay_share

基座是一个在通用文字上预训练过的微型 Baichuan2；每一格从同一个基座走起，全参数训练一轮。
重放的文字、遗忘所用的文字都与预训练的不同行。
写 OUT.json（每格做完就写）与 OUT.md；做过的格子不重做。
"""

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# 名字 → 参数；rows 是 --replay_ratio 从前的意思
CELLS = {
    "不重放": [],
    "按条数 0.1": ["--replay_by", "rows", "--replay_ratio", "0.1"],
    **{f"{share}": ["--replay_ratio", share] for share in ("0.1", "0.3", "0.5", "0.8")},
}
MODEL = ["--layers", "4", "--hidden_size", "128", "--heads", "4", "--vocab_size", "4000"]
PRETRAIN = [
    "--task", "pretrain", "--train_type", "full", "--precision", "fp32", "--learning_rate", "2e-3", "--max_len", "256",
    "--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1",
    "--max_src_len", "128", "--no-save_trainer_state",
]  # fmt: skip
TRAIN_ROWS, TEST_ROWS = 1200, 400
TRAIN = [
    "--train_type", "full", "--precision", "fp32", "--learning_rate", "1e-3", "--num_train_epochs", "1",
    "--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1",
    "--max_len", "160", "--max_src_len", "140", "--eval_metric", "label_f1", "--eval_max_new_tokens", "6",
]  # fmt: skip


def run(command: list, log: Path, environment: dict):
    """运行一条命令，输出写进 log；失败时报出末尾。"""
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} 失败（{done.returncode}）：\n{log.read_text(encoding='utf-8')[-2000:]}")


def make_data(cls: Path, general: Path, work: Path):
    """任务的训练与测试行、通用文字的三份（预训练、重放、衡量遗忘），写在 work 里。"""
    rows = [json.loads(line) for line in cls.read_text(encoding="utf-8").splitlines()]
    random.Random(1).shuffle(rows)
    for name, part in (("train", rows[:TRAIN_ROWS]), ("test", rows[TRAIN_ROWS : TRAIN_ROWS + TEST_ROWS])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (work / f"{name}.json").write_text(text, encoding="utf-8")
    lines = [line for line in general.read_text(encoding="utf-8").splitlines() if len(line) > 20]
    random.Random(1).shuffle(lines)
    cuts = {"pretrain": lines[: len(lines) * 7 // 10], "held_out": lines[-len(lines) // 10 :]}
    cuts["replay"] = lines[len(cuts["pretrain"]) : len(lines) - len(cuts["held_out"])]
    for name, part in cuts.items():
        (work / f"{name}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")


def run_cell(name: str, seed: int, work: Path, environment: dict) -> dict:
    """一格：训练一轮，取回分数、遗忘与重放的份额。"""
    with tempfile.TemporaryDirectory(dir=work) as output:
        command = [
            sys.executable, "train.py", "--model_name_or_path", str(work / "base"), *TRAIN,
            "--train_path", str(work / "train.json"), "--eval_path", str(work / "test.json"),
            "--general_path", str(work / "held_out.txt"), "--seed", str(seed), "--output_dir", output,
            *CELLS[name],
        ]  # fmt: skip
        if CELLS[name]:
            command += ["--replay_path", str(work / "replay.txt")]
        log = work / "train.log"
        run(command, log, environment)
        text = log.read_text(encoding="utf-8")
        best = json.loads((Path(output) / "best.json").read_text(encoding="utf-8"))
        forgetting = json.loads((Path(output) / "forgetting.json").read_text(encoding="utf-8"))
        pieces = re.search(r"的 (\d+) 条混入 \d+ 条训练样本，占目标 token 的 ([0-9.]+)%", text)
        return {
            "cell": name, "seed": seed, "score": best["score"],
            "pieces": int(pieces[1]) if pieces else 0, "share": float(pieces[2]) / 100 if pieces else 0.0,
            **{key: forgetting[key] for key in ("general_nll_before", "general_nll_after", "kl")},
        }  # fmt: skip


def write_report(results: dict, out: Path):
    """OUT.json 与 OUT.md：各格在各种子上的均值与范围。"""
    out.with_suffix(".json").write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"# 重放的份额：分类任务\n\n{results['machine']}，提交 {results['commit']}；"
        f"各数是 {results['seeds']} 个种子的均值，括号里是最小与最大。\n",
        "| --replay_ratio | 重放的条数 | 占目标 token | 宏 F1 | 通用文字的 NLL 上升 | KL |",
        "|---|---|---|---|---|---|",
    ]
    for name in CELLS:
        cells = [cell for cell in results["cells"] if cell["cell"] == name]
        if not cells:
            continue

        def spread(values, digits=3):
            values = list(values)
            return f"{statistics.mean(values):.{digits}f}（{min(values):.{digits}f} 至 {max(values):.{digits}f}）"

        rises = [cell["general_nll_after"] - cell["general_nll_before"] for cell in cells]
        lines.append(
            f"| {name} | {cells[0]['pieces']} | {cells[0]['share']:.0%} | {spread(cell['score'] for cell in cells)} "
            f"| {spread(rises)} | {spread(cell['kl'] for cell in cells)} |"
        )
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    """造基座与数据，依次做各格。"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cls", type=Path, required=True, help="分类任务的行")
    parser.add_argument("--general", type=Path, required=True, help="通用文字，一行一段")
    parser.add_argument("--seeds", type=int, default=3, help="各格的种子数")
    parser.add_argument("--work", type=Path, required=True, help="基座与数据放在这里，可再用")
    parser.add_argument("--out", type=Path, required=True, help="结果的路径，不带后缀")
    args = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "base").exists():
        make_data(args.cls, args.general, args.work)
        untrained = args.work / "untrained"
        command = [
            sys.executable, "scripts/build_tiny_model.py", "--arch", "baichuan2-7b", *MODEL, "--output_dir",
            str(untrained), "--train_text", str(args.work / "pretrain.txt"), str(args.work / "train.json"),
        ]  # fmt: skip
        run(command, args.work / "base.log", environment)
        command = [
            sys.executable, "train.py", "--model_name_or_path", str(untrained), *PRETRAIN, "--output_dir",
            str(args.work / "pretraining"), "--train_path", str(args.work / "pretrain.txt"),
        ]  # fmt: skip
        run(command, args.work / "base.log", environment)
        (newest,) = (args.work / "pretraining").glob("epoch-*")
        newest.rename(args.work / "base")
    out = args.out.with_suffix(".json")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    results = {"machine": platform.processor() or platform.machine(), "commit": commit.strip(), "cells": []}
    if out.exists():
        results["cells"] = json.loads(out.read_text(encoding="utf-8"))["cells"]
    done = {(cell["cell"], cell["seed"]) for cell in results["cells"]}
    for seed in range(1, args.seeds + 1):
        for name in CELLS:
            if (name, seed) not in done:
                results["cells"].append(run_cell(name, seed, args.work, environment))
                results["seeds"] = seed
                write_report(results, args.out)
                print(results["cells"][-1], flush=True)


if __name__ == "__main__":
    main()
