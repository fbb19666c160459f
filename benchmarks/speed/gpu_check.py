"""bench 的 correctness：GPU 对 CPU 的 fp32，packing 对不 packing，各方法各 ZeRO 级走几步；由 gpu.py 调用。

没有 GPU 时也能走（两边都是 CPU），只说明脚本本身是好的。
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.speed import work as bench_work
from benchmarks.speed.ours import Rows, single_process_environment, step_samples
from benchmarks.speed.programs import last_layers

ARCHITECTURES = ("baichuan-7b", "baichuan-13b", "baichuan2-7b", "baichuan2-13b")
METHODS = ("freeze", "lora", "ptuning", "full")
DS_FILES = ("ds_zero2_no_offload.json", "ds_zero3_offload.json")
LENGTHS = [5, 17, 64, 33, 128, 300, 7, 90]
VOCAB, OPENING = 2000, 32

Differences = list[tuple[str, float, float]]


def device():
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rows() -> list[dict[str, list[int]]]:
    """各样本；长的几个有相同的开头，并排时只算一次。"""
    found = [bench_work.spread_row(length, VOCAB, seed) for seed, length in enumerate(LENGTHS)]
    opening = found[LENGTHS.index(max(LENGTHS))]["input_ids"][:OPENING]
    for row in found:
        if len(row["input_ids"]) > 60:
            row["input_ids"][:OPENING] = opening
    return found


def tiny_model(scratch: str, arch: str) -> Path:
    from scripts.build_tiny_model import build_tiny_model

    train_text = [bench_work.ROOT / "data" / "spo_0.json"]
    return build_tiny_model(arch, Path(scratch) / arch, vocab_size=VOCAB, train_text=train_text, heads=4)


def gradients(model, batches: list[dict[str, Any]], num_targets: int, place) -> tuple[float, dict[str, Any]]:
    """训练模式下各批的损失之和与梯度（fp32，CPU）。"""
    model.train().zero_grad()
    total = 0.0
    for batch in batches:
        batch = {key: value.to(place) if hasattr(value, "to") else value for key, value in batch.items()}
        loss = model(**batch, num_items_in_batch=num_targets, use_cache=False).loss
        loss.backward()
        total += loss.item()
    found = {name: p.grad.float().cpu().clone() for name, p in model.named_parameters() if p.grad is not None}
    return total, found


def relative(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """全部梯度合成一个向量的相对差。"""
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


def check_model(arch: str) -> dict[str, Differences]:
    """GPU 对 CPU（fp32）；packing 对补齐（fp32 与 bf16）。"""
    import torch

    from baichuan import BaichuanForCausalLM
    from finetune.data.packing import collate

    place, data = device(), [bench_work.as_sample(row) for row in rows()]
    num_targets = sum(label != -100 for row in rows() for label in row["labels"])
    packed, padded = ([collate(data, 0, packing)] for packing in (True, False))
    assert max(packed[0]["document_parents"]) >= 0, "没有共用的开头，少核对了一种情形"
    with tempfile.TemporaryDirectory() as scratch:
        path = tiny_model(scratch, arch)
        model = BaichuanForCausalLM.from_pretrained(path, dtype=torch.float32)
        loss, expected = gradients(model, padded, num_targets, "cpu")
        model.to(place)
        packed_loss, packed_found = gradients(model, packed, num_targets, place)
        padded_loss, padded_found = gradients(model, padded, num_targets, place)
        model.to(torch.bfloat16)
        half_packed, half_packed_found = gradients(model, packed, num_targets, place)
        half_padded, half_padded_found = gradients(model, padded, num_targets, place)
    return {
        "differences": [
            ("损失，补齐，对 CPU", abs(padded_loss / loss - 1), 1e-5),
            ("梯度，补齐，对 CPU", relative(padded_found, expected), 1e-4),
            ("损失，并排，对补齐", abs(packed_loss / padded_loss - 1), 1e-6),
            ("梯度，并排，对补齐", relative(packed_found, padded_found), 1e-5),
            ("损失，bf16 并排，对 bf16 补齐", abs(half_packed / half_padded - 1), 2e-3),
            ("梯度，bf16 并排，对 fp32", relative(half_packed_found, expected), 1e-1),
            ("梯度，bf16 补齐，对 fp32", relative(half_padded_found, expected), 1e-1),
        ]
    }


def check_attention(position: str) -> dict[str, Differences]:
    """真实的头宽（128）：GPU 上的并排注意力（bf16）对逐段的写法（fp32），含父段与前缀；输出与各梯度。"""
    import torch

    from baichuan.attention import RotaryFunction, alibi_slopes, by_head, packed_attention, rotary_tables
    from baichuan.packed_attention_gpu import layout_on_gpu, segments

    place, heads, width, differences = device(), 8, 128, []
    torch.manual_seed(0)
    cases = {
        "各看各的": ([300, 1, 77, 513, 128], [-1] * 5, 0),
        "父段": ([100, 260, 50, 7, 200, 90], [-1, -1, 0, 0, 1, -1], 0),
        "前缀与父段": ([150, 20, 300], [-1, 0, 0], 9),
    }
    slopes = None if position == "rope" else alibi_slopes(heads)
    for name, (lengths, parents, num_prefix) in cases.items():
        layout = layout_on_gpu(lengths, parents, num_prefix, place, torch.bfloat16, width, slopes)
        if layout is None:
            differences.append((f"{name}：这台机器用不了", 0.0, 0.0))
            continue
        ends = [first + rows.stop - rows.start for rows, _, first in segments(lengths, parents)]
        starts = [first for *_, first in segments(lengths, parents)]
        positions = torch.cat([torch.arange(*span) for span in zip(starts, ends, strict=True)])[None] + num_prefix
        tables = None if slopes is not None else rotary_tables(positions.to(place), width)
        distances = torch.arange(num_prefix + max(ends))[None] - (num_prefix + torch.arange(max(ends)))[:, None]
        bias = (torch.zeros(1) if slopes is None else slopes)[:, None, None] * distances
        bias = bias.masked_fill(distances > 0, float("-inf")).to(place)
        states = [torch.randn(1, sum(lengths), 3 * heads * width, device=place)]
        states += [torch.randn(heads, num_prefix, width, device=place) for _ in range(2 * bool(num_prefix))]
        found = [state.bfloat16().requires_grad_() for state in states]
        expected = [state.detach().float().requires_grad_() for state in found]
        grad = torch.randn(1, sum(lengths), heads * width, device=place).bfloat16()
        outputs = [layout.attend(found[0], tables, width, *found[1:])]
        packed = expected[0] * 1 if tables is None else RotaryFunction.apply(expected[0] * 1, *tables)
        prefix = expected[1:] or (None, None)
        query_key_value = by_head(packed, width)[0].unbind(1)
        output = packed_attention(*query_key_value, lengths, parents, bias, slopes is None, *prefix)
        outputs.append(output.flatten(1)[None])
        outputs[0].backward(grad)
        outputs[1].backward(grad.float())
        outputs = [output.detach().float() for output in outputs]
        differences.append((f"输出，{name}", relative({0: outputs[0]}, {0: outputs[1]}), 1e-2))
        pairs = zip(("W_pack", "前缀的键", "前缀的值"), found, expected, strict=False)
        differences += [
            (f"{text}的梯度，{name}", relative({0: a.grad.float()}, {0: b.grad}), 2e-2) for text, a, b in pairs
        ]
    return {"differences": differences}


def check_elementwise() -> dict[str, Differences]:
    """合成一个核的逐元素运算对逐句执行（bf16，真实的宽度）。"""
    import torch

    from baichuan import elementwise_gpu
    from baichuan.attention import rotary_tables

    place = device()
    torch.manual_seed(0)

    def new(*shape):
        return torch.randn(*shape, device=place).bfloat16()

    rows, width = 1000, 4096
    x, y_grad, weight = new(rows, width), new(rows, width), new(width)
    inverse_rms = elementwise_gpu.rms_norm(x, weight, 1e-6)[1]
    gate, up, swiglu_grad = (new(rows, 11008) for _ in range(3))
    tables = [table[0] for table in rotary_tables(torch.arange(rows, device=place)[None], 128)]
    heads = [new(rows, 32, 128) for _ in range(3)]
    cases = {
        "rms_norm": ((x,), weight, 1e-6),
        "rms_norm_input_grad": ((y_grad, x, inverse_rms), weight),
        "rms_norm_weight_grad": ((y_grad, x, inverse_rms), weight),
        "swiglu": ((gate, up),),
        "swiglu_grads": ((swiglu_grad, gate, up),),
        "rotary_split": ((new(rows, 3 * width), *tables),),
        "rotary_join": ((*heads, *tables),),
    }
    differences = []
    for name, (by_row, *shared) in cases.items():
        function = getattr(elementwise_gpu, name)
        found, expected = elementwise_gpu.fused(function, by_row, *shared), function(*by_row, *shared)
        pairs = [(found, expected)] if torch.is_tensor(found) else zip(found, expected, strict=True)
        worst = max(relative({0: a.float()}, {0: b.float()}) for a, b in pairs)
        differences.append((name, worst, 2e-3))
    return {"differences": differences}


def check_loss() -> dict[str, Differences]:
    """分块的损失对普通写法：冻结与可训练的词表投影，有无 NormHead。"""
    import torch
    from torch import nn

    from baichuan import linear_cross_entropy as module

    place, differences = device(), []
    module.MAX_LOGITS_ELEMENTS = 100 * VOCAB  # 分成几块
    torch.manual_seed(0)
    hidden, weight = torch.randn(333, 64), torch.randn(VOCAB, 64)
    targets = torch.randint(VOCAB, (333,), device=place)
    for norm_head in (False, True):
        pairs = [(hidden.to(place).requires_grad_(), weight.to(place).requires_grad_()) for _ in range(2)]
        head = nn.functional.normalize(pairs[0][1]) if norm_head else pairs[0][1]
        expected = nn.functional.cross_entropy(pairs[0][0] @ head.t(), targets, reduction="sum")
        scale = module.inverse_row_norms(pairs[1][1].detach()) if norm_head else None
        found = module.LinearCrossEntropy.apply(*pairs[1], scale, targets)
        expected.backward()
        found.backward()
        name = "NormHead" if norm_head else "普通"
        differences.append((f"损失，{name}", abs(float(found) / float(expected) - 1), 1e-5))
        for text, plain, chunked in zip(("隐藏状态", "词表投影"), *pairs, strict=True):
            differences.append((f"{text}的梯度，{name}", relative({0: chunked.grad}, {0: plain.grad}), 1e-5))
    return {"differences": differences}


def check_method(method: str, ds_file: str) -> dict[str, Differences]:
    """build_engine 与 train_step 走 3 步：第一步的损失对 CPU 的 fp32 前向，之后在同样的样本上下降。"""
    single_process_environment()
    import deepspeed
    import torch

    import train
    from baichuan import BaichuanForCausalLM
    from finetune.cli.train_checks import validate_args
    from finetune.cli.train_flags import parse_args
    from finetune.data.packing import collate
    from finetune.data.step_loader import StepLoader

    data = Rows(rows())
    with tempfile.TemporaryDirectory() as scratch:
        path = tiny_model(scratch, "baichuan2-7b")
        argv = ["--model_name_or_path", path, "--train_path", bench_work.ROOT / "data" / "spo_0.json"]
        argv += ["--output_dir", scratch, "--ds_file", bench_work.ROOT / ds_file, "--train_type", method]
        argv += ["--precision", "bf16", "--per_device_train_batch_size", len(LENGTHS), "--max_len", 512]
        argv += ["--max_src_len", 500, "--gradient_accumulation_steps", 1, "--learning_rate", 1e-3]
        argv += ["--freeze_module_name", last_layers(4)] if method == "freeze" else []
        argv += ["--lora_dropout", 0.0] if method == "lora" else []
        args = parse_args([str(part) for part in argv])
        ds_config, config = validate_args(args)
        ds_config.pop("scheduler", None)
        deepspeed.init_distributed()
        engine, _ = train.build_engine(args, config, ds_config, args.precision, 3)
        plain = BaichuanForCausalLM.from_pretrained(path, dtype=torch.float32).train()
        expected = plain(**collate([data[i] for i in range(len(data))], 0, True), use_cache=False).loss.item()
    loader = StepLoader(data, batch_size=len(data), max_len=512, seed=None, packing=args.packing)
    losses = [train.train_step(engine, loader.prepare(step_samples(loader, 0)))[0] for _ in range(3)]
    # P-Tuning 的前缀是随机的，第一步的损失略有不同
    return {
        "differences": [
            ("第一步的损失，对 CPU 的 fp32", abs(losses[0] / expected - 1), 5e-2 if method == "ptuning" else 2e-3),
            ("三步之后损失没有下降", float(losses[2] >= losses[0]), 0.0),
        ],
        "losses": losses,
    }


CHECKS = {
    "loss": check_loss,
    "elementwise": check_elementwise,
    **{f"attention {position}": partial(check_attention, position) for position in ("rope", "alibi")},
    **{arch: partial(check_model, arch) for arch in ARCHITECTURES},
    **{
        f"{method} {'zero3_offload' if 'zero3' in ds_file else 'zero2'}": partial(check_method, method, ds_file)
        for ds_file in DS_FILES
        for method in METHODS
    },
}

if __name__ == "__main__":
    from finetune.process.interruption import leave

    print(json.dumps(CHECKS[json.loads(sys.argv[1])["check"]]()))
    leave(0)
