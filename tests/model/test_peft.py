"""peft 的各种适配器：前缀、提示与 LoRA。"""

import pytest
import torch
from golden_models import (
    LOGITS_ATOL,
    assert_close,
    assert_same_gradients,
    gradients,
    greedy,
    load_model,
    lora_model,
    make_documents,
    packed_batch,
    padded_batch,
    prefix_model,
)
from peft import PeftModel, PromptTuningConfig, get_peft_model

from baichuan import BaichuanForCausalLM

# transformers 5.23 起把 gradient_checkpointing_enable 改了名，5.17 只有旧名
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def real_prefix_model(architecture, prefix_ids):
    """前缀调优模型，其前缀恰是 prefix_ids 的键与值：于是等于把这些 token 接在每个文档之前。"""
    model = prefix_model(architecture, num_virtual_tokens=len(prefix_ids))
    with torch.no_grad():
        cache = model.get_base_model().eval()(input_ids=prefix_ids[None], use_cache=True).past_key_values
        # peft 的一行是 [层, 键或值, 头, 头宽]
        rows = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
        rows = rows.permute(3, 0, 1, 2, 4).reshape(len(prefix_ids), -1)
        embedding = model.prompt_encoder["default"].embedding.weight
        assert embedding.shape == rows.shape
        embedding.copy_(rows)
    return model


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_prefix_of_real_tokens_equals_those_tokens(architecture, training, checkpointing):
    prefix_ids = architecture.tensors["gen.input_ids"][0]
    base = load_model(architecture).eval()
    documents = make_documents(base.config.vocab_size)
    model = real_prefix_model(architecture, prefix_ids)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable()
    model.train(training)
    batch = padded_batch(documents)
    packed = packed_batch(documents)
    with torch.no_grad():
        alone = [
            base(input_ids=torch.cat([prefix_ids, ids])[None]).logits[0, len(prefix_ids) :] for ids, _ in documents
        ]
        padded_logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        packed_logits = model(input_ids=packed["input_ids"], document_lengths=packed["document_lengths"]).logits
    for row, expected in zip(padded_logits, alone, strict=True):
        assert_close(row[: len(expected)], expected, LOGITS_ATOL)
    assert_close(packed_logits[0], torch.cat(alone), LOGITS_ATOL)


@pytest.mark.parametrize("projection", [False, True], ids=["embedding", "mlp"])
def test_prefix_gradients_padded_packed_and_checkpointed(architecture, projection):
    results = {}
    options = {"prefix_projection": projection, **({"encoder_hidden_size": 16} if projection else {})}
    for form in ("padded", "left", "packed", "packed_with_mask", "packed_with_positions"):
        for checkpointing in (False, True):
            model = prefix_model(architecture, **options)
            if checkpointing:
                model.get_base_model().gradient_checkpointing_enable()
            documents = make_documents(model.config.vocab_size)
            if form.startswith("packed"):
                batch = packed_batch(documents)
                if form == "packed_with_mask":
                    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
                if form == "packed_with_positions":
                    batch["position_ids"] = torch.cat([torch.arange(n) for n in batch["document_lengths"]])[None]
            else:
                batch = padded_batch(documents, "left" if form == "left" else "right")
            loss = model.train()(**batch).loss
            loss.backward()
            results[form, checkpointing] = loss.item(), gradients(model)
    reference_loss, reference = results["padded", False]
    assert all("prompt_encoder" in name for name in reference)
    for loss, actual in results.values():
        assert loss == pytest.approx(reference_loss, abs=2e-6)
        assert_same_gradients(actual, reference)


def test_prefix_saves_loads_and_generates(architecture, tmp_path):
    model = prefix_model(architecture)
    model.get_base_model().gradient_checkpointing_enable()
    ids, mask = architecture.tensors["genbatch.input_ids"], architecture.tensors["genbatch.attention_mask"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        batch = padded_batch(make_documents(model.config.vocab_size))
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_model(architecture), tmp_path).eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, attention_mask=mask).logits
        plain = again.get_base_model()(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, expected)
    assert (plain - expected)[mask.bool()].abs().max() > 1e-2  # 前缀确实起作用
    rows = greedy(again, ids, mask)
    assert greedy(again, ids, mask, use_cache=False).equal(rows)
    for row, row_ids, row_mask in zip(rows, ids, mask, strict=True):
        alone = greedy(again, row_ids[row_mask.bool()][None])
        assert alone[0, row_mask.sum() :].equal(row[ids.shape[1] :])


def test_prompt_tuning_padded_left_and_checkpointed(architecture, tmp_path):
    """嵌入层的软提示（P-Tuning v1 的同类）：补齐方式与激活重算都不改变损失和梯度。"""
    results = {}
    for side in ("right", "left"):
        for checkpointing in (False, True):
            torch.manual_seed(0)
            config = PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
            model = get_peft_model(load_model(architecture), config)
            if checkpointing:
                model.get_base_model().gradient_checkpointing_enable()
            loss = model.train()(**padded_batch(make_documents(400), side)).loss
            loss.backward()
            results[side, checkpointing] = loss.item(), gradients(model)
    reference_loss, reference = results["right", False]
    for (side, _), (loss, actual) in results.items():
        if side == "right":
            assert loss == pytest.approx(reference_loss, abs=2e-6)
            assert_same_gradients(actual, reference)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_model(architecture), tmp_path).eval()
    ids = architecture.tensors["full.input_ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_lora_on_w_pack(architecture, tmp_path, checkpointing):
    results = []
    for build in (packed_batch, padded_batch):
        model = lora_model(architecture)
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model.train()(**build(make_documents(model.config.vocab_size))).loss
        loss.backward()
        actual = gradients(model)
        layers = model.config.num_hidden_layers
        assert len(actual) == 2 * layers
        assert all("W_pack.lora_" in name and gradient.abs().max() > 0 for name, gradient in actual.items())
        results.append((loss.item(), actual))
    assert results[0][0] == pytest.approx(results[1][0], abs=2e-6)
    assert_same_gradients(results[0][1], results[1][1])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_model(architecture), tmp_path).eval()
    ids, mask = architecture.tensors["genbatch.input_ids"], architecture.tensors["genbatch.attention_mask"]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, expected)
        plain = load_model(architecture).eval()(input_ids=ids, attention_mask=mask).logits
        assert (plain - expected)[mask.bool()].abs().max() > 1e-2
        merged = again.merge_and_unload()
        assert type(merged) is BaichuanForCausalLM
        assert_close(merged(input_ids=ids, attention_mask=mask).logits, expected, LOGITS_ATOL, where=mask)


def test_lora_gradients_do_not_depend_on_checkpointing(architecture):
    results = []
    for checkpointing in (False, True):
        model = lora_model(architecture, dropout=0.1)
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model.train()(**packed_batch(make_documents(model.config.vocab_size))).loss.backward()
        results.append(gradients(model))
    assert_same_gradients(results[1], results[0])


def test_all_linear_lora_skips_the_head(architecture):
    model = lora_model(architecture, target_modules="all-linear")
    names = {
        name.rsplit(".lora_A", 1)[0].split("base_model.model.")[1]
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }
    parts = ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert names == {f"model.layers.{n}.{part}" for n in range(model.config.num_hidden_layers) for part in parts}
