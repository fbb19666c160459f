"""合并与导出的核对：以 fp32 逐层算出两份权重的 logits 并比较，内存里至多一层，多大的模型都能核对。"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

from export_source import CheckFailed, normalized_head

from baichuan import BaichuanConfig
from baichuan.modeling_baichuan import BaichuanModel
from loading import Checkpoint
from prompting import encode_prompt

# 核对时 logits 之差的上限，相对于 logits 的最大绝对值：各类型一次舍入逐层累积的量级
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "q8_0": 1e-1}
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
    agreement: float  # 各位置贪心 token 相同的比例
    num_positions: int

    def __str__(self) -> str:
        return (
            f"{self.num_positions} 个位置的 logits 最大相差 {self.max_difference:.3g}"
            f"（logits 最大 {self.max_logit:.3g}），贪心 token 相同 {self.agreement:.1%}"
        )


@torch.inference_mode()
def streamed_logits(
    config: BaichuanConfig, read: Callable[[str], Tensor], prompts: list[list[int]], lora: dict | None = None
) -> list[Tensor]:
    """fp32 逐层前向：每次只读一层，返回各提示词的 logits [L, V]。

    Args:
        read: 官方名字 → 张量。
        lora: 给出时不合并，在各线性层旁边另算 缩放 · B(A x)，与训练时的适配器相同。
    """
    layer_config = BaichuanConfig.from_dict({**config.to_dict(), "num_hidden_layers": 1, "vocab_size": 1})
    model = BaichuanModel(layer_config).float().eval()
    final_norm, model.norm = model.norm, torch.nn.Identity()
    active: dict[str, tuple[Tensor, Tensor, float]] = {}

    def add_lora(name: str):
        def hook(module, inputs, output):
            if name in active:
                lora_a, lora_b, scaling = active[name]
                return output + scaling * (inputs[0] @ lora_a.T @ lora_b.T)
            return output

        return hook

    layer = model.layers[0]
    for name, module in layer.named_modules():
        module.register_forward_hook(add_lora(name))
    embeddings = read("model.embed_tokens.weight")
    states = [embeddings[torch.tensor(prompt)][None].float() for prompt in prompts]  # 各 [1, L, H]
    del embeddings
    for index in tqdm(range(config.num_hidden_layers), desc="核对", unit="层", dynamic_ncols=True):
        prefix = f"model.layers.{index}."
        for name, parameter in layer.named_parameters():
            parameter.copy_(read(prefix + name))
        active.clear()
        active.update({k.removeprefix(prefix): v for k, v in (lora or {}).items() if k.startswith(prefix)})
        states = [model(inputs_embeds=hidden, use_cache=False).last_hidden_state for hidden in states]
    final_norm.weight.copy_(read("model.norm.weight"))
    head = normalized_head(config, "lm_head.weight", read("lm_head.weight").float())
    return [final_norm(hidden[0]) @ head.T for hidden in states]


def compare_logits(expected: list[Tensor], actual: list[Tensor], kind: str, what: str) -> Comparison:
    """比较两组 logits；kind 是 TOLERANCES 的键。

    Raises:
        CheckFailed: 差超过上限（含出现 NaN）。
    """
    reference, result = torch.cat(expected), torch.cat(actual)
    difference, largest = float((reference - result).abs().max()), float(reference.abs().max())
    agreement = float((reference.argmax(-1) == result.argmax(-1)).float().mean())
    comparison = Comparison(difference, largest, agreement, len(reference))
    limit = TOLERANCES[kind] * max(1.0, largest)
    if not difference <= limit:
        raise CheckFailed(f"{what}核对不过：{comparison}，上限 {limit:.3g}（{kind}）；没有留下结果，请报告这个问题")
    return comparison


def encode_check_prompts(
    checkpoint: Checkpoint, tokenizer, texts: list[str] | tuple[str, ...] | None
) -> list[list[int]]:
    """核对用的提示词 id，格式与训练、预测相同。"""
    prompts = [
        encode_prompt(tokenizer, [("user", text)], **checkpoint.prompting._asdict()) for text in texts or CHECK_PROMPTS
    ]
    if not all(prompts):
        raise ValueError("--check_prompt 里有空的提示词，请去掉")
    return prompts
