"""机器忙时是不是同样的位：旁边有程序占满每个核，同样的训练重复若干次，末了的权重、优化器状态与日志逐位比较。

    python benchmarks/reliability/same_bits.py --output benchmarks/reliability/results    # 五种各 20 次
    python benchmarks/reliability/same_bits.py --output /tmp/bits --runs 3 --kinds lora-2 # 小的形式

pretrain-1 是 train.py --task pretrain 的全参数，其余是微调的 60 步（方法-进程数）。每次都是新的进程：从已经导入了各库、
还没有算过任何东西的进程 fork 出来，省下导入的时间。每次运行之后都写 same_bits.json 与 same_bits.md；
再次运行同样的命令接着做。
退出码 0 表示各种之内全部相同。
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import socket
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import deepspeed  # noqa: F401
import peft  # noqa: F401
import torch

import baichuan  # noqa: F401  （先导入，fork 出来的不必再导入）
from finetune.checkpoint.output_dir import iter_checkpoints

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("pretrain-1", "lora-1", "lora-2", "full-1", "full-2")
SIZES = ("--layers", 1, "--hidden_size", 64, "--heads", 2, "--intermediate_size", 96, "--vocab_size", 1000)
NUM_ROWS, GLOBAL_BATCH, EPOCHS = 120, 4, 2  # 60 步
RUN_TIMEOUT = 900.0
CLOCKS = ("tokens_per_second", "elapsed_seconds", "memory_mb")
FORK = multiprocessing.get_context("fork")


# ---------------------------------------------------------------------------------------------------------------------
# 一次运行


def run_script(script: str, words: list, env: dict[str, str], log: Path):
    """在本进程（刚 fork 出来的）里运行一个脚本，输出进 log；不返回。"""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 1)
    os.dup2(1, 2)
    os.chdir(ROOT)
    os.environ.update(env)
    sys.argv = [script, *map(str, words)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def run(script: str, words: list, log: Path, num_ranks: int = 1, num_threads: int = 2) -> str:
    """num_ranks 个进程各运行一遍 → 输出；没有走完时抛 RuntimeError。"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(num_ranks):
        env = {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": str(num_threads)},
        }
        children.append(FORK.Process(target=run_script, args=(script, words, env, log)))
    for child in children:
        child.start()
    deadline = time.monotonic() + RUN_TIMEOUT
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    for child in children:
        child.kill()
        child.join()
    if any(child.exitcode != 0 for child in children):
        raise RuntimeError(f"{script} 没有走完：{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")
    return log.read_text(encoding="utf-8", errors="replace")


