"""数据体检的报告：终端里的文字与直方图、给程序读的 JSON、图片。"""

from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

from finetune.terminal import format_table

PERCENTILES = (50, 90, 95, 99, 100)
NUM_BINS, BAR_COLUMNS = 16, 40
_BLOCKS = " ▏▎▍▌▋▊▉█"
_VERDICTS = {0: "没有问题", 1: "有警告：能训练，但请看看是否是本意", 2: "有错误：训练会拒绝这份数据，请先改正"}
_SEVERITY_NAMES = {"error": "错误", "warning": "警告", "note": "说明"}
_KINDS = {
    "array": "JSON 数组没有写完或写错",
    "bom": "开头有 BOM",
    "blank_output": "回答只有空白",
    "conflict": "输入相同而回答不同",
    "control_token": "文字里有控制符号",
    "cr": "只用 CR 换行",
    "crlf": "用 CRLF 换行",
    "duplicate": "与前面的一行完全相同",
    "empty_output": "回答是空的",
    "encoding": "编码不是 UTF-8",
    "field": "字段缺少或写错",
    "field_name": "字段名像是写错了",
    "file": "文件读不了",
    "json": "不是合法的 JSON",
    "label_balance": "标签不均匀",
    "label_unseen": "训练集里没有的标签",
    "label_variant": "同一个标签的不同写法",
    "no_target": "没有任何目标 token",
    "odd_character": "损坏或看不见的字符",
    "plain_turns": "多轮对话而提示格式是 plain",
    "prompt": "提示拼不出来",
    "row": "一行不是 JSON 对象",
    "shared_document": "文档在训练集里出现过",
    "shared_input": "输入在训练集里出现过",
    "src_cut": "提示超长被截短",
    "tgt_cut": "回答超长被截短",
}
_LENGTH_NAMES = {"src": "提示", "tgt": "回答", "total": "全长"}


# ---- 长度 ----


def percentile(lengths: Counter, percent: float) -> int:
    """第 percent 百分位（取较小的一个）。"""
    values = sorted(lengths)
    rank = (lengths.total() - 1) * percent / 100
    passed = accumulate(lengths[value] for value in values)
    return next(value for value, count in zip(values, passed, strict=True) if count > rank)


