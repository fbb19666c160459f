"""run_config.json：一次训练的参数、数据的哈希与软件版本。"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import peft
import torch
import transformers

from finetune.checkpoint.manifest import hash_files
from finetune.checkpoint.options import read_words
from finetune.checkpoint.output_dir import RUN_CONFIG
from finetune.data.mixture import describe_sources, parse_sources
from finetune.data.prompting import Prompting
from finetune.data.rows import data_sha256
from finetune.options import flags_of
from finetune.process.arithmetic import describe_arithmetic
from utils import global_rank, read_json, world_size

UNRECORDED = ("local_rank", "dry_run", "config")
HASHED_SUFFIXES = (".json", ".model", ".bin", ".safetensors")


def describe_run(args, prompting: Prompting, ds_config: dict, precision: str, precision_reason: str) -> dict:
    """run_config.json 的内容：预测、合并、导出与续训由此知道一切，不必再输入一遍。

    基座的每个文件与数据文件都记下 SHA-256。续训要比较，基座的在这里算；从头训练的由 hashing_base 补上。
    """
    base = Path(args.model_name_or_path)
    hashes = {} if args.resume == "no" else hash_base(base)
    paths = {name: getattr(args, f"{name}_path") for name in ("eval", "general", "replay")}
    data = {name: data_sha256(path) for name, path in paths.items() if path is not None}
    data["train"] = describe_sources(parse_sources(args.train_path), data_sha256)
    if args.val_ratio is not None:
        data["eval"] = [data["train"], args.val_ratio, args.seed]  # 评估集由它们决定
    return {
        "args": {
            field.name: getattr(args, field.name) for field in flags_of(type(args)) if field.name not in UNRECORDED
        },
        "train_type": args.train_type,
        "added_tokens": list(read_words(args.add_tokens)),
        "chain": chain_of(args.model_name_or_path, args.adapter_path),
        **prompting._asdict(),
        "precision": precision,
        "precision_reason": precision_reason,
        "arithmetic": describe_arithmetic(),
        "ds_file": ds_config,
        "global_batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size(),
        "world_size": world_size(),
        "base_model": {"path": args.model_name_or_path, "absolute_path": str(base.resolve()), "hashes": hashes},
        "adapter": {} if args.adapter_path is None else hash_base(Path(args.adapter_path)),
        "data": data,
        "versions": {module.__name__: module.__version__ for module in (torch, deepspeed, transformers, peft)},
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def hash_base(base: Path, is_hidden: bool = False) -> dict[str, str]:
    """基座（或适配器）各文件的 SHA-256，几个文件并行计算。"""
    hashed = [path for path in sorted(base.iterdir()) if path.suffix in HASHED_SUFFIXES and path.is_file()]
    return dict(zip([path.name for path in hashed], hash_files(hashed, is_hidden), strict=True))


@contextmanager
def hashing_base(run_config: dict) -> Iterator[None]:
    """其间读权重：同时算基座各文件的 SHA-256，离开时补进 run_config；已经算过的不再算。只由 0 号进程算。"""
    base = run_config["base_model"]
    if base["hashes"] or global_rank() != 0:
        yield
        return
    pool = ThreadPoolExecutor(1)
    hashes = pool.submit(hash_base, Path(base["path"]), is_hidden=True)
    try:
        yield
        base["hashes"] = hashes.result()
    finally:
        pool.shutdown(wait=False)


def chain_of(base: str, adapter_path: str | None) -> list[dict]:
    """起点是怎样训练出来的：以往各阶段的 {"task", "train_type", "path"}，由早到晚；起点不是训练的结果时为空。"""
    for directory in (adapter_path, base):
        if directory is not None and (Path(directory) / RUN_CONFIG).is_file():
            record = read_json(Path(directory) / RUN_CONFIG)
            stage = {"task": record.get("args", {}).get("task", "sft"), "train_type": record.get("train_type")}
            return [*record.get("chain", []), {**stage, "path": str(directory)}]
    return []
