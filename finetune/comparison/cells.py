"""比较的一个格子：经 deepspeed 启动器训练，再用 predict.py 评测自己的与别的任务；在比较的工作进程里运行。

工作进程只导入一次 torch，一个格子因此只有训练自己的启动时间。输出都进 work/worker-N.log 与格子的 log.txt。
"""

import ctypes
import gc
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.comparison.data import read_rows, shuffled_labels, take_tokens, write_rows
from finetune.comparison.plan import Cell, list_cells, sweep_metric, task_of
from finetune.comparison.statistics import COSTS, compact_counts
from finetune.process.training_process import TrainingProcess
from utils import read_json

ROOT = Path(__file__).resolve().parents[2]
TRAIN_TIMEOUT = 24 * 3600.0
PR_SET_PDEATHSIG = 1
# predict.py 的 main：参数 → 退出码
Predict = Callable[[list[str]], int]
MEASURED = (*COSTS, "tokens")
SCORE = ("score", "ci_low", "ci_high")
LENGTH_FLAGS = {"max_len": 1024, "max_src_len": 768}
TRAINABLE = re.compile(r"可训练 ([\d,]+) / ([\d,]+)")


def start_worker(work: Path):
    """工作进程的准备：主进程死了就跟着死；输出进日志；一个线程。"""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C 由主进程收拾
    log = os.open(work / f"worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def run_cell(
    plan: dict[str, Any], cell: Cell, rate: float | None, output_dir: Path, predict: Predict
) -> dict[str, Any]:
    """做一个格子 → 结果文件的一行（jobs 由调用者写）。

    每次都在全新的目录里，做完删去；训练没有走完时抛 RuntimeError，附日志的末尾。
    试跑的损失成了 NaN 不算错，分数是 None。
    """
    directory = output_dir / "work" / cell.name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    trained: dict[str, Any] = {}
    if cell.task:
        try:
            checkpoint, trained = train(plan, cell, rate, output_dir, directory)
        except RuntimeError:
            if cell.stage != "sweep" or not (directory / "train" / "bad_steps").is_dir():
                raise
            checkpoint = None
    else:
        checkpoint = base_path(plan, output_dir) if cell.method == "base" else output_dir / cell.method
    if checkpoint is None:
        scored, other = {"metric": sweep_metric(task_of(plan, cell.task))}, {}
    else:
        scored, other = evaluate(plan, cell, output_dir, checkpoint, predict)
    row = {
        **{"stage": cell.stage, "task": cell.task, "method": cell.method, "seed": cell.seed, "learning_rate": rate},
        **{name: scored.get(name) for name in ("metric", *SCORE)},
        **{name: trained.get(name) for name in MEASURED},
        "forgetting": {**trained.get("forgetting", {}), "other_tasks": other},
    }
    if cell.stage != "sweep" and cell.task:  # 报告由它们重写：配对自助法与损失曲线
        row |= {"losses": trained["losses"], "per_row": compact_counts(scored["per_row"], scored["metric"])}
        row |= {"test_nll": scored["test_nll"]}
    row |= {name: value for name in ("check", "share") if (value := getattr(cell, name)) is not None}
    shutil.rmtree(directory)
    return row


def base_path(plan: dict[str, Any], output_dir: Path) -> Path:
    """基座的目录：计划里给的，或本工具预训练的。"""
    return ROOT / plan["base"] if isinstance(plan["base"], str) else output_dir / "base"


# ---------------------------------------------------------------------------------------------------------------------
# 训练


def train(
    plan: dict[str, Any], cell: Cell, rate: float, output_dir: Path, directory: Path
) -> tuple[Path, dict[str, Any]]:
    """训练一次 → (检查点目录, 各项数值)；中途失败抛 RuntimeError。"""
    data = output_dir / "data"
    train_path = data / cell.task / f"{cell.part}.json"
    if cell.check == "shuffled":
        shuffled = directory / "shuffled.json"
        write_rows(shuffled, shuffled_labels(read_rows(train_path), plan["split_seed"]))
        train_path = shuffled
    train_type = plan["methods"][cell.method].get("train_type", cell.method)
    flags = [
        *("--precision", read_json(output_dir / "data.json")["precision"]),
        *("--train_path", train_path, "--model_name_or_path", base_path(plan, output_dir)),
        *("--output_dir", directory / "train", "--train_type", train_type, "--learning_rate", repr(rate)),
        *("--seed", cell.seed, "--num_train_epochs", epochs_of(plan, cell), "--no-save_trainer_state"),
        *("--general_path", data / "general_test.txt"),
        *plan["methods"][cell.method].get("flags", []),
        *plan["train_flags"],
    ]
    if cell.stage == "replay":
        flags += ["--replay_path", data / "general_train.txt", "--replay_ratio", plan["replay"]["ratio"]]
        flags += ["--replay_by", plan["replay"].get("by", "rows")]
    started = time.monotonic()
    with TrainingProcess(flags, 1, directory / "log.txt") as run:
        ended = run.wait(TRAIN_TIMEOUT)
    if ended.returncode != 0:
        raise RuntimeError(f"{cell.name} 的训练没有走完（退出码 {ended.returncode}）：\n…{ended.output[-3000:]}")
    return measured(directory / "train", ended.output, time.monotonic() - started)


def epochs_of(plan: dict[str, Any], cell: Cell) -> int:
    """这个格子走几遍：任务的，curve 的 share 大于 1 时是它的几倍。"""
    return task_of(plan, cell.task)["epochs"] * max(1, int(cell.share or 1))


