"""data/ 的六个文件：行数、格式、无重复、训练与测试不相交、标签正确，且能由生成脚本逐字节重现。"""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from paths import ROOT

from data.source import chooser as choosers
from data.source import d2q, make
from finetune.data.samples import read_samples
from finetune.metrics.triples import parse_triples

DATA = ROOT / "data"
SCRIPTS = ROOT / "scripts"
NUM_ROWS = {
    "spo_0.json": 480,
    "spo_1.json": 100,
    "d2q_0.json": 400,
    "d2q_1.json": 100,
    "cls_0.json": 600,
    "cls_1.json": 100,
}
RELATIONS = {"性能故障", "部件故障", "组成", "检测工具"}
README = (DATA / "README.md").read_text(encoding="utf-8")
MAX_TOTAL_BYTES = 1_200_000


def read_rows(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def read_task(task):
    return read_rows(f"{task}_0.json") + read_rows(f"{task}_1.json")


@pytest.mark.parametrize(("name", "num_rows"), NUM_ROWS.items())
def test_rows_and_fields(name, num_rows):
    content = (DATA / name).read_bytes()
    assert content.count(b"\n") == num_rows and content.endswith(b"\n") and b"\r" not in content
    rows = read_rows(name)
    assert all(list(row) == ["instruction", "input", "output"] for row in rows)
    assert all(value == value.strip() for row in rows for value in row.values())
    assert all(row["instruction"] and row["input"] for row in rows)
    assert len({row["instruction"] for row in rows}) == 1
    # 没有残留的模板标记，也没有重复的标点
    texts = [row["input"] + row["output"] for row in rows]
    assert not [text for text in texts if re.search(r"[{}\[\]|@^*]|[，。；、：]{2}|\(轮|\(侧|\(缸", text)]
    assert len(read_samples(DATA / name)) == num_rows


@pytest.mark.parametrize("name", NUM_ROWS)
def test_readme_states_the_measured_lengths(name):
    rows = read_rows(name)
    cells = [str(len(rows))]
    for field in ("input", "output"):
        lengths = sorted(len(row[field]) for row in rows)
        cells.append(f"{lengths[0]} / {lengths[len(lengths) // 2]} / {lengths[-1]}")
    line = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    assert line.split(" | ", 2)[2] == " | ".join(cells) + " |"


def test_readme_states_seeds_and_empty_outputs():
    for task, (_, seed, _, _) in make.TASKS.items():
        assert re.search(rf"\| {task} \| .* \| {seed} \|", README)
    empty = [sum(not row["output"] for row in read_rows(f"spo_{split}.json")) for split in (0, 1)]
    assert f"output 为空（训练 {empty[0]} 行，测试 {empty[1]} 行）" in README


def test_total_size():
    assert sum((DATA / name).stat().st_size for name in NUM_ROWS) < MAX_TOTAL_BYTES


@pytest.mark.parametrize("task", ["spo", "d2q", "cls"])
def test_no_duplicates_and_no_leakage(task):
    rows = read_task(task)
    assert len({row["input"] for row in rows}) == len(rows)


# 每 100 行里不同的四字串至少有这么多，词表或模板被删减时会跌破
@pytest.mark.parametrize(("task", "num_grams"), [("spo", 4800), ("d2q", 6000), ("cls", 2700)])
def test_texts_are_varied(task, num_grams):
    rows = read_rows(f"{task}_1.json")
    grams = {row["input"][i : i + 4] for row in rows for i in range(len(row["input"]) - 3)}
    assert len(grams) >= num_grams


def test_files_match_the_generator_byte_for_byte():
    files = make.make_files()
    assert list(files) == list(NUM_ROWS)
    assert [name for name in files if files[name] != (DATA / name).read_bytes()] == []


def test_generation_does_not_depend_on_hash_order():
    for hash_seed in ("1", "4242"):
        subprocess.run(
            [sys.executable, str(ROOT / "data" / "source" / "make.py"), "--check"],
            check=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            timeout=60,
        )


def test_check_reports_a_changed_file(tmp_path, monkeypatch):
    module = make
    monkeypatch.setattr(sys, "argv", ["make.py", "--output_dir", str(tmp_path)])
    module.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NUM_ROWS)
    (tmp_path / "cls_1.json").write_text("{}\n", encoding="utf-8")
    (tmp_path / "d2q_0.json").unlink()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--check"])
    with pytest.raises(SystemExit, match=r"与生成结果不同的文件：d2q_0\.json、cls_1\.json，请重新运行本脚本"):
        module.main()


