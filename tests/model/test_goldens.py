"""与官方代码的黄金值逐项比较：前向、损失、梯度与六步 AdamW。"""

import pytest
import torch
from golden_models import (
    GRADIENT_RTOL,
    LOGITS_ATOL,
    LOSS_ATOL,
    PACKED_CASES,
    Z_LOSS_CASES,
    assert_close,
    document_lengths_of,
    gradients,
    load_golden,
    load_model,
    relative,
)

# transformers 5.23 起把 gradient_checkpointing_enable 改了名，5.17 只有旧名
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


# ---------------------------------------------------------------- 黄金值：前向


@torch.no_grad()
def test_full_logits_hidden_states_cache_and_loss(golden):
    model = load_model(golden).eval()
    output = model(
        input_ids=golden.tensors["full.input_ids"],
        labels=golden.tensors["full.labels"],
        output_hidden_states=True,
        use_cache=True,
    )
    assert output.logits.dtype == torch.float32
    assert_close(output.logits, golden.tensors["full.eval_logits"], LOGITS_ATOL)
    assert output.loss.item() == pytest.approx(golden.values["full.eval_loss"], abs=LOSS_ATOL)
    # [层数 + 1, 长度, 宽度]：词嵌入、各层输出，最后一个已过末尾的 RMSNorm
    hidden = torch.stack([state[0] for state in output.hidden_states])
    assert_close(hidden, golden.tensors["full.hidden_states_row0"], LOGITS_ATOL)
    cache = output.past_key_values.layers[0]
    assert_close(cache.keys[0], golden.tensors["full.cache_k_layer0_row0"], LOGITS_ATOL)
    assert_close(cache.values[0], golden.tensors["full.cache_v_layer0_row0"], LOGITS_ATOL)


