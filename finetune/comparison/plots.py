"""比较报告的图：SVG，底是透明的。

有中文字体时（fonts.py）文字画成路径，看图的机器不需要字体；没有时写成文字，由看图的机器的字体显示。
"""

import logging
import warnings
from pathlib import Path
from typing import Any

from finetune.comparison.fonts import simplified
from finetune.comparison.plan import METRIC_NAMES, TASK_NAMES

# 颜色（Okabe–Ito，色盲可辨）与记号，依计划里的次序
STYLES = [
    *(("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D")),
    *(("#e69f00", "v"), ("#56b4e9", "P"), ("#999999", "X"), ("#882255", "*")),
]
BASE_STYLE = {"color": "#555555", "linestyle": "--", "linewidth": 1.4, "clip_on": False, "zorder": 3}
CHANCE_STYLE = {**BASE_STYLE, "color": "#999999", "linestyle": ":"}
FIGURES = {
    "scores.svg": "各方法的分数与 95% 区间（各种子的平均；小点是各个种子，虚线是没有微调的基座，点线是碰运气）",
    "score-memory.svg": "分数对峰值内存：越靠左上越好",
    "score-time.svg": "分数对一次训练的时间：越靠左上越好",
    "score-forgetting.svg": "分数对通用文字 NLL 的上升：越靠左上越好",
    "losses.svg": "训练损失（各种子的平均；token 数相同，步数也相同；没有画只有一步的第一点）",
    "forgetting.svg": "遗忘：通用文字的 NLL 上升了多少，与基座的 KL 散度；越低越好",
}
LEGEND = {"frameon": False, "loc": "outside lower center", "fontsize": 10}


def style_of(plan: dict[str, Any], method: str) -> tuple[str, str]:
    """一种方法的颜色与记号。"""
    return STYLES[list(plan["methods"]).index(method) % len(STYLES)]


