"""比较的报告：由一个目录里的结果写出 report.md、report.html 与 figures/*.svg；不运行任何训练。"""

from math import log
from pathlib import Path
from typing import Any

from finetune.comparison.fonts import find_font
from finetune.comparison.plan import (
    METRIC_NAMES,
    TASK_NAMES,
    best_rate,
    cell_of,
    list_cells,
    methods_of,
    read_plan,
    replay_cell,
    seeds_of,
    sweep_metric,
    sweep_rates,
)
from finetune.comparison.plots import FIGURES, draw_all
from finetune.comparison.render import to_html
from finetune.comparison.run import load_results
from finetune.comparison.statistics import NUM_RESAMPLES, holm, mean, summarize
from finetune.terminal import markdown_table, note
from utils import read_json

BESIDE = ("dictionary", "base_size")  # 另外量的，放在结果旁边就写进报告
DATA_COLUMNS = ("documents", "test", "dev", "pretrain", "final_rows", "final", "sweep")


def write_report(directory: Path, font: Path | None = None):
    """读 directory 里的计划（没有时读上一级的）与结果，写报告；结果不全时只写已有的，并说明还差多少。

    font 是中文字体的文件，没有给时用系统里的，见 fonts.py。

    Raises:
        ValueError: 没有计划，没有一个做完的格子，或 font 不是字体。
    """
    font = find_font(font)
    if not directory.is_dir():
        raise ValueError(f"{directory} 不是目录，--report 要的是一个比较的输出目录")
    own, outer = directory / "plan.json", directory.resolve().parent / "plan.json"
    if not own.is_file() and not outer.is_file():
        raise ValueError(f"{directory} 里没有 plan.json，--report 要的是一个比较的输出目录")
    plan = read_plan(outer if outer.is_file() and not own.is_file() else own)
    results = load_results(directory)
    if not results:
        raise ValueError(f"{directory} 里没有做完的格子（results.jsonl 与 extras.jsonl 没有，或是空的），报告没有写")
    known = {task["name"] for task in plan["tasks"]}, set(plan["methods"])
    strays = {f"{row['task']} {row['method']}" for row in results if row["stage"] == "final"
              and (row["task"] not in known[0] or row["method"] not in known[1])}  # fmt: skip
    if strays:
        note(f"结果里的 {'、'.join(sorted(strays))} 不在计划里，报告不用")
    note("写报告，要半分钟上下……")
    facts = read_facts(directory)
    base = find(results, stage="base")
    summary = summarize(plan, results, base)
    draw_all(plan, summary, base, directory / "figures", font)
    text = "\n\n".join(lay_out(plan, facts, results, summary, base)) + "\n"
    (directory / "report.md").write_text(text, encoding="utf-8")
    (directory / "report.html").write_text(to_html(text, directory, font), encoding="utf-8")


def read_facts(directory: Path) -> dict[str, Any]:
    """数据与基座的说明（data.json），与放在旁边的 BESIDE。"""
    files = {name: directory / f"{name}.json" for name in ("data", *BESIDE)}
    found = {name: read_json(path) for name, path in files.items() if path.is_file()}
    return found.pop("data", {}) | found


def find(results: list[dict], **wanted: Any) -> dict | None:
    """第一个各键都相等的结果；没有时为 None。"""
    return next((row for row in results if all(row.get(key) == value for key, value in wanted.items())), None)


def lay_out(plan, facts, results, summary, base) -> list[str]:
    """整份报告，按次序的各段 Markdown：先是答案与分数，怎样比的在最后。"""
    done = sum(row["stage"] == "final" for row in results)
    num_finals = sum(cell.stage == "final" for cell in list_cells(plan))
    parts = [f"# 各种微调方法的比较：{'、'.join(plan['methods'])}"]
    if done < num_finals:
        parts.append(f"**还没有做完**：正式的格子做完 {done} / {num_finals}，下面只含已做完的。")
    elif missing := missing_cells(plan, results):
        parts.append(f"**还没有做完**：正式的格子都在，还差 {'、'.join(missing)}。")
    how = ["## 怎样比的", *introduction(plan, facts, results, summary)]
    if not done:
        return [*parts, *how]
    score, memory, time, rise, losses, forgetting = (
        f"![{text}](figures/{name})\n*{text}*" for name, text in FIGURES.items()
    )
    return [
        *(*parts, answer_part(plan, facts, summary, results), *scores_part(plan, facts, summary, base), score),
        *(*costs_part(summary), memory, time, rise, losses),
        *(*forgetting_part(plan, summary, base), forgetting, *replay_part(plan, results)),
        *(
            *significance_part(plan, summary),
            *curve_part(plan, results),
            *size_part(facts),
            *sweep_part(plan, results),
            *checks_part(plan, results, base),
            *how,
        ),
    ]


