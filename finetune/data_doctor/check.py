"""数据体检：训练之前把数据文件查一遍，逐条列出「文件:行: 字段: 问题: 办法」，并给出重复、泄漏、标签与长度的统计。

    python data_set.py check data/spo_0.json --model_name_or_path baichuan2-7B/ --test_path data/spo_1.json

退出码：0 没有问题，1 只有警告（能训练，但多半不是本意），2 有错误（训练会拒绝这份数据，或命令行、路径写错）。
先是结论与各种发现的数目，再是每种几个例子；--json 写下全部。确实没有答案的空回答只是说明，不影响退出码。
逐行流式检查：在途的行至多 64 MiB，最长的一行至多 64 MiB，另有每行 32 字节的摘要（见 duplicates.py）。
不给 --model_name_or_path 时长度按字符数统计，不检查截断。一行的检查见 rows.py，报告的样子见 report.py。
"""

import argparse
import functools
import os
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from finetune.data.parallel import choose_workers, map_chunks, split_chunks
from finetune.data.prompting import prompt_format_choice, resolve_prompt_format
from finetune.data.rows import TEXT_UNITS, Problem, files_of, iter_rows
from finetune.data.samples import LOSS_TURNS, READS, RowOptions, row_options, separator_choice
from finetune.data_doctor import show as show_module
from finetune.data_doctor.duplicates import FILE_SHIFT, LINE_MASK, TEST_BIT, compare
from finetune.data_doctor.report import draw_picture, render, to_json
from finetune.data_doctor.rows import ChunkReport, Encoding, examine_rows
from finetune.options import ScriptParser
from finetune.terminal import long_job
from utils import write_json

SEVERITIES = ("note", "warning", "error")
EXIT_CODES = {"note": 0, "warning": 1, "error": 2}
MAX_EXAMPLES = 3
MAX_LABELS, MIN_LABEL_ROWS, UNEVEN_RATIO = 50, 20, 10


# ---- 一个文件 ----


