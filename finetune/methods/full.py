"""full：全部参数都训练。"""

from argparse import Namespace

from torch import nn

from baichuan import BaichuanForCausalLM


def apply_full(model: BaichuanForCausalLM, args: Namespace) -> nn.Module:
    """全部参数都训练。"""
    return model.requires_grad_(True)
