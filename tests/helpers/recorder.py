"""记录仪：四种方法 × ZeRO-2、ZeRO-3 offload × 1、2 个进程各训练 12 步，记下每步的损失与最终权重的 SHA-256。

改动代码的结构之前记一次，之后再跑一次与它比较，逐位相同才算没有改变训练：

    python tests/helpers/recorder.py --output before.json
    python tests/helpers/recorder.py --compare before.json [--only 'lora-*' '*-2']

只用命令行与标准库，不导入项目，所以能记录任何一个提交（--root）。fp32，每个进程一个线程，MKL 照它自己的缺省
（MKL_CBWR 是空的；train.py 会设它，记录的那个提交不设），所以忙的机器上也逐位相同；换了 CPU 型号或库的版本，
末位会不同。
"""

import argparse
import hashlib
import itertools
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

# 方法 → (结构, 它的参数)；随机的 dropout 在 lora 里
METHODS = {
    "freeze": ("baichuan2-13b", ["--freeze_module_name", "layers.1.,lm_head"]),
    "lora": ("baichuan2-7b", ["--lora_module_name", "all-linear"]),
    "ptuning": ("baichuan2-13b", ["--prefix_projection", "--prefix_hidden_size", "64"]),
    "full": ("baichuan2-7b", []),
}
DS_FILES = {"zero2": "ds_zero2_no_offload.json", "zero3": "ds_zero3_offload.json"}
RANKS = (1, 2)
SIZES = ["--layers", "2", "--hidden_size", "64", "--heads", "4", "--intermediate_size", "128"]
# 23 行、全局 batch 4：每轮 6 步，最后一步 3 行；两轮 12 步
NUM_ROWS, GLOBAL_BATCH, EPOCHS, STEPS = 23, 4, 2, 12
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "numpy", "sentencepiece", "safetensors")
TIMEOUT = 600.0


def sha256(path: Path) -> str:
    """文件的 SHA-256。"""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors_sha256(path: Path) -> str:
    """safetensors 文件里各张量（按名字排：名字、类型、形状、字节）的 SHA-256，与文件头、在文件里的次序无关。"""
    digest, content = hashlib.sha256(), path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name in sorted(header.keys() - {"__metadata__"}):
        begin, end = header[name]["data_offsets"]
        digest.update(json.dumps([name, header[name]["dtype"], header[name]["shape"]]).encode())
        digest.update(content[start + begin : start + end])
    return digest.hexdigest()


def environment(root: Path, **more: str) -> dict[str, str]:
    """子进程的环境：模块取自 root，一个线程，不联网，没有 GPU。"""
    fixed = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed, "MKL_CBWR": "", **more}


