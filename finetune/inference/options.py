"""生成、评分与服务的参数。"""

import importlib.util
from dataclasses import dataclass

from finetune.metrics.registry import METRICS
from finetune.options import PRECISIONS, flag
from finetune.process.libraries import LOG_LEVEL_HELP, LOG_LEVELS

# 采样时没有写的取这些
SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}

DEFAULT_ADDRESS = "127.0.0.1:8000"


@dataclass
class ServeOptions:
    """HTTP 服务。"""

    serve: str | None = flag(
        None,
        "开 OpenAI 写法的 HTTP 服务，模型名是目录名，--adapter 的各是一个模型；要 uvicorn 与 starlette。"
        f"只写 --serve 是 {DEFAULT_ADDRESS}；采样等设置写在请求里，--max_new_tokens 是请求没写 max_tokens 时的值，"
        "--batch_size 是同时生成的请求数（缺省不开）",
        nargs="?",
        const=DEFAULT_ADDRESS,
        metavar="主机:端口",
    )
    api_key: str | None = flag(
        None,
        "服务要求请求带上 Authorization: Bearer 与这个值（缺省不要求）",
        check=lambda value: None if value.isascii() and value.isprintable() and value else "必须是不空的 ASCII 文字",
    )


@dataclass
class GenerationOptions:
    """怎样生成，怎样评分。"""

    precision: str = flag("auto", "计算精度，auto 按设备决定", choices=PRECISIONS)
    batch_size: int | None = flag(
        None,
        "文件预测同时做的行数，服务同时生成的请求数（缺省 8；贪心的文件预测由模型大小定，8 到 64）",
        kind=int,
    )
    max_new_tokens: int | None = flag(
        None, "最多生成的 token 数（缺省 512，上下文不足 1024 的模型取上下文的一半）", kind=int
    )
    max_src_len: int | None = flag(
        None,
        "提示词的 token 上限，截断规则同训练（缺省取训练时的值，没有则只受上下文长度限制）",
        kind=int,
    )
    do_sample: bool = flag(False, "采样；不给则贪心（缺省贪心）")
    temperature: float | None = flag(None, "采样温度，大于 0（缺省 1.0，需要 --do_sample）", kind=float)
    top_p: float | None = flag(None, "核采样的累计概率，(0, 1]（缺省 1.0，需要 --do_sample）", kind=float)
    top_k: int | None = flag(None, "只从概率最高的 k 个里采样，0 为不限（缺省 0，需要 --do_sample）", kind=int)
    repetition_penalty: float = flag(1.0, "重复惩罚，1.0 为没有（缺省 1.0，不取检查点自带的值）")
    stop: list[str] | None = flag(
        None, "出现任一文字就停，结果不含它；\\n 是换行（缺省只在 eos 处停）", nargs="+", metavar="文字"
    )
    seed: int = flag(1234, "采样的随机种子")
    log_level: str = flag("info", LOG_LEVEL_HELP, choices=LOG_LEVELS)
    metric: str | None = flag(
        None,
        "按文件里的 output 评测，结果写到 *.metrics.json，--compare 时只打印（缺省不评测）",
        choices=tuple(METRICS),
    )
    label_scores: list[str] | None = flag(
        None,
        "分类：不生成，预测就是得分最高的标签；写出各标签的得分，即"
        "模型恰好回答这个标签（连同 eos）的对数概率（nat，不除以长度），"
        "以及在各标签之间归一化的概率；不写标签时取文件里 output 出现过的全部（缺省不算）",
        nargs="*",
        metavar="标签",
    )


def check_installed() -> None:
    """没有安装 uvicorn、starlette 时抛 ValueError，写明安装命令。"""
    if not all(importlib.util.find_spec(name) for name in ("uvicorn", "starlette")):
        raise ValueError("--serve 需要 uvicorn 与 starlette，请运行 pip install uvicorn starlette")
