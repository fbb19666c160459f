"""速度的比较：本项目与 transformers、TRL、LLaMA-Factory，同样的权重、同样的样本，各载入一次，逐步交替，取中位数。

python benchmarks/speed/bench.py --stage lora freeze full levers --trl_python /opt/venv-trl/bin/python \
    --llamafactory_python /opt/venv-lf/bin/python          # CPU；结果写到 benchmarks/speed/results/
python benchmarks/speed/bench.py --stage correctness speed7b        # GPU，见 gpu.py

每个程序一个常驻进程（protocol.py）。每轮各程序依次走一回：先走一步不计（内存与缓存重新变热），再走一步计时，
然后把已释放的内存还给系统，让给下一个。次序 A-B-A-B…；每步之前打印 1 分钟负载，并记下这一步里别的进程占用的 CPU
份额：超过 --max_foreign 的一轮作废重来。FLOPs 的公式见 flops.py，程序与要求的表见 programs.py。
"""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed import work as bench_work
from benchmarks.speed.programs import GROUPS, TRAINED_LAYERS, Program, old_program, ours_spec, peer_spec
from benchmarks.speed.protocol import Worker, WorkerFailed, available_memory_gb, busy_cpu_seconds
from benchmarks.speed.report import check_losses, judge, summarize, table, write_report
from finetune.planning.flops import step_flops

CPU_STAGES = tuple(GROUPS)
GPU_STAGES = ("correctness", "speed7b", "speed13b", "peers")
# 载入一个程序之前至少要有这么多空闲内存
NEEDED_MEMORY_GB = 3.0
# lora 的 13 个程序在词表 64,000 时同时载入，补齐的一步另要 7 GB：内存不到这么多时分批
ALL_AT_ONCE_GB = 40
# 一回两步：第一步不计，第二步计时
STEPS_PER_TURN = 2
# 另一份代码的工人在哪里；后一处是早先的
OLD_WORKERS = ("benchmarks/speed/ours.py", "scripts/bench_ours.py")
ROWS_SHAPE = bench_work.Shape(4, 256, 688, 4, 8000)


def machine() -> dict[str, Any]:
    """这台机器：CPU、核数、内存、直接计算 bf16 的指令、GPU。"""
    import torch

    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = set(next((line for line in info.splitlines() if line.startswith("flags")), "").split())
    model = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": memory,
        "bf16_flags": sorted(flags & {"avx512_bf16", "amx_bf16"}),
        "system": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def old_worker(tree: Path) -> Path | None:
    """另一份代码里的工人；没有时为 None。"""
    return next((tree / place for place in OLD_WORKERS if (tree / place).is_file()), None)


def idle_share(seconds: float = 3.0) -> float:
    """本程序什么也不做时，整机忙的份额。"""
    busy, began = busy_cpu_seconds(), time.perf_counter()
    time.sleep(seconds)
    return (busy_cpu_seconds() - busy) / ((time.perf_counter() - began) * len(os.sched_getaffinity(0)))


