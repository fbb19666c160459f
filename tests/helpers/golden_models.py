"""模型的测试共用：黄金值与微型模型的载入，比较，一批样本的几种排法。

黄金值的容差：fp32 logits 2e-5，损失 1e-5，梯度相对 1e-4；半精度比较与 fp32 的距离，不逐位比较。
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from baichuan import BaichuanForCausalLM

IGNORE_INDEX = -100
CASES = (
    "baichuan-7b",
    "baichuan-13b",
    "baichuan-13b-oddheads",
    "baichuan2-7b",
    "baichuan2-13b",
    "baichuan2-13b-oddheads",
)
# Baichuan-7B 的官方代码不能打包；第一代没有 z_loss
PACKED_CASES = CASES[1:]
Z_LOSS_CASES = CASES[3:]
# 四种结构各一个，都在 tests/goldens 中，没有 ../shared 也能跑
ARCHITECTURES = ("baichuan-7b", "baichuan-13b-oddheads", "baichuan2-7b", "baichuan2-13b-oddheads")
LOGITS_ATOL, LOSS_ATOL, GRADIENT_RTOL, PACKING_RTOL = 2e-5, 1e-5, 1e-4, 1e-5


def load_golden(directory: Path) -> SimpleNamespace:
    checkpoint = directory / "checkpoint-safetensors"
    if not checkpoint.is_dir():
        checkpoint = directory / "checkpoint"
    return SimpleNamespace(
        name=directory.name,
        directory=directory,
        checkpoint=checkpoint,
        tensors=load_file(directory / "golden.safetensors"),
        values=json.loads((directory / "golden.json").read_text(encoding="utf-8"))["values"],
        norm_head=directory.name.startswith("baichuan2"),
        rope="7b" in directory.name,
    )


def load_model(golden, dtype=torch.float32, checkpoint=None, **options) -> BaichuanForCausalLM:
    """微型检查点的键看不出 13B 是哪一代，norm_head 因此总是明写。"""
    options = {"norm_head": golden.norm_head, **options}
    model = AutoModelForCausalLM.from_pretrained(checkpoint or golden.checkpoint, dtype=dtype, **options)
    assert type(model) is BaichuanForCausalLM
    return model


def assert_close(actual, expected, atol, where=None):
    """最大绝对误差不超过 atol；where 为 attention_mask 时只比较其中为真的位置。"""
    assert actual.shape == expected.shape
    difference = (actual.float() - expected.float()).abs()
    if where is not None:
        difference = difference[where.bool()]
    assert not difference.isnan().any()
    assert difference.max().item() <= atol


def relative(actual, expected) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, rtol=PACKING_RTOL):
    """逐张量的相对误差；一个张量的梯度很小时按全部梯度的千分之一计，以免比较舍入噪声。"""
    assert actual.keys() == expected.keys() and expected
    total = sum(g.double().norm() ** 2 for g in expected.values()).sqrt()
    for name, gradient in expected.items():
        scale = max(gradient.double().norm(), 1e-3 * total)
        difference = (actual[name].double() - gradient.double()).norm()
        assert (difference / scale).item() < rtol, name


def document_lengths_of(golden) -> list[int]:
    """打包样例中各文档的长度：13B 写在 attention_mask 的段号里，7B 写在重新起数的 position_ids 里。"""
    if golden.rope:
        starts = (golden.tensors["packed.position_ids"][0] == 0).nonzero().flatten().tolist()
        total = golden.tensors["packed.position_ids"].shape[1]
        return [stop - start for start, stop in zip(starts, [*starts[1:], total], strict=True)]
    return torch.unique_consecutive(golden.tensors["packed.attention_mask"][0], return_counts=True)[1].tolist()


def make_documents(vocab_size, lengths=(9, 1, 14, 2, 6), num_src_tokens=(4, 0, 5, 2, 0), seed=0):
    """若干文档：ids [L] 与 labels [L]，前 num_src_tokens 个标签为 -100；第二、四篇因此没有目标。

    首个标签总是 -100：移位后没有位置预测它，左侧补齐时却会落到补齐的位置上。
    """
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for length, num_src in zip(lengths, num_src_tokens, strict=True):
        ids = torch.randint(3, vocab_size, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(num_src, 1)] = IGNORE_INDEX
        documents.append((ids, labels))
    return documents


def padded_batch(documents, side="right"):
    longest = max(len(ids) for ids, _ in documents)
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in documents:
        padding = longest - len(ids)
        for name, row, value in (
            ("input_ids", ids, 0),
            ("attention_mask", torch.ones_like(ids), 0),
            ("labels", labels, IGNORE_INDEX),
        ):
            fill = row.new_full((padding,), value)
            rows[name].append(torch.cat([row, fill] if side == "right" else [fill, row]))
    return {name: torch.stack(values) for name, values in rows.items()}


def packed_batch(documents):
    return {
        "input_ids": torch.cat([ids for ids, _ in documents])[None],
        "labels": torch.cat([labels for _, labels in documents])[None],
        "document_lengths": [len(ids) for ids, _ in documents],
    }


def target_rows_of(batch):
    return (batch["labels"][0, 1:] != IGNORE_INDEX).nonzero().flatten()


def greedy(model, ids, attention_mask=None, **options):
    """transformers 5.x 会用检查点的 generation_config 补齐没写的参数，所以重复惩罚与采样都明写。"""
    options = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 16, **options}
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    return model.generate(ids, attention_mask=mask, **options)


def lora_model(architecture, dropout=0.0, **options):
    options = {"target_modules": ["W_pack"], **options}
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=16, lora_dropout=dropout, task_type="CAUSAL_LM", **options)
    model = get_peft_model(load_model(architecture), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # 缺省为零，增量就看不见了
                parameter.normal_(std=0.05)
    return model


def prefix_model(architecture, num_virtual_tokens=5, **options):
    torch.manual_seed(0)
    config = PrefixTuningConfig(num_virtual_tokens=num_virtual_tokens, task_type="CAUSAL_LM", **options)
    return get_peft_model(load_model(architecture), config)