def set_up(font: Path | None):
    """matplotlib 的设置；返回 pyplot。"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    families, kind = ["DejaVu Sans"], "none"
    if font is not None:
        font_manager.fontManager.addfont(str(font))
        faces = [entry for entry in font_manager.fontManager.ttflist if entry.fname == str(font)]
        chosen = simplified(font)  # 3.11 起的 matplotlib 认得合集里的各个，以前的只有第一个
        face = next((entry for entry in faces if getattr(entry, "index", 0) == chosen), faces[0])
        families, kind = [*families, face.name], "path"
    # 字体里没有的字，由看图的机器显示
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    spines = {f"axes.spines.{side}": False for side in ("top", "right")}
    fonts = {"svg.fonttype": kind, "font.family": families, "font.size": 11}
    grid = {"axes.grid": True, "grid.alpha": 0.25, "axes.unicode_minus": False}
    matplotlib.rcParams.update({"svg.hashsalt": "comparison", **spines, **fonts, **grid})
    return pyplot


def draw_all(plan: dict[str, Any], summary: dict[str, Any], base: dict | None, directory: Path, font: Path | None):
    """画出 FIGURES 的各图，写进 directory；没有正式结果时不画。"""
    cells = summary["cells"]
    tasks = [task for task in plan["tasks"] if any(name == task["name"] for name, _ in cells)]
    if not tasks:
        return
    pyplot = set_up(font)
    directory.mkdir(parents=True, exist_ok=True)
    shared = (pyplot, plan, tasks, cells)
    figures = [
        draw_scores(*shared, base, summary["chance"]),
        draw_against(*shared, "peak_memory_mb", "峰值内存（MB）", "linear"),
        draw_against(*shared, "seconds", "一次训练（秒）", "linear"),
        draw_against(*shared, "rise", "通用文字 NLL 的上升（nat / token）", "linear"),
        draw_losses(*shared),
        draw_forgetting(*shared),
    ]
    for (file, caption), figure in zip(FIGURES.items(), figures, strict=True):
        metadata = {"Date": None, "Title": caption}
        figure.savefig(directory / file, transparent=True, bbox_inches="tight", metadata=metadata)
        pyplot.close(figure)


def panels(pyplot, plan: dict, tasks: list[dict], cells: dict, label: str | None = None):
    """一个任务一格，横排 → (figure, [(axis, 任务, {方法: 汇总})])；label 是纵轴的字，缺省为指标的名字。"""
    size = (max(4.5, 3.9 * len(tasks)), 3.6)
    figure, (axes,) = pyplot.subplots(1, len(tasks), figsize=size, layout="constrained", squeeze=False)
    found = []
    for axis, task in zip(axes, tasks, strict=True):
        axis.set_title(TASK_NAMES[task["name"]], fontsize=12)
        axis.set_ylabel(label or METRIC_NAMES[task["metric"]])
        own = {method: cells[task["name"], method] for method in plan["methods"] if (task["name"], method) in cells}
        found.append((axis, task, own))
    return figure, found


def draw_point(axis, place: float, cell: dict, look: tuple[str, str], **style):
    """一种方法的分数与区间。"""
    errors = [[max(0.0, cell["score"] - cell["ci_low"])], [max(0.0, cell["ci_high"] - cell["score"])]]
    color, marker = look
    axis.errorbar(place, cell["score"], yerr=errors, fmt=marker, color=color, markersize=8, **style)


def draw_scores(pyplot, plan, tasks, cells, base, chance):
    figure, found = panels(pyplot, plan, tasks, cells)
    for axis, task, methods in found:
        for place, (method, cell) in enumerate(methods.items()):
            color, _ = look = style_of(plan, method)
            draw_point(axis, place, cell, look, capsize=5)
            seeds, label = cell["by_seed"], None if place else "各种子"
            axis.plot([place + 0.2] * len(seeds), seeds, ".", color=color, alpha=0.6, label=label)
        if base is not None:
            score = base["forgetting"]["other_tasks"][task["name"]]["test_score"]
            axis.axhline(score, label="没有微调的基座", **BASE_STYLE)
        if chance[task["name"]] is not None:
            axis.axhline(chance[task["name"]], label="碰运气", **CHANCE_STYLE)
        axis.set_xticks(range(len(methods)), methods, rotation=25 if len(methods) > 4 else 0)
        axis.set_xlim(-0.5, len(methods) - 0.5)
        axis.set_ylim(bottom=-0.03 * axis.get_ylim()[1])  # 基座是 0 分时，虚线不与横轴重合
    labels = {}
    for axis, _, _ in found:
        labels.update({label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)})
    figure.legend(labels.values(), labels.keys(), ncols=3, **LEGEND)
    return figure


def draw_against(pyplot, plan, tasks, cells, key: str, label: str, scale: str):
    """分数对一种开销的图。"""
    figure, found = panels(pyplot, plan, tasks, cells)
    for axis, _, methods in found:
        for method, cell in methods.items():
            draw_point(axis, cell[key], cell, style_of(plan, method), capsize=4, label=method)
        axis.set_xscale(scale)
        axis.margins(x=0.15)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(label)
    labels = {}
    for axis, _, _ in found:
        labels.update({label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)})
    figure.legend(labels.values(), labels.keys(), ncols=4, **LEGEND)
    return figure


def draw_losses(pyplot, plan, tasks, cells):
    figure, found = panels(pyplot, plan, tasks, cells, "损失（nat / 目标 token）")
    for axis, _, methods in found:
        for method, cell in methods.items():
            # 第一点只是一步，其余是几步的平均：画在一起会看错
            curves = [curve[1:] if len(curve) > 2 else curve for curve in cell["losses"]]
            steps = [step for step, _ in curves[0]]
            curves = [curve for curve in curves if [step for step, _ in curve] == steps]
            values = [sum(loss for _, loss in points) / len(points) for points in zip(*curves, strict=True)]
            color, marker = style_of(plan, method)
            axis.plot(steps, values, color=color, marker=marker, markersize=4, linewidth=1.6, label=method)
        axis.set_xlabel("步")
    found[0][0].legend(frameon=False, fontsize=10)
    return figure


def draw_forgetting(pyplot, plan, tasks, cells):
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    width = 0.8 / len(plan["methods"])
    labels = {"rise": "通用文字 NLL 的上升（nat / token）", "kl": "与基座的 KL（nat / token）"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for index, method in enumerate(plan["methods"]):
            places = [p for p, task in enumerate(tasks) if (task["name"], method) in cells]
            heights = [cells[tasks[p]["name"], method][key] for p in places]
            left = [p + (index - (len(plan["methods"]) - 1) / 2) * width for p in places]
            axis.bar(left, heights, width * 0.92, color=style_of(plan, method)[0], label=method)
        axis.set_xticks(range(len(tasks)), [TASK_NAMES[task["name"]] for task in tasks])
        is_log = min(cell[key] for cell in cells.values()) > 0
        axis.set_ylabel(f"{label}，对数" if is_log else label)
        if is_log:
            axis.set_yscale("log")  # 各任务差着数量级
        else:
            axis.axhline(0, color="black", linewidth=0.8)
    axes[0].legend(frameon=False, fontsize=10)
    return figure