class Bench:
    """一次运行：材料放在 scratch，结果逐组追加。"""

    def __init__(self, args: argparse.Namespace, scratch: Path):
        from finetune.process.precision import choose_precision

        self.args, self.scratch = args, scratch
        self.precision, reason = choose_precision(args.precision)
        print(f"精度 {self.precision}（{reason}），{args.threads} 线程")
        self.max_rounds = args.rounds * (2 if args.retry else 1)
        self.pythons = {"hf": sys.executable, "trl": args.trl_python, "lf": args.llamafactory_python}

    def shape(self, stage: str, vocab: int) -> bench_work.Shape:
        if self.args.toy:
            return bench_work.TOY_SHAPE._replace(vocab=vocab)
        return ROWS_SHAPE if stage == "rows" else bench_work.CPU_SHAPES[vocab]

    def materials(self, stage: str, vocab: int) -> tuple[Path, Path, dict[str, Path], dict[str, dict]]:
        """权重与样本 → (baichuan, llama, {名字: work 文件}, {名字: 它的统计})。"""
        shape = self.shape(stage, vocab)
        num_steps = STEPS_PER_TURN * self.max_rounds
        baichuan, llama = bench_work.make_models(self.scratch, shape, self.precision)
        rows = bench_work.encode_rows(baichuan, vocab)
        chosen = bench_work.choose_steps([len(row["input_ids"]) for row in rows], num_steps)
        steps = {"real": [[rows[index] for index in step] for step in chosen]}
        if stage == "lora":
            grouped = bench_work.group_steps([len(row["input_ids"]) for row in rows], STEPS_PER_TURN * self.args.rounds)
            steps["group"] = [[rows[index] for index in step] for step in grouped]
        if stage == "spread":
            steps |= {kind: bench_work.spread_steps(kind, num_steps, vocab) for kind in ("equal", "uneven")}
        files = {name: self.scratch / f"work-{vocab}-{name}.json" for name in steps}
        works = {name: bench_work.write_work(files[name], content, vocab) for name, content in steps.items()}
        return baichuan, llama, files, works

    def command(
        self, program: Program, layers: int, baichuan: Path, llama: Path, files: dict[str, Path]
    ) -> list[str] | str:
        """启动一个程序的命令；不能启动时是原因。"""
        threads, here = self.args.threads, Path(__file__).resolve().parent
        if program.kind == "ours":
            if program.options.get("precision") == self.precision:
                return "与第一行相同：这台机器上大家都用这个精度"
            if "rows" in program.options:
                files = {**files, "data": bench_work.write_data(self.scratch, program.options["rows"])}
            spec = ours_spec(program, layers, baichuan, files, self.precision, threads, self.scratch)
            worker = here / "ours.py" if program.name != "old" else old_worker(self.args.old)
            return [sys.executable, str(worker), json.dumps(spec)]
        python = self.pythons[program.kind]
        if not python:
            return "没有给出它的 python，见 --trl_python、--llamafactory_python"
        if not Path(python).is_file():
            return f"{python} 不存在"
        spec = peer_spec(program, llama, files, self.precision, threads)
        return [python, str(here / "peers.py"), json.dumps(spec)]

    def programs(self, stage: str) -> list[Program]:
        """这一组里要量的程序；有 --old 时另有那份代码的。"""
        wanted = self.args.programs
        old = [old_program(stage, self.args.old)] if self.args.old else []
        return [program for program in GROUPS[stage] if not wanted or program.name in wanted] + old

    def batches(self, stage: str, vocab: int) -> list[list[str]]:
        """这一组要量的程序；内存装不下全部时分成几批，每批都有第一个程序，各自交替、各自成表。"""
        names = [program.name for program in self.programs(stage)]
        if stage != "lora" or vocab < 64000 or machine()["memory_gb"] > ALL_AT_ONCE_GB:
            return [names]
        first, others = names[:1], names[1:]
        parts = [[n for n in others if n.startswith("hf_")], [n for n in others if not n.startswith("hf_")]]
        return [first + part for part in parts if part] or [first]

    def run_group(self, stage: str, vocab: int, names: list[str]) -> dict[str, Any]:
        """载入这些程序，交替地量，算出结论。"""
        args = self.args
        quiet_share, load = idle_share(), os.getloadavg()[0]
        print(f"\n== {stage}，词表 {vocab}：1 分钟负载 {load:.2f}，空闲时整机忙 {quiet_share:.1%}")
        baichuan, llama, files, works = self.materials(stage, vocab)
        shape, work = self.shape(stage, vocab), works["real"]
        # 对方的环境里没有装本项目：各程序都从 PYTHONPATH 导入 benchmarks
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        env["PYTHONPATH"] = str(bench_work.ROOT)
        records, workers = [], {}
        try:
            probe = {"kind": "gemm", "shape": shape, "rows": int(median(work["tokens"])), "threads": args.threads}
            probe_command = [sys.executable, str(Path(__file__).resolve().parent / "ours.py")]
            probe_spec = json.dumps({**probe, "precision": self.precision})
            workers["gemm"] = Worker("gemm", [*probe_command, probe_spec], env, self.scratch / "log-gemm.txt")
            workers["gemm"].wait_ready()
            for program in self.programs(stage):
                if program.name in names:
                    records.append(self.load(program, workers, (shape.layers, baichuan, llama, files), env))
            rates, clean, rounds = self.measure(records, workers)
        finally:
            for worker in workers.values():
                worker.close()
        enough = len(clean) >= args.rounds
        for record in records:
            record["summary"] = summarize(record, clean if enough else set(rounds))
        group = {
            "stage": stage,
            "vocab_size": vocab,
            "shape": shape._asdict(),
            "precision": self.precision,
            "threads": args.threads,
            "samples_per_step": bench_work.SAMPLES_PER_STEP,
            "work": {**{key: work[key] for key in ("target_share", "padding_efficiency", "shared_share")},
                     "tokens": int(median(work["tokens"]))},
            "load_before": load,
            "idle_share_before": quiet_share,
            "is_quiet": enough,
            "same_rows": stage not in ("spread", "rows"),
            "gemm_flops": median(rates),
            "gemm_rates": rates,
            "programs": records,
        }  # fmt: skip
        self.add_shares(group, shape, works)
        group["loss_checks"] = check_losses(group) if group["same_rows"] else []
        group["verdicts"] = judge(group)
        print("\n".join(table(group)))
        return group

    def load(self, program: Program, workers: dict[str, Worker], materials: tuple, env: dict) -> dict[str, Any]:
        """载入一个程序，返回它的记录；载入不了的记下原因。"""
        record = {
            "name": program.name,
            "text": program.text,
            "kind": program.kind,
            "method": program.method,
            "options": program.options,
            "precision": program.options.get("precision", self.precision),
            "same_function": program.same_function,
            "is_uneven": program.is_uneven,
            "versions": {},
            "steps": [],
            "reason": "",
        }
        command = self.command(program, *materials)
        if isinstance(command, str):
            record["reason"] = command
        elif available_memory_gb() < NEEDED_MEMORY_GB:
            record["reason"] = f"空闲内存只有 {available_memory_gb():.1f} GB，没有载入"
        else:
            if program.name == "old":
                env = {**env, "PYTHONPATH": str(self.args.old)}
            worker = Worker(program.name, command, env, self.scratch / f"log-{program.name}.txt")
            workers[program.name] = worker
            try:
                ready = worker.wait_ready()
                record |= {"versions": ready["versions"], "num_trainable": ready["num_trainable"]}
            except WorkerFailed as error:
                record["reason"] = str(error)
                workers.pop(program.name).close()
        print(f"  载入 {program.name}：{record['reason'] or '好了'}", flush=True)
        return record

    def measure(self, records: list[dict], workers: dict[str, Worker]) -> tuple[list[float], set[int], list[int]]:
        """一轮轮交替地量，直到有 --rounds 轮干净的（至多加倍）→ (矩阵速率, 干净的轮, 量过的轮)。"""
        rates: list[float] = []
        clean: set[int] = set()
        for number in range(self.max_rounds):
            rates.append(workers["gemm"].step(number)["gemm_flops"])
            disturbed = [
                record["name"]
                for record in records
                if self.turn(record, workers, number) > self.args.max_foreign
            ]  # fmt: skip
            if disturbed:
                print(f"  第 {number} 轮受了干扰（{'、'.join(disturbed)}）", flush=True)
            else:
                clean.add(number)
            if len(clean) == self.args.rounds:
                break
        return rates, clean, list(range(number + 1))

    def turn(self, record: dict[str, Any], workers: dict[str, Worker], number: int) -> float:
        """一个程序的一回；返回计时的那一步里别的进程占用的 CPU 份额（没有量时为 0）。"""
        name = record["name"]
        if name not in workers or (record["is_uneven"] and number >= self.args.rounds):
            return 0.0
        try:
            if available_memory_gb() < NEEDED_MEMORY_GB:
                raise WorkerFailed(f"{name}：空闲内存只有 {available_memory_gb():.1f} GB，没有走这一步")
            for position in range(STEPS_PER_TURN):
                index = STEPS_PER_TURN * number + position
                is_timed = position == STEPS_PER_TURN - 1
                step = {"round": number, "index": index, "is_timed": is_timed, **workers[name].step(index)}
                record["steps"].append(step)
            workers[name].trim()
        except WorkerFailed as error:
            record["reason"], record["steps"] = str(error), []
            print(f"  {error}", flush=True)
            workers.pop(name).close()
            return 0.0
        print(
            f"  轮 {number:2d} {name:24s} 负载 {step['load_before']:.2f} 别的进程 {step['foreign_cpu_share']:.0%}"
            f"  {step['seconds']:.3f} 秒 {step['tokens'] / step['seconds']:.0f} token/s 损失 {step['loss']:.4f}",
            flush=True,
        )
        return step["foreign_cpu_share"]

    def add_shares(self, group: dict[str, Any], shape: bench_work.Shape, works: dict[str, dict]):
        """各程序占实测矩阵速率的份额（按各步样本的必要 FLOPs，取平均的一步）。"""
        for record in group["programs"]:
            if not record["summary"]:
                continue
            work = works[record["options"].get("work", "real")]
            options = record["options"]
            off = "shared_prefix" in options.get("levers_off", []) or "--no-packing" in options.get("argv", [])
            shares = record["kind"] == "ours" and not off
            flops = [
                step_flops(shape, lengths, targets, record["method"], TRAINED_LAYERS,
                                      record["name"] == "ours_freeze_cache", repeated if shares else ())
                for lengths, targets, repeated in zip(work["lengths"], work["targets"], work["repeated"], strict=True)
            ]  # fmt: skip
            per_token = sum(flops) / sum(work["tokens"])
            record["flops_per_token"] = per_token
            rate = record["summary"]["tokens_per_second"] * per_token
            record["summary"]["gemm_share"] = rate / group["gemm_flops"]
        if group["stage"] == "freeze":
            lengths, targets, repeated = (works["real"][name][0] for name in ("lengths", "targets", "repeated"))
            plain, cached = (
                step_flops(shape, lengths, targets, "freeze", TRAINED_LAYERS, is_cached, repeated)
                for is_cached in (False, True)
            )
            group["cache_flops_ratio"] = plain / cached


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--stage", nargs="+", required=True, choices=[*CPU_STAGES, *GPU_STAGES], help="量哪几组，依次进行")
    add("--vocab_size", nargs="+", type=int, choices=list(bench_work.CPU_SHAPES),
        help="CPU 各组的词表；缺省 lora 两种都量，其余 8000（词表投影的份额与 Baichuan2-7B 相同）")  # fmt: skip
    add("--rounds", type=int, default=5, help="交替的轮数（缺省 %(default)s）")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="每个程序的线程数（缺省 %(default)s）")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="各程序的计算精度；auto 看 CPU")
    add("--programs", nargs="+", help="只量这些名字（缺省全部）")
    add("--old", type=lambda path: Path(path).resolve(), help="本项目另一份代码的目录：各组多一个程序 old")
    add("--trl_python", help="装有 TRL 的环境的 python；不给则跳过并写明")
    add("--llamafactory_python", help="装有 LLaMA-Factory 的环境的 python；不给则跳过并写明")
    add("--max_foreign", type=float, default=0.1, help="别的进程占 CPU 超过这个份额的一轮作废（缺省 %(default)s）")
    add("--retry", action=argparse.BooleanOptionalAction, default=True, help="作废的轮重来，至多再量一倍的轮数")
    results = bench_work.ROOT / "benchmarks" / "speed" / "results"
    add("--output_dir", default=str(results), help="结果写在哪里（缺省 benchmarks/speed/results）")
    add("--tag", help="结果的文件名（缺省 cpu 或 gpu 加各组的名字）")
    add("--work_dir", help="权重与样本放在哪里，可以留着再用（缺省临时目录）")
    add("--toy", action="store_true", help="极小的模型，只看能不能走通")
    add("--max_minutes", type=float, default=8.0, help="GPU 各组的时限，分钟（缺省 %(default)s）")
    add("--cases", nargs="+", help="GPU 各组只跑这些情形（缺省全部）")
    args = parser.parse_args(argv)
    known = {program.name for stage in args.stage for program in GROUPS.get(stage, ())}
    if unknown := sorted(set(args.programs or ()) - known):
        parser.error(f"--programs 里的 {'、'.join(unknown)} 不在这几组里，有的是 {'、'.join(sorted(known))}")
    return args


