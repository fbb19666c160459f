"""训练记录：哪些步写、各数怎样累计、评估与保存的时间不计入速度、续训时截断。"""

import errno
import json
import math
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.training.log import TrainLog, cut_log, draw_loss, open_log, peak_memory_mb
from utils import AgreedError

KEYS = ["step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "elapsed_seconds"]


@pytest.fixture
def make_log(tmp_path):
    logs = []

    def make(num_steps: int, show_loss_step: int, state: dict | None = None) -> TrainLog:
        logs.append(TrainLog(tmp_path, tmp_path / "runs", num_steps, show_loss_step, state))
        return logs[-1]

    return make


def records_in(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]


def take_step(log: TrainLog, step: int, loss: float = 1.0, num_targets: int = 10, num_tokens: int = 100):
    log.step(step, step / 4, loss, num_targets, num_tokens, lr=1e-4 * step, grad_norm=0.5)


# ---- 哪些步 ----


@pytest.mark.parametrize(
    ("num_steps", "show_loss_step", "expected"),
    [(25, 10, [1, 10, 20, 25]), (20, 10, [1, 10, 20]), (3, 10, [1, 3]), (1, 10, [1]), (3, 1, [1, 2, 3])],
)
def test_the_first_the_last_and_each_multiple(make_log, tmp_path, num_steps, show_loss_step, expected):
    log = make_log(num_steps, show_loss_step)
    for step in range(1, num_steps + 1):
        take_step(log, step)
    log.close()
    assert [record["step"] for record in records_in(tmp_path)] == expected
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_loss_is_the_mean_over_target_tokens_since_the_last_record(make_log, tmp_path):
    log = make_log(num_steps=4, show_loss_step=3)
    for step, (loss, num_targets, num_tokens) in enumerate(
        [(4.0, 7, 50), (3.0, 10, 100), (1.0, 30, 200), (2.0, 1, 9)], 1
    ):
        take_step(log, step, loss, num_targets, num_tokens)
    log.close()
    records = records_in(tmp_path)
    assert [record["loss"] for record in records] == [4.0, (3.0 * 10 + 1.0 * 30) / 40, 2.0]
    assert [record["tokens"] for record in records] == [50, 300, 9]
    assert [record["epoch"] for record in records] == [0.25, 0.75, 1.0]
    assert [record["lr"] for record in records] == pytest.approx([1e-4, 3e-4, 4e-4])
    for record in records:
        assert list(record)[: len(KEYS)] == KEYS
        assert record["grad_norm"] == 0.5
        assert record["memory_mb"] > 50


def test_a_record_is_on_disk_at_once(make_log, tmp_path):
    log = make_log(num_steps=100, show_loss_step=50)
    take_step(log, 1)
    assert len(records_in(tmp_path)) == 1  # 被杀掉的训练也留下记录
    log.close()


# ---- 时间 ----


def test_evaluation_and_saving_do_not_count_for_the_speed(make_log, tmp_path):
    log = make_log(num_steps=3, show_loss_step=1)
    take_step(log, 1)
    time.sleep(0.05)
    log.pause()
    time.sleep(0.4)  # 评估与保存
    log.resume()
    time.sleep(0.05)
    take_step(log, 2, num_tokens=100)
    time.sleep(0.1)
    take_step(log, 3, num_tokens=100)
    log.close()
    first, second, third = records_in(tmp_path)
    assert 100 / 0.3 < second["tokens_per_second"] < 100 / 0.1
    assert 100 / 0.3 < third["tokens_per_second"] <= 100 / 0.1
    assert second["elapsed_seconds"] - first["elapsed_seconds"] >= 0.5  # 钟表时间照算
    assert third["elapsed_seconds"] > second["elapsed_seconds"]


# ---- TensorBoard 与控制台 ----


def test_tensorboard_has_the_same_numbers(make_log, tmp_path):
    log = make_log(num_steps=2, show_loss_step=1)
    take_step(log, 1, loss=2.5)
    log.write({"step": 1, "epoch": 0.25, "eval/nll": 1.5}, 1)
    take_step(log, 2, loss=1.25)
    log.close()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert {"train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "eval/nll"} <= set(
        events.Tags()["scalars"]
    )
    assert "train/step" not in events.Tags()["scalars"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.5), (2, 1.25)]
    assert [(event.step, event.value) for event in events.Scalars("eval/nll")] == [(1, 1.5)]
    assert records_in(tmp_path)[1] == {"step": 1, "epoch": 0.25, "eval/nll": 1.5}


