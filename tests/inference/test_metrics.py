"""metrics.py：手算的精确值、边界情形，以及与参考实现（rouge-score、sacreBLEU）和朴素算法的对照。"""

import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.metrics import bootstrap, registry, text
from finetune.metrics.labels import label_f1
from finetune.metrics.nll import nll
from finetune.metrics.registry import METRICS
from finetune.metrics.table import NAMES, format_result
from finetune.metrics.text import rouge
from finetune.metrics.triples import parse_triples, triple_f1
from finetune.terminal import display_width, format_table, shorten, visible

short_text = st.text(alphabet="风扇不转abc 12，", max_size=12)


def score(result, name):
    return result["details"][name]["score"]


# ---- 三元组 ----


def test_parse_triples_normalises_and_counts_malformed_lines():
    good = "发动机_部件故障_水温高\n发动机＿部件故障＿水温高\n  ＡＢＳ _组成_ 泵  电机 \n"
    triples, malformed = parse_triples(good + "没有分隔符\n甲_乙\n甲__丙\na_b_c_d\n\n")
    assert triples == {("发动机", "部件故障", "水温高"), ("ABS", "组成", "泵 电机")}
    assert malformed == 4
    assert parse_triples("__\n \n___\n") == (set(), 2)  # 只有分隔符的行也不是空行


def test_triple_f1_exact_values():
    result = triple_f1(
        ["甲_组成_乙\n甲_组成_乙\n丙_故障_丁", "坏行", "", "多_组成_余"],
        ["甲_组成_乙\n丙_故障_戊", "甲_组成_乙", "", ""],
    )
    # 正确 1；预测 2 + 0 + 0 + 1；参考 2 + 1
    assert result["score"] == pytest.approx(2 * 1 / (3 + 3))
    details = result["details"]
    assert score(result, "precision") == pytest.approx(1 / 3)
    assert score(result, "recall") == pytest.approx(1 / 3)
    assert (details["correct"], details["predicted"], details["expected"]) == (1, 3, 3)
    assert details["malformed_lines"] == 1
    assert details["malformed_reference_lines"] == 0
    assert (details["empty_reference_rows"], details["empty_reference_rows_correct"]) == (2, 1)
    assert details["exact_match"] == 0.25
    assert details["per_relation"] == {
        "组成": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "correct": 1, "predicted": 2, "expected": 2},
        "故障": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "correct": 0, "predicted": 1, "expected": 1},
    }
    assert result["per_row"] == {
        "columns": ["correct", "predicted", "expected", "malformed"],
        "counts": [[1, 2, 2, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]],
    }


def test_triple_f1_all_empty_is_perfect_and_nothing_predicted_is_zero():
    perfect = triple_f1(["", " \n"], ["", ""])
    assert (perfect["score"], perfect["ci_low"], perfect["ci_high"]) == (1.0, 1.0, 1.0)
    assert score(perfect, "precision") == score(perfect, "recall") == perfect["details"]["exact_match"] == 1.0
    silent = triple_f1(["", ""], ["甲_组成_乙", "丙_组成_丁"])
    assert silent["score"] == score(silent, "precision") == score(silent, "recall") == 0.0


def test_a_malformed_answer_to_an_empty_reference_is_wrong():
    result = triple_f1(["胡言乱语"], [""])
    assert (result["score"], result["ci_low"], result["ci_high"]) == (0.0, 0.0, 0.0)
    assert (score(result, "precision"), score(result, "recall")) == (0.0, 1.0)  # 该抽的一个也没有
    details = result["details"]
    assert (details["exact_match"], details["malformed_lines"]) == (0.0, 1)
    assert (details["empty_reference_rows"], details["empty_reference_rows_correct"]) == (1, 0)
    # 抽对了又多写了一行废话：三元组全对，整行不算全对
    extra = triple_f1(["甲_组成_乙\n废话", "甲_组成_乙"], ["甲_组成_乙"] * 2)
    assert (extra["score"], extra["details"]["exact_match"]) == (1.0, 0.5)
    # 空的那条参考不再因为没有抽出三元组而算最好
    assert triple_f1(["废话"], [["甲_组成_乙", ""]])["details"]["expected"] == 1
    assert triple_f1([""], [["甲_组成_乙", ""]])["score"] == 1.0
    # 早先的结果没有 malformed 一列，照旧算
    assert registry.SCORERS["triple_f1"](np.asarray([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])).tolist() == [0.5, 1.0]


def test_nonsense_never_equals_an_empty_reference():
    assert label_f1(["胡言乱语"], [""])["score"] == rouge(["胡言乱语"], [""])["score"] == 0.0
    assert label_f1([" "], [""])["score"] == rouge([" "], [""])["score"] == 1.0


