"""GPU 上的注意力与逐元素运算里不必有卡就能核对的部分：布局、掩码、偏置、抄键的梯度、逐元素的式子。"""

import pytest
import torch
from torch import nn

from baichuan import elementwise_gpu
from baichuan.attention import RotaryFunction, alibi_slopes, by_head, packed_attention, rotary_tables
from baichuan.norm_and_swiglu import RMSNormFunction, SwiGLUFunction
from baichuan.packed_attention_cpu import segments
from baichuan.packed_attention_gpu import FlexAttention, Layout, VarlenAttention, layout_on_gpu

HEADS, WIDTH = 4, 16
CPU = torch.device("cpu")
CASES = {
    "各看各的": ([70, 1, 300, 33, 128], [-1] * 5, 0),
    "接在别段之后": ([40, 130, 50, 7, 200, 90], [-1, -1, 0, 0, 1, -1], 0),
    "前缀": ([200, 60, 129], [-1, -1, -1], 5),
    "前缀占满一块": ([300, 60], [-1, -1], 128),
    "前缀与父段": ([150, 20, 300], [-1, 0, 0], 9),
}


def make_states(lengths, num_prefix, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def new(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    prefix = (new(HEADS, num_prefix, WIDTH), new(HEADS, num_prefix, WIDTH)) if num_prefix else (None, None)
    return new(1, sum(lengths), 3 * HEADS * WIDTH), prefix


def position_ids(lengths, parents, num_prefix):
    spans = [torch.arange(first, first + rows.stop - rows.start) for rows, _, first in segments(lengths, parents)]
    return torch.cat(spans)[None] + num_prefix


def alibi_bias(lengths, parents, num_prefix):
    """packed_attention 要的 [heads, S, V + S]。"""
    longest = max(first + rows.stop - rows.start for rows, _, first in segments(lengths, parents))
    distances = torch.arange(num_prefix + longest)[None] - (num_prefix + torch.arange(longest))[:, None]
    bias = alibi_slopes(HEADS)[:, None, None].double() * distances
    return bias.masked_fill(distances > 0, float("-inf"))


def gradients(output, tensors):
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator, dtype=output.dtype))
    found = [tensor.grad.clone() for tensor in tensors if tensor is not None]
    for tensor in tensors:
        if tensor is not None:
            tensor.grad = None
    return found


def bottom_right_causal(plan):
    """flash 变长注意力的定义：逐段、末尾对齐的因果。"""

    def kernel(query, key, value):
        query_starts, key_starts = plan.query_starts.tolist(), plan.key_starts.tolist()
        outputs = []
        for i in range(len(query_starts) - 1):
            q = query[query_starts[i] : query_starts[i + 1]].transpose(0, 1)
            k, v = (s[key_starts[i] : key_starts[i + 1]].transpose(0, 1) for s in (key, value))
            allowed = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
            outputs.append(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(0, 1))
        return torch.cat(outputs)

    return kernel


@pytest.mark.parametrize("name", CASES)
def test_varlen_layout(name):
    """旋转、抄键、各段的起止与它们的反向：核换成它的定义，与逐段的写法相同。"""
    lengths, parents, num_prefix = CASES[name]
    packed, prefix = make_states(lengths, num_prefix)
    cos, sin = rotary_tables(position_ids(lengths, parents, num_prefix), WIDTH)

    states = by_head(RotaryFunction.apply(packed * 1, cos, sin), WIDTH)[0].unbind(1)
    longest = max(first + rows.stop - rows.start for rows, _, first in segments(lengths, parents))
    bias = torch.zeros(1, longest, num_prefix + longest, dtype=torch.float64)
    bias = bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).triu(num_prefix + 1), float("-inf"))
    expected = packed_attention(*states, lengths, parents, bias, True, *prefix).flatten(1)[None]
    expected_grads = gradients(expected, [packed, *prefix])

    plan = VarlenAttention(Layout(lengths, parents, num_prefix), CPU)
    plan.kernel = bottom_right_causal(plan)
    found = plan.attend(packed, (cos, sin), WIDTH, *prefix)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for grad, expected_grad in zip(gradients(found, [packed, *prefix]), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)
    assert (plan.rows is None) == (name == "各看各的")
    assert plan.longest_query == max(lengths)


