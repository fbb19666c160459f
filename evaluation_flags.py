"""train.py 的命令行参数里评估、遗忘与重放的一组：定义与检查；其余的在 arguments.py。"""

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from general_text import read_texts
from metrics import METRICS

NEEDS_EVAL_PATH = ("eval_step", "eval_metric", "eval_max_new_tokens", "early_stopping_patience")


def add_evaluation_flags(add: Callable, group):
    """给一组加上参数；add 是 arguments.build_parser 里的同名函数。"""
    number = {"type": int}
    add(group, "eval_step", 0, **number, help="每隔多少步也评估一次，0 为只在每轮结束时（缺省 %(default)s）")
    add(
        group,
        "eval_metric",
        "nll",
        choices=sorted(METRICS),
        help="按什么定最好的检查点：nll 为目标 token 的平均损失，其余为生成回答之后的指标（缺省 %(default)s）",
    )
    add(group, "eval_max_new_tokens", 128, **number, help="生成的指标：最多生成的 token 数（缺省 %(default)s）")
    add(
        group,
        "early_stopping_patience",
        0,
        **number,
        help="连续多少次评估没有更好就停，0 为不停（缺省 %(default)s）",
    )
    add(
        group,
        "save_total_limit",
        0,
        **number,
        help="最多留多少个检查点，0 为不限；最好的与最新的总是留下（缺省 %(default)s）",
    )
    add(
        group,
        "general_path",
        help="通用文字，UTF-8 纯文本，一行一段：训练前后各算一次 NLL 与离基座的 KL 散度，写进 forgetting.json"
        "（缺省不算；主机内存要 词表 × 8 KiB）",
    )
    add(
        group,
        "forgetting_threshold",
        type=float,
        help="通用文字的 NLL 上升超过多少 nat/token 算遗忘（缺省不判断）",
    )
    add(group, "replay_path", help="重放：训练时混入的通用文字，格式同 --general_path，每个 token 都是目标（缺省不混）")
    add(group, "replay_ratio", type=float, help="重放的条数与训练样本数之比，如 0.1；一条至多 max_len 个 token")


def evaluation_problems(args: Namespace) -> list[str]:
    """这一组参数的全部问题。"""
    problems = []

    def expect(is_valid: bool, message: str):
        if not is_valid:
            problems.append(message)

    for name in ("eval_step", "early_stopping_patience", "save_total_limit"):
        expect(getattr(args, name) >= 0, f"--{name}({getattr(args, name)}) 必须为 0（不用）或正数")
    expect(args.eval_max_new_tokens >= 1, f"--eval_max_new_tokens({args.eval_max_new_tokens}) 必须至少为 1")
    has_data = args.eval_path is not None or args.val_ratio is not None
    useless = [f"--{name}" for name in NEEDS_EVAL_PATH if name in args.given and not has_data]
    expect(not useless, f"{'、'.join(useless)} 只在评估时起作用，请加上 --eval_path 或 --val_ratio，或去掉")
    expect(
        "eval_max_new_tokens" not in args.given or args.eval_metric != "nll",
        "--eval_max_new_tokens 在 --eval_metric nll 时不起作用，请去掉，或换一个生成的指标",
    )
    threshold, ratio = args.forgetting_threshold, args.replay_ratio
    expect(
        threshold is None or 0 <= threshold < math.inf,
        f"--forgetting_threshold({threshold}) 必须是不小于 0 的有限数",
    )
    expect(
        threshold is None or args.general_path is not None,
        "--forgetting_threshold 需要 --general_path，请加上或去掉",
    )
    expect(
        (args.replay_path is None) == (ratio is None),
        "--replay_path 与 --replay_ratio 要一起给出（如 --replay_ratio 0.1），请补上或都去掉",
    )
    expect(ratio is None or 0 < ratio < math.inf, f"--replay_ratio({ratio}) 必须是大于 0 的有限数")
    for path in (args.general_path, args.replay_path):
        try:
            if path is not None:
                read_texts(path)
        except ValueError as error:
            problems.append(str(error))
    is_same = (
        args.general_path and args.replay_path and Path(args.general_path).resolve() == Path(args.replay_path).resolve()
    )
    expect(
        not is_same,
        f"--general_path 与 --replay_path 是同一个文件 {args.general_path}：训练过的文字不能衡量遗忘，请分成两个文件",
    )
    return problems
