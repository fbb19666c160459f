"""evaluation.py 与检查点的取舍：评估不改变训练，1 与 2 个进程、ZeRO-2 与 ZeRO-3 结果相同，最好的留下，被打断的补上。"""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import run_tasks
from paths import ROOT
from safetensors.torch import load_file
from train_runs import DS_FILES, SIZES, records_of, write_rows

from finetune.checkpoint.output_dir import iter_checkpoints, rotate_checkpoints
from finetune.cli.train_checks import validate_args
from finetune.cli.train_flags import parse_args
from finetune.data.options import DataOptions
from finetune.training.evaluation import Evaluation
from finetune.training.options import EvaluationOptions
from utils import read_json

METHODS = {
    "freeze": ("baichuan-13b", ["--freeze_module_name", "layers.1.,lm_head"]),
    "lora": ("baichuan2-7b", ["--lora_module_name", "all-linear"]),
    "ptuning": ("baichuan2-13b", []),
    "full": ("baichuan-7b", []),
}


def flags_of(directory: Path, name: str, base: Path, zero: str, method: str, num_ranks: int, *more) -> list[str]:
    """9 行、全局 batch 4：每轮 3 步，两轮 6 步。"""
    flags = [
        *("--train_path", directory / "rows.json", "--model_name_or_path", base, "--output_dir", directory / name),
        *("--ds_file", DS_FILES[zero], "--train_type", method, "--max_len", 96, "--max_src_len", 64),
        *("--precision", "fp32", "--learning_rate", "1e-2", "--num_train_epochs", 2, "--show_loss_step", 1),
        *("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2 // num_ranks),
        *METHODS[method][1], *more,
    ]  # fmt: skip
    return [str(flag) for flag in flags]


def split_records(output: Path) -> tuple[list[dict], list[dict]]:
    """(训练的各条, 评估的各条)。"""
    records = records_of(output)
    return [r for r in records if "loss" in r], [r for r in records if "eval/nll" in r]


def assert_same_weights(found: Path, expected: Path):
    names = sorted(str(path.relative_to(expected)) for path in expected.rglob("*.safetensors"))
    assert names == sorted(str(path.relative_to(found)) for path in found.rglob("*.safetensors"))
    for name in names:
        ours, theirs = load_file(found / name), load_file(expected / name)
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == [], name


def check_evaluation(tiny_checkpoint, directory: Path, methods: list[str], zero: str, num_ranks: int):
    """训练曲线、权重、随机状态与不评估时逐位相同；评估的步、best.json 如约。"""
    write_rows(directory / "rows.json", 9)
    write_rows(directory / "eval.json", 5, start=20)
    tasks = {}
    for method in methods:
        options = (directory, method, tiny_checkpoint(METHODS[method][0], **SIZES), zero, method, num_ranks)
        more = ("--eval_path", directory / "eval.json", "--eval_step", 2, "--eval_metric", "rouge")
        tasks[method] = {"flags": flags_of(*options, *more, "--eval_max_new_tokens", 6)}
        tasks[f"{method}-plain"] = {"flags": flags_of(directory, f"{method}-plain", *options[2:])}
    results = run_tasks(directory, tasks, num_ranks)
    assert {name: result["code"] for name, result in results.items()} == dict.fromkeys(tasks, 0), results
    for method in methods:
        trained, evaluated = split_records(directory / method)
        assert trained == split_records(directory / f"{method}-plain")[0]
        assert [record["step"] for record in evaluated] == [2, 3, 4, 6]
        assert_same_weights(directory / method / "epoch-2-step-6", directory / f"{method}-plain" / "epoch-2-step-6")
        scores = {record["step"]: record["eval/rouge"] for record in evaluated}
        assert all(r["eval/rouge_ci_low"] <= r["eval/rouge"] <= r["eval/rouge_ci_high"] for r in evaluated)
        nlls = {record["step"]: record["eval/nll"] for record in evaluated}
        best = max(scores, key=lambda step: (scores[step], -nlls[step], -step))
        name = f"epoch-{(best - 1) // 3 + 1}-step-{best}"
        expected = {"checkpoint": name, "step": best, "metric": "rouge", "score": scores[best], "nll": nlls[best]}
        assert read_json(directory / method / "best.json") == expected
        assert (directory / method / name).is_dir()
        if method in ("freeze", "full"):  # 评估没有改掉存下的生成配置
            paths = [directory / run / "epoch-2-step-6" / "generation_config.json" for run in tasks if method in run]
            assert len({path.read_bytes() for path in paths}) == 1


@pytest.mark.deepspeed
def test_evaluation_changes_nothing(tiny_checkpoint, tmp_path):
    check_evaluation(tiny_checkpoint, tmp_path, ["lora"], "zero3", num_ranks=2)


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("zero", DS_FILES)
def test_evaluation_changes_nothing_for_any_method(tiny_checkpoint, tmp_path, zero, num_ranks):
    check_evaluation(tiny_checkpoint, tmp_path, list(METHODS), zero, num_ranks)


@pytest.mark.slow
@pytest.mark.deepspeed
def test_same_scores_on_one_and_two_ranks(tiny_checkpoint, tmp_path):
    """第一步之前的参数在各种切分下相同：学习率取得极小，第 1 步的评估逐项相同。"""
    write_rows(tmp_path / "rows.json", 9)
    write_rows(tmp_path / "eval.json", 5, start=20)
    found = []
    for num_ranks, zero in ((1, "zero2"), (2, "zero2"), (2, "zero3")):
        name = f"{zero}-{num_ranks}"
        base = tiny_checkpoint("baichuan2-7b", **SIZES)
        more = ("--eval_path", tmp_path / "eval.json", "--eval_metric", "rouge", "--eval_max_new_tokens", 6)
        more += ("--max_steps", 1, "--learning_rate", "1e-12")
        flags = flags_of(tmp_path, name, base, zero, "full", num_ranks, *more)
        results = run_tasks(tmp_path, {name: {"flags": flags}}, num_ranks)
        assert results[name]["code"] == 0, results[name]["output"]
        found.append(split_records(tmp_path / name)[1][0])
    for record in found[1:]:
        assert record.pop("eval/nll") == pytest.approx(found[0]["eval/nll"], rel=1e-6)
        assert record == {key: value for key, value in found[0].items() if key != "eval/nll"}


@pytest.mark.deepspeed
def test_interruption_patience_and_rotation(tiny_checkpoint, tmp_path):
    """在评估途中打断的续训与没有打断的一次相同；学习率过大，分数不再变好：停下，只留最好的与最新的。"""
    write_rows(tmp_path / "rows.json", 9)
    write_rows(tmp_path / "eval.json", 5, start=20)
    base = tiny_checkpoint("baichuan-7b", **SIZES)
    more = ("--eval_path", tmp_path / "eval.json", "--eval_step", 1, "--early_stopping_patience", 3)
    more += ("--save_total_limit", 1, "--num_train_epochs", 20, "--learning_rate", "3e-1")
    flags = flags_of(tmp_path, "whole", base, "zero2", "full", 1, *more)
    cut = flags_of(tmp_path, "cut", base, "zero2", "full", 1, *more)
    tasks = {
        "whole": {"flags": flags},
        "cut": {"flags": cut, "kill": {"step": 2, "rank": 0, "signal": "SIGTERM"}},
        "resumed": {"flags": [*cut, "--resume", "auto"]},
        "again": {"flags": [*cut, "--resume", "auto"]},
    }
    results = run_tasks(tmp_path, tasks, num_ranks=1)
    assert [results[name]["code"] for name in tasks] == [0, 75, 0, 0], results
    assert "被打断，续训时补上" in results["cut"]["output"]
    assert "--early_stopping_patience" in results["whole"]["output"]
    assert records_of(tmp_path / "cut") == records_of(tmp_path / "whole")
    best, again = (read_json(tmp_path / name / "best.json") for name in ("whole", "cut"))
    assert best == again
    last = records_of(tmp_path / "whole")[-1]["step"]
    assert last == best["step"] + 3 < 60
    newest = f"epoch-{(last - 1) // 3 + 1}-step-{last}"
    for name in ("whole", "cut"):
        assert {path.name for _, _, path in iter_checkpoints(tmp_path / name)} == {newest, best["checkpoint"]}
    assert_same_weights(tmp_path / "cut" / newest, tmp_path / "whole" / newest)


@pytest.mark.deepspeed
def test_replay_is_deterministic_and_part_of_the_run(tiny_checkpoint, tmp_path):
    write_rows(tmp_path / "rows.json", 9)
    replay = tmp_path / "replay.txt"
    replay.write_text(
        "清晨的港口停着许多渔船。\n图书馆新到了一批讲天文的书。\n山坡上的茶园忙起来了。\n", encoding="utf-8"
    )
    base = tiny_checkpoint("baichuan-7b", **SIZES)
    more = ("--replay_path", replay, "--replay_by", "rows", "--replay_ratio", 0.4)
    first = flags_of(tmp_path, "first", base, "zero2", "full", 1, *more)
    other = [*first[:-1], "0.6", "--resume", "auto"]
    tasks = {
        "first": {"flags": first},
        "second": {"flags": flags_of(tmp_path, "second", base, "zero2", "full", 1, *more)},
        "plain": {"flags": flags_of(tmp_path, "plain", base, "zero2", "full", 1)},
        "other": {"flags": other},
    }
    results = run_tasks(tmp_path, tasks, num_ranks=1)
    assert [results[name]["code"] for name in tasks] == [0, 0, 0, 2], results
    assert f"重放：{replay} 的 4 条" in results["first"]["output"]
    assert records_of(tmp_path / "first") == records_of(tmp_path / "second")
    # 9 + 4 条、全局 batch 4：每轮 4 步
    assert [record["step"] for record in records_of(tmp_path / "first")] == list(range(1, 9))
    assert [record["step"] for record in records_of(tmp_path / "plain")] == list(range(1, 7))
    assert "--replay_ratio：检查点是 0.4，现在是 0.6" in results["other"]["output"]
    assert read_json(tmp_path / "first" / "run_config.json")["data"].keys() == {"train", "replay"}


# ---------------------------------------------------------------------------------------------------------------------
# 不起训练的


class NoRows(list):
    path, paths, rows, lengths = "rows.json", [], np.zeros(0, int), []


def make(state=None, sha256="a", **options) -> Evaluation:
    defaults = {"eval_step": 0, "eval_metric": "nll", "eval_max_new_tokens": 128, "early_stopping_patience": 2}
    data = DataOptions(eval_path=ROOT / "data" / "cls_1.json")
    chosen = EvaluationOptions(**{**defaults, **options})
    return Evaluation(chosen, data, NoRows(), None, None, sha256, state)


def test_when_an_evaluation_is_due():
    evaluation = make(eval_step=3)
    assert [step for step in range(1, 8) if evaluation.is_due(step, step == 5)] == [3, 5, 6]
    assert not make().is_due(3, False)
    without = Evaluation(evaluation.options, DataOptions(), None, None, None, None)
    assert not without.is_due(3, True)


def test_state_is_restored_unless_scores_cannot_be_compared():
    state = {"identity": ["nll", 128, "a"], "best": {"score": 1.0}, "num_worse": 2, "is_owed": True}
    evaluation = make(state)
    assert evaluation.state() == state
    assert evaluation.has_stopped and evaluation.is_due(1, False)
    for changed in (make(state, sha256="b"), make(state, eval_metric="nll", eval_max_new_tokens=9)):
        assert (changed.best, changed.num_worse, changed.is_owed, changed.has_stopped) == (None, 0, True, False)


@pytest.mark.parametrize(
    ("metric", "old", "new", "is_better"),
    [
        ("nll", (2.0, 2.0), (1.9, 1.9), True),
        ("nll", (2.0, 2.0), (2.0, 2.0), False),
        ("nll", (2.0, 2.0), (2.1, 2.1), False),
        ("nll", None, (math.nan, math.nan), False),
        ("rouge", (0.2, 2.0), (0.3, 2.5), True),
        ("rouge", (0.2, 2.0), (0.1, 1.5), False),
        ("rouge", None, (0.0, 2.0), True),
        ("rouge", (0.0, 2.0), (0.0, 1.9), True),  # 分数相同，看 NLL
        ("rouge", (0.0, 2.0), (0.0, 2.0), False),
        ("rouge", (0.0, 2.0), (0.0, 2.1), False),
        ("rouge", (0.0, 2.0), (0.0, math.nan), False),
    ],
)
def test_better_follows_the_metric_then_the_nll(metric, old, new, is_better):
    evaluation = make(eval_metric=metric)
    evaluation.best = None if old is None else {"score": old[0], "nll": old[1]}
    assert evaluation._is_better({"score": new[0], "nll": new[1]}) is is_better


def test_patience_counts_ties_with_a_lower_nll_as_progress():
    """run() 里：分数一直是 0 而 NLL 在降，不算没有更好。"""
    evaluation = make(eval_metric="rouge")
    log, engine = SimpleNamespace(write=lambda record, step: None), SimpleNamespace(global_steps=0)
    better = []
    for engine.global_steps, nll in enumerate([3.0, 2.5, 2.6, 2.5], start=1):
        scores = {"nll": nll, "rouge": 0.0, "rouge_ci_low": 0.0, "rouge_ci_high": 0.0}
        evaluation._scores = lambda *_, scores=scores: scores
        better.append(evaluation.run(engine, log, f"epoch-1-step-{engine.global_steps}", 1.0, lambda: False))
    assert better == [True, True, False, False] and evaluation.has_stopped
    best = {"checkpoint": "epoch-1-step-2", "step": 2, "metric": "rouge", "score": 0.0, "nll": 2.5}
    assert evaluation.best == best


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (0, None, [2, 4, 6, 8]),
        (2, None, [6, 8]),
        (2, "epoch-1-step-2", [2, 8]),
        (3, "epoch-1-step-2", [2, 6, 8]),
        (1, "epoch-2-step-4", [4, 8]),
        (1, "epoch-4-step-8", [8]),
        (9, None, [2, 4, 6, 8]),
        (1, "epoch-9-step-99", [8]),
    ],
)
def test_rotation_keeps_the_best_and_the_newest(tmp_path, limit, best, left):
    for epoch in range(1, 5):
        (tmp_path / f"epoch-{epoch}-step-{2 * epoch}").mkdir()
    rotate_checkpoints(tmp_path, limit, best)
    assert sorted(step for step, _, _ in iter_checkpoints(tmp_path)) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_the_best_file_names_only_what_is_there(tmp_path):
    evaluation = make()
    evaluation.best = {"checkpoint": "epoch-1-step-2", "step": 2, "metric": "nll", "score": 1.5, "nll": 1.5}
    (tmp_path / "epoch-1-step-2").mkdir()
    evaluation.write_best(tmp_path)
    assert read_json(tmp_path / "best.json") == evaluation.best
    (tmp_path / "epoch-1-step-2").rmdir()
    evaluation.write_best(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_flags_without_effect_are_errors(tiny_checkpoint, tmp_path):
    write_rows(tmp_path / "rows.json", 3)
    (tmp_path / "text.txt").write_text("一段文字\n", encoding="utf-8")
    flags = flags_of(tmp_path, "out", tiny_checkpoint("baichuan2-7b", **SIZES), "zero2", "full", 1)
    wrong = [
        (("--eval_step", 5), "--eval_step .*--eval_path"),
        (("--eval_path", tmp_path / "rows.json", "--eval_max_new_tokens", 5), "--eval_max_new_tokens .*--eval_metric"),
        (("--forgetting_threshold", 0.1), "--forgetting_threshold .*--general_path"),
        (("--replay_ratio", 0.1), "--replay_path .*--replay_ratio"),
        (("--replay_path", tmp_path / "text.txt", "--replay_ratio", "nan"), r"--replay_ratio\(nan\)"),
        (("--save_total_limit", -1), r"--save_total_limit\(-1\)"),
        (("--general_path", tmp_path / "none.txt"), "找不到数据文件 .*none.txt"),
        (
            ("--general_path", tmp_path / "text.txt", "--replay_path", tmp_path / "text.txt", "--replay_ratio", 1),
            "--general_path .*--replay_path",
        ),
    ]
    for more, message in wrong:
        with pytest.raises(ValueError, match=message):
            validate_args(parse_args([*flags, *map(str, more)]))
