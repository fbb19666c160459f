"""--load_in_4bit、--load_in_8bit：用 bitsandbytes 量化冻结的基座（QLoRA，Dettmers 等，2023），只训练 LoRA。

量化的只是各层的线性层；词嵌入、RMSNorm 与词表投影（NormHead）保持原来的精度。几个线程同时各读一个张量，边读边量化。
"""

import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.checkpoint.weights import WeightFile, read_all

NUM_BITS = {"4bit": 4, "8bit": 8}
# LLM.int8()（Dettmers 等，2022）：超过它的激活按原精度算
OUTLIER_THRESHOLD = 6.0
# nf4 的一块与两次量化的一块（bitsandbytes 的缺省）
BLOCK, STATISTICS_BLOCK = 64, 256
# CPU 上一次量化这么多个元素：临时的量留在缓存里；是 BLOCK 的倍数，各块互不相干，结果与整个一起做逐位相同
CHUNK = 2**17


@torch.no_grad()
def load_quantized(
    skeleton: nn.Module, path: str | Path, dtype: torch.dtype, device: torch.device, quantization: str
) -> nn.Module:
    """把 meta 设备上的骨架变成量化的模型，返回它；CPU 上没有量化的张量从不整个复制，卡上每个线程至多一个。

    Args:
        skeleton: BaichuanForCausalLM，没有存储，与 path 的权重已经核对过。
        dtype: 没有量化的权重与计算的类型。
        quantization: 4bit 为 nf4 加两次量化，8bit 为 LLM.int8()。
    """
    # 每次前向都会说一遍「输入转成 fp16」
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    assert not list(skeleton.buffers()), "骨架里有缓冲区，没有人给它填值"
    quantized = {}
    for name, module in list(skeleton.model.layers.named_modules()):
        if type(module) is nn.Linear:
            layer = empty_layer(module, dtype, quantization)
            parent, _, last = name.rpartition(".")
            setattr(skeleton.model.layers.get_submodule(parent), last, layer)
            quantized[f"model.layers.{name}.weight"] = layer
    names = {name for name, _ in skeleton.named_parameters()}

    def work(weight_file: WeightFile, name: str) -> Any:
        tensor, layer = weight_file.read(name), quantized.get(name)
        if layer is None:
            return tensor.to(device=device, dtype=dtype, copy=True)  # 复制：不要一直映射着整个权重文件
        if device.type == "cpu":
            return quantize_in_chunks(tensor, dtype, quantization)
        return quantize_into(layer, tensor.to(dtype), device)

    for name, result in read_all(path, names, work):
        if name not in quantized:
            parent, _, last = name.rpartition(".")
            setattr(skeleton.get_submodule(parent), last, nn.Parameter(result))
        elif result is not None:
            set_quantized(quantized[name], *result, dtype)
    setattr(skeleton, f"is_loaded_in_{quantization}", True)  # peft 由此选用它的量化 LoRA 层
    return skeleton


def empty_layer(linear: nn.Linear, dtype: torch.dtype, quantization: str) -> nn.Module:
    """代替 linear 的 bitsandbytes 层，还没有权重。"""
    import bitsandbytes

    assert linear.bias is None, "Baichuan 的线性层没有偏置"
    sizes = (linear.in_features, linear.out_features)
    if quantization == "8bit":
        return bitsandbytes.nn.Linear8bitLt(
            *sizes, bias=False, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
        )
    layer = bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    # CPU 上评估时它会把权重换成只能推理的排法，之后就不能训练了
    layer.support_avx512bf16_for_cpu = False
    return layer


