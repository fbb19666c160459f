"""bench 的结果：由逐步的记录算出中位数、比值与结论，写成 JSON、Markdown 表与图。"""

import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.programs import TARGETS
from finetune.terminal import markdown_table

# 同一函数在同一精度里，第一步的损失至多差这么多（相对）
FIRST_LOSS_TOLERANCE = {"bf16": 1e-3, "fp32": 1e-5}
LAST_LOSS_TOLERANCE = 0.01
MEMORY_SHARE = 0.5
CACHE_SHARE = 0.85
COLUMNS = ["程序", "说明", "token/s", "最慢–最快", "÷ 第一行", "步，秒", "CPU，秒"]
COLUMNS += ["占矩阵速率", "内存峰值，MB", "首步损失", "平均损失"]


def summarize(program: dict[str, Any], clean_rounds: set[int]) -> dict[str, Any]:
    """一个程序的逐步记录 → 中位数等；没有量到则为空字典。

    program["steps"] 每项有 round、index、is_timed、seconds、cpu_seconds、tokens、loss、peak_rss_mb。
    按长度分组的各步不等长，它的速度取全部各轮的总 token / 总时间；其他程序取干净的各轮的中位数。
    """
    rounds = {step["round"] for step in program["steps"]} if program["is_uneven"] else clean_rounds
    measured = [step for step in program["steps"] if step["is_timed"] and step["round"] in rounds]
    if not measured:
        return {}
    speeds = [step["tokens"] / step["seconds"] for step in measured]
    total = sum(step["tokens"] for step in measured) / sum(step["seconds"] for step in measured)
    return {
        "tokens_per_second": total if program["is_uneven"] else median(speeds),
        "slowest_tokens_per_second": min(speeds),
        "fastest_tokens_per_second": max(speeds),
        "seconds": median(step["seconds"] for step in measured),
        "cpu_seconds": median(step["cpu_seconds"] for step in measured),
        "peak_rss_mb": max(step["peak_rss_mb"] for step in program["steps"]),
        "first_loss": program["steps"][0]["loss"],
        "mean_loss": sum(step["loss"] for step in program["steps"]) / len(program["steps"]),
        "num_rounds": len(measured),
    }


def check_losses(group: dict[str, Any]) -> list[dict[str, Any]]:
    """各程序第一步的损失在精度的噪声之内相同；走过同样的样本之后差 1% 以内。以组里第一个程序为准。"""
    found = []
    programs = [p for p in group["programs"] if p["summary"]]
    same = [p for p in programs if p["same_function"]]
    for program in same[1:]:
        tolerance = FIRST_LOSS_TOLERANCE["bf16" if "bf16" in (program["precision"], same[0]["precision"]) else "fp32"]
        found.append(_compare("第一步的损失", program, same[0], "first_loss", tolerance))
    for program in programs[1:]:
        if program["method"] == programs[0]["method"] and not program["is_uneven"] and group["same_rows"]:
            found.append(_compare("同样的样本之后的损失", program, programs[0], "mean_loss", LAST_LOSS_TOLERANCE))
    return found


def _compare(text: str, program: dict, reference: dict, key: str, tolerance: float) -> dict[str, Any]:
    value, expected = program["summary"][key], reference["summary"][key]
    difference = abs(value - expected) / max(abs(expected), 1e-12)
    return {
        "text": f"{text}：{program['name']} 对 {reference['name']}",
        "value": value,
        "expected": expected,
        "relative_difference": difference,
        "tolerance": tolerance,
        "passed": difference <= tolerance,
    }


