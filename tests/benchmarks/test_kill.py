"""kill_campaign：计划只由种子决定，报告随时可以接着写。真的战役由 .ci/run 与 benchmarks/reliability 运行。"""

import random
from argparse import Namespace

from benchmarks.reliability.kill import MOMENTS, TARGETS, line_names, load_report, plan_kills, write_report


def test_sixty_kills_cover_every_combination_moment_and_target():
    lines = line_names(60, random.Random(1))
    assert len(lines) == 16 and sum(lines.values()) == 60
    plans = [plan for name, count in lines.items() for plan in plan_kills(name, count, 1)]
    assert {plan["moment"] for plan in plans} == {*MOMENTS}
    assert {plan["target"] for plan in plans} == {*TARGETS}
    assert {plan["signal"] for plan in plans} == {"SIGKILL", "SIGTERM"}
    assert plans == [plan for name, count in lines.items() for plan in plan_kills(name, count, 1)]


def row(line: str) -> dict:
    return {
        **{"line": line, "moment": "step", "signal": "SIGKILL", "target": "group", "rank": 0, "seen": "第 3 步"},
        **{"hit": True, "resumed": "", "returncode": -9, "seconds_to_end": 1.0, "newest_step": 0, "problem": ""},
        "seconds": 20.0,
    }


def test_an_interrupted_campaign_goes_on(tmp_path):
    args, work = Namespace(seed=1, kills=6, task="sft", output=tmp_path), tmp_path / "work"
    report = load_report(args, 3, work)
    assert report["kills"] == report["lines"] == []
    report["lines"] = [{"line": "a", "kills": 2, "differences": [], "seconds": 90.0}]
    report["kills"] = [row("a"), row("a"), row("b"), row("c")]
    write_report(args, report)
    (work / "b" / "whole").mkdir(parents=True)
    (work / "b" / "whole" / "loss.png").touch()
    kept = load_report(args, 3, work)
    assert [kill["line"] for kill in kept["kills"]] == ["a", "a", "b"]  # c 的工作目录不在了
    assert kept["lines"] == report["lines"]
    other = Namespace(seed=2, kills=6, task="sft", output=tmp_path)
    assert load_report(other, 3, work)["kills"] == []
    assert "完成 1/3 条线" in (tmp_path / "kills.md").read_text(encoding="utf-8")
