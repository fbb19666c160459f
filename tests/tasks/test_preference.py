"""偏好的各阶段：损失与梯度等于由完整的 logits 直接写出的，与怎样切分无关；第一步的 dpo 是 ln 2；续训逐位相同。"""

import json
import math
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from launching import launch, run_tasks
from resume_runs import assert_same_bits, cut_after
from safetensors.torch import load_file
from stage_runs import STAGES, encoded_answers, log_probs_of, stage_flags, stage_loss, write_stage_rows
from train_runs import RELATIVE, SIZES, WORKER, ZERO2, ZERO3, records_of
from train_worker import fill_adapter

from baichuan import BaichuanTokenizer
from baichuan.linear_cross_entropy import RowCrossEntropy, inverse_row_norms
from data_set import BaichuanDataSet
from finetune.checkpoint.base_model import load_config
from finetune.cli.train_checks import early_problems
from finetune.cli.train_flags import parse_args
from finetune.data.grouping import pairs, singles
from finetune.data.packing import collate, epoch_steps
from finetune.data.prompting import IGNORE_INDEX
from finetune.data.samples import RowOptions, read_samples
from finetune.data.step_loader import StepLoader
from finetune.tasks import kto
from finetune.tasks.registry import TASKS
from model_factory import build_model
from utils import seed_everything

PREFERENCE = [stage for stage in STAGES if stage != "pretrain"]
ARCH = {"lora": "baichuan2-7b", "full": "baichuan-13b"}
FLAGS = {
    "freeze": ["--freeze_module_name", "layers.1.,lm_head"],
    "ptuning": ["--pre_seq_len", "5", "--prefix_projection", "--prefix_hidden_size", "24"],
}
U, A = "user", "assistant"


def load(path: Path, base: Path, stage: str, **options) -> BaichuanDataSet:
    settings = {"prompt_format": "plain", "max_len": 96, "max_src_len": 64, **options}
    return BaichuanDataSet(
        path, BaichuanTokenizer.from_pretrained(base), row_options=RowOptions(task=stage), **settings
    )


# ---- 行 ----


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "问", "chosen": "好", "rejected": "坏"}, [(U, "问")]),
        ({"instruction": "问", "input": "题", "chosen": "好", "rejected": "坏"}, [(U, "问题")]),
        (
            {"query": "问", "history": [["前", "先"]], "chosen": "好", "rejected": "坏"},
            [(U, "前"), (A, "先"), (U, "问")],
        ),
        (
            {"conversations": [{"from": "human", "value": "问"}], "chosen": {"from": "gpt", "value": "好"},
             "rejected": {"from": "gpt", "value": "坏"}},
            [(U, "问")],
        ),
        (
            {"prompt": [{"role": "system", "content": "规"}, {"role": "user", "content": "问"}],
             "chosen": [{"role": "assistant", "content": "好"}], "rejected": [{"role": "assistant", "content": "坏"}]},
            [("system", "规"), (U, "问")],
        ),
        (
            {"chosen": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "好"}],
             "rejected": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "坏"}]},
            [(U, "问")],
        ),
    ],
)  # fmt: skip
def test_each_shape_of_a_pair(tmp_path, row, messages):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(row), encoding="utf-8")
    [sample] = read_samples(path, options=RowOptions(task="dpo"))
    assert (list(sample.messages), sample.rejected) == ([*messages, (A, "好")], "坏")
    assert sample.trained == (*[False] * len(messages), True)


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({"chosen": "好", "rejected": "坏"}, "chosen"),
        ({"prompt": "问", "chosen": "好", "rejected": "好"}, "rejected"),
        ({"prompt": "问", "chosen": "好"}, "rejected"),
        ({"prompt": "问", "chosen": 3, "rejected": "坏"}, "chosen"),
        ({"prompt": "问", "chosen": {"role": "assistant"}, "rejected": "坏"}, "chosen"),
        ({"prompt": "问", "chosen": {"role": "user", "content": "好"}, "rejected": "坏"}, r"chosen\.role: .*'user'"),
        ({"prompt": "问", "chosen": "好", "rejected": [{"from": "human", "value": "坏"}]}, r"rejected\.from: .*human"),
        ({"prompt": "问", "response": "答", "chosen": "好", "rejected": "坏"}, "response"),
        ({"messages": [{"role": "assistant", "content": "问"}], "chosen": "好", "rejected": "坏"}, "messages"),
        (
            {"chosen": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "好"}],
             "rejected": [{"role": "user", "content": "乙"}, {"role": "assistant", "content": "坏"}]},
            "rejected",
        ),
    ],
)  # fmt: skip
def test_a_wrong_pair_is_told_by_its_field(tmp_path, row, place):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"rows\.json:1: {place}"):
        read_samples(path, options=RowOptions(task="dpo"))


