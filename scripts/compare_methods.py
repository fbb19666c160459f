"""公平地比较 freeze、lora、ptuning、full：任务 × 方法 × 种子，学习率各自试跑，训练的 token 数相等；写出结果与报告。

    python scripts/compare_methods.py benchmarks/comparison/plan.json --output_dir output-comparison --jobs 2
    python scripts/compare_methods.py --report output-comparison       # 只由已有的结果重写 report.md 与 report.html

每个格子都经 deepspeed 启动器训练。做完的格子逐行写进 results.jsonl（基座、重放与核对的写进 extras.jsonl），
随时可以打断：再次运行同样的命令，只做没有做完的格子；做到一半的格子从头做。
"""

import argparse
import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(Path(__file__).resolve().parent)) if path not in sys.path]

from compare_cell import base_path, choose_rows, read_rows_any, run_cell, start_worker  # noqa: E402
from compare_copying import copying_rows, drilling_rows  # noqa: E402
from compare_data import prepare_task, split_text, synthetic_rows, without_near, write_rows  # noqa: E402
from compare_plan import (  # noqa: E402
    Cell,
    cell_of,
    cell_weight,
    list_cells,
    next_cell,
    read_plan,
    replay_cell,
    total_weight,
)
from compare_results import load_results, record, repair  # noqa: E402
from tqdm import tqdm  # noqa: E402

from utils import read_json, write_json  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# 准备


