"""generation.py：成批生成与逐条相同，次序还原；NLL 与模型自己的损失相同；不受检查点自带生成配置的影响。"""

import json
import shutil

import pytest
import torch
from generating import by_hand, generate_all
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import GenerationConfig

from baichuan import BaichuanForCausalLM
from finetune.data.prompting import IGNORE_INDEX, EncodedSample
from finetune.inference.generation import (
    StopStrings,
    cut_at_stop,
    generate_batch,
    label_log_probs,
    left_pad,
    make_generation_config,
    plan_batches,
    target_nll,
)

PROMPTS = [[5, 6, 7], [8], list(range(20, 60)), [9, 10, 11, 12, 13], [300, 301]]


def load(tiny_checkpoint, arch):
    return BaichuanForCausalLM.from_pretrained(tiny_checkpoint(arch), dtype=torch.float32).eval()


@pytest.mark.parametrize("arch", ["baichuan-7b", "baichuan-13b", "baichuan2-7b", "baichuan2-13b"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_give_the_same_as_one_by_one(tiny_checkpoint, arch, batch_size):
    model = load(tiny_checkpoint, arch)
    done = []
    results = generate_all(model, PROMPTS, make_generation_config(model, 8), batch_size, on_batch=done.append)
    assert results == [by_hand(model, prompt, 8) for prompt in PROMPTS]
    assert done == {1: [1] * 5, 2: [2, 2, 1], 5: [5]}[batch_size]


@pytest.mark.parametrize("arch", ["baichuan2-7b", "baichuan2-13b"])
@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_adapters_in_batches(tiny_checkpoint, arch, adapter):
    torch.manual_seed(0)
    config = {
        "lora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["W_pack"], init_lora_weights=False),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }[adapter]
    model = get_peft_model(load(tiny_checkpoint, arch), config).eval()
    options = make_generation_config(model, 8)
    single = [generate_batch(model, [prompt], options)[0] for prompt in PROMPTS]
    assert generate_all(model, PROMPTS, options, 5) == single
    with model.disable_adapter():
        assert generate_all(model, PROMPTS, options, 5) != single


def test_greedy_ignores_the_generation_config_of_a_chat_checkpoint(tiny_checkpoint, tmp_path):
    model = load(tiny_checkpoint, "baichuan2-7b")
    expected = by_hand(model, PROMPTS[0], 16)
    shutil.copytree(tiny_checkpoint("baichuan2-7b"), tmp_path / "chat")
    # 惩罚大到会改变贪心的结果
    settings = {"do_sample": True, "repetition_penalty": 5.0, "temperature": 9.0, "eos_token_id": 2, "pad_token_id": 0}
    (tmp_path / "chat" / "generation_config.json").write_text(json.dumps(settings))
    model = BaichuanForCausalLM.from_pretrained(tmp_path / "chat", dtype=torch.float32).eval()
    assert model.generation_config.repetition_penalty == 5.0
    assert generate_batch(model, [PROMPTS[0]], make_generation_config(model, 16))[0] == expected
    penalised = generate_batch(model, [PROMPTS[0]], make_generation_config(model, 16, repetition_penalty=5.0))[0]
    assert len(set(penalised)) == 16


def test_sampling_is_seeded(tiny_checkpoint):
    model = load(tiny_checkpoint, "baichuan2-7b")
    options = make_generation_config(model, 8, do_sample=True, temperature=2.0, top_p=0.9, top_k=0)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(generate_all(model, PROMPTS, options, 2))
    assert runs[0] == runs[1] != runs[2]


def test_make_generation_config_writes_everything_out(tiny_checkpoint):
    model = load(tiny_checkpoint, "baichuan2-7b")
    config = make_generation_config(model, 8)
    assert isinstance(config, GenerationConfig)
    expected = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 8, "use_cache": True}
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


def test_left_pad():
    batch = left_pad([[5], [6, 7, 8]], 0, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[0, 0, 5], [6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def encoded(input_ids, labels):
    num_targets = sum(label != IGNORE_INDEX for label in labels[1:])
    return EncodedSample(input_ids, labels, num_targets, 0, False, False, False)


@pytest.mark.parametrize("arch", ["baichuan2-7b", "baichuan-13b"])
def test_target_nll_is_the_loss_of_the_model(tiny_checkpoint, arch):
    model = load(tiny_checkpoint, arch)
    gap = IGNORE_INDEX
    samples = [
        encoded([5, 6, 7, 8, 2], [gap, gap, gap, 8, 2]),
        # 多轮：目标分成几段，首位的 label 移位后不起作用
        encoded([195, 6, 196, 8, 9, 195, 10, 196, 11, 2], [2, gap, gap, 8, 9, 2, gap, gap, 11, 2]),
        encoded([5, 6], [gap, gap]),
    ]
    sums, counts = target_nll(model, samples)
    assert counts == [2, 5, 0]
    assert sums[2] == 0.0
    for sample, total, count in zip(samples[:2], sums, counts, strict=False):
        labels = torch.tensor([sample.labels])
        loss = model(torch.tensor([sample.input_ids]), labels=labels).loss
        assert total == pytest.approx(loss.item() * count, rel=1e-5)


def test_plan_batches():
    assert plan_batches(PROMPTS, 2) == [[2, 3], [0, 4], [1]]


@pytest.mark.parametrize("arch", ["baichuan2-7b", "baichuan-13b"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_label_log_probs_are_the_direct_ones(tiny_checkpoint, arch, batch_size):
    """逐个 token 直接算：没有填充、没有成批。"""
    model = load(tiny_checkpoint, arch)
    labels = [[40, 2], [41, 42, 43, 2], [2]]
    scores = label_log_probs(model, PROMPTS, labels, batch_size, 0)
    for prompt, row in zip(PROMPTS, scores, strict=True):
        for label, score in zip(labels, row, strict=True):
            total, ids = 0.0, list(prompt)
            for token in label:
                with torch.no_grad():
                    total += float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
                ids.append(token)
            assert score == pytest.approx(total, abs=1e-4)


def test_cut_at_stop():
    assert cut_at_stop("甲乙丙丁", ["丙", "乙"]) == ("甲", True)
    assert cut_at_stop("甲乙丙丁", ["戊"]) == ("甲乙丙丁", False)
    assert cut_at_stop("甲", []) == ("甲", False)


class Letters:
    """id 就是字符的分词器。"""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(token) for token in ids)


def test_stop_strings_end_each_row_on_its_own(tiny_checkpoint):
    model = load(tiny_checkpoint, "baichuan2-7b")
    options = make_generation_config(model, 12)
    free = generate_batch(model, PROMPTS, options)
    # 第 0 行的第 4、5 个新 token 是停止字符串；它若出现在提示词里，不算
    stop = "".join(map(chr, free[0][3:5]))
    prompts = [*PROMPTS[:1], [*map(ord, stop), 7, 8]]
    found = generate_batch(model, prompts, options, stopping_criteria=[StopStrings(Letters(), [stop])])
    assert found[0][:5] == free[0][:5]
    assert set(found[0][5:]) <= {options.pad_token_id}
    assert found[1] == generate_batch(model, prompts[1:], options)[0]
    alone = generate_batch(model, PROMPTS[:1], options, stopping_criteria=[StopStrings(Letters(), [stop])])
    assert alone == [free[0][:5]]
