"""docs/flags.md：train.py 与 predict.py 的全部参数，由各组的字段写成。

python -m finetune.cli.flags_page > docs/flags.md
"""

import dataclasses
import re

from finetune.cli import predict_flags, train_flags
from finetune.options import flags_of
from finetune.terminal import markdown_table

HEAD = """# 参数

这一页由 `python -m finetune.cli.flags_page > docs/flags.md` 从参数的表写成，与 `--help` 相同；不要手改。

- 缺省一栏的 `—`：没有固定的值，不写时怎样见含义。
- 开关可写 `--packing`、`--no-packing`、`--packing True` 或 `--packing False`。
- 「续训」一栏的 `同`：换了它就是另一次训练，续训时须与检查点相同。
- 不认识的、取值错的、不起作用的参数都是错误：读任何权重之前一次列全，退出码 2。
"""
TYPES = {int: "整数", float: "小数"}


def page() -> str:
    """整页，Markdown。"""
    sections = [HEAD]
    for command, groups in (("train.py", train_flags.GROUPS), ("predict.py", predict_flags.GROUPS)):
        header = ["参数", "取值", "缺省", *(["续训"] if command == "train.py" else []), "含义"]
        sections.append(f"## {command}\n")
        for title, classes in groups.items():
            rows = [row(field, len(header)) for options_class in classes for field in flags_of(options_class)]
            sections += [f"### {title}\n", markdown_table(header, rows) + "\n"]
    return "\n".join(sections)


def row(field: dataclasses.Field, columns: int) -> list[str]:
    """一个参数：名字、取值、缺省、续训时要不要相同（predict.py 没有这一栏）、含义。"""
    about = field.metadata
    default = "必填" if about["required"] else "—" if field.default is None else f"`{field.default}`"
    meaning = about["help"]
    for said in (f"（缺省 {field.default}）", "（必填）"):
        meaning = meaning.replace(said, "")
    meaning = meaning.replace(f"（缺省 {field.default}；", "（")
    resume = ["同" if about["changes_training"] else ""] if columns == 5 else []
    cells = [f"`--{field.name}`", values(field), default, *resume, " ".join(meaning.split())]
    return [re.sub(r"[|*<]", r"\\\g<0>", cell) for cell in cells]


def values(field: dataclasses.Field) -> str:
    """可以写什么：各个选择、开关，或值的种类。"""
    about = field.metadata
    if isinstance(field.default, bool):
        return "开关"
    if about["choices"]:
        return "、".join(f"`{choice}`" for choice in about["choices"])
    kind = about["argparse"].get("metavar") or TYPES.get(about["kind"] or type(field.default), "文字")
    return kind + {"+": "，一个或几个", "*": "，可以不写或写几个"}.get(about["argparse"].get("nargs"), "")


if __name__ == "__main__":
    print(page(), end="")