def test_triple_f1_takes_the_best_of_several_references():
    result = triple_f1(["甲_组成_乙"], [["丙_组成_丁\n戊_组成_己", "甲_组成_乙"]])
    assert result["score"] == 1.0
    assert result["details"]["expected"] == 1


# ---- 标签 ----


def test_label_f1_exact_values_and_answers_outside_the_labels():
    result = label_f1(["正面", " 负面", "正面", "不知道"], ["正面", "负面", "负面", "正面"])
    # 正面：tp 1，预测 2，参考 2 → 0.5；负面：tp 1，预测 1，参考 2 → 2/3
    assert result["score"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert score(result, "accuracy") == 0.5
    assert (result["details"]["out_of_label"], result["details"]["out_of_label_kinds"]) == (1, 1)
    assert result["details"]["out_of_label_examples"] == ["不知道"]
    assert result["details"]["per_label"]["负面"] == {
        "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "correct": 1, "predicted": 1, "expected": 2,
    }  # fmt: skip


def test_label_f1_full_width_and_several_references():
    assert label_f1(["Ａ", "B"], [["C", "A"], "Ｂ"])["score"] == 1.0


def test_label_f1_given_labels():
    result = label_f1(["甲", "甲"], ["甲", "乙"], labels=["甲", "乙", "丙"])
    # 丙从未出现，不进平均：甲 2/3，乙 0
    assert result["score"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"\['甲'\].*\['乙'\]"):
        label_f1(["甲"], ["乙"], labels=["甲"])


# ---- 生成 ----


def test_segment_keeps_latin_words_and_splits_han():
    assert text.segment("风扇ABC 12.5km，不转") == ["风", "扇", "ABC", "12.5km", "，", "不", "转"]


def test_segment_is_that_of_the_pinned_sacrebleu():
    """docs/evaluation.md 说的；换了 sacrebleu 的版本要重看。"""
    assert text.segment("㐀豈３℃“Ⅲ①—") == list("㐀豈３℃“Ⅲ①—")
    assert text.segment("\U00020000\U00020001 あア한") == ["\U00020000\U00020001", "あア한"]


def test_rouge_exact_values():
    result = rouge(["风扇不转了吗"], ["风扇不转动了"])
    # 六字对六字，共有 5 字；二元组共有 风扇、扇不、不转；最长公共子序列 风扇不转了
    assert score(result, "rouge1") == pytest.approx(5 / 6)
    assert score(result, "rouge2") == pytest.approx(3 / 5)
    assert result["score"] == score(result, "rougeL") == pytest.approx(5 / 6)
    assert score(result, "bleu4") == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert score(result, "distinct2") == 1.0


def test_rouge_perfect_empty_and_repeated():
    perfect = rouge(["风扇不转动", "空调不制冷"], ["风扇不转动", "空调不制冷"])
    assert [score(perfect, k) for k in ("rouge1", "rouge2", "rougeL")] == [1.0, 1.0, 1.0]
    assert score(perfect, "bleu4") == pytest.approx(1.0)
    empty = rouge([""], ["风扇"])
    assert [score(empty, k) for k in ("rouge1", "rouge2", "rougeL", "bleu4", "distinct2")] == [0.0] * 5
    assert empty["details"]["empty_predictions"] == 1
    # 二元组 6 个，不同的 2 个
    repeated = rouge(["风扇风", "风扇风", "风扇风"], ["风", "风", "风"])
    assert score(repeated, "distinct2") == pytest.approx(2 / 6)
    low, high = repeated["details"]["distinct2"]["ci_low"], repeated["details"]["distinct2"]["ci_high"]
    assert low == high == pytest.approx(2 / 6)


def test_rouge_takes_the_best_of_several_references():
    result = rouge(["风扇不转"], [["发动机水温高", "风扇不转"]])
    assert result["score"] == 1.0
    assert score(result, "bleu4") == pytest.approx(1.0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(short_text, short_text), min_size=1, max_size=5))
def test_rouge_agrees_with_the_rouge_score_package(pairs):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

    class Tokenizer:
        def tokenize(self, line):
            return text.segment(line)

    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Tokenizer())
    for prediction, reference in pairs:
        words = text.segment(prediction), text.segment(reference)
        if not any(words):
            continue  # 两边都空：本项目算全对，那边算零
        theirs = scorer.score(reference, prediction)
        expected = [theirs[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")]
        assert text.rouge_f1(*words) == pytest.approx(tuple(expected))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(short_text, short_text), min_size=1, max_size=6))
