"""新词的行（--add_tokens）：与词表真的长出这些行的模型相同，词表原有的行不动。"""

import pytest
import torch

from baichuan import BaichuanConfig, BaichuanForCausalLM

SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
# 2 个新词接在末尾；或换掉词表末尾补齐的行，其中 1 个超出原来的大小
PLACES = {"at the end": (40, 40, 42), "over padding": (40, 39, 41), "inside": (40, 36, 40)}


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("norm_head", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_rows_equal_those_of_a_grown_vocabulary(place, norm_head, is_trained):
    size, first, end = PLACES[place]
    torch.manual_seed(0)
    config = BaichuanConfig(vocab_size=size, max_position_embeddings=64, norm_head=norm_head, **SIZES)
    model = BaichuanForCausalLM(config).requires_grad_(is_trained)
    rows = torch.randn(2, end - first, 32)
    grown = BaichuanForCausalLM(BaichuanConfig.from_dict({**config.to_dict(), "vocab_size": max(size, end)}))
    state = model.state_dict()
    for name, new in zip(("model.embed_tokens.weight", "lm_head.weight"), rows, strict=True):
        state[name] = torch.cat([state[name][:first], new, state[name][end:]])
    grown.load_state_dict(state)
    model.add_rows(first, *rows.clone())
    ids = torch.tensor([[5, first, 7, end - 1, 30, first, 12]])

    def results(model):
        model.train()
        with torch.no_grad():
            logits = model.eval()(ids).logits
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        return logits, loss.detach()

    for found, expected in zip(results(model), results(grown), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    pairs = ((model.model.embed_tokens, grown.model.embed_tokens), (model.lm_head, grown.lm_head))
    for module, other in pairs:
        expected = other.weight.grad
        torch.testing.assert_close(module.added_rows.grad, expected[first:end], rtol=1e-5, atol=1e-7)
        if not is_trained:
            assert module.weight.grad is None
            continue
        torch.testing.assert_close(module.weight.grad[:first], expected[:first], rtol=1e-5, atol=1e-7)
        assert not module.weight.grad[first:end].any()
