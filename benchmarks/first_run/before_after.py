"""一天里的各处，与旧的提交并排：命令的 CPU 秒、旁边有程序时的快慢、进程数、生成的评估。

    git worktree add OLD d90914c
    python benchmarks/first_run/before_after.py --old OLD --out benchmarks/first_run/results/before_after

新旧轮流跑 --repeats 次，取中位数；墙钟只用来比新旧（同时有别的任务时，两边一样受影响）。每一项做完就写。
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PREDICT = (
    "predict.py --model_path {base} --test_path {rows} --max_new_tokens 32 --batch_size 4 --output_path {out}/p.jsonl"
)
TRAIN = (
    "train.py --model_name_or_path {base} --train_path data/cls_0.json --output_dir {out}/run --train_type lora "
    "--precision fp32 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --max_len 128 --max_src_len 112"
)
LAUNCHER = "-m deepspeed.launcher.runner --num_gpus 1 --master_port {port} "


class Case(NamedTuple):
    """一条命令：标题、参数（新旧相同）、旁边几个占满核的程序、允许的退出码。"""

    title: str
    command: str
    neighbours: int = 0
    codes: tuple[int, ...] = (0,)


CASES = [
    Case("`train.py --help`", "train.py --help"),
    Case("`predict.py --help`", "predict.py --help"),
    Case("写错的参数", "train.py --train_path data/cls_1.json --lerning_rate 1", codes=(2,)),
    Case("`data_set.py check` 小文件", "data_set.py check data/cls_1.json", codes=(0, 1)),
    Case("启动器下写错的参数", LAUNCHER + "train.py --train_path data/cls_1.json --lerning_rate 1", codes=(1, 2)),
    Case("启动器下只打印一行的脚本", LAUNCHER + "{work}/print.py"),
    Case("训练一步", TRAIN + " --max_steps 1"),
    Case("预测 24 行", PREDICT),
    Case("预测 24 行，旁边两个占满核的程序", PREDICT, 2),
    Case("训练 20 步", TRAIN + " --max_steps 20"),
    Case("训练 20 步，旁边两个占满核的程序", TRAIN + " --max_steps 20", 2),
]


def run(case: Case, tree: Path, base: Path, work: Path) -> dict:
    """在 tree 里运行一次 → CPU 秒（连同子进程）与墙钟秒。"""
    port = 20000 + os.getpid() % 9000
    with tempfile.TemporaryDirectory(dir=work) as out:
        values = {"base": base, "rows": work / "rows.json", "out": out, "port": port, "work": work}
        command = [sys.executable, *case.command.format(**values).split()]
        environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "PYTHONPATH")}
        environment |= {
            "PYTHONPATH": str(tree),
            "LOCAL_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # 不经启动器；启动器自己另写
        beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(case.neighbours)]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
        finally:
            for process in beside:
                process.kill()
                process.wait()
        if done.returncode not in case.codes:
            raise SystemExit(f"{tree.name}：{' '.join(command)} 退出码 {done.returncode}\n{done.stdout[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": round(cpu, 2), "wall": round(wall, 2)}


def count_processes(tree: Path, base: Path, work: Path) -> int:
    """LOCAL_SIZE=2 bash scripts/train_lora.sh 走两步：run_config.json 里的进程数。"""
    with tempfile.TemporaryDirectory(dir=work) as out:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"LOCAL_SIZE": "2", "OUTPUT_DIR": out, "TRAIN_PATH": "data/cls_0.json", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(tree)
        command = ["bash", "scripts/train_lora.sh", str(base), "baichuan2", "--max_steps", "2", "--max_len", "128"]
        command += ["--max_src_len", "112", "--precision", "fp32"]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{tree.name}：{' '.join(command)}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
        return json.loads((Path(out) / "run_config.json").read_text(encoding="utf-8"))["world_size"]


def write_report(results: dict, out: Path):
    """OUT.json 与 OUT.md。"""
    out.with_suffix(".json").write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"# 与 d90914c 并排\n\n{results['machine']}，{os.cpu_count()} 个核，提交 {results['commit']}，"
        f"开始与结束时的负载 {results['load'][0]:.1f}、{os.getloadavg()[0]:.1f}；新旧轮流，"
        f"各 {results['repeats']} 次的中位数。\n",
        "| 命令 | CPU 秒，旧 | 新 | 新 ÷ 旧 | 墙钟，新 ÷ 旧 |",
        "|---|---|---|---|---|",
    ]
    for title, runs in results["cases"].items():
        cpu, wall = (
            {name: statistics.median(run[key] for run in runs[name]) for name in runs} for key in ("cpu", "wall")
        )
        lines.append(
            f"| {title} | {cpu['old']:.2f} | {cpu['new']:.2f} | {cpu['new'] / cpu['old']:.2f} "
            f"| {wall['new'] / wall['old']:.2f} |"
        )
    if processes := results.get("processes"):
        lines.append(
            f"\n`LOCAL_SIZE=2 bash scripts/train_lora.sh` 的进程数：旧 {processes['old']}，新 {processes['new']}。"
        )
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    """造一个微型基座，依次做各项。"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="d90914c 的工作树")
    parser.add_argument("--repeats", type=int, default=3, help="每项新旧各跑几次")
    parser.add_argument("--machine", default="", help="CPU 的名字，写进结果")
    parser.add_argument("--out", type=Path, required=True, help="结果的路径，不带后缀")
    args = parser.parse_args()
    trees = {"old": args.old.resolve(), "new": ROOT}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    results = {
        "machine": args.machine,
        "commit": commit.strip(),
        "load": os.getloadavg(),
        "repeats": args.repeats,
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as directory:
        work, base = Path(directory), Path(directory) / "base"
        command = [sys.executable, "scripts/build_tiny_model.py", "--arch", "baichuan2-7b", "--layers", "4"]
        command += ["--hidden_size", "128", "--output_dir", str(base)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        rows = (ROOT / "data" / "d2q_1.json").read_text(encoding="utf-8").splitlines(keepends=True)[:24]
        (work / "rows.json").write_text("".join(rows), encoding="utf-8")
        (work / "print.py").write_text('print("第一行")\n', encoding="utf-8")
        for case in CASES:
            runs = results["cases"][case.title] = {name: [] for name in trees}
            for _ in range(args.repeats):
                for name, tree in trees.items():
                    runs[name].append(run(case, tree, base, work))
            write_report(results, args.out)
            print(case.title, runs, flush=True)
        results["processes"] = {name: count_processes(tree, base, work) for name, tree in trees.items()}
        write_report(results, args.out)


if __name__ == "__main__":
    main()