def test_chooser_gives_the_same_sequence_everywhere():
    chooser = choosers.Chooser(1)
    assert [chooser.below(100) for _ in range(6)] == [13, 84, 76, 25, 49, 44]
    assert chooser.some("abcdef", 4) == ["d", "e", "a", "b"]
    assert [chooser.weighted([("x", 1), ("y", 3)]) for _ in range(6)] == ["y", "y", "y", "x", "y", "y"]


# ---- 三元组抽取 ----


def test_triples_are_well_formed_and_occur_in_the_text():
    for row in read_task("spo"):
        lines = row["output"].splitlines()
        triples, malformed = parse_triples(row["output"])
        assert malformed == 0 and len(triples) == len(lines)
        for line in lines:
            head, relation, tail = line.split("_")
            assert relation in RELATIONS
            assert head in row["input"] and tail in row["input"], line


def test_triples_follow_the_text():
    # 故障的主体与状态在文本里相连，中间至多一个“已经”
    for row in read_task("spo"):
        for line in row["output"].splitlines():
            head, relation, tail = line.split("_")
            if relation in ("性能故障", "部件故障"):
                assert re.search(re.escape(head) + "(已经|已)?" + re.escape(tail), row["input"]), line
            if relation == "检测工具":
                assert re.search(f"[用]{re.escape(head)}(测量|检测|检查|采集|读取){re.escape(tail)}", row["input"]), (
                    line
                )


def test_every_relation_is_frequent_and_empty_outputs_are_few():
    counts = Counter(line.split("_")[1] for row in read_rows("spo_0.json") for line in row["output"].splitlines())
    assert min(counts[relation] for relation in RELATIONS) >= 200
    for split, num_empty in ((0, 29), (1, 2)):
        assert sum(not row["output"] for row in read_rows(f"spo_{split}.json")) == num_empty


def test_excluded_faults_are_not_triples():
    pattern = re.compile(r"由此排除了(.+?)的可能|没有发现([^，。]+?)的情况|起初怀疑(.+?)，实车检查后予以否定")
    claims = 0
    for row in read_task("spo"):
        for match in pattern.finditer(row["input"]):
            claim = next(group for group in match.groups() if group)
            claims += 1
            assert claim not in {"".join(line.split("_部件故障_")) for line in row["output"].splitlines()}, claim
    assert claims >= 20


# ---- 问题生成 ----


def test_documents_have_uneven_lengths_and_questions_end_with_a_mark():
    rows = read_task("d2q")
    lengths = [len(row["input"]) for row in rows]
    assert min(lengths) >= 50 and 450 <= max(lengths) <= 600
    assert all(row["output"].endswith("？") and row["output"].count("？") == 1 for row in rows)


def test_numbers_and_names_in_questions_come_from_the_document():
    # 问题里的数字与拉丁字母都要能在文档里找到
    for row in read_task("d2q"):
        for word in re.findall(r"[A-Za-z0-9.]+", row["output"]):
            assert word in row["input"], row["output"]


def test_articles_are_split_between_train_and_test():
    module = d2q
    articles = [
        article for name in module.FACT_FILES for article in module.read_facts(DATA / "source" / "words" / name)
    ]
    assert len(articles) == 72

    def used(name):
        text = "\n".join(row["input"] for row in read_rows(name))
        return {article.name for article in articles if article.sentences[0].text in text}

    train, test = used("d2q_0.json"), used("d2q_1.json")
    assert (len(train), len(test)) == (56, 16) and not train & test


def test_question_is_answered_by_a_kept_sentence():
    # 知识短文的问题只属于一句，那一句必须在文档里
    module = d2q
    answers = {
        question: sentence.text
        for name in module.FACT_FILES
        for article in module.read_facts(DATA / "source" / "words" / name)
        for sentence in article.sentences
        for question in sentence.questions
    }
    found = [row for row in read_task("d2q") if row["output"] in answers]
    assert len(found) == 72 * module.ROWS_PER_ARTICLE
    assert all(answers[row["output"]] in row["input"] for row in found)


# ---- 情感分类 ----


@pytest.mark.parametrize("name", ["cls_0.json", "cls_1.json"])
def test_labels_are_balanced(name):
    labels = Counter(row["output"] for row in read_rows(name))
    assert labels == {"正面": NUM_ROWS[name] // 2, "负面": NUM_ROWS[name] // 2}


def test_reviews_contain_both_labels_of_hard_cases():
    for words in (("虽然", "尽管", "不过", "可是"), ("有人说", "之前看评论说", "本来还以为", "都说")):
        labels = Counter(
            row["output"] for row in read_rows("cls_0.json") if any(word in row["input"] for word in words)
        )
        assert min(labels["正面"], labels["负面"]) >= 25, words