def train(work: Path, base: Path, rows: Path, kind: str, args: Namespace) -> str:
    """train.py 一次 → 末了的检查点（权重、优化器状态、随机状态）与日志的摘要。"""
    method, ranks = kind.replace("pretrain", "full").split("-")
    words = ["--train_path", rows, "--model_name_or_path", base, "--output_dir", work / "output"]
    words += ["--train_type", method, "--ds_file", "ds_zero2_no_offload.json"]
    words += ["--precision", args.precision, "--max_len", 96]
    words += ["--max_src_len", 64, "--num_train_epochs", EPOCHS, "--per_device_train_batch_size", 2]
    words += ["--gradient_accumulation_steps", GLOBAL_BATCH // 2 // int(ranks), "--show_loss_step", 1]
    if method == "lora":
        words += ["--lora_module_name", "all-linear"]
    if kind.startswith("pretrain"):
        words += ["--task", "pretrain"]
    run("train.py", words, work / "log.txt", int(ranks), args.threads)
    _, _, last = next(iter_checkpoints(work / "output"))
    digest = hashlib.sha256()
    for path in sorted(last.rglob("*.safetensors")):
        digest.update(path.relative_to(last).as_posix().encode() + path.read_bytes())
    for line in (work / "output" / "train_log.jsonl").read_text(encoding="utf-8").splitlines():
        digest.update(repr([item for item in json.loads(line).items() if item[0] not in CLOCKS]).encode())
    return digest.hexdigest()


@contextmanager
def scratch(parent: Path | None = None):
    """用完就删的目录。不用 TemporaryDirectory：train.py 结束时跑 atexit，fork 出来的会替我们删掉它。"""
    directory = Path(tempfile.mkdtemp(prefix="same-bits-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def neighbours(count: int):
    """count 个进程各占满一个核。"""

    def spin():
        while True:
            pass

    spinning = [FORK.Process(target=spin, daemon=True) for _ in range(count)]
    for process in spinning:
        process.start()
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.join()


# ---------------------------------------------------------------------------------------------------------------------
# 报告


def write_report(args: Namespace, report: dict):
    """same_bits.json（每一次）与 same_bits.md（各种一行）。"""
    (args.output / "same_bits.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8")
    lines = ["# 机器忙时是不是同样的位", "", f"{report['settings']}", ""]
    lines += ["| 种类 | 次数 | 不同的摘要 | 摘要 | 一次几秒 | 当时的负载 |", "| --- | --- | --- | --- | --- | --- |"]
    for kind in KINDS:
        rows = [row for row in report["runs"] if row["kind"] == kind]
        if rows:
            found = list(dict.fromkeys(row["digest"] for row in rows))
            seconds, loads = [row["seconds"] for row in rows], [row["load"] for row in rows]
            cells = [kind, len(rows), len(found), "、".join(digest[:12] for digest in found[:4])]
            cells += [f"{min(seconds):.0f} 至 {max(seconds):.0f}", f"{min(loads):.1f} 至 {max(loads):.1f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    (args.output / "same_bits.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def settings(args: Namespace) -> str:
    words = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    env = "".join(f"，{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(("OMP_W", "MKL_")))
    return (
        f"{words[1] if words else '未知的 CPU'}（{torch.backends.cpu.get_cpu_capability()}），{os.cpu_count()} 个核，"
        f"torch {torch.__version__}；每个进程 {args.threads} 个线程，{args.precision}，"
        f"旁边 {args.neighbours} 个占满核的进程{env}"
    )


def parse_args() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="same_bits.json 与 same_bits.md 的目录（必填）")
    parser.add_argument("--runs", type=int, default=20, help="每种几次（缺省 %(default)s）")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="做哪几种（缺省全部）")
    parser.add_argument("--threads", type=int, default=2, help="每个进程几个线程（缺省 %(default)s）")
    parser.add_argument("--precision", default="auto", help="train.py 的 --precision（缺省 %(default)s）")
    parser.add_argument("--neighbours", type=int, default=os.cpu_count(), help="占满核的进程数（缺省每核一个）")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    report = {"settings": settings(args), "runs": []}
    earlier = args.output / "same_bits.json"
    if earlier.is_file():
        found = json.loads(earlier.read_text(encoding="utf-8"))
        report = found if found["settings"] == report["settings"] else report
    with scratch() as directory, neighbours(args.neighbours):
        rows, base = directory / "rows.json", directory / "base"
        lines = (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
        rows.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        words = ["--arch", "baichuan2-7b", "--output_dir", base, *SIZES]
        run("scripts/build_tiny_model.py", words, directory / "base.txt")
        for index in range(args.runs):
            for kind in args.kinds:
                if sum(row["kind"] == kind for row in report["runs"]) > index:
                    continue
                with scratch(directory) as work:
                    began = time.monotonic()
                    digest = train(work, base, rows, kind, args)
                row = {"kind": kind, "digest": digest, "seconds": round(time.monotonic() - began, 1)}
                report["runs"].append({**row, "load": round(os.getloadavg()[0], 1)})
                write_report(args, report)
                print(f"{kind} 第 {index + 1} 次：{digest[:12]}，{row['seconds']} 秒", flush=True)
    differing = [kind for kind in args.kinds if len({r["digest"] for r in report["runs"] if r["kind"] == kind}) > 1]
    print(f"{args.output / 'same_bits.md'}：" + ("全部相同" if not differing else f"{'、'.join(differing)} 有不同"))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