def quantize_into(layer: nn.Module, tensor: Tensor, device: torch.device):
    """在卡上量化一个权重 [out, in]，放进 layer。"""
    import bitsandbytes

    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        layer.weight = bitsandbytes.nn.Int8Params(tensor, requires_grad=False, has_fp16_weights=False).to(device)
        return
    weight = bitsandbytes.nn.Params4bit(
        tensor, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    layer.weight = weight.to(device)


def quantize_in_chunks(tensor: Tensor, dtype: torch.dtype, quantization: str) -> tuple[Tensor, Tensor]:
    """在 CPU 上一小段一小段地量化一个权重 [out, in] → (打包的权重, 各块或各行的尺度)；与整个一起做逐位相同。"""
    from bitsandbytes import functional

    if quantization == "8bit":
        packed, scales = torch.empty(tensor.shape, dtype=torch.int8), torch.empty(len(tensor))
        num_rows = max(1, CHUNK // tensor.shape[1])
        for start in range(0, len(tensor), num_rows):
            rows = slice(start, start + num_rows)
            packed[rows], scales[rows], _ = functional.int8_vectorwise_quant(tensor[rows].to(dtype).half())
        return packed, scales
    flat = tensor.reshape(-1)
    packed = torch.empty(-(-len(flat) // 2), 1, dtype=torch.uint8)
    scales = torch.empty(-(-len(flat) // BLOCK))
    for start in range(0, len(flat), CHUNK):
        values = flat[start : start + CHUNK].to(dtype)
        if len(values) % BLOCK:  # 末尾不足一块
            part, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
            part_scales = state.absmax
        else:
            part, part_scales = quantize_nf4(values)
        packed[start // 2 : (start + CHUNK) // 2] = part
        scales[start // BLOCK : (start + CHUNK) // BLOCK] = part_scales
    return packed, scales


def quantize_nf4(values: Tensor) -> tuple[Tensor, Tensor]:
    """整块的一段 [N] → (每字节两个码 [N/2, 1], 各块的尺度 [N/BLOCK])，与 bitsandbytes 的 quantize_4bit 逐位相同。

    它对每个数做一次二分查找；这里查表，快五倍。
    """
    blocks = values.float().view(-1, BLOCK)
    scales = blocks.abs().amax(-1)
    scaled = (blocks * (1 / scales.clamp(min=1e-38)).view(-1, 1)).clamp_(-1, 1).view(-1)
    lowest, bound = nf4_tables()
    top_bits = (scaled.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    codes = lowest.index_select(0, top_bits).add_(scaled > bound.index_select(0, top_bits))
    return (codes[::2] << 4).bitwise_or_(codes[1::2]).view(-1, 1), scales


@cache
def nf4_tables() -> tuple[Tensor, Tensor]:
    """fp32 的高 16 位 → 这样的数里最小的码 [65536]，与大于它就是下一个码的界 [65536]（没有为 inf）。"""
    from bitsandbytes import functional

    code = functional.get_4bit_type("nf4", device="cpu")
    bounds = (code[:-1] + code[1:]) / 2
    bits = torch.arange(2**16, dtype=torch.int32) << 16
    ends = torch.stack((bits, bits | 0xFFFF)).view(torch.float32)  # 负数的次序相反
    lowest, highest = torch.bucketize(ends.amin(0), bounds), torch.bucketize(ends.amax(0), bounds)
    assert int((highest - lowest).max()) == 1
    return lowest.to(torch.uint8), torch.where(highest > lowest, bounds[lowest.clamp(max=len(bounds) - 1)], torch.inf)


def set_quantized(layer: nn.Module, packed: Tensor, scales: Tensor, dtype: torch.dtype):
    """把 quantize_in_chunks 的结果放进 layer；nf4 的尺度再量化一次。"""
    from bitsandbytes import functional
    from bitsandbytes import nn as layers

    if isinstance(layer, layers.Linear8bitLt):
        layer.weight = layers.Int8Params(packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=scales)
        return
    offset = scales.mean()
    scales, statistics = functional.quantize_blockwise(scales - offset, blocksize=STATISTICS_BLOCK)
    layer.quant_state = functional.QuantState(
        absmax=scales,
        shape=torch.Size((layer.out_features, layer.in_features)),
        dtype=dtype,
        blocksize=BLOCK,
        code=functional.get_4bit_type("nf4", device=packed.device),
        quant_type="nf4",
        offset=offset,
        state2=statistics,
    )
    layer.weight = layers.Params4bit(
        packed,
        requires_grad=False,
        quant_state=layer.quant_state,
        blocksize=BLOCK,
        quant_type="nf4",
        module=layer,
        bnb_quantized=True,
    )
