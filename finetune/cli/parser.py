"""由一组组参数（finetune/options.py）造命令行的解析器：布尔参数的三种写法，错误带办法。"""

import argparse
import os
from typing import Any, TypeVar

from finetune.options import flags_of

Options = TypeVar("Options")


class BoolFlag(argparse.Action):
    """布尔参数：--flag、--no-flag，也接受 --flag True|False（按字面解析，不像 type=bool 那样把 "False" 当真）。"""

    TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")

    def __init__(self, option_strings, dest, **kwargs):
        negated = [f"--no-{option[2:]}" for option in option_strings]
        super().__init__([*option_strings, *negated], dest, nargs="?", metavar="True|False", **kwargs)

    def __call__(self, parser, namespace, value, option_string=None):
        if value is not None and value.lower() not in self.TRUE + self.FALSE:
            parser.error(f"{option_string} 只接受 True 或 False，得到 {value!r}")
        is_true = value is None or value.lower() in self.TRUE
        setattr(namespace, self.dest, is_true != option_string.startswith("--no-"))


class Parser(argparse.ArgumentParser):
    """错误信息带上办法的解析器；未知参数与取值错误以退出码 2 结束。解析的结果里只有命令行写出的参数。"""

    def __init__(self, prog: str, description: str, groups: dict[str, tuple[type, ...]]):
        """groups：帮助里的标题 → 其下的各组参数。"""
        super().__init__(
            prog=prog,
            description=description,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for title, classes in groups.items():
            section = self.add_argument_group(title)
            for options_class in classes:
                for field in flags_of(options_class):
                    section.add_argument(f"--{field.name}", **_argument(field))

    def error(self, message: str):
        if os.environ.get("RANK", "0") == "0":
            self.print_usage()
            print(f"参数错误：{message}。全部参数见 python {self.prog} --help", flush=True)
        raise SystemExit(2)


def _argument(field) -> dict[str, Any]:
    """一个字段 → add_argument 的参数。"""
    about = field.metadata
    text = about["help"] + ("" if "缺省" in about["help"] or about["required"] else f"（缺省 {field.default}）")
    options = {"help": text.replace("%", "%%"), "required": about["required"], **about["argparse"]}
    if isinstance(field.default, bool):
        return {**options, "action": BoolFlag}
    if about["choices"] is not None:
        options["choices"] = about["choices"]
    kind = about["kind"] or (str if field.default is None else type(field.default))
    return {**options, "type": kind}