def missing_cells(plan, results) -> list[str]:
    """还没有做的格子的名字。"""
    cells = [*list_cells(plan, results), *filter(None, [replay_cell(plan, results)])]
    done = {cell_of(row) for row in results}
    return [cell.name for cell in cells if cell not in done]


def ranked(summary, task: str) -> list[tuple[str, dict[str, Any]]]:
    """一个任务做完了的方法，从好到坏。"""
    found = [(method, cell) for (name, method), cell in summary["cells"].items() if name == task]
    return sorted(found, key=lambda item: -item[1]["score"])


def not_worse(summary, task: str, methods: list[str]) -> set[str]:
    """一个任务上 methods 里最好的，与（在 methods 之间校正之后）同它没有显著差别的；没有超过碰运气的不算。"""
    best = next(method for method, _ in ranked(summary, task) if method in methods)
    pairs = [pair for pair in summary["pairs"][task] if {pair["first"], pair["second"]} <= {*methods}]
    adjusted = holm([pair["p_value"] for pair in pairs])
    level = {best}
    for pair, p_value in zip(pairs, adjusted, strict=True):
        if best in (pair["first"], pair["second"]) and p_value >= 0.05:
            level |= {pair["first"], pair["second"]}
    guess = summary["chance"][task]
    return {method for method in level if guess is None or summary["cells"][task, method]["ci_low"] > guess}


def answer_part(plan, facts, summary, results) -> str:
    """几句话：各任务谁最好、与最差的差多少；从哪一种开始，忘多少。"""
    tasks = [task["name"] for task in plan["tasks"] if ranked(summary, task["name"])]
    found = []
    for name in tasks:
        (best, top), *_, (worst, low) = [*ranked(summary, name), ranked(summary, name)[-1]]
        pair = next((p for p in summary["pairs"][name] if {p["first"], p["second"]} == {best, worst}), None)
        verdict = ""
        if pair is not None:
            verdict = f"，比最差的 {worst} 高 {top['score'] - low['score']:.3f}，"
            verdict += "显著" if pair["p_holm"] < 0.05 else "不显著"
        own = facts.get("dictionary", {})
        if own.get("task") == name and own["score"] > top["score"]:
            verdict += f"，低于不用模型的词典的 {own['score']:.3f}"
        found.append(f"{TASK_NAMES[name]}是 **{best}**（{with_interval(top)}{verdict}）")
    general = [method for method in plan["methods"] if all((name, method) in summary["cells"] for name in tasks)]
    if not general:
        return f"> 分数最高的，{'；'.join(found)}。"
    level = {name: not_worse(summary, name, general) for name in tasks}

    def order(method: str) -> tuple[int, float]:
        rises = (summary["cells"][name, method]["rise"] for name in tasks)
        return -sum(method in level[name] for name in tasks), mean(rises)

    def told(method: str) -> str:
        own = {TASK_NAMES[name]: summary["cells"][name, method] for name in tasks}
        rates = "，".join(f"{name} {cell['learning_rate']:g}" for name, cell in own.items())
        rises = "，".join(f"{name} {cell['rise']:+.2f}" for name, cell in own.items())
        share = f"{-order(method)[0]}/{len(tasks)} 个任务上它最好或差得不显著"
        return f"{share}；学习率：{rates}；通用文字的 NLL 上升：{rises}"

    start, *others = sorted(general, key=order)
    lines = [
        f"分数最高的，{'；'.join(found)}。",
        f"只对这个基座：从 **{start}** 开始，{told(start)}。",
        *(f"其次是 **{method}**：{told(method)}。" for method in others[:1]),
        *(f"没有超过碰运气：{no_better}。" for no_better in [no_better_than_chance(summary)] if no_better),
        *forgetting_line(plan, results),
        f"「差得不显著」在 {'、'.join(general)} 之间按 Holm 校正，下面「差别是否显著」的表在全部的比较之间。",
    ]
    return "\n".join(f"> {line}" for line in lines)


