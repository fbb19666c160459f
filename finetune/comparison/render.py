"""比较的报告由 Markdown 变成自成一体的 HTML：图与字体的子集都以 data: 内嵌，不连网。

只认报告自己写出来的几种段落：# 与 ## 标题、- 列表、| 表、![说明](figures/名字) 与下一行的说明是图；其余是正文，
** 之间是粗体。
正文的汉字在没有装中文字体的机器上由内嵌的字体显示。
"""

import base64
import html
import re
from io import BytesIO
from pathlib import Path

from finetune.comparison.plots import FONT

STYLE = """
@font-face { font-family: "compare"; src: url(data:font/ttf;base64,@FONT@); font-display: block;
  unicode-range: U+2E80-9FFF, U+FF00-FFEF; }
body { font: 16px/1.65 "compare", system-ui, sans-serif;
  max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1em 0; font-size: 0.92em; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: 0.3em 0.7em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { background: #f3f3f3; }
figure { margin: 1.2em 0; } figure img { max-width: 100%; height: auto; } figcaption { color: #444; font-size: 0.92em; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818; } th { background: #262626; }
  th, td, h2 { border-color: #444; } figcaption { color: #aaa; } }
"""
FIGURE = re.compile(r"!\[(.*)\]\((.*)\)\n.*")


def to_html(markdown: str, directory: Path) -> str:
    """报告的 Markdown → HTML；图从 directory 读。"""
    body = "\n".join(paragraph(text, directory) for text in markdown.strip().split("\n\n"))
    style = STYLE.replace("@FONT@", base64.b64encode(font_subset(body)).decode())
    title = html.escape(markdown.partition("\n")[0].removeprefix("# "))
    return (
        f'<!DOCTYPE html>\n<html lang="zh-CN"><head><meta charset="utf-8"><title>{title}</title>'
        f'<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width">'
        f"<style>{style}</style></head><body>\n{body}\n</body></html>\n"
    )


def paragraph(text: str, directory: Path) -> str:
    """一段 Markdown → HTML。"""
    if figure := FIGURE.fullmatch(text):
        picture = base64.b64encode((directory / figure[2]).read_bytes()).decode()
        caption = html.escape(figure[1])
        image = f'<img alt="{caption}" src="data:image/svg+xml;base64,{picture}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    if text.startswith("#"):
        marks, _, title = text.partition(" ")
        return f"<h{len(marks)}>{inline(title)}</h{len(marks)}>"
    lines = text.split("\n")
    if text.startswith("- "):
        return "<ul>" + "".join(f"<li>{inline(line[2:])}</li>" for line in lines) + "</ul>"
    if text.startswith("| "):
        head, _, *body = ([inline(cell.strip()) for cell in line.split("|")[1:-1]] for line in lines)
        head = "".join(f"<th>{cell}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<p>{inline(text)}</p>"


def inline(text: str) -> str:
    """转义，并把成对的 ** 变成 <b>。"""
    return re.sub(r"\*\*(.*?)\*\*", r"<b>\1</b>", html.escape(text))


def font_subset(text: str) -> bytes:
    """自带字体里 text 用到的字，TrueType 的字节。"""
    from fontTools import subset

    options = subset.Options(notdef_outline=True, hinting=False, layout_features=[])
    font = subset.load_font(str(FONT), options)
    font["head"].modified = font["head"].created  # 同样的文字得到同样的字节
    font.recalcTimestamp = False
    subsetter = subset.Subsetter(options)
    subsetter.populate(text=text)
    subsetter.subset(font)
    stream = BytesIO()
    font.save(stream)
    return stream.getvalue()
