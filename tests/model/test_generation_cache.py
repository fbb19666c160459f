"""生成与缓存：与官方代码的贪心生成、采样概率一致，有没有缓存都一样。"""

import json

import pytest
import torch
from golden_models import (
    LOGITS_ATOL,
    assert_close,
    greedy,
    load_model,
)
from transformers import DynamicCache

# transformers 5.23 起把 gradient_checkpointing_enable 改了名，5.17 只有旧名
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


# ---------------------------------------------------------------- 黄金值：生成


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "nocache"])
def test_greedy(golden, use_cache):
    model = load_model(golden).eval()
    name = "gen.greedy_cache" if use_cache else "gen.greedy_nocache"
    assert greedy(model, golden.tensors["gen.input_ids"], use_cache=use_cache).equal(golden.tensors[name])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "nocache"])
def test_greedy_with_repetition_penalty(golden, use_cache):
    ids = golden.tensors["gen.input_ids"]
    output = greedy(load_model(golden).eval(), ids, repetition_penalty=1.1, use_cache=use_cache)
    assert output.equal(golden.tensors["gen.greedy_cache_reppen1.1"])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "nocache"])
def test_greedy_left_padded_batch(golden, use_cache):
    ids, mask = golden.tensors["genbatch.input_ids"], golden.tensors["genbatch.attention_mask"]
    name = "genbatch.greedy_cache" if use_cache else "genbatch.greedy_nocache"
    assert greedy(load_model(golden).eval(), ids, mask, use_cache=use_cache).equal(golden.tensors[name])


@pytest.mark.parametrize("penalty", [1.05, 1.1])
def test_sampler_probabilities(golden, penalty):
    """重复惩罚 → 温度 → top_k → top_p，经真正的 generate 取第一步的分数。"""
    ids = golden.tensors["full.input_ids"]
    output = (
        load_model(golden)
        .eval()
        .generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=0.3,
            top_k=5,
            top_p=0.85,
            repetition_penalty=penalty,
            max_new_tokens=1,
            output_scores=True,
            return_dict_in_generate=True,
        )
    )
    probabilities = output.scores[0].float().softmax(-1)
    assert_close(probabilities, golden.tensors[f"sampler.probs_rp{penalty}_t0.3_k5_p0.85"], 1e-4)


def test_generation_config_of_the_checkpoint_is_read(golden):
    expected = json.loads((golden.checkpoint / "generation_config.json").read_text(encoding="utf-8"))
    config = load_model(golden).generation_config
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "do_sample", "pad_token_id", "eos_token_id")
    for name in names:
        if name in expected:
            assert getattr(config, name) == expected[name]


# ---------------------------------------------------------------- 缓存


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(5, 7, 1, 1, 6), (1, 19), (19, 1)], ids=str)
def test_several_new_tokens_on_top_of_a_cache(architecture, chunks):
    ids = architecture.tensors["full.input_ids"]
    model = load_model(architecture).eval()
    cache, pieces = DynamicCache(), []
    for chunk in ids.split(chunks, dim=1):
        output = model(input_ids=chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert cache.get_seq_length() == ids.shape[1]
    assert_close(torch.cat(pieces, dim=1), architecture.tensors["full.eval_logits"], LOGITS_ATOL)


@torch.no_grad()
def test_several_new_tokens_on_top_of_a_left_padded_cache(architecture):
    ids, mask = architecture.tensors["lpad.input_ids"], architecture.tensors["lpad.attention_mask"]
    model = load_model(architecture).eval()
    cache, pieces, stop = None, [], 0
    for chunk in ids.split((7, 6, 1, 2), dim=1):
        stop += chunk.shape[1]
        output = model(input_ids=chunk, attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert_close(torch.cat(pieces, dim=1), architecture.tensors["lpad.eval_logits"], LOGITS_ATOL, where=mask)


@torch.no_grad()
def test_cache_across_the_trained_length(architecture):
    ids = architecture.tensors["long.input_ids"]
    model = load_model(architecture).eval()
    trained = model.config.trained_length
    output = model(input_ids=ids[:, : trained - 3], use_cache=True)
    for position in range(trained - 3, ids.shape[1]):
        output = model(input_ids=ids[:, position : position + 1], past_key_values=output.past_key_values)
    assert_close(output.logits[:, -1], architecture.tensors["long.eval_last_logits"][:, -1], LOGITS_ATOL)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "lookup"])
def test_other_decodings_agree_with_no_cache(architecture, options):
    """束搜索要重排缓存，提示查找要一次验证几个 token 并裁剪缓存。"""
    ids = architecture.tensors["gen.input_ids"]
    ids = torch.cat([ids, ids], dim=1)
    model = load_model(architecture).eval()
    reference = {} if "prompt_lookup_num_tokens" in options else options
    expected = greedy(model, ids, use_cache=False, **reference)
    assert greedy(model, ids, use_cache=True, **options).equal(expected)


