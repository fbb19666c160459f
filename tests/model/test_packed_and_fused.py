"""自带反向的算子（RMSNorm、SwiGLU、分块交叉熵）与写开的式子对照，前向与反向；冻结底层的缓存与选择性重算。"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from baichuan import BaichuanConfig, BaichuanForCausalLM, linear_cross_entropy, packed_attention_cpu
from baichuan.attention import packed_attention, rotary_tables
from baichuan.linear_cross_entropy import LinearCrossEntropy, inverse_row_norms
from baichuan.modeling_baichuan import BaichuanHead
from baichuan.norm_and_swiglu import RMSNormFunction, SwiGLUFunction
from baichuan.packed_attention_cpu import PackedMatmulAttention
from finetune.methods.frozen_cache import FrozenCache, open_frozen_cache
from model_factory import enable_gradient_checkpointing

LENGTHS = [5, 1, 17, 9]


def randn(*shape, seed=0, dtype=torch.float64):
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return tensor.requires_grad_()


def grads_of(function, *inputs):
    """function(*inputs) 与固定方向的内积对各输入的梯度。"""
    output = function(*inputs)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=output.dtype)
    return output.detach(), torch.autograd.grad((output * direction).sum(), inputs)


def assert_same(first, second, tolerance):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(7, 24), (1, 1, 24), (2, 3, 5)])
def test_rms_norm_equals_the_plain_formula(shape):
    def plain(x, weight):
        return weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6))

    x, weight = randn(*shape, dtype=torch.float32), randn(shape[-1], seed=1, dtype=torch.float32)
    expected, expected_grads = grads_of(plain, x, weight)
    found, found_grads = grads_of(lambda x, w: RMSNormFunction.apply(x, w, 1e-6), x, weight)
    assert_same([found, *found_grads], [expected, *expected_grads], 2e-6)


def test_rms_norm_keeps_the_order_of_casts_in_half_precision():
    x, weight = randn(3, 16, dtype=torch.float32), randn(16, seed=1, dtype=torch.float32)
    x, weight = x.bfloat16(), weight.bfloat16()
    normalized = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(RMSNormFunction.apply(x, weight, 1e-6), weight * normalized.bfloat16())
    # fp32 的权重配半精度的输入（autocast）：输出留在 fp32
    assert RMSNormFunction.apply(x, weight.float(), 1e-6).dtype == torch.float32


def test_swiglu_equals_the_plain_formula():
    gate, up = randn(4, 6), randn(4, 6, seed=1)
    expected = grads_of(lambda g, u: nn.functional.silu(g) * u, gate, up)
    found = grads_of(SwiGLUFunction.apply, gate, up)
    assert_same([found[0], *found[1]], [expected[0], *expected[1]], 1e-12)


@pytest.mark.parametrize("is_norm_head", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 50])
def test_linear_cross_entropy_in_chunks(monkeypatch, is_norm_head, num_rows):
    """块的大小不改变损失与梯度；NormHead 的梯度穿过归一化，与 F.normalize 写开的一致。"""
    monkeypatch.setattr(linear_cross_entropy, "MAX_LOGITS_ELEMENTS", 8 * 31)  # 一块 8 行，50 行分 7 块
    hidden, weight = randn(num_rows, 12, dtype=torch.float32), randn(31, 12, seed=1, dtype=torch.float32)
    targets = torch.randint(0, 31, (num_rows,), generator=torch.Generator().manual_seed(2))

    def plain(hidden, weight):
        weight = nn.functional.normalize(weight) if is_norm_head else weight
        return nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")

    def fused(hidden, weight):
        scale = inverse_row_norms(weight.detach()) if is_norm_head else None
        return LinearCrossEntropy.apply(hidden, weight, scale, targets)

    expected = torch.autograd.grad(plain(hidden, weight) * 0.3, (hidden, weight))
    loss = fused(hidden, weight)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(hidden, weight), rtol=1e-6, atol=1e-6)
    assert_same(torch.autograd.grad(loss * 0.3, (hidden, weight)), expected, 1e-5)


def test_linear_cross_entropy_frozen_weight_has_no_gradient():
    hidden, weight = randn(5, 12), randn(31, 12, seed=1).detach()
    loss = LinearCrossEntropy.apply(hidden, weight, None, torch.arange(5))
    loss.backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0


def small_model(position_embedding="rope", norm_head=True, num_layers=3):
    lengths = {"max_position_embeddings": 64} if position_embedding == "rope" else {"model_max_length": 64}
    torch.manual_seed(3)
    config = BaichuanConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        norm_head=norm_head,
        **lengths,
    )
    return BaichuanForCausalLM(config).train()


def packed_batch():
    input_ids = torch.randint(3, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(4))
    labels = input_ids.clone()
    labels[0, [0, *torch.tensor(LENGTHS).cumsum(0)[:-1].tolist()]] = -100
    return {"input_ids": input_ids, "labels": labels, "document_lengths": LENGTHS}


def trained_grads(model, **extra):
    model.zero_grad()
    loss = model(**packed_batch(), **extra, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_grads(first, second, tolerance=1e-6):
    assert first[0] == pytest.approx(second[0], rel=tolerance)
    assert first[1].keys() == second[1].keys()
    for name, grad in first[1].items():
        assert (grad - second[1][name]).norm() <= tolerance * grad.norm() + 1e-12, name


@pytest.mark.parametrize("position_embedding", ["rope", "alibi"])
@pytest.mark.parametrize("every", [1, 2, 0])
def test_selective_checkpointing_does_not_change_gradients(position_embedding, every):
    model = small_model(position_embedding)
    expected = trained_grads(model)
    calls = []
    enable_gradient_checkpointing(model, {1: "all", 2: "2", 0: "attention"}[every])
    original = model.model._gradient_checkpointing_func
    model.model._gradient_checkpointing_func = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    assert_same_grads(trained_grads(model), expected)
    assert len(calls) == {1: 3, 2: 2, 0: 3}[every]


def test_frozen_layers_are_neither_checkpointed_nor_in_the_graph():
    model = small_model().requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    enable_gradient_checkpointing(model, "all")
    seen = []
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output[0].requires_grad))
    trained_grads(model)
    assert seen == [False]  # 只跑了一遍，没有计算图


@pytest.mark.parametrize("position_embedding", ["rope", "alibi"])
def test_frozen_cache_gives_the_same_gradients_without_running_the_layers(tmp_path, position_embedding):
    model = small_model(position_embedding).requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    expected = trained_grads(model)
    offsets = [0, *torch.tensor(LENGTHS).cumsum(0)[:-1].tolist()]
    cache = FrozenCache(tmp_path / "cache", 2, sum(LENGTHS), 32, torch.float32, needs_agreement=False)
    cache.attach(model)
    runs = []
    model.model.layers[0].register_forward_hook(lambda *args: runs.append(1))
    first = trained_grads(model, document_offsets=offsets)
    second = trained_grads(model, document_offsets=offsets)
    assert_same_grads(first, expected)
    assert_same_grads(second, expected)
    assert len(runs) == 1
    model.eval()
    model(input_ids=packed_batch()["input_ids"], document_lengths=LENGTHS, document_offsets=offsets)
    assert len(runs) == 2  # 评估不用缓存
    cache.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_prefix", [0, 3])
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("parents", [[-1, -1, -1, -1], [-1, 0, -1, 0]], ids=["alone", "shared"])
@pytest.mark.parametrize(("block", "max_saved"), [(256, 512), (4, 512), (4, 8), (5, 0)])
def test_packed_attention_cpu_attention(monkeypatch, block, max_saved, parents, rotates, num_prefix):
    """与逐个样本写开的注意力相同（fp64），前向与反向；块内外、存概率与重算、有无前缀、旋转与共用的开头。"""
    monkeypatch.setattr(packed_attention_cpu, "BLOCK", block)
    monkeypatch.setattr(packed_attention_cpu, "MAX_SAVED_SCORES", max_saved**2)
    heads, head_dim, lengths = 2, 4, [9, 1, 13, 4]
    total = sum(lengths)
    torch.manual_seed(0)
    packed = torch.randn(1, total, 3 * heads * head_dim, dtype=torch.float64, requires_grad=True)
    prefix = [torch.randn(heads, num_prefix, head_dim, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)[:, None, None]
    longest = max(n + (lengths[p] if p >= 0 else 0) for n, p in zip(lengths, parents, strict=True))
    visible = torch.ones(longest, num_prefix + longest, dtype=torch.bool).tril(num_prefix)
    bias = (slopes * torch.arange(num_prefix + longest)).masked_fill(~visible, float("-inf"))
    begins = [lengths[p] if p >= 0 else 0 for p in parents]
    positions = torch.cat([torch.arange(b, b + n) for b, n in zip(begins, lengths, strict=True)])[None]
    cos, sin = (table.double() for table in rotary_tables(positions, head_dim)) if rotates else (None, None)
    weights = torch.randn(total, heads * head_dim, dtype=torch.float64)

    def expected_output():
        query, key, value = packed.view(total, 3, heads, head_dim).unbind(1)
        if rotates:
            query, key = (
                states * cos[0] + torch.cat([states[..., 2:], states[..., :2]], -1) * sin[0] for states in (query, key)
            )
        queries, keys, values = ([s.transpose(0, 1) for s in states.split(lengths)] for states in (query, key, value))
        outputs = []
        for i, (q, parent, begin) in enumerate(zip(queries, parents, begins, strict=True)):
            seen = [parent, i] if parent >= 0 else [i]
            k = torch.cat([prefix[0], *(keys[j] for j in seen)], 1)
            v = torch.cat([prefix[1], *(values[j] for j in seen)], 1)
            scores = q @ k.transpose(1, 2) / head_dim**0.5 + bias[:, begin : begin + q.shape[1], : k.shape[1]]
            outputs.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    inputs = [packed, *(prefix if num_prefix else [])]
    expected = expected_output()
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    given = prefix if num_prefix else (None, None)
    output = PackedMatmulAttention.apply(packed, cos, sin, bias, lengths, parents, head_dim, *given)
    grads = torch.autograd.grad((output[0] * weights).sum(), inputs)
    torch.testing.assert_close(output[0], expected, rtol=0, atol=1e-12)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)
    if not rotates:  # GPU 上的写法，旋转在它之前
        query, key, value = packed.view(total, 3, heads, head_dim).unbind(1)
        output = packed_attention(query, key, value, lengths, parents, bias, False, *given)
        torch.testing.assert_close(output.flatten(1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_prefix", [0, 3])
def test_packed_attention_needs_the_causal_bias_only_after_something(num_prefix):
    """旋转位置编码：自成开头的段用 is_causal，不用偏置（偏置改坏也不影响它）；接在别的段或前缀之后的用偏置。"""
    lengths, parents, heads, head_dim = [9, 1, 13, 4], [-1, 0, -1, 0], 2, 4
    torch.manual_seed(0)
    states = [torch.randn(27, heads, head_dim) for _ in range(3)]
    prefix = [torch.randn(heads, num_prefix, head_dim) for _ in range(2)] if num_prefix else [None, None]
    visible = torch.ones(13, num_prefix + 13, dtype=torch.bool).tril(num_prefix)
    bias = torch.zeros(1, 13, num_prefix + 13).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = packed_attention(*states, lengths, parents, bias, False, *prefix)
    output = packed_attention(*states, lengths, parents, bias, True, *prefix)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    spoiled = packed_attention(*states, lengths, parents, bias + torch.randn_like(bias), True, *prefix)
    changed = (spoiled - output).abs().amax(dim=(1, 2)) > 1e-4
    # 一行只看得到一个键时，偏置不改变结果：这里没有这样的行
    expected_change = [True] * 27 if num_prefix else [False] * 9 + [True] + [False] * 13 + [True] * 4
    assert changed.tolist() == expected_change


@pytest.mark.parametrize("norm_head", [False, True])
def test_evaluation_computes_no_gradient(norm_head):
    """权重可训练、不求梯度时：只有 logits 一次矩阵乘法，不为梯度分配内存；损失与训练时逐位相同。"""

    class Products(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    head = BaichuanHead(BaichuanConfig(vocab_size=50, hidden_size=8, num_attention_heads=2, norm_head=norm_head))
    nn.init.normal_(head.weight)
    hidden, targets = torch.randn(6, 8, requires_grad=True), torch.arange(6)
    for guard in (torch.no_grad, torch.inference_mode):
        Products.names.clear()
        with guard(), Products():
            loss = head(hidden, targets)
        assert sum(name in ("mm", "matmul", "addmm_") for name in Products.names) == 1
        assert not {"zeros_like", "empty_like"} & set(Products.names)
        trained = head(hidden, targets)
        assert loss.item() == trained.item()
    trained.backward()
    assert hidden.grad is not None and head.weight.grad is not None


def test_no_room_for_the_frozen_cache(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1024)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"--cache_frozen 要 0\.00 GiB，.*只有 0\.00 GiB 可用.*--cache_frozen disk"):
        FrozenCache(tmp_path / "cache", 2, 11, 32, torch.float32, needs_agreement=False)
    assert list(tmp_path.iterdir()) == []
    FrozenCache(tmp_path / "cache", 2, 7, 36, torch.float32, needs_agreement=False).remove()  # 7 × (36 × 4 + 1) = 1015


@pytest.mark.parametrize(("trained", "where"), [("embed_tokens", "词嵌入或第 0 层"), ("lm_head", "最后一层之后")])
def test_nothing_to_cache_is_an_error(trained, where):
    model = small_model("rope").requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    with pytest.raises(ValueError, match=f"--cache_frozen：.*{where}"):
        open_frozen_cache("memory", Path("output"), SimpleNamespace(module=model), None)


@pytest.mark.parametrize("position_embedding", ["rope", "alibi"])
def test_frozen_cache_of_a_shared_prefix(tmp_path, position_embedding):
    """共用的开头在各样本里都存着：下一轮换了同伴、不再合并，读到的也是同样的数。"""
    model = small_model(position_embedding).requires_grad_(False).train()
    model.model.layers[2].requires_grad_(True)
    cache = FrozenCache(tmp_path / "cache", 2, 11, 32, torch.float32, needs_agreement=False)
    cache.attach(model)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])  # 共用 3 4 5；样本 3 4 5 6 7 与 3 4 5 8 9 10
    shared = {"document_lengths": [3, 2, 3], "document_parents": [-1, 0, 0], "document_offsets": [0, 5]}
    together = model(input_ids=ids, **shared).logits[0]
    alone = model(input_ids=torch.tensor([[3, 4, 5, 8, 9, 10]]), document_lengths=[6], document_offsets=[5]).logits[0]
    again = model(input_ids=ids, **shared).logits[0]
    assert cache._filled.nonzero().flatten().tolist() == [0, 5]
    torch.testing.assert_close(alone, together[[0, 1, 2, 5, 6, 7]], rtol=0, atol=2e-6)
    torch.testing.assert_close(again, together, rtol=0, atol=2e-6)
    cache.remove()
