"""继续预训练的内存：不同大小的语料，训练进程自己的内存（匿名页，不含映射的文件）的峰值，与读过的文档的计数。

    python benchmarks/stages/pretrain_memory.py --general general_0.txt --sizes 40,400 --out pretrain_memory.json

语料由 --general 的各行打乱、编号写成；一篇一行。分词在训练进程之外的子进程里，不计入。
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

WORKER = """
import json, sys, threading, time
from benchmarks.speed.protocol import process_memory_mb
peak, samples = [0.0], threading.Event()
def watch():
    while not samples.wait(0.02):
        peak[0] = max(peak[0], process_memory_mb("RssAnon", "RssShmem"))
threading.Thread(target=watch, daemon=True).start()
import train
code = train.run_main()
print("PEAK", json.dumps({"code": code, "peak_mb": peak[0]}), flush=True)
from finetune.process.interruption import leave
leave(code)
"""


def write_corpus(general: Path, megabytes: int, path: Path) -> int:
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--general", type=Path, required=True, help="通用文字，一行一段")
    parser.add_argument("--base", type=Path, required=True, help="基座检查点")
    parser.add_argument("--sizes", default="40,400", help="语料的大小，MB")
    parser.add_argument("--steps", type=int, default=20, help="走多少步")
    parser.add_argument("--out", type=Path, required=True, help="结果写在这里")
    args = parser.parse_args()
    results = []
    for size in map(int, args.sizes.split(",")):
        with tempfile.TemporaryDirectory() as directory:
            corpus = Path(directory) / "corpus.txt"
            count = write_corpus(args.general, size, corpus)
            environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            environment |= {"LOCAL_WORLD_SIZE": "1", "MASTER_PORT": str(random.randint(20000, 60000))}
            flags = {
                **{"task": "pretrain", "train_path": corpus, "model_name_or_path": args.base, "train_type": "lora"},
                **{"output_dir": Path(directory) / "out", "max_len": 512, "max_src_len": 64, "precision": "fp32"},
                **{"max_steps": args.steps, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
            }
            words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
            began = time.perf_counter()
            run = subprocess.run(
                [sys.executable, "-c", WORKER, *words],
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
            )
            [told] = [line for line in run.stdout.splitlines() if line.startswith("PEAK")] or [
                f"PEAK {run.stderr[-2000:]}"
            ]
            report = [line.strip() for line in run.stdout.splitlines() if "样本" in line or "token，" in line]
            found = {"megabytes": size, "documents": count, "report": report, "seconds": time.perf_counter() - began}
            results.append({**found, **json.loads(told[5:])})
            print(results[-1], flush=True)
    args.out.write_text(json.dumps(results, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
