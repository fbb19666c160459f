"""基座与检查点的参数。"""

import importlib.util
import sys
from dataclasses import dataclass
from typing import Any

from finetune.options import at_least, flag

# 两族是同样的三个类，结构由检查点的 config.json 决定；参数留着，用户的命令里写了它
MODEL_FAMILIES = ("baichuan", "baichuan2")
TESTED_BITSANDBYTES = "0.50.2"


@dataclass
class ModelOptions:
    """基座。"""

    model_name_or_path: str = flag(
        None,
        "Baichuan 检查点的本地目录（必填）",
        required=True,
        changes_training=False,  # 续训比较的是各文件的哈希
    )
    mode: str = flag("baichuan", "模型族；结构以检查点的 config.json 为准", choices=MODEL_FAMILIES)
    add_tokens: str | None = flag(
        None,
        "一行一个新词的文件：词表在末尾接上它们，与 freeze、lora、full 一起训练（缺省不加）",
        changes_training=False,  # 续训比较的是内容
        metavar="文件",
    )


@dataclass
class SaveOptions:
    """存到哪里、何时存、从哪里接着。"""

    output_dir: str = flag(
        None, "检查点与日志的目录（必填）；已有上一次的结果会移到 previous-N/", required=True, changes_training=False
    )
    save_model_step: int = flag(
        0,
        "每隔多少步存一次检查点，0 为只在每轮结束时",
        check=at_least(0, "（0 为只在每轮结束时）"),
        changes_training=False,
    )
    save_total_limit: int = flag(
        0,
        "最多留多少个检查点，0 为不限；最好的与最新的总是留下",
        check=at_least(0, "（0 为不限）"),
        changes_training=False,
    )
    save_trainer_state: bool = flag(
        True,
        "检查点里存续训所需的优化器状态（每个可训练参数 12 字节）；--no-save_trainer_state 只存模型（缺省存）",
        changes_training=False,
    )
    resume: str = flag(
        "no", "no 从头训练；auto 接着 output_dir 里最新的完整检查点；或给出检查点目录", changes_training=False
    )


def read_words(path: str | None) -> dict[str, int]:
    """--add_tokens 的文件：新词 → 行号，次序同文件；没有文件时为空。

    Raises:
        ValueError: 文件读不了、没有词，或有重复的。
    """
    from finetune.data.plain_text import read_texts

    words: dict[str, int] = {}
    for line, word in [] if path is None else read_texts(path):
        if words.setdefault(word, line) != line:
            raise ValueError(f"{path}:{line}: {word!r} 与第 {words[word]} 行重复，请去掉")
    return words


def quantization_of(args) -> str | None:
    """参数（LoraOptions，或 predict.py 的）要求的量化：4bit、8bit 或 None。"""
    return "4bit" if args.load_in_4bit else "8bit" if args.load_in_8bit else None


def has_8bit_optimizer(args) -> bool:
    """--optimizer adamw_8bit；predict.py 没有这个参数。"""
    return getattr(args, "optimizer", None) == "adamw_8bit"


def quantization_problems(args, ds_config: dict[str, Any] | None = None) -> list[str]:
    """量化（基座的、优化器的）用不了的全部原因；没有要求量化时为空。ds_config 是训练时的 DeepSpeed 配置。"""
    quantization = quantization_of(args)
    wanted = [f"--load_in_{quantization}"] if quantization is not None else []
    wanted += ["--optimizer adamw_8bit"] if has_8bit_optimizer(args) else []
    problems = []
    if wanted and importlib.util.find_spec("bitsandbytes") is None:
        problems.append(
            f"{'、'.join(wanted)} 需要 bitsandbytes，请先 pip install bitsandbytes=={TESTED_BITSANDBYTES}，或去掉它"
        )
    if quantization is None:
        return problems
    if args.load_in_4bit and args.load_in_8bit:
        problems.append("--load_in_4bit 与 --load_in_8bit 只能给一个")
    if ((ds_config or {}).get("zero_optimization") or {}).get("stage") == 3:
        problems.append(
            f"--load_in_{quantization} 不能与 ZeRO-3 同用（量化的权重不能切分），请改用 ds_zero2_no_offload.json"
        )
    return problems


def skip_bitsandbytes(args) -> None:
    """没有要求量化时，这个进程里当作没有 bitsandbytes；须在导入 peft 之前。

    peft 一导入就载入它，连带 torch 的编译器，要三秒。
    """
    if quantization_of(args) is None and not has_8bit_optimizer(args):
        sys.modules["bitsandbytes"] = None
