"""file_prediction.py：接着做、换了设置就拒绝、几个进程的结果与一个进程相同。"""

import json
import re
import shutil

import pytest
from generating import ROWS

import predict
from finetune.inference import predict_file as file_prediction
from finetune.inference.predict_file import Progress
from finetune.inference.predictor import batches_left


@pytest.fixture
def flags(tiny_checkpoint, tmp_path):
    """两行一批，共两批。"""
    path = tmp_path / "test.json"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    base = tiny_checkpoint("baichuan2-7b")
    return [
        "--model_path", base, "--device", "cpu", "--precision", "fp32", "--max_new_tokens", 8, "--batch_size", 2,
        "--test_path", path, "--output_path", tmp_path / "out.jsonl",
    ]  # fmt: skip


def run(flags, *extra):
    return predict.main([str(flag) for flag in (*flags, *extra)])


def interrupt_after(monkeypatch, num_batches):
    """做完 num_batches 批之后 Ctrl-C；返回各次做的行数。"""
    original, sizes = predict.Predictor.predict_tasks, []

    def predict_tasks(self, tasks):
        for batch, records in original(self, tasks):
            if len(sizes) == num_batches:
                raise KeyboardInterrupt
            sizes.append(len(batch))
            yield batch, records

    monkeypatch.setattr(predict.Predictor, "predict_tasks", predict_tasks)
    return sizes


@pytest.mark.parametrize("extra", [[], ["--do_sample", "--temperature", 3]])
def test_an_interrupted_run_goes_on(flags, tmp_path, monkeypatch, capsys, extra):
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    assert run(flags, *extra) == 0
    expected = output.read_bytes()
    output.unlink()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert run(flags, *extra) == 130
    assert "做完的行" in capsys.readouterr().err
    assert not output.exists()
    settings, *done = [json.loads(line) for line in partial.read_text(encoding="utf-8").splitlines()]
    assert settings["--max_new_tokens"] == 8
    assert sorted(entry["row"] for entry in done) == [0, 3]  # 最长的两行先做
    with partial.open("ab") as stream:
        stream.write('{"row": 1, "prediction": "写到一半'.encode())
    with monkeypatch.context() as patch:
        sizes = interrupt_after(patch, 9)
        assert run(flags, *extra) == 0
        assert sizes == [2]
    assert "已有 2 行，接着做其余 2 行" in capsys.readouterr().err
    assert output.read_bytes() == expected
    assert not partial.exists()


def test_changed_settings_are_refused_with_the_difference(flags, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert run(flags) == 130
    partial = tmp_path / "out.jsonl.partial"
    before = partial.read_bytes()
    assert run(flags, "--max_new_tokens", 7, "--stop", "甲") == 2
    text = capsys.readouterr().err
    assert re.search(r"--max_new_tokens：.* 8，.* 7；--stop：.*\[\]，.*\['甲'\]", text)
    (tmp_path / "test.json").write_text('{"instruction": "另一个文件"}\n', encoding="utf-8")
    assert run(flags) == 2
    assert "提示词的摘要：当时" in capsys.readouterr().err
    assert partial.read_bytes() == before
    partial.write_text("[]\n")  # 不是我们写的
    assert run(flags) == 2
    assert "用的是别的设置" in capsys.readouterr().err


def test_batch_size_may_change_when_greedy(flags, tmp_path, monkeypatch):
    assert run(flags) == 0
    expected = (tmp_path / "out.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert run(flags) == 130
    assert run(flags, "--batch_size", 3) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_batches_left():
    assert batches_left([[0, 1], [2, 3], [4]], {0: {}, 2: {}, 3: {}}, whole=False) == [[1], [4]]
    assert batches_left([[0, 1], [2, 3], [4]], {0: {}, 2: {}, 3: {}}, whole=True) == [[0, 1], [4]]


def test_two_predictions_do_not_share_a_file(tmp_path):
    with Progress(tmp_path / "x.partial", {"a": 1}), pytest.raises(ValueError, match="正被另一个预测使用"):
        Progress(tmp_path / "x.partial", {"a": 1})


def test_everything_that_is_scored_is_resumed(flags, tmp_path, monkeypatch):
    at = flags.index("--max_new_tokens")  # 只评分，不生成
    flags, extra = [*flags[:at], *flags[at + 2 :]], ["--metric", "nll", "--label_scores", "正面", "负面"]
    assert run(flags, *extra) == 0
    expected = [(tmp_path / name).read_bytes() for name in ("out.jsonl", "out.metrics.json")]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert sorted(row["label_scores"]) == ["正面", "负面"]
        assert sum(score["probability"] for score in row["label_scores"].values()) == pytest.approx(1)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert run(flags, *extra) == 130
    assert run(flags, *extra) == 0
    assert [(tmp_path / name).read_bytes() for name in ("out.jsonl", "out.metrics.json")] == expected


def test_changed_references_are_refused_when_they_are_scored(flags, tmp_path, monkeypatch, capsys):
    path = tmp_path / "test.json"
    changed = [{**row, "output": "别的"} if "output" in row else row for row in ROWS]
    for extra, code in (["--metric", "nll"], 2), ([], 0):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 1)
            assert run(flags, *extra) == 130
        text = path.read_text(encoding="utf-8")
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in changed), encoding="utf-8")
        assert run(flags, *extra) == code
        assert ("参考的摘要：当时" in capsys.readouterr().err) == (code == 2)
        path.write_text(text, encoding="utf-8")
        (tmp_path / "out.jsonl.partial").unlink(missing_ok=True)


