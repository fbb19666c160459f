"""成批生成与目标 token 的 NLL；输入输出都是 token id，不认识文件与命令行。"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from model_factory import base_model_of
from prompting import IGNORE_INDEX, EncodedSample


def make_generation_config(model: nn.Module, max_new_tokens: int, **sampling: Any) -> GenerationConfig:
    """写明每一项的生成配置；sampling 为空是贪心，否则是 temperature、top_p、top_k 与 repetition_penalty。

    repetition_penalty 总是写明，缺省 1.0：没写的项会被 transformers 5.x 用检查点的 generation_config.json 补上
    （对话模型那里是 1.05 或 1.1，还有 do_sample），贪心的结果就变了。
    """
    config = base_model_of(model).config
    options: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, **sampling}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=1,
        use_cache=True,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        **options,
    )


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """左填充成 input_ids、attention_mask，各 [b, 最长]。"""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def generate_batch(
    model: nn.Module, prompts: Sequence[Sequence[int]], generation_config: GenerationConfig, **options: Any
) -> list[list[int]]:
    """一批提示词各续写一段，返回新生成的 id，不含 eos 及其后的填充。

    options 原样传给 generate（streamer、ZeRO-3 下的 synced_gpus=True）。
    """
    base = base_model_of(model)
    # 检查点自带的生成配置不得补进来
    base.generation_config = generation_config
    inputs = left_pad(prompts, generation_config.pad_token_id, base.model.embed_tokens.weight.device)
    output = model.generate(**inputs, generation_config=generation_config, **options)
    generated = output[:, inputs["input_ids"].shape[1] :].tolist()
    eos = generation_config.eos_token_id
    return [ids[: ids.index(eos)] if eos in ids else ids for ids in generated]


def generate_all(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    generation_config: GenerationConfig,
    batch_size: int,
    on_batch: Callable[[int], Any] = lambda num_rows: None,
    **options: Any,
) -> list[list[int]]:
    """全部提示词的续写，次序与输入相同。

    按长度从长到短成批：同批长度相近，填充少；最占显存的一批最先跑，放不下时立刻知道。
    on_batch 在每批之后以该批行数调用（进度条）。
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for index, ids in zip(
            batch, generate_batch(model, [prompts[i] for i in batch], generation_config, **options), strict=True
        ):
            results[index] = ids
        on_batch(len(batch))
    return results


@torch.no_grad()
def target_nll(model: nn.Module, samples: Iterable[EncodedSample]) -> tuple[list[float], list[int]]:
    """每条样本目标 token 的负对数似然之和（nat，按 fp32 计算）与目标数；移位与训练相同。

    只算第一个目标之后的各行 logits，显存里至多一条样本的 [目标段, V]。
    """
    device = base_model_of(model).model.embed_tokens.weight.device
    sums, counts = [], []
    for sample in samples:
        labels = torch.tensor(sample.labels)[1:]
        target_rows = (labels != IGNORE_INDEX).nonzero()[:, 0]
        if not len(target_rows):
            sums.append(0.0)
            counts.append(0)
            continue
        first = int(target_rows[0])
        input_ids = torch.tensor([list(sample.input_ids)], device=device)
        keep = input_ids.shape[1] - first
        mask = torch.ones_like(input_ids)
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
        # 末行没有下一个 label
        rows = logits[0, -keep:-1][(target_rows - first).to(device)].float()
        loss = nn.functional.cross_entropy(rows, labels[target_rows].to(device), reduction="sum")
        sums.append(float(loss))
        counts.append(len(target_rows))
    return sums, counts
