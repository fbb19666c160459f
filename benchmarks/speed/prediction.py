"""文件预测的速度：同一个检查点、同样的 200 行，与另一份代码（如 d90914c）交替地量，并核对贪心的结果逐字节相同。

    git worktree add --detach OLD d90914c
    python benchmarks/speed/prediction.py --old OLD --model_path 检查点 --test_path ../shared/data/spo_0.json

时间从「已载入」起，到「条预测已写到」止：载入不计，写文件在内。CPU 是这段时间里预测进程自己用的。
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.speed.bench import machine
from finetune.terminal import format_table, markdown_table
from utils import write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "已载入 ", " 条预测已写到 "


def cpu_seconds(pid: int) -> float:
    """一个进程至今用的 CPU 时间。"""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def predict(tree: Path, flags: list[str], num_threads: int, output: Path) -> dict[str, float]:
    """用 tree 的 predict.py 预测一遍 → 墙上时间与 CPU 时间，秒。"""
    command = [sys.executable, "predict.py", *flags, "--output_path", str(output)]
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=tree, env=env, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    moments, lines = {}, []
    for line in process.stderr:
        lines.append(line)
        for mark in (BEGIN, END):
            if mark in line and mark not in moments:
                moments[mark] = time.monotonic(), cpu_seconds(process.pid)
    if process.wait() or len(moments) < 2:
        raise RuntimeError(f"{tree} 的 predict.py 没有做完：\n{''.join(lines[-20:])}")
    wall, cpu = (last - first for first, last in zip(moments[BEGIN], moments[END], strict=True))
    return {"seconds": wall, "cpu_seconds": cpu}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="另一份代码的目录（必填）")
    parser.add_argument("--model_path", type=Path, required=True, help="检查点（必填）")
    parser.add_argument("--test_path", type=Path, required=True, help="样本文件，取前 --rows 行（必填）")
    parser.add_argument("--rows", type=int, default=200, help="行数（缺省 %(default)s）")
    parser.add_argument("--repeats", type=int, default=3, help="交替几遍（缺省 %(default)s）")
    parser.add_argument("--threads", type=int, default=1, help="线程数（缺省 %(default)s）")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="（缺省 %(default)s）")
    parser.add_argument("--name", default="prediction", help="结果的名字（缺省 %(default)s）")
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=args.old, capture_output=True, text=True)
    names = {commit.stdout.strip(): args.old.resolve(), "现在": ROOT}
    runs: dict[str, list[dict]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "rows.json"
        lines = args.test_path.read_text(encoding="utf-8").splitlines(keepends=True)
        rows.write_text("".join(lines[: args.rows]), encoding="utf-8")
        flags = ["--model_path", str(args.model_path.resolve()), "--test_path", str(rows), "--device", "cpu"]
        flags += ["--precision", "fp32", "--max_new_tokens", str(args.max_new_tokens)]
        outputs = set()
        for _ in range(args.repeats):
            for name, tree in names.items():
                output = Path(directory) / "out.jsonl"
                run = {"load": os.getloadavg()[0], **predict(tree, flags, args.threads, output)}
                runs[name].append(run)
                outputs.add(output.read_bytes())
                output.unlink()
                print(name, {key: round(value, 2) for key, value in run.items()}, flush=True)
    table = []
    for name, found in runs.items():
        wall, cpu = (statistics.median(run[key] for run in found) for key in ("seconds", "cpu_seconds"))
        table.append([name, f"{args.rows / wall:.2f}", f"{args.rows / cpu:.2f}"])
    before, now = runs.values()
    ratios = {
        key: statistics.median(a[key] / b[key] for a, b in zip(before, now, strict=True))
        for key in ("seconds", "cpu_seconds")
    }
    table.append(["倍数（逐对的中位数）", *(f"{ratio:.2f}" for ratio in ratios.values())])
    is_same = len(outputs) == 1
    header = ["", "行/秒", "行/秒（CPU）"]
    print(format_table(header, table))
    print("各次的输出逐字节相同" if is_same else f"各次的输出有 {len(outputs)} 种")
    result = {
        "machine": machine(),
        "flags": flags[4:],
        "threads": args.threads,
        "rows": args.rows,
        "runs": runs,
        "ratios": ratios,
    }
    write_json(RESULTS / f"{args.name}.json", {**result, "is_same": is_same})
    (RESULTS / f"{args.name}.md").write_text(
        f"# 文件预测的速度\n\n{args.rows} 行，{args.threads} 线程，至多 {args.max_new_tokens} 个新 token，"
        f"{machine()['cpu']}，交替 {args.repeats} 遍取中位数；载入不计。"
        f"贪心的输出{'逐字节相同' if is_same else f'有 {len(outputs)} 种'}。\n\n{markdown_table(header, table)}\n",
        encoding="utf-8",
    )
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
