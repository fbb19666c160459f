"""续训的测试共用：小数据、各方法的参数、一组进程接连做几个任务、逐位的比较。"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from train_runs import DS_FILES

from finetune.checkpoint.manifest import verify_checkpoint
from utils import read_json

# 方法 → (结构, 它的参数)
METHODS = {
    "freeze": ("baichuan-13b", ["--freeze_module_name", "layers.1.,lm_head"]),
    "lora": ("baichuan2-7b", ["--lora_module_name", "all-linear"]),
    "ptuning": ("baichuan2-13b", ["--prefix_projection", "--prefix_hidden_size", "24"]),
    "full": ("baichuan-7b", []),
}
# 13 行、全局 batch 4：每轮 4 步，最后一步只有 1 行；两轮 8 步，在第 3、4、6、8 步保存
NUM_ROWS, GLOBAL_BATCH, STEPS = 13, 4, 8
SAVED = ["epoch-1-step-3", "epoch-1-step-4", "epoch-2-step-6", "epoch-2-step-8"]


def flags_of(base: Path, rows: Path, output: Path, zero: str, method: str, num_ranks: int, *more) -> list[str]:
    flags = [
        *("--train_path", rows, "--model_name_or_path", base, "--output_dir", output, "--ds_file", DS_FILES[zero]),
        *("--train_type", method, "--max_len", 96, "--max_src_len", 64, "--precision", "fp32"),
        *("--learning_rate", "5e-3", "--eval_path", rows, "--num_train_epochs", 2, "--save_model_step", 3),
        *("--show_loss_step", 2, "--per_device_train_batch_size", 1),
        *("--gradient_accumulation_steps", GLOBAL_BATCH // num_ranks, *METHODS[method][1], *more),
    ]
    return [str(flag) for flag in flags]


def assert_same_bits(found: Path, expected: Path):
    """两个检查点的权重、优化器、随机状态逐位相同，调度器与计数相等。"""
    assert verify_checkpoint(found) == [] == verify_checkpoint(expected)
    names = sorted(str(path.relative_to(expected)) for path in expected.rglob("*.safetensors"))
    assert names == sorted(str(path.relative_to(found)) for path in found.rglob("*.safetensors"))
    assert "trainer_state/optimizer.safetensors" in names
    for name in names:
        ours, theirs = load_file(found / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        different = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
        assert different == [], f"{name}：{len(different)} 个张量不同，如 {different[:3]}"
    ours, theirs = (read_json(path / "trainer_state" / "state.json") for path in (found, expected))
    for state in (ours, theirs):
        for clock in ("seconds", "elapsed"):
            state["progress"]["log"].pop(clock)
    assert ours == theirs


def cut_after(output: Path, step: int):
    """看上去像在第 step 步的检查点之后被 SIGKILL：之后的检查点没有，日志却更长，还有写到一半的保存与一行。"""
    for path in output.glob("epoch-*"):
        if int(path.name.rsplit("-", 1)[1]) > step:
            shutil.rmtree(path)
    (output / ".tmp-epoch-2-step-6").mkdir()
    (output / ".tmp-epoch-2-step-6" / "model.safetensors").write_bytes(b"half")
    with (output / "train_log.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 9, "lo')