def test_swanlab_has_the_numbers_of_the_log(tmp_path):
    """离线文件里的每个数与 train_log.jsonl 相同，一个不少。"""
    store = pytest.importorskip("swanlab.sdk.internal.core_python.store", reason="没有安装 swanlab")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    log = TrainLog(tmp_path, tmp_path / "runs", 3, 1, report_to=("tensorboard", "swanlab"))
    for step, loss in enumerate((2.5, 1.1, 1 / 3), 1):
        take_step(log, step, loss=loss)
    log.write({"step": 3, "epoch": 0.75, "eval/nll": 0.1}, 3)
    assert log.close() is None
    [path] = (tmp_path / "runs" / "swanlab").glob("run-*/run-*.swanlab")
    reader, found = store.DataStoreReader(), []
    reader.open(path)
    for content in reader:
        record = Record.FromString(content)
        if record.WhichOneof("record_type") == "scalar":
            found.append((record.scalar.step, record.scalar.key, record.scalar.value.number))
    expected = [
        (row["step"], key if "/" in key else f"train/{key}", value)
        for row in records_in(tmp_path)
        for key, value in row.items()
        if key not in ("step", "epoch")
    ]
    assert sorted(found) == sorted(expected)
    assert len(expected) == 3 * 7 + 1
    assert list((tmp_path / "runs").glob("events.out.tfevents.*"))


def test_the_console_line(make_log, capsys):
    log = make_log(num_steps=2, show_loss_step=10)
    take_step(log, 1, loss=2.5)
    log.close()
    assert "步 1/2  轮 0.25  loss 2.5000  lr 0.0001  梯度范数 0.500" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("norm", "text"),
    [(123456.789, "123456.789"), (1e6, "1000000.000"), (1234567.0, "1.235e+06"), (math.inf, "inf"), (math.nan, "nan")],
)
def test_large_norms_are_short(make_log, capsys, norm, text):
    log = make_log(num_steps=1, show_loss_step=1)
    log.step(1, 1.0, 2.5, 10, 100, lr=1e-4, grad_norm=norm)
    log.close()
    assert f"梯度范数 {text}  " in capsys.readouterr().out


def test_no_bar_outside_a_terminal(make_log, capsys):
    log = make_log(num_steps=2, show_loss_step=1)
    take_step(log, 1)
    take_step(log, 2)
    log.close()
    printed = capsys.readouterr()
    assert printed.err == ""
    assert [line.split("  ")[0] for line in printed.out.splitlines()] == ["步 1/2", "步 2/2"]


