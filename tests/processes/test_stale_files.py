"""leftovers.py：死锁删去，活着的编译的锁不动；死掉的运行的共享内存文件删去，在用的不动。"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from finetune.process import stale_files as leftovers
from finetune.process.stale_files import remove_dead_shared_memory, remove_stale_locks, settle_locks, watch_locks


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(leftovers, "RECHECK_SECONDS", 0.05)
    monkeypatch.setattr(leftovers, "WATCH_SECONDS", 0.1)


@pytest.fixture
def build(tmp_path) -> Path:
    """扩展缓存里的一个扩展的目录。"""
    directory = tmp_path / "cache" / "py311_cpu" / "cpu_adam"
    directory.mkdir(parents=True)
    return directory


def child(code: str, *words) -> subprocess.Popen:
    """另一个进程运行 code，打印一行之后一直等着。"""
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("ready", flush=True)
time.sleep(600)
"""


def test_the_lock_of_a_killed_build_is_removed(build):
    """真实的 FileBaton：持有者活着时不动，被 SIGKILL 之后删去，等它的进程随即继续。"""
    holder = child(HOLD, build / "lock")
    assert remove_stale_locks(build.parent) == []
    assert (build / "lock").exists()
    holder.kill()
    holder.wait()
    waiter = threading.Thread(target=FileBaton(str(build / "lock")).wait)
    waiter.start()
    assert remove_stale_locks(build.parent) == [build / "lock"]
    waiter.join(5)
    assert not waiter.is_alive()


def test_a_lock_one_level_deeper_is_found(build):
    """torch 的缺省缓存多一层 py311_cpu/。"""
    (build / "lock").touch()
    assert remove_stale_locks(build.parent.parent) == [build / "lock"]


def test_no_directory_is_no_lock(tmp_path):
    assert remove_stale_locks(tmp_path / "none") == []


def test_the_orphaned_compiler_is_waited_for(build):
    """rank 被杀而 ninja 还在这个目录里编译：两个 ninja 同时写会互相损坏，所以锁先不动。"""
    (build / "lock").touch()
    code = "import os, sys, time; os.chdir(sys.argv[1]); print('ready', flush=True); time.sleep(600)"
    ninja = child(code, build)
    assert remove_stale_locks(build.parent) == []
    ninja.kill()
    ninja.wait()
    assert remove_stale_locks(build.parent) == [build / "lock"]


def test_a_lock_released_and_taken_again_meanwhile_is_kept(build, monkeypatch):
    """两次核对之间换了主人：同名，却不是同一个锁。"""
    (build / "lock").touch()

    def swap(seconds):
        (build / "lock").rename(build / "old")
        (build / "lock").touch()

    monkeypatch.setattr(leftovers.time, "sleep", swap)
    assert remove_stale_locks(build.parent) == []
    assert (build / "lock").exists()


def test_a_lock_removed_by_its_owner_meanwhile_is_no_error(build, monkeypatch):
    """FileBaton.release 先关后删：中间的一瞬间看不出有人在用，不能抢着删。"""
    (build / "lock").touch()
    monkeypatch.setattr(leftovers.time, "sleep", lambda seconds: (build / "lock").unlink())
    assert remove_stale_locks(build.parent) == []


def test_a_lock_of_another_machine_needs_half_an_hour(build, monkeypatch):
    """网络文件系统上，持有者可能在别的机器上，/proc 里看不到。"""
    monkeypatch.setattr(leftovers, "_is_network_path", lambda path: True)
    (build / "lock").touch()
    (build / "cpu_adam.o").touch()
    assert remove_stale_locks(build.parent) == []
    old = time.time() - leftovers.STALE_SECONDS - 10
    for path in (build / "lock", build / "cpu_adam.o", build):
        os.utime(path, (old, old))
    assert remove_stale_locks(build.parent) == [build / "lock"]


def test_this_machine_knows_its_file_systems():
    assert leftovers._is_network_path(Path("/proc")) is True  # 不认得的一律当作共享的
    assert leftovers._is_network_path(Path("/dev/shm")) is False


