"""选择题：读两种公布的写法，提示的每个字，对数概率等于直接算的，几个检查点并排与相减。"""

import json
import math

import numpy as np
import pytest
import torch
from paths import ROOT

from finetune.checkpoint.inspection import inspect_checkpoint, load_checkpoint_tokenizer
from finetune.inference import choices
from finetune.metrics.choices import accuracy, accuracy_change
from scripts import evaluate_choices

OWN = ROOT / "data" / "choices"


def test_ceval_files(tmp_path):
    path = tmp_path / "law_val.csv"
    path.write_text(
        'id,question,A,B,C,D,answer,explanation\n0,"甲____,\n乙",一,"二,三",四,五,B,因为\n1,丙,一,二,三,四,d,\n',
        encoding="utf-8",
    )
    assert choices.read_questions(path) == {
        "law": [
            choices.Question(f"{path}:3", "甲____,\n乙", ("一", "二,三", "四", "五"), "B"),
            choices.Question(f"{path}:4", "丙", ("一", "二", "三", "四"), "D"),
        ]
    }


def test_cmmlu_files(tmp_path):
    (tmp_path / "b.csv").write_text(",Question,A,B,C,D,Answer\n0, 甲 , 1,2,3,4,a \n", encoding="utf-8-sig")
    (tmp_path / "a.csv").write_text(",Question,A,B,C,D,Answer\n0,乙,1,2,3,4,C\n", encoding="utf-8")
    found = choices.read_questions(tmp_path)
    assert list(found) == ["a", "b"]
    assert found["b"][0][1:] == ("甲", (" 1", "2", "3", "4"), "A")


def test_a_column_may_name_the_subject(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("subject,question,A,B,C,D,answer\n数学,甲,1,2,3,4,A\n,乙,1,2,3,4,B\n", encoding="utf-8")
    assert {name: len(part) for name, part in choices.read_questions(path).items()} == {"数学": 1, "own": 1}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("id,question,A,B,C,D\n0,甲,1,2,3,4\n", r"answer 列.*val"),
        ("question,A,B,C,answer\n甲,1,2,3,A\n", r"缺少 d 列"),
        ("question,A,B,C,D,answer\n甲,1,2,3,4,A\n乙,1,2,3,4,E\n", r"x\.csv:3: 答案 'E'"),
        ("question,A,B,C,D,answer\n", "一题也没有"),
    ],
)
def test_bad_files(tmp_path, text, expected):
    path = tmp_path / "x.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=expected):
        choices.read_questions(path)
    with pytest.raises(ValueError, match="不是 CSV"):
        choices.read_questions(tmp_path / "none")


def test_our_own_questions_are_well_formed():
    subjects, shots = (choices.read_questions(OWN / part) for part in ("val", "dev"))
    assert choices.examples_beside(OWN / "val") == choices.examples_beside(OWN / "val" / "car_repair_val.csv")
    assert choices.subject_names(OWN / "val").keys() == subjects.keys() == shots.keys()
    assert {name: (len(part), len(shots[name])) for name, part in subjects.items()} == dict.fromkeys(subjects, (8, 5))
    for part in (*subjects.values(), *shots.values()):
        assert all(len(set(question.options)) == 4 and all(question.options) for question in part)
    counts = [sum(q.answer == label for part in subjects.values() for q in part) for label in choices.LABELS]
    assert max(counts) - min(counts) <= 3


def test_the_prompt_is_the_published_one():
    shot = choices.Question("", "例题", ("一", "二", "三", "四"), "C")
    question = choices.Question("", "题目", ("甲", "乙", "丙", "丁"), "A")
    ((whole, bare),) = choices.question_texts([question], [shot], choices.DESCRIPTION.format(subject="法学"))
    opening = "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
    asked = "题目\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案："
    assert whole == opening + "例题\nA. 一\nB. 二\nC. 三\nD. 四\n答案：C\n\n" + asked
    assert bare == opening + asked


def test_examples_are_dropped_until_it_fits(tiny_checkpoint):
    tokenizer = load_checkpoint_tokenizer(inspect_checkpoint(tiny_checkpoint()))
    question = choices.Question("文件:2", "题目", ("甲", "乙", "丙", "丁"), "A")
    subjects, shots = {"x": [question]}, {"x": [question] * 3}
    lengths = [len(tokenizer.encode_plain(text)) for text in choices.question_texts([question], shots["x"], "")[0]]
    for kept, limit in ((3, lengths[0] + 1), (2, lengths[0]), (0, lengths[3] + 1)):
        prompts = choices.encode_questions(tokenizer, subjects, shots, "", {}, limit)
        assert (len(prompts.ids[0]), prompts.num_shortened) == (lengths[3 - kept], int(kept < 3))
        assert [tokenizer.decode(ids) for ids in prompts.labels] == list(choices.LABELS)
    with pytest.raises(ValueError, match=rf"文件:2: .*{lengths[3]} 个 token.*{lengths[3]} 个"):
        choices.encode_questions(tokenizer, subjects, shots, "", {}, lengths[3])


