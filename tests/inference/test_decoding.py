"""decoding.py：共用的开头只算一次，做完一行就换下一行，结果与逐行、没有缓存的贪心续写相同。"""

import importlib.util

import pytest
import torch
from generating import by_hand
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, get_peft_model

from baichuan import BaichuanForCausalLM
from finetune.checkpoint.base_model import load_base_model, load_config
from finetune.inference.decoding import Decoder, Prompt, plan_prompts
from finetune.inference.generation import make_generation_config

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
OPENING = list(range(100, 120))
# 五行有同样的 20 个 token 开头，一行没有
PROMPTS = [[*OPENING, 5, 6, 7], [*OPENING, 8], [9, 10, 11], [*OPENING, *range(20, 60)], [*OPENING, 300], [*OPENING, 12]]
ARCHITECTURES = ["baichuan-7b", "baichuan-13b", "baichuan2-7b", "baichuan2-13b"]


def load(tiny_checkpoint, arch):
    return BaichuanForCausalLM.from_pretrained(tiny_checkpoint(arch), dtype=torch.float32).eval()


def decode(model, batch_size, max_new_tokens=8, prompts=PROMPTS, config=None, **options):
    """→ ({行号: 新生成的 id}, 依次做完的各组行号)。"""
    decoder = Decoder(model, config or make_generation_config(model, max_new_tokens), batch_size)
    done = list(decoder.run(plan_prompts(prompts), **options))
    return dict(row for group in done for row in group), [[index for index, _ in group] for group in done]


def by_generate(model, prompts, config):
    """transformers 的 generate，一行一行。"""
    eos, found = config.eos_token_id, []
    for prompt in prompts:
        ids = model.generate(input_ids=torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        found.append(ids[: ids.index(eos)] if eos in ids else ids)
    return dict(enumerate(found))


def test_rows_are_planned_by_opening_then_by_length():
    assert plan_prompts(PROMPTS) == [
        *(Prompt(index, PROMPTS[index], 20) for index in (3, 0, 1, 4, 5)),
        Prompt(2, PROMPTS[2], 0),
    ]
    assert plan_prompts(PROMPTS, [5, 2]) == [Prompt(5, PROMPTS[5]), Prompt(2, PROMPTS[2])]
    # 一行就是另一行的开头：至少留一个 token 给自己
    assert [prompt.num_shared for prompt in plan_prompts([OPENING, [*OPENING, 5], OPENING])] == [19] * 3


def test_openings_are_chosen_to_save_the_most():
    long, short = [*OPENING, *range(200, 230)], OPENING[:17]
    prompts = [[*long, 5], [*long, 6], [*long, 7], [*short, 8], [*short, 9, 9]]
    # 全部一起只省 4 × 17；三行一起省 2 × 50，另两行再省 17
    assert [(prompt.key, prompt.num_shared) for prompt in plan_prompts(prompts)] == [
        (0, 50), (1, 50), (2, 50), (4, 17), (3, 17)
    ]  # fmt: skip
    many = [[*OPENING, index] for index in range(1000)] + [[*OPENING, 1, *range(500, 540), 3]] * 2
    assert sorted(prompt.num_shared for prompt in plan_prompts(many)) == [20] * 1000 + [61] * 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_same_as_one_by_one(tiny_checkpoint, arch, batch_size):
    model = load(tiny_checkpoint, arch)
    assert decode(model, batch_size)[0] == {index: by_hand(model, prompt, 8) for index, prompt in enumerate(PROMPTS)}


@pytest.mark.parametrize("arch", ["baichuan2-7b", "baichuan-13b"])
def test_rows_that_end_give_way_to_the_next(tiny_checkpoint, arch):
    """停止的长短不一：两格里的六行，先做完的先给出，各行仍与单独的一样。"""
    model = load(tiny_checkpoint, arch)
    limits = {tuple(by_hand(model, prompt, 2)): 2 + index for index, prompt in enumerate(PROMPTS)}
    found, groups = decode(model, 2, 12, is_stopped=lambda ids: len(ids) >= limits.get(tuple(ids[:2]), 12))
    lengths = {index: limits[tuple(by_hand(model, prompt, 2))] for index, prompt in enumerate(PROMPTS)}
    assert found == {index: by_hand(model, PROMPTS[index], length) for index, length in lengths.items()}
    assert sorted(index for group in groups for index in group) == list(range(6)) and len(groups) > 3


def test_the_opening_is_computed_once(tiny_checkpoint):
    model = load(tiny_checkpoint, "baichuan2-7b")
    shapes = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    decode(model, 3, max_new_tokens=3)
    # 开头 20；前三行的其余（40、3、1，右侧补齐）；两步；后两行的其余与没有开头的一行；两步
    assert shapes == [(1, 20), (3, 40), (3, 1), (3, 1), (2, 1), (1, 3), (3, 1), (3, 1)]


@pytest.mark.parametrize("arch", ["baichuan2-7b", "baichuan-13b"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["W_pack"], init_lora_weights=False),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=32),
    ],
    ids=["lora", "ptuning2", "ptuning1"],
)
def test_adapters(tiny_checkpoint, arch, config):
    torch.manual_seed(0)
    base = load(tiny_checkpoint, arch)
    without = {index: by_hand(base, prompt, 8) for index, prompt in enumerate(PROMPTS)}
    model = get_peft_model(base, config).eval()
    options = make_generation_config(model, 8)
    expected = by_generate(model, PROMPTS, options)
    assert decode(model, 2)[0] == expected
    with model.disable_adapter():
        assert decode(model, 2)[0] == without
    assert without != expected


def test_repetition_penalty_is_the_one_of_generate(tiny_checkpoint):
    model = load(tiny_checkpoint, "baichuan2-7b")
    options = make_generation_config(model, 12, repetition_penalty=1.3)
    expected = by_generate(model, PROMPTS, options)
    assert decode(model, 4, config=options)[0] == expected
    assert expected != decode(model, 4, 12)[0]


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="没有安装 bitsandbytes")
@pytest.mark.parametrize("arch", ["baichuan2-7b", "baichuan-13b"])
def test_quantized(tiny_checkpoint, arch):
    base = tiny_checkpoint(arch, layers=2, hidden_size=128, heads=4, intermediate_size=192)
    model = load_base_model(base, load_config(base), torch.float32, torch.device("cpu"), quantization="4bit").eval()
    options = make_generation_config(model, 6)
    assert decode(model, 2, config=options)[0] == by_generate(model, PROMPTS, options)


def test_eos_and_the_last_token(tiny_checkpoint):
    """eos 不在结果里；恰好到上限的一行没有 eos。"""
    model = load(tiny_checkpoint, "baichuan2-7b")
    free = by_hand(model, PROMPTS[0], 8)
    options = make_generation_config(model, 8)
    options.eos_token_id = free[3]
    assert decode(model, 2, prompts=PROMPTS[:1], config=options)[0] == {0: free[: free.index(free[3])]}
    options.max_new_tokens = free.index(free[3])
    assert decode(model, 2, prompts=PROMPTS[:1], config=options)[0] == {0: free[: free.index(free[3])]}