def test_two_cleaners_do_not_collide(build):
    (build / "lock").touch()
    found = []
    threads = [threading.Thread(target=lambda: found.extend(remove_stale_locks(build.parent))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [build / "lock"]


def test_the_watch_frees_a_waiting_run(build, monkeypatch):
    """本次运行正等着的编译死了：后台删去它的锁，并说一声。"""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(build.parent))
    holder, told = child(HOLD, build / "lock"), []
    watch_locks(told.append)
    waiter = threading.Thread(target=FileBaton(str(build / "lock")).wait)
    waiter.start()
    time.sleep(0.4)
    assert waiter.is_alive()
    holder.kill()
    holder.wait()
    waiter.join(10)
    assert not waiter.is_alive()
    (line,) = told
    assert str(build / "lock") in line


def test_settling_waits_for_a_live_build_and_says_so(build, monkeypatch):
    """被杀的训练留下的编译器还在编：锁等它完成才删，随后自己编译；此前载入会得到缺了的动态库。"""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(build.parent))
    monkeypatch.setattr(leftovers, "WAIT_NOTICE_SECONDS", 0.0)
    (build / "lock").touch()
    code = "import os, sys, time; os.chdir(sys.argv[1]); print('ready', flush=True); time.sleep(600)"
    ninja, told = child(code, build), []
    settling = threading.Thread(target=settle_locks, args=(told.append,))
    settling.start()
    deadline = time.monotonic() + 30
    while not told and time.monotonic() < deadline:
        settling.join(0.2)
    assert settling.is_alive()
    assert (build / "lock").exists()
    ninja.kill()
    ninja.wait()
    settling.join(30)
    assert not settling.is_alive()
    assert told[0].startswith(f"{build / 'lock'} ")
    # 前面的测试留下的照看线程也可能抢先删掉它，所以只看锁没有了
    assert not (build / "lock").exists()


def test_a_cache_that_cannot_be_cleaned_is_told(build, monkeypatch):
    (build / "lock").touch()

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(leftovers.fcntl, "flock", refuse)
    with pytest.raises(ValueError, match="Permission denied"):
        remove_stale_locks(build.parent)


# ---------------------------------------------------------------------------------------------------------------------
# 共享内存


def old_file(directory: Path, name: str) -> Path:
    path = directory / name
    path.write_bytes(b"0" * 100)
    old = time.time() - leftovers.SHM_MIN_AGE_SECONDS - 10
    os.utime(path, (old, old))
    return path


def test_dead_shared_memory_is_removed(tmp_path):
    uid = os.getuid()
    dead = [
        old_file(tmp_path, f"deepspeed_allreduce_buffer_{uid}_127.0.0.1_29500_0"),
        old_file(tmp_path, ".tmp-frozen-12345678-29500"),
    ]
    kept = [
        old_file(tmp_path, f"deepspeed_allreduce_buffer_{uid + 1}_127.0.0.1_29500_0"),  # 别的用户的
        old_file(tmp_path, "mine"),
        tmp_path / f"deepspeed_allreduce_buffer_{uid}_127.0.0.1_29501_0",  # 刚刚建的
    ]
    kept[-1].touch()
    assert sorted(remove_dead_shared_memory(tmp_path)) == sorted(dead)
    assert all(path.exists() for path in kept)


def test_shared_memory_in_use_is_kept():
    """映射着的文件（描述符已经关了，DeepSpeed 就是这样）不动；进程死后删去。"""
    path = Path("/dev/shm") / f"deepspeed_allreduce_buffer_{os.getuid()}_test_{os.getpid()}_0"
    old_file(path.parent, path.name)
    code = (
        "import mmap, os, sys, time; fd = os.open(sys.argv[1], os.O_RDWR); m = mmap.mmap(fd, 100); os.close(fd);"
        "print('ready', flush=True); time.sleep(600)"
    )
    user = child(code, path)
    try:
        assert path not in remove_dead_shared_memory()
        assert path.exists()
        user.kill()
        user.wait()
        assert path in remove_dead_shared_memory()
    finally:
        user.kill()
        user.wait()
        path.unlink(missing_ok=True)
