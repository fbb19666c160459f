"""把行分批，用几个进程处理，次序不变，在途的批数与字节数有限；全项目只有这一处起子进程池处理数据。"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from finetune.data.rows import Problem, RawRow, num_bytes_of_data

Row = RawRow | Problem
Result = TypeVar("Result")
# 一批至多这么多行、这么多字节；在途的至多这么多字节（一行再长也至少放一行）
ROWS_PER_CHUNK, BYTES_PER_CHUNK, BYTES_IN_FLIGHT = 256, 4 * 2**20, 64 * 2**20
# 小文件单进程只要一两秒，不值得起子进程
PARALLEL_BYTES = 8 * 2**20


def num_bytes_of(rows: Iterable[Row]) -> int:
    """这些行的字节数；读不出的行不计。"""
    return sum(len(row.content) for row in rows if isinstance(row, RawRow))


def split_chunks(rows: Iterable[Row], bytes_per_chunk: int = BYTES_PER_CHUNK) -> Iterator[list[Row]]:
    """把行分批：行数与字节数都有上限。"""
    chunk, num_bytes = [], 0
    for row in rows:
        chunk.append(row)
        num_bytes += num_bytes_of([row])
        if len(chunk) == ROWS_PER_CHUNK or num_bytes >= bytes_per_chunk:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def choose_workers(path: str | os.PathLike, requested: int | None) -> int:
    """处理这个文件用几个进程；requested 为 None 时大文件用本进程能用的核，小文件 1。"""
    if "fork" not in multiprocessing.get_all_start_methods():
        return 1
    if requested is not None:
        return requested
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return min(16, cores // local_ranks) if num_bytes_of_data(path) >= PARALLEL_BYTES else 1


_worker_function: Callable | None = None  # 只在子进程里有值


def _start_worker(function: Callable):
    global _worker_function
    _worker_function = function


def _work(chunk: list[Row]):
    return _worker_function(chunk)


def map_chunks(
    function: Callable[[list[Row]], Result],
    chunks: Iterable[list[Row]],
    path: str | os.PathLike,
    workers: int,
    bytes_in_flight: int = BYTES_IN_FLIGHT,
) -> Iterator[Result]:
    """依次给出 function(批)，次序不变；workers > 1 时在 fork 出的子进程里算，function 不可碰 torch 与 CUDA。

    Raises:
        RuntimeError: 一个子进程意外退出；path 只用在说明里。
    """
    if workers <= 1:
        yield from map(function, chunks)
        return
    pending: deque = deque()  # (结果, 那一批的字节数)
    in_flight = 0
    # spawn 会在每个子进程里重新导入 torch 与 deepspeed，比分词还慢；
    # function 经 initargs 随 fork 继承：若随任务传递，每批都要序列化一次分词器
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(function,))
    try:
        for chunk in chunks:
            pending.append((pool.submit(_work, chunk), num_bytes_of(chunk)))
            in_flight += pending[-1][1]
            while len(pending) > 4 * workers or (in_flight > bytes_in_flight and len(pending) > 1):
                coming, num_bytes = pending.popleft()
                in_flight -= num_bytes
                yield coming.result()
        while pending:
            yield pending.popleft()[0].result()
    except BrokenProcessPool as error:
        raise RuntimeError(f"处理 {path} 的子进程意外退出（多半是内存不足），请减少进程数或增加内存后重试") from error
    finally:
        pool.shutdown(cancel_futures=True)
