"""打包与补齐等价；损失与 NormHead。"""

from types import SimpleNamespace

import pytest
import torch
from golden_models import (
    IGNORE_INDEX,
    LOGITS_ATOL,
    assert_close,
    assert_same_gradients,
    gradients,
    greedy,
    load_golden,
    load_model,
    lora_model,
    make_documents,
    packed_batch,
    padded_batch,
    prefix_model,
    target_rows_of,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.data.packing import collate

# transformers 5.23 起把 gradient_checkpointing_enable 改了名，5.17 只有旧名
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


# ---------------------------------------------------------------- 打包


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_packed_gradients_equal_padded_ones(architecture, checkpointing):
    results = {}
    for form, build in (("packed", packed_batch), ("right", padded_batch), ("left", lambda d: padded_batch(d, "left"))):
        model = load_model(architecture).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(**build(make_documents(model.config.vocab_size))).loss
        loss.backward()
        results[form] = loss.item(), gradients(model)
    for form in ("packed", "left"):
        assert results[form][0] == pytest.approx(results["right"][0], abs=2e-6)
        assert_same_gradients(results[form][1], results["right"][1])


@pytest.mark.parametrize("checkpointing", [None, "all", "attention"])
@pytest.mark.parametrize("method", ["full", "freeze", "lora", "ptuning"])
def test_shared_prefix_gives_the_same_gradients(architecture, method, checkpointing):
    """几个样本共用的开头只算一次，与各算各的相同：四种方法，重算与否。"""
    opening = torch.randint(3, 400, (17,), generator=torch.Generator().manual_seed(1))
    documents = make_documents(400)
    for i in (0, 2, 4):  # 第二、四篇不共用
        ids, labels = documents[i]
        documents[i] = torch.cat([opening, ids]), torch.cat([torch.full_like(opening, IGNORE_INDEX), labels])
    samples = [SimpleNamespace(input_ids=ids.tolist(), labels=labels.tolist()) for ids, labels in documents]
    shared = collate(samples, 0, packing=True)
    assert shared["document_lengths"] == [17, 9, 1, 14, 2, 6] and shared["document_parents"] == [-1, 0, -1, 0, -1, 0]
    results = []
    for batch in (packed_batch(documents), shared):
        model = {"lora": lora_model, "ptuning": prefix_model}.get(method, load_model)(architecture).train()
        if method == "freeze":
            model.requires_grad_(False).model.layers[-1].requires_grad_(True)
        if checkpointing:
            base = model.get_base_model() if method in ("lora", "ptuning") else model
            base.gradient_checkpointing_enable()
            base.model.checkpoint_every = 1 if checkpointing == "all" else 0
        loss = model(**batch).loss
        loss.backward()
        results.append((loss.item(), gradients(model)))
    assert results[1][0] == pytest.approx(results[0][0], abs=2e-6)
    assert_same_gradients(results[1][1], results[0][1])


def test_row_losses_of_the_model_are_those_of_its_sum(architecture):
    model = load_model(architecture).train()
    ids = torch.arange(3, 23)[None]
    batch = {"input_ids": ids, "labels": torch.where(ids < 9, IGNORE_INDEX, ids)}
    rows = model(**batch, row_losses=True).loss
    assert rows.shape == (14,)
    assert rows.mean().item() == pytest.approx(model(**batch).loss.item(), abs=1e-5)


def test_packed_loss_equals_documents_alone(architecture):
    model = load_model(architecture).train()
    documents = make_documents(model.config.vocab_size)
    batch = packed_batch(documents)
    num_targets = len(target_rows_of(batch))
    packed = model(**batch)
    packed.loss.backward()
    actual = gradients(model)
    model.zero_grad()
    total = 0.0
    for ids, labels in documents:
        if (labels[1:] != IGNORE_INDEX).any():
            loss = model(input_ids=ids[None], labels=labels[None], num_items_in_batch=num_targets).loss
            loss.backward()
            total += loss.item()
    assert packed.loss.item() == pytest.approx(total, abs=2e-6)
    assert_same_gradients(actual, gradients(model))


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (7, 150, 2, 150, 1), (513, 3, 512)], ids=str)
def test_packed_logits_equal_documents_alone(architecture, training, lengths):
    model = load_model(architecture).train(training)
    documents = make_documents(model.config.vocab_size, lengths, [0] * len(lengths), seed=len(lengths))
    batch = packed_batch(documents)
    packed = model(input_ids=batch["input_ids"], document_lengths=list(lengths)).logits
    alone = torch.cat([model(input_ids=ids[None]).logits for ids, _ in documents], dim=1)
    # Baichuan-13B 的偏置是 斜率·j，到 500 之后本身就有 3e-5 的舍入
    assert_close(packed, alone, LOGITS_ATOL if max(lengths) < 500 else 1e-4)