def judge(group: dict[str, Any]) -> list[dict[str, Any]]:
    """这一组的各条要求：比值、底线、目标；缺程序的不判。"""
    summaries = {p["name"]: p["summary"] for p in group["programs"] if p["summary"]}
    verdicts = []
    for target in TARGETS:
        if target.group != group["stage"] or target.vocab not in (None, group["vocab_size"]):
            continue
        if target.precision not in (None, group["precision"]) or target.ours not in summaries:
            continue
        others = {n: summaries[n]["tokens_per_second"] for n in target.against if n in summaries}
        if not others:
            continue
        strongest = max(others, key=others.__getitem__)
        ratio = summaries[target.ours]["tokens_per_second"] / others[strongest]
        verdicts.append(_verdict(f"{target.ours} ÷ {strongest}（{target.text}）", ratio, target.floor, target.goal))
    ours = summaries.get("ours")
    if group["stage"] == "lora" and ours:
        for name in ("hf_bs8", "lf_bs8", "trl_bs8"):
            if name in summaries:
                share = ours["peak_rss_mb"] / summaries[name]["peak_rss_mb"]
                text = f"内存峰值 ours ÷ {name}（不高于 {MEMORY_SHARE}）"
                verdicts.append({"text": text, "ratio": share, "passed": share <= MEMORY_SHARE, "reached": None})
        verdicts.append(_verdict("ours 占实测矩阵乘法速率的份额", ours["gemm_share"], 0.0, 0.65))
    if "ours_freeze_cache" in summaries and "ours_freeze" in summaries:
        ratio = summaries["ours_freeze_cache"]["tokens_per_second"] / summaries["ours_freeze"]["tokens_per_second"]
        limit = CACHE_SHARE * group["cache_flops_ratio"]
        text = f"cache_frozen 的第二轮起 ÷ 没有（FLOPs 之比 {group['cache_flops_ratio']:.2f} 的 {CACHE_SHARE}）"
        verdicts.append(_verdict(text, ratio, limit, limit))
    return verdicts


def _verdict(text: str, ratio: float, floor: float, goal: float) -> dict[str, Any]:
    return {
        "text": text,
        "ratio": ratio,
        "floor": floor,
        "goal": goal,
        "passed": ratio >= floor,
        "reached": ratio >= goal,
    }


# ---------------------------------------------------------------------------------------------------------------------
# 写出


def table(group: dict[str, Any]) -> list[str]:
    """一组的 Markdown 表与结论，逐行。"""
    work = group["work"]
    lines = [
        f"## {group['stage']}，词表 {group['vocab_size']}，{group['precision']}，{group['threads']} 线程",
        "",
        f"每步 {group['samples_per_step']} 条，中位 {work['tokens']} 个非补齐 token，"
        f"目标占 {work['target_share']:.1%}，补齐到最长时的效率 {work['padding_efficiency']:.3f}，"
        f"与同一步别的样本共用的开头占 {work['shared_share']:.1%}。"
        f"实测矩阵乘法 {group['gemm_flops'] / 1e9:.0f} GF/s。",
        "" if group["is_quiet"] else "\n**机器不安静（别的进程占用了 CPU）：本组的数字不作结论。**\n",
    ]
    first = next((p["summary"]["tokens_per_second"] for p in group["programs"] if p["summary"]), None)
    rows = []
    for program in group["programs"]:
        s = program["summary"]
        if s:
            cells = [f"**{s['tokens_per_second']:.0f}**"]
            cells += [f"{s['slowest_tokens_per_second']:.0f}–{s['fastest_tokens_per_second']:.0f}"]
            cells += [f"{s['tokens_per_second'] / first:.2f}", f"{s['seconds']:.2f}", f"{s['cpu_seconds']:.2f}"]
            cells += [
                f"{s['gemm_share']:.0%}",
                f"{s['peak_rss_mb']:.0f}",
                f"{s['first_loss']:.4f}",
                f"{s['mean_loss']:.4f}",
            ]
        else:
            cells = [f"没有量到：{program['reason'].split(chr(10))[0].split('；日志')[0]}", *[""] * (len(COLUMNS) - 3)]
        rows.append([program["name"], program["text"], *cells])
    lines += [markdown_table(COLUMNS, rows), ""]
    for verdict in group["verdicts"]:
        floor = f"，底线 {verdict['floor']:.2f}，目标 {verdict['goal']:.2f}" if "floor" in verdict else ""
        state = "达到目标" if verdict["reached"] else "过" if verdict["passed"] else "**未达到**"
        state += "" if group["is_quiet"] else "（机器不安静，不作结论）"
        lines.append(f"- {verdict['text']}：{verdict['ratio']:.2f}{floor} → {state}")
    failed = [check for check in group["loss_checks"] if not check["passed"]]
    lines.append(f"- 损失一致：{len(group['loss_checks']) - len(failed)} / {len(group['loss_checks'])}")
    for check in failed:
        lines.append(
            f"  - **不一致** {check['text']}：{check['value']:.4f} 对 {check['expected']:.4f}"
            f"（差 {check['relative_difference']:.1e}，许 {check['tolerance']:.0e}）"
        )
    return [*lines, ""]


