#!/usr/bin/env bash
# peft 的 trainable_token_indices 只训练两个词，每一步却各造一份整个词表大小的权重与梯度。
#
# peft 0.21.2、torch 2.13.0（CPU）、transformers 5.23.0。
# 预期：可训练的参数只有 [2, H]，一步查 5 个词，所以前向与反向造出的张量都是几行的大小，与词表无关。
# 实际：前向用 index_copy 把整份冻结的词嵌入抄一遍（[V, H]），反向再造一份同样大小的梯度，只取其中两行；
#       词表 125,696、宽 4096、bf16 时，每步各 1 GB。用时也随词表走，不随训练的词数走。
#
# 退出码：0 如上所述，1 变了，2 装不上。
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv" && "$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2 || exit 2

cat > "$work/count.py" <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB, WIDTH = 50_000, 64


class WholeVocabulary(TorchDispatchMode):
    """记下新造出的、不小于整个词表的张量各由哪个算子造出。"""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        for value in result if isinstance(result, (tuple, list)) else [result]:
            is_new = isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in given
            if is_new and value.numel() >= VOCAB * WIDTH:
                self.made.append(func.overloadpacket.__name__)
        return result


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids):
        return self.out(self.embed_tokens(ids))


new_tokens = {"embed_tokens": [VOCAB - 2, VOCAB - 1]}
model = get_peft_model(Tiny(), LoraConfig(target_modules=["out"], trainable_token_indices=new_tokens))
ids = torch.tensor([[1, 2, VOCAB - 1, 3, VOCAB - 2]])
with WholeVocabulary() as seen:
    model(ids).sum().backward()
shapes = [tuple(value.shape) for name, value in model.named_parameters() if value.requires_grad and "token" in name]
print("可训练的词：", shapes, "整个词表大小的新张量：", seen.made)
raise SystemExit(shapes != [(2, WIDTH)] or sorted(seen.made) != ["embedding_dense_backward", "index_copy"])
PY
"$work/venv/bin/python" "$work/count.py"
