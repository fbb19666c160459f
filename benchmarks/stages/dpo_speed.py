"""dpo 的速度与内存对照 TRL 1.16 的 DPOTrainer：LoRA，提示约 300、回答约 60 个 token 的对，走一轮，含参考模型的前向。

TRL 在它自己的环境里（装了 trl==1.16、本项目的 torch 与 transformers）：

    python benchmarks/stages/dpo_speed.py --general general_0.txt --trl_python VENV/bin/python \
        --out benchmarks/stages/results/dpo_speed.json

一个模型、一份数据，各程序各在自己的进程里轮流跑 --repeats 次；trl-default 是它的缺省（开着重算），trl-best 关掉重算，
其余相同。速度按有用的 token（提示只数一次）算，取墙钟与 CPU 时间两种；内存是训练时进程的匿名页的峰值。
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PAIRS, BATCH, ACCUMULATION = 16, 4, 1
# 词表投影约占一个 token 前向的七分之一（Baichuan2-7B 是十三分之一）：只在目标行算它的好处不会被小模型夸大太多
SIZES = {"layers": 8, "hidden_size": 256, "heads": 4, "intermediate_size": 688, "vocab_size": 4000}
RATE, RANK = 1e-4, 8
PROGRAMS = ("ours", "trl-default", "trl-best")


class Meter:
    """一段时间的墙钟、CPU 时间与匿名内存的峰值。"""

    def __enter__(self):
        from benchmarks.speed.protocol import process_memory_mb

        self.stop, self.peak = threading.Event(), 0.0

        def watch():
            while not self.stop.wait(0.01):
                self.peak = max(self.peak, process_memory_mb("RssAnon"))

        threading.Thread(target=watch, daemon=True).start()
        self.began, self.began_cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.seconds, self.cpu_seconds = time.perf_counter() - self.began, time.process_time() - self.began_cpu
        self.stop.set()

    def report(self) -> dict[str, float]:
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "peak_mb": self.peak}


def run_ours(directory: Path) -> dict:
    flags = {
        **{"task": "dpo", "train_path": directory / "pairs.json", "model_name_or_path": directory / "base"},
        **{"output_dir": directory / "ours", "train_type": "lora", "lora_dim": RANK, "lora_module_name": "all-linear"},
        **{"max_len": 512, "max_src_len": 400, "precision": "fp32", "num_train_epochs": 1, "learning_rate": RATE},
        **{"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATION, "num_threads": 1},
    }
    sys.argv = [
        "train.py",
        *(str(word) for name, value in flags.items() for word in (f"--{name}", value)),
        "--no-save_trainer_state",
    ]
    from finetune.cli.train_checks import first_look

    first_look()  # train.py 自己的第一句，在载入各库之前
    import train
    from finetune.process.interruption import leave

    found, original = {}, train.train

    def measured(run):
        with Meter() as meter:
            original(run)
        lines = (run.output_dir / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
        found.update(meter.report(), tokens=sum(json.loads(line)["tokens"] for line in lines))

    train.train = measured
    code = train.run_main()
    assert code == 0
    print("FOUND", json.dumps(found), flush=True)
    leave(0)


def run_trl(directory: Path, is_best: bool) -> dict:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (directory / "pairs.json").read_text(encoding="utf-8").splitlines()]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "llama")
    best = {"gradient_checkpointing": False} if is_best else {}
    config = DPOConfig(
        output_dir=str(directory / "trl"), per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATION,
        learning_rate=RATE, num_train_epochs=1, report_to=[], use_cpu=True, bf16=False, max_length=1024,
        save_strategy="no", **best,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=LlamaForCausalLM.from_pretrained(directory / "llama", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=30, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with Meter() as meter:
        trainer.train()
    print("FOUND", json.dumps(meter.report()), flush=True)


def prepare(general: Path, directory: Path):
    """模型、它的 Llama 导出、成对的文字。"""
    from baichuan import BaichuanTokenizer
    from finetune.export.export import export
    from scripts.build_tiny_model import build_tiny_model

    build_tiny_model("baichuan2-7b", directory / "base", **SIZES)
    export(directory / "base", "llama", directory / "llama", dtype="float32")
    tokenizer = BaichuanTokenizer.from_pretrained(directory / "base")
    text, generator = general.read_text(encoding="utf-8").replace("\n", ""), random.Random(0)

    def piece(num_tokens: int) -> str:
        start = generator.randrange(len(text) - 2000)
        return tokenizer.decode(tokenizer.encode_plain(text[start : start + 1500])[:num_tokens])

    rows = [{"prompt": piece(300), "chosen": piece(60), "rejected": piece(60)} for _ in range(PAIRS)]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (directory / "pairs.json").write_text(content, encoding="utf-8")


def write(path: Path, runs: dict[str, list[dict]]):
    """各程序的中位数，与 ours 之比。"""
    tokens = runs["ours"][0]["tokens"]
    middle = {
        name: {key: statistics.median(run[key] for run in found) for key in ("seconds", "cpu_seconds", "peak_mb")}
        for name, found in runs.items()
    }
    summary = {
        name: {
            **values,
            "tokens_per_second": tokens / values["seconds"],
            "tokens_per_cpu_second": tokens / values["cpu_seconds"],
            "speedup_of_ours": values["seconds"] / middle["ours"]["seconds"],
            "cpu_speedup_of_ours": values["cpu_seconds"] / middle["ours"]["cpu_seconds"],
            "memory_of_ours": middle["ours"]["peak_mb"] / values["peak_mb"],
        }
        for name, values in middle.items()
    }
    content = {"tokens": tokens, "sizes": SIZES, "pairs": PAIRS, "batch": BATCH, "summary": summary, "runs": runs}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--general", type=Path, help="通用文字")
    parser.add_argument("--repeats", type=int, default=3, help="各跑几次")
    parser.add_argument("--out", type=Path, help="结果写在这里")
    parser.add_argument("--trl_python", default=sys.executable, help="装了 TRL 的解释器（缺省就是现在的）")
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program == "ours":
        return run_ours(args.directory)
    if args.program:
        return run_trl(args.directory, args.program == "trl-best")
    runs: dict[str, list[dict]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(args.general, directory)
        for _ in range(args.repeats):
            for program in PROGRAMS:
                environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(random.randint(20000, 60000))}
                python = sys.executable if program == "ours" else args.trl_python
                command = [python, __file__, "--program", program, "--directory", str(directory)]
                env = {**os.environ, "OMP_NUM_THREADS": "1", **(environment if program == "ours" else {})}
                run = subprocess.run(command, env=env, capture_output=True, text=True)
                found = [line for line in run.stdout.splitlines() if line.startswith("FOUND")]
                assert found, run.stdout[-3000:] + run.stderr[-3000:]
                runs[program].append(json.loads(found[0][6:]))
                print(program, runs[program][-1], flush=True)
            write(args.out, runs)  # 每轮都写：轮到一半被打断也有结果


if __name__ == "__main__":
    main()
