"""--load_in_4bit、--load_in_8bit：用 bitsandbytes 量化冻结的基座（QLoRA，Dettmers 等，2023），只训练 LoRA。

量化的只是各层的线性层；词嵌入、RMSNorm 与词表投影（NormHead）保持原来的精度。逐个张量读入、量化、放下。
"""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.checkpoint.weights import model_files

NUM_BITS = {"4bit": 4, "8bit": 8}
# LLM.int8()（Dettmers 等，2022）：超过它的激活按原精度算
OUTLIER_THRESHOLD = 6.0


@torch.no_grad()
def load_quantized(
    skeleton: nn.Module, path: str | Path, dtype: torch.dtype, device: torch.device, quantization: str
) -> nn.Module:
    """把 meta 设备上的骨架变成量化的模型，返回它；内存里最多多出一个没有量化的张量。

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
    for weight_file in model_files(path):
        for name in sorted(weight_file.names & names):
            tensor = weight_file.read(name).to(dtype)
            if name in quantized:
                quantize_into(quantized[name], tensor, device)
                continue
            parent, _, last = name.rpartition(".")
            # 复制：不要一直映射着整个权重文件
            setattr(skeleton.get_submodule(parent), last, nn.Parameter(tensor.to(device, copy=True)))
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
    """量化一个权重 [out, in]，放进 layer。"""
    import bitsandbytes

    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        layer.weight = bitsandbytes.nn.Int8Params(tensor, requires_grad=False, has_fp16_weights=False).to(device)
        return
    weight = bitsandbytes.nn.Params4bit(
        tensor, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    layer.weight = weight.to(device)