class FileReport:
    """一个文件的统计；findings 每种至多留 max_findings 条（None 为全部），counts 是全部的数目。"""

    def __init__(self, path: str, split: str, max_findings: int | None):
        self.path, self.split, self.max_findings = path, split, max_findings
        self.num_rows = self.num_samples = 0
        self.counts: Counter[tuple[str, str]] = Counter()  # (severity, code) → 数目
        self.findings: dict[str, list[Problem]] = defaultdict(list)
        self.lengths = {"src": Counter(), "tgt": Counter(), "total": Counter()}
        self.formats: Counter[str] = Counter()  # 写法 → 行数
        self.unused: Counter[str] = Counter()  # 没有用上的字段 → 行数
        self.labels: Counter[str] | None = Counter()  # None：取值太多或太长，不像分类

    def add(self, findings: Iterable[Problem]) -> None:
        for finding in findings:
            self.counts[finding.severity, finding.code] += 1
            self.keep(finding)

    def keep(self, finding: Problem) -> None:
        """留作例子，不计数。"""
        kept = self.findings[finding.code]
        if self.max_findings is None or len(kept) < self.max_findings:
            kept.append(finding)

    def add_chunk(self, chunk: ChunkReport) -> None:
        self.add(chunk.findings)
        self.num_rows += chunk.num_rows
        self.num_samples += len(chunk.lines)
        self.formats += chunk.formats
        self.unused += chunk.unused
        columns = {"src": chunk.lengths[:, 0], "tgt": chunk.lengths[:, 1], "total": chunk.lengths.sum(axis=1)}
        for name, values in columns.items():
            self.lengths[name].update(values.tolist())
        if self.labels is not None:
            self.labels.update(answer for answer in chunk.answers if answer is not None)
            has_long_answer = any(a is None for a in chunk.answers) and self.split != "predict"
            if has_long_answer or len(self.labels) > 20 * MAX_LABELS:
                self.labels = None

    @property
    def is_labelled(self) -> bool:
        """回答像分类的标签：至少 20 行，取值不超过 50 种，平均每种至少 10 行。"""
        if not self.labels:
            return False
        total, distinct = self.labels.total(), len(self.labels)
        return total >= MIN_LABEL_ROWS and distinct <= min(MAX_LABELS, total // 10)


def examine_file(
    report: FileReport, index: int, encoding: Encoding | None, workers: int | None, options: RowOptions
) -> list[np.ndarray]:
    """流式检查一个文件，填进 report；返回各批的摘要与位置，供 compare_rows 一起比较。"""
    digests: list[np.ndarray] = []
    path = report.path
    base = np.uint64((TEST_BIT if report.split == "predict" else 0) | index << FILE_SHIFT)
    try:
        rows = iter_rows(path, options.text_unit)
        first = next(rows, None)  # 打不开的文件在这里抛出
        report.add(_file_findings(path))
        chunks = split_chunks(chain([first] if first is not None else [], rows))
        examine = functools.partial(examine_rows, path=path, split=report.split, encoding=encoding, options=options)
        with long_job(f"检查 {Path(path).name}", os.path.getsize(path), "B") as job:
            for chunk in map_chunks(examine, chunks, path, choose_workers(path, workers)):
                report.add_chunk(chunk)
                digests.append(np.column_stack([chunk.digests, chunk.lines | base]))
                job.update(chunk.num_bytes)
    except (ValueError, OSError) as error:
        what, _, remedy = str(error).partition("，请")
        report.add([Problem(path, 1, "文件", what, f"请{remedy}" if remedy else "请检查文件内容与路径", code="file")])
        return digests
    if not report.num_rows:
        report.add([Problem(path, 1, "文件", "没有任何样本（只有空白）", "请检查文件内容", code="file")])
    return digests


def _file_findings(path: str) -> Iterator[Problem]:
    """整个文件的写法，只看开头 1 MiB。"""
    with open(files_of(path)[0], "rb") as stream:
        head = stream.read(2**20)
    if head.startswith(b"\xef\xbb\xbf"):
        yield Problem(path, 1, "文件", "开头有 UTF-8 的字节序标记（BOM），读取时跳过", "不必改", "note", "bom")
    if b"\r\n" in head:
        yield Problem(path, 1, "文件", "用 CRLF 换行（Windows），读取时不受影响", "不必改", "note", "crlf")
    elif b"\r" in head and b"\n" not in head:
        yield Problem(path, 1, "文件", "只用 CR 换行（旧式 Mac），会被当成一行", "请把换行改成 LF", "warning", "cr")


# ---- 跨行 ----

_CROSS_ROW = {
    "duplicate": (
        "warning",
        "与 {} 完全相同（共 {} 行相同）",
        "加 --drop_duplicates 只留一行（只在同一个文件里），或从文件中删去",
    ),
    "conflict": (
        "note",
        "与 {} 的输入相同，回答不同（共 {} 种回答）",
        "答案应当唯一时请统一；本来就有多个答案的不必改",
    ),
    "shared_input": ("warning", "输入与训练集的 {} 相同（测试集里共 {} 行）", "测出的分数会偏高，请从其中一份删去"),
    "shared_document": (
        "warning",
        "文档与训练集的 {} 相同（测试集里共 {} 行）",
        "测出的分数会偏高，请按文档而不是按行划分训练集与测试集",
    ),
}


def compare_rows(reports: list[FileReport], digests: np.ndarray) -> dict[str, int]:
    """重复、同一输入不同回答、训练与测试共有的行：记入所在文件的 counts 与 findings，返回各种的总数。"""
    totals, found = compare(digests)
    for code, matches in found.items():
        severity, what, remedy = _CROSS_ROW[code]
        files = _file_of(matches[:, 0])
        for index, report in enumerate(reports):
            mine = matches[files == index]
            if not len(mine):
                continue
            report.counts[severity, code] += len(mine)
            for position, other, count in mine[: report.max_findings].tolist():
                place = f"{reports[_file_of(other)].path}:{other & LINE_MASK}"
                text = what.format(place, count)
                report.keep(Problem(report.path, position & LINE_MASK, "行", text, remedy, severity, code))
    return totals


def _file_of(position):
    """位置（一个或一列）→ 文件的序号。"""
    return (position & (TEST_BIT - 1)) >> FILE_SHIFT


def label_findings(report: FileReport, reports: list[FileReport]) -> Iterator[Problem]:
    """回答像分类标签的文件：只有一种、很不均匀、写法略有不同、训练集里没有的标签。"""
    if not report.is_labelled:
        return

    def warn(code: str, what: str, remedy: str) -> Problem:
        return Problem(report.path, 1, "output", what, remedy, "warning", code)

    ranked = report.labels.most_common()
    (most, most_count), (least, least_count) = ranked[0], ranked[-1]
    if len(report.labels) == 1:
        yield warn(
            "label_balance", f"{most_count} 行的回答全是「{most[:20]}」", "模型只会学到这一个回答，请补充其他标签的行"
        )
    elif most_count > UNEVEN_RATIO * least_count:
        what = f"标签很不均匀：「{most[:20]}」{most_count} 行，「{least[:20]}」只有 {least_count} 行"
        yield warn("label_balance", what, "请补充少的一类，评估时看每类的 F1 而不只看总的准确率")
    spellings = defaultdict(list)
    for label in report.labels:
        spellings["".join(unicodedata.normalize("NFKC", label).casefold().split()).rstrip("。.")].append(label)
    for same in spellings.values():
        if len(same) > 1:
            yield warn("label_variant", f"{'、'.join(map(repr, same[:4]))} 像是同一个标签的不同写法", "请统一成一种")
    trained = [other.labels for other in reports if other.split == "train"]
    if report.split == "predict" and all(labels is not None for labels in trained):
        unseen = [label for label in report.labels if not any(label in labels for labels in trained)]
        if unseen:
            what = f"训练集里没有的标签：{'、'.join(label[:20] for label in unseen[:5])}（共 {len(unseen)} 种）"
            yield warn("label_unseen", what, "模型学不到它们，请检查写法或重新划分")


# ---- 命令 ----


def build_parser() -> ScriptParser:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = ScriptParser(prog="data_set.py", description=f"{__doc__}\n{show_module.__doc__}", **style)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="看几行怎样编码", description=show_module.__doc__, **style)
    show.add_argument("path", metavar="FILE", help="数据文件")
    show.add_argument("--model_name_or_path", required=True, help="检查点目录（必填）")
    show.add_argument("--rows", type=show_module.row_numbers, help="看第几行，从 1 起，如 1,2,10-12（缺省全部）")
    show.add_argument("--json", metavar="OUT", help="把各行写成 JSON Lines（缺省不写）")
    add_sample_flags(show)
    check = commands.add_parser("check", help="检查数据文件", description=__doc__, **style)
    check.add_argument("paths", nargs="+", metavar="FILE", help="训练数据，可以有几个；重复也跨文件查找")
    check.add_argument("--test_path", help="测试数据：查它与训练数据共有的行（缺省不查）；回答可缺")
    check.add_argument("--model_name_or_path", help="检查点目录：长度按它的分词器计（缺省按字符数，不检查截断）")
    add_sample_flags(check)
    check.add_argument(
        "--max_findings", type=int, default=MAX_EXAMPLES, help="每种问题至多举几个例子（缺省 %(default)s）"
    )
    check.add_argument("--workers", type=int, help="进程数（缺省：大文件用全部 CPU，小文件 1）")
    check.add_argument("--json", metavar="OUT", help="把全部结果、每一处发现写成 JSON（缺省不写）")
    check.add_argument("--picture", metavar="PNG", help="把长度与标签的分布画成图（缺省不画）")
    return parser


