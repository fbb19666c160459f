"""bench 的两组小测量：词表 125,696 时损失的内存与时间（loss_memory），几个旋钮的取值（tuning）；由 bench.py 调用。

每种形式在自己的进程里跑，内存峰值是前向加反向期间的增量：CPU 上是常驻内存，CUDA 上是 max_memory_allocated。
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_work
from bench_protocol import StepMeter, peak_memory_mb

VOCAB = 125_696
TARGET_SHARE = 0.19
# 名字 → (只算目标行, 分块的 logits 元素数；None 为不分块的普通写法, 词表投影是否训练)
LOSS_FORMS = {
    "plain": (False, None, False),
    "plain_target_rows": (True, None, False),
    "chunked_2^24": (True, 2**24, False),
    "chunked_2^25": (True, 2**25, False),
    "chunked_2^26": (True, 2**26, False),
    "chunked_2^27": (True, 2**27, False),
    "chunked_2^28": (True, 2**28, False),
    "plain_trained_head": (False, None, True),
    "chunked_trained_head": (True, 2**27, True),
    "chunked_all_rows": (False, 2**27, False),
}
ATTENTION_LENGTHS = (64, 128, 256, 384, 512, 768, 1024)


def measure_loss(spec: dict[str, Any]) -> dict[str, float]:
    """一种形式的损失：前向加反向的时间与内存增量。spec 有 form、rows、hidden、vocab、dtype、threads。"""
    import torch
    from torch import nn

    from baichuan import linear_cross_entropy

    torch.set_num_threads(spec["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[spec["dtype"]]
    only_targets, chunk, trains_head = LOSS_FORMS[spec["form"]]
    torch.manual_seed(0)
    weight = (torch.randn(spec["vocab"], spec["hidden"], device=device, dtype=dtype) * 0.05).requires_grad_(trains_head)
    hidden = torch.randn(spec["rows"], spec["hidden"], device=device, dtype=dtype).requires_grad_()
    targets = torch.randint(spec["vocab"], (spec["rows"],), device=device)
    is_target = torch.arange(spec["rows"], device=device) < round(spec["rows"] * TARGET_SHARE)
    if chunk is not None:
        linear_cross_entropy.MAX_LOGITS_ELEMENTS = chunk

    def step(rows: slice | torch.Tensor) -> torch.Tensor:
        hidden.grad = weight.grad = None
        chosen, wanted = hidden[rows], targets[rows]
        if chunk is not None:
            loss = linear_cross_entropy.LinearCrossEntropy.apply(chosen, weight, None, wanted)
        else:
            wanted = wanted if only_targets else torch.where(is_target[rows], wanted, -100)
            loss = nn.functional.cross_entropy((chosen @ weight.t()).float(), wanted, reduction="sum")
        loss.backward()
        return loss.detach()

    rows = is_target if only_targets else slice(None)
    step(slice(0, 8))  # 载入线性代数库，分配与大小无关的内存
    seconds, meter = [], StepMeter()
    before = torch.cuda.memory_allocated() / 2**20 if device == "cuda" else _resident_mb()
    for _ in range(3):
        meter.start()
        loss = step(rows)
        measured = meter.stop()
        seconds.append(measured["seconds"])
    peak = measured["peak_cuda_mb"] if device == "cuda" else max(measured["peak_rss_mb"], peak_memory_mb())
    return {"seconds": median(seconds), "extra_mb": peak - before, "loss": float(loss)}


def _resident_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


def measure_attention(spec: dict[str, Any]) -> dict[str, dict[str, float]]:
    """CPU 上一个样本的注意力，矩阵乘法与 SDPA 各要多少毫秒（前向加反向，中位数）→ {长度: {写法: 毫秒}}。"""
    import torch

    from baichuan.attention import packed_attention
    from baichuan.packed_matmul import PackedMatmulAttention

    torch.set_num_threads(spec["threads"])
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[spec["dtype"]]
    heads, width, found = spec["heads"], spec["head_dim"], {}
    for length in spec["lengths"]:
        packed = torch.randn(1, length, 3 * heads * width, dtype=dtype).requires_grad_()
        bias = torch.full((length, length), float("-inf"), dtype=dtype).triu(1)[None]

        def matmul(packed=packed, bias=bias, length=length):
            return PackedMatmulAttention.apply(packed, None, None, bias, [length], [-1], width, None, None)

        def sdpa(bias, packed=packed, length=length):
            return packed_attention(*packed.view(length, 3, heads, width).unbind(1), [length], [-1], bias, False)

        ways = {"matmul": matmul, "sdpa_bias": partial(sdpa, bias), "sdpa_causal": partial(sdpa, None)}
        found[length] = {}
        for name, attend in ways.items():
            seconds = []
            for _ in range(7):
                began = time.perf_counter()
                attend().float().sum().backward()
                seconds.append(time.perf_counter() - began)
            found[length][name] = 1000 * median(seconds)
    return found


def in_own_process(task: str, spec: dict[str, Any]) -> dict[str, Any]:
    """在新进程里跑一项；失败时返回 {"error": 末尾的信息}。"""
    done = subprocess.run(
        [sys.executable, __file__, task, json.dumps(spec)], capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"退出码 {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_dials(stage: str, args: argparse.Namespace) -> dict[str, Any]:
    """跑一组，返回 {"name", "spec", "results", "markdown"}。"""
    from utils import choose_precision

    dtype, _ = choose_precision(args.precision)
    shared = {"threads": args.threads, "dtype": dtype}
    if stage == "tuning":
        shape = bench_work.CPU_SHAPES[8000]
        spec = {**shared, "heads": shape.heads, "head_dim": shape.hidden // shape.heads}
        spec["lengths"] = (64, 128) if args.toy else ATTENTION_LENGTHS
        results = in_own_process("attention", spec)
        if "error" in results:
            raise RuntimeError(f"attention 没有量到：{results['error']}")
        lines = [
            "## 一个样本的注意力（前向加反向，毫秒）",
            "",
            "| 长度 | 矩阵乘法 | SDPA 带偏置 | SDPA 因果 |",
            "|---|---|---|---|",
        ]
        lines += [f"| {n} | " + " | ".join(f"{ms:.2f}" for ms in row.values()) + " |" for n, row in results.items()]
        return {"name": stage, "spec": spec, "results": results, "markdown": "\n".join(lines)}
    import torch

    hidden = 4096 if torch.cuda.is_available() else 512
    sizes = {"rows": 64, "hidden": 32, "vocab": 512} if args.toy else {"rows": 2048, "hidden": hidden, "vocab": VOCAB}
    results, spec = {}, {**shared, **sizes}
    for form in LOSS_FORMS:
        results[form] = in_own_process("loss", {**spec, "form": form})
        print(f"  {form}：{results[form]}", flush=True)
    plain = results["plain"].get("extra_mb")
    lines = [
        f"## 损失的内存与时间（词表 {sizes['vocab']}，{sizes['rows']} 行，宽 {sizes['hidden']}，"
        f"目标占 {TARGET_SHARE:.0%}，{dtype}）",
        "",
        "| 形式 | 前向加反向，秒 | 内存增量，MB | ÷ plain |",
        "|---|---|---|---|",
    ]
    for form, found in results.items():
        if "error" in found:
            lines.append(f"| {form} | 没有量到：{found['error']} | | |")
        else:
            share = f"{found['extra_mb'] / plain:.3f}" if plain else ""
            lines.append(f"| {form} | {found['seconds']:.3f} | {found['extra_mb']:.0f} | {share} |")
    return {"name": stage, "spec": spec, "results": results, "markdown": "\n".join(lines)}


if __name__ == "__main__":
    print(json.dumps({"loss": measure_loss, "attention": measure_attention}[sys.argv[1]](json.loads(sys.argv[2]))))
