"""继续预训练的内存与文档的计数：训练进程自己的内存（匿名页，不含映射的文件）的峰值随语料的大小，每篇读了几次。

    python benchmarks/stages/pretrain_memory.py --general general_0.txt --base 基座 --out pretrain_memory.json

语料由 --general 的各行打乱、编号写成；一篇一行。分词在训练进程之外的子进程里，不计入。第一次训练走到 --steps 步时
收到 SIGTERM，存好退出；第二次 --resume auto 再走 --steps 步。两次真的读到的各篇，与这一轮余下各步的合起来数；余下的从
第二次停下的一步起，照 StepLoader 的次序，不作前向。
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAX_GROWTH = 1.05
# 参数：走到第几步停下，要不要把这一轮余下的读完，数写在哪里
WORKER = """
import json, os, signal, sys, threading
import numpy as np
from benchmarks.speed.protocol import process_memory_mb
last, reads_rest, path = int(sys.argv[1]), sys.argv[2] == "rest", sys.argv[3]
peak, stop = [0.0], threading.Event()
def watch():
    while not stop.wait(0.02):
        peak[0] = max(peak[0], process_memory_mb("RssAnon", "RssShmem"))
threading.Thread(target=watch, daemon=True).start()
import train
from finetune.data.packing import iter_steps
counts = np.zeros(0, dtype=np.int64)
def read(step):
    np.add.at(counts, [line for _, line in step.rows], 1)
one_step, all_steps = train.train_step, train.train
def train_step(engine, step, *others):
    found = one_step(engine, step, *others)
    read(step)
    if engine.global_steps == last:
        os.kill(os.getpid(), signal.SIGTERM)
    return found
def train_all(run):
    global counts
    lines = run.loader.dataset.data_set.columns["lines"]
    counts = np.zeros(int(lines.max()) + 1, dtype=np.int64)
    all_steps(run)
    stop.set()
    if reads_rest:
        loader, starts = run.loader, run.loader.dataset.starts
        size = len(loader.order), loader.global_batch_size
        for step in iter_steps(*size, loader.seed, 0, run.engine.global_steps):
            for place in step:
                begin, end = starts[loader.order[place] :][:2]
                np.add.at(counts, lines[begin:end], 1)
    np.savez(path, counts=counts, expected=np.bincount(lines, minlength=len(counts)), stopped=run.engine.global_steps)
train.train_step, train.train = train_step, train_all
sys.argv = ["train.py", *sys.argv[4:]]
code = train.run_main()
print("PEAK", json.dumps({"code": code, "peak_mb": round(peak[0], 1)}), flush=True)
from finetune.process.interruption import leave
leave(code)
"""


def write_corpus(general: Path, megabytes: float, path: Path) -> int:
    """写一份约这么大的语料，返回文档数。"""
    lines = [line.strip() for line in general.read_text(encoding="utf-8").splitlines() if len(line) > 30]
    generator, written, count = random.Random(0), 0, 0
    with path.open("w", encoding="utf-8") as stream:
        while written < megabytes * 10**6:
            text = f"{count}：" + "".join(generator.choices(lines, k=4)) + "\n"
            written += len(text.encode())
            stream.write(text)
            count += 1
    return count


def start(directory: Path, last: int, more: list, base: Path, steps: int) -> dict:
    """训练到第 last 步时收到 SIGTERM → 退出码、内存的峰值、读到的各篇。"""
    import numpy as np

    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"LOCAL_WORLD_SIZE": "1", "MASTER_PORT": str(random.randint(20000, 60000))}
    flags = {
        **{"task": "pretrain", "train_path": directory / "corpus.txt", "model_name_or_path": base},
        **{"output_dir": directory / "out", "cache_dir": directory / "cache", "train_type": "lora"},
        **{"max_len": 512, "max_src_len": 64, "precision": "fp32"},
        **{"max_steps": 3 * steps, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    path, began = directory / "counts.npz", time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", WORKER, str(last), "rest" if more else "-", str(path), *words, *more],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    told = [line for line in run.stdout.splitlines() if line.startswith("PEAK")]
    assert told, run.stdout[-2000:] + run.stderr[-2000:]
    found = np.load(path)
    report = [line.strip() for line in run.stdout.splitlines() if "样本" in line or "token，" in line]
    return {
        **json.loads(told[0][5:]),
        **{"seconds": time.perf_counter() - began, "stopped": int(found["stopped"]), "report": report},
        **{"counts": found["counts"], "expected": found["expected"]},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--general", type=Path, required=True, help="通用文字，一行一段")
    parser.add_argument("--base", type=Path, required=True, help="基座检查点")
    parser.add_argument("--sizes", default="40,400", help="语料的大小，MB")
    parser.add_argument("--steps", type=int, default=20, help="走多少步时停下")
    parser.add_argument("--out", type=Path, required=True, help="结果写在这里")
    args = parser.parse_args()
    results = []
    for size in map(float, args.sizes.split(",")):
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            documents = write_corpus(args.general, size, directory / "corpus.txt")
            first = start(directory, args.steps, [], args.base, args.steps)
            again = start(directory, 2 * args.steps, ["--resume", "auto"], args.base, args.steps)
        expected, times = first["expected"][1:], (first["counts"] + again["counts"])[1:]  # 行号从 1 起
        result = {
            **{"megabytes": size, "documents": documents, "report": first["report"]},
            **{
                f"{key}_{when}": run[key]
                for key in ("code", "stopped", "peak_mb")
                for when, run in (("first", first), ("resumed", again))
            },
            "pieces": int(expected.sum()),
            "documents_read": int((times > 0).sum()),
            "documents_lost": int((expected > times).sum()) + (documents - len(times)),
            "documents_read_twice": int((times > expected).sum()),
            "pieces_read": {"first": int(first["counts"].sum()), "resumed": int(again["counts"].sum())},
            "seconds": round(first["seconds"] + again["seconds"], 1),
        }
        results.append(result)
        print(result, flush=True)
    growth = {when: results[-1][f"peak_mb_{when}"] / results[0][f"peak_mb_{when}"] for when in ("first", "resumed")}
    content = {"growth": growth, "at_most": MAX_GROWTH, "sizes": results}
    args.out.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print(growth)


if __name__ == "__main__":
    main()
