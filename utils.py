"""与模型和样本都无关的小工具：按 rank 输出、随机种子、JSON 文件、精度选择与 DeepSpeed 配置的填写。"""

import fcntl
import hashlib
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm


def process_group():
    """torch.distributed，进程组已经建好时；没有建好时为 None，也不为此载入 torch。"""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() else None


def world_size() -> int:
    """进程总数；没有分布式时为 1。"""
    dist = process_group()
    return dist.get_world_size() if dist else 1


def global_rank() -> int:
    """本进程的全局序号；没有分布式时取环境变量 RANK，再没有为 0。"""
    dist = process_group()
    return dist.get_rank() if dist else int(os.environ.get("RANK", "0"))


def log_rank_0(message: str, file=None):
    """只在 0 号进程打印一行（缺省到标准输出），不打断 tqdm 进度条。"""
    if global_rank() == 0:
        tqdm.write(message, file=file)


class AgreedError(RuntimeError):
    """各进程商定一起抛出的错误：原因相同，0 号进程打印即可。"""

    is_agreed = True


def raise_together(error: BaseException | None):
    """任何一个进程有错，所有进程都抛出同样的原因，不留下别的进程空等；集合操作，所有进程都要调用。

    Raises:
        ValueError: 出错的进程抛的是 ValueError（用户的错）。
        AgreedError: 其他错误；本进程的错误作为 __cause__。
    """
    mine = None if error is None else (isinstance(error, ValueError), f"{error}")
    everyone, dist = [mine], process_group()
    if dist:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    for rank, reason in enumerate(everyone):
        if reason is not None:
            is_value_error, message = reason
            raise ValueError(message) if is_value_error else AgreedError(f"rank {rank}：{message}") from error


def broadcast_from_rank_0(function: Callable[[], Any]) -> Any:
    """只在 0 号进程执行 function，结果（或错误）发给所有进程；集合操作。"""
    value = error = None
    if global_rank() == 0:
        try:
            value = function()
        except Exception as raised:  # 原样带到所有进程，下面一起抛出
            error = raised
    raise_together(error)
    box, dist = [value], process_group()
    if dist:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def seed_everything(seed: int):
    """设定 random、numpy、torch（含 CUDA）的随机种子。"""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def read_json(path: str | Path) -> Any:
    """读一个 JSON 文件。

    Raises:
        ValueError: 文件不存在、不是 UTF-8 或不是合法的 JSON，信息里有路径与位置。
    """
    try:
        if Path(path).exists() and not Path(path).is_file():  # 打开 FIFO 会一直等下去
            raise ValueError(f"{path} 不是普通文件（可能是目录或管道），请给出 JSON 文件")
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"读不了 {path}：{error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} 不是合法的 JSON：{error}") from error


def write_json(path: str | Path, value: Any):
    """写一个 JSON 文件：先写临时文件再改名，读者看不到写了一半的内容。"""
    with replacing(path) as stream:
        stream.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """打开 path 的临时文件来写，刷到磁盘后才改名：读者看不到写了一半的内容；出错时删去临时文件，path 不变。"""
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        with open(temporary, mode, **text) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # 父路径不是目录时 unlink 自己也会出错，盖住真正的原因
            temporary.unlink(missing_ok=True)
        raise


def try_lock(stream: int | IO) -> bool:
    """不等待地占住一个打开的文件或目录，随它关闭自动放开；别人占着时为 False，不能加锁的文件系统（NFS）上为 True。"""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def first_free(exists: Callable[[int], bool]) -> int:
    """从 1 起第一个还没有用过的编号（previous-N）。"""
    return next(number for number in itertools.count(1) if not exists(number))


def write_failed(error: OSError) -> OSError:
    """读写失败（磁盘满、只读、没有权限、挂载点消失）给人看的说明。"""
    reason = error.strerror or str(error)
    return OSError(f"读写 {error.filename or '文件'} 失败：{reason}。请检查磁盘空间与权限；已有的检查点没有受影响")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def shown(value: Any) -> str:
    return repr(value)[:40]


def file_sha256(path: Path, on_bytes: Callable[[int], None] = lambda number: None) -> str:
    """文件内容的 SHA-256，十六进制；分块读取，每读一块告诉 on_bytes 有多少字节。"""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()
