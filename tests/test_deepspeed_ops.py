"""scripts/deepspeed_ops.py：只删没有进程使用的锁与共享内存文件。"""

import mmap
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from deepspeed_ops import CPU_OPS, clean_shm, remove_stale_locks


def make_old(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_stale_locks(tmp_path):
    locks = {}
    for name, age in (("held", 3600), ("fresh", 0), ("stale", 3600)):
        locks[name] = tmp_path / "py311_cpu" / name / "lock"
        locks[name].parent.mkdir(parents=True)
        locks[name].touch()
        make_old(locks[name], age)
    with locks["held"].open():  # torch 的 FileBaton 在编译期间一直打开它
        assert remove_stale_locks(tmp_path) == [locks["stale"]]
    assert sorted(name for name, lock in locks.items() if lock.exists()) == ["fresh", "held"]
    assert remove_stale_locks(tmp_path) == [locks["held"]]
    assert remove_stale_locks(tmp_path / "nothing") == []


def test_clean_shm_leaves_what_is_in_use(tmp_path):
    names = ["dead", "open", "mapped", "new"]
    files = {name: tmp_path / f"deepspeed_allreduce_buffer_{os.getuid()}_{name}_0" for name in names}
    foreign = [tmp_path / f"deepspeed_allreduce_buffer_{os.getuid() + 1}_x_0", tmp_path / "other"]
    for path in (*files.values(), *foreign):
        path.write_bytes(b"x" * 4096)
        make_old(path, 3600)
    os.utime(files["new"])
    with files["mapped"].open("r+b") as stream:
        mapped = mmap.mmap(stream.fileno(), 4096)
    with files["open"].open():
        assert clean_shm(tmp_path) == [files["dead"]]
    mapped.close()
    assert sorted(clean_shm(tmp_path)) == sorted([files["open"], files["mapped"]])
    assert files["new"].exists()
    assert all(path.exists() for path in foreign)


@pytest.mark.parametrize("op_name", CPU_OPS)
def test_op_names_exist_in_deepspeed(op_name):
    from deepspeed.ops.op_builder import cpu

    assert hasattr(cpu, op_name)
