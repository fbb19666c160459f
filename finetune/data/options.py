"""数据的参数：读哪个文件、怎样编码、怎样并排。"""

from dataclasses import dataclass

from finetune.data.prompting import prompt_format_choice
from finetune.data.rows import TEXT_UNITS
from finetune.data.samples import LOSS_TURNS, separator_choice
from finetune.options import at_least, flag


@dataclass
class DataOptions:
    """train.py 的数据参数。"""

    train_path: str | list[str] = flag(
        None,
        "训练数据（必填），写法见 docs/data.md；可以有几个，'文件*0.5' 取其中一半的行，'文件*3' 重复三遍",
        required=True,
        changes_training=False,  # 续训比较的是内容的哈希与份量
        nargs="+",
        metavar="文件",
    )
    eval_path: str | None = flag(None, "评估数据，写法同训练数据；每轮结束时评估（缺省不评估）", changes_training=False)
    val_ratio: float | None = flag(
        None,
        "不给 --eval_path 时，从训练数据里按文档留出这么大份额的行作评估，(0, 1)；"
        "同一篇或相近的文档总在同一边，十万行以上只看相同的（缺省不留）",
        kind=float,
        check=lambda value: None if 0 < value < 1 else "必须在 (0, 1) 内",
    )
    prompt_format: str = flag(
        "auto",
        "提示格式：plain 为基座模型，chat 为对话模型的角色标记，auto 由检查点决定；或一个模板文件，见 docs/data.md",
        kind=prompt_format_choice,
        metavar="auto|plain|chat|文件.json",
    )
    input_separator: str = flag(
        "",
        r"instruction 与 input 之间的文字，\n 是换行（缺省为空：直接相接）",
        kind=separator_choice,
        metavar="文字",
    )
    ignore_fields: str = flag(
        "", "当作没有的字段，逗号分隔，如 tools,images；认识而用不上的字段要这样写明才略去（缺省没有）"
    )
    loss_turns: str = flag(
        "all",
        "训练哪些回答：all 全部（连 history 里的），last 只有最后一个；消息里写明的 loss: false、weight: 0 总不训练",
        choices=LOSS_TURNS,
    )
    train_on_prompt: bool = flag(False, "提示（system 与用户的话）也是目标；缺省只训练回答")
    max_len: int = flag(1024, "一个样本的最大长度，token", check=at_least(1))
    max_src_len: int = flag(768, "提示部分的最大长度，token，须小于 max_len", check=at_least(1))
    is_skip: bool = flag(False, "超长的样本丢弃；缺省截断")
    drop_duplicates: bool = flag(False, "同一个文件里内容完全相同的行只留一个（不同的文件之间不比）；缺省都保留")
    cache_dir: str | None = flag(
        None, "分词结果的缓存目录，按内容、分词器与设置区分（缺省不缓存）", changes_training=False
    )
    text_unit: str = flag(
        "line",
        ".txt 里一篇文档是什么：line 一行，blank 空行隔开的一段，file 整个文件；文档之间是 eos",
        choices=TEXT_UNITS,
    )
    document_overlap: int = flag(
        0, "长于 max_len 的文档切成几段，后一段重复前一段末尾的多少个 token，只作上文，不作目标", check=at_least(0)
    )
    document_bos: bool = flag(False, "每篇文档之前加 bos（缺省不加：Baichuan 预训练时没有）")
    packing: bool = flag(
        True,
        "把一步的样本并排放进尽量少的 micro batch，各看各的，相同的开头（如同样的指令）只算一次，结果与不并排相同"
        "（缺省开；P-Tuning 第 1 版不支持，自动关）",
    )
