"""写明 loss 的多轮对话：梯度与把各个要训练的回答逐条写出来的相同。"""

import json

import pytest
import torch

from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from data_set import BaichuanDataSet
from finetune.data.packing import collate
from finetune.data.samples import RowOptions

TURNS = [
    *({"role": "user", "content": "怠速不稳怎么查？"}, {"role": "assistant", "content": "先看火花塞。"}),
    *({"role": "user", "content": "火花塞没有问题"}, {"role": "assistant", "content": "不知道", "loss": False}),
    *({"role": "user", "content": "再想想"}, {"role": "assistant", "content": "再查进气管有没有漏气。"}),
]


def gradients(model, samples, packing: bool) -> dict[str, torch.Tensor]:
    """全部目标的损失之和的梯度。"""
    model.zero_grad()
    num_targets = sum(sample.num_targets for sample in samples)
    batch = collate(samples, 0, packing)
    model(**batch, num_items_in_batch=num_targets, use_cache=False).loss.backward()
    return {name: parameter.grad * num_targets for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("prompt_format", ["chat", "plain"])
@pytest.mark.parametrize("packing", [True, False])
def test_gradients_equal_those_of_the_rows_written_out(tiny_checkpoint, tmp_path, prompt_format, packing):
    base = tiny_checkpoint("baichuan2-7b", layers=2, hidden_size=32, heads=4, dtype="float32")
    model = BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    tokenizer = BaichuanTokenizer.from_pretrained(base)

    def load(rows, **options) -> list:
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        limits = {"prompt_format": prompt_format, "max_len": 256, "max_src_len": 200}
        return list(BaichuanDataSet(path, tokenizer, row_options=RowOptions(**options), **limits))

    whole = load([{"messages": TURNS}])
    single = load([{"messages": TURNS[:2]}, {"messages": TURNS}], loss_turns="last")
    assert whole[0].num_targets == sum(sample.num_targets for sample in single)
    found, expected = gradients(model, whole, packing), gradients(model, single, packing)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
    everything = gradients(model, load([{"messages": [{**turn, "loss": None} for turn in TURNS]}]), packing)
    assert any((everything[name] - expected[name]).abs().max() > 1e-3 for name in expected)
