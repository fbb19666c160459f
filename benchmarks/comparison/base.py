"""比较用的基座：由计划里的文字、任务的行与造出来的练习预训练一个小模型。"""

from pathlib import Path
from typing import Any

from benchmarks.comparison.copying import copying_rows, drilling_rows
from finetune.comparison.cells import base_path, read_rows_any
from finetune.comparison.data import Row, write_rows


def synthetic_rows(task: str, count: int, seed: int) -> list[Row]:
    """项目自己的生成器写的行（data/source/），只用于预训练；措辞与真实数据不同。

    Raises:
        ValueError: 这个任务没有生成器。
    """
    from data.source import cls, d2q, spo

    modules = {"extraction": spo, "generation": d2q, "classification": cls}
    if task not in modules:
        raise ValueError(f"synthetic 里的 {task} 应为 {'、'.join(modules)} 之一")
    return modules[task].make_rows(seed, count, 1)[0]


def build_base(plan: dict[str, Any], output_dir: Path):
    """计划要求时预训练基座，并为 untrained 造一个同样大小的随机模型；已有的不再造。"""
    if isinstance(plan["base"], str):
        if not (base_path(plan, output_dir) / "config.json").is_file():
            raise ValueError(f"base({plan['base']}) 里没有 config.json，请给出检查点目录（相对仓库根目录）")
        return
    from scripts.build_tiny_model import build_tiny_model

    data, options = output_dir / "data", dict(plan["base"])
    repeats, synthetic = options.pop("repeats"), options.pop("synthetic", {})
    files = {task["name"]: data / task["name"] / "pretrain.json" for task in plan["tasks"]}
    files["general"] = data / "general_pretrain.txt"
    text = (data / "general_train.txt").read_text(encoding="utf-8")
    files["general"].write_text(text[: options.pop("general_chars", None)], encoding="utf-8")
    inputs = [row["input"] for task in plan["tasks"] for row in read_rows_any(files[task["name"]])]
    texts = [*files["general"].read_text(encoding="utf-8").splitlines(), *inputs]
    exercises = {"copying": copying_rows, "drilling": drilling_rows}
    for name, count in synthetic.items():
        files[f"synthetic_{name}"] = data / f"synthetic_{name}.json"
        if name in exercises:
            rows = exercises[name](texts, count, plan["split_seed"])
        else:
            rows = synthetic_rows(name, count, plan["split_seed"])
        write_rows(files[f"synthetic_{name}"], rows)
    sources = [files[name] for name, count in repeats.items() for _ in range(count)]
    pretraining = {name: options.pop(name) for name in ("pretrain_tokens", "pretrain_threads") if name in options}
    arch = options.pop("arch")
    if not (output_dir / "base").is_dir():
        build_tiny_model(
            arch, output_dir / "base", pretrain=sources, train_text=[*dict.fromkeys(sources)], **options, **pretraining
        )
    if not (output_dir / "untrained").is_dir():
        tokenizer = output_dir / "base" / "tokenizer.model"
        build_tiny_model(arch, output_dir / "untrained", tokenizer_model=tokenizer, **options)
