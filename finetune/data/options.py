"""数据的参数：读哪个文件、怎样编码、怎样并排。"""

from dataclasses import dataclass

from finetune.data.prompting import PROMPT_FORMATS
from finetune.options import at_least, flag


@dataclass
class DataOptions:
    """train.py 的数据参数。"""

    train_path: str = flag(
        None,
        "训练数据，JSON Lines 或 JSON 数组（必填），格式见 docs/data.md",
        required=True,
        changes_training=False,  # 续训比较的是内容的哈希
    )
    eval_path: str | None = flag(None, "评估数据，格式同训练数据；每轮结束时评估（缺省不评估）", changes_training=False)
    prompt_format: str = flag(
        "auto",
        "提示格式：plain 为基座模型，chat 为对话模型的角色标记，auto 由检查点决定",
        choices=("auto", *PROMPT_FORMATS),
    )
    max_len: int = flag(1024, "一个样本的最大长度，token", check=at_least(1))
    max_src_len: int = flag(768, "提示部分的最大长度，token，须小于 max_len", check=at_least(1))
    is_skip: bool = flag(False, "超长的样本丢弃；缺省截断")
    drop_duplicates: bool = flag(False, "内容完全相同的样本只留一个；缺省都保留")
    cache_dir: str | None = flag(
        None, "分词结果的缓存目录，按内容、分词器与设置区分（缺省不缓存）", changes_training=False
    )
    packing: bool = flag(
        True,
        "把一步的样本并排放进尽量少的 micro batch，各看各的，相同的开头（如同样的指令）只算一次，结果与不并排相同"
        "（缺省开；P-Tuning 第 1 版不支持，自动关）",
    )
