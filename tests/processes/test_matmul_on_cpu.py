"""process/matmul_on_cpu.py：bf16 的乘法展开成 fp32，各种形状、转置、一块块的都只舍入一次。"""

import subprocess
import sys

import pytest
import torch
from paths import ROOT

from finetune.process import matmul_on_cpu


@pytest.mark.parametrize("shape", [(5, 70, 90), (1, 64, 300), (7, 300, 33), (0, 4, 3), (3, 0, 4)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_product_in_pieces_is_rounded_once(shape, is_transposed, monkeypatch):
    monkeypatch.setattr(matmul_on_cpu, "ELEMENTS_AT_ONCE", 1000)
    rows, inner, columns = shape
    torch.manual_seed(0)
    left, right = torch.randn(rows, inner).bfloat16(), torch.randn(inner, columns).bfloat16()
    right = right.t().contiguous().t() if is_transposed else right
    found = matmul_on_cpu.mm(left, right, torch.empty(rows, columns, dtype=torch.bfloat16))
    exact = left.double() @ right.double()
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)


PROGRAM = """
import warnings
import torch
from deepspeed.accelerator import get_accelerator
get_accelerator()  # torch 2.10 上它载入时有自己的警告
warnings.simplefilter("error")
from finetune.process import matmul_on_cpu
matmul_on_cpu.cpu_bf16_speedup = lambda: {speedup}
assert bool(matmul_on_cpu.settle_products("bf16")) == bool(matmul_on_cpu.settle_products("bf16")) == {replaced}
assert matmul_on_cpu.products_type() == {type!r} and matmul_on_cpu.settle_products("fp32") == ""
torch.manual_seed(0)
inputs, weight = torch.randn(2, 3, 64), torch.randn(40, 64)
grads = {{}}
for dtype in (torch.float32, torch.bfloat16):
    x, w = (tensor.bfloat16().to(dtype).requires_grad_() for tensor in (inputs, weight))
    output = torch.nn.functional.linear(x, w)
    (output @ output.transpose(1, 2)).float().sum().backward()
    assert output.dtype == x.grad.dtype == w.grad.dtype == dtype
    grads[dtype] = x.grad, w.grad
for dtype in (torch.float32, torch.bfloat16):
    left, right = torch.randn(2, 3, 64).to(dtype), torch.randn(2, 64, 5).to(dtype)
    for product, one, other in ((torch.mm, left[0], right[0]), (torch.bmm, left, right)):
        out = torch.empty(*one.shape[:-1], 5, dtype=dtype)
        assert product(one, other, out=out) is out and torch.equal(out, product(one, other))
for exact, rounded in zip(*grads.values()):
    assert (exact - rounded).abs().max() < 0.02 * exact.abs().max()
"""


@pytest.mark.parametrize("speedup", [0.1, 1.5])
def test_only_a_slow_cpu_replaces_the_products(speedup):
    replaced = speedup < 1
    program = PROGRAM.format(speedup=speedup, replaced=replaced, type="fp32" if replaced else None)
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "registered kernel" not in run.stderr, run.stderr
