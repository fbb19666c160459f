"""比较报告的图：SVG，文字画成路径。

没有装中文字体的机器也显示得对：脚本自带 font.ttf（Droid Sans Fallback 的子集，Apache-2.0），matplotlib 用它
把汉字的轮廓直接写进 SVG，看图的机器不需要任何字体。
"""

from pathlib import Path
from typing import Any

FONT = Path(__file__).resolve().parent / "font.ttf"
TASK_NAMES = {"extraction": "抽取", "generation": "生成", "classification": "分类"}
METRIC_NAMES = {"triple_f1": "三元组 F1", "rouge": "ROUGE-L", "label_f1": "宏 F1"}
# 颜色（Okabe–Ito，色盲可辨）与记号
STYLES = {
    "freeze": ("#0072b2", "o"),
    "lora": ("#d55e00", "s"),
    "ptuning": ("#009e73", "^"),
    "full": ("#cc79a7", "D"),
}
BASE_COLOR = "#555555"


def set_up():
    """matplotlib 的设置；返回 pyplot。"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    font_manager.fontManager.addfont(str(FONT))
    name = font_manager.FontProperties(fname=str(FONT)).get_name()
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "path",
            "svg.hashsalt": "comparison",
            "font.family": ["DejaVu Sans", name],
            "axes.unicode_minus": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "font.size": 11,
        }
    )
    return pyplot


def draw_all(plan: dict[str, Any], summary: dict[str, Any], base: dict | None, directory: Path) -> dict[str, str]:
    """画出全部的图，写进 directory → {文件名: 说明}；没有正式结果时为空。"""
    cells, tasks = (
        summary["cells"],
        [task for task in plan["tasks"] if any(t == task["name"] for t, _ in summary["cells"])],
    )
    if not tasks:
        return {}
    pyplot = set_up()
    directory.mkdir(parents=True, exist_ok=True)
    base_scores = {
        name: entry["test_score"]
        for name, entry in (base or {}).get("forgetting", {}).get("other_tasks", {}).items()
        if "test_score" in entry
    }
    figures = {
        "scores.svg": ("各方法的分数与 95% 区间（各种子的平均；小点是各个种子，虚线是没有微调的基座）", draw_scores),
        "score-memory.svg": ("分数对峰值内存：越靠左上越好", draw_against("peak_memory_mb", "峰值内存（MB）", False)),
        "score-parameters.svg": (
            "分数对可训练的参数（对数轴）：越靠左上越好",
            draw_against("trainable_parameters", "可训练的参数", True),
        ),
        "losses.svg": ("训练损失（各种子的平均；token 数相同，步数也相同；没有画只有一步的第一点）", draw_losses),
        "forgetting.svg": ("遗忘：通用文字的 NLL 上升了多少，与基座的 KL 散度；越低越好", draw_forgetting),
    }
    drawn = {}
    for file, (caption, draw) in figures.items():
        figure = draw(pyplot, plan, tasks, cells, base_scores)
        figure.savefig(directory / file, metadata={"Date": None, "Title": caption})
        pyplot.close(figure)
        drawn[file] = caption
    return drawn


def panels(pyplot, tasks: list[dict], height: float = 3.6):
    """一个任务一格，横排 → (figure, [axes])。"""
    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(max(4.5, 3.9 * len(tasks)), height), layout="constrained", squeeze=False
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        axis.set_title(TASK_NAMES[task["name"]], fontsize=12)
    return figure, list(axes[0])


def methods_of(plan: dict, cells: dict, task: str) -> list[str]:
    return [method for method in plan["methods"] if (task, method) in cells]


def draw_scores(pyplot, plan, tasks, cells, base_scores):
    figure, axes = panels(pyplot, tasks)
    for axis, task in zip(axes, tasks, strict=True):
        methods = methods_of(plan, cells, task["name"])
        for place, method in enumerate(methods):
            cell, (color, marker) = cells[task["name"], method], STYLES[method]
            errors = [[max(0.0, cell["score"] - cell["ci_low"])], [max(0.0, cell["ci_high"] - cell["score"])]]
            axis.errorbar(place, cell["score"], yerr=errors, fmt=marker, color=color, markersize=8, capsize=5)
            label = "各种子" if place == 0 else None
            axis.plot([place + 0.2] * len(cell["by_seed"]), cell["by_seed"], ".", color=color, alpha=0.6, label=label)
        if task["name"] in base_scores:
            style = {"color": BASE_COLOR, "linestyle": "--", "linewidth": 1.4, "clip_on": False, "zorder": 3}
            axis.axhline(base_scores[task["name"]], label="没有微调的基座", **style)
        axis.set_xticks(range(len(methods)), methods)
        axis.set_xlim(-0.5, len(methods) - 0.5)
        axis.set_ylim(bottom=-0.02)  # 基座是 0 分时，虚线不与横轴重合
        axis.set_ylabel(METRIC_NAMES[task["metric"]])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=2, loc="outside lower center", fontsize=10)
    return figure


def draw_against(key: str, label: str, is_log: bool):
    """分数对一种开销的图。"""

    def draw(pyplot, plan, tasks, cells, base_scores):
        figure, axes = panels(pyplot, tasks)
        for axis, task in zip(axes, tasks, strict=True):
            for method in methods_of(plan, cells, task["name"]):
                cell, (color, marker) = cells[task["name"], method], STYLES[method]
                errors = [[max(0.0, cell["score"] - cell["ci_low"])], [max(0.0, cell["ci_high"] - cell["score"])]]
                axis.errorbar(
                    cell[key],
                    cell["score"],
                    yerr=errors,
                    fmt=marker,
                    color=color,
                    markersize=8,
                    capsize=4,
                    label=method,
                )
            if is_log:
                axis.set_xscale("log")
            axis.margins(x=0.15)
            axis.set_ylim(bottom=0)
            axis.set_xlabel(label)
            axis.set_ylabel(METRIC_NAMES[task["metric"]])
        figure.legend(
            *axes[0].get_legend_handles_labels(), frameon=False, ncols=4, loc="outside lower center", fontsize=10
        )
        return figure

    return draw


def draw_losses(pyplot, plan, tasks, cells, base_scores):
    figure, axes = panels(pyplot, tasks)
    for axis, task in zip(axes, tasks, strict=True):
        for method in methods_of(plan, cells, task["name"]):
            curves = cells[task["name"], method]["losses"]
            if len(curves[0]) > 2:  # 第一点只是一步，其余是几步的平均：画在一起会看错
                curves = [curve[1:] for curve in curves]
            steps = [step for step, _ in curves[0]]
            if any([step for step, _ in curve] != steps for curve in curves):
                curves = curves[:1]
            values = [sum(points) / len(points) for points in zip(*([v for _, v in c] for c in curves), strict=True)]
            color, marker = STYLES[method]
            axis.plot(steps, values, color=color, marker=marker, markersize=4, linewidth=1.6, label=method)
        axis.set_xlabel("步")
        axis.set_ylabel("损失（nat / 目标 token）")
    axes[0].legend(frameon=False, fontsize=10)
    return figure


def draw_forgetting(pyplot, plan, tasks, cells, base_scores):
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    methods = list(plan["methods"])
    width = 0.8 / len(methods)
    for axis, label, value in (
        (axes[0], "通用文字 NLL 的上升（nat / token）", lambda cell: cell["nll_after"] - cell["nll_before"]),
        (axes[1], "与基座的 KL（nat / token）", lambda cell: cell["kl"]),
    ):
        for index, method in enumerate(methods):
            places = [p for p, task in enumerate(tasks) if (task["name"], method) in cells]
            heights = [value(cells[tasks[p]["name"], method]) for p in places]
            left = [p + (index - (len(methods) - 1) / 2) * width for p in places]
            bars = axis.bar(left, heights, width * 0.92, color=STYLES[method][0], label=method)
            axis.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=8, padding=2)
        axis.set_xticks(range(len(tasks)), [TASK_NAMES[task["name"]] for task in tasks])
        axis.set_ylabel(label)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.margins(y=0.15)
    axes[0].legend(frameon=False, fontsize=10)
    return figure
