"""docs/flags.md：train.py 与 predict.py 的全部参数，由它们的解析器写成。

python -m finetune.cli.flags_page > docs/flags.md
"""

import argparse
import re

from finetune.cli import predict_flags, train_flags
from finetune.cli.parser import BoolFlag

HEAD = """# 参数

这一页由 `python -m finetune.cli.flags_page > docs/flags.md` 从解析器写成，与 `--help` 相同；不要手改。

- 缺省一栏的 `—`：没有固定的值，不写时怎样见含义。
- 开关可写 `--packing`、`--no-packing`、`--packing True` 或 `--packing False`；predict.py 的开关只有 `--名字`。
- 不认识的、取值错的、不起作用的参数都是错误：读任何权重之前一次列全，退出码 2。
"""
TYPES = {int: "整数", float: "小数"}


def page() -> str:
    """整页，Markdown。"""
    parsers = (train_flags.build_parser(), predict_flags.build_parser())
    return "\n".join([HEAD, *(section(parser) for parser in parsers)])


def section(parser: argparse.ArgumentParser) -> str:
    """一个命令的各组参数，一组一张表。"""
    lines = [f"## {parser.prog}", ""]
    for group in parser._action_groups:
        rows = [row(action) for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if rows:
            lines += [f"### {group.title}", "", "| 参数 | 取值 | 缺省 | 含义 |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def row(action: argparse.Action) -> str:
    """一个参数：名字、取值、缺省、含义（去掉与缺省一栏重复的括号）。"""
    no_default = action.default is None or action.default is argparse.SUPPRESS
    default = "必填" if action.required else "—" if no_default else f"`{action.default}`"
    meaning = (action.help or "") % vars(action)
    for said in (f"（缺省 {action.default}）", "（必填）"):
        meaning = meaning.replace(said, "")
    meaning = meaning.replace(f"（缺省 {action.default}；", "（")
    cells = [f"`{action.option_strings[0]}`", values(action), default, " ".join(meaning.split())]
    return "| " + " | ".join(re.sub(r"[|*<]", r"\\\g<0>", cell) for cell in cells) + " |"


def values(action: argparse.Action) -> str:
    """可以写什么：各个选择、开关，或值的种类。"""
    if isinstance(action, BoolFlag) or action.nargs == 0:
        return "开关"
    if action.choices:
        return "、".join(f"`{choice}`" for choice in action.choices)
    kind = action.metavar or TYPES.get(action.type, "文字")
    return kind + {"+": "，一个或几个", "*": "，可以不写或写几个"}.get(action.nargs, "")


if __name__ == "__main__":
    print(page(), end="")
