"""bench 的工人：transformers Trainer + peft、TRL、LLaMA-Factory，各用自己的训练循环；由 bench.py 在各自的环境里启动。

<各自环境的 python> benchmarks/speed/peers.py '{"kind": "hf", …}'      # 规格见 programs.py

计时从 on_step_begin 到 on_step_end（取批与记录都在计时之外，对它们略有利）；每步停在 on_step_begin 等指令。
不导入本项目的任何模块：对方的环境里没有它的依赖。
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speed.protocol import Channel, StepMeter, installed_versions, run_worker

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DISABLE_VERSION_CHECK", "1")

PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory", "flash_attn", "liger-kernel")
IGNORE_INDEX = -100
LORA = {"r": 8, "lora_alpha": 30, "target_modules": ["q_proj", "k_proj", "v_proj"]}


def step_callback(spec: dict[str, Any], work: dict[str, Any], channel: Channel):
    """让 Trainer 每一步都等父进程的指令，走完报告。"""
    from transformers import TrainerCallback

    from benchmarks.speed.random_weights import fill_lora

    class StepCallback(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            fill_lora(model)
            trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            channel.send(ready=True, versions=installed_versions(*PACKAGES), num_trainable=trainable)

        def on_step_begin(self, args, state, control, **kwargs):
            index = channel.wait_for_step()
            if index is None:
                os._exit(0)
            assert index == state.global_step, f"要的是第 {index} 步，Trainer 在第 {state.global_step} 步"
            self.meter = StepMeter()
            self.meter.start()

        def on_step_end(self, args, state, control, **kwargs):
            self.measured = self.meter.stop()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                index = state.global_step - 1
                channel.send(
                    **self.measured,
                    loss=float(logs["loss"]),
                    grad_norm=float(logs.get("grad_norm") or 0.0),
                    tokens=work["step_tokens"][index],
                )

    return StepCallback()


# ---------------------------------------------------------------------------------------------------------------------
# 样本


def read_work(spec: dict[str, Any]) -> dict[str, Any]:
    """各步的样本，与每步的非补齐 token 数 step_tokens。"""
    work = json.loads(Path(spec["work"]).read_text(encoding="utf-8"))
    work["step_tokens"] = [sum(len(row["input_ids"]) for row in step) for step in work["steps"]]
    return work


def pad_collate(rows: list[dict]) -> dict[str, Any]:
    """右侧补齐到这一批最长的。"""
    import torch

    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> Any:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(width) < lengths[:, None]).long()
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORE_INDEX), "attention_mask": mask}


# ---------------------------------------------------------------------------------------------------------------------
# 模型与公共设置


def load_model(spec: dict[str, Any]):
    """Llama 布局的同一份权重；random_config 给出时在 GPU 上现造（与 gpu.py 的 Baichuan 数值相同）。"""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[spec["precision"]]
    attention = spec.get("attention", "sdpa")
    if "random_config" not in spec:
        return AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, attn_implementation=attention)
    from transformers.initialization import no_init_weights

    from benchmarks.speed.random_weights import fill_llama

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig(**spec["random_config"])
    with no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    fill_llama(model, device)
    return model


def apply_method(model, spec: dict[str, Any]):
    """lora、freeze（末 k 层）或 full；input_grads 是 ChatGLM-Finetuning 的做法：词嵌入的输出也要梯度。"""
    if spec["method"] == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(**LORA, lora_dropout=spec["dropout"], bias="none", task_type="CAUSAL_LM")
        return get_peft_model(model, config, autocast_adapter_dtype=spec["amp"])
    if spec["method"] == "freeze":
        last = model.config.num_hidden_layers - spec["trained_layers"]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("model.layers.") and int(name.split(".")[2]) >= last)
    if spec.get("input_grads"):
        model.enable_input_require_grads()
    return model


def common_arguments(spec: dict[str, Any], num_steps: int, output_dir: str) -> dict[str, Any]:
    """与本项目相同的优化器设置；其余用 Trainer 的缺省值。"""
    import torch

    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": spec["batch_size"],
        "gradient_accumulation_steps": spec["accumulation"],
        "max_steps": num_steps,
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "bf16": spec["precision"] == "bf16" and spec["amp"],
        "gradient_checkpointing": spec["checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if spec["checkpointing"] else None,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1234,
    }


# ---------------------------------------------------------------------------------------------------------------------
# 三种程序


def run_hf(spec: dict[str, Any], channel: Channel, output_dir: str):
    """transformers Trainer + peft；layout：padded、flat（DataCollatorWithFlattening，免补齐）。"""
    from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

    work = read_work(spec)
    rows = [row for step in work["steps"] for row in step]
    flash = spec.get("attention") == "flash_attention_2"
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=flash) if spec["layout"] == "flat" else pad_collate
    arguments = common_arguments(spec, len(work["steps"]), output_dir)
    trainer = Trainer(
        model=apply_method(load_model(spec), spec),
        args=TrainingArguments(
            **arguments,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            use_liger_kernel=bool(spec.get("liger")),
        ),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[step_callback(spec, work, channel)],
    )
    trainer.train()


def run_trl(spec: dict[str, Any], channel: Channel, output_dir: str):
    """TRL 的 SFTTrainer；layout：padded，packing（bfd，每步的 8 条自成一包，与别的程序同一步同样的样本）。"""
    from datasets import Dataset, concatenate_datasets
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer, pack_dataset

    class OrderedTrainer(SFTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(train_dataset or self.train_dataset)

    work = read_work(spec)
    is_packing = spec["layout"] == "packing"
    if is_packing:
        packs = [pack_dataset(Dataset.from_list(step), spec["pack_length"], "bfd") for step in work["steps"]]
        assert all(len(pack) == 1 for pack in packs), "pack_length 太小，一步的样本放不进一包"
        rows = concatenate_datasets(packs)
    else:
        rows = Dataset.from_list([row for step in work["steps"] for row in step])
    trainer = OrderedTrainer(
        model=apply_method(load_model(spec), spec),
        args=SFTConfig(
            **common_arguments(spec, len(work["steps"]), output_dir),
            packing=is_packing,
            packing_strategy="bfd",
            max_length=spec["pack_length"] if is_packing else 1024,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        callbacks=[step_callback(spec, work, channel)],
    )
    trainer.train()


def run_lf(spec: dict[str, Any], channel: Channel, output_dir: str):
    """LLaMA-Factory 自己的 run_exp；样本以它的 tokenized_path 交给它，layout：padded、packing（neat_packing）。"""
    from datasets import Dataset, DatasetDict
    from llamafactory.train.tuner import run_exp

    work = read_work(spec)
    is_packing = spec["layout"] == "packing"
    steps = [neat_pack(step, spec["pack_length"]) for step in work["steps"]] if is_packing else work["steps"]
    rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for step in steps for row in step]
    tokenized = str(Path(output_dir) / "tokenized")
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tokenized)
    method = {"finetuning_type": spec["method"]}
    if spec["method"] == "lora":
        method |= {"lora_rank": LORA["r"], "lora_alpha": LORA["lora_alpha"], "lora_dropout": spec["dropout"]}
        method |= {"lora_target": ",".join(LORA["target_modules"])}
    elif spec["method"] == "freeze":
        method |= {"freeze_trainable_layers": spec["trained_layers"]}
    arguments = common_arguments(spec, len(steps), output_dir)
    arguments.pop("gradient_checkpointing_kwargs")
    arguments["disable_gradient_checkpointing"] = not arguments.pop("gradient_checkpointing")
    run_exp(
        {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": spec["model"],
            "template": "default",
            "dataset": "bench",  # 必须有名字；tokenized_path 在时不会去读
            "tokenized_path": tokenized,
            "cutoff_len": spec["pack_length"] - 1 if is_packing else 1024,  # 它补到 cutoff_len + 1，须是 8 的倍数
            "packing": is_packing,
            "neat_packing": is_packing,
            "disable_shuffling": True,
            "overwrite_output_dir": True,
            **method,
            **arguments,
        },
        callbacks=[step_callback(spec, work, channel)],
    )


def neat_pack(rows: list[dict], pack_length: int) -> list[dict]:
    """LLaMA-Factory 的 neat_packing 的格式：一步的样本自成一包，attention_mask 是段号，位置逐段重新计，补齐到整包。"""
    pack: dict[str, list[int]] = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
    for segment, row in enumerate(rows, start=1):
        length = len(row["input_ids"])
        pack["input_ids"] += row["input_ids"]
        pack["labels"] += row["labels"]
        pack["attention_mask"] += [segment] * length
        pack["position_ids"] += list(range(length))
    missing = pack_length - len(pack["input_ids"])
    assert missing >= 0, "pack_length 太小，一步的样本放不进一包"
    return [{key: ids + [IGNORE_INDEX if key == "labels" else 0] * missing for key, ids in pack.items()}]


def run(spec: dict[str, Any], channel: Channel):
    import torch

    torch.set_num_threads(spec["threads"])
    with tempfile.TemporaryDirectory(prefix="bench-peer-") as output_dir:
        {"hf": run_hf, "trl": run_trl, "lf": run_lf}[spec["kind"]](spec, channel, output_dir)
    if channel.wait_for_step() is not None:  # 步都走完了，等父进程说结束
        raise ValueError("样本只够这么多步")


if __name__ == "__main__":
    run_worker(dict.fromkeys(("hf", "trl", "lf"), run))
