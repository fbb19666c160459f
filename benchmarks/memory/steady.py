"""训练的内存稳不稳：同样的训练走几百步，看进程自己的内存（匿名与共享），与另一份代码（如 d90914c）交替地量。

    git worktree add --detach OLD d90914c
    python benchmarks/memory/steady.py --old OLD --work_dir 目录 --train_path ../shared/data/spo_0.json

模型 4 层 × 256，LoRA，每步 8 条，各步的长度不同。每 5 毫秒看一次；第 100、500 步的是其前 20 步里各次的中位数（算着的，
随那几步的长短）与最小（两步之间，激活已经释放），旁边是那几步平均的 token 数。
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.speed.bench import machine
from benchmarks.speed.protocol import process_memory_mb
from finetune.process.training_process import free_port
from finetune.terminal import format_table, markdown_table
from scripts.build_tiny_model import build_tiny_model
from utils import write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
WINDOW = 20
SIZES = {"layers": 4, "hidden_size": 256, "intermediate_size": 688, "heads": 4, "vocab_size": 2000}


def train(tree: Path, flags: list[str], output: Path, num_threads: int, marks: list[int]) -> dict:
    """用 tree 的 train.py 训练一次 → 各个 marks 的内存，峰值，MB；最后的损失，CPU 秒。"""
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env = {**os.environ, **single, "MASTER_PORT": str(free_port()), "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    env["OMP_NUM_THREADS"] = str(num_threads)
    log, seen = output / "train_log.jsonl", {mark: [] for mark in marks}
    peak = step = 0
    with output.with_suffix(".log").open("w", encoding="utf-8") as stream:
        command = [sys.executable, "train.py", *flags, "--output_dir", str(output)]
        process = subprocess.Popen(command, cwd=tree, env=env, stdout=stream, stderr=subprocess.STDOUT)
        while True:
            own = process_memory_mb("RssAnon", "RssShmem", pid=process.pid)
            peak = max(peak, own)
            if log.is_file():
                step = (log.read_bytes().count(b"\n") - 1) * WINDOW // 2  # 第 1 步一行，之后每半个窗口一行
            for mark, found in seen.items():
                if mark - WINDOW <= step < mark and own:
                    found.append(own)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(0.005)
    if status:
        raise RuntimeError(f"train.py 没有做完，见 {output.with_suffix('.log')}")
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    measured = {"peak": peak, "cpu_seconds": usage.ru_utime + usage.ru_stime, "last": records[-1]}
    for mark, found in seen.items():
        tokens = sum(record["tokens"] for record in records if mark - WINDOW < record["step"] <= mark) / WINDOW
        measured |= {f"busy_{mark}": statistics.median(found), f"rest_{mark}": min(found), f"tokens_{mark}": tokens}
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="另一份代码的目录（必填）")
    parser.add_argument("--work_dir", type=Path, required=True, help="检查点与训练的输出（必填）")
    parser.add_argument("--train_path", type=Path, required=True, help="数据（必填）")
    parser.add_argument("--precision", default="fp32", help="（缺省 %(default)s）")
    parser.add_argument("--steps", type=int, default=500, help="（缺省 %(default)s）")
    parser.add_argument("--repeats", type=int, default=1, help="交替几遍（缺省 %(default)s）")
    parser.add_argument("--threads", type=int, default=1, help="线程数（缺省 %(default)s）")
    parser.add_argument("--name", default="steady", help="结果的名字（缺省 %(default)s）")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=args.old, capture_output=True, text=True)
    names = {commit.stdout.strip(): args.old.resolve(), "现在": ROOT}
    args.work_dir.mkdir(parents=True, exist_ok=True)
    base = args.work_dir / "base"
    if not base.exists():
        build_tiny_model("baichuan-7b", base, dtype="float32", **SIZES)
    flags = ["--model_name_or_path", str(base), "--train_path", str(args.train_path.resolve()), "--train_type", "lora"]
    flags += ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1", "--num_train_epochs", "99"]
    flags += ["--max_len", "1024", "--max_src_len", "768", "--precision", args.precision, "--no-save_trainer_state"]
    flags += ["--max_steps", str(args.steps), "--show_loss_step", str(WINDOW // 2)]
    marks = [args.steps // 5, args.steps]
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for repeat in range(args.repeats):
        for index, (name, tree) in enumerate(names.items()):
            output = args.work_dir / f"output-{index}-{repeat}"
            output.mkdir(exist_ok=True)
            runs[name].append({"load": os.getloadavg()[0], **train(tree, flags, output, args.threads, marks)})
            print(name, runs[name][-1], flush=True)
    first, last = marks
    keys = [f"{name}_{mark}" for name in ("rest", "busy", "tokens") for mark in marks]
    middle = {
        name: {key: statistics.median(run[key] for run in found) for key in [*keys, "peak", "cpu_seconds"]}
        for name, found in runs.items()
    }
    table = []
    for name, values in middle.items():
        cells = []
        for key in ("rest", "busy"):
            before, after = values[f"{key}_{first}"], values[f"{key}_{last}"]
            cells.append(f"{before:.0f} → {after:.0f}（{after / before - 1:+.1%}）")
        tokens = " → ".join(f"{values[f'tokens_{mark}']:,.0f}" for mark in marks)
        table.append([name, *cells, tokens, f"{values['peak']:.0f}", f"{values['cpu_seconds']:.0f}"])
    before, now = middle.values()
    ratio = now["peak"] / before["peak"]
    header = ["", "两步之间，MB", "算着的，MB", "那几步的 token", "峰值，MB", "CPU 秒"]
    print(format_table(header, table))
    print(f"峰值之比 {ratio:.2f}")
    result = {"machine": machine(), "flags": flags[4:], "threads": args.threads, "runs": runs, "peak_ratio": ratio}
    write_json(RESULTS / f"{args.name}.json", result)
    (RESULTS / f"{args.name}.md").write_text(
        f"# 训练 {args.steps} 步的内存\n\n4 层 × 256，LoRA，每步 8 条，{args.precision}，{args.threads} 线程，"
        f"{machine()['cpu']}，{args.repeats} 遍。进程自己的内存（匿名与共享），第 {first} → {last} 步："
        f"前 {WINDOW} 步里的最小（两步之间）与中位数（算着的，随那几步的长短）。峰值之比 {ratio:.2f}。\n\n"
        f"{markdown_table(header, table)}\n",
        encoding="utf-8",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
