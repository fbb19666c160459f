"""真实数据与真实分词器上的全部组合：四种方法 × ZeRO-2、ZeRO-3 offload × 1、2 个进程。

损失下降；检查点完整，读回得到训练时的 logits。

    python -m pytest tests/test_train_matrix.py -m slow
    MATRIX_CHOICE=种子:个数 python -m pytest tests/test_train_matrix.py -m slow      # 按种子选其中几个
没有 ../shared 时用项目自己的数据与分词器。
"""

import itertools
import os
import random
import statistics
from pathlib import Path

import pytest
import torch
from launching import launch
from paths import ROOT, SHARED
from peft import PeftModel
from safetensors.torch import load_file
from train_worker import PROBE_IDS, PROBE_MASK
from transformers import AutoModelForCausalLM

from finetune.checkpoint.manifest import verify_checkpoint
from finetune.methods.registry import TRAIN_METHODS
from utils import read_json

# 方法 → (结构, 它的参数)
METHOD_ROWS = {
    "freeze": ("baichuan2-13b", ["--freeze_module_name", "layers.1.,lm_head", "--learning_rate", "3e-3"]),
    "lora": ("baichuan2-7b", ["--lora_module_name", "all-linear", "--learning_rate", "1e-2"]),
    "ptuning": (
        "baichuan2-13b",
        ["--prefix_projection", "True", "--prefix_hidden_size", "64", "--learning_rate", "2e-2"],
    ),
    "full": ("baichuan2-7b", ["--learning_rate", "3e-3"]),
}
DS_FILES = {"zero2": "ds_zero2_no_offload.json", "zero3": "ds_zero3_offload.json"}
# 一个进程用 fp32，两个进程用 bf16：两种精度都走到
PRECISIONS = {1: "fp32", 2: "bf16"}
SIZES = {"layers": 2, "hidden_size": 64, "heads": 4, "intermediate_size": 128}
NUM_ROWS, GLOBAL_BATCH, EPOCHS = 96, 8, 2
NUM_STEPS = EPOCHS * NUM_ROWS // GLOBAL_BATCH


def chosen_combinations() -> list:
    """全部 16 个组合，或环境变量 MATRIX_CHOICE="种子:个数" 选出的几个。"""
    combinations = list(itertools.product(METHOD_ROWS, DS_FILES, PRECISIONS))
    if choice := os.environ.get("MATRIX_CHOICE"):
        seed, count = map(int, choice.split(":"))
        combinations = random.Random(seed).sample(combinations, count)
    return [
        pytest.param(
            *combination, id=f"{combination[0]}-{combination[1]}-{combination[2]}rank{'s'[: combination[2] - 1]}"
        )
        for combination in combinations
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    source = SHARED / "data" / "spo_0.json" if SHARED.is_dir() else ROOT / "data" / "spo_0.json"
    path = tmp_path_factory.mktemp("matrix") / "rows.json"
    path.write_text("\n".join(source.read_text(encoding="utf-8").splitlines()[:NUM_ROWS]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def base_of(tiny_checkpoint):
    """返回 `base_of(arch, dtype) -> Path`：有 ../shared 时用 Baichuan2 真实的分词器与词表。"""
    tokenizer = SHARED / "tokenizer" / "v2" / "tokenizer.model"
    real = {"tokenizer_model": tokenizer, "vocab_size": 125696} if tokenizer.is_file() else {}
    return lambda arch, dtype: tiny_checkpoint(arch, **SIZES, **real, dtype=dtype)


def test_the_rows_name_every_method():
    assert set(METHOD_ROWS) == set(TRAIN_METHODS)


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize(("method", "zero", "num_ranks"), chosen_combinations())
def test_train_save_and_load_again(base_of, rows, tmp_path, method, zero, num_ranks):
    arch, method_flags = METHOD_ROWS[method]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[PRECISIONS[num_ranks]]
    base, output = base_of(arch, str(dtype).removeprefix("torch.")), tmp_path / "output"
    batch_size, accumulation = 2, GLOBAL_BATCH // 2 // num_ranks
    flags = [
        *("--train_path", rows, "--model_name_or_path", base, "--output_dir", output),
        *("--train_type", method, "--ds_file", ROOT / DS_FILES[zero], "--precision", PRECISIONS[num_ranks]),
        *("--max_len", 256, "--max_src_len", 192, "--gradient_checkpointing", "--show_loss_step", 1),
        *("--per_device_train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation),
        *("--num_train_epochs", EPOCHS, *method_flags),
    ]
    run = launch(
        flags,
        num_ranks=num_ranks,
        script=ROOT / "tests" / "helpers" / "train_worker.py",
        env={"OBSERVE_DIR": str(tmp_path)},
        timeout=600,
    )
    assert run.returncode == 0, run.tail()

    assert [record["step"] for record in run.records] == list(range(1, NUM_STEPS + 1))
    first, last = statistics.mean(run.losses[:4]), statistics.mean(run.losses[-4:])
    assert last < first - 0.2, f"损失没有下降：{first:.3f} → {last:.3f}"

    names = [f"epoch-{epoch}-step-{epoch * NUM_STEPS // EPOCHS}" for epoch in range(1, EPOCHS + 1)]
    assert sorted(path.name for path in output.glob("*epoch-*")) == names
    for name in names:
        assert verify_checkpoint(output / name) == []
        check_tensors(output / name, base, tmp_path)
        expected = load_file(tmp_path / f"{name}.safetensors")["logits"][PROBE_MASK == 1]
        found = reload_logits(output / name, base, dtype)[PROBE_MASK == 1]
        if dtype == torch.float32:
            # logits 的绝对值到 7；LoRA 与 peft 的求和次序不同，fp32 的舍入逐层放大
            assert (found - expected).norm() < 1e-5 * expected.norm()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        else:  # bf16 的一个舍入约 1/256；训练时的 LoRA 与 peft 舍入的次序不同，逐层放大
            assert (found - expected).norm() < 3e-2 * expected.norm()


def check_tensors(checkpoint: Path, base: Path, observe_dir: Path):
    """每个张量都完整（ZeRO-3 下不是空的或一段），适配器的也不是零。"""
    is_adapter = (checkpoint / "adapter_config.json").is_file()
    tensors = load_file(checkpoint / ("adapter_model.safetensors" if is_adapter else "model.safetensors"))
    assert all(tensor.any() and torch.isfinite(tensor).all() for tensor in tensors.values())
    if not is_adapter:
        shapes = {name: tensor.shape for name, tensor in load_file(base / "model.safetensors").items()}
        assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
        return
    if "prompt_embeddings" in tensors:
        # 16 个位置，2 层 × 键与值 × 64
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"prompt_embeddings": (16, 256)}
        return
    parts = read_json(observe_dir / "seen-0.json")["parts"]
    whole = {name.replace(".default", ""): numel for name, (numel, _) in parts.items() if "lora_" in name}
    assert {name: tensor.numel() for name, tensor in tensors.items()} == whole


def reload_logits(checkpoint: Path, base: Path, dtype: torch.dtype) -> torch.Tensor:
    is_adapter = (checkpoint / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(base if is_adapter else checkpoint, dtype=dtype)
    if is_adapter:
        model = PeftModel.from_pretrained(model, checkpoint, autocast_adapter_dtype=False)
    with torch.no_grad():
        return model.eval()(input_ids=PROBE_IDS, attention_mask=PROBE_MASK).logits.float()
