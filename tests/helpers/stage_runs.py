"""各训练阶段的测试共用：几行数据，参数，一步的全部样本放在一批里、由完整的 logits 直接写出的损失。"""

import json
import math
from pathlib import Path

import torch
from paths import ROOT
from torch import Tensor
from torch.nn.functional import logsigmoid
from train_runs import DS_FILES

from baichuan import BaichuanTokenizer
from finetune.data.prompting import IGNORE_INDEX, encode_sample
from finetune.data.samples import RowOptions, read_samples

STAGES = ("pretrain", "dpo", "simpo", "orpo", "kto")
BETAS = {"dpo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}
MAX_LEN, MAX_SRC_LEN = 96, 64


def write_stage_rows(path: Path, stage: str, num_rows: int) -> Path:
    """项目自己的数据里的若干行，写成这一阶段读的样子；不好的回答是别的行的，长短不一。"""
    lines = (ROOT / "data" / "cls_0.json").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:num_rows]]
    made = []
    for index, row in enumerate(rows):
        prompt = {"instruction": row["instruction"], "input": row["input"]}
        worse = rows[(index + 3) % num_rows]["input"][: 3 + index % 5]
        if stage == "pretrain":
            made.append({"text": row["input"]})
        elif stage == "kto":
            made.append({**prompt, "output": row["output"] if index % 3 else worse, "label": bool(index % 3)})
        else:
            made.append({**prompt, "chosen": row["output"], "rejected": worse})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    return path


def stage_flags(stage: str, rows: Path, base: Path, output: Path, method: str, num_ranks: int = 1, **options) -> list:
    """train.py 的参数；全局 batch 是 4。"""
    options = {
        **{"task": stage, "train_path": rows, "model_name_or_path": base, "output_dir": output, "train_type": method},
        **{"ds_file": DS_FILES["zero2"], "max_len": MAX_LEN, "max_src_len": MAX_SRC_LEN, "precision": "fp32"},
        **{"learning_rate": 5e-3, "num_train_epochs": 2, "show_loss_step": 1, "per_device_train_batch_size": 1},
        **{"gradient_accumulation_steps": 4 // num_ranks, **options},
    }
    if method == "lora":
        options |= {"lora_module_name": "all-linear"}
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def log_probs_of(model, ids: list[int], labels: list[int]) -> Tensor:
    """一个样本各目标的对数概率 [目标数]。"""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False, return_logits=True).logits[0]
    targets = torch.tensor(labels[1:])
    rows = (targets != IGNORE_INDEX).nonzero()[:, 0]
    return logits.log_softmax(dim=-1)[rows, targets[rows]]


def encoded_answers(path: Path, base: Path, stage: str) -> list[list]:
    """各行的 [好的, 坏的]（kto：[回答]）EncodedSample；kto 另有标注。"""
    tokenizer = BaichuanTokenizer.from_pretrained(base)
    found = []
    for sample in read_samples(path, options=RowOptions(task=stage)):
        rows = [sample]
        if sample.rejected is not None:
            rows.append(sample._replace(messages=(*sample.messages[:-1], ("assistant", sample.rejected))))
        found.append([encode_sample(row, tokenizer, "plain", MAX_LEN, MAX_SRC_LEN) for row in rows])
    return found


def stage_loss(model, reference, path: Path, base: Path, stage: str, order: list[int] | None = None) -> Tensor:
    """全部的行作一步的损失，由定义写出；reference(ids, labels) 给出参考模型的各对数概率。

    kto 的搭档是 order（一步里各行的次序）里前一行的回答。
    """
    beta, rows = BETAS[stage], encoded_answers(path, base, stage)
    policy = [[log_probs_of(model, one.input_ids, one.labels) for one in row] for row in rows]
    if stage in ("dpo", "kto"):
        with torch.no_grad():
            known = [[reference(one.input_ids, one.labels).sum() for one in row] for row in rows]
        ratios = [
            [now.sum() - before for now, before in zip(*row, strict=True)] for row in zip(policy, known, strict=True)
        ]
    if stage == "dpo":
        return -sum(logsigmoid(beta * (good - bad)) for good, bad in ratios) / len(rows)
    if stage == "simpo":
        return -sum(logsigmoid(beta * (good.mean() - bad.mean()) - 1.0) for good, bad in policy) / len(rows)
    if stage == "orpo":

        def odds(log_probs: Tensor) -> Tensor:
            p = log_probs.mean().exp()
            return p / (1 - p)

        terms = [-good.mean() - beta * logsigmoid((odds(good) / odds(bad)).log()) for good, bad in policy]
        return sum(terms) / len(rows)
    assert stage == "kto"
    mixed = []
    with torch.no_grad():
        for place, row in enumerate(order):
            ([prompt], [answer]) = rows[row], rows[order[place - 1]]
            src, tgt = prompt.input_ids[: prompt.num_src_tokens], answer.input_ids[answer.num_src_tokens :]
            ids = [*src, *tgt][:MAX_LEN]
            labels = [IGNORE_INDEX] * len(src) + ids[len(src) :]
            mixed.append((log_probs_of(model, ids, labels) - reference(ids, labels)).sum().item())
    z = max(0.0, math.fsum(mixed) / len(mixed))
    labels = [sample.label for sample in read_samples(path, options=RowOptions(task="kto"))]
    values = [
        torch.sigmoid(beta * (r - z) if good else beta * (z - r)) for [r], good in zip(ratios, labels, strict=True)
    ]
    return sum(1 - value for value in values) / len(values)