@torch.no_grad()
def test_packed_document_does_not_see_its_neighbours(architecture):
    model = load_model(architecture).eval()
    batch = packed_batch(make_documents(model.config.vocab_size))
    before = model(input_ids=batch["input_ids"], document_lengths=batch["document_lengths"]).logits
    changed = batch["input_ids"].clone()
    changed[0, 9:10] = (changed[0, 9:10] + 1) % model.config.vocab_size
    after = model(input_ids=changed, document_lengths=batch["document_lengths"]).logits
    same = torch.ones(before.shape[1], dtype=torch.bool)
    same[9:10] = False
    assert torch.equal(before[:, same], after[:, same])
    assert not torch.equal(before[:, 9:10], after[:, 9:10])


def test_explicit_positions_of_a_packed_batch_change_nothing(architecture):
    """整理函数会连同重新起数的 position_ids 一起交来。"""
    model = load_model(architecture).train()
    batch = packed_batch(make_documents(model.config.vocab_size))
    positions = torch.cat([torch.arange(length) for length in batch["document_lengths"]])[None]
    assert model(**batch, position_ids=positions).loss.item() == model(**batch).loss.item()


@pytest.mark.parametrize("lengths", [[9, 1, 14, 2, 5], [9, 1, 14, 2, 7], []], ids=str)
def test_document_lengths_must_cover_the_row(architecture, lengths):
    model = load_model(architecture).train()
    batch = packed_batch(make_documents(model.config.vocab_size))
    with pytest.raises((ValueError, AssertionError), match="document_lengths"):
        model(**{**batch, "document_lengths": lengths})


def test_document_lengths_need_a_single_row(architecture):
    model = load_model(architecture).train()
    ids = architecture.tensors["full.input_ids"]
    with pytest.raises((ValueError, AssertionError), match="document_lengths"):
        model(input_ids=ids, document_lengths=[20, 20])


# ---------------------------------------------------------------- 损失


def test_target_rows_equal_computed_ones(architecture):
    model = load_model(architecture).train()
    batch = packed_batch(make_documents(model.config.vocab_size))
    expected = model(**batch).loss
    expected.backward()
    reference = gradients(model)
    model.zero_grad()
    loss = model(**batch, target_rows=target_rows_of(batch)).loss
    loss.backward()
    assert loss.item() == expected.item()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, reference[name]), name


def test_logits_are_absent_only_in_training_with_labels(architecture):
    model = load_model(architecture)
    batch = packed_batch(make_documents(model.config.vocab_size))
    total, vocab_size = batch["input_ids"].shape[1], model.config.vocab_size
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    assert model.train()(**batch).logits is None
    assert model.train()(**unlabelled).logits.shape == (1, total, vocab_size)
    with torch.no_grad():
        output = model.eval()(**batch)
    assert output.logits.shape == (1, total, vocab_size)
    assert output.loss.item() == pytest.approx(model.train()(**batch).loss.item(), abs=2e-6)


@pytest.mark.parametrize("kind", [int, torch.tensor], ids=["int", "tensor"])
def test_num_items_in_batch_is_the_divisor(architecture, kind):
    model = load_model(architecture).train()
    batch = packed_batch(make_documents(model.config.vocab_size))
    num_targets = len(target_rows_of(batch))
    mean = model(**batch).loss.item()
    assert model(**batch, num_items_in_batch=kind(num_targets)).loss.item() == pytest.approx(mean, rel=1e-6)
    scaled = model(**batch, num_items_in_batch=kind(7 * num_targets)).loss.item()
    assert scaled == pytest.approx(mean / 7, rel=1e-6)
    with torch.no_grad():
        loss = model.eval()(**batch, num_items_in_batch=kind(7 * num_targets)).loss.item()
    assert loss == pytest.approx(mean / 7, rel=1e-6)


def test_z_loss_of_micro_batches_is_averaged_not_summed(golden_dir):
    """num_items_in_batch 也管 z_loss：微批分得再细，其分量也不会成倍。"""
    golden = load_golden(golden_dir("baichuan2-7b"))
    model = load_model(golden, z_loss_weight=0.01).train()
    document = make_documents(model.config.vocab_size, [12], [4])[0]
    whole = model(**padded_batch([document] * 3)).loss.item()
    num_targets = 3 * 8
    parts = [model(**padded_batch([document]), num_items_in_batch=num_targets).loss.item() for _ in range(3)]
    assert sum(parts) == pytest.approx(whole, abs=2e-6)


def test_micro_batches_add_up_to_the_global_batch(architecture):
    documents = make_documents(512 if "oddheads" not in architecture.name else 448)
    num_targets = len(target_rows_of(packed_batch(documents)))
    model = load_model(architecture).train()
    whole = model(**packed_batch(documents)).loss
    whole.backward()
    reference = gradients(model)
    model.zero_grad()
    total = 0.0
    for part, build in ((documents[:1], padded_batch), (documents[1:3], packed_batch), (documents[3:], padded_batch)):
        loss = model(**build(part), num_items_in_batch=num_targets).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), abs=2e-6)
    assert_same_gradients(gradients(model), reference)