def no_better_than_chance(summary) -> str:
    """区间的下端不高于碰运气的方法，按任务。"""
    found: dict[str, list[str]] = {}
    for (name, method), cell in summary["cells"].items():
        guess = summary["chance"][name]
        if guess is not None and cell["ci_low"] <= guess:
            found.setdefault(name, []).append(method)
    return "；".join(f"{TASK_NAMES[name]}的 {'、'.join(methods)}" for name, methods in found.items())


def forgetting_line(plan, results) -> list[str]:
    """遗忘最多的一格加上重放之后：一句话；没有做重放时没有。"""
    row = find(results, stage="replay")
    if row is None:
        return []
    without = same_final(row, results)
    (before, after) = (
        part["general_nll_after"] - part["general_nll_before"] for part in (without["forgetting"], row["forgetting"])
    )
    return [
        f"忘得最多的是{TASK_NAMES[row['task']]}的 {row['method']}；种子 {row['seed']} 加上重放 "
        f"{plan['replay']['ratio']:g}，通用文字的 NLL 上升 {before:+.2f} → {after:+.2f}，"
        f"分数 {without['score']:.3f} → {row['score']:.3f}。"
    ]


def introduction(plan, facts, results, summary) -> list[str]:
    full = [cell["trainable_parameters"] for (_, method), cell in summary["cells"].items() if method == "full"]
    size = f"{full[0] / 1e4:,.0f} 万个参数" if full else "大小见下"
    is_built = not isinstance(plan["base"], str)
    origin = "由随机的权重用 `--task pretrain` 练成的" if is_built else f"检查点 {plan['base']} 的"
    budgets, shares = (
        "，".join(f"{TASK_NAMES[task['name']]} {task[name]:{form}}" for task in plan["tasks"])
        for name, form in (("train_tokens", ","), ("sweep_share", ".0%"))
    )
    jobs: dict[str, set[int]] = {}
    for row in results:
        if row["tokens"]:
            jobs.setdefault(TASK_NAMES[row["task"]], set()).add(row["jobs"])
    jobs_text = "，".join(f"{name} {'、'.join(map(str, sorted(counts)))} 个" for name, counts in jobs.items())
    flags = [
        (method, [*(["--train_type", entry["train_type"]] if "train_type" in entry else []), *entry.get("flags", [])])
        for method, entry in plan["methods"].items()
    ]
    flags = [
        f"- {name}：{' '.join(map(str, words or ['都是缺省值']))}"
        for name, words in [*flags, ("共同", plan["train_flags"])]
    ]
    flags[-1] += f"；计算精度 {facts['precision']}" if "precision" in facts else ""
    own_seeds = "".join(
        f"（{method} 只有 {'、'.join(map(str, seeds_of(plan, method)))}）"
        for method in plan["methods"]
        if seeds_of(plan, method) != plan["seeds"]
    )
    parts = [
        f"基座是{origin}模型，{size}。**小模型的数字不是 7B 模型的数字**：次序、差别与学习率都不能直接搬到 7B 上，"
        "能搬的是做法：每种方法自己试学习率、同样多的训练 token、几个种子、留出的测试文档与区间。",
        *base_part(facts),
        f"种子 {'、'.join(map(str, plan['seeds']))}{own_seeds}；同一任务的各方法用同样的行与遍数，训练的 token 见下表"
        f"（预算 {budgets}）；试跑占它的 {shares}。格子各一个线程，时间与速度是几个格子并行时测的：{jobs_text}。",
        "各方法在缺省之外的参数（交给 train.py 的）：",
        "\n".join(flags),
    ]
    tasks = [task for task in plan["tasks"] if task["name"] in facts]
    if tasks:
        parts += [
            markdown_table(
                ["任务", "指标", "文档", "测试文档", "验证行", "预训练行", "训练行", "训练 token", "试跑 token"],
                [[*names_of(task), *(facts[task["name"]].get(key, "") for key in DATA_COLUMNS)] for task in tasks],
            ),
            "测试、验证、预训练与训练的行按文档分开，相近的文档（较短的一篇有一半以上的 12 字片段也在另一篇里）"
            "算作一个；工具核对过，没有相同或相近的文档出现在两份里。"
            + ("任务的文字里，基座只见过训练与预训练部分的输入，没有见过任何回答。" if is_built else ""),
        ]
    if summary["cells"]:
        tokens: dict[str, set[int]] = {}
        for (name, _), cell in summary["cells"].items():
            tokens.setdefault(name, set()).update(cell["tokens"])
        uneven = "、".join(TASK_NAMES[name] for name, counts in tokens.items() if len(counts) > 1)
        verdict = f"不相等：{uneven}" if uneven else "同一任务的各方法、各种子完全相等"
        parts.append(f"训练的 token 数由训练日志核对：{verdict}。")
    return parts


