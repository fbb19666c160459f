"""用户的错误：说清楚，非零退出，不留下像是完整的东西。"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import launch
from safetensors.torch import load_file, save_file
from train_runs import (
    SIZES,
    WORKER,
    checkpoints_in,
    flags_of,
    write_rows,
)

from utils import read_json

pytestmark = pytest.mark.deepspeed


def failing_runs(tiny_checkpoint, directory: Path) -> dict[str, tuple[list[str], str]]:
    """任务名 → (参数, 输出里应有的文字)。"""
    good = tiny_checkpoint("baichuan2-7b", **SIZES)
    rows = write_rows(directory / "rows.json", 4)

    def damaged(name: str, damage, **options) -> Path:
        path = Path(shutil.copytree(tiny_checkpoint("baichuan2-7b", **SIZES, **options), directory / name))
        damage(path)
        return path

    def cut_weights(path: Path):
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])

    def nan_weight(path: Path):
        tensors = load_file(path / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    def content(name: str, text: str) -> Path:
        (directory / name).write_text(text, encoding="utf-8")
        return directory / name

    def task(name: str, *flags: str, model: Path = good, data: Path = rows, **options) -> list[str]:
        return [*flags_of(rows=data, model=model, output=directory / f"output-{name}", **options), *flags]

    broken = content(
        "broken.json", '{"instruction": "问", "output": "答"}\n{"instruction": "问"}\n{"instruction": 3,\n'
    )
    small = tiny_checkpoint("baichuan2-7b", **SIZES, vocab_size=600)

    return {
        "max_src_len": (task("max_src_len", max_src_len=96), "--max_src_len(96) 必须小于 --max_len(96)，请调小前者"),
        "foreign": (task("foreign", train_type="full", lora_dim=4), "--lora_dim 属于 --train_type lora"),
        "unknown_value": (task("unknown_value", train_type="qlora"), "参数错误：--train_type 应为"),
        "empty": (task("empty", data=content("empty.json", "")), "empty.json 是空的（0 字节），没有任何样本"),
        "blank": (task("blank", data=content("blank.json", "\n \n")), "blank.json 里没有任何样本（只有空白）"),
        "broken_rows": (task("broken_rows", data=broken), f"{broken}:2: output:"),
        "no_weights": (
            task("no_weights", model=damaged("no_weights", lambda path: (path / "model.safetensors").unlink())),
            "里没有权重文件",
        ),
        "cut_weights": (task("cut_weights", model=damaged("cut_weights", cut_weights)), "model.safetensors（"),
        "no_shard": (
            task("no_shard", model=damaged(
                "no_shard", lambda path: next(path.glob("model-00002*")).unlink(), max_shard_size="100KB")),
            "缺少权重分片 ['model-00002-of-",
        ),
        "wrong_tokenizer": (
            task("wrong_tokenizer", model=damaged(
                "wrong_tokenizer",
                lambda path: [shutil.copy(small / name, path) for name in ("config.json", "model.safetensors")])),
            "的分词器有 2000 个词，config.json 的 vocab_size 只有 600：分词器与权重不是一套",
        ),
        "freeze_name": (
            task("freeze_name", train_type="freeze", freeze_module_name="layers.27."),
            "--freeze_module_name 的 ['layers.27.'] 没有匹配到任何参数",
        ),
        "fp16": (task("fp16", precision="fp16"), "--precision fp16"),
        "nan": (
            task("nan", model=damaged("nan", nan_weight), train_type="full"),
            "rank 0：第 1 步的损失是 nan，没有更新权重；精度 fp32，本进程的数据行：",
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def failures(tiny_checkpoint, tmp_path_factory) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("failures")
    expected = failing_runs(tiny_checkpoint, directory)
    tasks = {name: flags for name, (flags, _) in expected.items()}
    for name in tasks:  # 上一次训练的结果
        (directory / f"output-{name}").mkdir()
        (directory / f"output-{name}" / "train_log.jsonl").touch()
    (directory / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    run = launch(
        ["--failures", directory / "tasks.json"], script=WORKER, env={"OBSERVE_DIR": str(directory)}, launcher=False
    )
    assert run.returncode == 0, run.tail()
    return directory, expected


@pytest.mark.parametrize(
    "name",
    [
        "max_src_len",
        "foreign",
        "unknown_value",
        "empty",
        "blank",
        "broken_rows",
        "no_weights",
        "cut_weights",
        "no_shard",
        "wrong_tokenizer",
        "freeze_name",
        "fp16",
        "nan",
    ],
)
def test_a_mistake_is_told_and_leaves_nothing(failures, name):
    directory, expected = failures
    if name == "fp16" and torch.cuda.is_available():
        pytest.skip("这里有 GPU，可以用 fp16")
    result = read_json(directory / f"{name}.json")
    assert expected[name][1] in result["output"]
    assert "Traceback" not in result["output"]
    assert result["code"] in (1, 2)
    assert checkpoints_in(directory / f"output-{name}") == []


def test_every_mistake_is_looked_at(failures):
    names = test_a_mistake_is_told_and_leaves_nothing.pytestmark[0].args[1]
    assert set(names) == set(failures[1])


@pytest.mark.parametrize(
    "name", ["no_weights", "cut_weights", "no_shard", "wrong_tokenizer", "broken_rows", "freeze_name", "empty"]
)
def test_a_mistake_does_not_move_the_earlier_run(failures, name):
    """输入有错的命令不应先把上一次的结果挪走。"""
    directory, _ = failures
    assert [path.name for path in (directory / f"output-{name}").iterdir()] == ["train_log.jsonl"]
