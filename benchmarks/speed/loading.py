"""载入的时间与内存：一个检查点的 SHA-256、读与量化，与另一份代码（如 d90914c）交替地量，并核对读出的每一位相同。

    git worktree add --detach OLD d90914c
    python benchmarks/speed/loading.py --old OLD --work_dir 目录 --layers 3 --quantization 4bit

检查点是 Baichuan2-7B 的宽度（4096、11008）、几层、小的词表，bf16，写在 --work_dir，量完删去。各是一个新的进程，
导入不计。「只读文件」是把各文件逐块读一遍（每核一个线程）的时间。文件都在页缓存里；--cold 在计时之前把它们移出页缓存，
由磁盘读起，如同第一次载入。
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.speed.bench import machine
from finetune.terminal import format_table, markdown_table
from utils import write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
# 在各份代码自己的进程里：载入，量时间与内存，算出全部权重（与量化状态）的摘要
PROGRAM = """
import hashlib, json, os, sys, threading, time
from pathlib import Path
import torch
path, quantization, is_cold = sys.argv[1], sys.argv[2] or None, sys.argv[3] == "cold"
if Path("finetune").is_dir():
    from finetune.checkpoint.base_model import load_base_model, load_config
    from finetune.checkpoint.run_record import hashing_base
    def run(config):
        record = {"base_model": {"path": path, "hashes": {}}}
        with hashing_base(record):
            model = load_base_model(path, config, torch.bfloat16, torch.device("cpu"), quantization=quantization)
        return model, record["base_model"]["hashes"]
else:  # 没有 finetune/ 的旧代码；装成可编辑的那一份不能顶替它
    from concurrent.futures import ThreadPoolExecutor
    from checkpoint import file_sha256
    from model_factory import load_base_model, load_config as load
    def load_config(path):
        return load(path, "baichuan2")
    def run(config):
        files = sorted(p for p in Path(path).iterdir() if p.suffix in (".json", ".model", ".bin", ".safetensors"))
        with ThreadPoolExecutor() as pool:
            hashes = dict(zip([file.name for file in files], pool.map(file_sha256, files)))
        return load_base_model(path, config, torch.bfloat16, torch.device("cpu"), quantization=quantization), hashes
if quantization:
    import bitsandbytes
def own_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024
peak, before, is_done = [0.0], own_mb(), threading.Event()
def watch():
    while not is_done.wait(0.005):
        peak[0] = max(peak[0], own_mb())
watcher = threading.Thread(target=watch)
config = load_config(path)
watcher.start()
for file in Path(path).glob("*.bin") if is_cold else ():
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
wall, cpu = time.perf_counter(), time.process_time()
model, hashes = run(config)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
is_done.set(); watcher.join()
digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode())
for name, value in sorted(model.state_dict().items()):
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else repr(value).encode())
for name, module in model.named_modules():
    state = getattr(module, "quant_state", None)
    if state is not None:
        digest.update(f"{name} {state.shape} {state.dtype} {state.offset.item().hex()}".encode())
        for value in (state.absmax, state.state2.absmax):
            digest.update(value.numpy().tobytes())