def test_bleu_agrees_with_sacrebleu_on_the_corpus(pairs):
    from sacrebleu.metrics import BLEU

    predictions, references = [p for p, _ in pairs], [r for _, r in pairs]
    expected = BLEU(tokenize="zh", effective_order=True).corpus_score(predictions, [references]).score / 100
    found = score(rouge(predictions, references, num_resamples=2), "bleu4")
    assert found == pytest.approx(expected)
    if any(len(text.segment(prediction)) > 3 for prediction in predictions):
        assert found == pytest.approx(BLEU(tokenize="zh").corpus_score(predictions, [references]).score / 100)


@pytest.mark.parametrize("answers", [["正面", "负面"], ["好"], ["正面", "水温高"]])
def test_bleu_of_right_answers_under_four_words_is_one(answers):
    result = rouge(answers, answers, num_resamples=20)
    assert [result["details"]["bleu4"][key] for key in ("ci_low", "ci_high")] == pytest.approx([1.0, 1.0])
    assert score(result, "bleu4") == pytest.approx(1.0)
    assert score(rouge(["正中", "反面"], ["正面", "反面"]), "bleu4") == pytest.approx((3 / 4 * 1 / 2) ** 0.5)


@given(st.text(alphabet="abcd", max_size=12), st.text(alphabet="abcd", max_size=12))
def test_lcs_length_agrees_with_dynamic_programming(first, second):
    table = np.zeros((len(first) + 1, len(second) + 1), int)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    assert text.lcs_length(first, second) == table[-1, -1]


# ---- NLL ----


def test_nll_weighs_every_target_token_the_same():
    result = nll([2.0, 9.0], [1, 3])
    assert result["score"] == pytest.approx(11 / 4)
    assert result["details"] == {"perplexity": pytest.approx(np.exp(11 / 4)), "num_target_tokens": 4}
    assert result["ci_low"] == pytest.approx(2.0)
    assert result["ci_high"] == pytest.approx(3.0)


# ---- 区间与配对比较 ----


def make_rows(num_rows, right, seed=0):
    references = [f"头{i}_关系_尾{i}" for i in range(num_rows)]
    chosen = set(random.Random(seed).sample(range(num_rows), right))
    return [text if i in chosen else "错_关系_错" for i, text in enumerate(references)], references


def test_interval_is_seeded_and_has_the_right_width():
    predictions, references = make_rows(400, 200)
    first = triple_f1(predictions, references)
    assert first == triple_f1(predictions, references)
    assert first["ci_low"] != triple_f1(predictions, references, seed=1)["ci_low"]
    assert first["score"] == 0.5
    # 每行恰有一个预测与一个参考，F1 就是 400 次伯努利试验的均值：半宽 1.96 × sqrt(0.25 / 400) = 0.049
    assert first["ci_high"] - 0.5 == pytest.approx(0.049, abs=0.006)
    assert 0.5 - first["ci_low"] == pytest.approx(0.049, abs=0.006)


def test_resample_sums_is_a_bootstrap_over_rows():
    sums = bootstrap.resample_sums(np.eye(3), 250, seed=7)
    assert sums.shape == (250, 3)
    assert (sums.sum(axis=1) == 3).all()
    assert sums.max() == 3
    assert (sums == bootstrap.resample_sums(np.eye(3), 250, seed=7)).all()


# ---- 错误与登记表 ----


@pytest.mark.parametrize("name", ["triple_f1", "label_f1", "rouge"])
def test_bad_input(name):
    with pytest.raises(ValueError, match="预测有 2 行，参考有 1 行"):
        METRICS[name](["甲", "乙"], ["甲"])
    with pytest.raises(ValueError, match="没有可评测的行"):
        METRICS[name]([], [])
    with pytest.raises(ValueError, match="第 2 行"):
        METRICS[name](["甲", "乙"], ["甲", []])


def test_nll_bad_input():
    with pytest.raises(ValueError, match="损失有 1 行，token 数有 0 行"):
        nll([1.0], [])
    with pytest.raises(ValueError, match="没有目标 token"):
        nll([0.0], [0])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("triple_f1", (["甲_组成_乙", "坏"], ["甲_组成_乙", ""])),
        ("label_f1", (["正面", "负面"], ["正面", "正面"])),
        ("rouge", (["风扇", "不转动了"], ["风扇", "不转了"])),
        ("nll", ([1.5, 2.0], [3, 4])),
    ],
)
def test_every_metric_has_the_common_form(name, arguments):
    result = METRICS[name](*arguments)
    assert set(result) == {"metric", "score", "ci_low", "ci_high", "num_rows", "details", "per_row"}
    assert result["metric"] == name
    assert result["num_rows"] == 2 == len(result["per_row"]["counts"])
    assert result["ci_low"] <= result["score"] <= result["ci_high"]
    json.dumps(result, allow_nan=False)
    # 总分可以由保存的各行计数算回来
    total = np.asarray(result["per_row"]["counts"]).sum(axis=0, keepdims=True)
    assert registry.SCORERS[name](total)[0] == pytest.approx(result["score"])
    assert f"{result['score']:.4f}" in format_result(result)