def base_part(facts) -> list[str]:
    """基座的哈希与各段预训练。"""
    if "stages" not in facts.get("base", {}):
        return []
    rows = [[stage["name"], f"{stage['tokens']:,}", stage["steps"], stage["loss"]] for stage in facts["base"]["stages"]]
    return [
        f"基座的权重（model.safetensors）的 SHA-256 是 `{facts['base']['sha256']}`；各段预训练：",
        markdown_table(["段", "token", "步", "末步的损失"], rows),
    ]


def names_of(task) -> tuple[str, str]:
    return TASK_NAMES[task["name"]], METRIC_NAMES[task["metric"]]


def with_interval(entry: dict[str, Any], key: str = "score", prefix: str = "", sign: str = "") -> str:
    """分数（或差）与 95% 区间。"""
    score, low, high = (format(entry[f"{prefix}{name}"], f"{sign}.3f") for name in (key, "ci_low", "ci_high"))
    return f"{score} [{low}, {high}]"


def difference(entry: dict[str, float]) -> str:
    return with_interval(entry, "difference", sign="+")


def p_text(value: float) -> str:
    """p 值；重抽的次数分辨不了更小的。"""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def scores_part(plan, facts, summary, base) -> list[str]:
    """方法 × 任务：平均分与区间；末几行是基座、碰运气与词典。"""
    tasks = [task for task in plan["tasks"] if any(name == task["name"] for name, _ in summary["cells"])]
    cells = [[summary["cells"].get((task["name"], method)) for task in tasks] for method in plan["methods"]]
    rows = [
        [method, *("—" if cell is None else with_interval(cell) for cell in row)]
        for method, row in zip(plan["methods"], cells, strict=True)
    ]
    nlls = [
        [method, *("—" if cell is None else f"{cell['test_nll']:.3f}" for cell in row)]
        for method, row in zip(plan["methods"], cells, strict=True)
    ]
    if base is not None:
        others = base["forgetting"]["other_tasks"]
        rows.append(["没有微调的基座", *(with_interval(others[task["name"]], prefix="test_") for task in tasks)])
        nlls.append(["没有微调的基座", *(f"{others[task['name']]['test_nll']:.3f}" for task in tasks)])
    guesses = [summary["chance"][task["name"]] for task in tasks]
    if any(guess is not None for guess in guesses):
        rows.append(["碰运气（各标签机会相等）", *("—" if guess is None else f"{guess:.3f}" for guess in guesses)])
    if "dictionary" in facts:
        own = facts["dictionary"]
        cells = [with_interval(own) if task["name"] == own["task"] else "—" for task in tasks]
        rows.append(["词典（不用模型，只用训练的回答）", *cells])
    return [
        "## 分数",
        "各种子的平均分与 95% 区间；区间由两层自助法得到：先重抽测试行，再重抽种子。"
        "种子只有几个，它们之间的差别因此估得偏小。",
        markdown_table(["方法", *("{}（{}）".format(*names_of(task)) for task in tasks)], rows),
        "测试部分目标 token 的 NLL（nat，越低越好）：分数很低时它也分得出高下；回答只有几种标签时不行，"
        "答得太有把握的几处错就使它变高。",
        markdown_table(["方法", *(TASK_NAMES[task["name"]] for task in tasks)], nlls),
    ]


