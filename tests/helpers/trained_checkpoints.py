"""不经训练就有的检查点：train.py 的布局，权重是随机改动过的；导出与合并的测试用。"""

import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from baichuan import BaichuanForCausalLM
from finetune.checkpoint.inspection import inspect_checkpoint
from utils import file_sha256, write_json

ARCHITECTURES = ("baichuan-7b", "baichuan-13b", "baichuan2-7b", "baichuan2-13b")


def train_without_deepspeed(base: Path, path: Path, method: str, dtype=torch.float32, targets=("W_pack",)) -> Path:
    """train.py 布局的检查点，权重是随机改动过的：full、freeze 是完整模型，lora、ptuning 是适配器。"""
    torch.manual_seed(0)
    model = BaichuanForCausalLM.from_pretrained(base, dtype=dtype)
    if method in ("full", "freeze"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if method == "full" or "layers.1." in name:
                    parameter += 0.02 * torch.randn_like(parameter)
    elif method == "lora":
        config = LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=30, target_modules=list(targets), init_lora_weights=False
        )
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(0.2)
    else:
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model.save_pretrained(path)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(base / name, path / name)
    prompting = inspect_checkpoint(base).prompting
    run_config = {
        "args": {"train_path": "data/spo_0.json", "learning_rate": 0.0002},
        "train_type": method,
        **prompting._asdict(),
        "base_model": {
            "path": "gone/",
            "absolute_path": str(base),
            "hashes": {file.name: file_sha256(file) for file in sorted(base.iterdir())},
        },
        "data": {"data/spo_0.json": "ab" * 32},
        "epoch": 1,
        "global_step": 3,
    }
    write_json(path / "run_config.json", run_config)
    return path