found = {"seconds": wall, "cpu_seconds": cpu, "peak_mb": peak[0] - before, "kept_mb": own_mb() - before}
print(json.dumps({**found, "sha256": digest.hexdigest()}))
"""


def make(directory: Path, layers: int, vocab_size: int) -> Path:
    """Baichuan2-7B 宽度的随机检查点，官方的 .bin 分片。"""
    from scripts.build_tiny_model import build_tiny_model

    sizes = {"layers": layers, "hidden_size": 4096, "intermediate_size": 11008, "heads": 32, "vocab_size": vocab_size}
    return build_tiny_model("baichuan2-7b", directory, dtype="bfloat16", format="bin", max_shard_size="500MB", **sizes)


def read_files(directory: Path, num_threads: int, is_cold: bool) -> float:
    """只把权重文件读一遍的秒数。"""

    def read(path: Path) -> None:
        buffer = bytearray(2**22)
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    for path in directory.glob("*.bin") if is_cold else ():
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(read, directory.glob("*.bin")))
    return time.perf_counter() - start


def load(tree: Path, directory: Path, quantization: str, is_cold: bool) -> dict:
    """用 tree 的代码载入一次。"""
    env = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, str(directory), quantization, "cold" if is_cold else ""]
    run = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{tree} 的代码没有载入成：\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="另一份代码的目录（必填）")
    parser.add_argument("--work_dir", type=Path, required=True, help="检查点写在这里（必填）")
    parser.add_argument("--layers", type=int, default=3, help="（缺省 %(default)s）")
    parser.add_argument("--vocab_size", type=int, default=2000, help="（缺省 %(default)s）")
    parser.add_argument(
        "--quantization", nargs="+", choices=["4bit", "8bit", ""], default=["4bit", ""],
        help="4bit、8bit，空的是普通（缺省 4bit 与普通）",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="交替几遍（缺省 %(default)s）")
    parser.add_argument("--cold", action="store_true", help="每次都由磁盘读起")
    parser.add_argument("--name", default="loading", help="结果的名字（缺省 %(default)s）")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats({args.repeats}) 必须至少为 1")
    return args


def main() -> int:
    args = parse_args()
    if not (args.old / "train.py").is_file():
        print(f"错误：--old({args.old}) 里没有 train.py：请给本项目的一份代码", file=sys.stderr)
        return 2
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=args.old, capture_output=True, text=True)
    names = {commit.stdout.strip(): args.old.resolve(), "现在": ROOT}
    args.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as scratch:
        return measure(args, names, make(Path(scratch) / "checkpoint", args.layers, args.vocab_size))


def measure(args: argparse.Namespace, names: dict[str, Path], directory: Path) -> int:
    """交替地载入 directory，写出结果；names 是 {名字: 代码的目录}。"""
    os.sync()  # 还没有写到磁盘的，移不出页缓存
    num_bytes = sum(path.stat().st_size for path in directory.glob("*.bin"))
    num_cores = len(os.sched_getaffinity(0))
    rows, groups, all_same = [], [], True
    for quantization in args.quantization:
        runs: dict[str, list[dict]] = {name: [] for name in names}
        reading = []
        for _ in range(args.repeats):
            for name, tree in names.items():
                runs[name].append({"load": os.getloadavg()[0], **load(tree, directory, quantization, args.cold)})
                print(quantization or "普通", name, runs[name][-1], flush=True)
            reading.append(read_files(directory, num_cores, args.cold))
        is_same = len({run["sha256"] for found in runs.values() for run in found}) == 1
        all_same &= is_same
        before, now = runs.values()
        ratios = {
            key: statistics.median(b[key] / a[key] for a, b in zip(before, now, strict=True))
            for key in ("seconds", "cpu_seconds", "peak_mb")
        }
        over_reading = statistics.median(run["seconds"] / read for run, read in zip(now, reading, strict=True))
        for name, found in runs.items():
            middle = {key: statistics.median(run[key] for run in found) for key in found[0] if key != "sha256"}
            rows.append([quantization or "普通", name, f"{middle['seconds']:.2f}", f"{middle['cpu_seconds']:.2f}"])
            rows[-1] += [f"{middle['peak_mb']:.0f}", f"{middle['kept_mb']:.0f}", "是" if is_same else "否"]
        rows.append([quantization or "普通", "比", *(f"{ratio:.2f}" for ratio in ratios.values()), "", ""])
        groups.append({"quantization": quantization, "runs": runs, "reading": reading, "ratios": ratios})
        groups[-1] |= {"is_same": is_same, "over_reading": over_reading}
        print(f"{quantization or '普通'}：现在的时间是只读文件的 {over_reading:.2f} 倍")
    header = ["", "", "秒", "CPU 秒", "峰值，MB", "留下，MB", "各位相同"]
    print(format_table(header, rows))
    result = {"machine": machine(), "layers": args.layers, "vocab_size": args.vocab_size, "bytes": num_bytes}
    result["is_cold"] = args.cold
    write_json(RESULTS / f"{args.name}.json", {**result, "groups": groups})
    cache = "每次都由磁盘读起" if args.cold else "文件在页缓存里"
    notes = [f"{group['quantization'] or '普通'}的时间是只读文件的 {group['over_reading']:.2f} 倍" for group in groups]
    (RESULTS / f"{args.name}.md").write_text(
        f"# 载入的时间与内存\n\n{args.layers} 层 Baichuan2-7B 的宽度，{num_bytes / 1e9:.2f} GB 的 .bin，bf16，"
        f"{machine()['cpu']}，{num_cores} 个核，交替 {args.repeats} 遍取中位数，比是逐对的中位数；含 SHA-256，"
        f"{cache}。{'；'.join(notes)}。\n\n{markdown_table(header, rows)}\n",
        encoding="utf-8",
    )
    return 0 if all_same else 1


if __name__ == "__main__":
    sys.exit(main())
