"""predict.py --compare：同样的提示词交给几个检查点，回答并排显示在终端，并写成一个自带样式的 HTML 文件。"""

import gc
import shutil
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch

from chat import note
from data_check import Sample
from predictor import Predictor, short_names
from tables import display_width

MIN_COLUMN = 20
GAP = "  │  "
STYLE = """
body { font-family: sans-serif; margin: 1.5em; line-height: 1.5; color: #222; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { border: 1px solid #ccc; padding: .4em .6em; vertical-align: top; text-align: left;
         white-space: pre-wrap; overflow-wrap: anywhere; }
th { background: #f0f0f0; position: sticky; top: 0; }
th.row { width: 3em; }
tr.differs td.answer { background: #fff6d6; }
.role { color: #888; font-size: .85em; }
"""


def compare(predictors: Sequence[Predictor], rows: list[Sample], device: torch.device, html_path: Path) -> None:
    """各检查点依次载入、预测、放下（内存里至多一个），然后打印并写 HTML；写不了时抛 OSError。"""
    prompts = [predictor.encode_rows(rows) for predictor in predictors]
    names = short_names([predictor.base.path for predictor in predictors])
    answers = []
    for predictor, name, encoded in zip(predictors, names, prompts, strict=True):
        predictor.load_model(device)
        answers.append([record["prediction"] for record in predictor.predict(rows, encoded, title=name)])
        predictor.model = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(comparison_text(names, rows, answers, shutil.get_terminal_size().columns))
    html_path.write_text(comparison_html(names, rows, answers), encoding="utf-8")
    num_different = sum(len(set(row)) > 1 for row in zip(*answers, strict=True))
    note(f"{len(rows)} 行里 {num_different} 行的回答不同；对照表已写到 {html_path}")


def wrap(text: str, width: int) -> list[str]:
    """按显示宽度折行；每个换行符另起一行。"""
    lines = []
    for line in text.split("\n"):
        current, used = "", 0
        for char in line:
            size = display_width(char)
            if used + size > width:
                lines.append(current)
                current, used = "", 0
            current, used = current + char, used + size
        lines.append(current)
    return lines


def side_by_side(cells: Sequence[str], width: int) -> list[str]:
    """把几段文字排成等宽的几栏，共 width 列。"""
    column = (width - display_width(GAP) * (len(cells) - 1)) // len(cells)
    wrapped = [wrap(cell, column) for cell in cells]
    height = max(len(lines) for lines in wrapped)
    padded = [[*lines, *[""] * (height - len(lines))] for lines in wrapped]
    return [
        GAP.join(cell + " " * (column - display_width(cell)) for cell in line).rstrip()
        for line in zip(*padded, strict=True)
    ]


def comparison_text(names: Sequence[str], rows: list[Sample], answers: list[list[str]], width: int) -> str:
    """终端里的对照：每行先是提示词与参考，再是各检查点的回答；终端太窄时不并排，上下相接。"""
    is_wide = (width - display_width(GAP) * (len(names) - 1)) // len(names) >= MIN_COLUMN
    lines = []
    for index, row in enumerate(rows):
        lines.append(f"── 第 {row.line} 行 " + "─" * 20)
        lines += [f"{role}：{text}" for role, text in row.messages]
        lines += [f"参考：{reference}" for reference in row.references or ()]
        lines.append("")
        found = [column[index] for column in answers]
        if is_wide:
            lines += [*side_by_side(names, width), *side_by_side(found, width)]
        else:
            lines += [f"{name}：{answer}" for name, answer in zip(names, found, strict=True)]
        lines.append("")
    return "\n".join(lines)


def comparison_html(names: Sequence[str], rows: list[Sample], answers: list[list[str]]) -> str:
    """一个不引用任何外部文件的 HTML；回答不同的行有底色。"""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = []
    for index, row in enumerate(rows):
        found = [column[index] for column in answers]
        prompt = "\n".join(f'<span class="role">{role}</span> {escape(text)}' for role, text in row.messages)
        reference = "\n".join(escape(text) for text in row.references or ())
        cells = "".join(f'<td class="answer">{escape(answer)}</td>' for answer in found)
        kind = "differs" if len(set(found)) > 1 else "same"
        body.append(f'<tr class="{kind}"><td>{row.line}</td><td>{prompt}</td><td>{reference}</td>{cells}</tr>')
    return (
        '<!DOCTYPE html>\n<html lang="zh"><head><meta charset="utf-8"><title>检查点对照</title>'
        f"<style>{STYLE}</style></head><body>\n<table>\n"
        f'<thead><tr><th class="row">行</th><th>提示</th><th>参考</th>{head}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(body)}\n</tbody></table>\n</body></html>\n"
    )
