"""predict.py --compare：同样的提示词交给几个检查点，回答并排显示在终端，并写成一个自带样式的 HTML 文件。

换行符写成 ↵，连着的合成一处，空白的回答写成（空）；与参考相同的回答前有 ✓。
"""

import gc
import re
import shutil
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path

import torch

from finetune.data.samples import Sample
from finetune.inference.predict_file import score
from finetune.inference.predictor import Predictor, prediction_dtype, sampling_options, short_names
from finetune.metrics.bootstrap import normalize
from finetune.metrics.table import NAMES
from finetune.process.accelerator import empty_cache, is_card
from finetune.terminal import display_width, format_table, note, visible

MIN_COLUMN = 20
GAP = "  │  "
RIGHT = "✓ "
STYLE = """
body { font-family: sans-serif; margin: 1.5em; line-height: 1.5; color: #222; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { border: 1px solid #ccc; padding: .4em .6em; vertical-align: top; text-align: left;
         white-space: pre-wrap; overflow-wrap: anywhere; }
th { background: #f0f0f0; position: sticky; top: 0; }
th.row { width: 3em; }
tr.differs td.answer { background: #fff6d6; }
tr td.right { box-shadow: inset 3px 0 #2a8a4a; }
.role, .path { color: #666; font-size: .85em; font-weight: normal; }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd; }
  th, td { border-color: #444; }
  th { background: #262626; }
  tr.differs td.answer { background: #38321c; }
  .role, .path { color: #999; }
}
"""


def compare(predictors: Sequence[Predictor], rows: list[Sample], device: torch.device, html_path: Path) -> None:
    """各检查点依次载入、预测、放下（内存里至多一个），然后打印并写 HTML；写不了时抛 OSError。"""
    prompts = [predictor.encode_rows(rows) for predictor in predictors]
    names = short_names([predictor.base.path for predictor in predictors])
    metric, answers, scores = predictors[0].args.metric, [], []
    for predictor, name, encoded in zip(predictors, names, prompts, strict=True):
        predictor.load_model(device)
        records = predictor.predict(rows, encoded, title=name)
        answers.append([shown_answer(record["prediction"], row) for record, row in zip(records, rows, strict=True)])
        scores += [score(metric, rows, records)] if metric is not None else []
        predictor.model = None
        gc.collect()
        if is_card(device):
            empty_cache()
    print(comparison_text(names, rows, answers, shutil.get_terminal_size().columns))
    found = [f"{result['score']:.4f} [{result['ci_low']:.4f}, {result['ci_high']:.4f}]" for result in scores]
    if found:
        print(format_table(["检查点", f"{NAMES[metric]}（95% 区间）"], list(zip(names, found, strict=True))))
    details = [column_details(predictor) for predictor in predictors]
    if found:
        details = [f"{NAMES[metric]} {text}\n{detail}" for text, detail in zip(found, details, strict=True)]
    settings = comparison_settings(predictors[0], device)
    page = comparison_html(list(zip(names, details, strict=True)), settings, rows, answers)
    html_path.write_text(page, encoding="utf-8")
    num_different = sum(len(set(row)) > 1 for row in zip(*answers, strict=True))
    note(f"{len(rows)} 行里 {num_different} 行的回答不同；对照表已写到 {html_path}")


def column_details(predictor: Predictor) -> str:
    """一栏的出处：检查点的完整路径，适配器还有基座的，以及提示词格式。"""
    checkpoint = predictor.base
    base = f"\n基座 {checkpoint.base_path.resolve()}" if checkpoint.is_adapter else ""
    return f"{checkpoint.path.resolve()}{base}\n提示词格式 {checkpoint.prompting.prompt_format}"


