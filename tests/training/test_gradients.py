"""怎样切分都是同样的梯度；参数组。"""

import json
import math
from pathlib import Path

import pytest
import torch
from launching import launch
from safetensors.torch import load_file
from train_runs import (
    GRADIENT_ROWS,
    RELATIVE,
    SIZES,
    WORKER,
    ZERO2,
    ZERO3,
    flags_of,
    write_rows,
)
from train_worker import fill_adapter

from data_set import BaichuanDataSet
from finetune.checkpoint.base_model import load_config, load_tokenizer
from finetune.cli.train_flags import parse_args
from finetune.data.packing import collate
from finetune.data.prompting import resolve_prompt_format
from finetune.methods.registry import TRAIN_METHODS
from finetune.training.engine import parameter_groups
from model_factory import build_model
from utils import read_json, seed_everything

pytestmark = pytest.mark.deepspeed


# ---------------------------------------------------------------------------------------------------------------------
# 同一个全局 batch 的梯度，与怎样切分无关

# (每进程的样本数, 累积次数, ZeRO, 其余参数)；全局 batch 都是 8，实际只有 7 行，所以总有不满的、空的 micro batch
CUTS = {
    1: [
        (8, 1, ZERO2, []),
        (1, 8, ZERO2, ["--no-packing"]),
        (8, 1, ZERO3, ["--no-packing"]),
        (2, 4, ZERO3, ["--gradient_checkpointing"]),
    ],
    2: [
        (4, 1, ZERO2, []),
        (1, 4, ZERO2, ["--no-packing", "--gradient_checkpointing"]),
        (4, 1, ZERO3, ["--no-packing"]),
        (1, 4, ZERO3, []),
    ],
}
NUM_ROWS = 7


def cut_name(method: str, cut: tuple) -> str:
    batch_size, accumulation, ds, extra = cut
    return "_".join([method, f"{batch_size}x{accumulation}", ds.stem, *(flag.strip("-") for flag in extra)])


@pytest.fixture(scope="module")
def gradient_rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("gradients") / "rows.json", NUM_ROWS)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint, gradient_rows):
    """返回 `reference(method) -> {名字: 梯度}`：不用 DeepSpeed，全部样本在一个批里，损失取目标 token 的平均。"""
    found: dict[str, dict] = {}

    def compute(method: str) -> dict[str, torch.Tensor]:
        if method not in found:
            arch, flags = GRADIENT_ROWS[method]
            path = tiny_checkpoint(arch, **SIZES)
            args = parse_args(flags_of(rows=gradient_rows, model=path, output=Path("-"), train_type=method) + flags)
            config = load_config(path)
            tokenizer = load_tokenizer(path, config.vocab_size)
            prompting = resolve_prompt_format("auto", path, config)
            rows = BaichuanDataSet(gradient_rows, tokenizer, max_len=96, max_src_len=64, **prompting._asdict())
            seed_everything(args.seed)
            model = fill_adapter(build_model(args, config, "fp32", {})).train()
            batch = collate([rows[i] for i in range(len(rows))], tokenizer.pad_token_id, packing=False)
            assert sum(rows.num_targets) == len(batch["target_rows"])
            model(**batch, num_items_in_batch=sum(rows.num_targets), use_cache=False).loss.backward()
            found[method] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return found[method]

    return compute


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def gradients(request, tiny_checkpoint, gradient_rows, tmp_path_factory) -> tuple[int, Path]:
    """各种方法、各种切分的梯度；同样进程数的任务在同一组进程里做完。"""
    num_ranks, directory = request.param, tmp_path_factory.mktemp(f"gradients-{request.param}")
    tasks = {}
    for method, (arch, flags) in GRADIENT_ROWS.items():
        for cut in CUTS[num_ranks]:
            batch_size, accumulation, ds, extra = cut
            tasks[cut_name(method, cut)] = [
                *flags_of(
                    rows=gradient_rows, model=tiny_checkpoint(arch, **SIZES), output=directory / cut_name(method, cut),
                    ds=ds, train_type=method, per_device_train_batch_size=batch_size,
                    gradient_accumulation_steps=accumulation,
                ),
                *flags, *extra,
            ]  # fmt: skip
    (directory / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    run = launch(
        ["--gradients", directory / "tasks.json"],
        num_ranks=num_ranks,
        script=WORKER,
        env={"OBSERVE_DIR": str(directory)},
        launcher=False,
    )
    assert run.returncode == 0, run.tail()
    return num_ranks, directory


def test_the_rows_above_name_every_method():
    assert set(GRADIENT_ROWS) == set(TRAIN_METHODS)


@pytest.mark.parametrize("method", GRADIENT_ROWS)
def test_gradients_do_not_depend_on_the_cut(gradients, reference, method):
    num_ranks, directory = gradients
    expected = reference(method)
    assert all(gradient.norm() > 0 for gradient in expected.values())
    for cut in CUTS[num_ranks]:
        name = cut_name(method, cut)
        found = load_file(directory / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        for parameter, gradient in expected.items():
            error = (found[parameter].view_as(gradient) - gradient).norm() / gradient.norm()
            assert error < RELATIVE, f"{name} {parameter}：相对误差 {error:.1e}"


def test_the_cuts_are_really_different(gradients):
    """不装箱时 micro batch 数就是累积次数；装箱时不会更多。"""
    num_ranks, directory = gradients
    for method in GRADIENT_ROWS:
        for cut in CUTS[num_ranks]:
            batch_size, accumulation, _, extra = cut
            found = read_json(directory / f"{cut_name(method, cut)}.json")["micro_batches"]
            if "--no-packing" in extra:
                assert found == math.ceil(NUM_ROWS / (num_ranks * batch_size))
            else:
                assert 1 <= found <= accumulation


# ---------------------------------------------------------------------------------------------------------------------
# 参数组


def test_weight_decay_is_the_flag_and_only_for_matrices(tiny_checkpoint):
    path = tiny_checkpoint("baichuan2-7b", **SIZES)
    args = parse_args(flags_of(rows=Path("-"), model=path, output=Path("-"), train_type="full", weight_decay=0.03))
    model = build_model(args, load_config(path), "fp32", {})
    model.model.norm.requires_grad_(False)
    decayed, kept = parameter_groups(model, args.weight_decay)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.03, 0.0)
    assert {parameter.dim() for parameter in decayed["params"]} == {2}
    assert {parameter.dim() for parameter in kept["params"]} == {1}
    assert len(decayed["params"]) == 2 + 2 * 5
    assert len(kept["params"]) == 2 * 2  # 末尾的归一化已冻结