@pytest.mark.parametrize(
    ("stage", "row", "remedy"),
    [
        ("sft", {"prompt": "问", "response": "答", "label": True}, "请用 --task kto"),
        ("kto", {"prompt": "问", "response": "答", "kto_tag": True, "label": True}, "kto_tag: .*请改名为 label"),
    ],
)
def test_the_remedy_of_a_kto_label(tmp_path, stage, row, remedy):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ValueError, match=remedy):
        read_samples(path, options=RowOptions(task=stage))


def test_a_pair_is_one_piece_with_a_shared_prompt(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint(ARCH["lora"], **SIZES)
    rows = write_stage_rows(tmp_path / "rows.json", "dpo", 5)
    grouped = pairs(load(rows, base, "dpo"))
    assert len(grouped) == 5 and len(grouped.data_set) == 10
    for index in range(5):
        good, bad = grouped[index]
        src = good.num_src_tokens
        assert good.input_ids[:src].tolist() == bad.input_ids[:src].tolist()
        batch = collate([good, bad], 0, packing=True)
        tails = [len(good.input_ids) - src + 1, len(bad.input_ids) - src + 1]
        assert (batch["document_lengths"], batch["document_parents"]) == ([src - 1, *tails], [-1, 0, 0])
        assert grouped.lengths[index] == batch["input_ids"].numel()
        assert grouped.num_targets[index] == good.num_targets + bad.num_targets


def test_a_skipped_answer_takes_its_pair_along(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint(ARCH["lora"], **SIZES)
    path = tmp_path / "rows.json"
    rows = [{"prompt": "问", "chosen": "好", "rejected": "坏" * (1 + 99 * (i == 1))} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]), encoding="utf-8")
    kept = load(path, base, "dpo", is_skip=True)
    assert kept.lines == [1, 1, 3, 3, 4, 4] and kept.counts["num_skipped"] == 1
    assert kept.counts["num_duplicates"] == 2
    assert load(path, base, "dpo", drop_duplicates=True).lines == [1, 1, 2, 2]


# ---- 损失与梯度 ----


