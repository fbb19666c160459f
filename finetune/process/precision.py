"""计算精度的选择：设备算得快的那种。"""

import copy
import functools
import time

import torch

from baichuan import BaichuanConfig, BaichuanForCausalLM
from finetune.process.accelerator import card_name, computes_bf16, has_accelerator

STEP_TOKENS, STEP_PARAMETERS = 64, 10**7


@functools.cache
def cpu_bf16_speedup() -> float:
    """CPU 上 bf16 矩阵乘法的速率是 fp32 的几倍：各算五次 512 × 512，取最快的（约 20 毫秒）。

    指令集说明不了快慢：avx512_bf16 在 Zen 4 上快 2 倍多，在没有 AMX 的 Emerald Rapids 上慢一半；只有 AVX2 时慢约 7 倍。
    单线程，量这个线程占用的 CPU 时间：机器忙的时候也准。
    """

    def fastest(dtype: torch.dtype) -> float:
        matrix, seconds = torch.ones(512, 512, dtype=dtype), []
        for _ in range(5):
            began = time.thread_time()
            matrix @ matrix
            seconds.append(time.thread_time() - began)
        return min(seconds)

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return fastest(torch.float32) / fastest(torch.bfloat16)
    finally:
        torch.set_num_threads(num_threads)


def step_seconds(config: BaichuanConfig, precision: str) -> float:
    """这个模型的一小步（STEP_TOKENS 个 token 的前向与反向）要多少 CPU 秒：先走一遍，再取两遍里快的。

    权重是随机的；深的只取前几层，词表大的只取一部分，约 2 × STEP_PARAMETERS 个参数以内。
    """
    small = copy.deepcopy(config)
    small.num_hidden_layers = min(config.num_hidden_layers, STEP_PARAMETERS // layer_parameters(config))
    small.vocab_size = min(config.vocab_size, STEP_PARAMETERS // config.hidden_size)
    with torch.random.fork_rng(devices=[]):
        model = BaichuanForCausalLM(small).to(TORCH_DTYPES[precision]).train()
    ids, seconds = torch.arange(STEP_TOKENS)[None] % small.vocab_size, []
    for _ in range(3):
        began = time.process_time()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        seconds.append(time.process_time() - began)
    return min(seconds[1:])


def layer_parameters(config: BaichuanConfig) -> int:
    """一层的矩阵有多少参数。"""
    return config.hidden_size * (4 * config.hidden_size + 3 * config.intermediate_size)


def choose_precision(requested: str, config: BaichuanConfig | None = None) -> tuple[str, str]:
    """把 --precision 定为 bf16、fp16 或 fp32 之一，并说明理由 → (精度, 理由)。

    CPU 上给出 config 时量这个模型的一小步：小模型里矩阵乘法不是大头，只看它会选错；一层就很大的只看矩阵乘法。
    """
    if requested != "auto":
        return requested, "由 --precision 指定"
    if has_accelerator():
        if computes_bf16():
            return "bf16", f"{card_name()} 直接计算 bf16"
        return "fp16", f"{card_name()} 不直接计算 bf16，用 fp16 加损失缩放"
    if config is not None and layer_parameters(config) <= STEP_PARAMETERS:
        seconds = {name: step_seconds(config, name) for name in ("fp32", "bf16")}
        shown = "，".join(f"{name} {1000 * value:.0f} 毫秒" for name, value in seconds.items())
        return min(seconds, key=seconds.get), f"量得这个模型 {STEP_TOKENS} 个 token 的前向与反向：{shown}"
    speedup = cpu_bf16_speedup()
    if speedup >= 1:
        return "bf16", f"这个 CPU 的 bf16 矩阵乘法是 fp32 的 {speedup:.1f} 倍快"
    return "fp32", f"这个 CPU 的 bf16 矩阵乘法只有 fp32 的 {speedup:.2f} 倍快"


TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# config.json 里的写法 → torch 的类型
NAMED_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TORCH_DTYPES.values()}
