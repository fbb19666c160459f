"""freeze：只训练名字里含给定片段的参数。"""

from argparse import Namespace

from torch import nn

from baichuan import BaichuanForCausalLM


def apply_freeze(model: BaichuanForCausalLM, args: Namespace) -> nn.Module:
    """只训练名字里含 --freeze_module_name 任一片段的参数（名字沿用官方张量名）。

    Raises:
        ValueError: 某个片段一个参数也没匹配到；列出模型里有什么。
    """
    names = [name for name, _ in model.named_parameters()]
    unmatched = [part for part in freeze_parts(args) if not any(part in name for name in names)]
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
        parameter.requires_grad_(any(part in name for part in freeze_parts(args)))
    return model


def freeze_parts(args: Namespace) -> list[str]:
    """--freeze_module_name 按逗号切开，去掉空白与空项。"""
    return [part.strip() for part in (args.freeze_module_name or "").split(",") if part.strip()]