def significance_part(plan, summary) -> list[str]:
    """两两之差的配对自助法，与同基座之差。"""
    rows = [
        [
            *(f"{TASK_NAMES[name]} {pair['first']} − {pair['second']}", difference(pair)),
            *(p_text(pair["p_value"]), p_text(pair["p_holm"]), "显著" if pair["p_holm"] < 0.05 else "不显著"),
        ]
        for name, pairs in summary["pairs"].items()
        for pair in pairs
    ]
    parts = [
        "## 差别是否显著",
        f"配对自助法，重抽 {NUM_RESAMPLES:,} 次：同样重抽的测试行与种子上比较两种方法。"
        "p 值在每个任务内按 Holm 校正，小于 0.05 记为显著；区间没有校正。",
        markdown_table(["任务与比较", "差与 95% 区间", "p", "p（Holm）", "结论"], rows),
    ]
    against = [
        [f"{TASK_NAMES[name]} {method}", difference(cell["vs_base"]), p_text(cell["vs_base"]["p_value"])]
        for (name, method), cell in summary["cells"].items()
        if cell["vs_base"] is not None
    ]
    if against:
        parts.append("与没有微调的基座之差（p 没有校正；基座不按格式回答时是 0 分，比它高不等于比碰运气好）：")
        parts.append(markdown_table(["任务与方法", "差与 95% 区间", "p"], against))
    return parts


def costs_part(summary) -> list[str]:
    def ranged(cell: dict[str, Any], key: str) -> str:
        low, high = cell["ranges"][key]
        return f"{cell[key]:.0f}（{low:.0f}–{high:.0f}）"

    rows = [
        [
            *(f"{TASK_NAMES[name]} {method}", f"{cell['trainable_parameters']:,.0f}"),
            f"{cell['peak_memory_mb']:.0f}",
            *(ranged(cell, "seconds"), ranged(cell, "tokens_per_second")),
            *(f"{cell['checkpoint_bytes'] / 1e6:.2f}", f"{cell['learning_rate']:g}"),
        ]
        for (name, method), cell in summary["cells"].items()
    ]
    return [
        "## 代价",
        "各种子的平均，括号里是最小与最大：小模型上受机器上别的程序影响。峰值内存在 CPU 上是整个训练进程的常驻内存"
        "（含几百 MB 的程序库，小模型上方法之间的差别被它盖过），在 GPU 上是分配过的显存；"
        "时间从启动到结束，含读模型、测遗忘与保存；token/s 只算训练步；检查点不含续训用的优化器状态。",
        markdown_table(
            ["任务与方法", "可训练的参数", "峰值内存 MB", "时间 秒", "token/s", "检查点 MB", "学习率"], rows
        ),
    ]


def forgetting_part(plan, summary, base) -> list[str]:
    """通用文字的 NLL、KL 与别的任务的分数（括号里是基座自己的）。"""
    names = [task["name"] for task in plan["tasks"]]
    own = (
        {} if base is None else {name: f"（{e['score']:.3f}）" for name, e in base["forgetting"]["other_tasks"].items()}
    )
    rows = [
        [
            *(f"{TASK_NAMES[name]} {method}", f"{cell['general_nll_before']:.3f} → {cell['general_nll_after']:.3f}"),
            *(f"{cell['rise']:+.3f}", f"{cell['kl']:.3f}"),
            *(f"{cell['other'][other]:.3f}{own.get(other, '')}" if other in cell["other"] else "—" for other in names),
        ]
        for (name, method), cell in summary["cells"].items()
    ]
    header = ["训练的任务与方法", "通用 NLL", "上升", "KL", *(f"{TASK_NAMES[name]}分数（基座）" for name in names)]
    recipe = plan["base"] if isinstance(plan["base"], dict) else {}
    vocab_size = recipe.get("model", {}).get("vocab_size")
    uniform = f"在 {vocab_size:,} 个片段里均匀地猜是 {log(vocab_size):.2f}；" if vocab_size else ""
    return [
        "## 遗忘",
        f"在训练与预训练都没有见过的通用文字上，训练前后每个 token 的 NLL 与基座的 KL 散度（nat）；{uniform}"
        "右边是训练之后别的任务的分数，括号里是基座自己在同样的行上的分数。",
        markdown_table(header, rows),
    ]