@torch.no_grad()
def test_use_cache_flag(architecture):
    ids = architecture.tensors["gen.input_ids"]
    model = load_model(architecture).eval()
    assert model(input_ids=ids, use_cache=False).past_key_values is None
    assert model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == ids.shape[1]
    # 读过的缓存在 use_cache=False 时也不再交出（peft 的前缀调优靠它实现无缓存生成）
    cache = model(input_ids=ids, use_cache=True).past_key_values
    assert model(input_ids=ids[:, :1], past_key_values=cache, use_cache=False).past_key_values is None


@torch.no_grad()
def test_cache_under_its_new_name(architecture):
    """transformers 5.24 的 generate 以 cache= 传缓存：若被 **kwargs 吞掉，生成不报错而结果全错。"""
    ids = architecture.tensors["full.input_ids"]
    model = load_model(architecture).eval()
    cache = DynamicCache()
    model(input_ids=ids[:, :8], cache=cache, use_cache=True)
    assert cache.get_seq_length() == 8
    logits = model(input_ids=ids[:, 8:], cache=cache, use_cache=True).logits
    assert cache.get_seq_length() == ids.shape[1]
    assert_close(logits, architecture.tensors["full.eval_logits"][:, 8:], LOGITS_ATOL)


@torch.no_grad()
def test_inputs_embeds_equal_input_ids(architecture):
    ids, mask = architecture.tensors["lpad.input_ids"], architecture.tensors["lpad.attention_mask"]
    model = load_model(architecture).eval()
    embeds = model.get_input_embeddings()(ids)
    actual = model(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(actual, model(input_ids=ids, attention_mask=mask).logits)


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 3, 19])], ids=["1", "4", "rows"])
def test_logits_to_keep(architecture, keep):
    ids = architecture.tensors["full.input_ids"]
    logits = load_model(architecture).eval()(input_ids=ids, logits_to_keep=keep).logits
    expected = architecture.tensors["full.eval_logits"]
    assert_close(logits, expected[:, keep] if torch.is_tensor(keep) else expected[:, -keep:], LOGITS_ATOL)


@torch.no_grad()
def test_return_dict_false_gives_a_tuple(architecture):
    ids = architecture.tensors["full.input_ids"]
    output = load_model(architecture).eval()(input_ids=ids, use_cache=False, return_dict=False)
    assert isinstance(output, tuple)
    assert_close(output[0], architecture.tensors["full.eval_logits"], LOGITS_ATOL)


@torch.no_grad()
def test_hidden_states_only_when_asked(architecture):
    ids = architecture.tensors["full.input_ids"]
    model = load_model(architecture).eval()
    assert model(input_ids=ids).hidden_states is None
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    # 末尾一个就是词表投影的输入
    assert_close(model.lm_head(states[-1]), architecture.tensors["full.eval_logits"], LOGITS_ATOL)


@torch.no_grad()
def test_attentions_only_when_asked(architecture):
    """官方的 13B 与 Baichuan2-7B 在 output_attentions 时出错；这里给出各层的概率 [b, heads, q, kv]，logits 不变。"""
    ids, mask = architecture.tensors["lpad.input_ids"], architecture.tensors["lpad.attention_mask"]
    model = load_model(architecture).eval()
    assert model(input_ids=ids, attention_mask=mask).attentions is None
    output = model(input_ids=ids, attention_mask=mask, output_attentions=True)
    assert_close(output.logits, architecture.tensors["lpad.eval_logits"], LOGITS_ATOL, where=mask)
    config, length = model.config, ids.shape[1]
    assert len(output.attentions) == config.num_hidden_layers
    for attentions in output.attentions:
        assert attentions.shape == (len(ids), config.num_attention_heads, length, length)
        rows = attentions.transpose(1, 2)[mask.bool()]  # [有效位置, heads, kv]
        assert rows.sum(-1).sub(1).abs().max() < 1e-5
        hidden_keys = (mask == 0)[:, None].expand(-1, length, -1)[mask.bool()]
        assert rows.transpose(0, 1)[:, hidden_keys].abs().max() < 1e-30
        assert attentions[0].triu(1).abs().max() < 1e-30


@torch.no_grad()
def test_base_model_returns_the_last_hidden_state(architecture):
    ids = architecture.tensors["full.input_ids"]
    model = load_model(architecture).eval()
    states = model.model(input_ids=ids).last_hidden_state
    assert_close(states[0], architecture.tensors["full.hidden_states_row0"][-1], LOGITS_ATOL)
