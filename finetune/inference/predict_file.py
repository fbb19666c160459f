"""整个文件的预测：成批、可分给几个进程、随时可以接着做；结果的次序与输入相同。

做完的批随时追加到 输出文件名.partial（首行是设置，其后每行是一条预测与它的行号）；全部做完才写输出文件。
已有的、内容不同的输出文件改名为 文件名.previous-N，与它的评测结果一起留着。
"""

import filecmp
import hashlib
import json
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoint.inspection import Checkpoint, weights_fingerprint
from finetune.data.samples import Sample
from finetune.inference.options import GenerationOptions
from finetune.inference.predictor import Predictor, Record, Task, prediction_dtype, report_unfinished
from finetune.metrics.registry import METRICS
from finetune.metrics.table import format_result
from finetune.process import accelerator
from finetune.process.libraries import quiet_libraries
from finetune.terminal import long_job, note
from utils import first_free, replacing, try_lock

PREDICTED = ("prediction", "label_scores")  # 输出文件里由预测写的字段


def predict_file(
    predictor: Predictor, rows: list[Sample], prompts: list[list[int]], device: torch.device, num_workers: int
) -> None:
    """预测整个文件，写结果；给了 --metric 时评测并打印表。已经做完的行不再做。

    设置或输入与上次不同、适配器或权重损坏时抛 ValueError；写不了时抛 OSError；子进程意外退出时抛 RuntimeError。
    """
    args, start = predictor.args, time.monotonic()
    output_path = Path(args.output_path)
    with Progress(partial_path(output_path), settings_of(predictor, rows, prompts, device)) as progress:
        num_kept = len(progress.records)
        if num_kept:
            note(f"{progress.path} 里已有 {num_kept} 行，接着做其余 {len(rows) - num_kept} 行")
        tasks = [(batch, [rows[prompt.key] for prompt in batch]) for batch in predictor.plan(prompts, progress.records)]
        found = predict_in_workers(predictor, tasks, device, num_workers)
        next(found, None)  # 载入模型；此后才有进度条，两者才不会写在同一行
        with long_job("预测", len(rows), "条", done=num_kept) as job:
            for batch, records in found:
                progress.add(batch, records)
                job.update(len(batch))
        records = [progress.records[index] for index in range(len(rows))]
        report_unfinished(records, args.max_new_tokens)
        pairs = zip(rows, records, strict=True)
        lines = (json.dumps(output_row(row, record), ensure_ascii=False) for row, record in pairs)
        write_lines(output_path, lines, output_path)
        progress.path.unlink()
    seconds = time.monotonic() - start
    speed = f"，{(len(rows) - num_kept) / seconds:.2f} 条/秒（含载入）" if len(rows) > num_kept else ""
    note(f"{len(rows)} 条预测已写到 {output_path}{speed}")
    if args.metric is not None:
        write_metrics(args, output_path, rows, records)


def partial_path(output_path: Path) -> Path:
    """没有做完的结果在哪里。"""
    return output_path.with_name(f"{output_path.name}.partial")


def output_row(row: Sample, record: Record) -> dict[str, Any]:
    """输出文件的一行：输入的全部字段（以前的预测与得分除外），加上预测。"""
    given = {name: value for name, value in row.raw.items() if name not in PREDICTED}
    return {**given, **{name: record[name] for name in PREDICTED if name in record}}


def write_metrics(args: GenerationOptions, output_path: Path, rows: list[Sample], records: list[Record]) -> None:
    """评测，写 *.metrics.json，打印表。"""
    result = score(args.metric, rows, records)
    path = metrics_path(output_path)
    content = {**result, "model_path": args.model_path, "test_path": args.test_path}
    write_lines(path, [json.dumps(content, ensure_ascii=False, indent=2)], output_path)
    print(format_result(result))
    note(f"评测结果已写到 {path}")


def score(metric: str, rows: list[Sample], records: list[Record]) -> dict[str, Any]:
    """各行的预测按参考评分。"""
    if metric == "nll":
        return METRICS["nll"](*zip(*(record["nll"] for record in records), strict=True))
    return METRICS[metric]([record["prediction"] for record in records], [row.references for row in rows])