def test_accuracy_is_averaged_over_subjects_and_over_questions():
    correct = {"甲": [True, True, False, False], "乙": [True] * 8 + [False] * 4}
    found = accuracy(correct)
    scores = {name: entry["score"] for name, entry in found.items()}
    assert scores == pytest.approx({"甲": 0.5, "乙": 2 / 3, "mean": 7 / 12, "all": 10 / 16})
    assert found["甲"]["ci_low"] == 0.0 and found["甲"]["ci_high"] == 1.0
    # 乙：12 题里对 8 题的二项分布，2.5% 与 97.5% 处是 5 题与 11 题
    assert (found["乙"]["ci_low"], found["乙"]["ci_high"]) == pytest.approx((5 / 12, 11 / 12))
    assert accuracy(correct) == found
    with pytest.raises(ValueError, match="mean"):
        accuracy({"mean": [True]})


def test_the_change_is_paired():
    first = {"甲": [index % 2 == 0 for index in range(200)]}
    assert accuracy_change(first, first)["mean"] == {"score": 0.0, "ci_low": 0.0, "ci_high": 0.0}
    second = {"甲": [*first["甲"][:-10], *[True] * 10]}  # 只有 5 题不同
    change, alone = accuracy_change(first, second)["mean"], accuracy(second)["mean"]
    assert change["score"] == pytest.approx(5 / 200)
    assert 0 < change["ci_low"] < change["ci_high"] < 0.06  # 配对：比各自的区间窄得多
    assert alone["ci_high"] - alone["ci_low"] > 0.1
    with pytest.raises(ValueError, match="不是同样的题"):
        accuracy_change(first, {"甲": first["甲"][:-1]})


def test_two_checkpoints_side_by_side(tiny_checkpoint, tmp_path, capsys):
    options = {"model_max_length": 1024}
    paths = [tiny_checkpoint(**options), tiny_checkpoint(seed=7, **options)]
    output = tmp_path / "out.json"
    words = [str(OWN / "val"), "--checkpoint", *map(str, paths), "--output_path", str(output), "--shots", "2"]
    assert evaluate_choices.main([*words, "--precision", "fp32", "--num_threads", "1", "--batch_size", "5"]) == 0
    result, printed = json.loads(output.read_text(encoding="utf-8")), capsys.readouterr().out
    assert result["num_questions"] == {"car_repair": 8, "chinese_words": 8, "daily_science": 8}
    for entry, path in zip(result["checkpoints"], paths, strict=True):
        found = [row["log_probs"] for part in entry["questions"].values() for row in part]
        assert np.abs(np.array(found) - direct_scores(path)).max() < 2e-5
        for subject, part in entry["questions"].items():
            picked = [choices.LABELS[int(np.argmax(row["log_probs"]))] for row in part]
            assert [row["chosen"] for row in part] == picked
            share = sum(row["chosen"] == row["answer"] for row in part) / 8
            assert math.isclose(entry["accuracy"][subject]["score"], share)
        mean = entry["accuracy"]["mean"]
        assert all(f"\n{name} " in printed for name in choices.subject_names(OWN / "val").values())
        assert "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * mean[k] for k in ("score", "ci_low", "ci_high"))) in printed
    first, second = result["checkpoints"]
    assert second["change"]["all"]["score"] == pytest.approx(
        second["accuracy"]["all"]["score"] - first["accuracy"]["all"]["score"]
    )
    assert evaluate_choices.main([str(tmp_path), "--checkpoint", str(paths[0])]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    words[words.index("--output_path") + 1] = str(tmp_path / "none" / "out.json")  # 评测之前就说
    assert evaluate_choices.main(words) == 2
    assert f"--output_path 的目录 {tmp_path / 'none'} 不存在" in capsys.readouterr().err
    words[words.index("--output_path") + 1] = str(output)
    for given, told in (("{subject}：{topic}", "{topic}"), ("{subject", "{subject"), ("{{subject}}", "{}")):
        assert evaluate_choices.main([*words, "--description", given]) == 2
        assert f"--description 里的 {told} 没有意义" in capsys.readouterr().err


@torch.no_grad()
def direct_scores(path) -> np.ndarray:
    """不成批、不填充地算各题四个字母的对数概率。"""
    from baichuan import BaichuanForCausalLM

    checkpoint = inspect_checkpoint(path)
    tokenizer, model = load_checkpoint_tokenizer(checkpoint), BaichuanForCausalLM.from_pretrained(path).eval()
    names, rows = choices.subject_names(OWN / "val"), []
    shots = choices.read_questions(OWN / "dev")
    for subject, questions in choices.read_questions(OWN / "val").items():
        opening = choices.DESCRIPTION.format(subject=names[subject])
        solved = "".join(f"{shot.prompt}{shot.answer}\n\n" for shot in shots[subject][:2])
        for question in questions:
            ids = tokenizer.encode_plain(opening + solved + question.prompt)
            log_probs = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            rows.append([float(log_probs[tokenizer.encode_plain(f"：{label}")[-1]]) for label in choices.LABELS])
    return np.array(rows)
