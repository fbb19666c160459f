"""由一组组参数（finetune/options.py）造命令行的解析器：布尔参数的三种写法，一个错误一行，认得别的工具的名字。"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from finetune.cli.config_file import read_config
from finetune.options import ALIKE, flags_of, in_chinese, split_words

Options = TypeVar("Options")


class BoolFlag(argparse.Action):
    """布尔参数：--flag、--no-flag，也接受 --flag True|False（按字面解析，不像 type=bool 那样把 "False" 当真）。"""

    TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")

    def __init__(self, option_strings, dest, **kwargs):
        negated = [f"--no-{option[2:]}" for option in option_strings]
        super().__init__([*option_strings, *negated], dest, nargs="?", metavar="True|False", **kwargs)

    def __call__(self, parser, namespace, value, option_string=None):
        if value is not None and value.lower() not in self.TRUE + self.FALSE:
            raise argparse.ArgumentError(self, f"只接受 True 或 False，得到 {value!r}")
        is_true = value is None or value.lower() in self.TRUE
        setattr(namespace, self.dest, is_true != option_string.startswith("--no-"))


class JoinWords(argparse.Action):
    """一串名字：逗号或空格分开都可以，记成逗号分开的一个字符串。"""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, ",".join(split_words(" ".join(values))))


class Parser(argparse.ArgumentParser):
    """命令行的解析器；解析的结果里只有写出的参数，错误由 read 一次列全。"""

    def __init__(
        self,
        prog: str,
        description: str,
        groups: dict[str, tuple[type, ...]],
        other_names: dict[str, str] | None = None,
        settled: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {},
    ):
        """
        Args:
            groups: 帮助里的标题 → 其下的各组参数。
            other_names: 别的工具的名字 → 这里怎样写，见 other_names.py。
            settled: 写出的参数 → 随它们而定的缺省（如学习率随方法）。
        """
        super().__init__(
            prog=prog,
            description=description,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            exit_on_error=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.other_names, self.settled = other_names or {}, settled
        self.fields = {field.name: field for classes in groups.values() for one in classes for field in flags_of(one)}
        for title, classes in groups.items():
            section = self.add_argument_group(title)
            for options_class in classes:
                for field in flags_of(options_class):
                    section.add_argument(f"--{field.name}", **self._argument(field))

    def read(self, argv: Sequence[str] | None = None) -> tuple[dict[str, Any], tuple[str, ...]]:
        """命令行（与 --config 的文件）→ (写出的参数, 其中算作明确写出的名字)；有错时一行一个地列出，退出码 2。

        命令行胜过文件。训练留下的 run_config.json 记着全部参数，其中等于缺省的不算明确写出；
        命令行换了方法或阶段时，随它们而定的缺省重新定。
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        found, problems, missing = self._parse(argv)
        given = set(found)
        if found.get("config"):
            try:
                words, is_record = read_config(found["config"])
            except ValueError as error:
                problems.append(str(error))
                words, is_record = [], False
            in_file, in_file_problems, missing_in_file = self._parse(words)
            problems += [f"{found['config']}：{problem}" for problem in in_file_problems]
            missing = [name for name in missing if name in missing_in_file]
            if is_record and not problems and not in_file_problems:
                before, after = self.settled(in_file), self.settled({**in_file, **found})
                stale = [n for n, value in before.items() if in_file.get(n) == value != after.get(n)]
                in_file = {name: value for name, value in in_file.items() if name not in stale}
            given |= {n for n, value in in_file.items() if not is_record or value != self.fields[n].default}
            found = {**in_file, **found}
        said = "\n".join(problems)
        problems += [
            f"缺少 --{name}：{self.fields[name].metadata['help']}" for name in missing if f"--{name}" not in said
        ]
        if problems:
            self._end(problems)
        return found, tuple(sorted(given))

    def _parse(self, argv: list[str]) -> tuple[dict[str, Any], list[str], list[str]]:
        """→ (写出的参数, 错误, 没有写的必填参数)；有错的参数去掉之后接着看其余的。"""
        known, problems = self._option_string_actions, []
        words: list[str] = []
        absent: set[str] = set()
        is_skipping = False
        for word in argv:
            name = word.partition("=")[0]
            if word.startswith("-") and not re.fullmatch(r"-\.?\d.*|-", word):
                is_skipping = name not in known
                if is_skipping:
                    problems.append(self._unknown(name))
            if not is_skipping:
                words.append(word)
        while True:
            try:
                found, rest = self.parse_known_args(words)
            except argparse.ArgumentError as error:
                missing = _missing(error.message)
                if missing is not None:
                    absent |= set(missing)
                    words += [word for name in missing for word in (f"--{name}", "")]  # 占住，接着看别的错误
                    continue
                flag = (error.argument_name or "").split("/")[0]
                problems.append(f"{flag} {in_chinese(error.message)}")
                words = _without(words, known[flag].option_strings if flag in known else ())
                continue
            break
        problems += [f"多出来的 {word!r}：参数要写成 --名字 值" for word in rest]
        found = {name: value for name, value in vars(found).items() if name not in absent}
        return found, list(dict.fromkeys(problems)), [name for name in self.fields if name in absent]

    def _unknown(self, flag: str) -> str:
        """一个不认识的参数：这里叫什么，或者像是哪一个。"""
        name = flag.lstrip("-").replace("-", "_")
        elsewhere = self.other_names.get(name.lower())
        if elsewhere is not None:
            return f"{flag}：没有这个参数，{'这里是 ' if elsewhere.startswith('--') else ''}{elsewhere}"
        known = {other: ours for other, ours in self.other_names.items() if ours.startswith("--")}
        known |= {own: f"--{own}" for own in self.fields}
        alike = difflib.get_close_matches(name.lower(), known, n=1, cutoff=ALIKE)
        return f"{flag}：没有这个参数，" + (
            f"是不是 {known[alike[0]]}？" if alike else f"全部参数见 {self.prog} --help"
        )

    def _argument(self, field) -> dict[str, Any]:
        """一个字段 → add_argument 的参数。"""
        about = field.metadata
        text = about["help"] + ("" if "缺省" in about["help"] or about["required"] else f"（缺省 {field.default}）")
        options = {"help": text.replace("%", "%%"), "required": about["required"], **about["argparse"]}
        if isinstance(field.default, bool):
            return {**options, "action": BoolFlag}
        if about["choices"] is not None:
            return {**options, "choices": about["choices"], "type": self._chooser(about["choices"])}
        kind = about["kind"] or (str if field.default is None else type(field.default))
        if about["is_list"]:
            options |= {"action": JoinWords, "nargs": "+", "metavar": "名字"}
        return {**options, "type": {int: whole_number, float: number}.get(kind, kind)}

    def _chooser(self, choices: Sequence[Any]) -> Callable[[str], Any]:
        """不分大小写地认出一个选择；认不出的，说它像哪一个，或是哪个参数的取值。"""

        named = {str(choice): choice for choice in choices}

        def choose(text: str) -> Any:
            lowered = text.strip().lower()
            if lowered in named:
                return named[lowered]
            owners = [name for name, field in self.fields.items() if lowered in (field.metadata["choices"] or ())]
            alike = difflib.get_close_matches(lowered, named, n=1, cutoff=ALIKE)
            hint = f"，它是 --{owners[0]} 的取值" if owners else f"，是不是 {alike[0]}？" if alike else ""
            raise argparse.ArgumentTypeError(f"应为 {'、'.join(named)} 之一，得到 {text!r}{hint}")

        return choose

    def error(self, message: str):
        """argparse 有几种错误不抛出而来到这里。"""
        raise argparse.ArgumentError(None, message)

    def _end(self, problems: list[str]):
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(f"参数错误：{problem}" for problem in problems), flush=True)
        raise SystemExit(2)


def whole_number(text: str) -> int:
    """整数；1e3、4.0 这样的也是。"""
    try:
        value = float(text)
        exact = int(text) if re.fullmatch(r"[+-]?[\d_]+", text.strip()) else int(value)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"应为整数，得到 {text!r}") from None
    if value != exact and abs(value) < 2**53:
        raise argparse.ArgumentTypeError(f"应为整数，得到 {text!r}")
    return exact


def number(text: str) -> float:
    """小数。"""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"应为数，得到 {text!r}") from None


def _missing(message: str) -> list[str] | None:
    """argparse 说缺了哪几个必填的参数；不是这种错误时为 None。"""
    names = re.findall(r"--(\w+)", message)
    return names if "required" in message and names else None


def _without(words: list[str], flags: Sequence[str]) -> list[str]:
    """去掉第一处 flags 里的参数与它的值；没有找到时全部去掉（不会再有别的错误可看）。"""
    start = next((i for i, word in enumerate(words) if word.partition("=")[0] in flags), None)
    if start is None:
        return []
    end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
    return words[:start] + words[end:]
