"""bench 的 GPU 各组：真实大小的 7B、13B（随机权重在 GPU 上现造），每种情形一个进程，结果随到随写；由 bench.py 调用。

python benchmarks/speed/bench.py --stage speed7b [--cases lora freeze4] [--max_minutes 8]    # 加 --toy 可在 CPU 上走通

speed7b、speed13b：各方法的 token/s、占实测矩阵速率的份额（公式见 flops.py）、显存峰值；
peers：与 transformers + peft 在同一张卡上轮流（ours、对方、ours）；correctness 见 gpu_check.py。
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
from statistics import median
from typing import Any

from benchmarks.speed import work as bench_work
from benchmarks.speed.ours import Rows, share_lora_start, single_process_environment, step_samples
from benchmarks.speed.programs import LEARNING_RATES, last_layers
from benchmarks.speed.protocol import StepMeter, Worker, WorkerFailed, installed_versions
from finetune.planning.flops import gemm_rate, step_flops
from finetune.terminal import markdown_table

# spo_0.json 的 64 个分位：(样本长度, 目标数)，token；GPU 的机器上没有 ../shared
SPO_LENGTHS = [82, 86, 89, 91, 94, 97, 98, 100, 103, 105, 107, 109, 111, 114, 117, 120, 125, 129, 134, 138, 143, 148]
SPO_LENGTHS += [150, 155, 161, 168, 173, 181, 186, 195, 200, 205, 210, 215, 223, 227, 232, 237, 244, 251, 257, 264]
SPO_LENGTHS += [268, 274, 279, 286, 291, 298, 305, 311, 319, 327, 337, 346, 359, 368, 380, 392, 414, 445, 478, 537]
SPO_LENGTHS += [647, 840]
SPO_TARGET_SHARE = 0.19
CASE_SECONDS = 240
STEPS, WARMUP_STEPS = 5, 2
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}
CHECKPOINT = ["--gradient_checkpointing", "all"]

# 情形：方法、样本（spo 为真实长度的 64 条；数字为两条这么长、全是目标的样本）、命令行、DeepSpeed 配置及其改动
SPEED = {
    "lora": {"method": "lora"},
    "lora_levers_off": {"method": "lora", "levers_off": True},  # 逐段的注意力，逐句的逐元素运算
    "lora_checkpoint_4096": {"method": "lora", "rows": 4096, "batch": 1, "argv": CHECKPOINT},
    "full_adamw_bf16": {"method": "full", "argv": [*CHECKPOINT, "--optimizer", "adamw_bf16"]},
    "full_adamw_8bit": {"method": "full", "argv": [*CHECKPOINT, "--optimizer", "adamw_8bit"]},
    "freeze4": {"method": "freeze", "trained_layers": 4},
    "lora_4096": {"method": "lora", "rows": 4096},
    "lora_checkpoint": {"method": "lora", "argv": CHECKPOINT},
    "ptuning": {"method": "ptuning"},
    "full_zero2_offload": {"method": "full", "argv": CHECKPOINT, "ds_changes": OFFLOAD, "steps": 2, "warmup": 1},
    "full_zero3_offload": {
        "method": "full", "argv": CHECKPOINT, "ds_file": "ds_zero3_offload.json", "steps": 2, "warmup": 1,
    },
}  # fmt: skip
PEER_BATCH, PEER_STEPS = 32, 4
PEERS = {
    "ours": {"kind": "ours"},
    "hf_bs8": {"kind": "hf", "layout": "padded", "batch_size": 8, "accumulation": 4, "amp": True},
    "hf_flat_bs8": {"kind": "hf", "layout": "flat", "batch_size": 8, "accumulation": 4, "amp": False},
    "hf_flat_bs32": {"kind": "hf", "layout": "flat", "batch_size": 32, "accumulation": 1, "amp": False},
    "hf_flat_bs32_liger": {
        "kind": "hf", "layout": "flat", "batch_size": 32, "accumulation": 1, "amp": False, "liger": True,
    },
    "ours_again": {"kind": "ours"},
}  # fmt: skip


def shape_of(size: str, toy: bool) -> bench_work.Shape:
    return bench_work.TOY_SHAPE._replace(layers=4) if toy else bench_work.GPU_SHAPES[size]


def case_rows(case: dict[str, Any], vocab: int, num_steps: int, toy: bool) -> tuple[list[dict], int, int]:
    """合成的样本 → (num_steps 步的全部样本, 每步样本数, 一个样本的最大长度)。"""
    if case.get("rows", "spo") == "spo":
        lengths, share, max_len = SPO_LENGTHS[::8] if toy else list(SPO_LENGTHS), SPO_TARGET_SHARE, 1024
        random.Random(0).shuffle(lengths)
    else:
        lengths, share, max_len = [64 if toy else case["rows"]] * case.get("batch", 2), 1.0, case["rows"]
    rows = [
        bench_work.spread_row(length, vocab, seed, share) for seed, length in enumerate(lengths * num_steps)
    ]  # fmt: skip
    return rows, len(lengths), max_len


def write_config(directory: Path, arch: str, shape: bench_work.Shape):
    """只有 config.json 的检查点目录：权重由 random_weights 现造。"""
    from scripts.build_tiny_model import model_config, write_json

    sizes = {"vocab_size": shape.vocab, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate}
    sizes |= {"layers": shape.layers, "heads": shape.heads, "model_max_length": 4096, "dtype": "bfloat16"}
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", model_config(arch, **sizes))


def switch_off_levers():
    """不用 GPU 上合成的逐元素运算与并排样本的注意力：与它们比较的一边。"""
    from baichuan import elementwise_gpu, modeling_baichuan

    elementwise_gpu.can_compile = lambda: False
    modeling_baichuan.layout_on_gpu = lambda *_: None


def planned_peak(args, config, ds_config: dict, loader, index: int) -> dict[str, float]:
    """推算的显存峰值，MB：planned_mb 是在用的（不含碎片与 CUDA 上下文），planned_total_mb 是全部。"""
    from finetune.data.packing import deal_step
    from finetune.planning.activations import MicroBatch, plan_model
    from finetune.planning.memory import plan_memory, setup_of

    data, max_tokens = loader.dataset, loader.batch_size * loader.max_len
    dealt = deal_step(data.lengths, step_samples(loader, index), 1, loader.batch_size, max_tokens, loader.packing)[0]
    micro = max(dealt, key=lambda micro: sum(data.lengths[i] for i in micro))
    batch = MicroBatch([data.lengths[i] for i in micro], sum(data.num_targets[i] for i in micro), loader.packing)
    grad_accum_dtype = ds_config.get("data_types", {}).get("grad_accum_dtype")
    setup = setup_of(ds_config, args.precision, 1, 1, "cuda", args.optimizer, grad_accum_dtype)
    parts = plan_memory(plan_model(args, config), batch, setup, args.gradient_checkpointing, accumulates=len(dealt) > 1)
    outside = sum(parts.device.get(name, 0) for name in ("碎片", "CUDA 与通信"))
    return {
        "planned_mb": (parts.device_bytes - outside) / 2**20,
        "planned_total_mb": parts.device_bytes / 2**20,
        "planned_parts_mb": {name: number / 2**20 for name, number in parts.device.items()},
    }


def measure_training(spec: dict[str, Any]) -> dict[str, Any]:
    """一种情形：build_engine 与 train_step，返回速度、份额与显存峰值。"""
    single_process_environment()
    import deepspeed
    import torch

    import train
    from benchmarks.speed.random_weights import fill_baichuan
    from finetune.checkpoint import base_model
    from finetune.cli.train_checks import validate_args
    from finetune.cli.train_flags import parse_args
    from finetune.data.step_loader import StepLoader
    from utils import read_json, write_json

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = bench_work.Shape(*spec["shape"])
    case, num_steps = spec["case"], spec["warmup"] + spec["steps"]
    if case.get("levers_off"):
        switch_off_levers()
    base_model.check_weights = lambda *_: None
    base_model.load_weights = lambda model, _: fill_baichuan(model, device)
    work = json.loads(Path(spec["work"]).read_text(encoding="utf-8")) if "work" in spec else None
    if work is None:
        rows, per_step, max_len = case_rows(case, shape.vocab, num_steps, spec["toy"])
    else:
        rows, per_step, max_len = [row for step in work["steps"] for row in step], len(work["steps"][0]), 1024
        share_lora_start()
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as scratch:
        checkpoint, ds_file = Path(scratch) / "model", Path(scratch) / "ds.json"
        write_config(checkpoint, spec["arch"], shape)
        ds_config = read_json(bench_work.ROOT / case.get("ds_file", "ds_zero2_no_offload.json"))
        for section, changes in case.get("ds_changes", {}).items():
            ds_config[section] = {**ds_config.get(section, {}), **changes}
        write_json(ds_file, ds_config)
        batch = min(8, per_step)
        argv = ["--model_name_or_path", checkpoint, "--train_path", bench_work.data_path(), "--output_dir", scratch]
        argv += ["--ds_file", ds_file, "--train_type", case["method"], "--max_len", max_len, "--precision", "bf16"]
        argv += ["--max_src_len", max_len - 1, "--per_device_train_batch_size", batch]
        argv += ["--gradient_accumulation_steps", per_step // batch]
        argv += ["--learning_rate", LEARNING_RATES[case["method"]], *case.get("argv", [])]
        if case["method"] == "lora":
            argv += ["--lora_dropout", case.get("dropout", 0.0)]
        if case["method"] == "freeze":
            argv += ["--freeze_module_name", last_layers(shape.layers, min(case["trained_layers"], shape.layers))]
        args = parse_args([str(part) for part in argv])
        ds_config, config = validate_args(args)
        ds_config.pop("scheduler", None)
        deepspeed.init_distributed()
        began = time.perf_counter()
        engine, ds_config = train.build_engine(args, config, ds_config, args.precision, num_steps)
        built = time.perf_counter() - began
    loader = StepLoader(
        Rows(rows),
        batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_len=args.max_len,
        seed=None,
        packing=args.packing,
    )
    steps = []
    for index in range(num_steps):
        step, meter = loader.prepare(step_samples(loader, index)), StepMeter()
        meter.start()
        loss, _, grad_norm = train.train_step(engine, step)
        measured = {**meter.stop(), "loss": loss, "grad_norm": grad_norm, "tokens": step.num_tokens}
        steps.append({**measured, "num_micro_batches": len(step.micro_batches)})
        print(f"step {index}: {measured}", file=sys.stderr, flush=True)
    timed = steps[spec["warmup"] :]
    chosen = step_samples(loader, spec["warmup"])
    lengths, targets = [loader.dataset.lengths[i] for i in chosen], sum(loader.dataset.num_targets[i] for i in chosen)
    flops = step_flops(shape, lengths, targets, case["method"], case.get("trained_layers", 0))
    speed = median(step["tokens"] / step["seconds"] for step in timed)
    result = {
        "tokens_per_second": speed,
        "seconds": median(step["seconds"] for step in timed),
        "model_flops": flops / sum(lengths) * speed,
        "first_loss": steps[0]["loss"],
        "build_seconds": built,
        "peak_mb": max(step.get("peak_cuda_mb", step["peak_rss_mb"]) for step in steps),
        "peak_reserved_mb": max(step.get("peak_reserved_mb", 0.0) for step in steps),
        **planned_peak(args, config, ds_config, loader, 0),
        "steps": steps,
        "versions": installed_versions("torch", "transformers", "peft", "deepspeed", "triton"),
    }
    del engine
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rate = gemm_rate(shape, 8192 if device.type == "cuda" else 256, "bf16", device.type, seconds=2.0)
    return {**result, "gemm_flops": rate, "mfu": result["model_flops"] / rate}


def in_own_process(task: str, spec: dict[str, Any], timeout: float) -> dict[str, Any]:
    """在新进程里跑一种情形；失败或超时返回 {"error": 原因}。"""
    script = Path(__file__).with_name("gpu_check.py") if task == "check" else Path(__file__)
    try:
        done = subprocess.run(
            [sys.executable, str(script), json.dumps(spec)],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"{timeout:.0f} 秒没有走完"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        print("\n".join(lines[-15:]), flush=True)
        return {"error": lines[-1] if lines else f"退出码 {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_peer(case: dict[str, Any], shape: bench_work.Shape, work: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """对方的一种设置：同一份权重与样本，走 PEER_STEPS 步。"""
    from importlib.util import find_spec

    if case.get("liger") and find_spec("liger_kernel") is None:
        return {"error": "没有安装 liger-kernel"}
    config = {"vocab_size": shape.vocab, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate}
    config |= {"num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "rms_norm_eps": 1e-6}
    config |= {"num_key_value_heads": shape.heads, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    has_flash = find_spec("flash_attn") is not None
    full = {
        **case,
        "random_config": config,
        "attention": "flash_attention_2" if has_flash and case["layout"] == "flat" else "sdpa",
        "method": "lora",
        "dropout": 0.0,
        "checkpointing": False,
        "precision": "bf16",
        "work": str(work),
        "threads": os.cpu_count(),
        "learning_rate": LEARNING_RATES["lora"],
    }
    command = [sys.executable, str(Path(__file__).with_name("peers.py")), json.dumps(full)]
    worker = Worker("peer", command, dict(os.environ), spec["scratch"] / "log-gpu-peer.txt")
    try:
        versions = worker.wait_ready()["versions"]
        steps = [worker.step(index) for index in range(PEER_STEPS)]
    except WorkerFailed as error:
        return {"error": str(error)}
    finally:
        worker.close()
    timed = steps[1:]
    return {
        "tokens_per_second": median(step["tokens"] / step["seconds"] for step in timed),
        "seconds": median(step["seconds"] for step in timed),
        "first_loss": steps[0]["loss"],
        "peak_mb": max(step.get("peak_cuda_mb", step["peak_rss_mb"]) for step in steps),
        "attention": full["attention"],
        "steps": steps,
        "versions": versions,
    }


def plan(stage: str, args: argparse.Namespace, scratch: Path) -> list[tuple[str, Any]]:
    """一组的各情形 → [(名字, 接受剩余秒数、返回结果的函数)]。"""
    if stage == "correctness":
        from benchmarks.speed.gpu_check import CHECKS

        return [(name, lambda left, name=name: in_own_process("check", {"check": name}, left)) for name in CHECKS]
    size = "13b" if stage == "speed13b" else "7b"
    shape = shape_of(size, args.toy)
    if stage == "peers":
        shape = shape._replace(vocab=shape.vocab if args.toy else 64000)  # 普通词表投影：与 Llama 同一个函数
        rows, _, _ = case_rows({}, shape.vocab, 1, toy=False)
        size = 8 if args.toy else PEER_BATCH
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))[:: 64 // size]
        bench_work.write_work(scratch / "work-gpu.json", [rows] * PEER_STEPS, shape.vocab)
        shared = {"shape": shape, "toy": args.toy, "arch": "baichuan-7b", "steps": PEER_STEPS - 1, "warmup": 1}
        shared |= {"work": str(scratch / "work-gpu.json"), "case": {"method": "lora"}}
        return [
            (name, lambda left, case=case: in_own_process("train", shared, left) if case["kind"] == "ours"
             else run_peer(small_batch(case, size), shape, scratch / "work-gpu.json", {"scratch": scratch}))
            for name, case in PEERS.items()
        ]  # fmt: skip
    arch = f"baichuan2-{size}"
    return [
        (name, lambda left, case=case: in_own_process("train", {
            "shape": shape, "toy": args.toy, "arch": arch, "case": case,
            "steps": case.get("steps", STEPS), "warmup": case.get("warmup", WARMUP_STEPS),
        }, left))
        for name, case in SPEED.items()
    ]  # fmt: skip


def small_batch(case: dict[str, Any], rows_per_step: int) -> dict[str, Any]:
    """每步的样本较少时（--toy），批与累积相应缩小。"""
    batch = min(case["batch_size"], rows_per_step)
    return {**case, "batch_size": batch, "accumulation": rows_per_step // batch}


def run_stage(stage: str, args: argparse.Namespace, scratch: Path, result: dict[str, Any], save):
    """依次跑一组的各情形；每有一个结果就写一次；时间不够的写明没有跑。"""
    deadline = time.monotonic() + 60 * args.max_minutes
    section: dict[str, Any] = {"name": stage, "results": {}, "markdown": ""}
    result["sections"].append(section)
    for name, run in plan(stage, args, scratch):
        if args.cases and name not in args.cases:
            continue
        left = deadline - time.monotonic()
        section["results"][name] = run(min(left, CASE_SECONDS)) if left > 20 else {"error": "时间不够，没有跑"}
        shown = {key: value for key, value in section["results"][name].items() if key not in ("steps", "versions")}
        print(f"{stage} {name}：{shown}", flush=True)
        section["markdown"] = "\n".join(section_table(stage, section["results"]))
        save()


def section_table(stage: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """一组的 Markdown 表。"""
    if stage == "correctness":
        rows = []
        for name, found in results.items():
            if "error" in found:
                rows.append([name, f"**失败**：{found['error']}", "", ""])
            for text, difference, tolerance in found.get("differences", []):
                state = "过" if difference <= tolerance else "**不过**"
                rows.append([f"{name}：{text}", state, f"{difference:.2e}", f"{tolerance:.0e}"])
        return ["## correctness", "", markdown_table(["检查", "结果", "差", "许"], rows)]
    header = ["情形", "token/s", "步，秒", "TFLOP/s", "占实测矩阵速率", "显存峰值，GiB", "推算，GiB", "首步损失"]
    rows = []
    for name, found in results.items():
        if "error" in found:
            rows.append([name, f"没有量到：{found['error']}", *[""] * 6])
            continue
        flops = f"{found['model_flops'] / 1e12:.0f}" if "model_flops" in found else ""
        mfu = f"{found['mfu']:.1%}（{found['gemm_flops'] / 1e12:.0f}）" if "mfu" in found else ""
        planned = f"{found['planned_mb'] / 1024:.1f}" if "planned_mb" in found else ""
        speed, seconds = f"**{found['tokens_per_second']:.0f}**", f"{found['seconds']:.3f}"
        peak, loss = f"{found['peak_mb'] / 1024:.1f}", f"{found['first_loss']:.4f}"
        rows.append([name, speed, seconds, flops, mfu, peak, planned, loss])
    return [f"## {stage}", "", markdown_table(header, rows)]


if __name__ == "__main__":
    from finetune.process.interruption import leave

    print(json.dumps(measure_training(json.loads(sys.argv[1]))))
    leave(0)
