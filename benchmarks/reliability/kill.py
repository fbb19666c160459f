"""中断战役：在随机的时刻用随机的信号杀真实的训练，每次之后续训；最后的权重必须与没有打断过的一次逐位相同。

    python benchmarks/reliability/kill.py --kills 60 --seed 1 --output benchmarks/reliability/results       # 约一小时
    python benchmarks/reliability/kill.py --kills 6 --seed 7 --output /tmp/kills/                    # 小的形式，几分钟
    python benchmarks/reliability/kill.py --kills 10 --task dpo --output benchmarks/stages/results   # 训练的另一个阶段

16 条线（四种方法 × ZeRO-2、ZeRO-3 offload × 1、2 个进程），每条线先完整训练一次，再同样地训练一次，途中挨若干次杀。
时刻：operator build（编译算子）、load、step、evaluation、save、rename；信号 SIGKILL 与 SIGTERM，发给一个 rank、
launch.py、deepspeed 或整个进程组。每次杀之后都写 kills.json 与 kills.md；被打断后再次运行同样的命令，从下一次杀接着做
（--work 目录还在时；不在了，没做完的那条线从头做）。退出码 0 表示没有一处不同、没有一次丢失。
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch
from safetensors.torch import load_file

from finetune.checkpoint.manifest import verify_checkpoint
from finetune.checkpoint.output_dir import iter_checkpoints
from finetune.process.stale_files import extensions_dir
from finetune.process.training_process import TrainingProcess
from finetune.terminal import markdown_table
from scripts.build_tiny_model import build_tiny_model
from utils import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]


# 方法 → (结构, 它的参数)
METHODS = {
    "freeze": ("baichuan2-13b", ["--freeze_module_name", "layers.1.,lm_head"]),
    "lora": ("baichuan2-7b", ["--lora_module_name", "all-linear"]),
    "ptuning": ("baichuan-13b", ["--prefix_projection", "--prefix_hidden_size", "32"]),
    "full": ("baichuan-7b", []),
}
STAGES = {"zero2": "ds_zero2_no_offload.json", "zero3": "ds_zero3_offload.json"}
SIZES = {"layers": 2, "hidden_size": 64, "heads": 4, "intermediate_size": 96}
# 40 行、全局 batch 4：每轮 10 步，共 4 轮；每 4 步与轮末保存，轮末评估
NUM_ROWS, GLOBAL_BATCH, EPOCHS, SAVE_STEP = 40, 4, 4, 4
STEPS_PER_EPOCH = NUM_ROWS // GLOBAL_BATCH
STEPS = STEPS_PER_EPOCH * EPOCHS
MOMENTS = {"load": 3, "step": 4, "evaluation": 3, "save": 4, "rename": 3, "operator build": 1}  # 名字 → 权重
TARGETS = ("rank", "launcher", "runner", "group")
# 一次启动、一次带编译的启动、被杀之后各进程消失的时限，秒
START_TIMEOUT, BUILD_TIMEOUT, END_TIMEOUT = 300.0, 900.0, 120.0
CLOCKS = ("tokens_per_second", "elapsed_seconds", "memory_mb")


# ---------------------------------------------------------------------------------------------------------------------
# 一条线


class Line:
    """一种组合：一次没有打断的训练、一次挨杀的训练，命令只有 --output_dir 与 --resume 不同。"""

    def __init__(self, name: str, work: Path, task: str = "sft"):
        self.name, self.task = name, task
        self.method, self.stage, ranks = name.split("-")
        self.num_ranks = int(ranks)
        self.work = work / name
        self.work.mkdir(parents=True, exist_ok=True)
        arch, self.method_flags = METHODS[self.method]
        self.base = work / arch
        if not self.base.exists():
            shutil.rmtree(work / f".{arch}", ignore_errors=True)
            build_tiny_model(arch, work / f".{arch}", **SIZES)
            (work / f".{arch}").rename(self.base)  # 造到一半被打断的不算
        self.rows = work / "rows.json"
        lines = (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
        self.rows.write_text("".join(f"{row_of(line, task)}\n" for line in lines), encoding="utf-8")

    def start(self, output: Path, *more, env: dict | None = None) -> TrainingProcess:
        flags = [
            *("--train_path", self.rows, "--eval_path", self.rows, "--model_name_or_path", self.base),
            *("--output_dir", output, "--train_type", self.method, "--ds_file", STAGES[self.stage]),
            *("--task", self.task),
            *("--precision", "fp32", "--max_len", 96, "--max_src_len", 64, "--learning_rate", "5e-3"),
            *("--num_train_epochs", EPOCHS, "--save_model_step", SAVE_STEP, "--show_loss_step", 1),
            *("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", GLOBAL_BATCH // self.num_ranks),
            *self.method_flags,
            *more,
        ]
        return TrainingProcess(flags, self.num_ranks, self.work / "log.txt", env=env)

    def finish(self, output: Path, *more) -> str:
        """训练到底，返回输出。"""
        with self.start(output, *more) as run:
            ended = run.wait(START_TIMEOUT)
        if ended.returncode != 0:
            raise RuntimeError(f"{self.name}：训练没有走完（退出码 {ended.returncode}）\n{ended.output[-3000:]}")
        return ended.output


def row_of(line: str, task: str) -> str:
    """数据的一行写成这一阶段读的样子；不好的回答是文档的开头。"""
    if task == "sft":
        return line
    row = json.loads(line)
    answer, worse = row.pop("output"), row["input"][:12]
    return json.dumps({**row, "chosen": answer, "rejected": worse}, ensure_ascii=False)


def line_names(kills: int, rng: random.Random) -> dict[str, int]:
    """把若干次杀分给各条线：{线: 次数}；次数少时每条线两次，只用其中几条。"""
    names = [f"{method}-{stage}-{ranks}" for method in METHODS for stage in STAGES for ranks in (1, 2)]
    rng.shuffle(names)
    names = names[: max(1, min(len(names), kills // 2))]
    return {name: kills // len(names) + (index < kills % len(names)) for index, name in enumerate(names)}


# ---------------------------------------------------------------------------------------------------------------------
# 杀一次


def plan_kills(name: str, count: int, seed: int) -> list[dict]:
    """一条线的几次杀：时刻、信号、对象与其中的随机量，只由种子与线决定；随进度往后走。"""
    rng = random.Random(f"{seed} {name}")
    plans = []
    for index in range(count):
        moment = rng.choices(list(MOMENTS), list(MOMENTS.values()))[0]
        plans.append(
            {
                "moment": moment,
                "signal": rng.choice(["SIGKILL", "SIGKILL", "SIGTERM"]),
                "target": rng.choices(TARGETS, [4, 1, 1, 3])[0],
                "rank": rng.randrange(2) % int(name[-1]),
                "step": rng.randrange(index * STEPS // count, (index + 1) * STEPS // count),
                "delay": rng.random(),
            }
        )
    return plans


def wait_for_moment(run: TrainingProcess, plan: dict, output: Path, extensions: Path) -> str | None:
    """等到该杀的时刻，返回那一刻看到的情形；训练先走完了则为 None。delay 是 [0, 1) 的随机量。"""
    moment, delay = plan["moment"], plan["delay"]
    if moment == "operator build":
        if not run.wait_until(lambda: any(extensions.glob("*/lock")), START_TIMEOUT, 0.001):
            return None
        time.sleep(10 * delay)
        return "锁还在" if any(extensions.glob("*/lock")) else "锁已释放"
    if moment == "load":
        if not run.wait_for("数据报告", START_TIMEOUT):
            return None
        time.sleep(4 * delay)
        return "第一步之前" if "训练:" not in run.text() else "第一步之后"
    if not run.wait_for("resume: step", START_TIMEOUT):
        return None
    first = (int(run.text().split("resume: step ")[1].split(",")[0].split(" ")[0])) + 1
    step = max(plan["step"], first)
    if moment == "step":
        return seen(run, plan, f"步 {step}/", 0.1 * delay, f"第 {step} 步")
    if moment == "evaluation":
        step = -(-step // STEPS_PER_EPOCH) * STEPS_PER_EPOCH
        return seen(run, plan, f"步 {step}/", 0.5 * delay, f"第 {step} 步之后的评估")

    def partial() -> list[Path]:
        found = [path for path in output.glob(".tmp-epoch-*") if int(path.name.rsplit("-", 1)[1]) >= step]
        return [path for path in found if moment == "save" or (path / "manifest.json").exists()]

    if step > first and not run.wait_for(f"步 {step - 1}/", START_TIMEOUT):  # 到了跟前才盯得紧
        return None
    if not run.wait_until(lambda: bool(partial()), START_TIMEOUT, 0.0002):
        return None
    if moment == "save":
        time.sleep(0.15 * delay)
    return "写到一半" if any(output.glob(".tmp-epoch-*")) else "刚刚写完"


def seen(run: TrainingProcess, plan: dict, text: str, delay: float, what: str) -> str | None:
    if not run.wait_for(text, START_TIMEOUT):
        return None
    time.sleep(delay)
    return what


def private_extensions(work: Path) -> tuple[Path, dict]:
    """一份私有的算子缓存，缺动态库与一个目标文件：加载时要编译几十秒，不是几分钟 → (目录, 环境变量)。"""
    target = work / "extensions"
    if not target.exists():
        shutil.copytree(extensions_dir(), target)
    for path in [*target.glob("*/*.so"), *target.glob("*/shm.o")]:
        path.unlink()
    return target, {"TORCH_EXTENSIONS_DIR": str(target)}


def kill_once(line: Line, plan: dict, output: Path) -> dict:
    """续训、在 plan 的时刻杀掉、等全部进程消失，返回一行记录。"""
    extensions, env = extensions_dir(), {}
    if plan["moment"] == "operator build":
        extensions, env = private_extensions(line.work)
    with line.start(output, "--resume", "auto", env=env) as run:
        where = wait_for_moment(run, plan, output, extensions)
        before = run.text()
        targets = [] if where is None else run.send(plan["target"], getattr(signal, plan["signal"]), plan["rank"])
        ended = run.wait(END_TIMEOUT, leave_compilers=bool(env))
        # 编译器可能还活着，与随后的一次争同一份缓存，正是要试的
        again = after_build(line, output, env) if env else {}
    row = {"line": line.name, **plan, "seen": where, "hit": bool(targets)}
    resumed = [text for text in before.splitlines() if text.startswith("resume: step")]
    row |= {
        "resumed": resumed[-1].removeprefix("resume: ").split(" from")[0] if resumed else "",
        "returncode": ended.returncode,
        "seconds_to_end": round(ended.seconds, 1),
        "newest_step": next((step for step, _, _ in iter_checkpoints(output)), 0),
        "partial": sorted(path.name for path in output.glob(".tmp-epoch-*")),
    }
    broken = [path.name for _, _, path in iter_checkpoints(output) if verify_checkpoint(path)]
    row["problem"] = f"看得见的检查点不完整：{broken}" if broken else ""
    if ended.returncode is None:
        row["problem"] = f"{END_TIMEOUT:.0f} 秒后还有进程活着"
    return row | again


def after_build(line: Line, output: Path, env: dict) -> dict:
    """编译中途被杀之后，用同一份算子缓存再启动一次，应能走到第一步。"""
    started = time.monotonic()
    has_lock = any(Path(env["TORCH_EXTENSIONS_DIR"]).glob("*/lock"))
    with line.start(output, "--resume", "auto", env=env) as run:
        is_running = run.wait_for("步 \\d+/|训练早已完成", BUILD_TIMEOUT)
        run.send("rank", signal.SIGTERM)
        ended = run.wait(END_TIMEOUT)
    found = {"lock_left": has_lock, "seconds_to_run_again": round(time.monotonic() - started, 1)}
    if not is_running:
        found["problem"] = f"编译中途被杀之后走不到第一步\n{ended.output[-2000:]}"
    return found


# ---------------------------------------------------------------------------------------------------------------------
# 核对


def compare(found: Path, expected: Path) -> list[str]:
    """两个检查点的张量（权重、优化器、随机状态）与两份日志逐位比较，返回不同之处。"""
    problems = verify_checkpoint(found)
    for path in sorted(expected.rglob("*.safetensors")):
        name = path.relative_to(expected)
        if not (found / name).is_file():
            problems.append(f"{name} 不存在")
            continue
        ours, theirs = load_file(found / name), load_file(path)
        if ours.keys() != theirs.keys():
            problems.append(f"{name} 的张量名不同")
        problems += [f"{name}: {key}" for key in theirs.keys() & ours.keys() if not torch.equal(ours[key], theirs[key])]
    if records_of(found.parent) != records_of(expected.parent):
        problems.append("train_log.jsonl 不同")
    return problems


def records_of(output: Path) -> list[dict]:
    lines = (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(text).items() if key not in CLOCKS} for text in lines]


def run_line(name: str, count: int, args: Namespace, work: Path, report: dict):
    """一条线：完整训练、逐次杀、走到底、比较；每次杀之后写一次报告，已有的几次不再做。"""
    started, earlier = time.monotonic(), [row["seconds"] for row in report["kills"] if row["line"] == name]
    if not earlier:  # 也许有别的一次战役留下的
        shutil.rmtree(work / name, ignore_errors=True)
    line = Line(name, work, args.task)
    whole, killed, final = line.work / "whole", line.work / "killed", f"epoch-{EPOCHS}-step-{STEPS}"
    if not earlier:
        line.finish(whole)
        print(f"{name}：没有打断的一次 {time.monotonic() - started:.0f} 秒", flush=True)
    for plan in plan_kills(name, count, args.seed)[len(earlier) :]:
        kill_started = time.monotonic()
        row = kill_once(line, plan, killed) | {"seconds": round(time.monotonic() - kill_started, 1)}
        report["kills"].append(row)
        write_report(args, report)
        print(f"{name}：{describe(row)}；用了 {row['seconds']:.0f} 秒", flush=True)
    line.finish(killed, "--resume", "auto")
    differences = compare(killed / final, whole / final) if (killed / final).is_dir() else [f"没有 {final}"]
    leftovers = [path.name for path in killed.iterdir() if path.name.startswith(".tmp-")]
    differences += [f"留下了 {leftovers}"] if leftovers else []
    seconds = round(sum(earlier) + time.monotonic() - started, 1)
    report["lines"].append({"line": name, "kills": count, "differences": differences, "seconds": seconds})
    write_report(args, report)
    print(f"{name}：{'逐位相同' if not differences else differences[:5]}", flush=True)
    shutil.rmtree(line.work)


def describe(row: dict) -> str:
    target = f"rank {row['rank']}" if row["target"] == "rank" else row["target"]
    return (
        f"{row['moment']}（{row['seen'] or '没有等到，训练先走完了'}）{row['signal']} → {target}，"
        f"退出码 {row['returncode']}，{row['seconds_to_end']} 秒后消失，最新的检查点是第 {row['newest_step']} 步"
        + (f"；问题：{row['problem']}" if row["problem"] else "")
    )


# ---------------------------------------------------------------------------------------------------------------------
# 报告


def write_report(args: Namespace, report: dict):
    """kills.json（每一次）与 kills.md（汇总与逐行的表）。"""
    write_json(args.output / "kills.json", report)
    lines, kills = report["lines"], report["kills"]
    task = "" if args.task == "sft" else f" --task {args.task}"
    hit = [row for row in kills if row["hit"]]
    lost = [row for row in kills if row["problem"]]
    by_moment = [
        [
            moment,
            *(sum(row["moment"] == moment and row["signal"] == name for row in hit) for name in ("SIGKILL", "SIGTERM")),
            max((row["seconds_to_end"] for row in hit if row["moment"] == moment), default="-"),
        ]
        for moment in MOMENTS
    ]
    per_line = [
        [row["line"], row["kills"], len(row["differences"]), row["seconds"]]
        for row in sorted(lines, key=lambda row: row["line"])
    ]
    each = [
        [row["line"], row["moment"], row["seen"] or "训练先走完了", row["signal"],
         f"rank {row['rank']}" if row["target"] == "rank" else row["target"], row["resumed"], row["returncode"],
         row["seconds_to_end"], row["newest_step"], row["problem"] or "无"]
        for row in kills
    ]  # fmt: skip
    text = [
        "# 中断战役",
        f"`python benchmarks/reliability/kill.py --kills {args.kills} --seed {args.seed}{task}`，{report['machine']}",
        f"杀了 {len(hit)} 次（另有 {len(kills) - len(hit)} 次训练先走完了），丢失 {len(lost)} 次；"
        f"完成 {len(lines)}/{report['num_lines']} 条线，其中 {sum(bool(row['differences']) for row in lines)} 条与"
        "没有打断过的一次不同（权重、优化器状态、随机状态、日志逐位比较）。",
        markdown_table(["时刻", "SIGKILL", "SIGTERM", "进程消失最多用了（秒）"], by_moment),
        markdown_table(["方法-ZeRO-进程数", "杀的次数", "不同之处", "用时（秒）"], per_line),
        markdown_table(
            ["线", "时刻", "当时", "信号", "发给", "那次的起点", "退出码", "消失（秒）", "之后最新的一步", "问题"], each
        ),
    ]
    (args.output / "kills.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def load_report(args: Namespace, num_lines: int, work: Path) -> dict:
    """已有的报告：同样的种子与次数就接着做；没有做完的线，工作目录不在了就从头做；否则是新的。"""
    path = args.output / "kills.json"
    machine = f"{platform.machine()}，torch {torch.__version__}"
    fresh = {"seed": args.seed, "num_kills": args.kills, "num_lines": num_lines, "machine": machine}
    fresh |= {} if args.task == "sft" else {"task": args.task}
    if path.is_file():
        report = read_json(path)
        if all(report.get(key) == value for key, value in fresh.items()):
            done = {row["line"] for row in report["lines"]}
            kept = {row["line"] for row in report["kills"] if (work / row["line"] / "whole" / "loss.png").is_file()}
            report["kills"] = [row for row in report["kills"] if row["line"] in done | kept]
            return report
    return {**fresh, "kills": [], "lines": []}


def parse_args() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="一共杀多少次（缺省 %(default)s）")
    parser.add_argument("--seed", type=int, default=1, help="种子：决定哪些线、什么时刻、什么信号（缺省 %(default)s）")
    parser.add_argument("--task", choices=("sft", "dpo", "orpo", "simpo"), default="sft", help="训练的阶段（缺省 sft）")
    parser.add_argument("--output", type=Path, required=True, help="kills.json 与 kills.md 的目录（必填）")
    parser.add_argument("--work", type=Path, help="训练用的工作目录（缺省在临时目录里，由种子与次数定名；做完后删去）")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    names = line_names(args.kills, random.Random(args.seed))
    work = args.work or Path(tempfile.gettempdir(), f"kills-{os.getuid()}-{args.task}-{args.seed}-{args.kills}")
    report = load_report(args, len(names), work)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # 让正在进行的训练也结束
    for name, count in names.items():
        if name not in {row["line"] for row in report["lines"]}:
            run_line(name, count, args, work, report)
    if args.work is None:
        shutil.rmtree(work)
    failed = [row for row in report["kills"] if row["problem"]] + [row for row in report["lines"] if row["differences"]]
    print(f"{args.output / 'kills.md'}：{len(failed)} 处问题")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
