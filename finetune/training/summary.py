"""训练结束时的小结：用时、速度、最好的一步、下一条命令；打印出来，也写成 summary.json。"""

import json
import shlex
from pathlib import Path
from typing import Any

from finetune.checkpoint.output_dir import choose_checkpoint
from finetune.training.options import EvaluationOptions
from utils import write_json

SUMMARY_FILE = "summary.json"


def summarize(output_dir: Path, best: dict[str, Any] | None, eval_seconds: float) -> dict[str, Any]:
    """小结的各项，由 train_log.jsonl 算出；best 是 best.json 的内容，没有评估过则为 None。"""
    lines = (output_dir / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    last, num_tokens = records[-1], sum(record["tokens"] for record in records)
    training_seconds = sum(record["tokens"] / record["tokens_per_second"] for record in records)
    return {
        "steps": last["step"],
        "epochs": last["epoch"],
        "seconds": round(last["elapsed_seconds"], 1),
        "training_seconds": round(training_seconds, 1),
        "evaluation_seconds": round(eval_seconds, 1),
        "tokens": num_tokens,
        "tokens_per_second": round(num_tokens / max(training_seconds, 1e-9), 1),
        "last_loss": last["loss"],
        "best": best,
        "checkpoint": choose_checkpoint(output_dir, is_told=False).name,
    }


def write_summary(
    output_dir: Path,
    options: EvaluationOptions,
    eval_path: str | None,
    best: dict[str, Any] | None,
    eval_seconds: float,
) -> str:
    """写 summary.json，返回打印的几行；只在 0 号进程调用。"""
    found = summarize(output_dir, best, eval_seconds)
    command = ["python", "predict.py", "--model_path", str(output_dir)]
    if eval_path is not None and options.eval_metric != "loss":  # 偏好的损失不是预测的指标
        command += ["--test_path", eval_path, "--metric", options.eval_metric]
    found["next"] = shlex.join(command)
    write_json(output_dir / SUMMARY_FILE, found)
    lines = [
        f"小结：{found['steps']} 步，{found['epochs']:.2f} 轮，{duration(found['seconds'])}"
        f"（训练 {duration(found['training_seconds'])}，评估 {duration(found['evaluation_seconds'])}），"
        f"{found['tokens_per_second']:.0f} token/s"
    ]
    if best is not None:
        lines.append(f"  最好的：第 {best['step']} 步，{best['metric']} {best['score']:.4f}，{best['checkpoint']}")
    return "\n".join([*lines, f"  接着：{found['next']}"])


def duration(seconds: float) -> str:
    """给人看的时长。"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours} 小时 " if hours else "") + (f"{minutes} 分 " if hours or minutes else "") + f"{rest} 秒"
