"""freeze：只训练名字里含给定片段的参数（名字沿用官方张量名）。"""

from dataclasses import dataclass

from finetune.methods.method import TrainMethod
from finetune.options import flag


@dataclass
class FreezeOptions:
    """只属于 freeze 的参数。"""

    freeze_module_name: str | None = flag(
        None,
        'freeze：要训练的参数名片段，逗号或空格分隔，如 "layers.31.,layers.30."（缺省没有，必须给出）',
        is_list=True,
    )
    cache_frozen: str = flag(
        "none",
        "freeze：把冻结底层的输出存在内存（/dev/shm）或磁盘（output_dir），从第二轮起不再算底层"
        "（缺省 none；需要 全部 token 数 × 隐藏宽度 × 2 字节）",
        choices=("none", "memory", "disk"),
        changes_training=False,
    )


def freeze_parts(options: FreezeOptions) -> list[str]:
    """--freeze_module_name 按逗号切开，去掉空白与空项。"""
    return [part.strip() for part in (options.freeze_module_name or "").split(",") if part.strip()]


def is_trainable(name: str, options: FreezeOptions) -> bool:
    """名字里含任一片段。"""
    return any(part in name for part in freeze_parts(options))


def apply_freeze(model, options: FreezeOptions):
    """只让名字里含 --freeze_module_name 任一片段的参数可以训练。

    Raises:
        ValueError: 某个片段一个参数也没匹配到；列出模型里有什么。
    """
    names = [name for name, _ in model.named_parameters()]
    unmatched = [part for part in freeze_parts(options) if not any(part in name for name in names)]
    if unmatched:
        modules = sorted({name.split(".weight")[0].replace("model.layers.", "layers.") for name in names})
        layers = model.config.num_hidden_layers
        others = [name for name in modules if not name.startswith("layers.")]
        parts = sorted({name.split(".", 2)[2] for name in modules if name.startswith("layers.")})
        raise ValueError(
            f"--freeze_module_name 的 {unmatched} 没有匹配到任何参数；"
            f"模型有 layers.0. 到 layers.{layers - 1}.（注意末尾的点），每层有 {parts}，此外还有 {others}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trainable(name, options))
    return model


def freeze_problems(options: FreezeOptions) -> list[str]:
    """没有说训练哪些层。"""
    if freeze_parts(options):
        return []
    return ['--train_type freeze 需要 --freeze_module_name，如 "layers.31.,layers.30."（要训练的层）']


METHOD = TrainMethod(
    name="freeze",
    learning_rate=1e-4,
    options=FreezeOptions,
    apply=apply_freeze,
    is_trainable=is_trainable,
    problems=freeze_problems,
    smaller=lambda options: ["少选几层或换 --train_type lora"],
)
