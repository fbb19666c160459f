"""终端：长的活在日志里的几行。"""

import time

from finetune import terminal
from finetune.terminal import long_job, watched


def test_a_long_job_speaks_up_in_a_log(capfd, monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_BEFORE_FIRST_LINE", 0.05)
    with long_job("写权重", 100, "个") as job:
        job.update(10)
        assert capfd.readouterr() == ("", "")
        time.sleep(0.06)
        job.update(40, "loss 1.5")
        job.update(1)  # 下一行要再过 10 秒
    out, err = capfd.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert "写权重 50/100 个" in line and line.endswith("loss 1.5")


def test_what_went_before_does_not_count_in_the_time_left(capfd, monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_BEFORE_FIRST_LINE", 0.5)
    with long_job("预测", 1000, "条", done=900) as job:
        time.sleep(0.6)
        job.update(50)
    assert "950/1000 条，已 1 秒，约剩 1 秒" in capfd.readouterr().err


def test_quick_jobs_hidden_jobs_and_other_ranks_say_nothing(capfd, monkeypatch):
    assert list(watched([1, 2, 3], "很快", "个")) == [1, 2, 3]
    monkeypatch.setattr(terminal, "SECONDS_BEFORE_FIRST_LINE", 0)
    with long_job("藏着", 2, "个", is_hidden=True) as job:
        job.update()
    monkeypatch.setenv("RANK", "1")
    with long_job("别的进程", 2, "个") as job:
        job.update()
    assert capfd.readouterr() == ("", "")
