"""numerics：溢出的计数、损失突然变大、坏的一批数据写了什么；续训之后接着数。"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from asserting import lacks

from finetune.data.packing import collate
from finetune.data.prompting import EncodedSample
from finetune.data.step_loader import StepBatch
from finetune.training.anomaly import LossSpike, NumberWatch, OverflowCount, spike_choice
from utils import AgreedError

# ---- fp16 的溢出 ----


def told_at(overflows: list[bool], count: OverflowCount | None = None) -> list[int]:
    count = count or OverflowCount()
    return [step for step, is_overflow in enumerate(overflows, 1) if count.add(is_overflow)]


def test_a_few_overflows_at_the_start_are_normal():
    assert told_at([True] * 9 + [False] * 200) == []


def test_ten_in_a_row_are_told_once_in_a_hundred_steps():
    assert told_at([True] * 250) == [10, 110, 210]


def test_more_than_a_tenth_of_the_last_hundred():
    every_ninth = [step % 9 == 0 for step in range(1, 211)]
    assert told_at(every_ninth) == [99, 207]
    assert told_at([step % 10 == 0 for step in range(1, 501)]) == []


def test_the_count_goes_on_after_a_resume():
    flags = [step % 3 == 0 for step in range(1, 301)]
    whole, first = OverflowCount(), OverflowCount()
    told = told_at(flags, whole)
    before = told_at(flags[:50], first)
    second = OverflowCount(json.loads(json.dumps(first.state())))
    assert before + [50 + step for step in told_at(flags[50:], second)] == told
    assert second.state() == whole.state()
    assert whole.total == 100


def test_the_message_has_the_numbers_and_the_remedy():
    count = OverflowCount()
    told_at([False] * 5 + [True] * 10, count)
    told = [" 15 步", " 10 次（连续 10 次，共 10 次）", "--precision bf16", "fp32", "--learning_rate"]
    assert lacks(count.message(), *told) == []


# ---- 突然变大 ----


def spikes_in(losses: list[float], spike: LossSpike) -> list[int]:
    return [step for step, loss in enumerate(losses, 1) if spike.add(loss)]


def test_a_spike_is_above_the_usual_mean():
    losses = [2.0] * 20 + [6.5] + [2.0] * 5 + [5.9]
    assert spikes_in(losses, LossSpike(3.0)) == [21]
    assert spikes_in(losses, LossSpike(0.0)) == []
    assert spikes_in([2.0] * 9 + [60.0], LossSpike(3.0)) == []  # 前 10 步不判断
    assert spikes_in([2.0] * 10 + [60.0], LossSpike(3.0)) == [11]


def test_the_mean_of_the_last_steps():
    spike = LossSpike(3.0)
    spikes_in([1.0, 2.0, 3.0], spike)
    assert spike.mean == pytest.approx(2.0)
    spikes_in([2.0] * 47 + [3.0], spike)
    assert spike.mean == pytest.approx(2.0 + 1.0 / 50)


def test_the_mean_goes_on_after_a_resume():
    losses = [2.0 + math.sin(step) for step in range(40)]
    whole, first = LossSpike(3.0), LossSpike(3.0)
    spikes_in(losses, whole)
    spikes_in(losses[:17], first)
    second = LossSpike(3.0, json.loads(json.dumps(first.state())))
    spikes_in(losses[17:], second)
    assert second.state() == whole.state()


@pytest.mark.parametrize(("value", "expected"), [("0", (0.0, False)), ("3", (3.0, False)), ("2.5,stop", (2.5, True))])
def test_the_choices(value, expected):
    assert spike_choice(value) == expected


@pytest.mark.parametrize("value", ["1", "-2", "nan", "inf", "three", "3,", "3,go", "0,stop", ""])
def test_a_wrong_choice(value):
    with pytest.raises(ValueError, match=r"--loss_spike_factor .* 应为 0（不看）、大于 1 的数"):
        spike_choice(value)


# ---- 坏的一批 ----


class Engine:
    """NumberWatch 用到的那一部分。"""

    device, global_steps = torch.device("cpu"), 6

    def __init__(self, is_fp16: bool = False, is_overflow: bool = False, norm: float = 1.0, is_bf16: bool = False):
        self.is_fp16, self.is_bf16, self.norm = is_fp16, is_bf16, norm
        self.optimizer = SimpleNamespace(overflow=is_overflow)

    def fp16_enabled(self) -> bool:
        return self.is_fp16

    def bfloat16_enabled(self) -> bool:
        return self.is_bf16

    def get_global_grad_norm(self) -> float:
        return self.norm


class Words:
    """把编号写成文字的分词器。"""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token) for token in ids)


def sample(text: str, num_src: int, line: int) -> EncodedSample:
    ids = [ord(letter) for letter in text]
    return EncodedSample(
        input_ids=ids,
        labels=[-100] * num_src + ids[num_src:],
        num_targets=len(ids) - num_src,
        num_src_tokens=num_src,
        src_truncated=False,
        tgt_truncated=False,
        has_control_pieces=False,
        line=line,
    )


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def step(request) -> StepBatch:
    micros = [[sample("问答", 1, 3), sample("怎么查？先看", 4, 8)], []]
    return StepBatch(
        micro_batches=[collate(micro, 0, request.param) for micro in micros],
        num_target_tokens=3,
        num_tokens=8,
        rows=[("rows.json", 3), ("rows.json", 8)],
        num_items=3,
    )


@pytest.fixture
def one_process(tmp_path):
    """一个进程的通信组：all_gather 照常运行。"""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_nan_loss_leaves_the_batch(one_process, step, tmp_path):
    watch = NumberWatch(tmp_path, Words())
    path = tmp_path / "bad_steps" / "step-7-rank-0.json"
    with pytest.raises(AgreedError, match=r"第 7 步.* nan") as caught:
        watch.check_loss([torch.tensor(math.nan), torch.tensor(0.0)], Engine(), step)
    assert lacks(str(caught.value), "rows.json:3、rows.json:8", path) == []
    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)  # 没有 NaN 这个词
    assert (found["step"], found["rank"], found["what"], found["value"]) == (7, 0, "损失", "nan")
    first, second = found["micro_batches"]
    assert (first["loss"], first["num_targets"]) == ("nan", 3)
    assert [(one["row"], one["text"]) for one in first["samples"]] == [
        ("rows.json:3", "问答"),
        ("rows.json:8", "怎么查？先看"),
    ]
    assert first["samples"][1]["labels"] == [-100] * 4 + [ord("先"), ord("看")]
    assert [one["row"] for one in second["samples"]] == [None]


def test_the_loss_of_a_micro_batch_is_per_target(one_process, step, tmp_path):
    watch = NumberWatch(tmp_path, Words())
    with pytest.raises(AgreedError):
        watch.check_loss([torch.tensor(2.5), torch.tensor(math.inf)], Engine(), step)
    found = json.loads((tmp_path / "bad_steps" / "step-7-rank-0.json").read_text(encoding="utf-8"))
    assert [micro["loss"] for micro in found["micro_batches"]] == [2.5, "inf"]


def test_a_batch_that_cannot_be_written_hides_nothing(one_process, step, tmp_path):
    (tmp_path / "bad_steps").write_text("", encoding="utf-8")
    with pytest.raises(AgreedError, match=r"第 7 步.* nan.*没能写进 "):
        NumberWatch(tmp_path, Words()).check_loss([torch.tensor(math.nan)] * 2, Engine(), step)


@pytest.mark.parametrize(
    ("precision", "advice"),
    [
        ("fp16", "调小 --learning_rate，或换 --precision bf16 或 fp32"),
        ("bf16", "调小 --learning_rate，或换 --precision fp32"),
        ("fp32", "或调小 --learning_rate"),
    ],
)
def test_the_advice_leaves_out_the_precision_in_use(one_process, step, precision, advice):
    engine = Engine(is_fp16=precision == "fp16", is_bf16=precision == "bf16")
    with pytest.raises(AgreedError) as caught:
        NumberWatch().check_loss([torch.tensor(math.nan)] * 2, engine, step)
    told = ["rank 0：第 7 步", " nan", f"精度 {precision}", "rows.json:3、rows.json:8", advice]
    assert lacks(str(caught.value), *told) == []


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_an_overflow_is_an_error_only_outside_fp16(one_process, step, norm, capsys):
    engine, watch = Engine(is_overflow=True, norm=norm), NumberWatch()
    with pytest.raises(AgreedError, match=rf"第 6 步.* {norm}.*精度 fp32"):
        watch.check_grad_norm(engine, step, [])
    engine.is_fp16 = True
    for _ in range(10):
        watch.check_grad_norm(engine, step, [])
    assert watch.overflows.total == 10
    assert capsys.readouterr().out.count("警告：fp16 的梯度最近 10 步里溢出 10 次") == 1


def test_a_spike_just_above_the_factor(one_process, step, capsys):
    watch = NumberWatch(loss_spike_factor="1.01")
    for loss in [1.0] * 10 + [1.02]:
        watch.check_loss([torch.tensor(loss), torch.tensor(0.0)], Engine(), step)
    assert "损失 1.0200 是近来平均 1.0000 的 1.02 倍（--loss_spike_factor 1.01）" in capsys.readouterr().out


def test_a_spike_warns_or_stops(one_process, step, tmp_path, capsys):
    for choice in ("3", "3,stop"):
        watch = NumberWatch(tmp_path, Words(), choice)
        for _ in range(10):
            assert watch.check_loss([torch.tensor(1.0), torch.tensor(1.0)], Engine(), step) == 2.0
        high = [torch.tensor(8.0), torch.tensor(0.0)]
        what = "第 7 步的损失 8.0000 是近来平均 2.0000 的 4.00 倍（--loss_spike_factor 3）"
        if choice == "3":
            assert watch.check_loss(high, Engine(), step) == 8.0
            assert lacks(capsys.readouterr().out, f"警告：{what}；", "rows.json:3、rows.json:8") == []
            assert not (tmp_path / "bad_steps").exists()
            continue
        with pytest.raises(AgreedError) as caught:
            watch.check_loss(high, Engine(), step)
        assert what in str(caught.value)
        assert (tmp_path / "bad_steps" / "step-7-rank-0.json").is_file()
