"""比较的计划：读取与检查 JSON、列出全部格子、由学习率的试跑选出最好的一个；纯函数，不启动任何东西。

计划的写法见 benchmarks/comparison/plan.json 与 benchmarks/comparison/README.md。
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from finetune.metrics.registry import LOWER_IS_BETTER
from utils import read_json

TASK_NAMES = {"extraction": "抽取", "generation": "生成", "classification": "分类"}
METRIC_NAMES = {"triple_f1": "三元组 F1", "rouge": "ROUGE-L", "label_f1": "宏 F1"}
METHODS = ("freeze", "lora", "ptuning", "full")  # --train_type 的取值；方法的名字不是其中之一时要写 train_type
METHOD_KEYS = ("learning_rates", "flags", "train_type", "tasks", "seeds")
CHECKS = ("repeat", "shuffled", "untrained")
REQUIRED = ("base", "tasks", "methods", "seeds", "train_tokens", "general_path", "held_out_chars")
OPTIONAL = {"split_seed": 1, "sweep_share": 0.25, "epochs": 1, "train_flags": [], "checks": [], "replay": None}
OPTIONAL |= {"extensions": 4}  # 最好的学习率在边上时，试跑的范围至多往外伸几次
OPTIONAL |= {"curve": None}  # 一种方法在一个任务上，训练 token 少些或多些时的分数：{"task", "method", "shares"}
TASK_REQUIRED = ("name", "path", "metric", "test", "dev", "max_new_tokens")
TASK_OPTIONAL = {"pretrain": 0, "other": 50, "max_input_chars": None, "max_output_chars": None}
TASK_OPTIONAL |= {"max_train_chars": None}  # 训练行的输入至多几个字：同样的 token 里行数更多
TASK_OPTIONAL |= {"select": "nll"}  # 按验证部分的什么选学习率：nll（目标 token 的），或 metric（任务自己的指标）
COUNTS = ("test", "dev", "max_new_tokens", "other", "epochs", "train_tokens")  # 应是正整数的
TASK_OWN = ("epochs", "train_tokens", "sweep_share")  # 任务没有写的，取总的

Result = dict[str, Any]


class Cell(NamedTuple):
    """一个格子：一次训练与评测，或只有评测（base、untrained）。"""

    stage: str  # base | sweep | final | curve | replay | check
    task: str
    method: str
    seed: int
    learning_rate: float | None = None  # None：用试跑选出的
    check: str | None = None
    share: float | None = None  # curve：训练 token 是正式的几分之几；大于 1 时是遍数的几倍

    @property
    def name(self) -> str:
        """它的目录名，也是给人看的名字。"""
        if self.stage == "base" or self.check == "untrained":
            return self.check or "base"
        parts = [self.check or self.stage, self.task, self.method, str(self.seed)]
        own = {"sweep": self.learning_rate, "curve": self.share}.get(self.stage)
        return "-".join(parts if own is None else [*parts, f"{own:g}"])

    @property
    def part(self) -> str:
        """它的训练文件（data/任务/ 里）的名字。"""
        is_shorter = self.stage == "curve" and self.share < 1
        return f"curve-{self.share:g}" if is_shorter else "sweep" if self.stage == "sweep" else "final"

    @property
    def needs_sweep(self) -> bool:
        return self.stage in ("final", "curve", "replay") or self.check in ("repeat", "shuffled")


def read_plan(path: str | Path) -> dict[str, Any]:
    """读计划并补上缺省值；问题一次列全，抛 ValueError。"""
    plan = read_json(path)
    if not isinstance(plan, dict):
        raise ValueError(f"{path} 应是一个 JSON 对象")
    try:
        return _checked(plan, path)
    except (TypeError, AttributeError, KeyError) as error:
        how = "写法见 benchmarks/comparison/README.md"
        raise ValueError(f"计划 {path} 里有值的类型不对（{type(error).__name__}：{error}），{how}") from error


def _checked(plan: dict[str, Any], path: str | Path) -> dict[str, Any]:
    problems = [f"缺少 {name}" for name in REQUIRED if name not in plan]
    problems += [f"不认识 {name}" for name in plan if name not in (*REQUIRED, *OPTIONAL)]
    plan = {**OPTIONAL, **plan}
    tasks, known = plan.get("tasks") or [], (*TASK_REQUIRED, *TASK_OPTIONAL, *TASK_OWN)
    for task in tasks:
        place = f"任务 {task.get('name')}"
        problems += [f"{place}缺少 {name}" for name in TASK_REQUIRED if name not in task]
        problems += [f"{place}不认识 {name}" for name in task if name not in known]
        if task.get("name") not in TASK_NAMES:
            problems.append(f"{place}：名字应为 {'、'.join(TASK_NAMES)} 之一")
        if task.get("metric") not in METRIC_NAMES:
            problems.append(f"{place}：metric {task.get('metric')} 应为 {'、'.join(METRIC_NAMES)} 之一")
        if task.get("select", "nll") not in ("nll", "metric"):
            problems.append(f"{place}：select {task['select']} 应为 nll 或 metric")
        for name in COUNTS:
            value = task.get(name, plan.get(name, 1))
            if not isinstance(value, int) or value < 1:
                problems.append(f"{place}：{name}({value!r}) 应是正整数")
    problems += [f"{name} 是空的，至少要有一个" for name in ("tasks", "methods") if name in plan and not plan[name]]
    names = [task.get("name") for task in tasks]
    problems += [f"任务 {name} 写了 {names.count(name)} 次" for name in dict.fromkeys(names) if names.count(name) > 1]
    ratio = 1 if plan["replay"] is None else plan["replay"].get("ratio")
    if not isinstance(ratio, (int, float)) or ratio <= 0:
        problems.append(f'replay 的 ratio({ratio}) 应是正数，例如 {{"ratio": 0.25}}')
    replay = plan["replay"] or {}
    problems += [f"replay 不认识 {name}" for name in replay if name not in ("ratio", "by")]
    if replay.get("by", "rows") not in ("rows", "tokens"):
        problems.append(f"replay 的 by({replay['by']}) 应为 rows 或 tokens")
    shared = {name: plan.get(name) for name in TASK_OWN}
    plan["tasks"] = [{**TASK_OPTIONAL, **shared, **task} for task in tasks]
    for method, entry in (plan.get("methods") or {}).items():
        if entry.get("train_type", method) not in METHODS:
            problems.append(f"方法 {method} 应为 {'、'.join(METHODS)} 之一，或用 train_type 写明是哪一种")
        problems += [f"方法 {method}不认识 {key}" for key in entry if key not in METHOD_KEYS]
        missing = [name for name in entry.get("tasks", ()) if name not in names]
        problems += [f"方法 {method} 的 tasks 里的 {name} 不在计划的任务里" for name in missing]
        if not set(entry.get("seeds", ())) <= set(plan.get("seeds") or ()):
            problems.append(f"方法 {method} 的 seeds({entry['seeds']}) 应在总的 seeds 之内：比较是按种子配对的")
        rates = entry.get("learning_rates") or []
        if not rates or len(set(rates)) < len(rates) or not all(isinstance(r, (int, float)) and r > 0 for r in rates):
            problems.append(f"方法 {method} 的 learning_rates({rates}) 应是一个或几个不同的正数")
    seeds = plan.get("seeds") or []
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        problems.append(f"seeds({seeds}) 应是一个或几个不同的非负整数")
    if type(plan["extensions"]) is not int or plan["extensions"] < 0:
        problems.append(f"extensions({plan['extensions']!r}) 应是非负整数")
    if type(plan.get("held_out_chars", 1)) is not int or plan.get("held_out_chars", 1) < 1:
        problems.append(f"held_out_chars({plan['held_out_chars']!r}) 应是正整数")
    if not isinstance(plan.get("general_path", ""), str):
        problems.append(f"general_path({plan['general_path']!r}) 应是一个文件")
    if "base" in plan and not isinstance(plan["base"], str):
        missing = [key for key in ("model", "stages") if not (plan["base"] or {}).get(key)]
        problems += [f"base 缺少 {key}（应是检查点目录，或一个配方）" for key in missing]
    for owner, entry in [("共同", {"flags": plan["train_flags"]}), *(plan.get("methods") or {}).items()]:
        if not isinstance(entry.get("flags", []), list):
            problems.append(f'{owner}的参数({entry["flags"]!r}) 应是列表，如 ["--lora_dropout", 0]')
    problems += [f"checks 里的 {name} 应为 {'、'.join(CHECKS)} 之一" for name in plan["checks"] if name not in CHECKS]
    if curve := plan["curve"]:
        shares = curve.get("shares") or []
        is_known = (
            curve.get("task") in names
            and plan.get("methods")
            and curve.get("method") in methods_of(plan, curve["task"])
        )
        if not is_known or not shares or not all(0 < share < 1 or share in range(2, 100) for share in shares):
            problems.append(f"curve({curve}) 应写明计划里的 task 与 method，和 (0, 1) 内或 2 起的整数的 shares")
    if "untrained" in plan["checks"] and isinstance(plan.get("base"), str):
        problems.append("checks 的 untrained 要求 base 由本工具预训练（一个对象，而不是目录），请去掉它")
    for share in dict.fromkeys(task["sweep_share"] for task in plan["tasks"]):
        if not 0 < share <= 1:
            problems.append(f"sweep_share({share}) 应在 (0, 1] 内")
    if problems:
        raise ValueError(f"计划 {path} 有 {len(problems)} 处问题：\n" + "\n".join(f"  {text}" for text in problems))
    return plan


def task_of(plan: dict[str, Any], name: str) -> dict[str, Any]:
    return next(task for task in plan["tasks"] if task["name"] == name)


def sweep_metric(task: dict[str, Any]) -> str:
    """一个任务的试跑在验证部分看的指标。"""
    return task["metric"] if task["select"] == "metric" else "nll"


def methods_of(plan: dict[str, Any], task: str) -> list[str]:
    """一个任务上比较的方法，按计划的次序。"""
    return [name for name, entry in plan["methods"].items() if task in entry.get("tasks", [task])]


def seeds_of(plan: dict[str, Any], method: str) -> list[int]:
    """一种方法的种子。"""
    return plan["methods"][method].get("seeds", plan["seeds"])


def list_cells(plan: dict[str, Any], results: Iterable[Result] = ()) -> list[Cell]:
    """全部格子，按应做的次序：基座，逐个任务、逐种方法的试跑与正式，核对；试跑的范围随 results 往外伸。

    replay 见 replay_cell。
    """
    tasks, results = [task["name"] for task in plan["tasks"]], list(results)
    cells = [Cell("base", "", "base", 0)]
    if "untrained" in plan["checks"]:
        cells.append(Cell("check", "", "untrained", 0, check="untrained"))
    for task in tasks:
        for method in methods_of(plan, task):
            rates, seeds = sweep_rates(plan, results, task, method), seeds_of(plan, method)
            cells += [Cell("sweep", task, method, seeds[0], rate) for rate in rates]
            cells += [Cell("final", task, method, seed) for seed in seeds]
    if curve := plan["curve"]:
        first = seeds_of(plan, curve["method"])[0]
        cells += [Cell("curve", curve["task"], curve["method"], first, share=share) for share in curve["shares"]]
    if "repeat" in plan["checks"]:
        method = methods_of(plan, tasks[-1])[-1]
        cells.append(Cell("check", tasks[-1], method, seeds_of(plan, method)[0], check="repeat"))
    if "shuffled" in plan["checks"]:
        # 打乱标签只对分类有清楚的「碰运气」的分数
        task = "classification" if "classification" in tasks else tasks[-1]
        method = methods_of(plan, task)[-1]
        cells.append(Cell("check", task, method, seeds_of(plan, method)[0], check="shuffled"))
    return cells


def replay_cell(plan: dict[str, Any], results: Iterable[Result]) -> Cell | None:
    """重放的格子：通用文字的 NLL 上升最多的（任务, 方法），第一个种子；没有要求或正式的格子没有做完时为 None。"""
    finals = [row for row in results if row["stage"] == "final"]
    if plan["replay"] is None or len(finals) < sum(cell.stage == "final" for cell in list_cells(plan)):
        return None
    rises: dict[tuple[str, str], list[float]] = {}
    for row in finals:
        lost = row["forgetting"]
        rises.setdefault((row["task"], row["method"]), []).append(
            lost["general_nll_after"] - lost["general_nll_before"]
        )
    task, method = max(rises, key=lambda key: sum(rises[key]) / len(rises[key]))
    return Cell("replay", task, method, seeds_of(plan, method)[0])


def cell_of(row: Result) -> Cell:
    """results.jsonl 或 extras.jsonl 的一行 → 它的格子。"""
    rate = row["learning_rate"] if row["stage"] == "sweep" else None
    return Cell(row["stage"], row["task"], row["method"], row["seed"], rate, row.get("check"), row.get("share"))


def sweep_scores(results: Iterable[Result], task: str, method: str) -> dict[float, float]:
    """试跑的 {学习率: 越小越好的分数}；没有走完的（损失成了 NaN）与分数是 NaN 的是无穷大。"""
    rows = [row for row in results if (row["stage"], row["task"], row["method"]) == ("sweep", task, method)]
    signs = {row["metric"]: 1 if row["metric"] in LOWER_IS_BETTER else -1 for row in rows}
    scores = {r["learning_rate"]: math.nan if r["score"] is None else signs[r["metric"]] * r["score"] for r in rows}
    return {rate: math.inf if math.isnan(score) else score for rate, score in scores.items()}


def sweep_rates(plan: dict[str, Any], results: Iterable[Result], task: str, method: str) -> list[float]:
    """该试跑的学习率，从小到大：计划里的；最好的在边上时往外伸一个（同样的倍数），至多 extensions 次。"""
    rates, scores = sorted(plan["methods"][method]["learning_rates"]), sweep_scores(results, task, method)
    for _ in range(plan["extensions"] if len(rates) > 1 else 0):
        if any(rate not in scores for rate in rates):
            break
        best = min(rates, key=scores.__getitem__)
        if best == rates[0]:
            rates.insert(0, float(f"{best * best / rates[1]:.2g}"))
        elif best == rates[-1]:
            rates.append(float(f"{best * best / rates[-2]:.2g}"))
        else:
            break
    return rates


def best_rate(plan: dict[str, Any], results: Iterable[Result], task: str, method: str) -> float | None:
    """试跑里最好的学习率（验证部分的分数；相同取较小者）；还没有全部做完时为 None。"""
    results = list(results)
    rates, scores = sweep_rates(plan, results, task, method), sweep_scores(results, task, method)
    return min(rates, key=scores.__getitem__) if all(rate in scores for rate in rates) else None


def next_cell(plan: dict[str, Any], results: list[Result], running: set[Cell]) -> tuple[Cell, float | None] | None:
    """下一个可以开始的格子与它的学习率；没有可以开始的（全部做完，或要等正在做的）时为 None。"""
    done = {cell_of(row) for row in results} | running
    replay = replay_cell(plan, results)
    for cell in [*list_cells(plan, results), *([replay] if replay else [])]:
        if cell in done:
            continue
        if not cell.needs_sweep:
            return cell, cell.learning_rate
        rate = best_rate(plan, results, cell.task, cell.method)
        if rate is not None:
            return cell, rate
    return None
