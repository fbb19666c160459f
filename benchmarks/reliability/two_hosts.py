"""两台机器：两个网络命名空间当两台主机，各有自己的地址，用 scripts/train_multinode.sh 跨两台训练，中途断网，再续训。

    python benchmarks/reliability/two_hosts.py --output benchmarks/reliability/results   # 需要 root 与 ip 命令

三次训练：没有打断过的一次；走到一半把连线断开的一次，两边都应在时限内带着说明结束；接好线续训的一次，
最后的权重、优化器状态与没有打断过的一次逐位相同。结果写进 two_hosts.json 与 two_hosts.md。
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.reliability.kill import compare
from finetune.checkpoint.manifest import verify_checkpoint
from finetune.checkpoint.output_dir import iter_checkpoints
from finetune.process.training_process import Ended, TrainingProcess
from finetune.terminal import markdown_table
from scripts.build_tiny_model import build_tiny_model
from utils import write_json

ROOT = Path(__file__).resolve().parents[2]


SIZES = {"layers": 2, "hidden_size": 32, "heads": 4, "intermediate_size": 48}
# 48 行、全局 batch 2：每轮 24 步；三轮
STEPS_PER_EPOCH, EPOCHS, SAVE_STEP = 24, 3, 10
# 通信等对方的时限（DEEPSPEED_TIMEOUT，分钟）与整个结束的时限（秒）
TIMEOUT_MINUTES, END_TIMEOUT = 1, 150.0
START_TIMEOUT = 300.0


class TwoHosts:
    """两个网络命名空间，一对 veth 相连；文件系统是共用的。"""

    def __init__(self):
        tag = f"{os.getpid() % 100000}"
        self.names = [f"bc{tag}a", f"bc{tag}b"]
        self.links = [f"bv{tag}a", f"bv{tag}b"]
        self.addresses = ["10.231.77.1", "10.231.77.2"]

    def __enter__(self):
        self._ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
            self._ip("netns", "add", name)
            self._ip("link", "set", link, "netns", name)
            self._ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            self._ip("-n", name, "link", "set", "lo", "up")
            self._ip("-n", name, "link", "set", link, "up")
        return self

    def __exit__(self, *error):
        for name in self.names:
            with suppress(subprocess.CalledProcessError):
                self._ip("netns", "del", name)
        with suppress(subprocess.CalledProcessError):
            self._ip("link", "del", self.links[0])  # 没有移进命名空间就失败了的

    @staticmethod
    def _ip(*words: str):
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def cut(self):
        """断开连线：两边的包都到不了对方，没有 RST，像拔了网线。"""
        self._ip("-n", self.names[0], "link", "set", self.links[0], "down")

    def join(self):
        """接好连线。"""
        self._ip("-n", self.names[0], "link", "set", self.links[0], "up")

    def hostfile(self, path: Path) -> Path:
        path.write_text("".join(f"{address} slots=1\n" for address in self.addresses), encoding="utf-8")
        return path


def why_not() -> str | None:
    """这里不能建网络命名空间的原因；能则为 None。"""
    if os.geteuid() != 0:
        return "没有 root 权限，不能建网络命名空间"
    if shutil.which("ip") is None:
        return "没有 ip 命令（iproute2）"
    try:
        with TwoHosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"不能建网络命名空间：{error.stderr.strip()}"


@contextmanager
def training(hosts: TwoHosts, work: Path, output: Path, *more) -> Iterator[list[TrainingProcess]]:
    """两台主机上各起一次 train_multinode.sh，和人在两台机器上做的一样。"""
    flags = [
        *("--train_path", work / "rows.json", "--eval_path", work / "rows.json", "--output_dir", output),
        *("--train_type", "lora", "--precision", "fp32", "--max_len", 96, "--max_src_len", 64),
        *("--num_train_epochs", EPOCHS, "--save_model_step", SAVE_STEP, "--show_loss_step", 1),
        *("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1, *more),
    ]
    runs = []
    try:
        for node, name in enumerate(hosts.names):
            env = {
                "HOSTFILE": str(hosts.hostfile(work / "hostfile")),
                "NODE_RANK": str(node),
                "MASTER_ADDR": hosts.addresses[0],
                "PORT": "29571",
                "GLOO_SOCKET_IFNAME": hosts.links[node],
                "DEEPSPEED_TIMEOUT": str(TIMEOUT_MINUTES),
            }
            command = ["ip", "netns", "exec", name, "bash", "scripts/train_multinode.sh", str(work / "base")]
            runs.append(TrainingProcess(flags, 1, work / f"log-{node}.txt", command=command, env=env, port=29571))
        yield runs
    finally:
        for run in runs:
            run.kill()


def wait_both(runs: list[TrainingProcess], timeout: float) -> list[Ended]:
    """等两边都结束；seconds 从同一刻算起。"""
    started, ended = time.monotonic(), []
    for run in runs:
        ended.append(run.wait(max(1.0, timeout - (time.monotonic() - started))))
    return ended


def tell(ended: list[Ended]) -> str:
    return "\n".join(f"—— 主机 {node}，退出码 {end.returncode}\n{end.output[-3000:]}" for node, end in enumerate(ended))


def run_all(work: Path, cut_step: int = 33) -> dict:
    """三次训练与核对 → {"problems": [...], "rows": [[阶段, 结果, 秒], ...]}。"""
    build_tiny_model("baichuan2-7b", work / "base", **SIZES)
    lines = (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[: 2 * STEPS_PER_EPOCH]
    (work / "rows.json").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    problems, rows = [], []
    with TwoHosts() as hosts:
        started = time.monotonic()
        with training(hosts, work, work / "whole") as runs:
            ended = wait_both(runs, START_TIMEOUT)
        if any(end.returncode != 0 for end in ended):
            return {"problems": [f"没有打断的一次没有走完\n{tell(ended)}"], "rows": rows}
        rows.append(["跨两台训练", f"{STEPS_PER_EPOCH * EPOCHS} 步，退出码 0、0", round(time.monotonic() - started, 1)])

        with training(hosts, work, work / "cut") as runs:
            if not runs[0].wait_for(f"步 {cut_step}/", START_TIMEOUT):
                problems.append(f"没有走到第 {cut_step} 步\n{runs[0].text()[-3000:]}")
            hosts.cut()
            cut_at = time.monotonic()
            ended = wait_both(runs, END_TIMEOUT)
        seconds = round(time.monotonic() - cut_at, 1)
        for node, end in enumerate(ended):
            if end.returncode in (None, 0):
                problems.append(f"断网之后主机 {node} 没有在 {END_TIMEOUT:.0f} 秒内带着错误结束\n{end.output[-3000:]}")
            elif "与其他进程的通信断了" not in end.output:
                problems.append(f"断网之后主机 {node} 没有说明\n{end.output[-3000:]}")
        codes = "、".join(str(end.returncode) for end in ended)
        newest = next(iter_checkpoints(work / "cut"), (0, 0, None))[0]
        rows.append([f"第 {cut_step} 步断网", f"退出码 {codes}，两边都有说明，最新的检查点是第 {newest} 步", seconds])
        problems += [f"{path} 不完整" for _, _, path in iter_checkpoints(work / "cut") if verify_checkpoint(path)]

        hosts.join()
        started = time.monotonic()
        with training(hosts, work, work / "cut", "--resume", "auto") as runs:
            ended = wait_both(runs, START_TIMEOUT)
        if any(end.returncode != 0 for end in ended):
            return {"problems": [*problems, f"续训没有走完\n{tell(ended)}"], "rows": rows}
        if f"resume: step {newest} from" not in ended[0].output:
            problems.append(f"没有从第 {newest} 步续训\n{ended[0].output[-3000:]}")
        final = f"epoch-{EPOCHS}-step-{STEPS_PER_EPOCH * EPOCHS}"
        differences = compare(work / "cut" / final, work / "whole" / final)
        problems += differences
        what = f"{len(differences)} 处不同" if differences else "逐位相同"
        rows.append(
            [f"从第 {newest} 步续训", f"退出码 0、0，与没有打断的一次{what}", round(time.monotonic() - started, 1)]
        )
    return {"problems": problems, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="two_hosts.json 与 two_hosts.md 的目录（必填）")
    args = parser.parse_args()
    if reason := why_not():
        print(f"错误：{reason}")
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="two-hosts-") as directory:
        report = run_all(Path(directory))
    write_json(args.output / "two_hosts.json", report)
    text = [
        "# 两台主机",
        "`python benchmarks/reliability/two_hosts.py`：两个网络命名空间，各一个 CPU 进程，gloo，"
        f"DEEPSPEED_TIMEOUT={TIMEOUT_MINUTES} 分钟。{len(report['problems'])} 处问题。",
        markdown_table(["阶段", "结果", "秒"], report["rows"]),
    ]
    (args.output / "two_hosts.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    for problem in report["problems"]:
        print(problem)
    print(text[-1])
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
