"""几个文件与份量、按文档留出评估集、相近的文档。"""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan import BaichuanTokenizer
from data_set import BaichuanDataSet
from finetune.data import documents
from finetune.data.documents import SHINGLE, hold_out, near_groups
from finetune.data.mixture import Source, describe_sources, hold_out_rows, mix, parse_sources, weighted_indices
from finetune.data.samples import RowOptions
from finetune.tasks.registry import TASKS


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return BaichuanTokenizer.from_pretrained(tiny_checkpoint("baichuan2-7b"))


def write(path: Path, inputs: list[str]) -> str:
    rows = [{"instruction": "抽取：", "input": text, "output": f"答{i}"} for i, text in enumerate(inputs)]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")  # 一行的数组：各行的行号相同
    return str(path)


def load(path: str, tokenizer) -> BaichuanDataSet:
    return BaichuanDataSet(path, tokenizer, prompt_format="chat", max_len=96, max_src_len=64)


def preferences(path: Path, tokenizer, count: int, **options) -> BaichuanDataSet:
    rows = [{"prompt": f"问{i}", "chosen": f"好{i}" * (i + 1), "rejected": "坏"} for i in range(count)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    options = {"prompt_format": "chat", "max_len": 96, "max_src_len": 64, **options}
    return BaichuanDataSet(path, tokenizer, row_options=RowOptions(task="dpo"), **options)


# ---- 来历 ----


def test_weights_are_read_from_the_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c*2").write_text("x", encoding="utf-8")
    assert parse_sources("a.json") == [Source("a.json", 1.0)]
    assert parse_sources(["a.json", "b.json*0.5", "c*2", "d*3"]) == [
        *(Source("a.json"), Source("b.json", 0.5), Source("c*2"), Source("d", 3.0)),
    ]
    with pytest.raises(ValueError, match=r"b\*0 的份量必须大于 0"):
        parse_sources(["a", "b*0"])
    (tmp_path / "s.json").write_text("x", encoding="utf-8")
    for wrong in ("s.json*0.5x", "s.json*", "s.json*-1", "s.json*1e-1"):
        with pytest.raises(ValueError, match=re.escape(f"--train_path {wrong} 的份量 ") + r".*请写成 s\.json\*0\.5"):
            parse_sources(wrong)
    with pytest.raises(ValueError, match=r"里 .*a 出现了两次"):
        parse_sources(["a", "./a*2"])


@pytest.mark.parametrize(("weight", "num_pairs"), [(0.5, 5), (2.3, 23)])
def test_a_weight_keeps_the_two_answers_of_a_row_together(tokenizer, tmp_path, weight, num_pairs):
    path = tmp_path / "pairs.json"
    data_set = preferences(path, tokenizer, 10)
    mixed, _ = mix([data_set], [Source(str(path), weight)], seed=1, width=TASKS["dpo"].width)
    assert len(mixed) == 2 * num_pairs
    grouped, texts = TASKS["dpo"].group(mixed), tokenizer.decode
    assert len(grouped) == num_pairs
    for good, bad in grouped:
        number = good.line - 1
        assert bad.line == good.line
        assert f"好{number}" * (number + 1) in texts(good.input_ids) and "坏" in texts(bad.input_ids)


def test_a_row_with_one_answer_too_long_is_left_out_as_a_pair(tokenizer, tmp_path):
    data_set = preferences(tmp_path / "pairs.json", tokenizer, 10, max_len=16, max_src_len=12, is_skip=True)
    lines = data_set.lines
    assert 0 < len(lines) < 20 and lines[::2] == lines[1::2]


def test_one_plain_file_is_described_by_itself():
    assert describe_sources([Source("a")], str.upper) == "A"
    assert describe_sources([Source("a", 0.5)], str.upper) == "A*0.5"
    assert describe_sources([Source("a"), Source("b", 3)], str.upper) == ["A", "B*3"]


@pytest.mark.parametrize(
    ("weight", "counts"), [(0.5, {0: 5, 1: 5}), (2, {2: 10}), (1.3, {1: 7, 2: 3}), (0.04, {0: 10})]
)
def test_a_weight_takes_a_part_or_repeats(weight, counts):
    taken = Counter(weighted_indices(10, weight, seed=3, number=1).tolist())
    assert Counter(taken[i] for i in range(10)) == counts
    assert weighted_indices(10, weight, 3, 1).tolist() == weighted_indices(10, weight, 3, 1).tolist()
    assert weighted_indices(50, 0.5, 3, 1).tolist() != weighted_indices(50, 0.5, 4, 1).tolist()
    assert weighted_indices(50, 0.5, 3, 1).tolist() != weighted_indices(50, 0.5, 3, 2).tolist()


def test_a_mixture_holds_the_samples_of_its_files(tmp_path, tokenizer):
    paths = [write(tmp_path / f"{name}.json", [f"{name}{i}" * 3 for i in range(8)]) for name in "甲乙"]
    sources = [Source(paths[0], 2), Source(paths[1], 0.5)]
    parts = [load(path, tokenizer) for path in paths]
    mixed, held = mix(parts, sources, seed=1)
    assert held is None
    assert Counter(mixed.paths) == {paths[0]: 16, paths[1]: 4}
    for index in range(len(mixed)):
        part = parts[paths.index(mixed.paths[index])]
        original = part[int(mixed.rows[index])]
        assert mixed[index].input_ids.tolist() == original.input_ids.tolist()
        assert mixed[index].labels.tolist() == original.labels.tolist()
        assert mixed.num_targets[index] == original.num_targets
    alone, _ = mix(parts[:1], [Source(paths[0])], seed=1)
    assert alone is parts[0]
    tiny = [Source(paths[0]), Source(paths[1], 0.01)]
    with pytest.raises(ValueError, match=re.escape(f"{paths[1]}*0.01 的份量太小，") + r"\d+ 行里没有取到一行"):
        mix(parts, tiny, seed=1)


# ---- 留出 ----

LONG = [f"第{n}号车怠速不稳，更换火花塞与点火线圈之后恢复正常，路试未再出现。" for n in "一二三"]
OTHERS = ["冬天空调不热，节温器卡在常开的位置。", "转向时左前轮异响，下摆臂胶套开裂。", "油耗升高。", "漏水。"]


def test_no_document_is_on_both_sides(tmp_path, tokenizer):
    texts = [*LONG, *OTHERS, OTHERS[0].replace("，", ", "), OTHERS[3]] * 2
    first, second = write(tmp_path / "a.json", texts[:9]), write(tmp_path / "b.json", texts[9:])
    sources = [Source(first), Source(second, 3)]
    for seed in range(6):
        held = hold_out_rows(sources, 0.25, seed, RowOptions())
        train_set, eval_set = mix([load(path, tokenizer) for path in (first, second)], sources, seed, held)
        assert 1 <= len(eval_set) <= 5
        groups = dict(zip(texts, near_groups(map(documents.plain_text, texts)), strict=True))
        sides = [
            {groups[texts[9 * (path == second) + row]] for path, row in zip(part.paths, part.rows, strict=True)}
            for part in (train_set, eval_set)
        ]
        assert not sides[0] & sides[1]
        assert sum(map(len, (mask[~mask] for mask in held.values()))) + len(eval_set) == len(texts)
    assert any(
        (hold_out([first], 0.3, a, RowOptions())[0] != hold_out([first], 0.3, b, RowOptions())[0]).any()
        for a, b in combinations(range(12), 2)
    )


def test_beyond_the_limit_only_equal_texts_are_one_document(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", [*LONG, OTHERS[0], OTHERS[0]])
    assert sum(hold_out([path], 0.9, 1, RowOptions())[0]) in (2, 3)
    monkeypatch.setattr(documents, "MAX_NEAR_ROWS", 2)
    for seed in range(5):
        (mask,) = hold_out([path], 0.4, seed, RowOptions())
        assert mask[3] == mask[4]
        assert sum(mask) == 2


def test_one_document_cannot_be_split(tmp_path):
    path = write(tmp_path / "a.json", LONG)
    with pytest.raises(ValueError, match=r"--val_ratio 0.5 留不出评估集：3 行只有 1 篇"):
        hold_out([path], 0.5, 1, RowOptions())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("甲乙丙", max_size=40), max_size=12), st.data())
def test_near_documents_are_those_that_share_more_than_half(texts, data):
    for _ in range(data.draw(st.integers(0, 6))):
        if texts:
            base = data.draw(st.sampled_from(texts))
            texts.append(base[: data.draw(st.integers(0, 40))] + data.draw(st.text("甲乙丙", max_size=6)))
    shingles = [{text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))} for text in texts]
    groups = list(range(len(texts)))
    for _ in texts:
        for i, j in combinations(range(len(texts)), 2):
            if len(shingles[i] & shingles[j]) > 0.5 * min(len(shingles[i]), len(shingles[j])):
                groups[i] = groups[j] = min(groups[i], groups[j])
    assert near_groups(texts) == groups
    assert np.all(np.array(groups) <= np.arange(len(texts)))
