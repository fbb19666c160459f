"""偏好真的学到：情感分类的行，对的标签胜过错的。从头造一个小基座，sft，再从两个起点各作一次 dpo，全部是真的命令。

    python benchmarks/stages/preference_run.py --output benchmarks/stages/results

起点一是 sft 刚学会回答的样子、还分不清对错的时候，起点二是学完之后；dpo 都是新的 LoRA，--sft_weight 1，另有一次没有它的
作对照。每个检查点用 predict.py 在留出的行上跑两遍：--label_scores 给出两个回答的对数概率，--metric label_f1 照常生成。
写出 preference_run.json 与 preference_run.md。
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import predict
from finetune.process.training_process import TrainingProcess
from finetune.terminal import markdown_table
from utils import write_json

ROOT = Path(__file__).resolve().parents[2]
LABELS = ("正面", "负面")
SFT_STEPS, EARLY_STEP, BETA = 80, 30, 0.1
SIZES = {"layers": 4, "hidden_size": 128, "heads": 4, "vocab_size": 2000}
COMMON = {
    **{"precision": "fp32", "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
    **{"max_len": 128, "max_src_len": 112},
}
SFT = {
    **{"train_type": "full", "learning_rate": 1e-3, "num_train_epochs": 3, "max_steps": SFT_STEPS},
    **{"save_model_step": EARLY_STEP},
}
LORA = {"task": "dpo", "train_type": "lora", "lora_module_name": "all-linear", "lora_dim": 16, "beta": BETA}
# 名字 → (起点, 参数)
RUNS = {
    "early": ("sft-early", {**LORA, "learning_rate": 1e-3, "num_train_epochs": 2, "sft_weight": 1.0}),
    "late": ("sft", {**LORA, "learning_rate": 5e-4, "num_train_epochs": 1, "sft_weight": 1.0}),
    "late-plain": ("sft", {**LORA, "learning_rate": 5e-4, "num_train_epochs": 1}),
}
TITLES = {
    **{"sft-early": f"sft 第 {EARLY_STEP} 步", "early": "它，再 dpo 两轮"},
    **{"sft": f"sft 第 {SFT_STEPS} 步", "late": "它，再 dpo 一轮", "late-plain": "同上，没有 --sft_weight"},
}


def write_pairs(rows: Path, pairs: Path) -> None:
    """各行的回答为好，另一个标签为坏。"""
    made = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        [wrong] = [label for label in LABELS if label != row["output"]]
        prompt = {"instruction": row["instruction"], "input": row["input"]}
        made.append({**prompt, "chosen": row["output"], "rejected": wrong})
    pairs.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")


def train(name: str, output: Path, commands: dict[str, str], **options) -> Path:
    """`deepspeed train.py …` 到底 → 最后的检查点。"""
    flags = [str(word) for key, value in {**options, **COMMON}.items() for word in (f"--{key}", value)]
    flags += ["--output_dir", str(output), "--no-save_trainer_state"]
    commands[name] = "deepspeed train.py " + shlex.join(flags)
    if not (output / "summary.json").exists():  # 上一次走完了的不再走
        with TrainingProcess(flags, 1, output.parent / f"{name}.log") as run:
            ended = run.wait(7200)
        assert ended.returncode == 0, ended.output[-3000:]
    return max(output.glob("epoch-*-step-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def run_predict(checkpoint: Path, rows: Path, output: Path, *more: str) -> list[dict]:
    """`python predict.py …` 的 main，不必每次另载入 torch → 写出的各行。"""
    flags = ["--model_path", checkpoint, "--test_path", rows, "--output_path", output, "--precision", "fp32", *more]
    assert predict.main(list(map(str, flags))) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def measure(checkpoint: Path, rows: Path, stem: Path) -> dict:
    """→ 各对的对数概率之差、生成的文字、label_f1 与它的区间。"""
    scored = run_predict(checkpoint, rows, stem.with_suffix(".scores.jsonl"), "--label_scores", ",".join(LABELS))
    generated = stem.with_suffix(".jsonl")
    texts = run_predict(checkpoint, rows, generated, "--metric", "label_f1", "--max_new_tokens", "8")
    metrics = json.loads(generated.with_suffix(".metrics.json").read_text(encoding="utf-8"))
    differences = []
    for row in scored:
        found = {label: row["label_scores"][label]["log_prob"] for label in LABELS}
        good = found.pop(row["output"])
        differences.append(good - found.popitem()[1])
    return {
        "differences": differences,
        "prefers": share(differences),
        **{name: metrics[name] for name in ("score", "ci_low", "ci_high")},
        "out_of_label": metrics["details"]["out_of_label"],
        "texts": [row["prediction"] for row in texts],
    }


def share(differences: list[float]) -> float:
    """大于 0 的份额，等于 0 的算一半。"""
    return sum((value > 0) + 0.5 * (value == 0) for value in differences) / len(differences)


def report(found: dict, commands: dict[str, str], rows: list[dict]) -> str:
    """preference_run.md 的内容。"""
    starts = {name: start for name, (start, _) in RUNS.items()}
    table = []
    for name, one in found.items():
        implied = 0.5
        if name in starts:
            before = found[starts[name]]["differences"]
            implied = share([now - old for now, old in zip(one["differences"], before, strict=True)])
        interval = f"{one['score']:.4f} [{one['ci_low']:.4f}, {one['ci_high']:.4f}]"
        table.append([TITLES[name], f"{one['prefers']:.2f}", f"{implied:.2f}", interval, str(one["out_of_label"])])
    header = ["检查点", "好的回答概率更大", "隐含的奖励更大", "label_f1（95% 区间）", "标签以外的回答"]
    texts = [
        [row["input"].replace("|", "\\|"), row["output"], *(one["texts"][index] for one in found.values())]
        for index, row in enumerate(rows[:8])
    ]
    return "\n\n".join(
        [
            "# 偏好真的学到",
            f"`python benchmarks/stages/preference_run.py`：{len(rows)} 对留出的行，好的是对的标签，坏的是另一个。"
            "「好的回答概率更大」是模型自己给两个回答（连同 eos）的概率，「隐含的奖励更大」是相对于各自的起点"
            "（起点对自己是 0.5：两个都没有动，算一半）。",
            markdown_table(header, table),
            "## 生成的文字",
            markdown_table(["评论", "参考", *(TITLES[name] for name in found)], texts),
            "## 命令",
            "```\n" + "\n".join(commands.values()) + "\n```",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_path", type=Path, default=ROOT / "data" / "cls_0.json", help="情感分类的训练行")
    parser.add_argument("--test_path", type=Path, default=ROOT / "data" / "cls_1.json", help="留出的行")
    parser.add_argument("--output", type=Path, required=True, help="结果写在这个目录")
    parser.add_argument("--work", type=Path, help="训练用的目录，做到一半可以接着做（缺省在临时目录里，做完后删去）")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.test_path.read_text(encoding="utf-8").splitlines()]
    commands: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        work = args.work or Path(name)
        work.mkdir(exist_ok=True)
        flags = [str(word) for key, value in SIZES.items() for word in (f"--{key}", value)]
        build = ["scripts/build_tiny_model.py", "--arch", "baichuan2-7b", "--output_dir", str(work / "base"), *flags]
        commands["base"] = "python " + shlex.join(build)
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if not (work / "base").exists():
            subprocess.run([sys.executable, *build], cwd=ROOT, env=env, check=True, capture_output=True)
        pairs, held = work / "pairs.json", work / "held.json"
        write_pairs(args.train_path, pairs)
        write_pairs(args.test_path, held)
        last = train("sft", work / "sft", commands, train_path=args.train_path, model_name_or_path=work / "base", **SFT)
        [early] = (work / "sft").glob(f"epoch-*-step-{EARLY_STEP}")
        checkpoints = {"sft-early": early, "early": None, "sft": last, "late": None, "late-plain": None}
        for name, (start, options) in RUNS.items():
            paths = {"train_path": pairs, "eval_path": held, "model_name_or_path": checkpoints[start]}
            checkpoints[name] = train(name, work / name, commands, **paths, **options)
        found = {}
        for name, checkpoint in checkpoints.items():
            found[name] = measure(checkpoint, args.test_path, work / f"predicted-{name}")
            shown = {key: value for key, value in found[name].items() if key not in ("differences", "texts")}
            print(name, shown, flush=True)
        commands = {key: value.replace(f"{work}/", "").replace(f"{ROOT}/", "") for key, value in commands.items()}
        logs = {name: (work / name / "train_log.jsonl").read_text(encoding="utf-8").splitlines() for name in RUNS}
    args.output.mkdir(parents=True, exist_ok=True)
    evaluations = {name: [json.loads(line) for line in lines if "eval/" in line] for name, lines in logs.items()}
    content = {"commands": commands, "found": found, "evaluations": evaluations}
    write_json(args.output / "preference_run.json", content)
    (args.output / "preference_run.md").write_text(report(found, commands, rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