def metrics_path(output_path: Path) -> Path:
    """评测结果在哪里。"""
    return output_path.with_suffix(".metrics.json")


def write_lines(path: Path, lines: Iterable[str], output_path: Path) -> None:
    """先写临时文件再改名：读者看不到写了一半的结果；写不了时删去临时文件，抛 OSError。

    path（预测的结果 output_path，或它的评测结果）已有别的内容时先改名留着。
    """
    with replacing(path) as stream:
        stream.writelines(f"{line}\n" for line in lines)
        stream.flush()
        if path.exists() and not filecmp.cmp(stream.name, path, shallow=False):
            set_aside(path, output_path)


def set_aside(path: Path, output_path: Path) -> None:
    """已有的 path 改名为 path.previous-N；它是预测的结果时，它的评测结果跟着改名。"""
    pair = [output_path, metrics_path(output_path)]
    number = first_free(lambda n: any(file.with_name(f"{file.name}.previous-{n}").exists() for file in pair))
    moved = [file for file in (pair if path == output_path else [path]) if file.exists()]
    for file in moved:
        os.replace(file, file.with_name(f"{file.name}.previous-{number}"))
    names = "、".join(f"{file.name}.previous-{number}" for file in moved)
    note(f"{path} 是已经写完的结果，内容不同，不能接着做（能接着做的只有 .partial）；它留作 {names}")


# ---------------------------------------------------------------------------------------------------------------------
# 接着做


def settings_of(
    predictor: Predictor, rows: list[Sample], prompts: list[list[int]], device: torch.device
) -> dict[str, Any]:
    """决定预测结果的全部设置；提示词（数据、分词器、提示格式、截断）、--metric nll 的参考与权重各取摘要。"""

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]

    args = predictor.args
    names = ["load_in_4bit", "load_in_8bit", "max_new_tokens", "repetition_penalty", "label_scores"]
    if args.do_sample:
        names += ["temperature", "top_p", "top_k", "seed", "batch_size"]
    checkpoints = [predictor.base, *predictor.adapters.values()]
    return {
        **{f"--{name}": getattr(args, name) for name in names},
        "--stop": predictor.stops,
        "--do_sample": args.do_sample,
        "--precision": str(prediction_dtype(args.precision, device)).removeprefix("torch."),
        "--metric nll": args.metric == "nll",
        **({"参考的摘要": digest([row.references for row in rows])} if args.metric == "nll" else {}),
        **({"预测": "得分最高的标签"} if args.label_scores else {}),
        "检查点": "、".join(str(checkpoint.path.resolve()) for checkpoint in checkpoints),
        "权重的摘要": "-".join(weights_fingerprint(checkpoint) for checkpoint in checkpoints),
        "提示词的摘要": digest(prompts),
    }


