"""full：全部参数都训练。"""

from dataclasses import dataclass

from finetune.methods.method import TrainMethod


@dataclass
class FullOptions:
    """没有自己的参数。"""


def apply_full(model, options: FullOptions):
    """全部参数都可以训练。"""
    model.requires_grad_(True)
    return model


METHOD = TrainMethod(
    name="full",
    learning_rate=1e-5,
    options=FullOptions,
    apply=apply_full,
    is_trainable=lambda name, options: True,
    smaller=lambda options: ["换 --train_type lora 或 freeze"],
)