def test_registry_keys():
    assert list(METRICS) == ["triple_f1", "label_f1", "rouge", "nll"] == list(registry.SCORERS)
    assert set(METRICS) >= registry.LOWER_IS_BETTER


# ---- 表格 ----


def test_format_table_aligns_wide_characters():
    assert format_table(["关系", "F1"], [["部件故障", "0.5"], ["a", "12.25"]]).splitlines() == [
        "关系         F1",
        "--------  -----",
        "部件故障    0.5",
        "a         12.25",
    ]
    assert display_width("中a，") == 5


def test_format_result_shows_relations():
    text = format_result(triple_f1(["甲_组成_乙\n坏"], ["甲_组成_乙"]))
    assert text.splitlines()[0].split() == ["triple_f1（1", "行）", "分数", "95%", "区间"]
    assert [line.split()[:-3] for line in text.splitlines()[2:5]] == [["三元组", "F1"], ["精确率"], ["召回率"]]
    numbers = [part.rpartition(" ")[2] for part in text.splitlines()[6].split("，")]
    assert numbers == ["0.0000", "1", "1", "1", "1", "0", "0", "0"]
    assert text.splitlines()[-1].split() == ["组成", "1.0000", "1.0000", "1.0000", "1", "1"]


def test_format_result_keeps_relations_outside_the_references_in_one_row():
    long = "很长的关系名" * 5
    result = triple_f1([f"甲_{long}_乙\n甲_一_乙\n甲_二_乙\n丙_二_丁", ""], [f"甲_{long}_乙", "甲_三_乙"])
    assert list(result["details"]["per_relation"]) == ["三", long, "一", "二"]
    assert [line.split() for line in format_result(result).splitlines()[-3:]] == [
        ["三", "0.0000", "0.0000", "0.0000", "0", "1"],
        ["很长的关系名很长的…", "1.0000", "1.0000", "1.0000", "1", "1"],
        ["其他（2", "种）", "0.0000", "-", "0.0000", "3", "0"],
    ]
    # 参考里一个关系也没有
    nothing = format_result(triple_f1(["甲_一_乙"], [""])).splitlines()
    assert nothing[-1].split() == ["其他（1", "种）", "0.0000", "-", "0.0000", "1", "0"]
    assert "关系" not in format_result(triple_f1([""], [""]))


def test_format_result_keeps_labels_outside_the_task_in_one_row():
    text = format_result(label_f1(["甲", "丙", "丁", "丁"], ["甲", "甲", "", "甲"]))
    assert [line.split() for line in text.splitlines()[-3:]] == [
        ["（空）", "0.0000", "0.0000", "0.0000", "0", "1"],
        ["甲", "1.0000", "0.3333", "0.5000", "1", "3"],
        ["其他（2", "种）", "0.0000", "-", "0.0000", "3", "0"],
    ]
    assert re.search(r"回答 3，.*种数 2", text)
    assert "其他" not in format_result(label_f1(["甲"], ["甲"]))


def test_the_console_has_no_english_keys():
    results = [triple_f1(["坏"], [""]), label_f1(["甲"], ["乙"]), rouge(["风扇"], ["风"]), nll([1.0], [2])]
    for result in results:
        title, *lines = format_result(result).splitlines()
        assert title.startswith(result["metric"])
        keys = [key for key in (result["metric"], *result["details"]) if NAMES.get(key, "distinct-2") != key]
        assert not [key for key in keys if any(f"{key} " in f"{line} " for line in lines)]
    assert [line.split()[0] for line in format_result(results[2]).splitlines()[2:7]] == [
        "ROUGE-L", "ROUGE-1", "ROUGE-2", "BLEU-4", "distinct-2",
    ]  # fmt: skip


def test_names_and_control_characters_in_the_terminal():
    assert shorten("a" * 20) == "a" * 20
    assert shorten("a" * 21) == "a" * 19 + "…"
    assert shorten("字" * 11) == "字" * 9 + "…"
    assert shorten("a\nb") == "a␤b"
    assert visible("a\tb\r\nc\rd\x1b[0m\x7f\x85\u2028\n") == "a    b\nc␍d␛[0m\ufffd␤␤\n"