def test_only_rank_0_writes(make_log, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = make_log(num_steps=1, show_loss_step=1)
    take_step(log, 1)
    log.pause()
    log.resume()
    log.close()
    assert list(tmp_path.iterdir()) == []


# ---- 续训 ----


def test_cut_log_drops_what_will_be_done_again(tmp_path):
    path = tmp_path / "train_log.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0, "elapsed_seconds": step * 2.0}) for step in (1, 10, 20, 30)]
    lines.insert(2, json.dumps({"step": 10, "eval/nll": 3.0}))
    path.write_text("\n".join(lines) + '\n{"step": 40, "lo', encoding="utf-8")
    cut_log(path, 20)
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == [1, 10, 10, 20]
    cut_log(path, 10)
    assert path.read_text(encoding="utf-8") == "".join(f"{line}\n" for line in lines[:3])
    cut_log(tmp_path / "absent.jsonl", 10)
    kept = '{"step": 9, "eval/nll": 1}\n{"step": 10, "loss": 1}\n'
    path.write_text(kept + '{"step": 10, "eval/nll": 1}\n', encoding="utf-8")
    cut_log(path, 10, drops_evaluation=True)  # 被打断的评估续训时补做
    assert path.read_text(encoding="utf-8") == kept
    assert [entry.name for entry in tmp_path.iterdir()] == ["train_log.jsonl"]


def test_a_continued_log_is_the_same_log(make_log, tmp_path):
    """第 3 步存下状态，第 4 步之后被打断，从第 3 步续训：没有重复的步，也不丢累计。"""
    losses = {step: float(step) for step in range(1, 9)}
    first = make_log(num_steps=8, show_loss_step=4)
    for step in (1, 2, 3):
        take_step(first, step, losses[step], num_targets=step)
    first.pause()
    state = json.loads(json.dumps(first.state()))
    first.resume()
    take_step(first, 4, losses[4], num_targets=4)
    first.close()
    time.sleep(0.05)

    second = make_log(num_steps=8, show_loss_step=4, state=state)
    for step in range(4, 9):
        take_step(second, step, losses[step], num_targets=step)
    second.close()
    records = records_in(tmp_path)
    expected = [(1, 1.0, 100), (4, (2 * 2 + 3 * 3 + 4 * 4) / 9, 300), (8, (25 + 36 + 49 + 64) / 26, 400)]
    assert [(record["step"], record["loss"], record["tokens"]) for record in records] == expected
    assert state["elapsed"] <= records[1]["elapsed_seconds"] <= records[2]["elapsed_seconds"]
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 4, 8]


def test_draw_loss_with_evaluation(tmp_path):
    path = tmp_path / "train_log.jsonl"
    records = [{"step": 1, "loss": 2.0}, {"step": 5, "loss": 1.5}, {"step": 5, "eval/nll": 1.7}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    draw_loss(path)
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_peak_memory_is_in_megabytes():
    assert 50 < peak_memory_mb() < 100_000


# ---- 写不下 ----


class FullFile:
    """写满了的文件。"""

    def write(self, text: str):
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
        pass


def test_a_full_disk_is_kept_for_everyone(make_log, tmp_path):
    log = make_log(num_steps=3, show_loss_step=1)
    take_step(log, 1)
    file, log._file = log._file, FullFile()
    take_step(log, 2)
    message = "读写 文件 失败：No space left on device。请检查磁盘空间与权限；已有的检查点没有受影响"
    assert str(log.error) == message
    take_step(log, 3)  # 之后不再写
    assert str(log.close()) == message
    file.close()
    assert [record["step"] for record in records_in(tmp_path)] == [1]


def test_open_log_writes_the_configs_or_tells(tmp_path):
    configs = {"ds_config.json": {"a": 1}, "run_config.json": {"b": "二"}}
    assert open_log(tmp_path, None, 3, 1, None, configs).close() is None
    assert {name: json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in configs} == configs
    assert (tmp_path / "runs").is_dir()
    with pytest.raises(AgreedError, match=r"rank 0：读写 .*gone.*ds_config\.json 失败：No such file or directory"):
        open_log(tmp_path / "gone", None, 3, 1, None, configs)


def test_an_overflow_is_written_as_json(make_log, tmp_path, capsys):
    log = make_log(num_steps=2, show_loss_step=1)
    log.step(1, 0.5, 1.0, 10, 100, lr=1e-4, grad_norm=math.inf, num_overflows=1)
    log.step(2, 1.0, 1.0, 10, 100, lr=1e-4, grad_norm=0.5)
    log.close()
    first, second = records_in(tmp_path)
    assert (first["grad_norm"], first["overflows"]) == (None, 1)
    assert (second["grad_norm"], "overflows" in second) == (0.5, False)
    assert "溢出 1 次" in capsys.readouterr().out