def add_sample_flags(parser: ScriptParser) -> None:
    """决定一行怎样读、怎样编码的参数，与 train.py 的同名。"""
    parser.add_argument("--max_len", type=int, default=1024, help="同 train.py，token（缺省 %(default)s）")
    parser.add_argument("--max_src_len", type=int, default=768, help="同 train.py，token（缺省 %(default)s）")
    parser.add_argument(
        "--prompt_format",
        default="auto",
        type=prompt_format_choice,
        metavar="auto|plain|chat|文件.json",
        help="同 train.py；auto 由检查点决定（缺省 %(default)s）",
    )
    parser.add_argument("--add_tokens", metavar="文件", help="同 train.py（缺省没有）")
    parser.add_argument("--task", default="sft", choices=tuple(READS), help="训练的阶段，决定读哪些行（缺省 sft）")
    parser.add_argument("--text_unit", default="line", choices=TEXT_UNITS, help="同 train.py（缺省 line）")
    parser.add_argument("--input_separator", default="", type=separator_choice, help="同 train.py（缺省为空）")
    parser.add_argument("--ignore_fields", default="", help="同 train.py（缺省没有）")
    parser.add_argument("--loss_turns", default="all", choices=LOSS_TURNS, help="同 train.py（缺省 %(default)s）")
    parser.add_argument("--train_on_prompt", action="store_true", help="同 train.py（缺省不训练提示）")


