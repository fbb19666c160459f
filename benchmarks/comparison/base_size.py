"""分数与基座的大小：同样的配方、同样的文字，只换宽度，各造一个基座，再各自试学习率、全参数微调一个任务。

    python benchmarks/comparison/base_size.py output-comparison --hidden_sizes 48 96 --work output-base-size --jobs 2

output-comparison 是做完的比较，计划与原来的宽度的一行取自它。写 results/base_size.json，报告里
就有它的表；可以打断再接着做。
"""

import argparse
import copy
import signal
import sys
from pathlib import Path
from typing import Any

from finetune.options import ScriptParser
from finetune.process.libraries import quiet_libraries
from finetune.process.threads import begin_loading

if __name__ == "__main__":
    begin_loading()
if __name__ in ("__main__", "__mp_main__"):  # 后一个是并行的格子的进程
    quiet_libraries("info")

from benchmarks.comparison.base import build_base
from finetune.comparison.plan import read_plan
from finetune.comparison.run import compare, held, load_results, prepare
from finetune.comparison.statistics import summarize
from utils import read_json, write_json

RESULTS = Path(__file__).resolve().parent / "results" / "base_size.json"
METHOD, NUM_SEEDS = "full", 3


def narrowed(plan: dict[str, Any], task: str, hidden_size: int) -> dict[str, Any]:
    """换了宽度、只在一个任务上做一种方法的计划；预训练要的文字仍是全部任务的。"""
    own = copy.deepcopy(plan)
    own["base"]["model"]["hidden_size"] = hidden_size
    own["methods"] = {METHOD: {**own["methods"][METHOD], "tasks": [task]}}
    return own | {"seeds": own["seeds"][:NUM_SEEDS], "curve": None, "checks": [], "replay": None}


def row_of(plan: dict[str, Any], directory: Path) -> dict[str, Any]:
    """一个目录里做完的格子 → 表的一行；plan 是 narrowed 的。"""
    [task] = plan["methods"][METHOD]["tasks"]
    results = load_results(directory)
    base = next(row for row in results if row["stage"] == "base")
    finals = [row for row in results if row["stage"] != "final" or row["seed"] in plan["seeds"]]
    cell = summarize(plan, finals, base)["cells"][task, METHOD]
    built = read_json(directory / "data.json")["base"]
    return {
        "task": task,
        "metric": next(row["metric"] for row in finals if row["stage"] == "final" and row["task"] == task),
        "hidden_size": plan["base"]["model"]["hidden_size"],
        "parameters": round(cell["trainable_parameters"]),
        "base_sha256": built["sha256"],
        "stages": [{name: stage[name] for name in ("name", "tokens", "loss")} for stage in built["stages"]],
        **{name: cell[name] for name in ("score", "ci_low", "ci_high", "test_nll", "learning_rate", "seeds")},
        "base_test_nll": base["forgetting"]["other_tasks"][task]["test_nll"],
        "base_general_nll": cell["general_nll_before"],
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="做完的比较的目录")
    parser.add_argument("--hidden_sizes", type=int, nargs="+", required=True, help="另外的几个宽度，要能被头数整除")
    parser.add_argument("--work", type=Path, required=True, help="各个宽度的目录放在哪里")
    parser.add_argument("--task", default="extraction", help="比哪个任务（缺省 %(default)s）")
    parser.add_argument("--out", type=Path, default=RESULTS, help="结果写在哪里（缺省 results/base_size.json）")
    parser.add_argument("--jobs", type=int, default=1, help="并行几个格子（缺省 %(default)s）")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs({args.jobs}) 必须至少为 1")
    return args


def check(plan: dict[str, Any], results: list[dict[str, Any]], args: argparse.Namespace):
    """做得成才开始：基座是配方，任务上有做完的格子，宽度合适；抛 ValueError。"""
    if isinstance(plan["base"], str):
        raise ValueError(f"计划的 base 是检查点目录 {plan['base']}，换不了宽度：要的是配方")
    done = {row["task"] for row in results if row["stage"] == "final" and row["method"] == METHOD}
    if args.task not in done or not any(row["stage"] == "base" for row in results):
        known = f"做完的有 {'、'.join(sorted(done))}" if done else "请先做完比较"
        raise ValueError(f"{args.comparison} 里没有 {args.task} 上做完的 {METHOD} 与基座；{known}")
    heads = plan["base"]["model"]["heads"]
    width = plan["base"]["model"]["hidden_size"]
    if width in args.hidden_sizes:
        raise ValueError(f"--hidden_sizes 里的 {width} 就是这个比较的宽度，它的一行已经在内，请去掉它")
    if wrong := [size for size in args.hidden_sizes if size < 1 or size % (2 * heads)]:
        raise ValueError(
            f"--hidden_sizes {wrong} 应是 {2 * heads} 的倍数：{heads} 个头，每个头的宽度是偶数（旋转位置）"
        )


def kept_rows(path: Path, task: str, again: set[int]) -> list[dict[str, Any]]:
    """上一次写出的、同一个任务的别的宽度。"""
    rows = read_json(path) if path.is_file() else []
    return [row for row in rows if row["task"] == task and row["hidden_size"] not in again]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # 带走拉起的训练
    import predict

    try:
        whole = read_plan(args.comparison / "plan.json")
        check(whole, load_results(args.comparison), args)
        own = row_of(narrowed(whole, args.task, whole["base"]["model"]["hidden_size"]), args.comparison)
        rows = [own, *kept_rows(args.out, args.task, {own["hidden_size"], *args.hidden_sizes})]
        for hidden_size in args.hidden_sizes:
            plan, directory = narrowed(whole, args.task, hidden_size), args.work / str(hidden_size)
            directory.mkdir(parents=True, exist_ok=True)
            with held(directory):
                prepare(plan, directory, build_base)
                compare(plan, directory, args.jobs, predict.main)
            rows.append(row_of(plan, directory))
            write_json(args.out, sorted(rows, key=lambda row: row["hidden_size"]))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"错误：{error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("已停下；再次运行同样的命令，接着没有做完的", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
