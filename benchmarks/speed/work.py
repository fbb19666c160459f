"""bench 的共同材料：同一份权重（Baichuan 与导出的 Llama 两种布局）与每步相同的样本；FLOPs 公式在 flops.py。"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finetune.planning.flops import Shape

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"


SAMPLES_PER_STEP = 8
MAX_LEN, MAX_SRC_LEN = 1024, 768
# 随机权重的 logits 标准差约 0.5，放大后约 2：函数不同（例如掩码错了），损失就明显不同
HEAD_SCALE = 4.0

CPU_SHAPES = {
    64000: Shape(12, 768, 2048, 12, 64000),
    8000: Shape(12, 768, 2048, 12, 8000),  # 词表投影占 6.7%，与 Baichuan2-7B 相同
}
TOY_SHAPE = Shape(3, 64, 172, 4, 8000)
GPU_SHAPES = {"7b": Shape(32, 4096, 11008, 32, 125696), "13b": Shape(40, 5120, 13696, 40, 125696)}


# ---------------------------------------------------------------------------------------------------------------------
# 权重与样本


def make_models(directory: Path, shape: Shape, precision: str, seed: int = 1234) -> tuple[Path, Path]:
    """Baichuan-7B 结构（普通词表投影）的随机检查点，以及 scripts/export.py 导出的 Llama 布局 → (baichuan, llama)。

    目录里已有的直接用；权重的类型随 precision（bf16 或 fp32）。
    """
    import torch
    from safetensors.torch import load_file, save_file

    from finetune.export.export import export
    from scripts.build_tiny_model import build_tiny_model

    tag = f"{shape.layers}x{shape.hidden}-{shape.vocab}-{precision}"
    baichuan, llama = directory / f"baichuan-{tag}", directory / f"llama-{tag}"
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[precision]
    if not baichuan.exists():
        tokenizer = _tokenizer_model(shape.vocab)
        staging = build_tiny_model(
            "baichuan-7b",
            directory / f"making-{baichuan.name}",
            layers=shape.layers,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            heads=shape.heads,
            vocab_size=shape.vocab,
            dtype=dtype,
            seed=seed,
            tokenizer_model=tokenizer,
            train_text=None if tokenizer else [ROOT / "data" / "spo_0.json"],
            overwrite=True,
        )
        weights = load_file(staging / "model.safetensors")
        weights["lm_head.weight"] = (weights["lm_head.weight"].float() * HEAD_SCALE).to(getattr(torch, dtype))
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
        staging.rename(baichuan)
    if not llama.exists():
        export(baichuan, "llama", llama)
    return baichuan, llama


def _tokenizer_model(vocab_size: int) -> Path | None:
    """放得进这个词表的真分词器；没有时由 build_tiny_model 现训一个。"""
    path = SHARED / "tokenizer" / "v1-reconstructed" / "tokenizer.model"
    return path if vocab_size >= 64000 and path.is_file() else None


def data_path() -> Path:
    """真实的三元组抽取数据；没有 ../shared 时用项目自带的样例。"""
    path = SHARED / "data" / "spo_0.json"
    return path if path.is_file() else ROOT / "data" / "spo_0.json"


def encode_rows(baichuan: Path, vocab_size: int) -> list[dict[str, list[int]]]:
    """数据的全部样本 → [{"input_ids", "labels"}]，plain 格式，至多 MAX_LEN。

    长度取自真分词器（没有时取检查点自己的）；词表较小的模型把编号折回去：随机权重下编号是哪一个无关紧要。
    """
    from baichuan import BaichuanTokenizer
    from data_set import BaichuanDataSet
    from finetune.data.prompting import IGNORE_INDEX

    real = SHARED / "tokenizer" / "v1-reconstructed"
    tokenizer = BaichuanTokenizer.from_pretrained(real if real.is_dir() else baichuan)
    data_set = BaichuanDataSet(
        data_path(), tokenizer, prompt_format="plain", family="baichuan", max_len=MAX_LEN, max_src_len=MAX_SRC_LEN
    )
    rows = []
    for sample in (data_set[index] for index in range(len(data_set))):
        ids = [token if token < vocab_size else 3 + token % (vocab_size - 3) for token in map(int, sample.input_ids)]
        labels = [token if kind != IGNORE_INDEX else kind for token, kind in zip(ids, sample.labels, strict=True)]
        rows.append({"input_ids": ids, "labels": [int(label) for label in labels]})
    return rows


def choose_steps(lengths: Sequence[int], num_steps: int) -> list[list[int]]:
    """每步 8 个样本，长度在全体的 1/16、3/16、…、15/16 分位：各步的样本不同，长度的分布相同。"""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    if len(order) < SAMPLES_PER_STEP:
        raise ValueError(f"数据只有 {len(order)} 条，每步需要 {SAMPLES_PER_STEP} 条")
    steps = []
    for step in range(num_steps):
        ranks = [int((k + 0.5) / SAMPLES_PER_STEP * len(order)) + step - num_steps // 2 for k in range(8)]
        chosen = [order[min(max(rank, 0), len(order) - 1)] for rank in ranks]
        random.Random(step).shuffle(chosen)
        steps.append(chosen)
    return steps


def group_steps(lengths: Sequence[int], num_steps: int) -> list[list[int]]:
    """按 transformers 的长度分组排好整份数据，从头一组（其中从长到短）里等距取 num_steps 步。"""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order = get_length_grouped_indices(list(lengths), SAMPLES_PER_STEP, generator=torch.Generator().manual_seed(0))
    num_batches = max(num_steps, min(len(lengths) // (4 * SAMPLES_PER_STEP), 50))
    batches = [int((k + 0.5) / num_steps * num_batches) for k in range(num_steps)]
    return [order[SAMPLES_PER_STEP * batch : SAMPLES_PER_STEP * (batch + 1)] for batch in batches]


def spread_row(length: int, vocab_size: int, seed: int, target_share: float = 0.19) -> dict[str, list[int]]:
    """一个合成的样本：随机编号，目标占末尾的 target_share。"""
    generator = random.Random(f"{seed}/{length}")
    ids = [generator.randrange(3, vocab_size) for _ in range(length)]
    first = max(1, round(length * (1 - target_share)))
    return {"input_ids": ids, "labels": [-100] * first + ids[first:]}


def spread_steps(kind: str, num_steps: int, vocab_size: int) -> list[list[dict[str, list[int]]]]:
    """合成的步，平均长度都是 232：equal 等长；uneven 一长七短（1016 与 120）。"""
    lengths = {"equal": [232] * SAMPLES_PER_STEP, "uneven": [1016, *[120] * (SAMPLES_PER_STEP - 1)]}[kind]
    return [
        [spread_row(length, vocab_size, SAMPLES_PER_STEP * step + index) for index, length in enumerate(lengths)]
        for step in range(num_steps)
    ]


def as_sample(row: dict[str, list[int]]) -> SimpleNamespace:
    """batching.collate 要的形式。"""
    return SimpleNamespace(**row)


def write_data(directory: Path, num_rows: int) -> Path:
    """真实数据循环重复成 num_rows 行的文件。"""
    path = directory / f"rows-{num_rows}.json"
    lines = [line for line in data_path().read_text(encoding="utf-8").splitlines() if line.strip()]
    path.write_text("".join(f"{lines[i % len(lines)]}\n" for i in range(num_rows)), encoding="utf-8")
    return path


def repeated_prefixes(step: list[dict[str, list[int]]]) -> list[int]:
    """这一步的样本并排时，不再重算的共用开头，见 flops.step_flops。"""
    from finetune.data.packing import shared_prefixes

    groups = shared_prefixes([as_sample(row) for row in step])
    return [shared for shared, members in groups for _ in members[1:]]


def write_work(path: Path, steps: list[list[dict[str, list[int]]]], vocab_size: int) -> dict[str, Any]:
    """把各步的样本写成一个 JSON（各程序都从它读），返回它的统计。"""
    path.write_text(json.dumps({"vocab_size": vocab_size, "steps": steps}), encoding="utf-8")
    lengths = [[len(row["input_ids"]) for row in step] for step in steps]
    targets = [sum(label != -100 for row in step for label in row["labels"]) for step in steps]
    tokens = [sum(step) for step in lengths]
    repeated = [repeated_prefixes(step) for step in steps]
    return {
        "lengths": lengths,
        "targets": targets,
        "tokens": tokens,
        "repeated": repeated,
        "shared_share": sum(map(sum, repeated)) / sum(tokens),
        "target_share": sum(targets) / sum(tokens),
        "padding_efficiency": sum(tokens) / sum(max(step) * len(step) for step in lengths),
    }
