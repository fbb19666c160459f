"""compare.py：几个检查点的回答并排，终端与 HTML。"""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from generating import by_hand, make_adapter

import predict
from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from finetune.cli.predict_flags import parse_args
from finetune.data.samples import Sample
from finetune.inference.side_by_side import comparison_settings, comparison_text, shown_answer, side_by_side, wrap


def answers_of(base, texts):
    model = BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = BaichuanTokenizer.from_pretrained(base)
    ids = [by_hand(model, tokenizer.encode_plain(text), 6) for text in texts]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in ids]


def test_compare_checkpoints(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    bases = [tiny_checkpoint("baichuan2-7b"), tiny_checkpoint("baichuan2-7b", seed=7)]
    adapter = make_adapter(bases[0], tmp_path / "adapter")
    texts = ["抽取<甲>", "风扇不转"]
    path = tmp_path / "test.json"
    path.write_text("".join(json.dumps({"input": text, "output": "参考&"}) + "\n" for text in texts))
    html = tmp_path / "out.html"
    flags = ["--compare", *bases, adapter, "--test_path", path, "--output_path", html]
    flags += ["--device", "cpu", "--precision", "fp32", "--max_new_tokens", 6]
    assert predict.main([str(flag) for flag in flags]) == 0
    captured = capsys.readouterr()
    assert "2 行里 2 行" in captured.err
    page = html.read_text(encoding="utf-8")
    assert "抽取&lt;甲&gt;" in page and "参考&amp;" in page
    assert "http" not in page and "<script" not in page
    assert page.count('<tr class="differs">') == 2
    import html as escaping

    for base in bases:
        for answer in answers_of(base, texts):
            assert f'<td class="answer">{escaping.escape(answer)}</td>' in page
    for path in bases:
        assert f'<span class="path">{path.resolve()}\n提示词格式 plain</span></th>' in page
    assert f'\n<span class="path">{adapter.resolve()}\n基座 {bases[0].resolve()}\n提示词格式 plain</span>' in page
    settings = r"<p>max_new_tokens 6；贪心；repetition_penalty 1\.0；精度 float32，设备 cpu；"
    assert re.search(settings + r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}</p>", page)
    assert "baichuan2-7b" in captured.out and "adapter" in captured.out
    assert "user：抽取<甲>" in captured.out and "参考：参考&" in captured.out


def test_only_one_model_is_in_memory(tiny_checkpoint, tmp_path, monkeypatch):
    import gc
    import weakref

    base, alive = tiny_checkpoint("baichuan2-7b"), []
    original = predict.Predictor.load_model

    def load_model(self, device):
        gc.collect()
        assert [reference() for reference in alive if reference() is not None] == []
        original(self, device)
        alive.append(weakref.ref(self.model))

    monkeypatch.setattr(predict.Predictor, "load_model", load_model)
    monkeypatch.chdir(tmp_path)
    flags = ["--compare", base, tiny_checkpoint("baichuan2-7b", seed=7), "--input", "甲", "--max_new_tokens", 2]
    assert predict.main([str(flag) for flag in (*flags, "--device", "cpu")]) == 0
    assert len(alive) == 2
    assert (tmp_path / "compare.html").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compare", "x"], "--compare 要两个以上的检查点目录，现在只有 x，请再给一个"),
        (["--compare", "x", "y"], "--compare 需要提示词"),
        (["--compare", "x", "y", "--input", "甲", "--adapter", "z"], "--adapter 不能与 --compare 同用"),
        (["--compare", "x", "y", "--input", "甲"], "x 不存在"),
        ([], "请给出 --model_path（一个检查点）或 --compare（两个以上）"),
    ],
)
def test_misuse(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert predict.main(flags) == 2
    assert message in capsys.readouterr().err


def test_every_setting_is_named_in_the_page():
    flags = ["--do_sample", "--top_p", "0.8", "--seed", "7", "--max_new_tokens", "9", "--max_src_len", "30"]
    args = parse_args(["--compare", "x", "y", *flags, "--stop", "甲", "--load_in_4bit", "--precision", "bf16"])
    args.batch_size = 8
    assert comparison_settings(SimpleNamespace(args=args), torch.device("cpu")).rpartition("；")[0] == (
        "max_new_tokens 9；采样（temperature 1.0、top_p 0.8、top_k 0、seed 7、batch_size 8）；repetition_penalty 1.0；"
        "max_src_len 30；stop ['甲']；精度 bfloat16，基座 4 位，设备 cpu"
    )


def test_tabs_and_newlines_keep_the_columns():
    lines = side_by_side(["甲\t乙\r\n丙", "x\ny\x1b[1m\rz"], 25)
    assert lines == ["甲    乙    │  x", "丙          │  y␛[1m␍z"]
    row = Sample((("user", "问\t"),), line=3, path="x", references=("答\r",))
    text = comparison_text(["甲", "乙"], [row], [["一\t"], ["二\x0b"]], width=30)
    assert text.split("\n")[1:-1] == ["user：问    ", "参考：答␍", "", "甲：一    ", "乙：二␋"]


def test_newlines_blanks_and_right_answers_are_seen():
    row = Sample((("user", "问"),), line=1, path="x", references=("甲_乙\n丙_丁", "无"))
    answers = ["甲_乙\n\n  丙_丁\n", " \n\n", "", "无 ", "甲_乙丙_丁"]
    assert [shown_answer(answer, row) for answer in answers] == [
        "✓ 甲_乙↵\n丙_丁↵",
        "（空）",
        "（空）",
        "✓ 无 ",
        "甲_乙丙_丁",
    ]


def test_metric_scores_every_checkpoint(tiny_checkpoint, tmp_path, capsys):
    bases = [tiny_checkpoint("baichuan2-7b"), tiny_checkpoint("baichuan2-7b", seed=7)]
    path, html = tmp_path / "test.json", tmp_path / "out.html"
    answer = answers_of(bases[0], ["风扇不转"])[0]
    path.write_text("".join(json.dumps({"input": "风扇不转", "output": text}) + "\n" for text in (answer, "别的")))
    flags = ["--compare", *bases, "--test_path", path, "--output_path", html, "--metric", "label_f1"]
    flags += ["--device", "cpu", "--precision", "fp32", "--max_new_tokens", 6]
    assert predict.main([str(flag) for flag in flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    scores = [line.split()[-3] for line in lines if re.search(r"\d\.\d{4} \[0\.\d{4}, ", line)]
    assert scores == ["0.3333", "0.0000"]
    page = html.read_text(encoding="utf-8")
    assert [page.count(f" {score} [0.") for score in scores] == [1, 1]
    assert page.count('<td class="answer right">✓ ') == 1


def test_wrap_counts_wide_characters():
    assert wrap("甲乙丙", 4) == ["甲乙", "丙"]
    assert wrap("ab\n\n甲c", 3) == ["ab", "", "甲c"]
    assert side_by_side(["甲乙丙", "x"], 13) == ["甲乙  │  x", "丙    │"]


def test_narrow_terminals_stack():
    row = Sample((("user", "问"),), line=3, path="x", references=("答",))
    text = comparison_text(["甲", "乙"], [row], [["一"], ["二"]], width=30)
    assert text == "── 第 3 行 " + "─" * 20 + "\nuser：问\n参考：答\n\n甲：一\n乙：二\n"
