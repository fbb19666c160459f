"""比较的报告由 Markdown 变成自成一体的 HTML：图与字体的子集都以 data: 内嵌，不连网。

只认报告自己写出来的几种段落：# 与 ## 标题、> 结论、- 列表、| 表、![说明](figures/名字) 与下一行的说明是图；其余是正文，
** 之间是粗体，` 之间是代码。深色时图有浅的底（图自己的底是透明的），窄的屏幕上表与图各自左右滑动。
"""

import base64
import html
import re
from pathlib import Path

from finetune.comparison.fonts import font_subset

STYLE = """
body { overflow-wrap: anywhere; font: 16px/1.7 "compare", system-ui, "PingFang SC", "Microsoft YaHei", sans-serif;
  max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5em; line-height: 1.35; } h2 { font-size: 1.2em; margin-top: 2.2em; border-bottom: 1px solid #ddd; }
blockquote { margin: 1.2em 0; padding: 0.6em 1em; border-left: 4px solid #0072b2; background: #f2f7fb;
  font-size: 1.08em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 0.92em; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 0.35em 0.8em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #999; }
figure { margin: 1.2em 0; overflow-x: auto; } figure img { max-width: 100%; min-width: 520px; height: auto; }
figcaption { color: #555; font-size: 0.92em; }
@media (max-width: 600px) {
  body { margin: 0.8em auto; font-size: 15px; }
  th, td { padding: 0.35em 0.4em; white-space: normal; overflow-wrap: normal; }
}
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818; } figcaption { color: #aaa; }
  th:first-child, td:first-child { background: #181818; } th, td, h2 { border-color: #444; }
  blockquote { background: #1d2730; } figure img { background: #eee; border-radius: 6px; } }
"""
FACE = """@font-face { font-family: "compare"; src: url(data:font/otf;base64,@FONT@); font-display: block;
  unicode-range: U+2E80-9FFF, U+FF00-FFEF; }
"""
FIGURE = re.compile(r"!\[(.*)\]\((.*)\)\n.*")


def to_html(markdown: str, directory: Path, font: Path | None) -> str:
    """报告的 Markdown → HTML；图从 directory 读；font 里用到的字内嵌，None 时不嵌。"""
    body = "\n".join(paragraph(text, directory) for text in markdown.strip().split("\n\n"))
    face = "" if font is None else FACE.replace("@FONT@", base64.b64encode(font_subset(font, body)).decode())
    title = html.escape(markdown.partition("\n")[0].removeprefix("# "))
    return (
        f'<!DOCTYPE html>\n<html lang="zh-CN"><head><meta charset="utf-8"><title>{title}</title>'
        f'<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{face}{STYLE}</style></head><body>\n{body}\n</body></html>\n"
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
    if text.startswith("> "):
        return "<blockquote>" + "<br>".join(inline(line[2:]) for line in lines) + "</blockquote>"
    if text.startswith("- "):
        return "<ul>" + "".join(f"<li>{inline(line[2:])}</li>" for line in lines) + "</ul>"
    if text.startswith("| "):
        head, _, *body = ([inline(cell.strip()) for cell in line.split("|")[1:-1]] for line in lines)
        head = "".join(f"<th>{cell}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<p>{inline(text)}</p>"


def inline(text: str) -> str:
    """转义，并把成对的 ** 变成 <b>，成对的 ` 变成 <code>。"""
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*(.*?)\*\*", r"<b>\1</b>", text)