def histogram(lengths: Counter) -> list[tuple[int, int, int]]:
    """[(下界, 上界, 行数)]，等宽的至多 NUM_BINS 段；最长的 1% 有可能并入末段。"""
    smallest, largest, high = min(lengths), max(lengths), percentile(lengths, 99)
    steps = (step * 10**k for k in range(12) for step in (1, 2, 5))
    width = next(step for step in steps if high // step - smallest // step < NUM_BINS)
    start, last = smallest // width, high // width
    counts = Counter()
    for length, count in lengths.items():
        counts[min(length // width, last)] += count
    bins = [(index * width, (index + 1) * width - 1, counts[index]) for index in range(start, last + 1)]
    return [*bins[:-1], (bins[-1][0], max(largest, bins[-1][1]), bins[-1][2])]


def bar(share: float) -> str:
    """占比 share（0 到 1）的横条，精确到八分之一格；不为零的至少看得见。"""
    eighths = max(round(share * BAR_COLUMNS * 8), 1 if share > 0 else 0)
    return ("█" * (eighths // 8) + _BLOCKS[eighths % 8]).rstrip()


def draw_bars(title: str, rows: list[tuple[str, int, str]]) -> str:
    """[(名称, 行数, 附注)] 画成带横条的表；名称按显示宽度对齐，横条与附注在最后，不影响对齐。"""
    total, largest = sum(count for _, count, _ in rows), max(count for _, count, _ in rows)
    cells = [[name, str(count), f"{count / total:.1%}"] for name, count, _ in rows]
    header, rule, *lines = format_table([title, "行数", "占比"], cells).split("\n")
    drawn = [
        f"{line}  {bar(count / largest)} {mark}".rstrip() for line, (_, count, mark) in zip(lines, rows, strict=True)
    ]
    return "\n".join([header, rule, *drawn])


def draw_lengths(report, encoding) -> str:
    """全长的直方图；有分词器时标出 --max_len 所在的一段。"""
    bins = histogram(report.lengths["total"])
    digits = len(str(bins[-1][1]))
    limit = encoding.max_len if encoding else None
    rows = []
    for low, high, count in bins:
        mark = f"← --max_len {limit}" if limit is not None and low <= limit <= high else ""
        rows.append((f"{low:>{digits}}-{high:<{digits}}", count, mark))
    return draw_bars(f"全长（{unit_of(encoding)}）", rows)


def unit_of(encoding) -> str:
    return "字符" if encoding is None else "token"


# ---- 文字 ----


def render(reports: list, totals: dict[str, int], encoding, exit_code: int, max_examples: int) -> str:
    """整份报告：结论、各种发现的数目、每种至多 max_examples 个例子，最后是每个文件的统计。"""
    verdict = [f"结论：{_VERDICTS[exit_code]}（退出码 {exit_code}）", *map(_describe_file, reports)]
    verdict += _totals_lines(reports, totals)
    counts = sum((report.counts for report in reports), Counter())
    order = list(_SEVERITY_NAMES)
    ranked = sorted(counts.items(), key=lambda item: (order.index(item[0][0]), -item[1], item[0][1]))
    rows, examples = [], []
    for (severity, code), count in ranked:
        name = _SEVERITY_NAMES[severity]
        rows.append([f"{_KINDS[code]}（{code}）", name, str(count)])
        shown = [finding for report in reports for finding in report.findings[code]][:max_examples]
        rest = f"，共 {count} 处，先列 {len(shown)} 处" if count > len(shown) else ""
        examples.append("\n".join([f"{name}：{_KINDS[code]}{rest}", *(f"  {finding}" for finding in shown)]))
    table = [format_table(["发现", "级别", "数目"], rows)] if rows else []
    return "\n\n".join(
        ["\n".join(verdict), *table, *examples, *(_lengths_and_labels(r, encoding) for r in reports)]
    ).rstrip()


def _describe_file(report) -> str:
    kind = "测试数据" if report.split == "predict" else "训练数据"
    text = f"{kind} {report.path}：{report.num_rows} 行，可用的样本 {report.num_samples} 条"
    for name, counts in (("写法", report.formats), ("没有用上的字段", report.unused)):
        if counts:
            text += f"；{name}：" + "、".join(f"{key} {count} 行" for key, count in counts.most_common(20))
    return text


def _lengths_and_labels(report, encoding) -> str:
    if not report.num_samples:
        return ""
    cells = [
        [_LENGTH_NAMES[name], *(str(percentile(lengths, p)) for p in PERCENTILES)]
        for name, lengths in report.lengths.items()
    ]
    header = [f"长度（{unit_of(encoding)}）", *(f"p{p}" if p < 100 else "最长" for p in PERCENTILES)]
    parts = [f"{report.path} 的长度与标签", format_table(header, cells), draw_lengths(report, encoding)]
    if report.is_labelled:
        labels = report.labels.most_common(20)
        parts.append(
            draw_bars(f"标签（{len(report.labels)} 种）", [(repr(name)[1:-1][:30], n, "") for name, n in labels])
        )
    return "\n\n".join(parts)


def _totals_lines(reports: list, totals: dict[str, int]) -> list[str]:
    num_samples = sum(report.num_samples for report in reports)
    if not num_samples:
        return []
    lines = [
        f"重复 {totals['duplicate']} 行；输入相同而回答不同的 {totals['conflict']} 组；"
        f"{num_samples} 条样本来自 {totals['documents']} 篇不同的文档"
    ]
    if reports[-1].split == "predict":
        lines.append(
            f"测试集 {reports[-1].num_samples} 条中，输入在训练集里出现过的 {totals['shared_input']} 条，"
            f"文档在训练集里出现过的 {totals['shared_document']} 条"
        )
    return lines


# ---- JSON ----


def to_json(reports: list, totals: dict[str, int], encoding, exit_code: int) -> dict[str, Any]:
    """给程序读的全部结果；version 在结构改变时加一。"""
    return {
        "version": 1,
        "exit_code": exit_code,
        "length_unit": "character" if encoding is None else "token",
        "limits": None if encoding is None else {"max_len": encoding.max_len, "max_src_len": encoding.max_src_len},
        "totals": totals,
        "files": [_file_json(report) for report in reports],
        "findings": [f._asdict() for report in reports for found in report.findings.values() for f in found],
    }


def _file_json(report) -> dict[str, Any]:
    has_samples = report.num_samples > 0
    return {
        "path": report.path,
        "split": report.split,
        "num_rows": report.num_rows,
        "num_samples": report.num_samples,
        "formats": dict(report.formats.most_common()),
        "unused_fields": dict(report.unused.most_common()),
        "counts": [{"severity": s, "code": code, "count": n} for (s, code), n in sorted(report.counts.items())],
        "length_percentiles": {
            name: {f"p{p}": percentile(lengths, p) for p in PERCENTILES} if has_samples else {}
            for name, lengths in report.lengths.items()
        },
        "length_histogram": histogram(report.lengths["total"]) if has_samples else [],
        "labels": dict(report.labels.most_common()) if report.is_labelled else None,
    }


# ---- 图片 ----


def draw_picture(path: str | Path, reports: list, encoding) -> None:
    """把各文件的长度分布（与标签的行数）画成图片；图里用英文，没有中文字体的机器也能看。

    Raises:
        ValueError: 没有任何样本可画，或扩展名不是 matplotlib 认得的图片格式。
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [report for report in reports if report.num_samples]
    if not drawn:
        raise ValueError(f"没有可用的样本，画不出 --picture {path}，请先改正数据里的错误")
    figure, grid = pyplot.subplots(len(drawn), 2, figsize=(11, 3.4 * len(drawn)), layout="constrained", squeeze=False)
    unit = "characters" if encoding is None else "tokens"
    for index, (report, (left, right)) in enumerate(zip(drawn, grid, strict=True), start=1):
        kind = "test" if report.split == "predict" else "train"
        high = max(percentile(report.lengths["total"], 99.5), 1)
        if encoding:
            high = max(high, round(1.05 * encoding.max_len))
        for name, color in (("total", "#4c78a8"), ("src", "#54a24b"), ("tgt", "#f58518")):
            lengths = report.lengths[name]
            style = {"alpha": 0.35} if name == "total" else {"histtype": "step", "linewidth": 1.6}
            weights = list(lengths.values())
            left.hist(list(lengths), weights=weights, bins=60, range=(0, high), color=color, label=name, **style)
        if encoding:
            left.axvline(encoding.max_len, color="#e45756", linestyle="--", linewidth=1.2, label="max_len")
            left.axvline(encoding.max_src_len, color="#b279a2", linestyle=":", linewidth=1.4, label="max_src_len")
        left.set(title=f"file {index} ({kind}): lengths, {report.num_samples} rows", xlabel=unit, ylabel="rows")
        left.legend(framealpha=0.9, edgecolor="none")
        if report.is_labelled:
            counts = [count for _, count in report.labels.most_common(20)]
            right.bar([f"#{rank}" for rank in range(1, len(counts) + 1)], counts, color="#4c78a8")
            right.set(title=f"file {index} ({kind}): {len(report.labels)} labels by rank", ylabel="rows")
        else:
            values = sorted(report.lengths["total"].items())
            total, passed = report.num_samples, 0
            shares = [(passed := passed + count) / total for _, count in values]
            right.plot([value for value, _ in values], shares, color="#4c78a8", linewidth=1.6)
            right.set(title=f"file {index} ({kind}): share of rows up to a length", xlabel=unit, ylim=(0, 1.02))
            right.set_xlim(0, high)
            right.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=150)
    finally:
        pyplot.close(figure)
