"""合并与导出的核对：以 fp32 逐层算出两份权重的 logits 并比较，内存里至多一层，多大的模型都能核对。"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from baichuan import BaichuanConfig
from baichuan.modeling_baichuan import BaichuanModel
from finetune.data.prompting import Prompting, encode_prompt
from finetune.export.tensors import CheckFailed, TensorSource, dora_factor, normalized_head, row_parts
from finetune.process.precision import NAMED_DTYPES
from finetune.terminal import watched

# 合并公式与 fp32 的导出：只有求和次序不同，logits 之差相对于最大的 logit
EXACT_TOLERANCE = 1e-4
# 舍入带来的差（均方根，相对于 logits 的均方根）：一次舍入逐层累积的量级，超过说明不只是舍入
ROUNDING_TOLERANCES = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.3, "q8_0": 0.3}
CHECK_PROMPTS = (
    "你好，请介绍一下你自己。",
    "故障现象：发动机启动后怠速不稳，仪表盘上的故障灯常亮。请抽取三元组。",
    "这家店的服务很好，下次还会再来。这条评论是正面还是负面？",
    "The quick brown fox jumps over the lazy dog. 1234567890",
)


class Comparison(NamedTuple):
    """两组 logits 的比较。"""

    max_difference: float
    max_logit: float
    relative_rms: float  # 差的均方根 / logits 的均方根
    agreement: float  # 各位置贪心 token 相同的比例
    num_positions: int

    def __str__(self) -> str:
        return (
            f"{self.num_positions} 个位置的 logits 最大相差 {self.max_difference:.3g}"
            f"（最大的 logit {self.max_logit:.3g}，相对均方根差 {self.relative_rms:.2g}），"
            f"贪心 token 相同 {self.agreement:.1%}"
        )


def compare_logits(expected: list[Tensor], actual: list[Tensor]) -> Comparison:
    """比较两组 logits，各为若干 [L, V]。"""
    reference, result = torch.cat(expected), torch.cat(actual)
    difference = reference - result
    return Comparison(
        max_difference=float(difference.abs().max()),
        max_logit=float(reference.abs().max()),
        relative_rms=float(difference.square().mean().sqrt() / reference.square().mean().sqrt()),
        agreement=float((reference.argmax(-1) == result.argmax(-1)).float().mean()),
        num_positions=len(reference),
    )


@torch.inference_mode()
def streamed_logits(
    config: BaichuanConfig | LlamaConfig,
    read: Callable[..., Tensor],
    prompts: list[list[int]],
    lora: dict | None = None,
    magnitudes: dict[str, Tensor] | None = None,
) -> list[Tensor]:
    """fp32 逐层前向：每次只读一层，返回各提示词的 logits [L, V]。

    Args:
        config: LlamaConfig 时由 transformers 的 Llama 的层来算，read 与 lora 是 Llama 的名字。
        read: 官方名字 → 张量；第二个参数是哪些行（slice），缺省全部。
        lora: 给出时不合并，在各线性层旁边另算 缩放 · B(A x)，与训练时的适配器相同。
        magnitudes: DoRA 各行的大小。
    """
    one_layer = {"num_hidden_layers": 1, "vocab_size": 1, "pad_token_id": 0}
    layer_config = type(config).from_dict({**config.to_dict(), **one_layer})
    model = (LlamaModel if config.model_type == "llama" else BaichuanModel)(layer_config).float().eval()
    final_norm, model.norm = model.norm, torch.nn.Identity()
    active: dict[str, tuple[Tensor, Tensor, float]] = {}

    def add_lora(name: str):
        def hook(module, inputs, output):
            if name in active:
                lora_a, lora_b, scaling = active[name]
                output = output + scaling * (inputs[0] @ lora_a.T @ lora_b.T)
                magnitude = (magnitudes or {}).get(prefix + name)
                if magnitude is not None:
                    output = output * dora_factor(magnitude, module.weight + scaling * lora_b @ lora_a)[:, 0]
            return output

        return hook

    layer = model.layers[0]
    for name, module in layer.named_modules():
        module.register_forward_hook(add_lora(name))

    def embed(prompt: list[int]) -> Tensor:
        """各 id 的一行 → [1, L, H]。"""
        rows = [read("model.embed_tokens.weight", slice(token, token + 1)) for token in prompt]
        return torch.cat(rows)[None].float()

    states = [embed(prompt) for prompt in prompts]
    for index in watched(range(config.num_hidden_layers), "核对", "层"):
        prefix = f"model.layers.{index}."
        for name, parameter in layer.named_parameters():
            parameter.copy_(read(prefix + name))
        active.clear()
        active.update({k.removeprefix(prefix): v for k, v in (lora or {}).items() if k.startswith(prefix)})
        states = [model(inputs_embeds=hidden, use_cache=False).last_hidden_state for hidden in states]
    final_norm.weight.copy_(read("model.norm.weight"))
    states, logits = [final_norm(hidden[0]) for hidden in states], []
    for rows in row_parts("lm_head.weight", (config.vocab_size, config.hidden_size)):
        head = normalized_head(config, "lm_head.weight", read("lm_head.weight", rows).float())
        logits.append([hidden @ head.T for hidden in states])
    return [torch.cat(parts, dim=-1) for parts in zip(*logits, strict=True)]


def check_export(
    source: TensorSource,
    config: BaichuanConfig,
    read: Callable[..., Tensor],
    prompts: list[list[int]],
    kind: str,
    vector_kind: str | None = None,
) -> Comparison:
    """核对写出的权重：合并公式严格相等，写出的每个张量恰是合并结果舍入一次，logits 之差只是舍入。

    Args:
        config: 写出的模型的结构（词表投影已归一化时 norm_head 为 False）。
        read: 官方名字（与哪些行）→ 写出的张量。
        kind: 写出的类型，ROUNDING_TOLERANCES 的键；vector_kind: 向量（RMSNorm 的权重）的类型，缺省与 kind 相同。

    Returns:
        来源（适配器不合并）与写出的权重的 logits 之差。

    Raises:
        CheckFailed: 任何一项不符（含 NaN）。
    """
    expected = streamed_logits(source.config, source.read_base, prompts, source.lora, source.magnitudes)
    if source.lora:
        merged = compare_logits(expected, streamed_logits(source.config, source.read, prompts))
        if not merged.max_difference <= EXACT_TOLERANCE * max(1.0, merged.max_logit):
            raise CheckFailed(f"fp32 合并与不合并的适配器不同：{merged}")
    for name in watched(source.names, "核对权重", "个"):
        tensor_kind = vector_kind if vector_kind and len(source.shapes[name]) == 1 else kind
        for rows in row_parts(name, source.shapes[name]):
            tensor = source.read(name, rows)
            if source.config.norm_head and not config.norm_head:
                tensor = normalized_head(source.config, name, tensor)
            check_rounding(name, tensor, read(name, rows).float(), tensor_kind)
    result = compare_logits(expected, streamed_logits(config, read, prompts))
    if not result.relative_rms <= ROUNDING_TOLERANCES[kind]:
        raise CheckFailed(f"写出的权重算出的 logits 与来源不同：{result}，上限 {ROUNDING_TOLERANCES[kind]}（{kind}）")
    return result


def check_rounding(name: str, exact: Tensor, written: Tensor, kind: str):
    """written 恰是 exact 舍入一次的结果；q8_0 时误差不超过每 32 个数的步长的一半。

    Raises:
        CheckFailed: 不是。
    """
    if kind != "q8_0":
        is_same = torch.equal(written, exact.to(NAMED_DTYPES[kind]).float())
    else:
        blocks = exact.flatten().unfold(0, 32, 32)
        # 步长存成 fp16：乘 127 之后的相对误差至多 2^-11，非规格化的步长另有 127 · 2^-25
        limit = blocks.abs().amax(-1, keepdim=True) / 127 * (0.5 + 127 * 2**-11) + 127 * 2**-25
        is_same = bool(((written.flatten().unfold(0, 32, 32) - blocks).abs() <= limit).all())
    if not is_same:
        raise CheckFailed(f"写出的 {name} 不是来源舍入一次的结果（{kind}）")


def encode_check_prompts(prompting: Prompting, tokenizer, texts: list[str] | tuple[str, ...] | None) -> list[list[int]]:
    """核对用的提示词 id，格式与训练、预测相同。"""
    prompts = [encode_prompt(tokenizer, [("user", text)], **prompting._asdict()) for text in texts or CHECK_PROMPTS]
    if not all(prompts):
        raise ValueError("--check_prompt 里有空的提示词，请去掉")
    return prompts
