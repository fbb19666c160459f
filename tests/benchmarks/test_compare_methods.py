"""方法的比较：拆分与泄漏、计划与格子、打断之后接着做、统计、报告；一个慢测试真的做一遍玩具计划并在半途杀掉。"""

import base64
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from fontTools.ttLib import TTCollection, TTFont
from paths import ROOT

from benchmarks.comparison import base, base_size, dictionary, drills, phrases
from finetune.comparison import cells as compare_cells
from finetune.comparison import data as compare_data
from finetune.comparison import fonts
from finetune.comparison import plan as compare_plan
from finetune.comparison import report as compare_report
from finetune.comparison import run as compare_run
from finetune.comparison import statistics as compare_stats
from finetune.comparison.plan import Cell
from finetune.comparison.plots import draw_scores, set_up
from finetune.metrics.labels import label_f1
from scripts import compare_methods


def row(text, output="正面", instruction="判断："):
    return {"instruction": instruction, "input": text, "output": output}


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


# ---- 数据 ----


def test_split_keeps_documents_together():
    rows = [row(f"文档{index // 2}", output=f"问题{index}") for index in range(20)]
    parts = compare_data.split_by_document(rows, test=2, dev=3, pretrain=1, seed=5)
    documents = [{item["input"] for item in part} for part in parts]
    assert [len(part) for part in documents] == [2, 3, 1, 4]
    assert [len(part) for part in parts] == [2, 6, 2, 8]  # 测试部分一个文档一行
    assert len(set.union(*documents)) == 10
    assert all(isinstance(item["output"], list) and len(item["output"]) == 2 for item in parts.test)
    assert compare_data.split_by_document(rows, test=2, dev=3, pretrain=1, seed=5) == parts
    assert compare_data.split_by_document(rows, test=2, dev=3, pretrain=1, seed=6) != parts


def test_split_needs_enough_documents():
    with pytest.raises(ValueError, match=r"只有 3 个.*test 1、dev 1、pretrain 1"):
        compare_data.split_by_document([row(str(n)) for n in range(3)], 1, 1, 1, seed=0)


def test_leakage_is_found_whatever_the_width_and_spaces():
    parts = {"test": [row("ＡＢＣ 故障")], "train": [row("别的"), row("ABC故障")]}
    with pytest.raises(ValueError, match=r"extraction 的 train 第 2 行与 test 第 1 行.*ABC故障"):
        compare_data.check_leakage(parts, "extraction")
    assert compare_data.check_leakage({"test": [row("甲")], "train": [row("乙"), row("乙")]}, "x") == 2


DIGITS = "".join(map(str, range(100, 130)))
NEAR = "享有高寿的老人每天清晨散步半小时，午后读报写字，晚上九点准时睡觉，从不熬夜"


def test_near_duplicates_stay_on_one_side():
    texts = ["甲" * 30, NEAR + "（摘自《快乐老人报》）", "乙" * 30, NEAR[4:] + "扫一扫关注我们", "丙丙", "丙丙", "丙"]
    assert compare_data.near_groups(texts) == [0, 1, 2, 1, 4, 4, 6]
    # 各 20 个 12 字的片段：共用 10 个不算相近，11 个算；可以传递
    first, apart, near = DIGITS[:31], DIGITS[10:41], DIGITS[9:40]
    assert compare_data.near_groups([first, apart]) == [0, 1]
    assert compare_data.near_groups([first, near]) == [0, 0]
    assert compare_data.near_groups([first, DIGITS[18:49], "别的", near]) == [0, 0, 2, 0]
    parts = {"test": [row(NEAR + "。")], "train": [row("别的"), row(NEAR + "……转自网络")]}
    with pytest.raises(ValueError, match="generation 的 train 第 2 行与 test 第 1 行"):
        compare_data.check_leakage(parts, "generation")
    assert compare_data.without_near(["甲" * 40, NEAR, "丁"], [NEAR + "（转）", "甲" * 30]) == ["丁"]


def test_a_test_document_has_the_answers_of_one_document_only():
    rows = [row(NEAR, "问一"), row(NEAR, "问二"), row(NEAR + "（转载）", "问三"), row("别的文档", "问四")]
    parts = compare_data.split_by_document(rows, test=1, dev=0, pretrain=0, seed=3)
    (document,) = parts.test
    assert document in (row(NEAR, ["问一", "问二"]), row("别的文档", ["问四"]))
    assert len(parts.train) == (1 if document["input"] == NEAR else 3)
    assert compare_data.merge_document(rows[:3]) == row(NEAR, ["问一", "问二"])


def test_take_tokens_never_exceeds_the_budget():
    assert compare_data.take_tokens([10, 20, 30], 30) == 2
    assert compare_data.take_tokens([10, 20, 30], 60) == 3
    assert compare_data.take_tokens([10, 20, 30], 60, epochs=2) == 2
    with pytest.raises(ValueError, match=r"60 token × 1 遍.* 100 .*epochs.*train_tokens"):
        compare_data.take_tokens([10, 20, 30], 100)
    with pytest.raises(ValueError, match=r"10 token.* 5 .*train_tokens"):
        compare_data.take_tokens([10], 5)


def test_shuffled_labels_keep_the_distribution():
    rows = [row(str(n), "正面" if n % 2 else "负面") for n in range(40)]
    shuffled = compare_data.shuffled_labels(rows, seed=1)
    assert [item["input"] for item in shuffled] == [item["input"] for item in rows]
    assert sorted(item["output"] for item in shuffled) == sorted(item["output"] for item in rows)
    agreeing = sum(a["output"] == b["output"] for a, b in zip(rows, shuffled, strict=True))
    assert 10 <= agreeing <= 30