def write_report(directory: Path, tag: str, result: dict[str, Any]) -> list[Path]:
    """写 <tag>.json、<tag>.md、<tag>.png → 写出的文件。"""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{tag}.{suffix}" for suffix in ("json", "md", "png")]
    paths[0].write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    machine = result["machine"]
    lines = [
        f"# {tag}",
        "",
        f"- 机器：{machine['cpu']}，{machine['cores']} 核，{machine['memory_gb']:.0f} GB，"
        f"直接计算 bf16：{'、'.join(machine['bf16_flags']) or '否'}"
        + (f"，{machine['gpu']}" if machine["gpu"] else ""),
        f"- 时间：{result['started']}，开始前 1 分钟负载 {result['load_before']:.2f}",
        f"- 命令：`{result['command']}`",
        "",
    ]
    for group in result["groups"]:
        lines += table(group)
    for section in result.get("sections", []):
        lines += [section["markdown"], ""]
    versions = {
        program["kind"]: program["versions"]
        for group in result["groups"]
        for program in group["programs"]
        if program["versions"]
    }
    lines += ["## 版本", ""]
    lines += [f"- {kind}：" + "，".join(f"{k} {v}" for k, v in found.items()) for kind, found in versions.items()]
    paths[1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not result["groups"]:
        return paths[:2]
    draw(paths[2], result["groups"])
    return paths


def draw(path: Path, groups: list[dict[str, Any]]):
    """各组的速度画成横条：本项目深色，其他程序浅色，细线是最慢到最快。"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [group for group in groups if any(p["summary"] for p in group["programs"])]
    if not groups:
        return
    heights = [sum(bool(p["summary"]) for p in group["programs"]) for group in groups]
    figure, axes = pyplot.subplots(
        len(groups), 1, figsize=(9, 1.2 * len(groups) + 0.32 * sum(heights)), height_ratios=heights, squeeze=False
    )
    for axis, group in zip(axes[:, 0], groups, strict=True):
        programs = [p for p in group["programs"] if p["summary"]]
        speeds = [p["summary"]["tokens_per_second"] for p in programs]
        spans = [
            [speed - p["summary"]["slowest_tokens_per_second"] for p, speed in zip(programs, speeds, strict=True)],
            [p["summary"]["fastest_tokens_per_second"] - speed for p, speed in zip(programs, speeds, strict=True)],
        ]
        spans = [[max(0.0, span) for span in side] for side in spans]
        colors = ["#1f4e79" if p["kind"] == "ours" else "#b8c4d0" for p in programs]
        axis.barh([p["name"] for p in programs], speeds, color=colors, xerr=spans, ecolor="#777777")
        for row, (speed, above) in enumerate(zip(speeds, spans[1], strict=True)):
            axis.text(speed + above, row, f"  {speed:.0f} ({speed / speeds[0]:.2f}x)", va="center", fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.18)
        noisy = "" if group["is_quiet"] else ", NOISY MACHINE"
        axis.set_title(
            f"{group['stage']}, vocabulary {group['vocab_size']}, {group['precision']}, "
            f"{group['threads']} threads{noisy}",
            fontsize=9,
            loc="left",
        )
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("useful (non-padding) tokens per second", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