def same_final(row: dict[str, Any], results: list[dict]) -> dict[str, Any]:
    """与重放或核对的格子同样的任务、方法与种子的正式格子。"""
    return find(results, stage="final", task=row["task"], method=row["method"], seed=row["seed"])


def replay_part(plan, results) -> list[str]:
    row = find(results, stage="replay")
    if row is None:
        return []
    table = []
    for title, r in (("不重放", same_final(row, results)), (f"重放 {plan['replay']['ratio']:g}", row)):
        lost = r["forgetting"]
        rise = f"{lost['general_nll_after'] - lost['general_nll_before']:+.3f}"
        others = [f"{entry['score']:.3f}" for entry in lost["other_tasks"].values()]
        table.append(
            [title, with_interval(r), rise, f"{lost['kl']:.3f}", *others, f"{r['tokens']:,}", f"{r['seconds']:.0f}"]
        )
    others = [f"{TASK_NAMES[name]}分数" for name in row["forgetting"]["other_tasks"]]
    return [
        "## 重放买到了什么",
        f"遗忘最多的是{TASK_NAMES[row['task']]}上的 {row['method']}；同样的学习率，只有一个种子（{row['seed']}），"
        f"训练里混进通用文字（--replay_ratio {plan['replay']['ratio']:g} "
        f"--replay_by {plan['replay'].get('by', 'rows')}；训练的 token 因此更多）：",
        markdown_table(["", "分数", "通用 NLL 上升", "KL", *others, "训练 token", "时间 秒"], table),
    ]


def curve_part(plan, results) -> list[str]:
    """一种方法的分数随训练的 token 怎样变，最后一行是正式的（同一个种子）。"""
    rows = [row for row in results if row["stage"] == "curve"]
    if not rows:
        return []
    final = same_final(rows[0], results)
    rows = sorted([*rows, *([final] if final else [])], key=lambda row: row["tokens"])
    verdict = ""
    if len(rows) > 2:
        before, last = rows[-2:]
        is_apart = last["ci_low"] > before["ci_high"] or last["ci_high"] < before["ci_low"]
        trend = "还在上升：分数受训练的 token 限制" if last["score"] > before["score"] else "在下降"
        verdict = f"末了一段{trend}。" if is_apart else "末了两个的区间相叠，看不出还升不升。"
    return [
        "## 分数与训练的 token",
        f"{TASK_NAMES[rows[0]['task']]}、{rows[0]['method']}、种子 {rows[0]['seed']}，"
        f"同样的学习率；少的是同样的行的前一部分，多的是多走几遍。{verdict}",
        markdown_table(
            ["训练 token", "分数", "测试的 NLL"],
            [[f"{row['tokens']:,}", with_interval(row), f"{row['test_nll']:.3f}"] for row in rows],
        ),
    ]


def size_part(facts) -> list[str]:
    """分数与基座的大小，base_size.py 量的。"""
    if "base_size" not in facts:
        return []
    rows = facts["base_size"]
    return [
        "## 分数与基座的大小",
        f"{TASK_NAMES[rows[0]['task']]}、full：同样的配方与文字，只换宽度，各造一个基座，各自试学习率。",
        markdown_table(
            ["宽", "参数", "分数", "测试的 NLL", "微调之前的"],
            [
                [
                    *(row["hidden_size"], f"{row['parameters']:,}", with_interval(row)),
                    *(f"{row[name]:.3f}" for name in ("test_nll", "base_test_nll")),
                ]
                for row in rows
            ],
        ),
    ]