@pytest.mark.parametrize("name", CASES)
def test_flex_mask_and_score(name):
    """掩码与 ALiBi 的偏置逐点取出来，算成普通的注意力，与逐段的写法相同，梯度也是。"""
    lengths, parents, num_prefix = CASES[name]
    packed, prefix = make_states(lengths, num_prefix)
    query, key, value = by_head(packed, WIDTH)[0].unbind(1)
    bias = alibi_bias(lengths, parents, num_prefix)
    expected = packed_attention(query, key, value, lengths, parents, bias, False, *prefix)
    expected_grads = gradients(expected, [packed, *prefix])

    plan = FlexAttention(Layout(lengths, parents, num_prefix), alibi_slopes(HEADS).double(), CPU)
    query, key, value = (s.transpose(0, 1) for s in by_head(packed, WIDTH)[0].unbind(1))
    if num_prefix:
        key, value = torch.cat([prefix[0], key], dim=1), torch.cat([prefix[1], value], dim=1)
    head, i, j = torch.meshgrid(*(torch.arange(n) for n in (HEADS, query.shape[1], key.shape[1])), indexing="ij")
    scores = plan.score(query @ key.transpose(1, 2) * WIDTH**-0.5, None, head, i, j)
    scores = scores.masked_fill(~plan.mask(None, head, i, j), float("-inf"))
    found = (scores.softmax(dim=-1) @ value).transpose(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for grad, expected_grad in zip(gradients(found, [packed, *prefix]), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_flex_block_mask(name):
    """由起止写出的块掩码：有看得到的块与 create_block_mask 相同；全看得到的块不多于它的，各看各的时相同。"""
    from torch.nn.attention.flex_attention import create_block_mask

    lengths, parents, num_prefix = CASES[name]
    plan = FlexAttention(Layout(lengths, parents, num_prefix), alibi_slopes(HEADS), CPU)
    total = sum(lengths)
    expected = create_block_mask(plan.mask, None, None, total, num_prefix + total, device="cpu")

    def blocks(counts, columns):
        dense = torch.zeros(columns.shape[-2:], dtype=torch.bool)
        for row, count in enumerate(counts[0, 0].tolist()):
            dense[row, columns[0, 0, row, :count].long()] = True
        return dense

    def full(mask):
        return blocks(mask.full_kv_num_blocks, mask.full_kv_indices)

    def any_seen(mask):
        return blocks(mask.kv_num_blocks, mask.kv_indices) | full(mask)

    assert torch.equal(any_seen(plan.block_mask), any_seen(expected))
    assert not (full(plan.block_mask) & ~full(expected)).any()
    assert torch.equal(full(plan.block_mask), full(expected)) or num_prefix
    assert plan.block_mask.seq_lengths == (total, num_prefix + total)


def test_flex_forward_eager():
    """FlexAttention 自己按块掩码与 score_mod 算出的前向（CPU，逐句执行）与逐段的写法相同。"""
    from torch.nn.attention.flex_attention import flex_attention

    lengths, parents, num_prefix = CASES["前缀与父段"]
    with torch.no_grad():
        packed, prefix = make_states(lengths, num_prefix, torch.float32)
        query, key, value = by_head(packed, WIDTH)[0].unbind(1)
        bias = alibi_bias(lengths, parents, num_prefix).float()
        expected = packed_attention(query, key, value, lengths, parents, bias, False, *prefix)
        plan = FlexAttention(Layout(lengths, parents, num_prefix), alibi_slopes(HEADS), CPU)
        query, key, value = (s.transpose(0, 1) for s in (query, key, value))
        key, value = torch.cat([prefix[0], key], dim=1), torch.cat([prefix[1], value], dim=1)
        states = (states.detach()[None] for states in (query, key, value))
        found = flex_attention(*states, score_mod=plan.score, block_mask=plan.block_mask)[0].transpose(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_no_gpu_layout_on_the_cpu():
    """没有 CUDA 时不造布局，走 CPU 的写法。"""
    assert layout_on_gpu([3], [-1], 0, CPU, torch.bfloat16, 128, None) is None
    assert not elementwise_gpu.is_worth_it(torch.zeros(10_000, 8))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_formulas(weight_dtype):
    """交给编译的式子与 RMSNormFunction 相同：bf16 逐位相同，fp32 差在舍入。"""
    torch.manual_seed(0)
    x, weight = torch.randn(40, 64).to(weight_dtype).requires_grad_(), torch.randn(64).to(weight_dtype).requires_grad_()
    y_grad = torch.randn(40, 64).to(weight_dtype)
    expected = RMSNormFunction.apply(x, weight, 1e-6)
    expected.backward(y_grad)
    found, inverse_rms = elementwise_gpu.rms_norm(x, weight, 1e-6)
    rows = y_grad, x, inverse_rms, weight
    found = (found, elementwise_gpu.rms_norm_input_grad(*rows), elementwise_gpu.rms_norm_weight_grad(*rows))
    tolerance = {"rtol": 0, "atol": 0} if weight_dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for tensor, other in zip(found, (expected, x.grad, weight.grad), strict=True):
        torch.testing.assert_close(tensor, other, **tolerance)


def test_swiglu_formulas():
    torch.manual_seed(0)
    gate, up, y_grad = (torch.randn(20, 32).requires_grad_() for _ in range(3))
    expected = SwiGLUFunction.apply(gate, up)
    expected.backward(y_grad.detach())
    assert torch.equal(elementwise_gpu.swiglu(gate, up), expected)
    grads = elementwise_gpu.swiglu_grads(y_grad, gate, up)
    assert torch.equal(grads[0], gate.grad)
    assert torch.equal(grads[1], up.grad)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_rotary_split(table_dtype):
    """RotarySplit 与就地的 RotaryFunction 相同；bf16 里旋转时乘积多一次舍入。"""
    torch.manual_seed(0)
    packed = torch.randn(1, 30, 3 * HEADS * WIDTH).bfloat16()
    tables = [table.to(table_dtype) for table in rotary_tables(torch.arange(30)[None], WIDTH)]
    grad = torch.randn_like(packed)
    in_place, split = packed.clone().requires_grad_(), packed.clone().requires_grad_()
    expected = RotaryFunction.apply(in_place * 1, *tables)
    expected.backward(grad)
    found = elementwise_gpu.RotarySplit.apply(split[0], *tables)
    torch.autograd.backward(found, by_head(grad, WIDTH)[0].unbind(1))
    tolerance = {"rtol": 0, "atol": 0} if table_dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    torch.testing.assert_close(torch.stack(found, dim=1).flatten(1)[None], expected, **tolerance)
    torch.testing.assert_close(split.grad, in_place.grad, **tolerance)


def test_compiles_once_for_all_lengths(monkeypatch):
    """长度、段数变了不重新编译：超过上限时 torch 会悄悄退回逐句执行，FlexAttention 就要造出 T × T 的分数。"""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    monkeypatch.setattr(elementwise_gpu, "is_worth_it", lambda states: True)
    compiled = {}
    monkeypatch.setattr(
        elementwise_gpu,
        "compiled",
        lambda f: compiled.setdefault(f, torch.compile(f, fullgraph=True, backend="aot_eager")),
    )
    attention = torch.compile(flex_attention, dynamic=True, backend="aot_eager")
    weight = torch.ones(64)
    for lengths, parents in [([90, 300, 41], [-1, -1, -1]), ([150, 77, 60, 200, 8], [-1, -1, 0, 0, -1])]:
        total = sum(lengths)
        x, packed = torch.randn(total, 64), torch.randn(total, 3 * HEADS * WIDTH)
        tables = [table[0] for table in rotary_tables(torch.arange(total)[None], WIDTH)]
        with torch.no_grad():
            found, expected = (
                elementwise_gpu.fused(elementwise_gpu.rms_norm, (x,), weight, 1e-6),
                nn.functional.rms_norm,
            )
            torch.testing.assert_close(found[0], expected(x, (64,), weight, 1e-6))
            query, key, value = elementwise_gpu.fused(elementwise_gpu.rotary_split, (packed, *tables))
            plan = FlexAttention(Layout(lengths, parents, 0), alibi_slopes(HEADS), CPU)
            states = (states.transpose(0, 1)[None] for states in (query, key, value))
            found = attention(*states, score_mod=plan.score, block_mask=plan.block_mask)[0].transpose(0, 1)
            bias = alibi_bias(lengths, parents, 0).float()
            expected = packed_attention(query, key, value, lengths, parents, bias, False)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert set(compiled) == {elementwise_gpu.rms_norm, elementwise_gpu.rotary_split}
