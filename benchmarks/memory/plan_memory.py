"""推算显存的总表（7B、13B × 四种方法 × ZeRO × 卡数），与小模型在 CPU 上的实测对照。

python benchmarks/memory/plan_memory.py                               # 写这个目录的 README.md
python benchmarks/memory/plan_memory.py --measure --work_dir 目录     # 先在 CPU 上真的训练 20 次（约 6 分钟）
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.memory import report as plan_report
from benchmarks.speed.protocol import process_memory_mb
from finetune.checkpoint.base_model import load_tokenizer
from finetune.cli.train_checks import validate_args
from finetune.cli.train_flags import parse_args as parse_train_args
from finetune.data.prompting import resolve_prompt_format
from finetune.planning.activations import plan_model
from finetune.planning.estimate import evaluate, sample_data
from finetune.planning.machine import Machine
from finetune.planning.memory import FRAGMENTATION
from finetune.process.training_process import free_port
from utils import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
MEASURED = HERE / "results" / "measured.json"
# 与解释器和各库的约 0.5 GiB 相比看得出的大小：约四千万参数，一个 micro batch 约两千 token
MODEL = {"layers": 12, "hidden_size": 512, "intermediate_size": 1376, "heads": 8}
SMALLEST = {"layers": 1, "hidden_size": 32, "intermediate_size": 32, "heads": 2}
METHODS = {
    "freeze": ["--train_type", "freeze", "--freeze_module_name", "layers.11.,layers.10.,layers.9.,layers.8."],
    "lora": ["--train_type", "lora"],
    "ptuning": ["--train_type", "ptuning"],
    "full": ["--train_type", "full"],
}
STAGES = {"ZeRO-2": "ds_zero2_no_offload.json", "ZeRO-3 卸载": "ds_zero3_offload.json"}
# glibc 缺省留着释放的内存；这样超过 64 KiB 的块一释放就还给系统
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
COMMON = [
    *("--train_path", "data/spo_0.json", "--max_len", "256", "--max_src_len", "192", "--max_steps", "3"),
    *("--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--no-save_trainer_state"),
]


def measure(work_dir: Path) -> dict:
    """逐个真的训练（一个 CPU 进程，3 步），量匿名与共享内存的峰值；先各跑一次最小的模型作基线。

    各跑两次：glibc 缺省（peak_default），与大块立即还给系统（peak，近于真正在用的量，推算与它比较）。
    """
    from scripts.build_tiny_model import build_tiny_model

    models = {}
    for name, sizes in (("model", MODEL), ("smallest", SMALLEST)):
        models[name] = work_dir / name
        if not models[name].exists():
            build_tiny_model("baichuan2-7b", models[name], dtype="bfloat16", **sizes)
    runs = []
    for stage, ds_file in STAGES.items():
        for method in ("baseline", *METHODS):
            is_baseline = method == "baseline"
            flags = [*COMMON, "--ds_file", ds_file, *METHODS["lora" if is_baseline else method]]
            model = models["smallest" if is_baseline else "model"]
            argv = [*flags, "--model_name_or_path", str(model), "--output_dir", str(work_dir / "output")]
            log = work_dir / f"{method}-{ds_file}.log"
            peaks = {"peak": run_train(argv, log, RETURN_AT_ONCE), "peak_default": run_train(argv, log, {})}
            print(f"{stage} {method}：" + "、".join(f"{peak / 2**20:.0f} MiB" for peak in peaks.values()), flush=True)
            runs.append({"stage": stage, "ds_file": ds_file, "method": method, **peaks})
    return add_plans({"model": MODEL, "common": COMMON, "runs": runs}, work_dir)


def add_plans(measured: dict, work_dir: Path) -> dict:
    """给每次实测添上 --dry_run 对同样参数的推算（一个进程的训练部分，不含程序本身）。"""
    for run in measured["runs"]:
        is_baseline = run["method"] == "baseline"
        model_dir = work_dir / ("smallest" if is_baseline else "model")
        method = METHODS["lora" if is_baseline else run["method"]]
        flags = ["--model_name_or_path", str(model_dir), "--output_dir", str(work_dir / "output")]
        args = parse_train_args([*COMMON, "--ds_file", str(ROOT / run["ds_file"]), *method, *flags])
        args.train_path = str(ROOT / args.train_path)
        ds_config, config = validate_args(args)
        tokenizer = load_tokenizer(model_dir, config.vocab_size)
        sample = sample_data(args, tokenizer, resolve_prompt_format("auto", model_dir, config))
        model = plan_model(args, config)
        outcome = evaluate(args, ds_config, model, sample, Machine("cpu", "CPU", None, 0, 1.0, ""), 1)
        host = sum(size for name, size in outcome.plan.host.items() if name in ("权重", "梯度与优化器"))
        run["planned"] = outcome.plan.device_bytes + int(host * (1 + FRAGMENTATION["cpu"]))
        run["planned_in_use"] = outcome.plan.device_bytes - outcome.plan.device["碎片"] + host
        run["parts"] = {**outcome.plan.device, "主机": host}
        if not is_baseline:
            measured |= {"num_parameters": model.num_total, "tokens": sum(outcome.batch.lengths)}
    return measured


def run_train(argv: list[str], log: Path, extra_environment: dict[str, str]) -> int:
    """运行一次 train.py，返回匿名与共享内存之和的峰值，字节；每 10 毫秒看一次。"""
    port = str(free_port())
    environment = os.environ | {
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "1"},
        **{"CROSS_RANK": "0", "CROSS_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        **extra_environment,
    }
    peak = 0
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "train.py", *argv], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        while True:
            peak = max(peak, int(process_memory_mb("RssAnon", "RssShmem", pid=process.pid) * 2**20))
            pid, status = os.waitpid(process.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(0.01)
    if status:
        raise RuntimeError(f"train.py 以 {os.waitstatus_to_exitcode(status)} 结束，见 {log}")
    return peak


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """命令行参数。"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measure", action="store_true", help="在 CPU 上重新实测（写 benchmarks/memory/results/measured.json）"
    )
    parser.add_argument("--work_dir", type=Path, help="实测用的目录，放微型检查点与输出（--measure 时必填）")
    args = parser.parse_args(argv)
    if args.measure and args.work_dir is None:
        parser.error("--measure 需要 --work_dir")
    return args


def main():
    args = parse_args()
    if args.measure:
        args.work_dir.mkdir(parents=True, exist_ok=True)
        MEASURED.parent.mkdir(parents=True, exist_ok=True)
        write_json(MEASURED, measure(args.work_dir))
    report = plan_report.report(read_json(MEASURED) if MEASURED.is_file() else None)
    print(report)
    (HERE / "README.md").write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
