"""forgetting.py、general_text.py：与直接装两个模型算出的值相同；重放的选取写死；真实的训练写出 forgetting.json。"""

import json
from pathlib import Path

import pytest
import torch
from launching import run_tasks
from paths import ROOT
from peft import PeftModel
from train_runs import DS_FILES, SIZES
from transformers import AutoModelForCausalLM

from baichuan import BaichuanTokenizer
from data_set import BaichuanDataSet
from finetune.cli.train_flags import parse_args
from finetune.data import plain_text as general_text
from finetune.data.plain_text import encode_pieces, general_pieces, read_texts, replay_pieces, replay_share
from utils import read_json, write_json

METHODS = {
    "freeze": ("baichuan-13b", ["--freeze_module_name", "layers.1.,lm_head"]),
    "lora": ("baichuan2-7b", ["--lora_module_name", "all-linear"]),
    "ptuning": ("baichuan2-7b", ["--ptuning_version", "1", "--prefix_hidden_size", "24"]),
    "full": ("baichuan-7b", []),
}
SENTENCES = [
    "清晨的港口停着许多渔船，海鸥在桅杆之间盘旋。",
    "图书馆新到了一批讲天文的书，孩子们围着看土星的照片。",
    "好",
    "",
    "春天一到，山坡上的茶园就忙起来，采茶的人一直干到太阳落山，晚上还要炒茶。",
    "火车晚点四十分钟，站台上的人陆续散开。",
    "他把旧收音机拆开，发现只是一根电线松了。",
]


