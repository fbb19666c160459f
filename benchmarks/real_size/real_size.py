"""真尺寸走一遍：写一个 Baichuan2 形状的检查点，照用户的样子运行本项目的命令，量每个阶段的时间与自己的内存。

    python benchmarks/real_size/real_size.py --model 7b --method qlora --steps 4 --work_dir 目录
    python benchmarks/real_size/real_size.py --model 7b --method freeze --work_dir 目录 --checkpoint 目录/7b  # 留着基座
    python benchmarks/real_size/real_size.py --model toy --method qlora --work_dir 目录                        # 试程序

结果在 results/<模型>-<方法>.json，一个阶段做完就写；被打断后用同样的命令接着做。自己的内存是进程树的匿名页与
共享内存之和，不含映射的权重文件。
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.speed.protocol import process_memory_mb
from finetune.checkpoint.output_dir import iter_checkpoints
from finetune.data.packing import epoch_steps
from finetune.process.training_process import ROOT, TrainingProcess, cpu_environment
from utils import read_json, write_json

RESULTS = Path(__file__).resolve().parent / "results"
TOKENIZER = ROOT.parent / "shared" / "tokenizer" / "v2" / "tokenizer.model"
VOCAB_SIZE, SEED, SECONDS_BETWEEN = 125696, 1234, 0.1


@dataclass(frozen=True)
class Shape:
    """一个模型的形状。"""

    arch: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    is_whole: bool = True  # 词表 125,696；试程序的是自带的小分词器


SHAPES = {
    "7b": Shape("baichuan2-7b", 32, 4096, 11008, 32),
    "13b": Shape("baichuan2-13b", 40, 5120, 13696, 40),
    "toy": Shape("baichuan2-7b", 32, 64, 192, 4, is_whole=False),
}
# {last} 是最后一层的号码
METHODS = {
    "lora": "--train_type lora --lora_dropout 0 --learning_rate 1e-3",
    "qlora": "--train_type lora --lora_dropout 0 --learning_rate 1e-3 --load_in_4bit --gradient_checkpointing all",
    "freeze": "--train_type freeze --freeze_module_name layers.{last}. --learning_rate 1e-4",
}


# ---------------------------------------------------------------------------------------------------------------------
# 量


@dataclass
class Meter:
    """一棵进程树（从 pid 起）各时刻的 (秒, 自己的内存 MB, CPU 秒, 日志字节数)。"""

    pid: int
    log: Path
    started: float = field(default_factory=time.monotonic)
    samples: list[tuple[float, float, float, int]] = field(default_factory=list)

    def look(self):
        """看一次。"""
        pids = tree(self.pid)
        memory = sum(process_memory_mb("RssAnon", "RssShmem", pid=pid) for pid in pids)
        cpu = max(sum(map(cpu_seconds, pids)), self.samples[-1][2] if self.samples else 0)  # 走了的进程不再有数
        self.samples.append((time.monotonic() - self.started, memory, cpu, self.log.stat().st_size))

    def moment(self, pattern: str) -> float:
        """日志里 pattern 最后一次出现的时刻，秒。"""
        found = list(re.finditer(pattern.encode(), self.log.read_bytes()))
        if not found:
            raise RuntimeError(f"{self.log} 里没有「{pattern}」：这一步没有做成")
        return next((s[0] for s in self.samples if s[3] > found[-1].start()), self.samples[-1][0])

    def stage(self, name: str, begin: float = 0.0, end: float = float("inf"), **others) -> dict:
        """begin 到 end 秒之间的一个阶段。"""
        within = [sample for sample in self.samples if begin <= sample[0] <= end] or self.samples[-1:]
        return {
            "name": name,
            "seconds": round(within[-1][0] - begin, 1),
            "own_peak_mb": round(max(sample[1] for sample in within)),
            "planned_mb": None,
            "cpu_seconds": round(within[-1][2] - within[0][2], 1),
            **others,
        }


def tree(pid: int) -> list[int]:
    """pid 与它的全部后代；命令行与父进程相同的（fork 之后还没有 exec）不数：它的页就是父进程的。"""
    found = [pid]
    for parent in found:
        threads = Path(f"/proc/{parent}/task").glob("*/children")
        children = [int(child) for path in threads for child in read(path).split()]
        found += [child for child in children if read(f"/proc/{child}/cmdline") != read(f"/proc/{parent}/cmdline")]
    return found


def read(path: str | Path) -> str:
    """/proc 里的一个文件；进程已结束时为空。"""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def cpu_seconds(pid: int) -> float:
    """一个进程用过的 CPU 秒；已结束时为 0。"""
    fields = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def describe_machine() -> dict:
    """CPU 与内存；units 是算 bf16 与 fp32 的指令。"""
    cpu = Path("/proc/cpuinfo").read_text(errors="replace")
    flags = set(re.search(r"flags\s*: (.*)", cpu)[1].split())
    return {
        "cpu": re.search(r"model name\s*: (.*)", cpu)[1],
        "units": [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load_average": round(os.getloadavg()[1], 1),
    }


# ---------------------------------------------------------------------------------------------------------------------
# 各阶段


class RealSize:
    """一个模型 × 一种方法：各阶段依次做，做过的略去。"""

    def __init__(self, args: argparse.Namespace):
        self.args, self.shape = args, SHAPES[args.model]
        self.layers = args.layers or self.shape.layers
        self.work = args.work_dir.resolve() / f"{args.model}-{args.method}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.base = (args.checkpoint or self.work / "base").resolve()
        self.output, self.data = self.work / "output", self.work / "rows.json"
        self.result_path = args.results / f"{args.model}-{args.method}.json"
        self.env = {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT)}
        self.result = {
            "machine": describe_machine(),
            "commit": git("rev-parse", "--short", "HEAD"),
            "layers": self.layers,
            "precision": args.precision,
            "tokens": [args.row_tokens] * 2,
            "stages": [],
        }
        if self.result_path.is_file() and (self.work / "started").is_file():
            self.result = read_json(self.result_path)
        if not any(iter_checkpoints(self.output)):  # 打断在旧的已删、新的还没有存好的时候
            again = ("load", "train", "save", "resume")
            self.result["stages"] = [stage for stage in self.result["stages"] if stage["name"] not in again]
        (self.work / "started").touch()

    @property
    def checkpoint(self) -> Path:
        """训练出的最新的检查点。"""
        return next(iter_checkpoints(self.output))[2]

    def add(self, *stages: dict):
        """记下做完的阶段。"""
        commit = git("rev-parse", "--short", "HEAD")  # 接着做的时候代码可能已经改过
        stages = tuple({"commit": commit, **stage} for stage in stages)
        self.result["stages"] += stages
        self.result_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.result_path, self.result)
        for stage in stages:
            print(json.dumps(stage, ensure_ascii=False), flush=True)

    def run(self):
        """全部阶段；做完删去工作目录，基座只在没有 --checkpoint 时删。"""
        is_adapter, is_whole_depth = self.args.method != "freeze", self.layers == self.shape.layers
        stages: list[tuple[str, bool, Callable[[], None]]] = [
            ("write", True, self.write),
            ("hash", True, lambda: self.command("hash", "-m", "finetune.checkpoint", "hash", self.base)),
            ("dry_run", True, self.dry_run),
            ("train", True, self.train),
            ("resume", True, self.resume),
            ("merge", is_adapter, lambda: self.converted("merge", "scripts/merge_lora.py")),
            ("export_llama", self.args.model != "13b", lambda: self.export("llama")),
            ("export_gguf", is_whole_depth, lambda: self.export("gguf", "--gguf_type", "q8_0")),
            ("predict", True, self.predict),
        ]  # 13B 没有 Llama 布局；llama.cpp 凭层数认模型
        for name, applies, do in stages:
            if applies and name not in {stage["name"] for stage in self.result["stages"]}:
                do()
        shutil.rmtree(self.work)

    def command(self, name: str, *words, check: bool = True) -> dict:
        """运行 `python words…`，记成一个阶段。"""
        log = self.work / f"{name}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=ROOT, env=cpu_environment(1) | self.env,
                stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
            )  # fmt: skip
        meter = Meter(process.pid, log)
        try:
            while process.poll() is None:
                meter.look()
                time.sleep(SECONDS_BETWEEN)
        finally:
            process.kill()
        if process.returncode:
            raise RuntimeError(f"{name} 以 {process.returncode} 结束：\n" + log.read_text(errors="replace")[-2000:])
        stage = meter.stage(name)
        self.add(stage)
        return stage

    def write(self):
        """写基座；几种方法共用一个时，第一次写的记录放在它旁边。"""
        record = self.base.with_name(f"{self.base.name}.write.json")
        if self.base.is_dir() and record.is_file():
            self.add(read_json(record))
            return
        shape = self.shape
        sizes = {"layers": self.layers, "heads": shape.heads, "dtype": "bfloat16", "format": "bin"}
        sizes |= {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
        sizes |= {"max_shard_size": "2GB", "seed": SEED}
        if shape.is_whole:
            sizes |= {"vocab_size": VOCAB_SIZE, "tokenizer_model": self.tokenizer()}
        flags = [word for name, value in sizes.items() for word in (f"--{name}", value)]
        words = ("scripts/build_tiny_model.py", "--arch", shape.arch, "--output_dir", self.base, *flags)
        write_json(record, self.command("write", *words))

    def tokenizer(self) -> Path:
        """真的分词器；没有 ../shared 时现做一个小的，词表的其余行空着。"""
        if TOKENIZER.is_file():
            return TOKENIZER
        from scripts.build_tiny_model import build_tokenizer

        path = self.work / "tokenizer.model"
        path.write_bytes(build_tokenizer(2, None, None, None)[0])
        return path

    def train_flags(self) -> list[str]:
        """train.py 的参数：每步都是同样的两行，各 row_tokens 个 token，一半是提示。"""
        if not self.data.is_file():
            texts = ["".join(chr(0x4E00 + (start + 37 * place) % 2000) for place in range(600)) for start in (0, 999)]
            rows: list = [None] * (2 * self.args.steps)
            for places in epoch_steps(len(rows), 2, SEED):
                for place, text in zip(places, texts, strict=True):
                    rows[place] = {"instruction": text[:300], "input": "", "output": text[300:]}
            self.data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return [
            *("--model_name_or_path", self.base, "--mode", "baichuan2", "--train_path", self.data),
            *("--output_dir", self.output, "--precision", self.args.precision, "--seed", SEED),
            *("--max_len", self.args.row_tokens, "--max_src_len", self.args.row_tokens // 2),
            *("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1, "--num_train_epochs", 1),
            *("--warmup_ratio", 0, "--show_loss_step", 1, "--save_total_limit", 1),
            *("--ds_file", "ds_zero2_no_offload.json"),
            *METHODS[self.args.method].format(last=self.layers - 1).split(),
        ]

    def training(self, name: str, *flags, on_step: Callable[[TrainingProcess, int], None] | None = None) -> Meter:
        """运行一次 `deepspeed train.py`，等它结束；on_step 在每一步显示之后得到 (训练, 步)。"""
        log = self.work / f"{name}.log"
        with TrainingProcess([*self.train_flags(), *flags], 1, log, env=self.env) as run:
            meter, seen = Meter(run.process.pid, log), 0
            while run.process.poll() is None:
                meter.look()
                steps = [int(step) for step in re.findall(r"步 (\d+)/", run.text())]
                for step in steps[seen:] if on_step is not None else ():  # 看一次可能已过了几步
                    on_step(run, step)
                seen = len(steps)
                time.sleep(SECONDS_BETWEEN)
        return meter

    def dry_run(self):
        """推算；给出的整台主机的峰值也是训练与续训的。"""
        meter = self.training("dry_run", "--dry_run")
        text = meter.log.read_text("utf-8")
        found = re.search(r"每台主机的峰值：([\d.]+) (MiB|GiB)", text)
        if not found:
            raise RuntimeError(f"dry_run 没有做成：\n{text[-2000:]}")
        self.result["planned_mb"] = round(float(found[1]) * (1024 if found[2] == "GiB" else 1))
        self.result["plan"] = [line.strip() for line in text.splitlines() if re.search(r"[\d.]+ [MG]iB", line)]
        self.add(meter.stage("dry_run"))

    def losses(self, first: int, last: int) -> list[float]:
        """train_log.jsonl 里第 first 到 last 步的损失。"""
        records = [json.loads(line) for line in (self.output / "train_log.jsonl").read_text("utf-8").splitlines()]
        return [record["loss"] for record in records if first <= record["step"] <= last]

    def train(self):
        """训练到一半，像用户那样发信号：它存好再停；读基座、训练、保存各是一个阶段。"""
        shutil.rmtree(self.output, ignore_errors=True)

        def stop_halfway(run: TrainingProcess, step: int):
            if step == max(1, self.args.steps // 2 - 1):  # 正在算的一步走完才停
                run.send("rank", signal.SIGTERM)

        meter = self.training("train", on_step=stop_halfway)
        loaded, saved = meter.moment("模型："), meter.moment("已保存")
        trained = meter.moment(r"步 \d+/\d+")
        last = next(iter_checkpoints(self.output))[0]
        planned = self.result["planned_mb"]
        self.add(
            meter.stage("load", 0, loaded),
            meter.stage("train", loaded, trained, planned_mb=planned, losses=self.losses(1, last)),
            meter.stage("save", trained, saved),
        )

    def resume(self):
        """接着训练到底。freeze 存的是完整的模型，两份放不下：续上之后旧的就删去。"""
        first, directory = next(iter_checkpoints(self.output))[0], self.checkpoint

        def remove_old(run: TrainingProcess, step: int):
            if self.args.method == "freeze":
                shutil.rmtree(directory, ignore_errors=True)

        meter = self.training("resume", "--resume", "auto", on_step=remove_old)
        meter.moment("训练结束")
        losses = self.losses(first + 1, self.args.steps)
        self.add(meter.stage("resume", planned_mb=self.result["planned_mb"], losses=losses))

    def converted(self, name: str, *words):
        """合并或导出，做完删去写出的。"""
        target = self.work / name
        shutil.rmtree(target, ignore_errors=True)
        self.command(name, *words, "--model_path", self.checkpoint, "--output_dir", target)
        shutil.rmtree(target)

    def export(self, to: str, *flags):
        """scripts/export.py --to …"""
        self.converted(f"export_{to}", "scripts/export.py", "--to", to, *flags)

    def predict(self):
        """一条样本，至多 8 个 token。"""
        flags = ["--load_in_4bit"] if self.args.method == "qlora" else []
        flags += ["--precision", self.args.precision, "--num_threads", self.args.threads]
        words = ("--instruction", "请介绍一下你自己。", "--max_new_tokens", 8)
        self.command("predict", "predict.py", "--model_path", self.checkpoint, *words, *flags)


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """命令行参数。"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=SHAPES, required=True, help="形状；toy 是试程序用的小模型")
    add("--method", choices=METHODS, required=True, help="freeze 训练最后一层")
    add("--steps", type=int, default=4, help="优化器步，至少 3；一半处打断一次（缺省 4）")
    add("--work_dir", type=Path, required=True, help="检查点与输出放在哪里：7B 要 45 GB，结束时删去")
    add("--checkpoint", type=Path, help="基座放在这里，做完留着，几种方法共用（缺省在 work_dir 里，做完删去）")
    add("--layers", type=int, help="只要这么多层，试一试用（缺省全部）")
    add("--row_tokens", type=int, default=64, help="一行的 token 数，一步两行；有 bf16 指令的 CPU 用 240（缺省 64）")
    add("--precision", choices=["bf16", "fp32"], default="bf16", help="计算精度（缺省 bf16）")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="线程数（缺省全部的核）")
    add("--results", type=Path, default=RESULTS, help="结果写在哪里（缺省 results/）")
    args = parser.parse_args(argv)
    if args.steps < 3:
        parser.error(f"--steps({args.steps}) 至少为 3：一半处要打断")
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # 被停下时带走拉起的进程
    RealSize(parse_args()).run()
