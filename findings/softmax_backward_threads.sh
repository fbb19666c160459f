#!/usr/bin/env bash
# 逐行独立的 softmax 反向，一个线程与多个线程的位不同。
#
# torch 2.13.0（CPU）、numpy 2.2.6，AVX2 的 CPU。
# 预期：每一行只由一个线程算，从头到尾，所以线程数不影响任何一位（前向就是这样）。
# 实际：行的长度不是向量宽度（8 个 float）的整数倍时，一个线程与两个以上的线程的梯度末位不同；2、3、8 个线程彼此相同，
#       长度是 8 的倍数时全部相同。与一行由谁算无关，像是串行与并行的两条路各编译一份，行尾的乘加一处合并、一处不合并。
#
# 退出码：0 如上所述，1 变了，2 装不上。
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv" && "$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 || exit 2

cat > "$work/gradient.py" <<'PY'
import hashlib
import sys

import torch

torch.set_num_threads(int(sys.argv[1]))
width = int(sys.argv[2])
generator = torch.Generator().manual_seed(0)
logits = torch.randn(400, width, generator=generator).requires_grad_()
logits.softmax(-1).backward(torch.randn(400, width, generator=generator))
print(hashlib.sha256(logits.grad.numpy()).hexdigest()[:12])
PY

gradient() { ATEN_CPU_CAPABILITY=avx2 "$work/venv/bin/python" "$work/gradient.py" "$1" "$2"; }
for width in 160 161; do
    for threads in 1 2 3 8; do echo "行长 $width，$threads 个线程：$(gradient $threads $width)"; done
done | tee "$work/lines"
count() { grep "$1" "$work/lines" | sed 's/.*：//' | sort -u | wc -l; }
[ "$(count '行长 160')" -eq 1 ] && [ "$(count '行长 161')" -eq 2 ] && [ "$(count '行长 161，[238]')" -eq 1 ]