def comparison_settings(predictor: Predictor, device: torch.device) -> str:
    """各栏共同的设置与现在的时间，一行。"""
    args, sampling = predictor.args, sampling_options(predictor.args)
    if sampling:
        chosen = {**sampling, "seed": args.seed, "batch_size": args.batch_size}
        how = "采样（" + "、".join(f"{name} {value}" for name, value in chosen.items() if name != "do_sample") + "）"
    else:
        how = "贪心"
    parts = [f"max_new_tokens {args.max_new_tokens}", how, f"repetition_penalty {args.repetition_penalty}"]
    parts += [f"max_src_len {args.max_src_len}"] if args.max_src_len is not None else []
    parts += [f"stop {args.stop}"] if args.stop else []
    quantized = next((f"，基座 {bits} 位" for bits in (4, 8) if getattr(args, f"load_in_{bits}bit")), "")
    dtype = str(prediction_dtype(args.precision, device)).removeprefix("torch.")
    parts.append(f"精度 {dtype}{quantized}，设备 {device}")
    return "；".join([*parts, datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")])


def compact(text: str) -> str:
    """换行符写成 ↵，空行并进前一处；全是空白的写成（空）。"""
    return re.sub(r"\s*\n\s*", "↵\n", visible(text)).removesuffix("\n") if text.strip() else "（空）"


def shown_answer(answer: str, row: Sample) -> str:
    """一个回答；与某一条参考相同（规范化之后）的前面有 ✓。"""
    is_right = normalize(answer) in [normalize(reference) for reference in row.references or ()]
    return f"{RIGHT}{compact(answer)}" if is_right else compact(answer)


def wrap(text: str, width: int) -> list[str]:
    """按显示宽度折行；每个换行符另起一行，控制字符换成看得见的。"""
    lines = []
    for line in visible(text).split("\n"):
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
    """终端里的对照：每行先是提示词与参考，再是各检查点的回答（已是 shown_answer 的写法）；终端太窄时上下相接。"""
    is_wide = (width - display_width(GAP) * (len(names) - 1)) // len(names) >= MIN_COLUMN
    lines = []
    for index, row in enumerate(rows):
        lines.append(f"── 第 {row.line} 行 " + "─" * 20)
        lines += [visible(f"{role}：{text}") for role, text in row.messages]
        lines += [f"参考：{compact(reference)}" for reference in row.references or ()]
        lines.append("")
        found = [column[index] for column in answers]
        if is_wide:
            lines += [*side_by_side(names, width), *side_by_side(found, width)]
        else:
            lines += [visible(f"{name}：{answer}") for name, answer in zip(names, found, strict=True)]
        lines.append("")
    return "\n".join(lines)


def comparison_html(
    heads: Sequence[tuple[str, str]], settings: str, rows: list[Sample], answers: list[list[str]]
) -> str:
    """一个不引用任何外部文件的 HTML；heads 是各栏的（名字, 出处），settings 是共同的设置；回答不同的行有底色。"""
    head = "".join(f'<th>{escape(name)}\n<span class="path">{escape(details)}</span></th>' for name, details in heads)
    body = []
    for index, row in enumerate(rows):
        found = [column[index] for column in answers]
        prompt = "\n".join(f'<span class="role">{role}</span> {escape(text)}' for role, text in row.messages)
        reference = "\n".join(escape(compact(text)) for text in row.references or ())
        cells = "".join(
            f'<td class="answer{" right" if answer.startswith(RIGHT) else ""}">{escape(answer)}</td>'
            for answer in found
        )
        kind = "differs" if len(set(found)) > 1 else "same"
        body.append(f'<tr class="{kind}"><td>{row.line}</td><td>{prompt}</td><td>{reference}</td>{cells}</tr>')
    return (
        '<!DOCTYPE html>\n<html lang="zh"><head><meta charset="utf-8"><title>检查点对照</title>'
        f"<style>{STYLE}</style></head><body>\n<p>{escape(settings)}</p>\n<table>\n"
        f'<thead><tr><th class="row">行</th><th>提示</th><th>参考</th>{head}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(body)}\n</tbody></table>\n</body></html>\n"
    )