def main(argv: list[str] | None = None) -> int:
    """命令行入口；有损失不一致时返回 1。"""
    args = parse_args(argv)
    if args.old and old_worker(args.old) is None:
        places = " 与 ".join(OLD_WORKERS)
        print(f"错误：--old({args.old}) 里没有 {places}：请给本项目的一份代码", file=sys.stderr)
        return 2
    kind = "gpu" if args.stage[0] in GPU_STAGES else "cpu"
    tag = args.tag or "-".join([kind, *args.stage])
    result = {
        "command": shlex.join(["python", "benchmarks/speed/bench.py", *(sys.argv[1:] if argv is None else argv)]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "load_before": os.getloadavg()[0],
        "machine": machine(),
        "groups": [],
        "sections": [],
    }

    def save():
        for path in write_report(Path(args.output_dir), tag, result):
            print(f"写出 {path}")

    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        scratch = Path(args.work_dir or temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        bench = None
        for stage in args.stage:
            if stage in GROUPS:
                bench = bench or Bench(args, scratch)
                for vocab in args.vocab_size or ([64000, 8000] if stage == "lora" else [8000]):
                    for names in bench.batches(stage, vocab):
                        result["groups"].append(bench.run_group(stage, vocab, names))
                        save()
            else:
                from benchmarks.speed.gpu import run_stage

                run_stage(stage, args, scratch, result, save)
    checks = [check for group in result["groups"] for check in group["loss_checks"]]
    return 0 if all(check["passed"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