@contextmanager
def held(output_dir: Path) -> Iterator[None]:
    """占住 output_dir：两个比较写同一个目录会互相打乱；随进程结束自动放开。"""
    descriptor = os.open(output_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(f"--output_dir {output_dir} 正被另一个比较使用，请等它结束或换一个目录") from error
    try:
        yield
    finally:
        os.close(descriptor)


def stop_orphans(work: Path):
    """杀掉上一次被杀的比较留下的训练：命令行里有这个 work 目录的 python 进程。"""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            is_ours = b"python" in os.path.basename(words[0]) and int(process.name) != os.getpid()
            if is_ours and any(word.startswith(os.fsencode(f"{work}/")) for word in words):
                os.kill(int(process.name), signal.SIGKILL)


def prepare(plan: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """拆数据、核对泄漏、预训练基座、取训练行；已经备好的不再做 → 数据的说明（data.json）。

    Raises:
        ValueError: 目录里是另一个计划的结果，或数据不够分，或有泄漏。
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    kept = output_dir / "plan.json"
    if kept.is_file() and read_json(kept) != plan:
        raise ValueError(f"{kept} 是另一个计划，它的结果不能接着用；请换一个 --output_dir，或先移走这个目录")
    write_json(kept, plan)
    work = output_dir / "work"
    stop_orphans(work)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    described = output_dir / "data.json"
    if described.is_file():
        return read_json(described)
    data = output_dir / "data"
    facts: dict[str, Any] = {"precision": chosen_precision(plan)}
    facts |= {task["name"]: prepare_task(task, plan["split_seed"], data / task["name"]) for task in plan["tasks"]}
    training, held_out = split_text(ROOT / plan["general_path"], plan["held_out_chars"])
    tests = [row["input"] for task in plan["tasks"] for row in read_rows_any(data / task["name"] / "test.json")]
    training = without_near([line for line in training if line], tests)
    for name, lines in (("general_train", training), ("general_test", held_out)):
        (data / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    build_base(plan, output_dir)
    for task, chosen in choose_rows(plan, output_dir).items():
        facts[task] |= chosen
    write_json(described, facts)
    return facts


def chosen_precision(plan: dict[str, Any]) -> str:
    """全部格子共用的计算精度，只定一次：train_flags 里写的，没有写时由设备决定。"""
    from utils import choose_precision

    words = [str(word) for word in plan["train_flags"]]
    requested = words[words.index("--precision") + 1] if "--precision" in words else "auto"
    return choose_precision(requested)[0]


def build_base(plan: dict[str, Any], output_dir: Path):
    """计划要求时预训练基座，并为 untrained 造一个同样大小的随机模型；已有的不再造。"""
    if isinstance(plan["base"], str):
        if not (base_path(plan, output_dir) / "config.json").is_file():
            raise ValueError(f"base({plan['base']}) 里没有 config.json，请给出检查点目录（相对仓库根目录）")
        return
    from build_tiny_model import build_tiny_model

    data, options = output_dir / "data", dict(plan["base"])
    repeats, synthetic = options.pop("repeats"), options.pop("synthetic", {})
    files = {task["name"]: data / task["name"] / "pretrain.json" for task in plan["tasks"]}
    files["general"] = data / "general_pretrain.txt"
    text = (data / "general_train.txt").read_text(encoding="utf-8")
    files["general"].write_text(text[: options.pop("general_chars", None)], encoding="utf-8")
    inputs = [row["input"] for task in plan["tasks"] for row in read_rows_any(files[task["name"]])]
    texts = [*files["general"].read_text(encoding="utf-8").splitlines(), *inputs]
    exercises = {"copying": copying_rows, "drilling": drilling_rows}
    for name, count in synthetic.items():
        files[f"synthetic_{name}"] = data / f"synthetic_{name}.json"
        if name in exercises:
            rows = exercises[name](texts, count, plan["split_seed"])
        else:
            rows = synthetic_rows(name, count, plan["split_seed"])
        write_rows(files[f"synthetic_{name}"], rows)
    sources = [files[name] for name, count in repeats.items() for _ in range(count)]
    pretraining = {name: options.pop(name) for name in ("pretrain_tokens", "pretrain_threads") if name in options}
    arch = options.pop("arch")
    if not (output_dir / "base").is_dir():
        build_tiny_model(
            arch, output_dir / "base", pretrain=sources, train_text=[*dict.fromkeys(sources)], **options, **pretraining
        )
    if not (output_dir / "untrained").is_dir():
        tokenizer = output_dir / "base" / "tokenizer.model"
        build_tiny_model(arch, output_dir / "untrained", tokenizer_model=tokenizer, **options)


# ---------------------------------------------------------------------------------------------------------------------
# 逐格去做


def compare(plan: dict[str, Any], output_dir: Path, jobs: int):
    """做完全部格子，jobs 个并行；一个格子失败就停下，已做完的都在。"""
    repair(output_dir)
    results = load_results(output_dir)
    finished = {cell_of(row) for row in results}
    bar = tqdm(
        total=round(total_weight(plan, results), 2),
        initial=round(sum(cell_weight(plan, cell) for cell in finished), 2),
        desc=f"比较（做完 {len(finished)} 格）",
        bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}] {postfix}",
        dynamic_ncols=True,
    )
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker, (output_dir / "work",))
    running: dict[Future, Cell] = {}
    try:
        with bar:
            while True:
                while len(running) < jobs and (found := next_cell(plan, results, set(running.values()))):
                    cell, rate = found
                    running[pool.submit(run_cell, plan, cell, rate, output_dir)] = cell
                if not running:
                    break
                bar.set_postfix_str("，".join(cell.name for cell in running.values()))
                done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                bar.refresh()
                for future in done:
                    cell = running.pop(future)
                    row, detail = future.result()
                    record(output_dir, row, {**detail, "jobs": jobs})
                    results.append(row)
                    bar.total = round(total_weight(plan, results), 2)
                    bar.update(cell_weight(plan, cell))
                    bar.set_description_str(f"比较（做完 {len(results)} 格）")
                    tqdm.write(describe(cell, row))
    except BrokenProcessPool as error:
        raise RuntimeError(f"工作进程意外退出（多半是内存不足），请减少 --jobs（现在 {jobs}）后再次运行") from error
    finally:
        workers = list((pool._processes or {}).values())
        if running:
            for worker in workers:
                worker.kill()
            stop_orphans(output_dir / "work")
        pool.shutdown(wait=True, cancel_futures=True)
    expected = {*list_cells(plan), *filter(None, [replay_cell(plan, results)])}
    assert {cell_of(row) for row in results} >= expected, "还有没做的格子，却没有可以开始的"


def describe(cell: Cell, row: dict[str, Any]) -> str:
    """一个做完的格子的一行说明。"""
    if row["score"] is None:
        scores = "，".join(
            f"{task} {entry['test_score']:.3f}" for task, entry in row["forgetting"]["other_tasks"].items()
        )
        return f"{cell.name}：{scores}"
    forgetting = row["forgetting"]
    return (
        f"{cell.name}：{row['metric']} {row['score']:.4f}［{row['ci_low']:.4f}，{row['ci_high']:.4f}］，"
        f"学习率 {row['learning_rate']:g}，{row['seconds']:.0f} 秒，{row['tokens_per_second']:.0f} token/s，"
        f"通用 NLL {forgetting['general_nll_before']:.3f} → {forgetting['general_nll_after']:.3f}"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", nargs="?", type=Path, help="计划，JSON；写法见 benchmarks/comparison/README.md")
    parser.add_argument("--output_dir", type=Path, help="结果、报告与工作文件的目录；已有同一计划的结果就接着做")
    parser.add_argument(
        "--jobs", type=int, default=1, help="并行几个格子，各一个线程；时间也就是并行时测的（缺省 %(default)s）"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="不运行，只由 DIR 里的结果重写报告")
    args = parser.parse_args(argv)
    if (args.report is None) == (args.plan is None):
        parser.error("请给出计划与 --output_dir，或者 --report DIR")
    if args.plan is not None and args.output_dir is None:
        parser.error("请给出 --output_dir")
    if args.jobs < 1:
        parser.error(f"--jobs({args.jobs}) 必须至少为 1")
    return args


def main(argv: list[str] | None = None) -> int:
    from compare_report import write_report

    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if args.report is None:
            plan, output_dir = read_plan(args.plan), args.output_dir.resolve()
            output_dir.mkdir(parents=True, exist_ok=True)
            with held(output_dir):
                prepare(plan, output_dir)
                compare(plan, output_dir, args.jobs)
                shutil.rmtree(output_dir / "work", ignore_errors=True)
        directory = args.report or args.output_dir
        write_report(directory)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"错误：{error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("已停下；再次运行同样的命令，接着没有做完的格子", file=sys.stderr)
        return 130
    print(f"报告：{directory / 'report.md'} 与 {directory / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
