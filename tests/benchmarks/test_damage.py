"""损坏战役的小份：40 份损坏的文件，没有一份崩溃、挂起或被悄悄接受；独立的判断与手术本身也要对。"""

import json
import os
import random

import pytest

from benchmarks.reliability import damage as campaign
from benchmarks.reliability import damage_kinds, damage_oracle, isolated_run

COUNTS = {"data": 14, "ds_config": 8, "own_checkpoint": 8, "foreign_checkpoint": 8, "token_cache": 2}


@pytest.mark.deepspeed
@pytest.mark.slow
def test_forty_damaged_files(tmp_path):
    outcomes = campaign.run_campaign(COUNTS, seed=2024, scratch=tmp_path, timeout_s=30)
    assert len(outcomes) == 40
    assert [outcome for outcome in outcomes if outcome.verdict == "failed"] == []
    rejected = [outcome for outcome in outcomes if outcome.verdict == "rejected"]
    assert len(rejected) >= 25
    assert all(len(outcome.detail) > 8 for outcome in rejected)


def test_isolated_run_survives_everything():
    run = isolated_run.run_isolated

    def refuse():
        raise ValueError("数据文件坏了，请检查")

    assert run(lambda: {"a": 1}, 10) == ("accepted", {"a": 1})
    assert run(refuse, 10) == ("rejected", "数据文件坏了，请检查")
    assert run(lambda: {}["x"], 10)[0] == "crash"
    assert run(lambda: os.kill(os.getpid(), 9), 10) == ("killed", "子进程被信号 9 结束")
    assert run(lambda: os.read(os.pipe()[0], 1), 0.5) == ("hang", "0.5 秒没有结束")


def test_an_empty_message_is_no_reason():
    def refuse():
        raise ValueError("")

    assert isolated_run.run_isolated(refuse, 10)[0] == "crash"


def test_every_row_surgery_is_malformed_and_every_harmless_one_is_not():
    kinds, oracle = damage_kinds, damage_oracle
    row = {"instruction": "抽取：", "input": "故障", "output": "故障"}
    content = (json.dumps(row, ensure_ascii=False) + "\n").encode() * 3
    messages = oracle.data_messages(content)
    assert messages == [(("user", "抽取：故障"), ("assistant", "故障"))] * 3
    damaged = {name: content + damage(row) for name, damage in kinds.ROW_SURGERY.items()}
    assert [name for name, text in damaged.items() if oracle.data_messages(text) is not None] == []
    for name, (damage, is_structural) in kinds.FILE_SURGERY.items():
        if "64 MiB" not in name:
            assert oracle.data_messages(damage(content)) == (None if is_structural else messages), name


def test_damage_always_changes_something_and_repeats_with_its_seed():
    kinds = damage_kinds
    content = bytes(range(256)) * 4
    for seed in range(200):
        damaged, what = kinds.damage_bytes(content, random.Random(seed))
        assert damaged != content, what
        assert (damaged, what) == kinds.damage_bytes(content, random.Random(seed))
    assert kinds.damage_bytes(b"x", random.Random(0))[0] != b"x"
    fields = {"a": 1, "b": {"c": [1, 2]}}
    assert kinds.damage_fields(fields, random.Random(3)) == kinds.damage_fields(fields, random.Random(3))
    assert fields == {"a": 1, "b": {"c": [1, 2]}}


@pytest.mark.parametrize(
    ("after", "optional_keys", "verdict"),
    [
        ({"a": 2, "b": {"c": "x"}, "d": "auto"}, False, "well_formed"),
        ({"a": "2", "b": {"c": "x"}, "d": "auto"}, False, "failed"),
        ({"a": 1, "b": {"q": "x"}, "d": "auto"}, True, "failed"),
        ({"b": {"c": "x"}, "d": "auto"}, True, "well_formed"),
        ({"b": {"c": "x"}, "d": "auto"}, False, "failed"),
        ({"a": 1, "b": {"c": "x"}, "d": 3}, True, "well_formed"),
    ],
)
def test_judgement_of_accepted_json(tmp_path, after, optional_keys, verdict):
    before = {"a": 1, "b": {"c": "x"}, "d": "auto"}
    (tmp_path / "before.json").write_text(json.dumps(before), encoding="utf-8")
    (tmp_path / "after.json").write_text(json.dumps(after), encoding="utf-8")
    judge = damage_oracle.judge_json
    assert judge(tmp_path / "before.json", tmp_path / "after.json", optional_keys)[0] == verdict