@pytest.fixture(scope="module")
def general(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("general") / "general.txt"
    path.write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return BaichuanTokenizer.from_pretrained(tiny_checkpoint("baichuan2-7b", **SIZES))


# ---------------------------------------------------------------------------------------------------------------------
# 读与切


def test_read_texts_keeps_line_numbers(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeff 一\r\n\n二\u2028三 \n".encode())
    assert read_texts(path) == [(1, "一"), (3, "二\u2028三")]


def test_read_texts_rejects(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"text\.txt 不是 UTF-8 编码.*请另存为 UTF-8"):
        read_texts(path)
    path.write_text(" \n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="里只有空白"):
        read_texts(path)


def test_pieces_are_every_token_once(general, tokenizer):
    texts = read_texts(general)
    pieces = list(encode_pieces(texts, tokenizer, max_len=8, seed=3))
    assert pieces == list(encode_pieces(texts, tokenizer, max_len=8, seed=3))
    assert [piece.line for piece in pieces] != [p.line for p in encode_pieces(texts, tokenizer, max_len=8, seed=4)]
    assert max(len(piece.input_ids) for piece in pieces) == 8
    for line, text in texts:
        ids = tokenizer.encode_plain(text)
        found = [token for piece in pieces if piece.line == line for token in piece.input_ids]
        assert found == (ids if len(ids) % 8 != 1 else ids[:-1])
    assert all(piece.labels == piece.input_ids and piece.num_targets == len(piece.labels) - 1 for piece in pieces)


def test_replay_repeats_when_there_is_too_little(general, tokenizer):
    with pytest.raises(ValueError, match="--replay_ratio 太小"):
        replay_pieces(general, tokenizer, 512, seed=1, num_samples=0)
    few = replay_pieces(general, tokenizer, 512, seed=1, num_samples=4)
    many = replay_pieces(general, tokenizer, 512, seed=1, num_samples=13)
    assert few == many[:4]
    distinct = len({piece.line for piece in many})
    assert distinct == len([text for text in SENTENCES if len(tokenizer.encode_plain(text)) > 1])
    assert many[distinct:] == many[: 13 - distinct]


def test_general_pieces_leave_out_what_is_replayed(general, tokenizer, tmp_path, monkeypatch, capsys):
    replay = tmp_path / "replay.txt"
    replay.write_text("\n".join(SENTENCES[:2]), encoding="utf-8")
    lines = {piece.line for piece in general_pieces(general, tokenizer, 512, replay)}
    assert lines.isdisjoint({1, 2})
    told = f"通用文字 {general}：6 行里有 2 行 --replay_path 里也有，不用来衡量遗忘，余 4 行\n"
    assert capsys.readouterr().out == told
    general_pieces(general, tokenizer, 512)
    assert capsys.readouterr().out == ""
    assert {5, 6, 7} <= lines
    with pytest.raises(ValueError, match="没有可用的行"):
        general_pieces(replay, tokenizer, 512, general)
    monkeypatch.setattr(general_text, "GENERAL_TOKENS", 30)
    assert sum(piece.num_targets for piece in general_pieces(general, tokenizer, 8)) in range(23, 31)


def test_appended_samples_join_the_data_set(general, tokenizer):
    options = {"max_len": 96, "max_src_len": 64, "prompt_format": "plain"}
    data_set = BaichuanDataSet(ROOT / "data" / "cls_1.json", tokenizer, **options)
    before, first = len(data_set), data_set[0]
    pieces = replay_pieces(general, tokenizer, 96, seed=1, num_samples=3)
    data_set.append(pieces, str(general))
    assert len(data_set) == before + 3 == len(data_set.paths) == len(data_set.offsets) - 1
    assert data_set.paths[before - 1 :] == [str(ROOT / "data" / "cls_1.json"), *[str(general)] * 3]
    assert data_set[0].input_ids.tolist() == first.input_ids.tolist()
    for index, piece in enumerate(pieces, start=before):
        assert data_set[index].input_ids.tolist() == list(piece.input_ids) == data_set[index].labels.tolist()
        assert (data_set.lines[index], data_set.num_targets[index]) == (piece.line, len(piece.input_ids) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# 真实的训练


def expected_numbers(base_path: Path, checkpoint: Path, pieces) -> tuple[float, float, float]:
    """不用本项目的评估：装两个模型，逐条算 (基座的 NLL, 现在的 NLL, KL)。"""
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32).eval()
    if (checkpoint / "adapter_config.json").is_file():
        tuned = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
        tuned = PeftModel.from_pretrained(tuned, checkpoint).eval()
    else:
        tuned = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for piece in pieces:
        ids = torch.tensor([piece.input_ids])
        with torch.no_grad():
            logits = [m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (base, tuned)]
        first, second = (row[0, -ids.shape[1] : -1].double().log_softmax(-1) for row in logits)
        targets = ids[0, 1:, None]
        sums[0] -= first.gather(1, targets).sum()
        sums[1] -= second.gather(1, targets).sum()
        sums[2] += (first.exp() * (first - second)).sum()
    return tuple((sums / sum(piece.num_targets for piece in pieces)).tolist())


def flags_of(base: Path, output: Path, rows: Path, zero: str, method: str, *more) -> list[str]:
    flags = [
        *("--train_path", rows, "--model_name_or_path", base, "--output_dir", output, "--ds_file", DS_FILES[zero]),
        *("--train_type", method, "--max_len", 96, "--max_src_len", 64, "--precision", "fp32"),
        *("--learning_rate", "2e-2", "--warmup_ratio", 0, "--num_train_epochs", 1, "--show_loss_step", 1),
        *("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, *METHODS[method][1], *more),
    ]
    return [str(flag) for flag in flags]


def losses_of(output: Path) -> list[tuple[int, float, float]]:
    lines = (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records if "loss" in record]


def check_methods(tiny_checkpoint, general, directory: Path, methods: list[str], zero: str, num_ranks: int):
    """各方法：数与两个模型直接算出的相同；训练曲线与不衡量遗忘时逐位相同。"""
    rows = directory / "rows.json"
    lines = (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[:9]
    rows.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    tasks = {}
    for method in methods:
        base = tiny_checkpoint(METHODS[method][0], **SIZES)
        tasks[method] = {
            "flags": flags_of(
                base, directory / method, rows, zero, method,
                "--general_path", general, "--forgetting_threshold", "0.01" if method == "full" else "9",
            )
        }  # fmt: skip
        tasks[f"{method}-plain"] = {"flags": flags_of(base, directory / f"{method}-plain", rows, zero, method)}
    results = run_tasks(directory, tasks, num_ranks)
    assert {name: result["code"] for name, result in results.items()} == dict.fromkeys(tasks, 0), results
    for method in methods:
        base = tiny_checkpoint(METHODS[method][0], **SIZES)
        pieces = general_pieces(general, BaichuanTokenizer.from_pretrained(base), 96)
        [checkpoint] = (directory / method).glob("epoch-*")
        before, after, kl = expected_numbers(base, checkpoint, pieces)
        found = read_json(directory / method / "forgetting.json")
        assert list(found) == [
            "general_nll_before", "general_nll_after", "kl", "tokens", "threshold", "is_forgetting",
        ]  # fmt: skip
        assert found["tokens"] == sum(piece.num_targets for piece in pieces)
        assert found["general_nll_before"] == pytest.approx(before, rel=1e-5)
        assert found["general_nll_after"] == pytest.approx(after, rel=1e-5)
        assert found["kl"] == pytest.approx(kl, rel=1e-2, abs=2e-5) and kl > 1e-3
        assert found["is_forgetting"] is (after - before > found["threshold"])
        assert ("有遗忘" in results[method]["output"]) is found["is_forgetting"]
        assert losses_of(directory / method) == losses_of(directory / f"{method}-plain")


@pytest.mark.deepspeed
def test_numbers_of_two_models_zero2(tiny_checkpoint, general, tmp_path):
    check_methods(tiny_checkpoint, general, tmp_path, ["ptuning", "full"], "zero2", num_ranks=1)
    verdicts = [read_json(tmp_path / method / "forgetting.json")["is_forgetting"] for method in ("ptuning", "full")]
    assert verdicts == [False, True]


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("zero", DS_FILES)
def test_numbers_of_two_models_on_two_ranks(tiny_checkpoint, general, tmp_path, zero):
    check_methods(tiny_checkpoint, general, tmp_path, list(METHODS), zero, num_ranks=2)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_replay_by_tokens_gives_the_asked_share(general, tokenizer, share):
    pieces = replay_share(general, tokenizer, 32, seed=1, num_targets=2000, share=share)
    replayed = sum(piece.num_targets for piece in pieces)
    assert replayed / (replayed + 2000) == pytest.approx(share, abs=16 / 2000)
    assert pieces[:2] == replay_pieces(general, tokenizer, 32, seed=1, num_samples=2)  # 同样由 seed 选定


def test_a_share_below_one_piece_is_refused(general, tokenizer):
    with pytest.raises(ValueError, match=r"--replay_ratio 0\.1 只合 1 个目标 token"):
        replay_share(general, tokenizer, 32, seed=1, num_targets=10, share=0.1)


def test_an_old_run_resumes_by_rows(tmp_path):
    flags = ["--train_path", "x", "--model_name_or_path", "m", "--output_dir", str(tmp_path)]
    flags += ["--replay_path", "r", "--replay_ratio", "0.5"]
    assert parse_args(flags).replay_by == "tokens"
    assert parse_args([*flags, "--resume", "auto"]).replay_by == "tokens"  # 还没有检查点
    (tmp_path / "epoch-1-step-3").mkdir()
    for recorded, expected in (({}, "rows"), ({"replay_by": "tokens"}, "tokens")):
        write_json(tmp_path / "epoch-1-step-3" / "run_config.json", {"args": recorded})
        assert parse_args([*flags, "--resume", "auto"]).replay_by == expected
        assert parse_args([*flags, "--resume", str(tmp_path / "epoch-1-step-3")]).replay_by == expected
    assert parse_args([*flags, "--resume", "auto", "--replay_by", "rows"]).replay_by == "rows"
    assert parse_args(flags[:6]).replay_by == "rows"  # 不重放：与旧的记录相同