def test_the_predictions_of_an_earlier_file_are_not_kept(flags, tmp_path):
    path = tmp_path / "test.json"
    earlier = [{**ROWS[0], "prediction": "旧", "label_scores": {"旧": 1.0}}]
    path.write_text(json.dumps(earlier, ensure_ascii=False), encoding="utf-8")
    assert run(flags) == 0
    [row] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row.pop("prediction") != "旧" and row == ROWS[0]


def test_a_finished_result_of_other_settings_is_kept(flags, tmp_path, monkeypatch, capsys):
    """内容不同的旧结果与它的评测结果改名，同一个号；相同的不动。标准错误不是终端时没有进度条。"""

    def files():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "test.json"}

    monkeypatch.setattr("finetune.inference.predictor.Predictor.generated_records", lambda self, generated: [
        {"prediction": f"{self.args.max_new_tokens}", "is_cut": False} for _ in generated
    ])  # fmt: skip
    assert run(flags, "--metric", "rouge") == 0
    first = files()
    assert sorted(first) == ["out.jsonl", "out.metrics.json"]
    text = capsys.readouterr().err
    assert "已载入 " in text and "预测:" not in text
    assert run(flags, "--metric", "rouge") == 0
    assert files() == first
    assert "留作" not in capsys.readouterr().err

    assert run(flags, "--metric", "rouge", "--max_new_tokens", 7) == 0
    second = files()
    assert {name: second[f"{name}.previous-1"] for name in first} == first
    assert sorted(second) == sorted([*first, *(f"{name}.previous-1" for name in first)])
    message = f"{tmp_path / 'out.jsonl'} 是已经写完的结果，内容不同，不能接着做（能接着做的只有 .partial）；"
    assert message + "它留作 out.jsonl.previous-1、out.metrics.json.previous-1\n" in capsys.readouterr().err

    assert run(flags, "--metric", "label_f1", "--max_new_tokens", 7) == 0  # 预测相同，只有评测结果不同
    third = files()
    assert third.pop("out.metrics.json.previous-2") == second["out.metrics.json"]
    assert third.pop("out.metrics.json") != second.pop("out.metrics.json")
    assert third == second


def test_labels_from_the_file(tiny_checkpoint, tmp_path):
    path = tmp_path / "cls.json"
    path.write_text('{"input": "好", "output": "正"}\n{"input": "坏", "output": "负"}\n', encoding="utf-8")
    flags = ["--model_path", tiny_checkpoint("baichuan2-7b"), "--device", "cpu"]
    assert run(flags, "--test_path", path, "--output_path", tmp_path / "out.jsonl", "--label_scores") == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [sorted(row["label_scores"]) for row in rows] == [["正", "负"]] * 2


# ---- 几个进程 ----


@pytest.mark.parametrize("extra", [[], ["--do_sample", "--seed", 3]], ids=["greedy", "sampling"])
def test_two_processes_give_the_same_file(flags, tmp_path, capfd, extra):
    assert run(flags, *extra) == 0
    expected = (tmp_path / "out.jsonl").read_bytes()
    assert run(flags, *extra, "--num_gpus", 2) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert not (tmp_path / "out.jsonl.partial").exists()
    text = capfd.readouterr().err
    assert text.count("\n已载入 ") + text.startswith("已载入 ") == text.count("已载入 ") == 3  # 一个进程，再两个


@pytest.mark.slow
def test_an_error_in_a_process_is_told(flags, tiny_checkpoint, tmp_path, capsys):
    base = shutil.copytree(tiny_checkpoint("baichuan2-7b"), tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run([flags[0], base, *flags[2:]], "--num_gpus", 2) == 2
    assert "损坏" in capsys.readouterr().err


def test_a_dead_process_is_noticed():
    class Dead:
        exitcode = -9

    class Empty:
        def get(self, timeout):
            raise file_prediction.queue.Empty

    with pytest.raises(RuntimeError, match=r"退出码 -9"):
        file_prediction.next_result(Empty(), [Dead()])