@pytest.mark.parametrize("norm_head", [False, True])
def test_row_losses_and_their_gradients(norm_head, monkeypatch):
    monkeypatch.setattr("baichuan.linear_cross_entropy.MAX_LOGITS_ELEMENTS", 3 * 50)  # 一块 3 行
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (7, 50))
    targets = torch.randint(50, (7,), generator=generator)
    factors = torch.randn(7, generator=generator, dtype=torch.float64).float()
    found = []
    for is_ours in (True, False):
        h, w = (tensor.float().clone().requires_grad_() for tensor in (hidden, weight))
        if is_ours:
            losses = RowCrossEntropy.apply(h, w, inverse_row_norms(w.detach()) if norm_head else None, targets)
        else:
            projection = torch.nn.functional.normalize(w) if norm_head else w
            losses = torch.nn.functional.cross_entropy(h @ projection.t(), targets, reduction="none")
        (losses * factors).sum().backward()
        found.append((losses.detach(), h.grad, w.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# (每进程的样本数, 累积次数, ZeRO, 其余参数)；全局 batch 都是 4
CUTS = {
    1: [(4, 1, ZERO2, []), (1, 4, ZERO2, ["--no-packing"]), (2, 2, ZERO3, ["--gradient_checkpointing"])],
    2: [(2, 1, ZERO2, []), (1, 2, ZERO2, ["--no-packing", "--gradient_checkpointing"]), (2, 1, ZERO3, [])],
}


def check_cuts(tiny_checkpoint, directory: Path, num_ranks: int, num_rows: int):
    """各阶段 × lora、full：每种切法的梯度都等于直接写出的；行数少于全局 batch 时有空的 micro batch。"""
    tasks, expected = {}, {}
    for stage in PREFERENCE:
        rows = write_stage_rows(directory / f"{stage}.json", stage, num_rows)
        for method, arch in ARCH.items():
            base = tiny_checkpoint(arch, **SIZES)
            expected[stage, method] = direct_gradients(stage, method, rows, base, num_rows)
            for number, (batch_size, accumulation, ds, extra) in enumerate(CUTS[num_ranks]):
                name = f"{stage}-{method}-{number}"
                options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
                flags = stage_flags(stage, rows, base, directory / name, method, ds_file=ds, **options)
                tasks[name] = [*flags, *extra]
    (directory / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    run = launch(
        ["--gradients", directory / "tasks.json"],
        num_ranks=num_ranks,
        script=WORKER,
        env={"OBSERVE_DIR": str(directory)},
        launcher=False,
    )
    assert run.returncode == 0, run.tail()
    for (stage, method), gradients in expected.items():
        assert all(gradient.norm() > 0 for gradient in gradients.values())
        for number in range(len(CUTS[num_ranks])):
            found = load_file(directory / f"{stage}-{method}-{number}.safetensors")
            assert found.keys() == gradients.keys()
            total = sum(gradient.norm() ** 2 for gradient in gradients.values()).sqrt()
            for name, gradient in gradients.items():
                error = (found[name].view_as(gradient) - gradient).norm() / max(gradient.norm(), 1e-3 * total)
                assert error < RELATIVE, f"{stage} {method} 第 {number} 种切法，{name}：相对误差 {error:.1e}"


def direct_gradients(stage: str, method: str, rows: Path, base: Path, num_rows: int) -> dict[str, torch.Tensor]:
    args = parse_args(stage_flags(stage, rows, base, Path("-"), method))
    seed_everything(args.seed)
    model = fill_adapter(build_model(args, load_config(base), "fp32", {}))

    def reference(ids, labels):
        if method == "lora":
            with model.disable_adapter():
                return log_probs_of(model, ids, labels)
        return log_probs_of(model, ids, labels).detach()

    [order] = epoch_steps(num_rows, 4, args.seed)
    stage_loss(model, reference, rows, base, stage, order).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.deepspeed
def test_gradients_are_those_of_the_definition_however_cut(tiny_checkpoint, tmp_path):
    check_cuts(tiny_checkpoint, tmp_path, num_ranks=1, num_rows=4)


@pytest.mark.slow
@pytest.mark.deepspeed
def test_gradients_are_those_of_the_definition_on_two_ranks(tiny_checkpoint, tmp_path):
    check_cuts(tiny_checkpoint, tmp_path, num_ranks=2, num_rows=3)


def test_kto_partners_are_a_function_of_the_step(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint(ARCH["lora"], **SIZES)
    grouped = singles(load(write_stage_rows(tmp_path / "rows.json", "kto", 6), base, "kto"))
    assert grouped.is_desirable.tolist() == [False, True, True, False, True, True]
    found = kto.partners(grouped, [4, 0, 3])
    assert {row: key for row, (key, _) in found.items()} == {4: (4, 3), 0: (0, 4), 3: (3, 0)}
    assert [key for key, _ in kto.partners(grouped, [0]).values()] == [(0, 5)]  # 一步只有一行：不配自己的
    answers = [row[0] for row in encoded_answers(tmp_path / "rows.json", base, "kto")]
    for row, ((_, other), sample) in found.items():
        src, tgt = answers[row].input_ids[: answers[row].num_src_tokens], answers[other].input_ids
        assert sample.input_ids.tolist() == [*src, *tgt[answers[other].num_src_tokens :]]
        assert sample.num_targets == int(np.sum(sample.labels != IGNORE_INDEX)) == len(sample.input_ids) - len(src)


def test_drop_duplicates_keeps_rows_that_differ_in_rejected_or_label(tmp_path, tiny_checkpoint):
    base, rows = tiny_checkpoint(ARCH["lora"], **SIZES), tmp_path / "rows.json"
    votes = [{"prompt": "问", "completion": "答", "label": label} for label in (False, True, True)]
    pairs_ = [{"prompt": "问", "chosen": "好", "rejected": bad} for bad in ("坏", "差", "差")]
    for stage, lines, expected in (("kto", votes, [1, 2]), ("dpo", pairs_, [1, 1, 2, 2])):
        rows.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        assert load(rows, base, stage, drop_duplicates=True).lines == expected


def test_the_report_counts_rows_of_pairs(tmp_path, tiny_checkpoint):
    rows = tmp_path / "rows.json"
    lines = [("好" * 99, "坏"), ("好", ""), ("", "坏")]
    lines = [{"prompt": "问", "chosen": chosen, "rejected": rejected} for chosen, rejected in lines]
    rows.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    report = load(rows, tiny_checkpoint(ARCH["lora"], **SIZES), "dpo").report()
    counts = ("文件 3 行，样本 6 条（3 行的）", "空输出 2（", "src 0 条，tgt 1 条")
    assert [expected for expected in counts if expected not in report] == []


@pytest.mark.parametrize("packing", [True, False])
def test_tokens_and_places_of_a_step_of_pairs(tmp_path, tiny_checkpoint, packing):
    base, prompt = tiny_checkpoint(ARCH["lora"], **SIZES), "提示很长" * 6
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in files:
        line = {"prompt": prompt, "chosen": "好的", "rejected": "坏"}
        path.write_text(json.dumps(line, ensure_ascii=False), encoding="utf-8")
    grouped = pairs(BaichuanDataSet.join([load(path, base, "dpo") for path in files]))
    loader = StepLoader(
        grouped, batch_size=2, max_len=grouped.max_len, seed=None, pad_token_id=0, packing=packing, with_samples=True
    )
    [step] = loader.epoch(0)
    assert step.rows == [(str(path), 1) for path in files]
    whole = sum(len(sample.input_ids) for index in range(2) for sample in grouped[index])
    shared = sum(sample.num_src_tokens - 1 for index in range(2) for sample in grouped[index][:1])
    assert step.num_tokens == whole - shared * packing > 0


class Bare:
    """没有 DeepSpeed 的引擎：模型本身。"""

    def __init__(self, model):
        self.module, self.device = model, torch.device("cpu")

    def __call__(self, **batch):
        return self.module(**batch)


def test_the_loss_of_a_kto_evaluation_does_not_depend_on_the_batches(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint(ARCH["lora"], **SIZES)
    rows = write_stage_rows(tmp_path / "rows.json", "kto", 7)
    grouped = singles(load(rows, base, "kto"))
    args = parse_args(stage_flags("kto", rows, base, tmp_path / "out", "full"))
    model = build_model(args, load_config(base), "fp32", {}).eval()
    objective, found = kto.KtoLoss(args), []
    every = [(row, other) for row in range(7) for other in range(7)]
    grouped.reference = {key: -30.0 - 3 * index for index, key in enumerate([*range(7), *every])}
    for batch_size in (1, 3, 7):
        loader = StepLoader(
            grouped, batch_size=batch_size, max_len=96, seed=None, pad_token_id=0, packing=True, with_samples=True,
            partners=objective.eval_partners,
        )  # fmt: skip
        with torch.no_grad():
            found.append(objective.evaluate(Bare(model), loader, lambda: False, Mock()))
    assert found[0]["kl"] > 0
    assert found[1] == pytest.approx(found[0], abs=1e-5) and found[2] == pytest.approx(found[0], abs=1e-5)
    bad = [json.dumps({"prompt": "问", "completion": "答", "label": False})] * 2
    rows.write_text("\n".join(bad), encoding="utf-8")
    args.eval_metric = "nll"
    with pytest.raises(ValueError, match="评估数据没有 label 是 true 的行"):
        kto.KtoLoss(args).start(None, [grouped, singles(load(rows, base, "kto"))], 0)


def test_added_words_keep_the_reference_of_the_first_step(tmp_path, tiny_checkpoint):
    """新词的行也在训练，关掉 LoRA 不是起点的模型：参考的对数概率先算好。"""
    rows, base = tmp_path / "rows.json", tiny_checkpoint(ARCH["lora"], **SIZES)
    words = tmp_path / "words.txt"
    words.write_text("新词\n", encoding="utf-8")
    flags = stage_flags("dpo", rows, base, tmp_path / "out", "lora")
    assert TASKS["dpo"].open(parse_args(flags)).is_live
    assert not TASKS["dpo"].open(parse_args([*flags, "--add_tokens", str(words)])).is_live


@pytest.mark.parametrize(("label", "missing"), [(True, "没有不好的回答可比"), (False, "没有好的回答可比")])
def test_kto_says_when_every_label_is_the_same(tmp_path, tiny_checkpoint, capsys, label, missing):
    rows, base = tmp_path / "rows.json", tiny_checkpoint(ARCH["lora"], **SIZES)
    for labels, expected in (([label, label], True), ([label, not label], False)):
        lines = [json.dumps({"prompt": "问", "completion": "答", "label": one}) for one in labels]
        rows.write_text("\n".join(lines), encoding="utf-8")
        grouped = singles(load(rows, base, "kto"))
        loss = kto.KtoLoss(parse_args(stage_flags("kto", rows, base, tmp_path / "out", "lora")))
        loss.start(None, [grouped], 0)
        assert (missing in capsys.readouterr().out) == expected


# ---- 训练 ----


@pytest.mark.deepspeed
def test_the_first_loss_is_ln_2_for_every_method(tiny_checkpoint, tmp_path):
    """新的与接着训练的适配器、算好的参考；每种都是 ln 2，ptuning 的参考是它自己的起点。"""
    rows = write_stage_rows(tmp_path / "rows.json", "dpo", 5)
    base, other = tiny_checkpoint("baichuan2-7b", **SIZES), tiny_checkpoint("baichuan2-13b", **SIZES)
    tasks = {}
    for method in ("lora", "full", "freeze", "ptuning"):
        used = other if method == "ptuning" else base
        flags = stage_flags("dpo", rows, used, tmp_path / method, method, eval_path=rows, num_train_epochs=1)
        tasks[method] = {"flags": [*flags, *FLAGS.get(method, [])]}
    again = stage_flags("dpo", rows, base, tmp_path / "again", "lora", adapter_path=tmp_path / "lora/epoch-1-step-2")
    tasks["again"] = {"flags": again}
    results = run_tasks(tmp_path, tasks, 1)
    assert {name: result["code"] for name, result in results.items()} == dict.fromkeys(tasks, 0), results
    again = json.loads((tmp_path / "again" / "run_config.json").read_text(encoding="utf-8"))
    started = str(tmp_path / "lora/epoch-1-step-2")
    assert again["chain"] == [{"task": "dpo", "train_type": "lora", "path": started}]
    for name in tasks:
        records = records_of(tmp_path / name)
        first = records[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), name
        assert [first[key] for key in ("margin", "reward_chosen", "kl")] == pytest.approx([0, 0, 0], abs=2e-5)
        assert records[1]["loss"] < first["loss"] - 1e-3, name
        if name != "again":
            [held] = [record for record in records if "eval/loss" in record]
            assert {*held} >= {f"eval/{key}" for key in ("nll", "accuracy", "margin", "kl", "reward_chosen")}
            assert held["eval/loss"] < math.log(2)
            best = json.loads((tmp_path / name / "best.json").read_text(encoding="utf-8"))
            assert (best["metric"], best["score"]) == ("loss", held["eval/loss"])
            summary = json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8"))
            assert "--metric" not in summary["next"]


def check_resuming(tiny_checkpoint, directory: Path, cases: list[tuple[str, str]]):
    """从一轮中间的检查点接着走，与没有打断的逐位相同，记下的各项也是。"""
    whole, again = {}, {}
    for stage, method in cases:
        rows = write_stage_rows(directory / f"{stage}.json", stage, 13)
        options = {"eval_path": rows, "save_model_step": 3, "show_loss_step": 2}
        if stage == "pretrain":
            options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        name = f"{stage}-{method}"
        flags = stage_flags(stage, rows, tiny_checkpoint(ARCH[method], **SIZES), directory / name, method, **options)
        whole[name] = {"flags": flags}
        cut = [word.replace(str(directory / name), str(directory / f"{name}-cut")) for word in flags]
        again[name] = {
            "flags": [*cut, "--resume", "auto"],
            "copy": [str(directory / f"{name}-start"), str(directory / f"{name}-cut")],
        }
    results = run_tasks(directory, whole, 1)
    assert {name: result["code"] for name, result in results.items()} == dict.fromkeys(whole, 0), results
    for name in whole:
        cut_after(Path(shutil.copytree(directory / name, directory / f"{name}-start")), 3)
    (directory / "again").mkdir()
    results = run_tasks(directory / "again", again, 1)
    assert {name: result["code"] for name, result in results.items()} == dict.fromkeys(whole, 0), results
    for name in whole:
        assert "resume: step 3 from" in results[name]["output"]
        saved = sorted(path.name for path in (directory / name).glob("epoch-*"))
        assert len(saved) >= 4
        for checkpoint in saved:
            assert_same_bits(directory / f"{name}-cut" / checkpoint, directory / name / checkpoint)
        assert records_of(directory / f"{name}-cut") == records_of(directory / name)


@pytest.mark.deepspeed
def test_resumed_from_the_middle_of_an_epoch_is_bit_equal(tiny_checkpoint, tmp_path):
    check_resuming(tiny_checkpoint, tmp_path, [("pretrain", "lora"), ("dpo", "lora"), ("kto", "full")])


@pytest.mark.slow
@pytest.mark.deepspeed
def test_every_stage_resumes_bit_equal(tiny_checkpoint, tmp_path):
    check_resuming(tiny_checkpoint, tmp_path, [(stage, method) for stage in STAGES for method in ARCH])


# ---- 参数 ----


@pytest.mark.parametrize(
    ("task", "flags", "named"),
    [
        ("sft", ["--beta", "0.1"], "--beta"),
        ("orpo", ["--label_smoothing", "0.1"], "--label_smoothing"),
        ("dpo", ["--simpo_gamma", "1"], "--simpo_gamma"),
        ("kto", ["--sft_weight", "1"], "--sft_weight"),
        ("dpo", ["--beta", "0"], "--beta(0.0)"),
        ("dpo", ["--loss_turns", "last"], "--loss_turns"),
        ("kto", ["--document_bos"], "--document_bos"),
        ("dpo", ["--cache_frozen", "memory"], "--cache_frozen memory"),
        ("dpo", ["--replay_path", "x", "--replay_ratio", "0.1"], "--replay_path"),
        ("dpo", ["--eval_path", "x", "--eval_metric", "rouge"], "--eval_metric rouge"),
        ("sft", ["--eval_path", "x", "--eval_metric", "loss"], "--eval_metric loss"),
        ("pretrain", ["--document_overlap", "96"], "--document_overlap(96)"),
    ],
)
def test_a_flag_that_does_nothing_for_the_stage_is_an_error(tmp_path, tiny_checkpoint, task, flags, named):
    base = tiny_checkpoint(ARCH["lora"], **SIZES)
    rows = write_stage_rows(tmp_path / "rows.json", task if task in STAGES else "pretrain", 3)
    args = parse_args([*stage_flags(task, rows, base, tmp_path / "out", "full"), *flags])
    assert any(named in problem for problem in early_problems(args))


def test_defaults_follow_the_stage(tmp_path):
    def parsed(*flags):
        return parse_args(["--train_path", "x", "--model_name_or_path", "y", "--output_dir", "z", *flags])

    assert {stage: parsed("--task", stage).beta for stage in ("sft", *STAGES)} == {
        **{"sft": None, "pretrain": None, "dpo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}
    }
    dpo, sft = parsed("--task", "dpo"), parsed()
    assert (dpo.lora_dropout, dpo.eval_metric, sft.lora_dropout, sft.eval_metric) == (0.0, "loss", 0.1, "nll")
    assert dpo.learning_rate == pytest.approx(sft.learning_rate / 20)
    assert parsed("--task", "dpo", "--beta", "0.3", "--lora_dropout", "0.2").beta == 0.3
