"""比较的报告：由一个目录里的结果写出 report.md、report.html 与 figures/*.svg；不运行任何训练。

这里只定内容：一串块（标题、段落、表、图），由 compare_render.py 写成 Markdown 与 HTML。
"""

from pathlib import Path
from typing import Any

from finetune.comparison.plan import best_rate, cell_of
from finetune.comparison.plots import METRIC_NAMES, TASK_NAMES, draw_all
from finetune.comparison.render import Block, to_html, to_markdown
from finetune.comparison.results import DETAILS, load_results, load_rows
from finetune.comparison.statistics import NUM_RESAMPLES, mean, summarize
from utils import read_json


def write_report(directory: Path):
    """读 directory 里的计划与结果，写报告；结果不全时只写已有的，并说明还差多少。没有计划时抛 ValueError。"""
    plan = read_json(directory / "plan.json")
    results = load_results(directory)
    details = {row["cell"]: row for row in load_rows(directory / DETAILS)}
    facts = read_json(directory / "data.json") if (directory / "data.json").is_file() else {}
    jobs = sorted({row["jobs"] for row in details.values() if row["tokens"]})
    base = next((row for row in results if row["stage"] == "base"), None)
    summary = summarize(plan, results, details, base)
    figures = draw_all(plan, summary, base, directory / "figures")
    blocks = lay_out(plan, facts, jobs, results, details, summary, base, figures)
    (directory / "report.md").write_text(to_markdown(blocks), encoding="utf-8")
    (directory / "report.html").write_text(to_html(blocks, directory / "figures"), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# 内容


def lay_out(plan, facts, jobs, results, details, summary, base, figures) -> list[Block]:
    """整份报告，按次序的块。"""
    finals = [row for row in results if row["stage"] == "final"]
    num_finals = len(plan["tasks"]) * len(plan["methods"]) * len(plan["seeds"])
    blocks: list[Block] = [("h1", "四种方法的比较：freeze、LoRA、P-Tuning、全参数")]
    blocks += introduction(plan, facts, jobs, summary)
    if len(finals) < num_finals:
        blocks.append(("p", f"**还没有做完**：正式的格子做完 {len(finals)} / {num_finals}，下面只含已做完的。"))
    if not finals:
        return blocks

    def figure(name: str) -> list[Block]:
        return [("figure", (name, figures[name]))]

    blocks += [("h2", "分数"), *scores_table(plan, summary, base), *figure("scores.svg")]
    blocks += [("h2", "差别是否显著"), *significance(plan, summary)]
    blocks += [("h2", "代价"), *costs_table(summary)]
    blocks += [*figure("score-memory.svg"), *figure("score-parameters.svg"), *figure("losses.svg")]
    blocks += [("h2", "遗忘"), *forgetting_table(plan, summary, base), *figure("forgetting.svg")]
    blocks += replay_part(plan, results, details)
    blocks += [("h2", "学习率"), *sweep_part(plan, results)]
    blocks += checks_part(plan, results, base)
    return blocks


def introduction(plan, facts, jobs, summary) -> list[Block]:
    full = [cell["trainable_parameters"] for (_, method), cell in summary["cells"].items() if method == "full"]
    size = f"{full[0] / 1e4:,.0f} 万个参数" if full else "大小见下"
    is_built = not isinstance(plan["base"], str)
    origin = "本工具在通用文字与三种任务格式的行上预训练的" if is_built else f"检查点 {plan['base']} 的"
    budgets, shares = (
        "、".join(dict.fromkeys(form.format(task.get(name, plan[name])) for task in plan["tasks"]))
        for name, form in (("train_tokens", "{:,}"), ("sweep_share", "{:.0%}"))
    )
    blocks: list[Block] = [
        (
            "p",
            f"基座是{origin}模型，{size}。**小模型的数字不是 7B 模型的数字**：次序、差别与学习率都不能直接搬到 7B 上，"
            "能搬的是做法：每种方法自己试学习率、同样多的训练 token、几个种子、留出的测试文档与区间。",
        ),
        (
            "p",
            f"种子 {'、'.join(map(str, plan['seeds']))}；同一任务的各方法用同样的行与遍数，"
            f"训练的 token 见下表（预算 {budgets}）；试跑是它的 {shares}。"
            + f"时间与速度是 {'、'.join(map(str, jobs))} 个格子并行、各一个线程时测的。",
        ),
        ("p", "各方法在缺省之外的参数（交给 train.py 的）："),
        ("list", method_flags(plan, facts)),
    ]
    rows = [
        [
            TASK_NAMES[task["name"]],
            METRIC_NAMES[task["metric"]],
            *(str(facts[task["name"]].get(key, "")) for key in DATA_COLUMNS),
        ]
        for task in plan["tasks"]
        if task["name"] in facts
    ]
    if rows:
        header = ["任务", "指标", "文档", "测试文档", "验证行", "预训练行", "训练行", "训练 token", "试跑 token"]
        blocks += [
            ("table", (header, rows)),
            (
                "p",
                "测试、验证、预训练与训练的行按文档分开，相近的文档（较短的一篇有一半以上的 12 字片段也在另一篇里）"
                f"算作一个；工具核对过，没有相同或相近的文档出现在两份里。{inputs_only(plan)}",
            ),
        ]
    uneven = [
        f"{TASK_NAMES[task['name']]}"
        for task in plan["tasks"]
        if len({n for (t, _), c in summary["cells"].items() if t == task["name"] for n in c["tokens"]}) > 1
    ]
    if summary["cells"]:
        verdict = f"不相等：{'、'.join(uneven)}" if uneven else "同一任务的各方法、各种子完全相等"
        blocks.append(("p", f"训练的 token 数由训练日志核对：{verdict}。"))
    return blocks


def method_flags(plan, facts) -> list[str]:
    """每种方法与全部格子的 train.py 参数，各一行。"""
    lines = [
        f"{method}：{' '.join(map(str, entry['flags'])) if entry.get('flags') else '都是缺省值'}"
        for method, entry in plan["methods"].items()
    ]
    shared = " ".join(map(str, plan["train_flags"])) or "都是缺省值"
    precision = f"；计算精度 {facts['precision']}" if "precision" in facts else ""
    return [*lines, f"共同：{shared}{precision}"]


def inputs_only(plan) -> str:
    """预训练行只取了输入的文字的任务，一句话；没有时为空。"""
    if isinstance(plan["base"], str):
        return ""
    tasks = [task["name"] for task in plan["tasks"] if task.get("pretrain")]
    names = [TASK_NAMES[name] for name in tasks if name not in plan["base"]["repeats"]]
    if not names:
        return ""
    return f"{'与'.join(names)}的预训练行只取了输入的文字，用来造抄写练习：基座没有见过它们的回答。"


DATA_COLUMNS = ("documents", "test", "dev", "pretrain", "final_rows", "final", "sweep")


def scores_table(plan, summary, base) -> list[Block]:
    """方法 × 任务：平均分与区间；末行是基座。"""
    tasks = [task for task in plan["tasks"] if any(name == task["name"] for name, _ in summary["cells"])]
    header = ["方法", *(f"{TASK_NAMES[t['name']]}（{METRIC_NAMES[t['metric']]}）" for t in tasks)]
    rows = []
    for method in plan["methods"]:
        cells = [summary["cells"].get((task["name"], method)) for task in tasks]
        rows.append([method, *(("—" if c is None else with_interval(c)) for c in cells)])
    if base is not None:
        entries = [base["forgetting"]["other_tasks"].get(task["name"]) for task in tasks]
        rows.append(["没有微调的基座", *(("—" if e is None else with_interval(e, "test_")) for e in entries)])
    guesses = [chance_score(task, summary) for task in tasks]
    if any(guess is not None for guess in guesses):
        rows.append(["碰运气（各标签机会相等）", *("—" if guess is None else f"{guess:.3f}" for guess in guesses)])
    text = (
        "各种子的平均分与 95% 区间；区间由两层自助法得到：先重抽测试行，再重抽种子。"
        "种子只有几个，它们之间的差别因此估得偏小。"
    )
    return [("p", text), ("table", (header, rows))]


def chance_score(task, summary) -> float | None:
    """分类任务上碰运气（各标签机会相等）的宏 F1（期望）；别的任务为 None。"""
    if task["metric"] != "label_f1":
        return None
    shares = next(cell["label_shares"] for (name, _), cell in summary["cells"].items() if name == task["name"])
    recall = 1 / len(shares)  # 猜中每个标签的机会；准确率是它在测试行里的份额
    return mean([2 * share * recall / (share + recall) for share in shares])


def with_interval(cell: dict[str, Any], prefix: str = "") -> str:
    score, low, high = (cell[f"{prefix}{name}"] for name in ("score", "ci_low", "ci_high"))
    return f"{score:.3f} [{low:.3f}, {high:.3f}]"


def significance(plan, summary) -> list[Block]:
    """两两之差的配对自助法，与同基座之差。"""
    rows = []
    for task in plan["tasks"]:
        for pair in summary["pairs"].get(task["name"], []):
            verdict = "显著" if pair["p_holm"] < 0.05 else "不显著"
            difference = f"{pair['difference']:+.3f} [{pair['ci_low']:+.3f}, {pair['ci_high']:+.3f}]"
            rows.append(
                [
                    TASK_NAMES[task["name"]],
                    f"{pair['first']} − {pair['second']}",
                    difference,
                    p_text(pair["p_value"]),
                    p_text(pair["p_holm"]),
                    verdict,
                ]
            )
    blocks: list[Block] = [
        (
            "p",
            f"配对自助法，重抽 {NUM_RESAMPLES:,} 次：同样重抽的测试行与种子上比较两种方法。"
            "p 值在每个任务内按 Holm 校正，小于 0.05 记为显著；区间没有校正。",
        ),
        ("table", (["任务", "比较", "差与 95% 区间", "p", "p（Holm）", "结论"], rows)),
    ]
    against = [
        [
            TASK_NAMES[name],
            method,
            f"{c['vs_base']['difference']:+.3f} [{c['vs_base']['ci_low']:+.3f}, {c['vs_base']['ci_high']:+.3f}]",
            p_text(c["vs_base"]["p_value"]),
        ]
        for (name, method), c in summary["cells"].items()
        if c["vs_base"] is not None
    ]
    if against:
        note = "与没有微调的基座之差（p 没有校正；基座不按格式回答时是 0 分，比它高不等于比碰运气好）："
        blocks += [("p", note), ("table", (["任务", "方法", "差与 95% 区间", "p"], against))]
    return blocks


def costs_table(summary) -> list[Block]:
    rows = [
        [
            TASK_NAMES[name],
            method,
            f"{cell['trainable_parameters']:,.0f}",
            f"{cell['peak_memory_mb']:.0f}",
            with_range(cell, "seconds"),
            with_range(cell, "tokens_per_second"),
            f"{cell['checkpoint_bytes'] / 1e6:.2f}",
            f"{cell['learning_rate']:g}",
        ]
        for (name, method), cell in summary["cells"].items()
    ]
    header = ["任务", "方法", "可训练的参数", "峰值内存 MB", "时间 秒", "token/s", "检查点 MB", "学习率"]
    text = (
        "各种子的平均，括号里是最小与最大：小模型上受机器上别的程序影响。峰值内存在 CPU 上是整个训练进程的常驻内存"
        "（含几百 MB 的程序库，小模型上方法之间的差别被它盖过），在 GPU 上是分配过的显存；"
        "时间从启动到结束，含读模型、测遗忘与保存；token/s 只算训练步；检查点不含续训用的优化器状态。"
    )
    return [("p", text), ("table", (header, rows))]


def with_range(cell: dict[str, Any], key: str) -> str:
    low, high = cell["ranges"][key]
    return f"{cell[key]:.0f}（{low:.0f}–{high:.0f}）"


def p_text(value: float) -> str:
    """p 值；重抽的次数分辨不了更小的。"""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def forgetting_table(plan, summary, base) -> list[Block]:
    """通用文字的 NLL、KL 与别的任务的分数（括号里是基座自己的）。"""
    names = [task["name"] for task in plan["tasks"]]
    entries = base["forgetting"]["other_tasks"] if base is not None else {}
    rows = []
    for (name, method), cell in summary["cells"].items():
        others = []
        for other in names:
            if other not in cell["other"]:
                others.append("—")
            else:
                own = f"（{entries[other]['score']:.3f}）" if other in entries else ""
                others.append(f"{cell['other'][other]:.3f}{own}")
        rise = cell["nll_after"] - cell["nll_before"]
        nll = f"{cell['nll_before']:.3f} → {cell['nll_after']:.3f}"
        rows.append([TASK_NAMES[name], method, nll, f"{rise:+.3f}", f"{cell['kl']:.3f}", *others])
    header = ["训练的任务", "方法", "通用 NLL", "上升", "KL", *(f"{TASK_NAMES[name]}分数（基座）" for name in names)]
    text = (
        "在训练与预训练都没有见过的通用文字上，训练前后每个 token 的 NLL 与基座的 KL 散度（nat）；"
        "右边是训练之后别的任务的分数，括号里是基座自己在同样的行上的分数。"
    )
    return [("p", text), ("table", (header, rows))]


def replay_part(plan, results, details) -> list[Block]:
    row = next((row for row in results if row["stage"] == "replay"), None)
    if row is None:
        return []
    key = ("final", row["task"], row["method"], row["seed"])
    plain = next(r for r in results if (r["stage"], r["task"], r["method"], r["seed"]) == key)
    table = [
        [
            title,
            f"{r['score']:.3f} [{r['ci_low']:.3f}, {r['ci_high']:.3f}]",
            f"{r['forgetting']['general_nll_after'] - r['forgetting']['general_nll_before']:+.3f}",
            f"{r['forgetting']['kl']:.3f}",
            *(f"{entry['score']:.3f}" for entry in r["forgetting"]["other_tasks"].values()),
            f"{details[cell_of(r).name]['tokens']:,}",
            f"{r['seconds']:.0f}",
        ]
        for title, r in (("不重放", plain), (f"重放 {plan['replay']['ratio']:g}", row))
    ]
    others = [f"{TASK_NAMES[name]}分数" for name in row["forgetting"]["other_tasks"]]
    text = (
        f"遗忘最多的是{TASK_NAMES[row['task']]}上的 {row['method']}；同样的学习率，只有一个种子（{row['seed']}），"
        f"训练里混进通用文字（--replay_ratio {plan['replay']['ratio']:g}，是任务行数的这么多倍；"
        "训练的 token 因此更多）："
    )
    header = ["", "分数", "通用 NLL 上升", "KL", *others, "训练 token", "时间 秒"]
    return [("h2", "重放买到了什么"), ("p", text), ("table", (header, table))]


def sweep_part(plan, results) -> list[Block]:
    """试跑的代价、每种方法的最好学习率，与一句建议。"""
    sweeps = [row for row in results if row["stage"] == "sweep"]
    finals = [row for row in results if row["stage"] == "final"]
    spent, rest = (sum(row["seconds"] for row in rows) for rows in (sweeps, finals))
    blocks: list[Block] = [
        (
            "p",
            f"试跑 {len(sweeps)} 格，训练共 {spent / 60:.1f} 分钟，是正式训练（{rest / 60:.1f} 分钟）的 "
            f"{spent / max(rest, 1e-9):.0%}；选验证部分目标 token 的 NLL 最低的。表里是各学习率的 NLL，粗体是选中的。",
        )
    ]
    advice = []
    for method, entry in plan["methods"].items():
        rates, rows, best = sorted(entry["learning_rates"]), [], []
        for task in plan["tasks"]:
            chosen = best_rate(plan, results, task["name"], method)
            scores = {
                r["learning_rate"]: r["score"] for r in sweeps if (r["task"], r["method"]) == (task["name"], method)
            }
            marked = [
                "—" if rate not in scores else f"**{scores[rate]:.4f}**" if rate == chosen else f"{scores[rate]:.4f}"
                for rate in rates
            ]
            rows.append([TASK_NAMES[task["name"]], *marked])
            best += [chosen] if chosen is not None else []
        blocks.append(("table", ([method, *(f"{rate:g}" for rate in rates)], rows)))
        if best:
            advice.append(advise(method, rates, best, len(plan["tasks"])))
    return [*blocks, ("p", "这个大小的模型从哪里开始；别的大小请自己试，上面的试跑就是做法："), ("list", advice)]


def advise(method: str, rates: list[float], best: list[float], num_tasks: int) -> str:
    """一种方法从哪个学习率开始：选中次数最多的（相同取较小者），与它是不是在试过的边上。"""
    start = max(sorted(set(best)), key=best.count)
    agreed = f"{best.count(start)}/{num_tasks} 个任务选中它"
    edge = ""
    if len(rates) > 1 and start in (rates[0], rates[-1]):
        further = "更小" if start == rates[0] else "更大"
        edge = f"；它在试过的范围（{rates[0]:g} 至 {rates[-1]:g}）的边上，{further}的也值得试"
    return f"{method}：从 {start:g} 开始（{agreed}）{edge}。"


def checks_part(plan, results, base) -> list[Block]:
    checks = {row["check"]: row for row in results if row["stage"] == "check"}
    if not checks:
        return []
    lines = []
    if "repeat" in checks:
        row = checks["repeat"]
        key = ("final", row["task"], row["method"], row["seed"])
        first = next(r for r in results if (r["stage"], r["task"], r["method"], r["seed"]) == key)
        verdict = "相同" if first["score"] == row["score"] else "**不同**"
        lines.append(
            f"重复：{TASK_NAMES[row['task']]}、{row['method']}、种子 {row['seed']} 再做一次，"
            f"分数 {first['score']:.6f} 与 {row['score']:.6f}，{verdict}。"
        )
    if "shuffled" in checks:
        row = checks["shuffled"]
        own = base["forgetting"]["other_tasks"].get(row["task"]) if base is not None else None
        untuned = "" if own is None else f"，没有微调的基座 {own['test_score']:.3f}"
        true = mean(
            [
                r["score"]
                for r in results
                if r["stage"] == "final" and (r["task"], r["method"]) == (row["task"], row["method"])
            ]
        )
        lines.append(
            f"打乱标签：{TASK_NAMES[row['task']]}、{row['method']} 在标签互换的行上训练，分数 {row['score']:.3f} "
            f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]；真标签 {true:.3f}{untuned}；两类各半的抛硬币是 0.5。"
        )
    if "untrained" in checks:
        entries = checks["untrained"]["forgetting"]["other_tasks"]
        scores = "，".join(f"{TASK_NAMES[name]} {entry['test_score']:.3f}" for name, entry in entries.items())
        lines.append(f"什么也没学的模型（同样大小，随机权重）：{scores}。")
    return [("h2", "数字可信吗"), ("list", lines)]
