#!/usr/bin/env bash
# 用 AdamW 的 ZeRO-2 不用 torch.compile，也载入它的整个后端。
#
# deepspeed 0.19.8、torch 2.13.0（CPU）。
# 预期：优化器不是 Muon，训练里没有一处用到 torch.compile，就不会载入 torch._inductor。
# 实际：ZeRO 要问优化器是不是 Muon（自己给的优化器在 initialize 里，配置里写的在第一次反向里），为此导入 Muon 的模块；
#       那个模块在导入时就把几个函数交给 torch.compile，连带载入 inductor：2452 个模块成了 3161 个，匿名内存 231 成了 279 MB。
#       导入 deepspeed 本身不载入它。
#
# 退出码：0 如上所述，1 变了，2 装不上。
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv" && "$work/venv/bin/pip" install -q torch==2.13.0 deepspeed==0.19.8 numpy==2.2.6 setuptools==80.9.0 || exit 2

cat > "$work/one_step.py" <<'PY'
import sys
from pathlib import Path

import deepspeed
import torch


def seen() -> tuple[bool, int, int]:
    anonymous = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return "torch._inductor.compile_fx" in sys.modules, len(sys.modules), int(anonymous.split()[1]) // 1024


model = torch.nn.Linear(8, 8)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
before = seen()
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
engine.backward(engine(torch.ones(1, 8)).sum())
after = seen()
for when, (has_inductor, modules, megabytes) in (("initialize 之前", before), ("第一次反向之后", after)):
    print(f"{when}：inductor {'已载入' if has_inductor else '没有'}，{modules} 个模块，{megabytes} MB")
sys.exit(0 if after[0] and not before[0] and after[1] - before[1] > 200 else 1)
PY

export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
"$work/venv/bin/python" "$work/one_step.py" 2> "$work/log" || { code=$?; tail -5 "$work/log" >&2; exit $code; }
