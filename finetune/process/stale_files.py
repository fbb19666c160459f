"""被杀的进程留在本机的东西：算子编译的锁、CPU 通信的共享内存文件；只清理确实没有进程在用的。"""

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from utils import log_rank_0

SHM_DIRECTORY = Path("/dev/shm")
# DeepSpeed 的 CPU 通信缓冲的名字，后面是 MASTER_ADDR_MASTER_PORT_rank
DEEPSPEED_BUFFER = f"deepspeed_allreduce_buffer_{os.getuid()}_"
# 它与 --cache_frozen memory 的缓存（本项目）
SHM_PATTERNS = (f"{DEEPSPEED_BUFFER}*", ".tmp-frozen-*")
# 建文件与把它映射进内存之间有一瞬间看不出有人在用
SHM_MIN_AGE_SECONDS = 60.0
# 两次核对锁的间隔；看不到持有者的锁，多久没有动静算死的（最慢的一个文件编译不到 3 分钟）
RECHECK_SECONDS, STALE_SECONDS = 1.0, 1800.0
# 后台照看锁的间隔；等一个活着的编译多久之后说一声，以后每十倍这么久再说一声
WATCH_SECONDS, WAIT_NOTICE_SECONDS = 10.0, 60.0
LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay"}


def open_paths() -> Iterator[str]:
    """本机可见的进程打开、映射着的文件与所在的目录（读 /proc；看不到的进程略过）。"""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            yield os.readlink(process / "cwd")
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
    """删除编译中途被杀留下的 lock，返回删了哪些；可能还有人在编译的不动。

    torch 的 FileBaton 在编译期间一直打开着 lock：本机没有进程打开它，持有者就已经死了，此后的每次运行都会永远等它。
    持有者死了、它的 ninja 还在目录里编译时，等它编译完再说。别的机器上的进程从这里看不到：网络文件系统、
    别的用户的锁，要整个目录 STALE_SECONDS 没有动静才算死的。
    两次都看到没有人用才删：正常释放是先关后删，中间有一瞬间看不出有人在用。几个进程同时来清理时用 flock 排队。
    """
    directory = directory or extensions_dir()
    if not _locks(directory):
        return []
    removed = []
    try:
        with open(directory / ".leftovers.flock", "a") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            first = _unused(directory)
            if first:
                time.sleep(RECHECK_SECONDS)
            second = _unused(directory) if first else {}
            for lock in (lock for lock, identity in first.items() if second.get(lock) == identity):
                lock.unlink(missing_ok=True)
                removed.append(lock)
    except PermissionError as error:
        raise ValueError(
            f"编译缓存 {directory} 里有锁，却没有权限清理（{error.strerror}）；"
            "请删去其中的 */lock，或换一个 TORCH_EXTENSIONS_DIR"
        ) from error
    return removed


def settle_locks(report: Callable[[str], None] = print):
    """等到编译缓存里没有锁：死锁删去，活着的编译（别的训练的，或被杀的训练留下的编译器）等它完成，并说明在等谁。

    每个进程载入算子之前都要调用。锁消失时 FileBaton 就当编译好了：不能让它去等一个没有人会编完的锁。
    """
    deadline = time.monotonic() + WAIT_NOTICE_SECONDS
    while True:
        for lock in remove_stale_locks():
            report(f"删除了编译中途被杀留下的锁 {lock}（没有进程在用）")
        locks = sorted(_locks(extensions_dir()))
        if not locks:
            return
        if time.monotonic() > deadline:
            report(f"{locks[0]} 还在：有进程在编译（也许在别的机器上），等它完成；确知没有时请删去它")
            deadline += 10 * WAIT_NOTICE_SECONDS
        time.sleep(RECHECK_SECONDS)


def watch_locks(report: Callable[[str], None] = print) -> threading.Thread:
    """在后台照看编译缓存：本次运行正等着的编译（别的训练的）若死了，删去它的锁，免得永远等下去。

    它若没有编完，随后的载入会报错，而不是挂起；重新运行即可。daemon 线程，随进程结束。
    """

    def watch():
        while True:
            time.sleep(WATCH_SECONDS)
            try:
                for lock in remove_stale_locks():
                    report(f"删除了编译中途被杀留下的锁 {lock}（没有进程在用）")
            except (OSError, ValueError):
                continue  # 锁刚刚被释放，或缓存目录不能写：下一轮再看

    thread = threading.Thread(target=watch, name="watch_locks", daemon=True)
    thread.start()
    return thread


def _locks(directory: Path) -> set[Path]:
    return {*directory.glob("*/lock"), *directory.glob("*/*/lock")}


def _unused(directory: Path) -> dict[Path, tuple]:
    """没有进程在用的 lock → 它的身份（删掉重建的同名文件不是同一个）。"""
    identities = {}
    for lock in _locks(directory):
        try:
            status = lock.stat()
            newest = max(path.stat().st_mtime for path in (*lock.parent.iterdir(), lock.parent))
        except OSError:
            continue
        is_visible = status.st_uid == os.getuid() and not _is_network_path(lock)
        if is_visible or time.time() - newest > STALE_SECONDS:
            identities[lock] = (status.st_ino, status.st_ctime_ns)
    in_use = set(open_paths()) if identities else set()
    return {
        lock: identity
        for lock, identity in identities.items()
        if not in_use & {str(lock.resolve()), str(lock.parent.resolve())}
    }


def _is_network_path(path: Path) -> bool:
    """path 所在的文件系统是否可能与别的机器共享；看不出时按是处理。"""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return True
    kinds = {line.split(" - ")[1].split()[0] for line in lines if line.split()[2] == wanted}
    return not kinds or not kinds <= LOCAL_FILE_SYSTEMS


def release_shared_memory():
    """各进程都映射好 DeepSpeed 的 CPU 通信缓冲之后删去文件名：内存随最后一个进程归还，被 SIGKILL 也不留下。

    DeepSpeed 自己从不删（0.19，每个进程 69 MB）。集合操作，紧接在 init_distributed 之后。
    """
    if dist.get_backend() != "gloo":
        return
    dist.barrier()
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    (SHM_DIRECTORY / f"{DEEPSPEED_BUFFER}{address}_{port}_{dist.get_rank()}").unlink(missing_ok=True)


def remove_dead_shared_memory(directory: Path = SHM_DIRECTORY) -> list[Path]:
    """删除本用户已死的运行留在共享内存里的文件（占的是内存，DeepSpeed 的每个进程 69 MB），返回删了哪些。"""
    found = [path for pattern in SHM_PATTERNS for path in directory.glob(pattern)]
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


def clean_leftovers():
    """清理本机被杀的进程留下的编译锁与共享内存，否则后来的运行会一直等，或耗尽内存。"""
    settle_locks()
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    dead = remove_dead_shared_memory()
    if dead:
        log_rank_0(f"删除了已死的运行留在 /dev/shm 的 {len(dead)} 个文件")
    watch_locks()  # 本次运行等着的编译也可能中途死去
