"""被杀的进程留在本机的东西：算子编译的锁、CPU 通信的共享内存文件；只清理确实没有进程在用的。"""

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

# CPU 通信的缓冲（DeepSpeed）与 --cache_frozen memory 的缓存（本项目）
SHM_PATTERNS = ("deepspeed_allreduce_buffer_{uid}_*", ".tmp-frozen-*")
# 建文件与把它映射进内存之间有一瞬间看不出有人在用
SHM_MIN_AGE_SECONDS = 60.0
# 缓存在几台机器共享的文件系统上时，别的机器上的编译看不到：只删这么久以前的锁
SHARED_LOCK_MIN_AGE_SECONDS = 1800.0
SHARED_FILESYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "fuse", "9p", "glusterfs")


def open_paths() -> Iterator[str]:
    """本机可见的进程打开或映射着的文件（读 /proc；看不到的进程略过）。"""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for descriptor in (process / "fd").iterdir():
                yield os.readlink(descriptor)
            for line in (process / "maps").read_text(errors="replace").splitlines():
                if "/dev/shm/" in line:
                    yield line.split(maxsplit=5)[-1]
        except OSError:
            continue  # 进程刚退出，或属于别的用户


def extensions_dir() -> Path:
    """torch 编译扩展的缓存目录。"""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def remove_stale_locks(directory: Path | None = None) -> list[Path]:
    """删除编译中途被杀留下的 lock，返回删了哪些；正在编译的不动。

    torch 的 FileBaton 在编译期间一直打开着 lock：本机没有进程打开它，持有者就已经死了，此后的每次运行都会永远等它。
    几个进程同时来清理时，用一个 flock 排队，删除之前再核对一遍，不会误删刚刚重新建立的锁。
    """
    directory = directory or extensions_dir()
    locks = [*directory.glob("*/lock"), *directory.glob("*/*/lock")]
    if not locks:
        return []
    removed = []
    with open(directory / ".leftovers.flock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        in_use = set(open_paths())
        min_age = SHARED_LOCK_MIN_AGE_SECONDS if _is_shared(directory) else 0.0
        for lock in locks:
            try:
                is_stale = str(lock.resolve()) not in in_use and time.time() - lock.stat().st_mtime >= min_age
            except OSError:
                continue  # 刚刚释放
            if is_stale:
                lock.unlink(missing_ok=True)
                removed.append(lock)
    return removed


def _is_shared(directory: Path) -> bool:
    """目录是否在网络文件系统上（按 /proc/mounts 里最长的前缀）。"""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    path = directory.resolve()
    kinds = [(len(point), kind) for point, kind in mounts if path.is_relative_to(point)]
    return max(kinds, default=(0, ""))[1].startswith(SHARED_FILESYSTEMS)


def remove_dead_shared_memory(directory: Path = Path("/dev/shm")) -> list[Path]:
    """删除本用户已死的运行留在共享内存里的文件（占的是内存，DeepSpeed 的每个进程 69 MB），返回删了哪些。"""
    found = [path for pattern in SHM_PATTERNS for path in directory.glob(pattern.format(uid=os.getuid()))]
    files = [path for path in found if _is_old_and_ours(path)]
    if not files:
        return []
    in_use = set(open_paths())
    dead = [path for path in files if str(path) not in in_use]
    for path in dead:
        path.unlink(missing_ok=True)
    return dead


def _is_old_and_ours(path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and time.time() - status.st_mtime > SHM_MIN_AGE_SECONDS
