"""data_doctor：每一种发现的原话与行号、退出码、重复与泄漏的查找、标签与长度的统计、报告的对齐。"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT

from finetune.data.samples import row_options
from finetune.data_doctor import check as data_doctor
from finetune.data_doctor.check import check_files, main
from finetune.data_doctor.duplicates import TEST_BIT, compare
from finetune.data_doctor.report import bar, histogram, percentile
from finetune.terminal import display_width

ROW = {"instruction": "抽取：", "input": "水温高", "output": "水温_故障_高"}


@pytest.fixture
def write(tmp_path):
    """write(内容, 名字) -> 路径；内容是字节、字符串，或逐行写成 JSON 的列表。"""

    def make(content, name: str = "rows.json") -> str:
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return make


@pytest.fixture(scope="module")
def base(tiny_checkpoint) -> Path:
    return tiny_checkpoint("baichuan2-7b", layers=1, hidden_size=16, heads=2, chat=True)


def findings(*paths: str, test_path: str | None = None, limit: int = 20) -> list[tuple[str, str]]:
    """[(级别:种类, 去掉目录的一行)]，按文件与发现的次序。"""
    reports, _ = check_files(list(paths), test_path, None, limit, workers=1)
    listed = [finding for report in reports for found in report.findings.values() for finding in found]
    strip = os.path.dirname(paths[0]) + "/"
    return [(f"{finding.severity}:{finding.code}", str(finding).replace(strip, "")) for finding in listed]


def test_long_documents_are_not_truncated_and_both_answers_of_a_pair_are(write, base, capsys):
    """继续预训练的长文切成几段，不是截断；偏好对的两个回答都量；标注或坏回答不同的不是重复。"""
    flags = ["--model_name_or_path", str(base), "--max_len", "96", "--max_src_len", "64"]
    assert main(["check", write([{"text": "字句" * 400}]), "--task", "pretrain", *flags]) == 0
    pair = {"prompt": "问", "chosen": "好", "rejected": "坏"}
    assert main(["check", write([pair, {**pair, "rejected": "差"}]), "--task", "dpo", *flags]) == 0
    vote = {"prompt": "问", "completion": "答", "label": True}
    assert main(["check", write([vote, {**vote, "label": False}]), "--task", "kto", *flags]) == 0
    capsys.readouterr()
    assert main(["check", write([{**pair, "rejected": "龘" * 60}]), "--task", "dpo", *flags]) == 1
    assert "rejected: 全长 " in capsys.readouterr().out


# ---- 一行 ----


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([ROW], []),
        (
            '{"instruction": "问"}',
            ("error:field", "rows.json:1: output: 缺少这个字段，已有的字段：instruction: 请补上"),
        ),
        ('{"instruction": 3, "output": ""}', ("error:field", "rows.json:1: instruction: 应为字符串，实际是数字: ")),
        ("{bad", ("error:json", "rows.json:1: JSON: 不是合法的 JSON（第 2 列：")),
        ("[1]", ("error:row", "rows.json:1: 行: 应为 JSON 对象 {…}，实际是数字: ")),
        ('[{"input": "x", "output": "y"}', ("error:array", "rows.json:1: 数组: 数组没有结束的 ]，文件可能不完整: ")),
        (
            '{"input": "故", "output": "a"}\n'.encode() + b'{"input": "\xb9\xca", "output": "b"}',
            ("error:encoding", "rows.json:2: 编码: 第 12 个字节（0xb9）起"),
        ),
        (
            b'{"input": "\xb9\xca", "output": "b"}',
            ("error:file", "GB18030 编码: 请转成 UTF-8：iconv -f GB18030 -t UTF-8"),
        ),
        ([{**ROW, "tools": [1]}], ("error:field", "rows.json:1: tools: ")),
        ([{**ROW, "id": 3}], []),
        (b'{"input": "a\0", "output": ""}', ("error:encoding", "rows.json:1: 编码: 第 13 个字符是 NUL")),
        (b" \n\n", ("error:file", "rows.json:1: 文件: 没有任何样本（只有空白）: 请检查文件内容")),
        (b"", ("error:file", "（0 字节），没有任何样本: 请检查文件内容与路径")),
        (json.dumps(ROW).encode("utf-16"), ("error:file", "是 UTF-16 编码: 请转成 UTF-8：iconv -f UTF-16")),
        ([{**ROW, "output": ""}], ("note:empty_output", "rows.json:1: output: 回答是空的: ")),
        ([{**ROW, "output": " \n"}], ("warning:blank_output", "rows.json:1: output: 回答只有空白: ")),
        ([{"inputs": "x", **ROW}], []),
        (
            [{"instruction": "问", "inputs": "x", "output": "y"}],
            ("warning:field_name", "rows.json:1: inputs: 不认识的字段，没有用上；像是 input 写错了: 请改名为 input"),
        ),
        (
            [{**ROW, "input": "<reserved_106>与</s>和<reserved_106>"}],
            ("warning:control_token", "rows.json:1: input: 文字里有控制符号 </s>、<reserved_106>（共 3 处）: "),
        ),
        (
            [{"conversations": [{"from": "human", "value": "a<s>"}, {"from": "gpt", "value": "b"}]}],
            ("warning:control_token", "rows.json:1: conversations[0]: 文字里有控制符号 <s>（共 1 处）: "),
        ),
        (
            [{**ROW, "output": "水\ufffd温"}],
            ("warning:odd_character", "rows.json:1: output: 第 2 个字符是 U+FFFD（替换字符，原来的字在某次转码时"),
        ),
        (
            [{**ROW, "input": "a\u200b"}],
            ("warning:odd_character", ":1: input: 第 2 个字符是 U+200B（看不见的格式字符）"),
        ),
        ([{**ROW, "input": "👨\u200d👩"}], []),
        (
            b"\xef\xbb\xbf" + json.dumps(ROW).encode(),
            ("note:bom", "rows.json:1: 文件: 开头有 UTF-8 的字节序标记（BOM）"),
        ),
        (json.dumps(ROW).encode() + b"\r\n", ("note:crlf", "rows.json:1: 文件: 用 CRLF 换行（Windows）")),
    ],
)
def test_each_finding_says_where_what_and_how(write, content, expected):
    found = findings(write(content))
    if not expected:
        assert found == []
        return
    assert [kind for kind, _ in found] == [expected[0]]
    assert expected[1] in found[0][1]


def test_files_that_are_no_files(tmp_path, write):
    os.mkfifo(tmp_path / "pipe")
    assert "是一个目录: 请给出目录中的某个文件" in findings(str(tmp_path))[0][1]
    assert "不是普通文件（可能是管道或设备）: 请先存成文件" in findings(str(tmp_path / "pipe"))[0][1]
    assert "找不到数据文件" in findings(str(tmp_path / "none"))[0][1]
    deep = json.dumps(ROW)[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    huge = json.dumps(ROW)[:-1] + ', "x": ' + "7" * 5000 + "}"
    long = '{"input": "' + "x" * (65 << 20) + '", "output": ""}'
    kinds = findings(write("\n".join([deep, huge, long, json.dumps(ROW)])))
    assert [text.split(": ")[2] for _, text in kinds] == [
        "括号嵌套太深",
        "整数有 5000 位",
        "一行（或数组的一个元素）超过 64 MiB",
    ]
    cr = findings(write((json.dumps(ROW) + "\r") * 2))
    assert [kind for kind, _ in cr] == ["warning:cr", "error:json"]


def test_the_rest_is_counted_but_not_listed(write):
    path = write([{**ROW, "input": str(i), "output": ""} for i in range(30)])
    (report,), _ = check_files([path], None, None, 3, workers=1)
    assert len(report.findings["empty_output"]) == 3
    assert report.counts == Counter({("note", "empty_output"): 30, ("warning", "label_balance"): 1})


# ---- 截断 ----


def test_what_is_cut_is_told_exactly(write, base, capsys):
    path = write([ROW, {**ROW, "input": "水" * 100}, {**ROW, "output": "高" * 60}, {**ROW, "output": "完"}])
    assert main(["check", path, "--model_name_or_path", str(base), "--max_len", "64", "--max_src_len", "40"]) == 1
    lines = [
        line.split("rows.json:")[1]
        for line in capsys.readouterr().out.splitlines()
        if "rows.json:" in line and "，超过" in line
    ]
    from finetune.checkpoint.base_model import load_tokenizer
    from finetune.data.prompting import encode_sample
    from finetune.data.samples import read_samples

    tokenizer = load_tokenizer(base, 2000)
    samples = read_samples(path)
    whole = [encode_sample(s, tokenizer, "chat", 10**6, 10**5) for s in samples]
    cut = [encode_sample(s, tokenizer, "chat", 64, 40) for s in samples]
    src, total = whole[1].num_src_tokens, len(whole[2].input_ids)
    lost = total - len(cut[2].input_ids)
    first_lost = tokenizer.decode(whole[2].input_ids[total - lost :], skip_special_tokens=True)
    assert first_lost == "高高高"
    assert [item.src_truncated or item.tgt_truncated for item in cut] == [False, True, True, False]
    assert lines == [
        f"2: 提示: 提示 {src} token，超过 --max_src_len(40)，截去 {src - 40}（先丢较早的轮次，再截用户消息的尾部）: "
        f"请调大 --max_src_len（这一行要 {src}），或缩短这一行",
        f"3: output: 全长 {total} token，超过 --max_len(64)，回答 {total - whole[2].num_src_tokens} token 截去 {lost}"
        f"（从「{first_lost}」起，连同结束符）: "
        f"请调大 --max_len（这一行要 {total}），或拆分这一行",
    ]


def test_errors_are_what_training_refuses(write, base, tmp_path):
    """放不下角色标记的行训练会拒绝，体检算错误。"""
    talk = {"conversations": [{"role": r, "content": "你好"} for r in ("system", "user", "assistant")]}
    path = write([talk])
    command = ["check", path, "--model_name_or_path", str(base), "--json", str(tmp_path / "out.json")]
    assert main([*command, "--max_src_len", "1", "--max_len", "8"]) == 2
    (finding,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["findings"]
    assert (finding["code"], finding["severity"], finding["line"]) == ("prompt", "error", 1)
    assert finding["what"] == "--max_src_len(1) 太小，连角色标记都放不下，请至少调大 1"


# ---- 跨行 ----


def test_duplicates_conflicts_and_rows_shared_with_the_test_file(write):
    train = write([ROW, {**ROW, "output": "别的"}, {**ROW, "input": "Ａ b c"}, ROW, ROW], "train.json")
    other = write([ROW, {**ROW, "input": "独有"}], "other.json")
    test = write([{**ROW, "output": "x"}, {"input": "ab C"}, {"input": "新"}], "test.json")
    same = "与 train.json:1 完全相同（共 4 行相同）: 加 --drop_duplicates 只留一行（只在同一个文件里），或从文件中删去"
    assert findings(train, other, test_path=test) == [
        ("warning:duplicate", f"train.json:4: 行: {same}"),
        ("warning:duplicate", f"train.json:5: 行: {same}"),
        (
            "note:conflict",
            "train.json:2: 行: 与 train.json:1 的输入相同，回答不同（共 2 种回答）: "
            "答案应当唯一时请统一；本来就有多个答案的不必改",
        ),
        ("warning:duplicate", f"other.json:1: 行: {same}"),
        (
            "warning:shared_input",
            "test.json:1: 行: 输入与训练集的 train.json:1 相同（测试集里共 1 行）: 测出的分数会偏高，请从其中一份删去",
        ),
        (
            "warning:shared_document",
            "test.json:1: 行: 文档与训练集的 train.json:1 相同（测试集里共 1 行）: "
            "测出的分数会偏高，请按文档而不是按行划分训练集与测试集",
        ),
        (
            "warning:shared_document",
            "test.json:2: 行: 文档与训练集的 train.json:3 相同（测试集里共 1 行）: "
            "测出的分数会偏高，请按文档而不是按行划分训练集与测试集",
        ),
    ]
    _, totals = check_files([train, other], test, None, 20, workers=1)
    assert totals == {"duplicate": 3, "conflict": 1, "shared_input": 1, "shared_document": 2, "documents": 4}


def test_texts_have_no_input_to_conflict_about(write):
    path = write("一段文字。\n另一段文字。\n一段文字。\n", "corpus.txt")
    [report], totals = check_files([path], None, None, 20, workers=1, options=row_options({"task": "pretrain"}))
    assert totals == {"duplicate": 1, "conflict": 0, "shared_input": 0, "shared_document": 0, "documents": 2}
    assert dict(report.counts) == {("warning", "duplicate"): 1}


def test_comparison_agrees_with_plain_counting():
    rng = np.random.default_rng(0)
    keys = rng.choice(rng.integers(0, 2**64, 60, dtype=np.uint64), 400)
    answers = rng.integers(0, 3, 400).astype(np.uint64)
    positions = np.arange(1, 401, dtype=np.uint64)
    positions[300:] |= np.uint64(TEST_BIT)
    totals, found = compare(rng.permutation(np.column_stack([keys, answers, keys, positions])))
    found = {code: matches.tolist() for code, matches in found.items()}

    rows = list(zip(keys.tolist(), answers.tolist(), strict=True))
    train, test = rows[:300], rows[300:]
    duplicates = sum(n - 1 for n in [*Counter(train).values(), *Counter(test).values()])
    answers_of = {key: {a for k, a in train if k == key} for key, _ in train}
    shared = sum(key in answers_of for key, _ in test)
    assert totals == {
        "duplicate": duplicates,
        "conflict": sum(len(a) > 1 for a in answers_of.values()),
        "shared_input": shared,
        "shared_document": shared,
        "documents": len(set(keys.tolist())),
    }
    assert found["shared_document"] == found["shared_input"]
    assert all(len(matches) == totals[code] and matches == sorted(matches) for code, matches in found.items())
    first_repeat = min(i for i, row in enumerate(train, start=1) if row in train[: i - 1])
    position, other, count = found["duplicate"][0]
    assert (position, other) == (first_repeat, train.index(train[first_repeat - 1]) + 1)
    assert count == Counter(train)[train[first_repeat - 1]]
    firsts = {row: i for i, row in reversed(list(enumerate(train, start=1)))}  # （键, 回答）→ 最前的位置
    conflicts = {
        max(places): (min(places), len(places))
        for key, _ in train
        if len(places := [place for (other, _), place in firsts.items() if other == key]) > 1
    }
    position = min(conflicts)
    assert found["conflict"][0] == [position, *conflicts[position]]
    first_shared = next(i for i, (key, _) in enumerate(test) if key in answers_of)
    key = test[first_shared][0]
    assert found["shared_input"][0] == [
        TEST_BIT + 301 + first_shared,
        next(i for i, row in enumerate(train, start=1) if row[0] == key),
        sum(row[0] == key for row in test),
    ]
    shared_rows = [TEST_BIT + 301 + i for i, (key, _) in enumerate(test) if key in answers_of]
    assert [position for position, _, _ in found["shared_input"]] == shared_rows


def test_nothing_to_compare():
    totals, found = compare(np.zeros((0, 4), dtype=np.uint64))
    assert set(totals.values()) == {0}
    assert not any(len(matches) for matches in found.values())


def test_workers_change_nothing(write):
    rows = [
        {**ROW, "input": f"第 {i % 700} 行" + "水" * (i % 50), "output": "" if i % 90 == 0 else "答"}
        for i in range(2000)
    ]
    path = write(rows)
    results = []
    for workers in (1, 2):
        reports, totals = check_files([path], None, None, 5, workers=workers)
        results.append((reports[0].findings, reports[0].counts, reports[0].lengths, totals))
    assert results[0] == results[1]


# ---- 标签 ----


def test_labels(write):
    train = write([{"input": f"{i}", "output": "正面" if i else "负面"} for i in range(40)], "train.json")
    same = write([{"input": f"a{i}", "output": "正面"} for i in range(20)], "same.json")
    test = write([{"input": f"t{i}", "output": ["中性", "正面", " 正面。"][i % 3]} for i in range(30)], "test.json")
    labels = [(kind, text) for kind, text in findings(train, same, test_path=test) if "label" in kind]
    assert labels == [
        (
            "warning:label_balance",
            "train.json:1: output: 标签很不均匀：「正面」39 行，「负面」只有 1 行: "
            "请补充少的一类，评估时看每类的 F1 而不只看总的准确率",
        ),
        (
            "warning:label_balance",
            "same.json:1: output: 20 行的回答全是「正面」: 模型只会学到这一个回答，请补充其他标签的行",
        ),
        ("warning:label_variant", "test.json:1: output: '正面'、' 正面。' 像是同一个标签的不同写法: 请统一成一种"),
        (
            "warning:label_unseen",
            "test.json:1: output: 训练集里没有的标签：中性、 正面。（共 2 种）: 模型学不到它们，请检查写法或重新划分",
        ),
    ]


def test_free_answers_are_no_labels(write):
    path = write([{"input": f"{i}", "output": f"答案 {i}"} for i in range(60)])
    (report,), _ = check_files([path], None, None, 20, workers=1)
    assert not report.is_labelled
    path = write([{"input": f"{i}", "output": "长" * 65} for i in range(60)])
    (report,), _ = check_files([path], None, None, 20, workers=1)
    assert report.labels is None


# ---- 长度与报告 ----


def test_percentile_histogram_and_bar():
    lengths = Counter({1: 1, 2: 1, 3: 1, 4: 97})
    assert [percentile(lengths, p) for p in (0, 1, 2, 50, 100)] == [1, 1, 2, 4, 4]
    assert histogram(lengths) == [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 4, 97)]
    many = Counter({i: 1 for i in range(200, 1000)} | {5000: 1})
    bins = histogram(many)
    assert bins[0] == (200, 249, 50)
    assert bins[-1] == (950, 5000, 51)
    assert sum(count for _, _, count in bins) == 801
    assert [bar(share) for share in (0, 0.0001, 0.5, 1)] == ["", "▏", "█" * 20, "█" * 40]


def test_report_is_aligned_and_says_the_verdict(write, capsys):
    path = write([{"input": "水" * i, "output": ["正面", "B"][i % 2]} for i in range(1, 41)])
    assert main(["check", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "结论：没有问题（退出码 0）"
    assert lines[1].startswith(f"训练数据 {path}：40 行，可用的样本 40 条")
    start = lines.index(next(line for line in lines if line.startswith("标签（2 种）")))
    bars = lines[start + 2 : start + 4]
    assert len({display_width(line.split("█")[0]) for line in bars}) == 1
    assert [line.split()[:3] for line in bars] == [["B", "20", "50.0%"], ["正面", "20", "50.0%"]]


def test_a_leak_stands_at_the_top_with_three_examples_and_json_has_every_row(write, tmp_path, capsys):
    shared = [{**ROW, "input": f"第 {i} 台", "output": f"水温_{i}"} for i in range(304)]
    train = write(shared, "train.json")
    test = write([*shared, *({**ROW, "input": f"新 {i}"} for i in range(10))], "test.json")
    out = tmp_path / "out.json"
    assert main(["check", train, "--test_path", test, "--json", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "（退出码 1）" in lines[0]
    assert any("304" in line and "314" in line for line in lines[:5])
    counts = [line.split()[-1] for line in lines[:12] if "（shared_" in line]
    assert counts == ["304", "304"]
    assert sum(line.startswith(f"  {test}:") for line in lines) == 6
    found = json.loads(out.read_text(encoding="utf-8"))["findings"]
    for code in ("shared_input", "shared_document"):
        assert [finding["line"] for finding in found if finding["code"] == code] == list(range(1, 305))


def test_empty_answers_that_are_meant_change_nothing_but_blank_ones_do(write):
    assert main(["check", write([ROW, {**ROW, "input": "好", "output": ""}])]) == 0
    assert main(["check", write([ROW, {**ROW, "input": "好", "output": " "}])]) == 1


def test_a_missing_file_is_a_missing_file(write, tmp_path, capsys):
    names = [str(tmp_path / name) for name in ("none.json", "nowhere.json")]
    assert main(["check", names[0], write([ROW]), "--test_path", names[1]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(name in err for name in names)


def test_a_reader_may_stop_reading(write):
    path = write([ROW])
    command = f"set -o pipefail; {sys.executable} data_set.py check {path} | sleep 0"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")


def test_exit_codes_json_and_picture(write, tmp_path, base, capsys):
    good = write([ROW, {**ROW, "input": "风扇"}], "good.json")
    warned = write([ROW, ROW], "warned.json")
    broken = write('{"instruction": "问"}', "broken.json")
    assert [main(["check", path]) for path in (good, warned, broken, str(tmp_path / "none"))] == [0, 1, 2, 2]
    out, picture = tmp_path / "中文.json", tmp_path / "图.png"
    command = ["check", good, "--test_path", warned, "--model_name_or_path", str(base)]
    assert main([*command, "--json", str(out), "--picture", str(picture)]) == 1
    result = json.loads(out.read_text(encoding="utf-8"))
    assert (result["version"], result["exit_code"], result["length_unit"]) == (1, 1, "token")
    assert result["limits"] == {"max_len": 1024, "max_src_len": 768}
    assert [(file["path"], file["split"], file["num_rows"]) for file in result["files"]] == [
        (good, "train", 2),
        (warned, "predict", 2),
    ]
    assert {finding["code"] for finding in result["findings"]} == {"duplicate", "shared_input", "shared_document"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt_format", "chat"], "--prompt_format 只在给出 --model_name_or_path 时起作用"),
        (["--model_name_or_path", "nowhere"], "nowhere 里没有 config.json"),
        (["--max_findings", "0"], "必须至少为 1"),
        (["--json", "/nonexistent/out.json"], "No such file"),
    ],
)
def test_wrong_usage_is_an_error_with_a_reason(write, capsys, flags, message):
    assert main(["check", write([ROW]), *flags]) == 2
    assert message in capsys.readouterr().err


def test_no_chinese_font_is_needed(write, tmp_path, recwarn):
    path = write([{"input": f"{i}", "output": "正面"} for i in range(30)], "中文.json")
    assert main(["check", path, "--picture", str(tmp_path / "a.png")]) == 1
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_command_line(write):
    path = write([ROW, {"instruction": "问"}])
    command = [sys.executable, str(ROOT / "data_set.py"), "check", path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert f"{path}:2: output: 缺少这个字段" in result.stdout
    assert result.stderr == ""


# ---- show ----


def test_show_prints_the_pieces_and_writes_json(write, base, capsys, tmp_path):
    rows = [
        ROW,
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}], "id": 3},
        {**ROW, "tools": [1]},
    ]
    path, out = write(rows), tmp_path / "out.jsonl"
    code = main(["show", path, "--model_name_or_path", str(base), "--rows", "2-3", "--json", str(out)])
    printed = capsys.readouterr().out
    second, third = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert code == 2
    assert (second["line"], second["format"]) == (2, "messages")
    assert second["input_ids"][0] == 195
    assert second["labels"][-1] == second["input_ids"][-1] == 2
    assert len(second["labels"]) == len(second["input_ids"])
    assert [warning.endswith("id") for warning in second["warnings"]] == [True]
    assert (third["line"], third["input_ids"], third["labels"]) == (3, None, None)
    assert f"{path}:3: tools: " in third["warnings"][0]
    assert "⟦答" in printed
    assert "抽取" not in printed
    assert main(["show", path, "--model_name_or_path", str(base), "--rows", "1"]) == 0
    assert main(["show", path, "--model_name_or_path", str(base), "--rows", "9"]) == 2
    with pytest.raises(SystemExit):
        main(["show", path, "--model_name_or_path", str(base), "--rows", "0"])


def test_show_follows_the_flags_that_shape_a_sample(write, base, tmp_path):
    path, out = write([{**ROW, "tools": [1]}]), tmp_path / "out.jsonl"
    labels = {}
    for flags in (["--ignore_fields", "tools"], ["--ignore_fields", "tools", "--train_on_prompt"]):
        flags = [*flags, "--prompt_format", "plain", "--json", str(out)]
        assert main(["show", path, "--model_name_or_path", str(base), *flags]) == 0
        record = json.loads(out.read_text(encoding="utf-8"))
        labels[len(flags)] = (record["labels"] == record["input_ids"], -100 in record["labels"])
    assert list(labels.values()) == [(False, True), (True, False)]


def test_conversations_in_plain_are_a_counted_warning(write, base):
    talk = [
        {"role": "system", "content": "规"},
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "答"},
    ]
    path = write([ROW, {"messages": talk}])
    for prompt_format, counts in (("plain", 1), ("chat", 0)):
        args = data_doctor.build_parser().parse_args(
            ["check", path, "--model_name_or_path", str(base), "--prompt_format", prompt_format]
        )
        reports, _ = check_files([path], None, data_doctor.load_encoding(args), 20, workers=1)
        assert reports[0].counts["warning", "plain_turns"] == counts
        assert reports[0].formats == {"instruction/input/output": 1, "messages": 1}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("chek data/spo_0.json", ["'chek'", "是不是 check？"]),
        ("check", ["缺少 FILE"]),
        ("check data/spo_0.json --zzz x", ["--zzz x", "全名"]),
        ("check data/spo_0.json --model_name x", ["--model_name x", "是不是 --model_name_or_path？"]),
        ("check data/spo_0.json --max-src-len=9", ["--max-src-len=9", "是不是 --max_src_len？"]),
        ("check data/spo_0.json --workers many", ["--workers 应为整数", "'many'"]),
    ],
)
def test_a_wrong_line_gets_one_line(line, wanted, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(line.split())
    (said,) = capsys.readouterr().err.splitlines()
    assert [words for words in wanted if words not in said] == []
