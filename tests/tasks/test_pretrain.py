"""继续预训练：文档怎样读、怎样切、怎样装成块，损失等于 transformers 自己的；每个 token 恰好训练一次。"""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from train_runs import SIZES
from transformers import LlamaForCausalLM

from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from data_set import BaichuanDataSet
from finetune.data.grouping import blocks
from finetune.data.prompting import IGNORE_INDEX, encode_document
from finetune.data.rows import TEXT_UNITS, data_sha256, iter_rows
from finetune.data.samples import RowOptions, read_samples
from finetune.data.step_loader import StepLoader
from finetune.export.export import export

POEM = "床前明月光，\n疑是地上霜。\n\n  举头望明月，\n\n\n低头思故乡。\n"
ROWS = [
    {"text": POEM},
    {"instruction": "续写：", "output": "静夜思"},
    {"text": "白日依山尽，黄河入海流。" * 9, "id": 1},
]


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return tiny_checkpoint("baichuan2-7b", **SIZES)


@pytest.fixture(scope="module")
def tokenizer(base):
    return BaichuanTokenizer.from_pretrained(base)


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, tokenizer, **options) -> BaichuanDataSet:
    settings = {"prompt_format": "plain", "max_len": 24, "max_src_len": 16, **options}
    return BaichuanDataSet(path, tokenizer, **settings)


# ---- 读 ----


def test_what_a_document_of_a_text_file_is(tmp_path):
    path = tmp_path / "poem.txt"
    path.write_text(POEM, encoding="utf-8")
    found = {
        unit: [(row.line, json.loads(row.content)["text"]) for row in iter_rows(path, unit)] for unit in TEXT_UNITS
    }
    first, second, third, fourth = (line.strip() for line in POEM.split("\n") if line.strip())
    assert found == {
        "line": [(1, first), (2, second), (4, third), (7, fourth)],
        "blank": [(1, f"{first}\n{second}"), (4, third), (7, fourth)],
        "file": [(1, POEM.strip())],
    }
    with gzip.open(tmp_path / "poem.txt.gz", "wb") as stream:
        stream.write(POEM.encode())
    assert [row.line for row in iter_rows(tmp_path / "poem.txt.gz")] == [1, 2, 4, 7]


