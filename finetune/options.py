"""参数的写法：一组参数是一个 dataclass，一个字段就是一个参数。

缺省、说明、取值的检查、「换了是不是另一次训练」都写在字段上；解析器、检查、续训与 docs/flags.md 读的是同一张表。
各组写在用它的那间屋子里；屋子里的函数只要自己的一组，train.py 的全部参数是各组的合成（cli/train_flags.py）。
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

PRECISIONS = ("auto", "bf16", "fp16", "fp32")  # --precision 的取值
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


def share(value: float) -> str | None:
    """[0, 1) 内的份额。"""
    return None if 0 <= value < 1 else "必须在 [0, 1) 内"


def split_words(text: str) -> list[str]:
    """逗号（全角、半角、顿号）或空白分开的几个词，去掉空的。"""
    return [word for word in re.split(r"[\s,，、]+", text) if word]
