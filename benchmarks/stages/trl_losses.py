"""偏好各阶段的损失与梯度对照 TRL 1.16：同样的权重（导出成 Llama）、同样的 token、fp32，同样的 AdamW 各走十步。

装了 trl==1.16 的环境里运行，PYTHONPATH 指向本项目：

    python benchmarks/stages/trl_losses.py --out benchmarks/stages/results/trl_losses.json

基座是 Baichuan-7B 结构的微型模型（没有 NormHead，权重与梯度可以逐个对应）；全部参数都训练，一步一个 micro batch。
orpo 的 NLL 按论文只算回答：把 TRL 的标签换成回答的，一步 8 对、各步各对的 token 数相同时两者的平均一致。
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from baichuan import BaichuanForCausalLM
from finetune.data.prompting import IGNORE_INDEX, EncodedSample
from finetune.data.step_loader import StepLoader
from finetune.export.export import export
from finetune.tasks.registry import TASKS
from scripts.build_tiny_model import build_tiny_model

STEPS, BATCH, RATE = 10, 8, 1e-3
BETAS = {"dpo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}


def make_rows(generator: random.Random, stage: str, vocab_size: int) -> list[dict]:
    """随机的 token：提示 20 到 40 个，回答 5 到 15 个（orpo 的都是 10 个）。"""

    def tokens(low: int, high: int) -> list[int]:
        return [generator.randrange(300, vocab_size) for _ in range(generator.randint(low, high))]

    length = (10, 10) if stage == "orpo" else (5, 15)
    return [
        {
            "prompt_ids": tokens(20, 40),
            "chosen_ids": tokens(*length),
            "rejected_ids": tokens(*length),
            "label": bool(i % 3),
        }
        for i in range(STEPS * BATCH)
    ]


class Rows:
    """make_rows 的行，接口同 BaichuanDataSet。"""

    max_len, path = 64, "trl"

    def __init__(self, rows: list[dict], stage: str):
        answers = ["chosen_ids"] if stage == "kto" else ["chosen_ids", "rejected_ids"]
        self.samples = [self._sample(row["prompt_ids"], row[name]) for row in rows for name in answers]
        self.columns = {
            "lengths": np.array([len(sample.input_ids) for sample in self.samples]),
            "num_targets": np.array([sample.num_targets for sample in self.samples]),
            "src_lengths": np.array([sample.num_src_tokens for sample in self.samples]),
            "flags": np.array([32 * row["label"] for row in rows for _ in answers]),
        }

    @staticmethod
    def _sample(prompt: list[int], answer: list[int]) -> EncodedSample:
        ids = np.array(prompt + answer, dtype=np.int32)
        labels = np.where(np.arange(len(ids)) < len(prompt), IGNORE_INDEX, ids)
        return EncodedSample(ids, labels, len(answer), len(prompt), False, False, False)

    def __getitem__(self, index: int) -> EncodedSample:
        return self.samples[index]

    def place(self, index: int) -> tuple[str, int]:
        return "trl", index


class Engine:
    """没有 DeepSpeed 的引擎，接口够 PreferenceLoss 用。"""

    device = torch.device("cpu")

    def __init__(self, module):
        self.module = module

    def __call__(self, **batch):
        return self.module(**batch)

    def eval(self):
        self.module.eval()

    def train(self):
        self.module.train()


def ours(stage: str, rows: list[dict], base: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """→ (各步的损失, 第一步的梯度)。"""
    engine = Engine(BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32).train())
    options = SimpleNamespace(
        **{"train_type": "full", "adapter_path": None, "beta": BETAS[stage], "label_smoothing": 0.0, "sft_weight": 0.0},
        **{"simpo_gamma": 1.0, "packing": True, "per_device_train_batch_size": BATCH, "seed": None},
        **{"gradient_accumulation_steps": 1, "num_train_epochs": 1},
    )
    task = TASKS[stage]
    objective, data_set = task.open(options), task.group(Rows(rows, stage))
    objective.start(engine, [data_set], 0)
    loader = StepLoader(
        data_set, batch_size=BATCH, max_len=data_set.max_len, seed=None, with_samples=True, partners=objective.partners
    )
    optimizer = torch.optim.AdamW(engine.module.parameters(), lr=RATE, weight_decay=0.0)
    losses, gradients = [], {}
    for step in loader.epoch(0):
        objective.prepare(engine, step)
        [batch] = step.micro_batches
        loss = objective.loss(engine, batch, step)
        loss.backward()
        for name, parameter in engine.module.named_parameters() if not losses else ():
            gradients[name] = parameter.grad.clone()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def trainer_of(stage: str, model, tokenizer, directory: Path):
    """TRL 自己的训练器；数据由这里另给，构造时的只是占位。"""
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    common = {
        **{"output_dir": str(directory), "per_device_train_batch_size": BATCH, "report_to": [], "use_cpu": True},
        **{"beta": BETAS[stage], "bf16": False, "gradient_checkpointing": False, "disable_dropout": True},
    }
    pair = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * BATCH)
    more = {"processing_class": tokenizer, "train_dataset": pair}
    if stage == "dpo":
        return DPOTrainer(model=model, args=DPOConfig(**common), **more)
    if stage == "simpo":
        args = CPOConfig(**common, loss_type="simpo", simpo_gamma=1.0, cpo_alpha=0.0)
        return CPOTrainer(model=model, args=args, **more)
    if stage == "orpo":
        return ORPOTrainer(model=model, args=ORPOConfig(**common), **more)
    single = Dataset.from_list([{"prompt": "a", "completion": "b", "label": bool(i % 2)} for i in range(BATCH)])
    args = KTOConfig(**common, train_sampling_strategy="sequential")
    return KTOTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=single)


def trl_batch(stage: str, rows: list[dict], trainer) -> dict[str, torch.Tensor]:
    """一步的行 → TRL 的一批。"""
    if stage == "dpo":
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return trainer.data_collator([{name: row[name] for name in names} for row in rows])
    if stage == "kto":
        features = [
            {
                **{"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": row["label"]},
                "KL_completion_ids": rows[index - 1]["chosen_ids"],
            }
            for index, row in enumerate(rows)
        ]
        return trainer.data_collator(features)
    batch = {}
    for side in ("chosen", "rejected"):
        ids = [row["prompt_ids"] + row[f"{side}_ids"] for row in rows]
        width = max(map(len, ids))
        pad = [width - len(one) for one in ids]
        batch[f"{side}_input_ids"] = torch.tensor([one + [0] * n for one, n in zip(ids, pad, strict=True)])
        batch[f"{side}_attention_mask"] = torch.tensor(
            [[1] * len(one) + [0] * n for one, n in zip(ids, pad, strict=True)]
        )
        batch[f"{side}_labels"] = torch.tensor(
            [
                [IGNORE_INDEX] * len(row["prompt_ids"]) + row[f"{side}_ids"] + [IGNORE_INDEX] * n
                for row, n in zip(rows, pad, strict=True)
            ]
        )
    return batch


def theirs(stage: str, rows: list[dict], llama: Path, directory: Path):
    """→ (各步的损失, 第一步的梯度)，同 ours。"""
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    trainer = trainer_of(stage, model, PreTrainedTokenizerFast.from_pretrained(llama), directory)
    if stage == "orpo":  # 它的 NLL 是整段的；按论文只算回答
        concatenated = trainer.concatenated_forward

        def answers_only(model, batch):
            found = concatenated(model, batch)
            logits, labels = found[2], batch["chosen_labels"]
            nll = torch.nn.functional.cross_entropy(
                logits[:, : labels.shape[1] - 1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
            )
            return (*found[:4], nll)

        trainer.concatenated_forward = answers_only
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    losses, gradients = [], {}
    for start in range(0, len(rows), BATCH):
        batch = trl_batch(stage, rows[start : start + BATCH], trainer)
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        for name, parameter in model.named_parameters() if not losses else ():
            gradients[name] = parameter.grad.clone()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def gradient_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """全部参数的梯度之差，相对于梯度的范数。"""
    merged = dict(theirs)
    for name in [name for name in theirs if "q_proj" in name]:
        parts = [merged.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        merged[name.replace("q_proj", "W_pack")] = torch.cat(parts)
    assert merged.keys() == ours.keys()
    difference = sum((ours[name] - merged[name]).square().sum() for name in ours).sqrt()
    return (difference / sum(grad.square().sum() for grad in merged.values()).sqrt()).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="结果写在这里")
    parser.add_argument("--stages", default="dpo,simpo,orpo,kto")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        base, llama = Path(directory) / "base", Path(directory) / "llama"
        build_tiny_model("baichuan-7b", base, layers=2, hidden_size=64, heads=4, intermediate_size=96)
        export(base, "llama", llama, dtype="float32")
        vocab_size = BaichuanForCausalLM.from_pretrained(base).config.vocab_size
        for stage in args.stages.split(","):
            rows = make_rows(random.Random(1), stage, vocab_size)
            our_losses, our_gradients = ours(stage, rows, base)
            their_losses, their_gradients = theirs(stage, rows, llama, Path(directory) / "trl")
            results[stage] = {
                "ours": our_losses,
                "trl": their_losses,
                "first_loss_difference": abs(our_losses[0] - their_losses[0]),
                "largest_loss_difference": max(abs(a - b) for a, b in zip(our_losses, their_losses, strict=True)),
                "first_gradient_difference": gradient_difference(our_gradients, their_gradients),
            }
            print(stage, {name: value for name, value in results[stage].items() if "difference" in name}, flush=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