def test_held_out_text_is_the_end_without_lines_of_the_training_part(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("甲甲甲\n乙乙乙\n丙丙丙\n甲甲甲\n丁丁丁\n", encoding="utf-8")
    assert compare_data.split_text(path, 7) == (["甲甲甲", "乙乙乙"], ["丙丙丙", "丁丁丁"])
    path.write_text("甲甲甲\n乙乙乙\n甲甲甲\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text\.txt 末尾 3 字.*held_out_chars"):
        compare_data.split_text(path, 3)


def test_parts_of_a_task_are_written(tmp_path):
    path, directory = tmp_path / "rows.json", tmp_path / "parts"
    compare_data.write_rows(path, [*(row(f"文{n}", "答") for n in range(8)), row("长" * 6, "答"), row("文9", "太长")])
    task = {"name": "extraction", "path": str(path), "max_input_chars": 4, "max_output_chars": 1}
    counts = compare_data.prepare_task({**task, "test": 2, "dev": 1, "pretrain": 2}, 1, directory)
    assert counts == {"test": 2, "dev": 1, "pretrain": 2, "train": 3, "documents": 8}
    assert [len(compare_data.read_rows(directory / f"{part}.json")) for part in ("dev", "pretrain", "train")] == [
        1,
        2,
        3,
    ]


def test_the_base_sees_inputs_of_the_training_part_only(tmp_path):
    data = tmp_path / "data"
    for part, text in (
        ("test", "测试的文档"),
        ("dev", "验证的文档"),
        ("pretrain", "预训练的\n文档"),
        ("train", "训练的文档"),
    ):
        compare_data.write_rows(data / "extraction" / f"{part}.json", [row(text, "答案"), row(text, "又一个")])
    (data / "general_train.txt").write_text("通用的文字\n", encoding="utf-8")
    plan = {"tasks": [{"name": "extraction"}]}
    sources = base.text_sources(plan, data)
    found = {name: path.read_text(encoding="utf-8") for name, path in sources.items()}
    assert found == {"general": "通用的文字\n", "extraction": "训练的文档\n预训练的 文档\n"}
    drilled = {"count": 7, "chars": [3, 9], "texts": ["extraction"], "forms": {"copy": 1}}
    stage = {"name": "x", "texts": {"general": 0.5, "extraction": 3}, "drills": [drilled]}
    files = base.stage_files(stage, sources, tmp_path / "stage", 1, list)
    assert files == [
        f"{sources['general']}*0.5",
        f"{sources['extraction']}*3",
        str(tmp_path / "stage" / "drills-0.json"),
    ]
    made = compare_data.read_rows(tmp_path / "stage" / "drills-0.json")
    assert len(made) == 7 and {row_["output"] for row_ in made} <= {"训练的文档", "预训练的 文档"}
    assert base.stage_files(stage, sources, tmp_path / "again", 1, list)[:2] == files[:2]
    assert (tmp_path / "again" / "drills-0.json").read_bytes() == (tmp_path / "stage" / "drills-0.json").read_bytes()


def drill_texts():
    return [json.loads(line)["input"] for line in (ROOT / "data" / "d2q_0.json").read_text("utf-8").splitlines()[:40]]


TRIPLES = ("cut", "label", "pairs", "ends", "halves", "linked")


@pytest.mark.parametrize("form", drills.ALL_FORMS)
def test_drills_are_answered_with_words_of_their_input(form):
    options = {"chars": (12, 60), "forms": {form: 1}, "scrambled": 0.5}
    rows = drills.drill_rows(drill_texts(), 60, seed=1, **options)
    assert rows == drills.drill_rows(drill_texts(), 60, seed=1, **options)
    assert rows != drills.drill_rows(drill_texts(), 60, seed=2, **options)
    for row_ in rows:
        assert set(row_) == {"instruction", "input", "output"} and row_["output"]
        if form in drills.PHRASE_FORMS and row_["output"] == row_["input"].removesuffix("\n"):  # 没有这样的词语时照抄
            continue
        for line in row_["output"].split("\n"):
            for part in line.split("_") if form in (*TRIPLES, "joined") else [line]:
                assert part in row_["instruction"] + row_["input"]
            assert line.count("_") == (2 if form in TRIPLES else 1 if form == "joined" else 0)
    ended = sum(row_["input"].endswith("\n") for row_ in rows)
    assert ended == 60 or 15 <= ended <= 45 or form in ("after", "between", "quote", "fields", "following")


def test_the_answers_of_drills_are_right():
    text = "火花塞间隙过大，发动机怠速不稳；更换火花塞后，故障排除。"
    found = {
        name: [drills.FORMS[name](text, random.Random(seed)) for seed in range(40)] for name in ("find", "after", "nth")
    }
    for instruction, given, answer in found["find"]:
        word = re.search("“(.*?)”", instruction)[1]
        assert given == text and answer.split("\n") == [part for part in drills.clauses_of(text) if word in part]
    for _, given, answer in found["after"]:
        asked = given.split("\n")[1]
        assert text[text.index(re.search("“(.*?)”", asked)[1]) :].startswith(re.search("“(.*?)”", asked)[1] + answer)
    assert {answer for _, _, answer in found["nth"]} == set(drills.clauses_of(text))


def test_phrases_are_what_stands_together_among_changing_neighbours():
    neighbours = "甲乙丙丁戊己庚辛壬癸子丑寅卯"
    texts = [f"{a}火花塞{b}，{b}油泵{a}，{neighbours}。" for a, b in zip(neighbours, reversed(neighbours), strict=True)]
    found = phrases.Phrases(texts)
    assert sorted(found.words) == ["油泵", "火花塞"]  # 「火花」后面总是「塞」
    assert found.bond("油", "泵") == pytest.approx(math.log(14 * (14 * 23) / (14 * 14)))  # 一段 23 字
    assert found.by_clause("火花塞与油泵，油，泵") == [["火花塞", "油泵"], [], []]
    assert found.halves("甲油泵火花塞") == ("甲油泵", "火花塞")
    assert found.halves("火花塞") is None
    assert found.halves("") is None


def test_questions_of_a_row_ask_about_one_text():
    options = {"chars": (12, 60), "forms": {"repeat": 1, "split": 1, "pairs": 1, "halves": 1}, "questions": 3}
    rows = drills.drill_rows(drill_texts(), 40, seed=1, **options)
    assert rows == drills.drill_rows(drill_texts(), 40, seed=1, **options)
    assert {len(row_["messages"]) for row_ in rows} <= {4, 6}
    for row_ in rows:
        asked, answers = row_["messages"][::2], row_["messages"][1::2]
        assert "同上" not in asked[0]["content"] and all("同上" in message["content"] for message in asked[1:])
        for message in answers:
            for part in re.split("[_\n]", message["content"]):
                assert part in "".join(message["content"] for message in asked)
    with pytest.raises(ValueError, match=r"questions\(5\) 多于写法（4 种）"):
        drills.drill_rows(drill_texts(), 1, seed=1, **{**options, "questions": 5})
    with pytest.raises(ValueError, match=r"questions\(3\) 与 turns\(2\)"):
        drills.drill_rows(drill_texts(), 1, seed=1, **options, turns=2)
    with pytest.raises(ValueError, match="只认出 0 个词语"):
        drills.drill_rows(["这一段文字里没有常见的词语。"], 1, seed=1, chars=(1, 60), forms={"words": 1})


def test_random_strings_have_the_asked_number_of_pieces():
    words = ["发动机", "水温", "高", "的", "动"]

    def encode(text):
        return re.findall("发动机|水温|.", text)

    texts = ["发动机水温高，", "的的的的动"]
    rows = drills.drill_rows(
        texts, 300, seed=3, chars=(1, 4), encode=encode, random_strings=True, forms={"copy": 1}, marked=1.0
    )
    assert all(row_["instruction"] == "" and row_["input"] == row_["output"] + "\n" for row_ in rows)
    assert Counter(len(encode(row_["output"])) for row_ in rows).keys() == {1, 2, 3, 4}
    counts = Counter(piece for row_ in rows for piece in encode(row_["output"]))
    assert counts.keys() == {*words, "，"}
    assert 2 < counts["的"] / counts["高"] < 4  # 4 ** 0.75 = 2.83
    with pytest.raises(ValueError, match="forms 里的 typo"):
        drills.drill_rows(drill_texts(), 1, seed=1, chars=(1, 6), forms={"typo": 1})
    with pytest.raises(ValueError, match="900 至 999 字"):
        drills.drill_rows(drill_texts(), 1, seed=1, chars=(900, 999))


def test_broken_strings_go_on_where_they_broke_off():
    def encode(text):
        return re.findall("发动机|水温|.", text)

    options = {"chars": (1, 5), "random_strings": True, "encode": encode, "forms": {"joined": 1, "linked": 1}}
    rows = drills.drill_rows(["发动机水温高，", "的的的的动"], 200, seed=3, **options)
    for row_ in rows:
        before, *name, after = row_["output"].split("_") if "_" in row_["output"] else (row_["output"], "")
        given = row_["input"].removesuffix("\n")
        assert before + after == given and encode(before) + encode(after) == encode(given)
        assert row_["instruction"] == f"{name[0]}：" if name else True
        assert after or len(encode(given)) == 1  # 一个片段断不开，照抄
    assert {row_["output"].count("_") for row_ in rows} == {0, 1, 2}


def test_turns_of_a_row_are_equally_long():
    options = {"chars": (1, 9), "random_strings": True, "forms": {"twice": 1}, "marked": 1.0, "turns": 3}
    rows = drills.drill_rows(drill_texts(), 50, seed=1, **options)
    for row_ in rows:
        assert [message["role"] for message in row_["messages"]] == ["user", "assistant"] * 3
        asked, answers = row_["messages"][::2], row_["messages"][1::2]
        assert len({len(message["content"]) for message in asked}) == 1
        for question, answer in zip(asked, answers, strict=True):
            assert answer["content"] == question["content"] + question["content"][:-1]
    assert len({len(row_["messages"][0]["content"]) for row_ in rows}) == 9


def test_scrambling_moves_only_the_letters():
    text = "甲乙丙，丁戊己。"
    scrambled = drills.scramble(text, random.Random(1))
    assert sorted(scrambled) == sorted(text) and scrambled != text
    assert (scrambled[3], scrambled[7]) == ("，", "。")


def test_rows_that_are_too_long_or_empty_are_left_out(tmp_path):
    path = tmp_path / "rows.json"
    compare_data.write_rows(path, [row("短"), row("很长很长"), row("空", ""), row("答", "很长的回答")])
    assert compare_data.read_rows(path, 3, 4) == [row("短")]
    with pytest.raises(ValueError, match=r"rows\.json 的 4 行.*max_input_chars"):
        compare_data.read_rows(path, 1, 1)


# ---- 计划 ----

PLAN = {
    "base": "baichuan2-6B",
    "general_path": "general.txt",
    "held_out_chars": 100,
    "tasks": [
        {"name": "extraction", "path": "a", "metric": "triple_f1", "test": 4, "dev": 2, "max_new_tokens": 8},
        {"name": "classification", "path": "b", "metric": "label_f1", "test": 4, "dev": 2, "max_new_tokens": 4},
    ],
    "methods": {"lora": {"learning_rates": [1e-3, 1e-2]}, "full": {"learning_rates": [1e-4, 1e-3]}},
    "seeds": [1, 2],
    "train_tokens": 1000,
    "checks": ["repeat", "shuffled"],
    "replay": {"ratio": 0.25},
    "extensions": 0,
}


@pytest.fixture
def plan(tmp_path):
    return compare_plan.read_plan(write_json(tmp_path / "plan.json", PLAN))


def test_plan_problems_are_listed_together(tmp_path):
    broken = {**PLAN, "seeds": [1, 1], "checks": ["untrained"], "typo": 1, "methods": {"adapter": {}}}
    del broken["general_path"]
    with pytest.raises(ValueError) as error:
        compare_plan.read_plan(write_json(tmp_path / "broken.json", broken))
    texts = [
        " 6 ",
        "缺少 general_path",
        "不认识 typo",
        "方法 adapter",
        "seeds([1, 1])",
        "untrained",
        "learning_rates([])",
    ]
    assert [text for text in texts if text not in str(error.value)] == []


def test_values_of_the_wrong_kind_are_named(tmp_path):
    for change, message in (
        ({"epochs": 0}, r"任务 extraction：epochs\(0\) 应是正整数"),
        ({"train_tokens": "200k"}, r"train_tokens\('200k'\) 应是正整数"),
        ({"replay": {"ratio": 0.5, "by": "token"}}, r"replay 的 by\(token\) 应为 rows 或 tokens"),
        ({"replay": {"ratio": 0.5, "bye": 1}}, "replay 不认识 bye"),
        ({"tasks": [], "checks": []}, "tasks 是空的"),
        ({"tasks": {"a": 1}}, "有值的类型不对"),
        ({"replay": 0.5}, "有值的类型不对"),
        ({"seeds": ["a"]}, r"seeds\(\['a'\]\) 应是一个或几个不同的非负整数"),
        ({"seeds": [1.5, -1]}, r"seeds\(\[1.5, -1\]\)"),
        ({"extensions": -1}, r"extensions\(-1\) 应是非负整数"),
        ({"held_out_chars": -5}, r"held_out_chars\(-5\) 应是正整数"),
        ({"general_path": 3}, r"general_path\(3\) 应是一个文件"),
        ({"base": None}, "base 缺少 model"),
        ({"base": {"model": {"layers": 1}, "stages": []}}, "base 缺少 stages"),
        ({"train_flags": "--x 1"}, "共同的参数.* 应是列表"),
        ({"methods": {"full": {"learning_rates": [0.1], "flags": "--x 1"}}}, "full的参数.* 应是列表"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_plan.read_plan(write_json(tmp_path / "wrong.json", {**PLAN, **change}))


def test_a_task_may_have_its_own_budget(tmp_path):
    extraction, classification = PLAN["tasks"]
    own = [extraction, {**classification, "train_tokens": 2000, "sweep_share": 0.5, "epochs": 3}]
    plan = compare_plan.read_plan(write_json(tmp_path / "plan.json", {**PLAN, "tasks": own}))
    budgets = [tuple(task[name] for name in compare_plan.TASK_OWN) for task in plan["tasks"]]
    assert budgets == [(1, 1000, 0.25), (3, 2000, 0.5)]
    with pytest.raises(ValueError, match=r"sweep_share\(2\).*\(0, 1\]"):
        wrong = [extraction, {**classification, "sweep_share": 2}]
        compare_plan.read_plan(write_json(tmp_path / "wrong.json", {**PLAN, "tasks": wrong}))


def test_cells_come_task_by_task_and_method_by_method(plan):
    cells = compare_plan.list_cells(plan)
    assert [cell.name for cell in cells] == [
        "base",
        *(f"sweep-extraction-lora-1-{rate}" for rate in ("0.001", "0.01")),
        *(f"final-extraction-lora-{seed}" for seed in (1, 2)),
        *(f"sweep-extraction-full-1-{rate}" for rate in ("0.0001", "0.001")),
        *(f"final-extraction-full-{seed}" for seed in (1, 2)),
        *(f"sweep-classification-lora-1-{rate}" for rate in ("0.001", "0.01")),
        *(f"final-classification-lora-{seed}" for seed in (1, 2)),
        *(f"sweep-classification-full-1-{rate}" for rate in ("0.0001", "0.001")),
        *(f"final-classification-full-{seed}" for seed in (1, 2)),
        "repeat-classification-full-1",
        "shuffled-classification-full-1",
    ]


def result(cell, score=0.5, rate=None, nll_after=3.1, measured=None):
    """一个格子的结果，形状同 run_cell 的返回值（有 jobs）。"""
    labels = label_f1(["正面", "负面", "正面", "负面"], ["正面", "负面", "负面", "负面"], num_resamples=50)["per_row"]
    other = {}
    for name, metric, value, rows in (
        ("extraction", "triple_f1", 0.1, ["0000", "1111", "1111"]),
        ("classification", "label_f1", 0.2, ["0000"] * 7),
    ):
        scores = {f"{prefix}{key}": value for prefix in ("", "test_") for key in ("score", "ci_low", "ci_high")}
        other[name] = {"metric": metric, **scores, "test_per_row": rows, "test_nll": 4.5}
    row = {
        **{"stage": cell.stage, "task": cell.task, "method": cell.method, "seed": cell.seed},
        "learning_rate": rate or cell.learning_rate or 1e-3,
        "metric": measured or ("nll" if cell.stage == "sweep" else "label_f1"),
        **{"score": score, "ci_low": score - 0.1, "ci_high": score + 0.1},
        **{"trainable_parameters": 1000, "peak_memory_mb": 500.0, "seconds": 10.0, "tokens_per_second": 100.0},
        **{"checkpoint_bytes": 2000, "tokens": 990, "jobs": 2, "test_nll": 1.25},
        "forgetting": {
            **{"general_nll_before": 3.0, "general_nll_after": nll_after, "kl": 0.05},
            "other_tasks": {name: entry for name, entry in other.items() if name != cell.task},
        },
        "losses": [[1, 3.0], [10, 2.0]],
        "per_row": compare_stats.compact_counts(labels, "label_f1"),
    }
    if cell.task == "extraction":
        row["per_row"] = ["1011" if cell.method == "full" else "0010", "1111", "1111"]
    if cell.stage == "base":
        row |= {"score": None, "tokens": None}
    return row | {name: getattr(cell, name) for name in ("check", "share") if getattr(cell, name)}


def run_to_the_end(plan, results, score=lambda cell: 0.5, rise=None):
    """像 compare() 那样逐个做，不训练；返回做过的格子的名字。"""
    rise = rise or (lambda cell: 3.4 if (cell.task, cell.method) == ("extraction", "full") else 3.1)
    order = []
    while found := compare_plan.next_cell(plan, results, set()):
        cell, rate = found
        order.append(cell.name)
        results.append(result(cell, score(cell), rate, rise(cell)))
    return order


def test_finals_use_the_best_rate_of_their_sweep(plan):
    results = []
    order = run_to_the_end(plan, results, lambda cell: {1e-2: 1.5, 1e-4: 1.6}.get(cell.learning_rate, 2.0))
    assert len(order) == len(set(order)) == 20
    assert order[-1] == "replay-extraction-full-1"  # 通用 NLL 上升最多的
    rates = {(r["task"], r["method"]): r["learning_rate"] for r in results if r["stage"] == "final"}
    assert rates == {(t, m): r for t in ("extraction", "classification") for m, r in (("lora", 1e-2), ("full", 1e-4))}


def test_equal_scores_take_the_smaller_rate(plan):
    results = [result(Cell("sweep", "extraction", "lora", 1, rate), 2.0) for rate in (1e-2, 1e-3)]
    assert compare_plan.best_rate(plan, results, "extraction", "lora") == 1e-3
    assert compare_plan.best_rate(plan, results[:1], "extraction", "lora") is None


def test_a_task_may_choose_by_its_own_metric(tmp_path):
    extraction, classification = PLAN["tasks"]
    tasks = [extraction, {**classification, "select": "metric"}]
    plan = compare_plan.read_plan(write_json(tmp_path / "plan.json", {**PLAN, "tasks": tasks}))
    assert [compare_plan.sweep_metric(task) for task in plan["tasks"]] == ["nll", "label_f1"]
    rates = plan["methods"]["lora"]["learning_rates"]
    for task, metric, best in (("extraction", "nll", 1e-3), ("classification", "label_f1", 1e-2)):
        cells = [Cell("sweep", task, "lora", 1, rate) for rate in rates]
        results = [result(cell, 40 * cell.learning_rate, measured=metric) for cell in cells]
        assert compare_plan.best_rate(plan, results, task, "lora") == best
        results[1] |= {"score": None}  # 没有走完的不选
        assert compare_plan.best_rate(plan, results, task, "lora") == 1e-3
    text = "\n".join(compare_report.sweep_part(plan, results))
    assert "NLL 最低的（分类：宏 F1 最高的），" in text and "| 分类 | **0.0400** | NaN |" in text
    with pytest.raises(ValueError, match="任务 classification：select f1 应为 nll 或 metric"):
        wrong = [extraction, {**classification, "select": "f1"}]
        compare_plan.read_plan(write_json(tmp_path / "wrong.json", {**PLAN, "tasks": wrong}))


def extended(plan, scores, task="extraction", method="lora"):
    """各学习率的分数给定时，逐格做完试跑 → (试过的学习率, 选中的)。"""
    results = []
    while missing := [r for r in compare_plan.sweep_rates(plan, results, task, method) if r not in
                      [row_["learning_rate"] for row_ in results]]:  # fmt: skip
        results.append({**result(Cell("sweep", task, method, 1, missing[0])), "score": scores(missing[0])})
    return compare_plan.sweep_rates(plan, results, task, method), compare_plan.best_rate(plan, results, task, method)


def test_the_range_grows_until_the_best_rate_lies_inside(plan):
    plan = {**plan, "extensions": 4}
    plan["methods"]["lora"]["learning_rates"] = [1e-3, 3e-3, 1e-2]
    assert extended(plan, lambda rate: abs(rate - 3e-3)) == ([1e-3, 3e-3, 1e-2], 3e-3)
    assert extended(plan, lambda rate: rate) == ([1.2e-5, 3.7e-5, 1.1e-4, 3.3e-4, 1e-3, 3e-3, 1e-2], 1.2e-5)
    rates, best = extended(plan, lambda rate: abs(rate - 0.03))
    assert (rates, best) == ([1e-3, 3e-3, 1e-2, 0.033, 0.11], 0.033)
    # 太大的学习率没有走完，或分数是 NaN：不选它
    assert extended(plan, lambda rate: float("nan") if rate > 1e-2 else -rate) == ([1e-3, 3e-3, 1e-2, 0.033], 1e-2)
    assert extended(plan, lambda rate: None if rate > 1e-2 else -rate) == ([1e-3, 3e-3, 1e-2, 0.033], 1e-2)
    assert extended({**plan, "extensions": 0}, lambda rate: rate)[1] == 1e-3
    plan["methods"]["lora"]["learning_rates"] = [1e-3]
    assert extended(plan, lambda rate: rate) == ([1e-3], 1e-3)


def test_the_curve_uses_the_chosen_rate_and_fewer_tokens(tmp_path):
    curve = {"task": "extraction", "method": "full", "shares": [0.25, 0.5]}
    plan = compare_plan.read_plan(write_json(tmp_path / "plan.json", {**PLAN, "curve": curve}))
    cells = [cell for cell in compare_plan.list_cells(plan) if cell.stage == "curve"]
    assert [(cell.name, cell.part) for cell in cells] == [
        ("curve-extraction-full-1-0.25", "curve-0.25"),
        ("curve-extraction-full-1-0.5", "curve-0.5"),
    ]
    results = []
    order = run_to_the_end(plan, results, lambda cell: {1e-4: 1.6}.get(cell.learning_rate, 2.0))
    assert [name for name in order if name.startswith("curve")] == [cell.name for cell in cells]
    rows = [row_ for row_ in results if row_["stage"] == "curve"]
    assert {row_["learning_rate"] for row_ in rows} == {1e-4}
    assert [compare_plan.cell_of(row_) for row_ in rows] == cells
    for number, row_ in enumerate(rows, start=1):
        row_ |= {"tokens": number * 250, "score": number / 10, "ci_low": 0.0, "ci_high": 1.0}
    text = "\n".join(compare_report.curve_part(plan, results))
    first, second = (
        f"| {tokens} | {score} [0.000, 1.000] | 1.250 |" for tokens, score in ((250, "0.100"), (500, "0.200"))
    )
    assert f"{first}\n{second}\n| 990 | 2.000 [" in text and "还在上升" in text
    longer = {"task": "extraction", "method": "full", "shares": [2, 4]}
    plan = compare_plan.read_plan(write_json(tmp_path / "plan.json", {**PLAN, "epochs": 3, "curve": longer}))
    cells = [cell for cell in compare_plan.list_cells(plan) if cell.stage == "curve"]
    assert [(cell.name, cell.part, compare_cells.epochs_of(plan, cell)) for cell in cells] == [
        ("curve-extraction-full-1-2", "final", 6),
        ("curve-extraction-full-1-4", "final", 12),
    ]
    for wrong in (
        {**curve, "task": "typo"},
        {**curve, "method": "typo"},
        {**curve, "shares": [1]},
        {**curve, "shares": [2.5]},
    ):
        with pytest.raises(ValueError, match=r"curve\("):
            compare_plan.read_plan(write_json(tmp_path / "wrong.json", {**PLAN, "curve": wrong}))


def test_a_method_may_have_its_own_tasks_and_seeds(tmp_path):
    variant = {"learning_rates": [1e-3], "train_type": "lora", "flags": ["--use_dora"], "tasks": ["extraction"]}
    methods = {**PLAN["methods"], "dora": {**variant, "seeds": [2]}}
    plan = compare_plan.read_plan(write_json(tmp_path / "plan.json", {**PLAN, "methods": methods}))
    cells = [cell for cell in compare_plan.list_cells(plan) if cell.method == "dora"]
    assert [cell.name for cell in cells] == ["sweep-extraction-dora-2-0.001", "final-extraction-dora-2"]
    results = []
    order = run_to_the_end(plan, results)
    assert order[-1].startswith("replay-")
    summary = compare_stats.summarize(plan, results, compare_report.find(results, stage="base"))
    shared = {(p["first"], p["second"]): p["seeds"] for p in summary["pairs"]["extraction"]}
    assert shared == {("lora", "full"): [1, 2], ("lora", "dora"): [2], ("full", "dora"): [2]}
    assert [(p["first"], p["second"]) for p in summary["pairs"]["classification"]] == [("lora", "full")]
    wrong = {**methods, "dora": {**variant, "tasks": ["typo"], "seeds": [9], "train_type": "x"}}
    with pytest.raises(ValueError, match=r" 3 (.|\n)*dora (.|\n)*typo(.|\n)*seeds\(\[9\]\)"):
        compare_plan.read_plan(write_json(tmp_path / "wrong.json", {**PLAN, "methods": wrong}))


def test_a_cell_that_waits_for_its_sweep_does_not_hold_up_others(plan):
    cells = compare_plan.list_cells(plan)
    done = [result(cell) for cell in cells[:2]]
    cell, rate = compare_plan.next_cell(plan, done, {cells[2]})  # lora 的试跑还有一格在做
    assert (cell.name, rate) == ("sweep-extraction-full-1-0.0001", 1e-4)


# ---- 结果文件与续做 ----


def test_resuming_gives_the_same_cells(plan, tmp_path, capsys):
    whole = []
    order = run_to_the_end(plan, whole)
    for row_ in whole[:7]:
        compare_run.record(tmp_path, row_)
    with (tmp_path / "results.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"stage": "final", "ta')  # 写到一半被杀
    compare_run.load_results(tmp_path)
    assert "results.jsonl 的末行只写了一半" in capsys.readouterr().err
    assert not (tmp_path / "results.jsonl").read_bytes().endswith(b"}\n")  # 只读的一方不动别人正在写的文件
    results = compare_run.load_results(tmp_path, repair=True)
    names = {compare_plan.cell_of(row_).name for row_ in results}
    assert names == set(order[:7])
    assert (tmp_path / "results.jsonl").read_bytes().endswith(b"}\n")
    assert run_to_the_end(plan, results) == order[7:]
    assert {json.dumps(row_) for row_ in results} == {json.dumps(row_) for row_ in whole}


def test_broken_result_line_is_an_error(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.jsonl:1: 不是一个格子的结果"):
        compare_run.load_results(tmp_path)
    row_ = json.dumps(result(Cell("sweep", "extraction", "lora", 1, 1e-3)))
    (tmp_path / "results.jsonl").write_text(f"{row_}\n{{broken\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.jsonl:2: "):
        compare_run.load_results(tmp_path)


def test_another_plan_does_not_continue(plan, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    write_json(output / "plan.json", {**plan, "train_tokens": 5})
    with pytest.raises(ValueError, match=r"out/plan\.json .*--output_dir"):
        compare_run.prepare(plan, output, build_base=None)
    # 没有写缺省值的是同一个计划：再往下才因没有数据停住
    write_json(output / "plan.json", PLAN)
    with pytest.raises(ValueError, match="找不到"):
        compare_run.prepare(plan, output, build_base=None)


def test_committed_files_go_on_only_with_the_same_data(tiny_checkpoint, tmp_path):
    path = toy_plan(tmp_path)
    toy = json.loads(path.read_text(encoding="utf-8"))
    [task] = toy["tasks"]
    own = Path(shutil.copy(ROOT / task["path"], tmp_path / "cls.json"))
    toy |= {"base": str(tiny_checkpoint()), "tasks": [{**task, "path": str(own)}], "checks": []}
    plan = compare_plan.read_plan(write_json(path, toy))
    whole, copied = tmp_path / "whole", tmp_path / "copied"
    facts = compare_run.prepare(plan, whole, base.build_base)
    copied.mkdir()
    for name in ("plan.json", "data.json"):
        shutil.copy(whole / name, copied)
    assert compare_run.prepare(plan, copied, base.build_base) == facts
    final = Path("data", "classification", "final.json")
    assert (copied / final).read_bytes() == (whole / final).read_bytes()

    shutil.rmtree(copied / "data")
    own.write_text("".join(own.read_text(encoding="utf-8").splitlines(keepends=True)[:-4]), encoding="utf-8")
    for _ in range(2):  # 第二次也不当作已经备好
        with pytest.raises(ValueError, match=r"重新备出的 classification 与 .*copied/data\.json .*--output_dir"):
            compare_run.prepare(plan, copied, base.build_base)
    assert json.loads((copied / "data.json").read_text(encoding="utf-8")) == facts


def test_results_of_another_base_do_not_go_on(tiny_checkpoint, tmp_path):
    base_dir, output = shutil.copytree(tiny_checkpoint("baichuan2-7b"), tmp_path / "base"), tmp_path / "out"
    (output / "data").mkdir(parents=True)
    plan = {"base": str(base_dir)}
    write_json(output / "plan.json", {**PLAN, **plan})
    plan = compare_plan.read_plan(output / "plan.json")
    write_json(output / "data.json", {"base": base.build_base(plan, output)})
    assert compare_run.prepare(plan, output, base.build_base).keys() == {"base"}
    with (base_dir / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x01")
    with pytest.raises(ValueError, match=r"基座 .*的文件变了"):
        compare_run.prepare(plan, output, base.build_base)


def test_directory_in_use(tmp_path):
    with compare_run.held(tmp_path), pytest.raises(ValueError, match=f"--output_dir {tmp_path} "):  # noqa: SIM117
        with compare_run.held(tmp_path):
            pass


# ---- 统计 ----


def per_row(hits):
    return ["".join(map(str, hits)), "1" * len(hits), "1" * len(hits)]


def test_compact_counts_keep_what_the_score_uses():
    counts = {"columns": ["rows", "rouge1", "rouge2", "rougeL", "correct1"], "counts": [[1, 0.5, 0.25, 0.5, 12]] * 2}
    columns = compare_stats.compact_counts(counts, "rouge")
    assert columns == ["11", "00", "00", [0.5, 0.5]]
    assert compare_stats.restored_counts(columns).tolist() == [[1, 0, 0, 0.5]] * 2
    labels = {"columns": ["correct", "a.correct", "a.predicted", "a.expected"], "counts": [[1, 0, 10, 1], [0, 1, 2, 3]]}
    assert compare_stats.compact_counts(labels, "label_f1") == ["10", "01", [10.0, 2.0], "13"]
    assert compare_stats.restored_counts(["10", "01", [10.0, 2.0], "13"]).tolist() == labels["counts"]


def test_resampled_scores_average_the_seeds():
    score, drawn = compare_stats.resampled_scores([per_row([1, 0, 1, 1]), per_row([1, 1, 1, 1])], "triple_f1")
    assert score == 0.875
    assert drawn.shape == (compare_stats.NUM_RESAMPLES,)
    low, high = compare_stats.interval(drawn)
    assert low <= 0.875 <= high == 1.0


def test_paired_difference():
    good, bad = [1] * 30 + [0] * 10, [1] * 15 + [0] * 25
    first = compare_stats.resampled_scores([per_row(good)] * 3, "triple_f1")
    second = compare_stats.resampled_scores([per_row(bad)] * 3, "triple_f1")
    found = compare_stats.paired_difference(first, second)
    assert found["difference"] == 0.375
    assert 0.2 < found["ci_low"] < 0.375 < found["ci_high"] < 0.55
    assert found["p_value"] == pytest.approx(2 / 20001)
    same = {"difference": 0.0, "ci_low": 0.0, "ci_high": 0.0, "p_value": 1.0}
    assert compare_stats.paired_difference(first, first) == same


def test_holm():
    assert compare_stats.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert compare_stats.holm([]) == []


# ---- 报告 ----


@pytest.fixture
def finished(plan, tmp_path):
    """一个做完了的比较的目录（结果是编的）。"""
    results, directory = [], tmp_path / "finished"
    directory.mkdir()
    run_to_the_end(plan, results, lambda cell: {"sweep": 2.0}.get(cell.stage, 0.5), rise=lambda cell: 3.1)
    for row_ in results:
        compare_run.record(directory, row_)
    write_json(directory / "plan.json", plan)
    counts = {"documents": 50, "test": 4, "dev": 2, "pretrain": 0, "final_rows": 9, "final": 990, "sweep": 240}
    write_json(directory / "data.json", {"extraction": counts, "classification": counts})
    return directory


def test_report_contents(finished):
    assert compare_methods.main(["--report", str(finished)]) == 0
    text = (finished / "report.md").read_text(encoding="utf-8")
    for expected in (
        "几个格子并行时测的：抽取 2 个，分类 2 个。",
        "| 抽取 | 三元组 F1 | 50 | 4 | 2 | 0 | 9 | 990 | 240 |",
        "| lora | 0.250 [",
        "| full | 0.750 [",
        "| 没有微调的基座 | 0.100 [0.100, 0.100] | 0.200 [0.200, 0.200] |",
        "| 方法 | 抽取 | 分类 |",
        "| lora | 1.250 | 1.250 |",
        "| 没有微调的基座 | 4.500 | 4.500 |",
        "| 抽取 lora − full | -0.500 [",
        "完全相等",
        "| 抽取 lora | 1,000 | 500 | 10（10–10） | 100（100–100） | 0.00 | 0.001 |",
        "| 碰运气（各标签机会相等） | — | 0.467 |",
        " 20,000 ",
        "| 抽取 lora | 3.000 → 3.100 | +0.100 | 0.050 | — | 0.200（0.200） |",
        "| 重放 0.25 | 0.500 [0.400, 0.600] | +0.100 | 0.050 | 0.200 | 990 | 10 |",
        "| 抽取 | **2.0000** | 2.0000 |",
        "> 分数最高的，抽取是 **full**（0.750 [",
        "> 只对这个基座：从 **lora** 开始，1/2 个任务上它最好或差得不显著；学习率：抽取 0.001，分类 0.001；",
        "通用文字的 NLL 上升：抽取 +0.10，分类 +0.10。",
        "> 其次是 **full**：1/2 个任务上",
        "- lora：从 0.001 开始（2/2 个任务选中它）。",
        "选中的学习率在试过的范围的边上的：lora 的抽取（0.001）、lora 的分类（0.001）、full 的抽取（0.0001）",
        "种子 1 再做一次，分数 0.500000 与 0.500000，相同",
        "- 打乱标签：分类、full",
    ):
        assert expected in text, expected
    page = (finished / "report.html").read_text(encoding="utf-8")
    names = ["scores", "score-memory", "score-time", "score-forgetting", "losses", "forgetting"]
    assert page.count("data:image/svg+xml;base64,") == len(names)
    assert [f"figures/{name}.svg" in text for name in names] == [True] * 6
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert page.index("<blockquote>") < page.index("<table>")  # 先是答案
    assert page.count("<table>") == text.count("| --- |\n") and "**" not in page and "<b>2.0000</b>" in page
    assert compare_report.write_report(finished) is None
    assert (finished / "report.html").read_text(encoding="utf-8") == page  # 同样的结果，同样的字节


@pytest.fixture
def font():
    """matplotlib 自带的字体，系统里有没有中文字体都一样。"""
    from matplotlib import font_manager

    return Path(font_manager.findfont("DejaVu Sans"))


def test_a_font_is_embedded_as_a_subset(finished, font, capsys):
    assert compare_methods.main(["--report", str(finished), "--font", str(font)]) == 0
    page = (finished / "report.html").read_text(encoding="utf-8")
    embedded = base64.b64decode(re.search(r"url\(data:font/otf;base64,([^)]*)\)", page)[1])
    found = set(TTFont(BytesIO(embedded)).getBestCmap())
    assert {ord(char) for char in "freeze0.5"} & found and len(found) < len(TTFont(font).getBestCmap()) / 4
    assert "<text" not in (finished / "figures" / "scores.svg").read_text(encoding="utf-8")  # 文字是路径
    assert compare_methods.main(["--report", str(finished), "--font", str(finished / "plan.json")]) == 2
    assert "--font" in capsys.readouterr().err


def test_a_collection_gives_its_simplified_face(font, tmp_path):
    import matplotlib

    faces = [TTFont(font), TTFont(font)]
    for face, name in zip(faces, ("Probe CJK JP", "Probe CJK SC"), strict=True):
        for record in [record for record in face["name"].names if record.nameID in (1, 4, 16, 21)]:
            record.string = name
    collection = TTCollection()
    collection.fonts = faces
    collection.save(tmp_path / "probe.ttc")
    assert fonts.simplified(tmp_path / "probe.ttc") == 1 and fonts.simplified(font) == 0
    set_up(tmp_path / "probe.ttc")
    knows_faces = tuple(map(int, matplotlib.__version__.split(".")[:2])) >= (3, 11)
    assert matplotlib.rcParams["font.family"][-1] == ("Probe CJK SC" if knows_faces else "Probe CJK JP")
    with fonts_embedded(tmp_path / "probe.ttc") as embedded:
        assert embedded["name"].getDebugName(4) == "Probe CJK SC"


def fonts_embedded(path):
    """网页里嵌的那个子集。"""
    return TTFont(BytesIO(fonts.font_subset(path, "freeze")))


def test_without_a_font_the_reader_has_one(finished, monkeypatch):
    monkeypatch.setattr(fonts, "NAMES", ())
    compare_report.write_report(finished)
    assert "@font-face" not in (finished / "report.html").read_text(encoding="utf-8")
    picture = (finished / "figures" / "scores.svg").read_text(encoding="utf-8")
    assert "<text" in picture and "没有微调的基座" in picture


def test_the_chance_line_is_drawn_where_there_is_chance(finished):
    plan, results = compare_plan.read_plan(finished / "plan.json"), compare_run.load_results(finished)
    base_ = compare_report.find(results, stage="base")
    summary = compare_stats.summarize(plan, results, base_)
    figure = draw_scores(set_up(None), plan, plan["tasks"], summary["cells"], base_, summary["chance"])
    drawn = [[line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"] for axis in figure.axes]
    assert [np.round(values, 3).tolist() for values in drawn] == [[], [0.467]]
    assert "碰运气" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_unfinished_report_says_so(finished):
    lines = (finished / "results.jsonl").read_text(encoding="utf-8").splitlines()
    (finished / "results.jsonl").write_text("\n".join(lines[:6]) + "\n", encoding="utf-8")
    (finished / "extras.jsonl").unlink()
    compare_report.write_report(finished)
    assert "2 / 8" in (finished / "report.md").read_text(encoding="utf-8")


def test_results_outside_the_plan_are_named(finished, capsys):
    lines = (finished / "results.jsonl").read_text(encoding="utf-8").splitlines()
    final = next(row_ for row_ in map(json.loads, lines) if row_["stage"] == "final")
    compare_run.record(finished, {**final, "method": "prompt"})
    compare_report.write_report(finished)
    assert f"结果里的 {final['task']} prompt 不在计划里，报告不用" in capsys.readouterr().err
    assert "prompt" not in (finished / "report.md").read_text(encoding="utf-8")


def test_report_without_a_plan(tmp_path, capsys):
    assert compare_methods.main(["--report", str(tmp_path)]) == 2
    assert f"{tmp_path} 里没有 plan.json，--report 要的是" in capsys.readouterr().err


def test_command_line_needs_a_plan_or_a_report(capsys):
    with pytest.raises(SystemExit):
        compare_methods.parse_args([])
    assert "--report DIR" in capsys.readouterr().err


def test_the_committed_plan_is_whole():
    plan = compare_plan.read_plan(ROOT / "benchmarks" / "comparison" / "plan.json")
    assert [task["name"] for task in plan["tasks"]] == list(compare_plan.TASK_NAMES)
    assert list(plan["methods"])[:4] == list(compare_plan.METHODS)
    assert len(plan["seeds"]) >= 3 and all(len(m["learning_rates"]) == 3 for m in plan["methods"].values())
    assert plan["extensions"] > 0
    known = {"general", *compare_plan.TASK_NAMES}
    for stage in plan["base"]["stages"]:
        assert stage.get("texts", {}).keys() <= known
        for entry in stage["drills"]:
            assert set(entry.get("texts", known)) <= known and set(entry.get("forms", ())) <= set(drills.ALL_FORMS)


def test_the_committed_results_give_the_committed_report():
    kept = ROOT / "benchmarks" / "comparison" / "results"
    plan, results = compare_plan.read_plan(kept / "plan.json"), compare_run.load_results(kept)
    base_ = compare_report.find(results, stage="base")
    facts = compare_report.read_facts(kept)
    parts = compare_report.lay_out(plan, facts, results, compare_stats.summarize(plan, results, base_), base_)
    assert "\n\n".join(parts) + "\n" == (kept / "report.md").read_text(encoding="utf-8")


def test_the_dictionary_pairs_each_tail_with_the_nearest_head_before_it():
    heads, relations = dictionary.read_dictionary(
        ["水温_性能故障_高\n火花塞_部件故障_损坏", "火花塞间隙_性能故障_过大\n水温_部件故障_高", "水温_性能故障_高"]
    )
    assert heads == {"水温", "火花塞", "火花塞间隙"}
    assert relations == {"高": "性能故障", "损坏": "部件故障", "过大": "性能故障"}
    assert dictionary.places_of(heads, "火花塞间隙与火花塞") == [(0, 5), (6, 9)]  # 长的盖过短的
    text = "火花塞间隙过大，水温高；更换火花塞。损坏，很久以后的某一天高"  # 最后的「高」前面太远才有头
    assert dictionary.extract(text, heads, relations).split("\n") == [
        *("火花塞间隙_性能故障_过大", "水温_性能故障_高", "火花塞_部件故障_损坏")
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--hidden_sizes", "50", "96"], r"[50] 应是 6 的倍数"),
        (["--hidden_sizes", "96", "--task", "foo"], "没有 foo 上做完的 full"),
        (["--hidden_sizes", "96", "192"], "192 就是这个比较的宽度"),
    ],
)
def test_another_base_size_is_refused_before_any_work(tmp_path, capsys, words, told):
    kept = ROOT / "benchmarks" / "comparison" / "results"
    assert base_size.main([str(kept), "--work", str(tmp_path / "work"), *words]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "work").exists()


def test_other_base_sizes_of_before_are_kept(tmp_path):
    rows = [{"task": task, "hidden_size": size} for task, size in (("extraction", 48), ("extraction", 96), ("cls", 72))]
    path = write_json(tmp_path / "base_size.json", rows)
    assert base_size.kept_rows(path, "extraction", {96, 192}) == rows[:1]
    assert base_size.kept_rows(tmp_path / "none.json", "extraction", {96}) == []
    with pytest.raises(SystemExit):
        base_size.parse_args(["d", "--hidden_sizes", "96", "--work", "w", "--jobs", "0"])


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_the_table_in_the_docs_is_that_of_the_report(page):
    def scores(text: str) -> dict[str, list[str]]:
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
        found = {
            row[0].partition("，")[0]: [cell for cell in row if re.fullmatch(r"\S+ \[.*\]|—", cell)] for row in rows
        }
        return {name: cells for name, cells in found.items() if any("[" in cell for cell in cells)}

    report = (ROOT / "benchmarks" / "comparison" / "results" / "report.md").read_text(encoding="utf-8")
    expected = scores(report.partition("## 分数\n")[2].partition("测试部分目标")[0])
    table = (
        (ROOT / page)
        .read_text(encoding="utf-8")
        .partition("在小模型上比过\n" if "docs" in page else "小模型上比过（")[2]
    )
    found = scores(table.partition("\n## ")[0])
    assert {"freeze", "lora", "ptuning", "full", "没有微调的基座"} <= found.keys()
    for name, cells in found.items():
        assert [cell for cell in cells if "[" in cell] == [cell for cell in expected[name] if "[" in cell]


def test_the_answer_says_what_is_not_reached():
    kept = ROOT / "benchmarks" / "comparison" / "results"
    text = (kept / "report.md").read_text(encoding="utf-8")
    answer = "\n".join(line for line in text.splitlines() if line.startswith("> "))
    assert "低于不用模型的词典的 0.247）；生成是" in answer  # 只在词典的任务上
    assert "没有超过碰运气：分类的 freeze、ptuning。" in answer
    assert "加上重放 0.5，通用文字的 NLL 上升 +15.55 → +0.46，分数 0.658 → 0.678" in answer
    assert "| 96 | 1,981,536 | 0.075 [0.052, 0.101] |" in text and "在 8,000 个片段里均匀地猜是 8.99" in text


def test_a_result_that_lacks_something_is_named(tmp_path):
    cell = {"stage": "final", "task": "extraction", "method": "full", "seed": 1}
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({**cell, "stage": "sweep"}) + "\n" + json.dumps(cell) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.jsonl:2: 不是一个格子的结果（缺 ci_high、.*per_row"):
        compare_run.load_rows(path)


def test_a_missing_directory_is_said_in_a_line(tmp_path, capsys, monkeypatch):
    plan = ROOT / "benchmarks" / "comparison" / "results" / "plan.json"
    (tmp_path / "plan.json").write_bytes(plan.read_bytes())
    (tmp_path / "report.md").write_text("以前的", encoding="utf-8")
    assert base_size.main([str(tmp_path / "none"), "--hidden_sizes", "96", "--work", str(tmp_path)]) == 2
    assert "plan.json" in capsys.readouterr().err
    assert compare_methods.main(["--report", str(tmp_path)]) == 2
    assert "没有做完的格子" in capsys.readouterr().err
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == "以前的"  # 空的报告不盖过它
    monkeypatch.setattr(sys, "argv", ["dictionary.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        dictionary.main()
    assert stopped.value.code == 2 and "final.json" in capsys.readouterr().err


# ---- 真的做一遍 ----


def toy_plan(directory: Path) -> Path:
    text = directory / "general.txt"
    lines = [json.loads(line)["input"] for line in (ROOT / "data" / "d2q_0.json").read_text("utf-8").splitlines()]
    groups = compare_data.near_groups(map(compare_data.plain_text, lines))
    text.write_text("\n".join(lines[group] for group in dict.fromkeys(groups)) + "\n", encoding="utf-8")
    plan = {
        "base": {
            "model": {
                **{"arch": "baichuan2-7b", "layers": 2, "hidden_size": 32, "heads": 2, "vocab_size": 1200},
                "model_max_length": 256,
            },
            "train_flags": ["--precision", "fp32", "--num_threads", 1, "--max_len", 128, "--max_src_len", 96],
            "stages": [
                {
                    "name": "drills",
                    "drills": [{"count": 60, "chars": [4, 12]}],
                    "train_flags": ["--learning_rate", 1e-3],
                },
                {"name": "texts", "texts": {"general": 0.1, "classification": 2}, "train_flags": ["--max_steps", 4]},
            ],
        },
        "general_path": str(text),
        "held_out_chars": 400,
        "tasks": [
            {
                **{"name": "classification", "path": "data/cls_0.json", "metric": "label_f1"},
                **{"test": 8, "dev": 4, "pretrain": 8, "other": 4, "max_new_tokens": 4, "max_train_chars": 60},
                "select": "metric",
            }
        ],
        "methods": {
            "lora": {"learning_rates": [1e-3, 1e-2]},
            "full": {"learning_rates": [1e-3]},
        },
        "seeds": [1],
        "train_tokens": 2000,
        "train_flags": ["--max_len", 128, "--max_src_len", 96, "--show_loss_step", 1, "--precision", "fp32"],
        "checks": ["repeat", "untrained"],
        "replay": {"ratio": 0.25},
    }
    return write_json(directory / "plan.json", plan)


def start(plan: Path, output: Path) -> subprocess.Popen:
    script = ROOT / "scripts" / "compare_methods.py"
    words = [sys.executable, str(script), str(plan), "--output_dir", str(output), "--jobs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# 因时间而异的；检查点里的 JSON 还写着输出目录，大小随它的名字差几个字节
CLOCKS = ("seconds", "tokens_per_second", "peak_memory_mb", "checkpoint_bytes")
FIELDS = ["stage", "task", "method", "seed", "learning_rate", "metric", "score", "ci_low", "ci_high"]
FIELDS += ["trainable_parameters", "peak_memory_mb", "seconds", "tokens_per_second", "checkpoint_bytes", "tokens"]
FIELDS += ["forgetting"]


def table_of(output: Path) -> list[str]:
    """全部结果，除去时间、内存与检查点的大小，按格子排列。"""
    rows = compare_run.load_results(output)
    return sorted(json.dumps({k: v for k, v in row_.items() if k not in CLOCKS}, sort_keys=True) for row_ in rows)


@pytest.mark.slow
@pytest.mark.deepspeed
def test_killed_in_the_middle_of_a_cell_ends_with_the_same_table(tmp_path):
    plan = toy_plan(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(plan, whole)
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text[-4000:]

    process = start(plan, killed)
    deadline = time.monotonic() + 600
    while not list(killed.glob("work/final-*/train/train_log.jsonl")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(compare_run.load_results(killed))
    assert 0 < done < len(table_of(whole))

    process = start(plan, killed)
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text[-4000:]
    assert table_of(killed) == table_of(whole)
    assert not (killed / "work").exists()
    for row_ in compare_run.load_rows(killed / "results.jsonl"):
        extra = ["losses", "per_row", "test_nll"] if row_["stage"] == "final" else []
        assert row_["metric"] == "label_f1"  # 试跑也按它选
        assert list(row_) == [*FIELDS, *extra, "jobs"] and None not in row_.values()
        assert list(row_["forgetting"]) == ["general_nll_before", "general_nll_after", "kl", "other_tasks"]
    report = (killed / "report.md").read_text(encoding="utf-8")
    assert "，相同。" in report and "随机权重" in report and "--replay_ratio 0.25" in report
    tokens = {row_["tokens"] for row_ in compare_run.load_rows(killed / "results.jsonl") if row_["stage"] == "final"}
    assert len(tokens) == 1 and 0 < np.max(list(tokens)) <= 2000
    rows = compare_data.read_rows(killed / "data" / "classification" / "final.json")
    assert max(len(row_["input"]) for row_ in rows) <= 60

    # 只有提交的那些文件，别处接着做：同样的基座重练出来，做完的不再做
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in ("plan.json", "data.json", "extras.jsonl"):
        shutil.copy(whole / name, copied)
    lines = (whole / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (copied / "results.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    process = start(plan, copied)
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text[-4000:]
    assert table_of(copied) == table_of(whole)
    assert (copied / "results.jsonl").read_text(encoding="utf-8").startswith("".join(lines[:-1]))
    facts = json.loads((copied / "data.json").read_text(encoding="utf-8"))
    write_json(copied / "data.json", {**facts, "base": {**facts["base"], "sha256": "0" * 64}})
    shutil.rmtree(copied / "data")
    for _ in range(2):
        process = start(plan, copied)
        text, _ = process.communicate(timeout=900)
        assert process.returncode == 2 and "重新备出的 base 与" in text, text[-4000:]
