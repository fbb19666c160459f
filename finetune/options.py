"""参数的写法：一组参数是一个 dataclass，一个字段就是一个参数。

缺省、说明、取值的检查、「换了是不是另一次训练」都写在字段上；解析器、检查、续训与 docs/flags.md 读的是同一张表。
各组写在用它的那间屋子里；屋子里的函数只要自己的一组，train.py 的全部参数是各组的合成（cli/train_flags.py）。

小的命令（data_set.py、scripts/、finetune.checkpoint）直接写 argparse 的参数，用这里的 ScriptParser。
"""

import argparse
import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

PRECISIONS = ("auto", "bf16", "fp16", "fp32")  # --precision 的取值
ALIKE = 0.6  # 比这更不像的名字不猜
Check = Callable[[Any], str | None]  # 值 → 要求（如「必须至少为 1」），合要求时为 None


def flag(
    default: Any,
    help: str,
    *,
    kind: Callable[[str], Any] | None = None,
    choices: tuple[str, ...] | None = None,
    check: Check | None = None,
    required: bool = False,
    is_list: bool = False,
    changes_training: bool = True,
    **argparse_options: Any,
) -> Any:
    """一个参数，用作 dataclass 字段的值。

    Args:
        default: 缺省值；help 里没有写缺省的，由解析器补上。
        kind: 由文字得到值的函数；缺省由 default 的类型决定，None 为字符串。
        check: 取值的检查；给了 None（没有写）的不查。
        is_list: 一串名字，逗号或空格分开；值是逗号分开的一个字符串。
        changes_training: 换了它就是另一次训练，续训时不许变；False 的只影响显示、保存、评估、内存与速度。
        argparse_options: 其余原样交给 add_argument，如 nargs、const、metavar。
    """
    metadata = {"help": help, "kind": kind, "choices": choices, "check": check, "required": required}
    metadata |= {"is_list": is_list, "changes_training": changes_training, "argparse": argparse_options}
    return dataclasses.field(default=default, metadata=metadata)


def problems_of(options: Any) -> list[str]:
    """各参数自己的问题（不看别的参数）：「--名字(值) 要求」。"""
    problems = []
    for field in dataclasses.fields(options):
        check, value = field.metadata.get("check"), getattr(options, field.name)
        requirement = check(value) if check is not None and value is not None else None
        if requirement is not None:
            problems.append(f"--{field.name}({value}) {requirement}")
    return problems


def flags_of(options_class: type) -> Iterator[dataclasses.Field]:
    """一组里的参数（略去 given 之类不是参数的字段）。"""
    return (field for field in dataclasses.fields(options_class) if "help" in field.metadata)


def at_least(low: float, meaning: str = "") -> Check:
    """不小于 low 的有限数；meaning 说明边界的含义，如「（0 为不用）」。"""
    return lambda value: None if low <= value < math.inf else f"必须至少为 {low}{meaning}"


def above_zero(value: float) -> str | None:
    """大于 0 的有限数。"""
    return None if 0 < value < math.inf else "必须是大于 0 的有限数"


def plausible_rate(value: float) -> str | None:
    """学习率：(0, 100)；再大的是漏了负号，最大的合用的（软提示）也只是零点几。"""
    return "太大，是不是漏了负号（如 2e-4）？" if 100 <= value < math.inf else above_zero(value)


def share(value: float) -> str | None:
    """[0, 1) 内的份额。"""
    return None if 0 <= value < 1 else "必须在 [0, 1) 内"


def split_words(text: str) -> list[str]:
    """逗号（全角、半角、顿号）或空白分开的几个词，去掉空的。"""
    return [word for word in re.split(r"[\s,，、]+", text) if word]


class ScriptParser(argparse.ArgumentParser):
    """小的命令的解析器：参数要写全名，错误是一行中文，退出码 2。"""

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str):
        print(f"参数错误：{_script_error(message, self._flags())}；用法见 {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def _flags(self) -> list[str]:
        """全部参数的名字，连同子命令的。"""
        found = [name for name in self._option_string_actions if name.startswith("--")]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [name for parser in action.choices.values() for name in parser._flags()]
        return list(dict.fromkeys(found))


def _script_error(message: str, flags: list[str]) -> str:
    """argparse 的一句英文 → 中文，flags 是认识的参数；参数自己的检查写的话照旧。"""
    if found := re.fullmatch(r"the following arguments are required: (.*)", message):
        return f"缺少 {'、'.join(found[1].split(', '))}"
    if found := re.fullmatch(r"unrecognized arguments: (.*)", message):
        name = found[1].split()[0].partition("=")[0]
        alike = difflib.get_close_matches(name, flags, n=1, cutoff=ALIKE) if name.startswith("-") else []
        return f"没有这个参数：{found[1]}" + (f"，是不是 {alike[0]}？" if alike else "（参数要写全名）")
    found = re.fullmatch(r"argument ([^:]+): (.*)", message, re.DOTALL)
    if not found:
        return message
    name, reason = found.groups()
    if choice := re.fullmatch(r"invalid choice: (.+?) \(choose from (.*)\)", reason):
        choices = [word.strip("'\" ") for word in choice[2].split(",")]
        alike = difflib.get_close_matches(choice[1].strip("'"), choices, n=1, cutoff=ALIKE)
        return f"{name} 应为 {'、'.join(choices)} 之一，得到 {choice[1]}" + (f"，是不是 {alike[0]}？" if alike else "")
    if value := re.fullmatch(r"invalid (\w+) value: (.*)", reason):
        return f"{name} 应为{ {'int': '整数', 'float': '数'}.get(value[1], '合用的值') }，得到 {value[2]}"
    return f"{name} {in_chinese(reason)}"


def in_chinese(message: str) -> str:
    """argparse 自己的几句英文。"""
    if "at least one" in message:
        return "后面要有一个或几个值"
    return "后面要有一个值" if message.startswith("expected") else message