def test_a_directory_is_its_text_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, text in (("b.txt", "乙一\n乙二\n"), ("a.txt", "甲\n"), ("deep/c.txt", "丙"), ("note.md", "不读")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    samples = read_samples(tmp_path)
    assert [(sample.document, sample.line) for sample in samples] == [("甲", 1), ("乙一", 2), ("乙二", 3), ("丙", 4)]
    before = data_sha256(tmp_path)
    (tmp_path / "a.txt").write_text("改\n", encoding="utf-8")
    assert data_sha256(tmp_path) != before
    (tmp_path / "deep" / "c.txt").write_bytes("好\n坏".encode("gb18030") + b"\n")
    with pytest.raises(ValueError, match=r"deep/c\.txt.*GB18030"):
        read_samples(tmp_path)


def test_the_report_names_the_files_of_a_directory_that_are_not_read(tmp_path, tiny_checkpoint):
    texts = tmp_path / "texts"
    (texts / "deep").mkdir(parents=True)
    (texts / "a.txt").write_text("甲\n", encoding="utf-8")
    tokenizer = BaichuanTokenizer.from_pretrained(tiny_checkpoint("baichuan2-7b"))
    assert "没有读" not in load(texts, tokenizer).report()
    (texts / "deep" / "rows.json").write_text("[]", encoding="utf-8")
    assert "  目录里只读 .txt，没有读另外的 1 个文件：deep/rows.json\n" in load(texts, tokenizer).report()
    for name in "bcd":
        (texts / f"{name}.md").write_text("不读", encoding="utf-8")
    assert "另外的 4 个文件：b.md、c.md、d.md……\n" in load(texts, tokenizer).report()


def test_json_lines_in_a_text_file_are_still_rows(tmp_path):
    path = write(tmp_path / "rows.txt", ROWS)
    assert [sample.format for sample in read_samples(path)] == ["text", "instruction/input/output", "text"]


@pytest.mark.parametrize(
    ("task", "row", "place"),
    [
        ("sft", {"prompt": "问", "chosen": "好", "rejected": "坏"}, "chosen"),
        ("pretrain", {"prompt": "问", "chosen": "好", "rejected": "坏"}, "chosen"),
        ("pretrain", {"text": " "}, "text"),
        ("pretrain", {"text": 3}, "text"),
        ("sft", {"prompt": "问", "response": "好", "label": True}, "label"),
        ("dpo", {"text": "全文"}, "text"),
        ("dpo", {"prompt": "问", "response": "答"}, "prompt"),
        ("simpo", {"messages": [{"role": "user", "content": "问"}]}, "messages"),
        ("orpo", {"instruction": "问", "output": "答"}, "instruction"),
        ("kto", {"prompt": "问", "response": "答"}, "label"),
        ("kto", {"prompt": "问", "response": "答", "label": "好"}, "label"),
        ("kto", {"prompt": "问", "chosen": "好", "rejected": "坏"}, "chosen"),
    ],
)
def test_rows_of_another_stage_are_errors_that_name_the_stage(tmp_path, task, row, place):
    path = write(tmp_path / "rows.json", [row])
    with pytest.raises(ValueError, match=rf"rows\.json:1: {place}: ") as error:
        read_samples(path, options=RowOptions(task=task))
    assert (place == "text" and task == "pretrain") or f"--task {task} " in str(error.value)


# ---- 切与装 ----


@pytest.mark.parametrize("overlap", [0, 3])
@pytest.mark.parametrize("add_bos", [False, True])
def test_every_token_of_a_long_document_is_a_target_once(tokenizer, overlap, add_bos):
    text = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。" * 3
    ids = [*[tokenizer.bos_token_id] * add_bos, *tokenizer.encode_plain(text), tokenizer.eos_token_id]
    pieces = encode_document(text, tokenizer, 10, overlap, add_bos)
    assert len(pieces) > 3 and all(len(piece.input_ids) <= 10 for piece in pieces)
    begin, targets = 0, []
    for piece in pieces:
        assert piece.input_ids == ids[begin : begin + 10]
        kept = [begin + i for i, label in enumerate(piece.labels) if i and label != IGNORE_INDEX]
        assert [ids[place] for place in kept] == [label for label in piece.labels[1:] if label != IGNORE_INDEX]
        assert piece.num_targets == len(kept)
        targets += kept
        begin += 10 - overlap
    cuts = [] if overlap else range(10, len(ids), 10)  # 没有上文的 token
    assert targets == [place for place in range(1, len(ids)) if place not in cuts]


def test_blocks_hold_every_document_once_and_see_only_themselves(tmp_path, tokenizer):
    texts = [f"第{i}篇：" + "山" * (i % 17) for i in range(60)]
    path = write(tmp_path / "rows.json", [{"text": text} for text in texts])
    grouped = blocks(load(path, tokenizer))
    assert sum(len(grouped[i]) for i in range(len(grouped))) == len(grouped.data_set) >= 60
    assert max(grouped.lengths) <= 24 and len(grouped) < len(grouped.data_set)
    loader = StepLoader(grouped, batch_size=2, gradient_accumulation_steps=2, max_len=24, seed=3)
    seen = Counter()
    for step in loader.epoch(1):
        assert step.num_tokens == sum(sum(micro["document_lengths"]) for micro in step.micro_batches)
        for micro in step.micro_batches:
            assert set(micro["document_parents"]) == {-1} and sum(micro["document_lengths"]) <= 2 * 24
            seen.update(tuple(ids.tolist()) for ids in micro["input_ids"][0].split(micro["document_lengths"]))
    assert seen == Counter(tuple(sample.input_ids.tolist()) for sample in grouped.data_set)


def test_on_disk_and_in_memory_are_the_same(tmp_path, tokenizer):
    path = write(tmp_path / "rows.json", ROWS)
    here, there = load(path, tokenizer), load(path, tokenizer, spool_dir=tmp_path / "spool")
    cached = [load(path, tokenizer, cache_dir=tmp_path / "cache") for _ in range(2)][1]
    for other in (there, cached):
        assert isinstance(other._sources[0]["input_ids"], np.memmap)
        assert [[item.tolist() for item in one[:2]] for one in here] == [
            [item.tolist() for item in one[:2]] for one in other
        ]
    assert list((tmp_path / "spool").iterdir()) == []
    assert here.statistics["formats"] == {"text": 2, "instruction/input/output": 1}


# ---- 损失 ----


def test_loss_equals_that_of_transformers_on_the_same_blocks(tmp_path, base, tokenizer):
    path = write(tmp_path / "rows.json", ROWS)
    grouped = blocks(load(path, tokenizer, row_options=RowOptions(document_overlap=2)))
    export(base, "llama", tmp_path / "llama", dtype="float32")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    ours = BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    loader = StepLoader(grouped, batch_size=1, gradient_accumulation_steps=99, max_len=24, seed=1)
    [step] = loader.epoch(0)
    found = sum(ours(**micro, num_items_in_batch=step.num_items).loss for micro in step.micro_batches)
    total = sum(
        theirs(
            input_ids=torch.tensor(piece.input_ids.tolist())[None], labels=torch.tensor(piece.labels.tolist())[None]
        ).loss
        * piece.num_targets
        for index in range(len(grouped))
        for piece in grouped[index]
    )
    assert len(step.micro_batches) > 1
    assert found.item() == pytest.approx(total.item() / step.num_items, abs=1e-5)
