"""成批生成、停止字符串、目标 token 的 NLL 与标签的概率；不认识文件与命令行。"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteria

from finetune.data.packing import collate
from finetune.data.prompting import EncodedSample
from finetune.data.step_loader import batch_to_device
from finetune.inference.decoding import Decoder, plan_prompts
from finetune.methods.registry import base_model_of


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

    贪心的由 decoding.py 做；采样或给了 options（streamer、ZeRO-3 下的 synced_gpus=True，原样传下去）的用 generate。
    """
    if not (options or generation_config.do_sample):
        decoder = Decoder(model, generation_config, len(prompts))
        found = dict(row for done in decoder.run(plan_prompts(prompts)) for row in done)
        return [found[index] for index in range(len(prompts))]
    base = base_model_of(model)
    inputs = left_pad(prompts, generation_config.pad_token_id, base.model.embed_tokens.weight.device)
    # 检查点自带的生成配置不得补进来；训练中的评估之后还要保存它，所以放回
    own_config, base.generation_config = base.generation_config, generation_config
    try:
        output = model.generate(**inputs, generation_config=generation_config, **options)
    finally:
        base.generation_config = own_config
    generated = output[:, inputs["input_ids"].shape[1] :].tolist()
    eos = generation_config.eos_token_id
    return [ids[: ids.index(eos)] if eos in ids else ids for ids in generated]


def plan_batches(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """把提示词按长度从长到短成批，返回各批的行号。

    同批长度相近，填充少；最占显存的一批最先跑，放不下时立刻知道。
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """截到最早出现的停止字符串之前（不含它）→ (文字, 有没有停止字符串)。"""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def held_back(text: str, stops: Sequence[str]) -> int:
    """末尾有几个字可能是某个停止字符串的开头，先不能打印。"""
    sizes = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(sizes, default=0)


def settled_text(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """生成到一半的文字 → (不会再变的部分, 是否遇到了停止字符串)。

    凑不成完整字符的字节片段、可能是停止字符串开头的字先留着，停止字符串不在其内。
    """
    text, is_stopped = cut_at_stop(text, stops)
    text = text.rstrip("\ufffd")
    return (text if is_stopped else text[: len(text) - held_back(text, stops)]), is_stopped


class StopStrings(StoppingCriteria):
    """一行新生成的文字里出现任一停止字符串，这一行就停下；每次 generate 用一个新的。"""

    def __init__(self, tokenizer, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        # 只看末尾几个 token：一个字最多拆成 4 个字节 token
        self.num_last = 4 * max(len(stop) for stop in stops) + 4
        self.num_prompt: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """input_ids [b, 提示 + 已生成] → [b] 的布尔值。"""
        if self.num_prompt is None:
            self.num_prompt = input_ids.shape[1] - 1
        last = input_ids[:, max(self.num_prompt, input_ids.shape[1] - self.num_last) :].tolist()
        return torch.tensor([self.is_in(ids) for ids in last], device=input_ids.device)

    def is_in(self, ids: list[int]) -> bool:
        """一行新生成的 id 的末尾有没有停止字符串。"""
        return cut_at_stop(self.tokenizer.decode(ids[-self.num_last :], skip_special_tokens=True), self.stops)[1]


@torch.no_grad()
def label_log_probs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    batch_size: int,
    pad_token_id: int,
) -> list[list[float]]:
    """各提示词之后续写各标签的对数概率（nat，按 fp32 计算），[行][标签]。

    是标签全部 token 的对数概率之和，不除以长度：labels 以 eos 结尾时，它就是模型恰好回答这个标签的概率。
    各标签都只有一个 token 时，一个提示词只算一次。
    """
    device = base_model_of(model).model.embed_tokens.weight.device
    if all(len(label) == 1 for label in labels):
        first_tokens, scores = [label[0] for label in labels], []
        for start in range(0, len(prompts), batch_size):
            inputs = left_pad(prompts[start : start + batch_size], pad_token_id, device)
            logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
            scores += logits.float().log_softmax(-1)[:, first_tokens].tolist()
        return scores
    pairs = [(row, column) for row in range(len(prompts)) for column in range(len(labels))]
    scores = [[0.0] * len(labels) for _ in prompts]
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        inputs = left_pad([[*prompts[row], *labels[column]] for row, column in batch], pad_token_id, device)
        keep = max(len(labels[column]) for _, column in batch) + 1
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, -keep:-1]  # 末行没有下一个 token
        log_probs = logits.float().log_softmax(-1)
        targets = inputs["input_ids"][:, 1 - keep :, None]  # 左填充：各行的标签都在最右端
        token_scores = log_probs.gather(-1, targets)[..., 0].cpu()  # [b, keep - 1]
        for (row, column), values in zip(batch, token_scores, strict=True):
            scores[row][column] = float(values[-len(labels[column]) :].sum())
    return scores


@torch.no_grad()
def target_nll(model: nn.Module, samples: Iterable[EncodedSample]) -> tuple[list[float], list[int]]:
    """每条样本目标 token 的负对数似然之和（nat，按 fp32 计算）与目标数；损失是模型自己的，与训练、评估相同。"""
    device = base_model_of(model).model.embed_tokens.weight.device
    sums, counts = [], []
    for sample in samples:
        batch = batch_to_device(collate([sample], 0, packing=False), device)
        counts.append(len(batch["target_rows"]))
        loss = model(**batch, num_items_in_batch=1, use_cache=False, return_logits=False).loss if counts[-1] else 0.0
        sums.append(float(loss))
    return sums, counts
