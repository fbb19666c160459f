"""比较用的基座：由计划里的配方，用产品自己的 train.py --task pretrain 一段接一段地从随机的权重练成。

先造随机的模型与分词器（output_dir/untrained，也是核对用的）；各段是一次训练，前一段的检查点是后一段的基座，做完的段
留在 output_dir/pretrain/，打断之后从下一段接着做。线程数与精度都写在配方里：同一种 CPU 上，同样的配方得到同样的哈希。
"""

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.comparison.drills import Encode, drill_rows
from finetune.checkpoint.base_model import load_config, load_tokenizer
from finetune.checkpoint.output_dir import iter_checkpoints
from finetune.checkpoint.run_record import hash_base
from finetune.comparison.cells import base_path, read_rows_any
from finetune.comparison.data import write_rows
from finetune.process.training_process import TrainingProcess
from utils import file_sha256, read_json, write_json

STAGE_TIMEOUT = 24 * 3600.0


def build_base(plan: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """计划要求时预训练基座 → 它的说明（data.json 的 base）：权重的 SHA-256、各段的 token 数与步数。已有的不再造。

    计划给的是检查点目录时，说明是各文件的 SHA-256。

    Raises:
        ValueError: 计划给的是检查点目录，里面却没有检查点。
        RuntimeError: 一段训练没有走完。
    """
    if isinstance(plan["base"], str):
        config = base_path(plan, output_dir) / "config.json"
        if not config.is_file():
            raise ValueError(f"base({plan['base']}) 里没有 config.json，请给出检查点目录（相对仓库根目录）")
        return {"hashes": hash_base(base_path(plan, output_dir))}
    recipe, described = plan["base"], output_dir / "base.json"
    if described.is_file() and (output_dir / "base").is_dir():
        return read_json(described)
    sources = text_sources(plan, output_dir / "data")
    build_untrained(recipe["model"], list(sources.values()), output_dir)
    model, stages = output_dir / "untrained", []
    encode = load_tokenizer(model, load_config(model).vocab_size).tokenize
    for number, stage in enumerate(recipe["stages"], start=1):
        directory = output_dir / "pretrain" / f"{number}-{stage['name']}"
        files = stage_files(stage, sources, directory, plan["split_seed"] + number, encode)
        model, measured = run_stage(recipe, stage, files, model, directory)
        stages.append({"name": stage["name"], **measured})
    shutil.copytree(model, output_dir / "base", dirs_exist_ok=True)
    facts = {"sha256": file_sha256(output_dir / "base" / "model.safetensors"), "stages": stages}
    write_json(described, facts)
    return facts


def text_sources(plan: dict[str, Any], data: Path) -> dict[str, Path]:
    """预训练可用的文字：general 与各任务训练部分的输入（不含回答），一行一段；各写成一个文件。"""
    sources = {"general": data / "general_train.txt"}
    for task in plan["tasks"]:
        rows = [row for part in ("train", "pretrain") for row in read_rows_any(data / task["name"] / f"{part}.json")]
        texts = dict.fromkeys(" ".join(row["input"].split()) for row in rows)
        sources[task["name"]] = data / f"{task['name']}_inputs.txt"
        sources[task["name"]].write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return sources


def build_untrained(model: dict[str, Any], files: list[Path], output_dir: Path):
    """随机的权重与由 files 训练的分词器。"""
    from scripts.build_tiny_model import build_tiny_model

    if not (output_dir / "untrained").is_dir():
        options = {**model}
        build_tiny_model(options.pop("arch"), output_dir / "untrained", train_text=files, **options)


def stage_files(
    stage: dict[str, Any], sources: dict[str, Path], directory: Path, seed: int, encode: Encode
) -> list[str]:
    """一段的 --train_path：写明份量的文字，与练习写成的文件；encode：文字 → 片段。"""
    directory.mkdir(parents=True, exist_ok=True)
    files = [f"{sources[name]}*{share:g}" for name, share in stage.get("texts", {}).items()]
    for number, drills in enumerate(stage.get("drills", [])):
        options = {**drills}
        names = options.pop("texts", list(sources))
        lines = [line for name in names for line in sources[name].read_text(encoding="utf-8").splitlines()]
        path = directory / f"drills-{number}.json"
        write_rows(path, drill_rows(lines, options.pop("count"), seed, encode=encode, **options))
        files.append(str(path))
    return files


def run_stage(
    recipe: dict[str, Any], stage: dict[str, Any], files: list[str], model: Path, directory: Path
) -> tuple[Path, dict[str, Any]]:
    """练一段 → (它的检查点, 步数、token 数与末步的损失)；做完了的不再做。"""
    done = directory / "checkpoint"
    if not done.is_dir():
        flags = [
            *("--task", "pretrain", "--train_type", "full", "--model_name_or_path", model, "--train_path", *files),
            *("--output_dir", directory / "train", "--num_train_epochs", 1, "--no-save_trainer_state"),
            *(*recipe["train_flags"], *stage["train_flags"]),
        ]
        with TrainingProcess(flags, 1, directory / "log.txt") as run:
            ended = run.wait(STAGE_TIMEOUT)
        if ended.returncode != 0:
            name, code = stage["name"], ended.returncode
            raise RuntimeError(f"预训练的 {name} 没有走完（退出码 {code}）：\n{ended.output[-3000:]}")
        shutil.move(next(iter_checkpoints(directory / "train"))[2], done)
    lines = (directory / "train" / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    tokens = sum(record["tokens"] for record in records)
    return done, {"steps": records[-1]["step"], "tokens": tokens, "loss": round(records[-1]["loss"], 4)}
