"""终端里的文本表格：按全角字符的显示宽度对齐，以及指标结果的排版。"""

import unicodedata
from collections.abc import Sequence
from typing import Any


def display_width(text: str) -> int:
    """等宽终端里的显示宽度：全角字符占两列。"""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """按显示宽度对齐的文本表，第一列左对齐，其余右对齐。"""
    widths = [max(display_width(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = []
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            blank = " " * (width - display_width(cell))
            padded.append(blank + cell if column else cell + blank)
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def format_result(result: dict[str, Any]) -> str:
    """把指标函数的返回值排成表：各分数与 95% 区间，计数，以及按关系或标签的分列。"""
    details = result["details"]
    scored = {result["metric"]: result, **{k: v for k, v in details.items() if isinstance(v, dict) and "ci_low" in v}}
    rows = [[name, f"{v['score']:.4f}", f"[{v['ci_low']:.4f}, {v['ci_high']:.4f}]"] for name, v in scored.items()]
    parts = [format_table([f"指标（{result['num_rows']} 行）", "分数", "95% 区间"], rows)]
    numbers = [f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in details.items() if _is_number(v)]
    if numbers:
        parts.append("，".join(numbers))
    for key, title in (("per_relation", "关系"), ("per_label", "标签")):
        if details.get(key):
            rows = [
                [name, *(f"{v[k]:.4f}" for k in ("precision", "recall", "f1")), str(v["predicted"]), str(v["expected"])]
                for name, v in details[key].items()
            ]
            parts.append(format_table([title, "精确率", "召回率", "F1", "预测数", "参考数"], rows))
    return "\n\n".join(parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
