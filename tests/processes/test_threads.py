"""threads.py：写明的先算；没有写明时不多于空着的核；旁边忙起来就少。"""

import os
import subprocess
import sys

import pytest

from finetune.process import threads


def test_the_flag_comes_before_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.choose_threads(5)[0] == 5
    assert threads.choose_threads(None)[0] == 3


def test_without_either_the_idle_cores_decide(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = threads.allowed_cores()
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    assert 1 <= threads.choose_threads(None)[0] <= cores
    assert threads.choose_threads(None, num_processes=10 * cores)[0] == 1


def test_busy_neighbours_leave_one_thread(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    spin = [sys.executable, "-c", "while True: pass"]
    neighbours = [subprocess.Popen(spin) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        assert threads.idle_cores() < 0.5 + 0.05 * (os.cpu_count() or 1)
        assert threads.choose_threads(None)[0] == 1
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


@pytest.mark.parametrize("given", ["ACTIVE", None])
def test_what_the_user_set_stays(monkeypatch, given):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    threads.stop_spinning()
    assert os.environ["OMP_WAIT_POLICY"] == (given or "PASSIVE")
    assert os.environ["KMP_BLOCKTIME"] == "0"


@pytest.mark.parametrize("given", [None, "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"])
def test_few_kernels_are_kept_unless_the_user_says_how_many(monkeypatch, given):
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if given:
        monkeypatch.setenv(given, "7")
    threads.keep_few_kernels()
    expected = {None: "256", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}.get(given)
    assert os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") == expected