def load_encoding(args: argparse.Namespace) -> Encoding | None:
    """由 --model_name_or_path 得到分词器与提示方式；没有给则为 None。

    Raises:
        ValueError: 目录不是可用的检查点，或长度互相矛盾。
    """
    if args.model_name_or_path is None:
        for name, default in (("prompt_format", "auto"), ("add_tokens", None), ("max_len", 1024), ("max_src_len", 768)):
            if getattr(args, name) != default:
                raise ValueError(f"--{name} 只在给出 --model_name_or_path 时起作用，请去掉或补上后者")
        return None
    if not 0 < args.max_src_len < args.max_len:
        raise ValueError(f"--max_src_len({args.max_src_len}) 必须大于 0、小于 --max_len({args.max_len})，请改正")
    # 在这里导入：模型的模块要几秒才能载入，只查格式时用不着
    from finetune.checkpoint.added_tokens import add_words
    from finetune.checkpoint.base_model import load_config, load_tokenizer

    config = load_config(args.model_name_or_path)
    tokenizer = add_words(load_tokenizer(args.model_name_or_path, config.vocab_size), args.add_tokens)
    prompting = resolve_prompt_format(args.prompt_format, args.model_name_or_path, config)
    return Encoding(tokenizer, args.max_len, args.max_src_len, prompting._asdict())


def check_files(
    paths: list[str],
    test_path: str | None,
    encoding: Encoding | None,
    max_findings: int | None,
    workers: int | None = None,
    options: RowOptions = RowOptions(),
) -> tuple[list[FileReport], dict[str, int]]:
    """检查训练文件与测试文件 → (各文件的统计，测试文件在最后；跨行的总数)；max_findings 见 FileReport。"""
    reports = [FileReport(str(path), "train", max_findings) for path in paths]
    if test_path is not None:
        reports.append(FileReport(str(test_path), "predict", max_findings))
    digests = [np.zeros((0, 4), dtype=np.uint64)]
    for index, report in enumerate(reports):
        digests += examine_file(report, index, encoding, workers, options)
    totals = compare_rows(reports, np.concatenate(digests))
    for report in reports:
        report.add(label_findings(report, reports))
    return reports, totals


def main(argv: list[str] | None = None) -> int:
    """命令行入口，返回退出码。"""
    args = build_parser().parse_args(argv)
    options, exit_code = row_options(vars(args)), 0
    try:
        if args.command == "show":
            return show_module.show(args.path, load_encoding(args), options, args.rows, args.json)
        if args.max_findings < 1 or (args.workers is not None and args.workers < 1):
            raise ValueError("--max_findings 与 --workers 必须至少为 1，请改正")
        files = [*args.paths, *([args.test_path] if args.test_path else [])]
        if missing := [path for path in files if not os.path.exists(path)]:
            raise ValueError(f"找不到数据文件 {'、'.join(missing)}，请检查路径")
        encoding = load_encoding(args)
        kept = None if args.json else args.max_findings
        reports, totals = check_files(args.paths, args.test_path, encoding, kept, args.workers, options)
        worst = max(
            (severity for report in reports for severity, _ in report.counts), key=SEVERITIES.index, default="note"
        )
        exit_code = EXIT_CODES[worst]
        if args.json:
            write_json(args.json, to_json(reports, totals, encoding, exit_code))
        if args.picture:
            draw_picture(args.picture, reports, encoding)
        print(render(reports, totals, encoding, exit_code, args.max_findings), flush=True)
    except BrokenPipeError:  # 读输出的一端（head、less）已经关了
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError) as error:
        print(f"错误：{error}", file=sys.stderr, flush=True)
        return EXIT_CODES["error"]
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