@torch.no_grad()
@pytest.mark.parametrize("side", ["rpad", "lpad"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_padded_logits_and_loss(golden, side, training):
    batch = {name: golden.tensors[f"{side}.{name}"] for name in ("input_ids", "attention_mask", "labels")}
    model = load_model(golden).train(training)
    logits = model(**{**batch, "labels": None}).logits
    assert_close(logits, golden.tensors[f"{side}.eval_logits"], LOGITS_ATOL, where=batch["attention_mask"])
    # Baichuan-7B 训练时不看 attention_mask，左侧补齐的损失是错的；此处以推理模式的值为准
    source = "eval" if not training or (golden.name == "baichuan-7b" and side == "lpad") else "train"
    loss = model(**batch).loss.item()
    assert loss == pytest.approx(golden.values[f"{side}.{source}_loss"], abs=LOSS_ATOL)


@torch.no_grad()
def test_left_padding_with_explicit_positions(golden):
    if "lpad.position_ids" not in golden.tensors:
        # ALiBi 只看相对距离：传入 position_ids 不得改变任何结果
        mask = golden.tensors["lpad.attention_mask"]
        position_ids = (mask.cumsum(-1) - 1).clamp(min=1)
    else:
        position_ids = golden.tensors["lpad.position_ids"]
    model = load_model(golden).eval()
    output = model(
        input_ids=golden.tensors["lpad.input_ids"],
        attention_mask=golden.tensors["lpad.attention_mask"],
        labels=golden.tensors["lpad.labels"],
        position_ids=position_ids,
    )
    where = golden.tensors["lpad.attention_mask"]
    assert_close(output.logits, golden.tensors["lpad.eval_logits"], LOGITS_ATOL, where=where)
    expected = golden.values.get("lpad.eval_loss_with_position_ids", golden.values["lpad.eval_loss"])
    assert output.loss.item() == pytest.approx(expected, abs=LOSS_ATOL)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_full_train_logits(golden, training):
    model = load_model(golden).train(training)
    logits = model(input_ids=golden.tensors["full.input_ids"]).logits
    assert_close(logits, golden.tensors["full.train_logits"], LOGITS_ATOL)


@torch.no_grad()
@pytest.mark.parametrize("golden", PACKED_CASES, indirect=True)
def test_packed_by_mask(golden):
    """13B：attention_mask 里的段号；Baichuan2-7B：三维 0/1 掩码加重新起数的位置。"""
    batch = {
        name.removeprefix("packed."): tensor
        for name, tensor in golden.tensors.items()
        if name in ("packed.input_ids", "packed.attention_mask", "packed.position_ids")
    }
    logits = load_model(golden).eval()(**batch).logits
    assert_close(logits, golden.tensors["packed.eval_logits"], LOGITS_ATOL)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("golden", PACKED_CASES, indirect=True)
def test_packed_by_document_lengths(golden, training):
    model = load_model(golden).train(training)
    output = model(input_ids=golden.tensors["packed.input_ids"], document_lengths=document_lengths_of(golden))
    assert_close(output.logits, golden.tensors["packed.eval_logits"], LOGITS_ATOL)


@torch.no_grad()
def test_longer_than_trained(golden):
    ids = golden.tensors["long.input_ids"]
    model = load_model(golden).eval()
    assert ids.shape[1] > model.config.trained_length
    expected = golden.tensors["long.eval_last_logits"]
    num_last = expected.shape[1]
    assert_close(model(input_ids=ids).logits[:, -num_last:], expected, LOGITS_ATOL)
    assert_close(model(input_ids=ids, logits_to_keep=num_last).logits, expected, LOGITS_ATOL)
    # 短句先用过之后再来长句，长句打包在短句之后，都是同样的结果
    short = golden.tensors["full.input_ids"][:1]
    packed = model(input_ids=torch.cat([short, ids], dim=1), document_lengths=[short.shape[1], ids.shape[1]])
    assert_close(packed.logits[:, -num_last:], expected, LOGITS_ATOL)


@torch.no_grad()
@pytest.mark.parametrize("golden", Z_LOSS_CASES, indirect=True)
def test_z_loss(golden):
    model = load_model(golden, z_loss_weight=0.01)
    full = {name: golden.tensors[f"full.{name}"] for name in ("input_ids", "labels")}
    for mode in ("eval", "train"):
        loss = model.train(mode == "train")(**full).loss.item()
        assert loss == pytest.approx(golden.values[f"full.{mode}_loss.z_loss_weight=0.01"], abs=LOSS_ATOL)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_distance(golden, dtype):
    """半精度 logits 到 fp32 的距离不超过官方代码记录的 1.5 倍。"""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    limit = 1.5 * golden.values[f"full.eval_logits_{name}_row0.max_abs_diff_to_fp32"]
    logits = load_model(golden, dtype=dtype).eval()(input_ids=golden.tensors["full.input_ids"]).logits
    assert_close(logits[0], golden.tensors["full.eval_logits"][0], limit)
    if dtype == torch.bfloat16:
        # 两份 bf16 结果的误差各自独立，彼此的距离也应是同一量级
        assert_close(logits[0], golden.tensors["full.eval_logits_bf16_row0"], limit)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_casting_after_loading_equals_loading_in_that_type(architecture, dtype):
    """位置表始终是 fp32：先按 fp32 加载再转换，与直接按半精度加载逐位相同（含超过训练长度的句子）。"""
    ids = architecture.tensors["long.input_ids"]
    direct = load_model(architecture, dtype=dtype).eval()(input_ids=ids).logits
    model = load_model(architecture).eval()
    model(input_ids=ids[:, :5])
    assert torch.equal(model.to(dtype)(input_ids=ids).logits, direct)


# ---------------------------------------------------------------- 黄金值：训练


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients(golden, checkpointing):
    batch = {name: golden.tensors[f"rpad.{name}"] for name in ("input_ids", "attention_mask", "labels")}
    model = load_model(golden).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    output = model(**batch)
    assert output.logits is None
    assert output.loss.item() == pytest.approx(golden.values["rpad.train_loss"], abs=LOSS_ATOL)
    output.loss.backward()
    actual = gradients(model)
    compared = 0
    for name, expected in golden.tensors.items():
        if not name.startswith("rpad.train_grad."):
            continue
        parameter, _, rows = name.removeprefix("rpad.train_grad.").partition(".rows0-")
        gradient = actual[parameter][: int(rows) + 1] if rows else actual[parameter]
        assert gradient.shape == expected.shape
        assert relative(gradient, expected) < GRADIENT_RTOL, name
        compared += 1
    assert compared == 6
    expected_norms = golden.values["rpad.train_grad_norm"]
    assert actual.keys() == expected_norms.keys()
    for name, norm in expected_norms.items():
        assert actual[name].norm().item() == pytest.approx(norm, rel=GRADIENT_RTOL), name
    total = torch.stack([g.norm() for g in actual.values()]).norm().item()
    assert total == pytest.approx(golden.values["rpad.train_grad_norm_total"], rel=GRADIENT_RTOL)


@pytest.mark.parametrize("golden", Z_LOSS_CASES, indirect=True)
def test_z_loss_gradient_norm(golden):
    batch = {name: golden.tensors[f"rpad.{name}"] for name in ("input_ids", "attention_mask", "labels")}
    model = load_model(golden, z_loss_weight=0.01).train()
    loss = model(**batch).loss
    assert loss.item() == pytest.approx(golden.values["rpad.train_loss.z_loss_weight=0.01"], abs=LOSS_ATOL)
    loss.backward()
    total = torch.stack([g.norm() for g in gradients(model).values()]).norm().item()
    expected = golden.values["rpad.train_grad_norm_total.z_loss_weight=0.01"]
    assert total == pytest.approx(expected, rel=GRADIENT_RTOL)


@pytest.mark.parametrize("side", ["rpad", "lpad"])
def test_padding_rows_do_not_spoil_gradients_of_z_loss(golden_dir, side):
    """z_loss 也看填充行的 logits：全被遮住的行在 SDPA 的反向里梯度会大上百倍，而损失看不出来。"""
    for case in ("baichuan2-7b", "baichuan2-13b-oddheads"):
        golden = load_golden(golden_dir(case))
        model = load_model(golden, z_loss_weight=0.01).train()
        batch = {name: golden.tensors[f"{side}.{name}"] for name in ("input_ids", "attention_mask", "labels")}
        model(**batch).loss.backward()
        total = torch.stack([g.norm() for g in gradients(model).values()]).norm().item()
        assert total == pytest.approx(golden.values["rpad.train_grad_norm_total.z_loss_weight=0.01"], rel=0.01)


def test_six_adamw_steps(golden):
    """每步前的损失与之后的评估损失；中途做一次评估前向，不得影响轨迹。"""
    batch = {name: golden.tensors[f"rpad.{name}"] for name in ("input_ids", "attention_mask", "labels")}
    model = load_model(golden)
    optimizer = torch.optim.AdamW(model.parameters(), **golden.values["rpad.adamw_hyper"])
    expected = golden.values["rpad.adamw_6_steps.train_losses_before_each_step"]
    for step, value in enumerate(expected):
        loss = model.train()(**batch).loss
        # AdamW 头几步接近符号下降，会放大梯度的末位误差
        assert loss.item() == pytest.approx(value, abs=LOSS_ATOL if step == 0 else 1e-4), step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 2:
            with torch.no_grad():
                model.eval()(**batch)
    with torch.no_grad():
        loss = model.eval()(**batch).loss.item()
    assert loss == pytest.approx(golden.values["rpad.adamw_6_steps.eval_loss_after"], abs=1e-4)