class Progress:
    """做完的行：records 是 {行号（从 0 起）: 记录}；add 之后已经落盘。写到一半的末行丢弃，重做。"""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.records = path, {}
        self._stream = path.open("a+b")
        try:
            self._open(json.loads(json.dumps(settings)))
        except BaseException:
            self._stream.close()
            raise

    def _open(self, settings: dict[str, Any]) -> None:
        if not try_lock(self._stream):
            raise ValueError(f"{self.path} 正被另一个预测使用，请等它结束，或换一个 --output_path")
        self._stream.seek(0)
        end, found = 0, []
        for line in self._stream:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
            if not line.endswith(b"\n"):
                found.pop()
                break
            end += len(line)
        self._stream.truncate(end)
        if not found:
            self._write([settings])
            return
        self._check_same(found[0], settings)
        self.records = {entry.pop("row"): entry for entry in found[1:]}

    def _check_same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        before = before if isinstance(before, dict) else {}
        differences = [
            f"{name}：当时 {before.get(name)}，现在 {now.get(name)}"
            for name in dict.fromkeys((*before, *now))
            if before.get(name) != now.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self.path} 里没有做完的预测用的是别的设置：{'；'.join(differences)}。"
                "请改回原来的设置接着做，换一个 --output_path，或删去这个文件重新做"
            )

    def add(self, batch: list[int], records: list[Record]) -> None:
        """记下一批，写到磁盘；写不了时抛 OSError。"""
        self._write([{"row": index, **record} for index, record in zip(batch, records, strict=True)])
        self.records.update(zip(batch, records, strict=True))

    def _write(self, entries: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        self._stream.write(text.encode("utf-8"))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()


# ---------------------------------------------------------------------------------------------------------------------
# 几个进程


def predict_in_workers(
    predictor: Predictor, tasks: list[Task], device: torch.device, number: int
) -> Iterator[tuple[list[int], list[Record]]]:
    """载入模型后先产出一个空批，再产出做完的 (行号, 记录)，先做完的先产出；没有要做的行时什么也不做。

    tasks 见 Predictor.plan。number 大于 1 时分给这么多个进程，GPU 上各用一块。
    各份从一个队列里领，做得快的进程领得多；采样的一份是一批，内容与进程数无关，所以结果也与进程数无关。
    """
    num_rows = sum(len(batch) for batch, _ in tasks)
    number = min(number, -(-num_rows // predictor.args.batch_size))
    if number == 0:
        return
    if number == 1:
        predictor.load_model(device)
        yield [], []
        yield from predictor.predict_tasks(tasks)
        return
    context = multiprocessing.get_context("spawn")  # 加速卡不能用 fork
    waiting, results = context.Queue(), context.Queue()
    setup = (predictor.args, predictor.base, predictor.adapters, max(1, torch.get_num_threads() // number))
    devices = [accelerator.default_device(k) if accelerator.is_card(device) else device for k in range(number)]
    workers = [context.Process(target=work, args=(*setup, place, waiting, results)) for place in devices]
    try:
        for worker in workers:
            worker.start()
        for _ in workers:
            next_result(results, workers)  # 各进程都载入了，才开始分批
        yield [], []
        for task in (*tasks, *[None] * number):
            waiting.put(task)
        while num_rows:
            batch, records = next_result(results, workers)
            num_rows -= len(batch)
            yield batch, records
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
        waiting.cancel_join_thread()


def next_result(results: Any, workers: list) -> tuple[list[int], list[Record]]:
    """等下一批的结果；子进程报错或意外退出时抛出。"""
    while True:
        try:
            error, batch, records = results.get(timeout=1)
        except queue.Empty:
            dead = [worker.exitcode for worker in workers if worker.exitcode]
            if dead:
                raise RuntimeError(
                    f"一个预测进程意外退出（退出码 {dead[0]}），多半是内存不足；做完的行已经留下，"
                    "请减少 --num_gpus 或 --batch_size 后再运行"
                ) from None
            continue
        if error is not None:
            raise error
        return batch, records


def work(
    args: GenerationOptions,
    base: Checkpoint,
    adapters: dict[str, Checkpoint],
    num_threads: int,
    device: torch.device,
    waiting: Any,
    results: Any,
) -> None:
    """一个预测进程：读模型，送回一个空批，再一份份地领，送回结果；任何错误送给主进程。"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C 由主进程处理
    quiet_libraries(args.log_level)
    torch.set_num_threads(num_threads)
    try:
        if accelerator.is_card(device):
            accelerator.use_card(device)
        predictor = Predictor(args, base, adapters)
        predictor.load_model(device)
        results.put((None, [], []))
        for batch, records in predictor.predict_tasks(tasks_from(waiting)):
            results.put((None, batch, records))
    except torch.OutOfMemoryError:
        results.put((torch.OutOfMemoryError("显存不够"), None, None))
    except ValueError as error:
        results.put((ValueError(str(error)), None, None))
    except Exception as error:
        results.put((RuntimeError(f"预测进程出错：{type(error).__name__}: {error}"), None, None))


def tasks_from(waiting: Any) -> Iterator[Task]:
    """队列里的各份，到 None 为止；主进程不在了也停下。"""
    while True:
        try:
            task = waiting.get(timeout=5)
        except queue.Empty:
            if not multiprocessing.parent_process().is_alive():
                return
            continue
        if task is None:
            return
        yield task
