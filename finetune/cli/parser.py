"""两个命令共用的解析器：布尔参数的三种写法，错误带办法。"""

import argparse
import os


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
    """错误信息带上办法的解析器；未知参数与取值错误以退出码 2 结束。"""

    def error(self, message: str):
        if os.environ.get("RANK", "0") == "0":
            self.print_usage()
            print(f"参数错误：{message}。全部参数见 python {self.prog} --help", flush=True)
        raise SystemExit(2)


def checkpointing_choice(value: str) -> str:
    """--gradient_checkpointing 的取值：none、all、attention、正整数；True、False 同 all、none。"""
    value = {"true": "all", "false": "none"}.get(value.lower(), value.lower())
    if value not in ("none", "all", "attention") and not (value.isdecimal() and int(value) > 0):
        raise argparse.ArgumentTypeError(f"应为 none、all、attention 或正整数，得到 {value!r}")
    return value
