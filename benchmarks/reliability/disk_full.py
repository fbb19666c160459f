"""磁盘满：在十种大小的小文件系统（tmpfs）上保存，训练应说明原因停下，之前的检查点完好，换大磁盘后续训逐位相同。

    python benchmarks/reliability/disk_full.py --output benchmarks/reliability/results   # 需要 root；约十分钟
    python benchmarks/reliability/disk_full.py --sizes 2 --output /tmp/disk/                 # 小的形式

另有两种：走到一半文件系统变成只读；走到一半挂载点消失。每做完一种就写 disk_full.json 与 disk_full.md；
被打断后再次运行，已有的几种不再做（要从头做就删去 disk_full.json）。
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.reliability.kill import EPOCHS, SAVE_STEP, STEPS, Line, compare
from finetune.checkpoint.manifest import verify_checkpoint
from finetune.checkpoint.output_dir import iter_checkpoints
from finetune.terminal import markdown_table
from utils import read_json, write_json

# 能装下多少个检查点：第一种连第一个都装不下，其余的第一个装得下、第二个写到不同的地方为止
SHARES = [0.5, 1.05, 1.15, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9]
# 其余文件（日志、run_config.json、TensorBoard）所占，字节
OVERHEAD = 96 * 1024
LINES = ("full-zero3-2", "lora-zero2-1", "freeze-zero2-2", "ptuning-zero3-1")
TIMEOUT = 300.0
FINAL = f"epoch-{EPOCHS}-step-{STEPS}"


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[Callable[..., None]]:
    """path 处挂一个 size 字节的 tmpfs；给出的函数用别的选项（如 size=1g）重新挂载。"""
    path.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
    try:
        yield lambda options: mount("-o", f"remount,{options}", str(path))
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)


def mount(*words: str):
    subprocess.run(["mount", *words], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """这里不能挂载 tmpfs 的原因；能则为 None。"""
    if os.geteuid() != 0:
        return "没有 root 权限，不能挂载 tmpfs"
    try:
        with tempfile.TemporaryDirectory() as directory, small_disk(Path(directory) / "disk", 2**16):
            return None
    except subprocess.CalledProcessError as error:
        return f"不能挂载 tmpfs：{error.stderr.strip()}"


def size_of(directory: Path) -> int:
    """目录里的文件占的字节，按 4 KiB 的页。"""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in directory.rglob("*") if path.is_file())


def check_stopped(line: Line, output: Path, reasons: tuple[str, ...], change: Callable[[], None] | None) -> dict:
    """训练直到停下（change 在走到第 6 步时执行），核对它说了原因、没有半成品 → {"problems", "reason", "steps"}。"""
    problems = []
    with line.start(output) as run:
        if change is not None:
            run.wait_for("步 6/", TIMEOUT)
            change()
        ended = run.wait(TIMEOUT)
    reason = next((reason for reason in reasons if reason in ended.output), None)
    if ended.returncode in (None, 0):
        problems.append(f"没有停下（退出码 {ended.returncode}）")
    # 先碰上的可能是保存，也可能是写日志
    if reason is None or not re.search("(之前|已有)的检查点没有受影响", ended.output):
        problems.append(f"没有说明原因\n{ended.output[-3000:]}")
    if "Traceback" in ended.output and "tensorboard/summary" not in ended.output:  # 它的写线程自己打印
        problems.append(f"有回溯\n{ended.output[-3000:]}")
    return {"problems": problems, "reason": reason or "", "returncode": ended.returncode}


def check_disk(output: Path) -> tuple[list[str], int]:
    """停下之后盘上的样子 → (问题, 最新的检查点的步数)。"""
    saved = [(step, path) for step, _, path in iter_checkpoints(output)]
    problems = [f"{path.name} 不完整" for _, path in saved if verify_checkpoint(path)]
    problems += [f"留下了 {path.name}" for path in output.glob(".tmp-epoch-*")]
    return problems, saved[0][0] if saved else 0


def check_resumed(line: Line, output: Path, whole: Path, step: int) -> list[str]:
    """续训到底，与没有中断的一次比较。"""
    try:
        text = line.finish(output, "--resume", "auto")
    except RuntimeError as error:
        return [str(error)]
    expected = f"resume: step {step} from" if step else "resume: step 0, fresh start"
    problems = [] if expected in text else [f"没有「{expected}」"]
    return problems + compare(output / FINAL, whole / FINAL)


def run_all(work: Path, num_sizes: int, done: list[dict], report: Callable[[dict], None]):
    """各种大小，与变成只读、挂载点消失；done 里的不再做，每做完一种调用 report(那一行)。"""
    step = max(1, len(SHARES) // num_sizes)
    shares = SHARES[::-step][:num_sizes][::-1] if num_sizes < len(SHARES) else SHARES
    cases = [("full", share) for share in shares] + ([("ro", 8.0), ("gone", 8.0)] if num_sizes >= len(SHARES) else [])
    wholes: dict[str, tuple[Line, Path]] = {}
    finished = {(row["line"], row["kind"], row["checkpoints_that_fit"]) for row in done}
    for index, (kind, share) in enumerate(cases):
        name, started = LINES[index % len(LINES)], time.monotonic()
        if (name, kind, share) in finished:
            continue
        if name not in wholes:
            line = Line(name, work)
            line.finish(line.work / "whole")
            wholes[name] = (line, line.work / "whole")
        line, whole = wholes[name]
        checkpoint = size_of(whole / f"epoch-1-step-{SAVE_STEP}")
        row = run_case(kind, line, whole, int(share * checkpoint) + OVERHEAD)
        row = {"line": name, "kind": kind, "checkpoints_that_fit": share, **row}
        row["seconds"] = round(time.monotonic() - started, 1)
        report(row)


def run_case(kind: str, line: Line, whole: Path, size: int) -> dict:
    """一种情形：停下、核对、换大磁盘、续训、比较。"""
    disk = line.work / f"disk-{time.monotonic_ns()}"
    output = disk / "output"
    reasons = {
        "full": ("No space left on device", "磁盘已满"),
        "ro": ("Read-only file system",),
        "gone": ("No such file or directory",),
    }[kind]
    with small_disk(disk, size) as remount:

        def change():
            if kind == "ro":
                # 有文件开着时不能整个改成只读：在上面绑一层只读的
                mount("--bind", str(output), str(output))
                mount("-o", "remount,bind,ro", str(output))
            else:
                subprocess.run(["umount", "-l", str(disk)], check=True)

        row = check_stopped(line, output, reasons, None if kind == "full" else change)
        if kind == "gone":  # 内容随挂载点走了：只看停得对不对
            return row | {"bytes": size, "newest_step": 0}
        if kind == "ro":
            subprocess.run(["umount", "-l", str(output)], check=True)
        remount("size=1g")
        problems, step = check_disk(output)
        if kind == "ro":  # 只读时删不掉写了一半的，续训会删
            problems = [problem for problem in problems if not problem.startswith("留下了")]
        problems += check_resumed(line, output, whole, step)
    return row | {"problems": row["problems"] + problems, "bytes": size, "newest_step": step}


def write_report(output: Path, rows: list[dict]):
    """disk_full.json 与 disk_full.md。"""
    write_json(output / "disk_full.json", rows)
    kinds = {"full": "满了", "ro": "变成只读", "gone": "挂载点消失"}
    table = [
        [row["line"], kinds[row["kind"]], row["bytes"], row["checkpoints_that_fit"], row["reason"], row["returncode"],
         row["newest_step"], "；".join(row["problems"])[:200] or "无", row["seconds"]]
        for row in rows
    ]  # fmt: skip
    header = ["线", "情形", "磁盘（字节）", "装得下几个检查点", "停下的原因", "退出码", "最新的一步", "问题", "秒"]
    text = [
        "# 磁盘满",
        "`python benchmarks/reliability/disk_full.py`：停下之后换大磁盘续训，与没有中断的一次逐位比较。"
        f"{sum(bool(row['problems']) for row in rows)}/{len(rows)} 种有问题。",
        markdown_table(header, table),
    ]
    (output / "disk_full.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="disk_full.json 与 disk_full.md 的目录（必填）")
    parser.add_argument("--sizes", type=int, default=len(SHARES), help="几种大小（缺省 %(default)s）")
    args = parser.parse_args()
    if reason := why_not():
        print(f"错误：{reason}")
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "disk_full.json"
    rows: list[dict] = read_json(path) if path.is_file() else []
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # 卸下挂载的，结束正在进行的训练

    def report(row: dict):
        rows.append(row)
        write_report(args.output, rows)
        print(f"{row['line']} {row['kind']} {row['bytes']} 字节：{row['problems'] or '无问题'}", flush=True)

    with tempfile.TemporaryDirectory(prefix="disk-full-") as directory:
        run_all(Path(directory), args.sizes, list(rows), report)
    return 1 if any(row["problems"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
