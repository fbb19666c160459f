"""选择题的评分与 lm-evaluation-harness 的是不是一样：同样的 200 题、同样的提示，两个微型检查点，两边各评一次。

    pip install lm-eval
    python benchmarks/choices/against_lm_eval.py --output benchmarks/choices/results

题目由 data/spo_0.json 的文字造出，写成公布的 CSV，两边都从文件读。模型是随机的，准确率没有意义，要的是两边相同：
每题选的相同，四个字母的对数概率相差至多 TOLERANCE。退出码 0 表示相同。
"""

import argparse
import csv
import importlib.metadata
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import torch

from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from finetune.checkpoint.inspection import inspect_checkpoint
from finetune.inference.choices import DESCRIPTION, LABELS, evaluate_choices, read_questions
from finetune.process.arithmetic import cpu_name
from finetune.terminal import markdown_table
from scripts.build_tiny_model import build_tiny_model
from utils import write_json

ROOT = Path(__file__).resolve().parents[2]
SUBJECTS, QUESTIONS, SHOTS = 8, 25, 5
ARCHS = {"baichuan2-7b": 1, "baichuan-13b": 2}  # 架构 → 权重的种子
SIZES = {"layers": 2, "hidden_size": 64, "heads": 4, "model_max_length": 2048}
TOLERANCE = 1e-4
COLUMNS = ["id", "question", "A", "B", "C", "D", "answer"]


def write_questions(directory: Path) -> list[str]:
    """各科 5 个例子、25 题，写成 C-Eval 的 dev/ 与 val/：某几个字之后是什么 → 科目。"""
    rng = random.Random(1)
    texts = [json.loads(line)["input"] for line in (ROOT / "data" / "spo_0.json").read_text("utf-8").splitlines()]
    names = [f"subject_{number}" for number in range(SUBJECTS)]
    for name in names:
        for part, count in (("dev", SHOTS), ("val", QUESTIONS)):
            (directory / part).mkdir(exist_ok=True)
            with (directory / part / f"{name}_{part}.csv").open("w", encoding="utf-8", newline="") as stream:
                writer = csv.writer(stream)
                writer.writerow(COLUMNS)
                for number in range(count):
                    text = rng.choice([text for text in texts if len(text) > 40])
                    place = rng.randrange(len(text) - 12)
                    right, options = text[place + 4 : place + 8], rng.sample(texts, 3)
                    options = [right, *(option[4:8] for option in options)]
                    rng.shuffle(options)
                    question = f"“{text[:40]}……”里，“{text[place : place + 4]}”之后是____。"
                    writer.writerow([number, question, *options, LABELS[options.index(right)]])
    return names


def harness_task(directory: Path, name: str):
    """lm-evaluation-harness 的一科：自带的 C-Eval 任务的写法，答案之前没有空格（官方的写法）。"""
    from lm_eval.api.task import ConfigurableTask

    files = {part: str(directory / part / f"{name}_{part}.csv") for part in ("dev", "val")}
    config = {
        **{"task": name, "dataset_path": "csv", "dataset_kwargs": {"data_files": files}},
        **{"validation_split": "val", "fewshot_split": "dev", "num_fewshot": SHOTS},
        **{"fewshot_config": {"sampler": "first_n"}, "output_type": "multiple_choice", "target_delimiter": ""},
        "doc_to_text": "{{question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n答案：",
        "doc_to_choice": list(LABELS),
        "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
        "description": DESCRIPTION.format(subject=name),
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return ConfigurableTask(config=config)


def harness_scores(path: Path, directory: Path, names: list[str]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """lm-evaluation-harness → (各科 [题, 4] 的对数概率, 各科的准确率)。"""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = BaichuanForCausalLM.from_pretrained(path).eval(), BaichuanTokenizer.from_pretrained(path)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=8)
    tasks = {name: harness_task(directory, name) for name in names}
    found = evaluate(harness, tasks, bootstrap_iters=0, log_samples=True)
    scores = {}
    for name in names:
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        scores[name] = np.array([[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples])
    return scores, {name: found["results"][name]["acc,none"] for name in names}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="结果写在哪个目录")
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()
    torch.set_num_threads(1)
    rows, results = [], []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        names = write_questions(directory)
        subjects, shots = (read_questions(directory / part) for part in ("val", "dev"))
        for arch, seed in ARCHS.items():
            path = build_tiny_model(arch, directory / arch, seed=seed, **SIZES)
            checkpoint = inspect_checkpoint(path)
            [ours] = evaluate_choices(subjects, shots, [checkpoint], torch.device("cpu"), precision="fp32")[
                "checkpoints"
            ]
            scores, accuracies = harness_scores(path, directory, names)
            own = {name: np.array([row["log_probs"] for row in ours["questions"][name]]) for name in names}
            entry = {
                "checkpoint": arch,
                "num_questions": sum(len(part) for part in own.values()),
                "accuracy": ours["accuracy"]["all"]["score"],
                "accuracy_lm_eval": float(np.mean(list(accuracies.values()))),
                "subjects_with_another_accuracy": sum(
                    abs(ours["accuracy"][name]["score"] - accuracies[name]) > 1e-9 for name in names
                ),
                "other_choices": sum(int((own[n].argmax(1) != scores[n].argmax(1)).sum()) for n in names),
                "largest_difference": max(float(np.abs(own[name] - scores[name]).max()) for name in names),
            }
            results.append(entry)
            rows.append([f"{v:.2g}" if k == "largest_difference" else v for k, v in entry.items()])
    versions = {name: importlib.metadata.version(name) for name in ("lm-eval", "torch", "transformers")}
    header = ["检查点", "题", "准确率", "lm-eval 的", "准确率不同的科", "选得不同的题", "对数概率最大之差（nat）"]
    machine = f"{cpu_name()}，{'，'.join(f'{name} {version}' for name, version in versions.items())}，fp32"
    text = f"# 选择题的评分对 lm-evaluation-harness\n\n{machine}\n\n{markdown_table(header, rows)}\n"
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "against_lm_eval.md").write_text(text, encoding="utf-8")
    write_json(args.output / "against_lm_eval.json", {"machine": machine, "results": results})
    print(text)
    same = [entry["other_choices"] == 0 and entry["largest_difference"] <= TOLERANCE for entry in results]
    return 0 if all(same) and not any(entry["subjects_with_another_accuracy"] for entry in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
