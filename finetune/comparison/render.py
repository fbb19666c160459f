"""把比较报告的一串块写成 Markdown 与 HTML。

report.html 自成一体：图与字体的子集都以 data: 内嵌，不连网；正文的汉字在没有装中文字体的机器上由内嵌的字体显示。
"""

import base64
import html
from io import BytesIO
from pathlib import Path
from typing import Any

from finetune.comparison.plots import FONT

# (种类, 内容)：h1、h2、p 是文字，list 是各行，table 是 (表头, 各行)，figure 是 (文件名, 说明)
Block = tuple[str, Any]
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
code { background: #f3f3f3; padding: 0 0.25em; }
"""


def to_markdown(blocks: list[Block]) -> str:
    """块 → Markdown；图引用 figures/。"""
    parts = []
    for kind, content in blocks:
        if kind in ("h1", "h2"):
            parts.append(f"{'#' * int(kind[1])} {content}")
        elif kind == "p":
            parts.append(content)
        elif kind == "list":
            parts.append("\n".join(f"- {line}" for line in content))
        elif kind == "table":
            header, rows = content
            lines = [header, ["---"] * len(header), *rows]
            parts.append("\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines))
        else:
            name, caption = content
            parts.append(f"![{caption}](figures/{name})\n\n*{caption}*")
    return "\n\n".join(parts) + "\n"


def to_html(blocks: list[Block], figures: Path) -> str:
    """块 → 自成一体的 HTML。"""
    parts = []
    for kind, content in blocks:
        if kind in ("h1", "h2", "p"):
            parts.append(f"<{kind}>{inline(content)}</{kind}>")
        elif kind == "list":
            parts.append("<ul>" + "".join(f"<li>{inline(line)}</li>" for line in content) + "</ul>")
        elif kind == "table":
            header, rows = content
            head = "".join(f"<th>{inline(cell)}</th>" for cell in header)
            body = "".join("<tr>" + "".join(f"<td>{inline(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        else:
            name, caption = content
            picture = base64.b64encode((figures / name).read_bytes()).decode()
            parts.append(
                f'<figure><img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,{picture}">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
    text = "\n".join(parts)
    style = STYLE.replace("@FONT@", base64.b64encode(font_subset(text)).decode())
    title = next(content for kind, content in blocks if kind == "h1")
    return (
        f'<!DOCTYPE html>\n<html lang="zh-CN"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width">'
        f"<style>{style}</style></head><body>\n{text}\n</body></html>\n"
    )


def inline(text: Any) -> str:
    """转义，并把成对的 ** 变成 <b>。"""
    pieces = html.escape(str(text)).split("**")
    return "".join(f"<b>{piece}</b>" if index % 2 else piece for index, piece in enumerate(pieces))


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


def missing_glyphs(text: str) -> set[str]:
    """text 里自带字体没有的汉字与全角标点。"""
    from fontTools.ttLib import TTFont

    known = TTFont(FONT).getBestCmap()
    return {char for char in text if ord(char) >= 0x2E80 and ord(char) not in known}