def run_ranks(command: list[str], root: Path, num_ranks: int, cwd: Path | None = None):
    """在 cwd（缺省 root）里直接拉起各进程（不经 deepspeed 启动器，省几秒），等它们结束。

    Raises:
        RuntimeError: 有进程失败或超时；带输出的末尾。
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_ranks)}
    shared |= {"LOCAL_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "CROSS_RANK": "0", "CROSS_SIZE": "1"}
    processes: list[subprocess.Popen] = []
    with tempfile.TemporaryFile() as output:
        try:
            for rank in range(num_ranks):
                env = environment(root, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
                processes.append(
                    subprocess.Popen(
                        command, cwd=cwd or root, env=env, stdin=subprocess.DEVNULL, stdout=output,
                        stderr=subprocess.STDOUT, start_new_session=True,
                    )
                )  # fmt: skip
            deadline = time.monotonic() + TIMEOUT
            while None in (codes := [process.poll() for process in processes]):
                if any(codes) or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if any(code != 0 for code in codes):
            output.seek(0)
            text = output.read().decode("utf-8", "replace")
            raise RuntimeError(f"退出码 {codes}：{' '.join(command)}\n…{text[-4000:]}")


def build_base(root: Path, directory: Path, arch: str) -> Path:
    """用 root 的 build_tiny_model.py 生成一个微型基座。"""
    target = directory / arch
    if not target.is_dir():
        words = ["--arch", arch, "--output_dir", str(target), "--train_text", "data/spo_0.json", *SIZES]
        command = [sys.executable, "scripts/build_tiny_model.py", *words]
        run = subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"退出码 {run.returncode}：{' '.join(command)}\n{run.stdout}{run.stderr}")
    return target


def record(root: Path, directory: Path, rows: Path, method: str, zero: str, num_ranks: int) -> dict:
    """训练一个组合 → {"base": 权重, "losses": 每步的损失, "weights": 检查点的文件 → 各张量的 SHA-256}。"""
    arch, method_flags = METHODS[method]
    base, output = build_base(root, directory, arch), directory / f"{method}-{zero}-{num_ranks}"
    command = [
        *(sys.executable, "train.py", "--train_path", str(rows), "--model_name_or_path", str(base)),
        *("--output_dir", str(output), "--train_type", method, "--ds_file", DS_FILES[zero]),
        *("--precision", "fp32", "--max_len", "128", "--max_src_len", "96", "--learning_rate", "5e-3"),
        *("--num_train_epochs", str(EPOCHS), "--show_loss_step", "1", "--no-save_trainer_state"),
        *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", str(GLOBAL_BATCH // num_ranks)),
        *method_flags,
    ]
    run_ranks(command, root, num_ranks)
    records = [json.loads(line) for line in (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [entry["loss"] for entry in records if "loss" in entry]
    if len(losses) != STEPS:
        raise RuntimeError(f"{output.name} 走了 {len(losses)} 步，应为 {STEPS} 步")
    last = output / f"epoch-{EPOCHS}-step-{STEPS}"
    weights = {path.name: tensors_sha256(path) for path in sorted(last.glob("*.safetensors"))}
    return {"base": sha256(base / "model.safetensors"), "losses": losses, "weights": weights}


def differences(found: dict[str, dict], expected: dict[str, dict]) -> list[str]:
    """逐个组合比较，每个不同的组合一行：第一个不同的步与两个损失，或不同的文件。"""
    lines = []
    for name, ours in found.items():
        theirs = expected.get(name)
        if ours == theirs:
            continue
        if theirs is None:
            lines.append(f"{name}：没有记录")
        elif ours["base"] != theirs["base"]:
            lines.append(f"{name}：基座不同（build_tiny_model.py、data/spo_0.json 或库变了）")
        elif ours["losses"] != theirs["losses"]:
            pairs = list(zip(ours["losses"], theirs["losses"], strict=True))
            step = next(number for number, (left, right) in enumerate(pairs) if left != right)
            lines.append(f"{name}：第 {step + 1} 步的损失是 {pairs[step][0]!r}，记录是 {pairs[step][1]!r}")
        else:
            files = ours["weights"].keys() | theirs["weights"].keys()
            changed = sorted(file for file in files if ours["weights"].get(file) != theirs["weights"].get(file))
            lines.append(f"{name}：损失相同，最终权重不同：{'、'.join(changed)}")
    return lines


def cpu_model() -> str:
    """CPU 的型号。"""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe(root: Path) -> dict:
    """记录于何处：最后改动过 tests/ 以外的提交、数据、各库的版本与 CPU 型号。"""
    command = ["git", "log", "-1", "--format=%H", "--", ".", ":!tests"]
    git = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return {
        "commit": git.stdout.strip(),
        "data": sha256(root / "data" / "spo_0.json"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "cpu": cpu_model(),
    }


def main() -> int:
    """命令行入口；返回退出码：0 相同或只是记录，1 有不同。"""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    own_root = Path(__file__).resolve().parents[2]
    parser.add_argument("--root", type=Path, default=own_root, help="要记录的检出目录（缺省是本脚本所在的）")
    parser.add_argument("--output", type=Path, help="记录写在哪里（缺省不写）")
    parser.add_argument("--compare", type=Path, help="与这份记录比较，列出不同的组合，有则退出码 1")
    parser.add_argument("--only", nargs="+", default=["*"], help="只跑名字合于这些模式的组合，如 'lora-*' '*-zero3-2'")
    args = parser.parse_args()
    names = ["-".join(map(str, names)) for names in itertools.product(METHODS, DS_FILES, RANKS)]
    chosen = [name for name in names if any(fnmatch(name, pattern) for pattern in args.only)]
    if not chosen:
        parser.error(f"--only {' '.join(args.only)} 一个组合也没有选中，可选：{'、'.join(names)}")
    expected = json.loads(args.compare.read_text(encoding="utf-8"))["runs"] if args.compare else {}
    root, runs = args.root.resolve(), {}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        lines = (root / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
        (directory / "rows.json").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        for name in chosen:
            method, zero, num_ranks = name.split("-")
            start = time.monotonic()
            runs[name] = record(root, directory, directory / "rows.json", method, zero, int(num_ranks))
            print(f"{name}  {time.monotonic() - start:.0f} 秒  最后的损失 {runs[name]['losses'][-1]!r}", flush=True)
    if args.output:
        text = json.dumps({**describe(root), "runs": runs}, ensure_ascii=False, indent=1)
        args.output.write_text(text + "\n", encoding="utf-8")
    different = differences(runs, expected) if args.compare else []
    for line in different:
        print(line)
    if args.compare:
        print(f"{len(runs) - len(different)}/{len(runs)} 个组合逐位相同")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
