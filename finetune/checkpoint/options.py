"""基座与检查点的参数。"""

from dataclasses import dataclass

from finetune.options import at_least, flag

# 两族是同样的三个类，结构由检查点的 config.json 决定；参数留着，用户的命令里写了它
MODEL_FAMILIES = ("baichuan", "baichuan2")


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