def sweep_part(plan, results) -> list[str]:
    """试跑的代价、每种方法的最好学习率，与一句建议。"""
    sweeps, finals = ([row for row in results if row["stage"] == stage] for stage in ("sweep", "final"))
    spent, rest = (sum(row["seconds"] or 0 for row in rows) for rows in (sweeps, finals))
    others = [
        f"（{TASK_NAMES[task['name']]}：{METRIC_NAMES[task['metric']]} 最高的）"
        for task in plan["tasks"]
        if sweep_metric(task) != "nll"
    ]
    parts = [
        "## 学习率",
        f"试跑 {len(sweeps)} 格，训练共 {spent / 60:.1f} 分钟，是正式训练（{rest / 60:.1f} 分钟）的 "
        f"{spent / max(rest, 1e-9):.0%}；选验证部分目标 token 的 NLL 最低的{''.join(others)}，"
        "它在边上时范围往外伸一格再试。表里是各学习率的这个数，粗体是选中的。",
    ]
    advice, edges = [], []
    for method in plan["methods"]:
        tasks = [task for task in plan["tasks"] if method in methods_of(plan, task["name"])]
        ranges = [sweep_rates(plan, results, task["name"], method) for task in tasks]
        rates, rows, best = sorted({rate for tried in ranges for rate in tried}), [], []
        for task, own in zip(tasks, ranges, strict=True):
            best.append(best_rate(plan, results, task["name"], method))
            tried = [find(sweeps, method=method, task=task["name"], learning_rate=rate) for rate in rates]
            scores = ["—" if r is None else "NaN" if r["score"] is None else f"{r['score']:.4f}" for r in tried]
            if best[-1] is not None and len(own) > 1 and best[-1] in (own[0], own[-1]):
                edges.append(f"{method} 的{TASK_NAMES[task['name']]}（{best[-1]:g}）")
            marked = [f"**{s}**" if rate == best[-1] else s for rate, s in zip(rates, scores, strict=True)]
            rows.append([TASK_NAMES[task["name"]], *marked])
        parts.append(markdown_table([method, *(f"{rate:g}" for rate in rates)], rows))
        if any(best):
            advice.append(advise(method, list(filter(None, best)), len(tasks)))
    verdict = f"选中的学习率在试过的范围的边上的：{'、'.join(edges)}。" if edges else "选中的学习率都在试过的范围之内。"
    return [*parts, verdict, "这个大小的模型从哪里开始；别的大小请自己试，上面的试跑就是做法：", "\n".join(advice)]


def advise(method: str, best: list[float], num_tasks: int) -> str:
    """一种方法从哪个学习率开始：选中次数最多的，相同取较小者。"""
    start = max(sorted(set(best)), key=best.count)
    return f"- {method}：从 {start:g} 开始（{best.count(start)}/{num_tasks} 个任务选中它）。"


def checks_part(plan, results, base) -> list[str]:
    lines = []
    if row := find(results, check="repeat"):
        first = same_final(row, results)["score"]
        lines.append(
            f"- 重复：{TASK_NAMES[row['task']]}、{row['method']}、种子 {row['seed']} 再做一次，"
            f"分数 {first:.6f} 与 {row['score']:.6f}，{'相同' if first == row['score'] else '**不同**'}。"
        )
    if row := find(results, check="shuffled"):
        finals = [r for r in results if (r["stage"], r["task"], r["method"]) == ("final", row["task"], row["method"])]
        own = (
            ""
            if base is None
            else f"，没有微调的基座 {base['forgetting']['other_tasks'][row['task']]['test_score']:.3f}"
        )
        lines.append(
            f"- 打乱标签：{TASK_NAMES[row['task']]}、{row['method']} 在标签互换的行上训练，分数 {with_interval(row)}；"
            f"真标签 {mean(r['score'] for r in finals):.3f}{own}；两类各半的抛硬币是 0.5。"
        )
    if row := find(results, check="untrained"):
        scores = [f"{TASK_NAMES[n]} {e['test_score']:.3f}" for n, e in row["forgetting"]["other_tasks"].items()]
        lines.append(f"- 什么也没学的模型（同样大小，随机权重）：{'，'.join(scores)}。")
    return ["## 数字可信吗", "\n".join(lines)] if lines else []