def test_a_batch_without_targets_gives_zero_and_zero_gradients(architecture):
    """补位的微批没有目标：损失为 0，反向照常走完（各进程的集合通信次数须相同），梯度全为 0。"""
    model = load_model(architecture).train()
    batch = {"input_ids": torch.tensor([[0]]), "labels": torch.tensor([[IGNORE_INDEX]]), "document_lengths": [1]}
    loss = model(**batch, num_items_in_batch=10).loss
    assert loss.item() == 0.0
    loss.backward()
    assert all(gradient.abs().max().item() == 0 for gradient in gradients(model).values())
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
    assert model(**batch).loss.item() == 0.0


def test_loss_is_computed_in_fp32_for_half_weights(architecture):
    model = load_model(architecture, dtype=torch.bfloat16).train()
    batch = packed_batch(make_documents(model.config.vocab_size))
    output = model(**batch)
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.bfloat16}
    reference = load_model(architecture).train()
    loss = reference(**batch).loss
    loss.backward()
    assert output.loss.item() == pytest.approx(loss.item(), rel=0.01)
    assert_same_gradients(gradients(model), gradients(reference), rtol=0.1)


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 10_000])
def test_chunked_loss_equals_cross_entropy(architecture, monkeypatch, rows_per_chunk):
    """损失分块（块数不整除行数、一块一行、一块装下全部）与整块的交叉熵同值同梯度。"""
    model = load_model(architecture).train()
    vocab_size = model.config.vocab_size
    monkeypatch.setattr("baichuan.linear_cross_entropy.MAX_LOGITS_ELEMENTS", rows_per_chunk * vocab_size)
    batch = packed_batch(make_documents(vocab_size, [70, 20, 33], [1, 15, 0], seed=5))
    loss = model(**batch).loss
    loss.backward()
    actual = gradients(model)
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], document_lengths=batch["document_lengths"]).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6)
    assert_same_gradients(actual, gradients(model))


def test_frozen_head_and_lower_layers(architecture):
    """冻结末层以下与词表投影：可训练参数的梯度不变，冻结的没有梯度。"""
    model = load_model(architecture).train()
    batch = packed_batch(make_documents(model.config.vocab_size))
    model(**batch).loss.backward()
    reference = gradients(model)
    last = f"model.layers.{model.config.num_hidden_layers - 1}."
    for checkpointing in (False, True):
        model = load_model(architecture).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(last))
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        actual = gradients(model)
        assert all(name.startswith(last) for name in actual) and len(actual) == 7
        assert_same_gradients(actual, {name: g for name, g in reference.items() if name.startswith(last)})


# ---------------------------------------------------------------- NormHead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_norm_head_never_changes_its_parameter(golden_dir, tmp_path, dtype):
    golden = load_golden(golden_dir("baichuan2-7b"))
    model = load_model(golden, dtype=dtype)
    parameter, before = model.lm_head.weight, model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.eval()(input_ids=golden.tensors["full.input_ids"])
        model.train()(input_ids=golden.tensors["full.input_ids"])
    greedy(model.eval(), golden.tensors["gen.input_ids"])
    assert model.lm_head.weight is parameter
    assert torch.equal(parameter, before)
    norms = before.float().norm(dim=1)
    expected = golden.values["lm_head.row_norm_in_checkpoint.min_max"]
    assert [norms.min().item(), norms.max().item()] == pytest.approx(expected, rel=1e-2)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["lm_head.weight"], before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert again.config.norm_head is True
    assert torch.equal(again.lm_head.weight, before)


def test_norm_head_in_training_follows_weight_updates(golden_dir):
    """归一化结果若被缓存，权重更新后必须失效。"""
    golden = load_golden(golden_dir("baichuan2-7b"))
    model = load_model(golden).eval()
    ids = golden.tensors["full.input_ids"]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.lm_head.weight.mul_(3.0)  # 只改长度：结果不变
        assert_close(model(input_ids=ids).logits, before, LOGITS_ATOL)
        model.lm_head.weight[5] = model.lm_head.weight[7]
        after = model(input_ids=ids).logits
    assert_close(after[..., 5], before[..., 7], LOGITS_ATOL)


@torch.no_grad()
def test_frozen_norm_head_follows_weight_updates(golden_dir):
    golden = load_golden(golden_dir("baichuan2-7b"))
    model = load_model(golden).eval().requires_grad_(False)
    ids = golden.tensors["full.input_ids"]
    before = model(input_ids=ids).logits
    assert_close(before, golden.tensors["full.eval_logits"], LOGITS_ATOL)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["lm_head.weight"] *= torch.linspace(0.1, 10, len(tensors["lm_head.weight"]))[:, None]
    model.load_state_dict(tensors)
    assert_close(model(input_ids=ids).logits, before, LOGITS_ATOL)
    model.lm_head.weight.mul_(torch.linspace(5, 0.2, len(model.lm_head.weight))[:, None])
    assert_close(model(input_ids=ids).logits, before, LOGITS_ATOL)
    model.load_state_dict({**tensors, "lm_head.weight": tensors["lm_head.weight"] * 3}, assign=True)
    assert_close(model(input_ids=ids).logits, before, LOGITS_ATOL)


def test_vocabulary_cannot_be_resized(architecture):
    with pytest.raises(ValueError, match="词表不能改变大小"):
        load_model(architecture).resize_token_embeddings(600)
