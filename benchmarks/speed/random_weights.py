"""bench 的随机权重：每个张量只由它的名字决定，两种布局、各个程序得到同样的数值，不经过磁盘。"""

import re
import zlib

import torch
from torch import Tensor, nn

STANDARD_DEVIATION = 0.02
HEAD_SCALE = 4.0  # 放大词表投影的理由见 work.py
# 一次在 GPU 上生成这么多元素，再拷到目标处（可能在主机内存里）
CHUNK_ELEMENTS = 2**24


def random_rows(name: str, out: Tensor, device: torch.device, offset: int = 0):
    """按名字填 out（任意形状、设备与类型，连续）：N(0, 0.02)（词表投影更大），norm 的向量填 1。

    offset 是 out 在整个张量里的起点，元素数。
    """
    if name.endswith("norm.weight"):
        out.fill_(1.0)
        return
    deviation = STANDARD_DEVIATION * (HEAD_SCALE if name == "lm_head.weight" else 1.0)
    flat, start = out.view(-1), 0
    while start < flat.numel():
        chunk, within = divmod(offset + start, CHUNK_ELEMENTS)
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{name}/{chunk}".encode()))
        values = torch.empty(CHUNK_ELEMENTS, device=device).normal_(0.0, deviation, generator=generator)
        count = min(CHUNK_ELEMENTS - within, flat.numel() - start)
        flat[start : start + count].copy_(values[within : within + count])
        start += count


@torch.no_grad()
def fill_baichuan(model: nn.Module, device: torch.device):
    """Baichuan 布局；ZeRO-3 切分的只填本进程的一段（单进程时即全部）。"""
    for name, parameter in model.named_parameters():
        out = parameter.ds_tensor[: parameter.ds_numel] if hasattr(parameter, "ds_tensor") else parameter.data
        random_rows(name, out, device)


@torch.no_grad()
def fill_llama(model: nn.Module, device: torch.device):
    """Llama 布局：q、k、v 是同名 W_pack 的三段，其余同名。"""
    for name, parameter in model.named_parameters():
        for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
            if part in name:
                packed = name.replace(part, "W_pack")
                random_rows(packed, parameter.data, device, offset=index * parameter.numel())
                break
        else:
            random_rows(name, parameter.data, device)


@torch.no_grad()
def fill_lora(model: nn.Module):
    """peft 的 LoRA 的 A：只由层号决定，q、k、v 三个与 W_pack 的一个相同（分布与 peft 的缺省一样，取 bf16 的数）。

    B 从零起，第一步只动它，动多少全看 A：各取各的随机数时，走过同样的样本之后平均损失可差百分之一。
    """
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(int(re.search(r"layers\.(\d+)\.", name)[1]))
            bound = parameter.shape[1] ** -0.5
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(values.bfloat16())