def measured(train_dir: Path, output: str, wall_seconds: float) -> tuple[Path, dict[str, Any]]:
    """从一次训练的目录与输出读出各项数值：(检查点, 数值)。"""
    from finetune.checkpoint.output_dir import iter_checkpoints

    checkpoint = next(path for _, _, path in iter_checkpoints(train_dir))
    lines = (train_dir / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    tokens = sum(record["tokens"] for record in records)
    stepping = sum(record["tokens"] / record["tokens_per_second"] for record in records)
    forgetting = read_json(train_dir / "forgetting.json")
    return checkpoint, {
        "trainable_parameters": int(TRAINABLE.search(output)[1].replace(",", "")),
        "peak_memory_mb": round(max(record["memory_mb"] for record in records), 1),
        "seconds": round(wall_seconds, 2),
        "tokens_per_second": round(tokens / stepping, 1),
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()),
        "forgetting": {name: forgetting[name] for name in ("general_nll_before", "general_nll_after", "kl")},
        "tokens": tokens,
        "losses": [[record["step"], round(record["loss"], 5)] for record in records],
    }


# ---------------------------------------------------------------------------------------------------------------------
# 评测


def evaluate(
    plan: dict[str, Any], cell: Cell, output_dir: Path, checkpoint: Path, predict: Predict
) -> tuple[dict[str, Any], dict[str, Any]]:
    """用 predict.py 评测一个检查点 → (自己任务的结果, 各别的任务的分数)；提示词的截断与训练相同。

    试跑只在验证部分评（NLL 或任务的指标，见计划的 select）；其余在测试部分生成并评分，另算目标 token 的 NLL，
    别的任务用它们测试部分的前 other 行。
    base 与 untrained 没有自己的任务：全部任务都在整份测试部分与前 other 行上评分。
    """
    precision = read_json(output_dir / "data.json")["precision"]
    max_src_len = flag_value(plan["train_flags"], "max_src_len")

    def score(task: dict[str, Any], part: str, metric: str) -> dict[str, Any]:
        output = output_dir / "work" / cell.name / f"{task['name']}-{part}.jsonl"
        words = ["--model_path", checkpoint, "--test_path", output_dir / "data" / task["name"] / f"{part}.json"]
        words += ["--output_path", output, "--metric", metric, "--batch_size", 64, "--precision", precision]
        words += ["--max_new_tokens", task["max_new_tokens"], "--max_src_len", max_src_len]
        code = predict([str(word) for word in words])
        if code != 0:
            raise RuntimeError(f"predict.py 评测 {checkpoint} 失败（退出码 {code}），原因在 work/ 的 worker 日志里")
        gc.collect()
        return read_json(output.with_suffix(".metrics.json"))

    if cell.stage == "sweep":
        task = task_of(plan, cell.task)
        return score(task, "dev", sweep_metric(task)), {}
    own, other = {}, {}
    for task in plan["tasks"]:
        name, metric = task["name"], task["metric"]
        if name == cell.task:
            own = {**score(task, "test", metric), "test_nll": score(task, "test", "nll")["score"]}
            continue
        found = score(task, "other", metric)
        other[name] = {"metric": metric, **{key: found[key] for key in SCORE}}
        if not cell.task:
            found = score(task, "test", metric)
            other[name] |= {f"test_{key}": found[key] for key in SCORE}
            other[name]["test_per_row"] = compact_counts(found["per_row"], metric)
            other[name]["test_nll"] = score(task, "test", "nll")["score"]
    return own, other


# ---------------------------------------------------------------------------------------------------------------------
# 训练行


def choose_rows(plan: dict[str, Any], output_dir: Path) -> dict[str, dict[str, int]]:
    """由基座的分词器取每个任务的训练行：正式的 train_tokens 个 token，试跑是它的 sweep_share → {任务: {份: token}}。

    四种方法用同样的文件与遍数，训练的 token 数因此相等。
    """
    from finetune.checkpoint.base_model import load_config, load_tokenizer
    from finetune.data.encoding import encode_file
    from finetune.data.prompting import resolve_prompt_format

    base = base_path(plan, output_dir)
    config = load_config(base)
    tokenizer = load_tokenizer(base, config.vocab_size)
    limits = {name: flag_value(plan["train_flags"], name) for name in LENGTH_FLAGS}
    chosen: dict[str, dict[str, int]] = {}
    for task in plan["tasks"]:
        directory = output_dir / "data" / task["name"]
        prompting = resolve_prompt_format("auto", base, config)
        most = task["max_train_chars"] or sys.maxsize
        rows = read_rows(directory / "train.json")
        arrays, _ = encode_file(str(directory / "train.json"), tokenizer, {**limits, **prompting._asdict()})
        kept = [index for index, row in enumerate(rows) if len(row["input"]) <= most]
        rows, lengths = [rows[index] for index in kept], arrays["lengths"][kept].tolist()
        test = read_rows_any(directory / "test.json")
        write_rows(directory / "other.json", test[: task["other"]])
        chosen[task["name"]] = {}
        shares = {"final": 1.0, "sweep": task["sweep_share"]}
        curve = [cell for cell in list_cells(plan) if (cell.stage, cell.task) == ("curve", task["name"])]
        shares |= {cell.part: cell.share for cell in curve if cell.share < 1}
        for part, share in shares.items():
            count = take_tokens(lengths, int(task["train_tokens"] * share), task["epochs"])
            write_rows(directory / f"{part}.json", rows[:count])
            chosen[task["name"]] |= {part: sum(lengths[:count]) * task["epochs"], f"{part}_rows": count}
    return chosen


def flag_value(flags: list, name: str) -> int:
    """train_flags 里一个长度参数的值，没有写时是 train.py 的缺省。"""
    words = [str(word) for word in flags]
    return int(words[words.index(f"--{name}") + 1]) if f"--{name}" in words else LENGTH_FLAGS[name]


def read_rows_any(path: Path) -> list[dict[str, Any]]:
    """JSON 行，不检查 output（测试部分的是列表）。"""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
