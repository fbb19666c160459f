#!/usr/bin/env bash
# 同样的权重，换一个文件就算出别的位。
#
# torch 2.13.0（CPU，自带 oneMKL 2024.2）、safetensors 0.8.0、numpy 2.2.6，AMD 的 CPU。
# 预期：同样的权重、同样的机器、一个线程，乘积的每一位相同，与权重存在哪个文件里无关。
# 实际：safetensors 的张量直接落在读进来的文件上，只对齐到 8 字节；文件头里的说明长 8 个字节，权重的地址就差 8，
#       oneMKL 按地址选算法，矩阵乘向量的末位就不同。MKL_CBWR=AUTO 时八个文件全部相同。Intel 的 CPU 上没有差别。
#
# 退出码：0 如上所述（不是 AMD 的 CPU 时说明后也是 0），1 变了，2 装不上。
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv" && "$work/venv/bin/pip" install -q torch==2.13.0 safetensors==0.8.0 numpy==2.2.6 || exit 2

cat > "$work/products.py" <<'PY'
import sys

import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
weight, vector = torch.randn(64, 48, generator=generator), torch.randn(48, generator=generator)
found = {}
for length in range(0, 64, 8):
    path = f"{sys.argv[1]}/{length}.safetensors"
    save_file({"weight": weight}, path, metadata={"note": "x" * length})
    loaded = load_file(path)["weight"]
    assert torch.equal(loaded, weight)
    found.setdefault(tuple((loaded @ vector).tolist()), []).append(loaded.data_ptr() % 64)
for addresses in found.values():
    print(f"一种结果，权重的地址除以 64 余 {addresses}", file=sys.stderr)
print(len(found))
PY

without=$(env -u MKL_CBWR "$work/venv/bin/python" "$work/products.py" "$work")
with=$(MKL_CBWR=AUTO "$work/venv/bin/python" "$work/products.py" "$work")
echo "八个文件，同样的权重：$without 种乘积；MKL_CBWR=AUTO：$with 种"
if ! grep -q AuthenticAMD /proc/cpuinfo; then
    echo "这不是 AMD 的 CPU，不作判断"
    exit 0
fi
[ "$without" -gt 1 ] && [ "$with" -eq 1 ]
