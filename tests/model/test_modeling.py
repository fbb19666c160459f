"""模型的测试：与官方代码的黄金值逐项比较，打包与补齐等价，缓存，加载，NormHead，peft。

黄金值的容差：fp32 logits 2e-5，损失 1e-5，梯度相对 1e-4；半精度比较与 fp32 的距离，不逐位比较。
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer
from finetune.data.packing import collate

# transformers 5.23 起把 gradient_checkpointing_enable 改了名，5.17 只有旧名
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

IGNORE_INDEX = -100
CASES = (
    "baichuan-7b",
    "baichuan-13b",
    "baichuan-13b-oddheads",
    "baichuan2-7b",
    "baichuan2-13b",
    "baichuan2-13b-oddheads",
)
# Baichuan-7B 的官方代码不能打包；第一代没有 z_loss
PACKED_CASES = CASES[1:]
Z_LOSS_CASES = CASES[3:]
# 四种结构各一个，都在 tests/goldens 中，没有 ../shared 也能跑
ARCHITECTURES = ("baichuan-7b", "baichuan-13b-oddheads", "baichuan2-7b", "baichuan2-13b-oddheads")
LOGITS_ATOL, LOSS_ATOL, GRADIENT_RTOL, PACKING_RTOL = 2e-5, 1e-5, 1e-4, 1e-5


# ---------------------------------------------------------------- 工具


def load_golden(directory: Path) -> SimpleNamespace:
    checkpoint = directory / "checkpoint-safetensors"
    if not checkpoint.is_dir():
        checkpoint = directory / "checkpoint"
    return SimpleNamespace(
        name=directory.name,
        directory=directory,
        checkpoint=checkpoint,
        tensors=load_file(directory / "golden.safetensors"),
        values=json.loads((directory / "golden.json").read_text(encoding="utf-8"))["values"],
        norm_head=directory.name.startswith("baichuan2"),
        rope="7b" in directory.name,
    )


def load_model(golden, dtype=torch.float32, checkpoint=None, **options) -> BaichuanForCausalLM:
    """微型检查点的键看不出 13B 是哪一代，norm_head 因此总是明写。"""
    options = {"norm_head": golden.norm_head, **options}
    model = AutoModelForCausalLM.from_pretrained(checkpoint or golden.checkpoint, dtype=dtype, **options)
    assert type(model) is BaichuanForCausalLM
    return model


def assert_close(actual, expected, atol, where=None):
    """最大绝对误差不超过 atol；where 为 attention_mask 时只比较其中为真的位置。"""
    assert actual.shape == expected.shape
    difference = (actual.float() - expected.float()).abs()
    if where is not None:
        difference = difference[where.bool()]
    assert not difference.isnan().any()
    assert difference.max().item() <= atol


def relative(actual, expected) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, rtol=PACKING_RTOL):
    """逐张量的相对误差；一个张量的梯度很小时按全部梯度的千分之一计，以免比较舍入噪声。"""
    assert actual.keys() == expected.keys() and expected
    total = sum(g.double().norm() ** 2 for g in expected.values()).sqrt()
    for name, gradient in expected.items():
        scale = max(gradient.double().norm(), 1e-3 * total)
        difference = (actual[name].double() - gradient.double()).norm()
        assert (difference / scale).item() < rtol, name


def document_lengths_of(golden) -> list[int]:
    """打包样例中各文档的长度：13B 写在 attention_mask 的段号里，7B 写在重新起数的 position_ids 里。"""
    if golden.rope:
        starts = (golden.tensors["packed.position_ids"][0] == 0).nonzero().flatten().tolist()
        total = golden.tensors["packed.position_ids"].shape[1]
        return [stop - start for start, stop in zip(starts, [*starts[1:], total], strict=True)]
    return torch.unique_consecutive(golden.tensors["packed.attention_mask"][0], return_counts=True)[1].tolist()


def make_documents(vocab_size, lengths=(9, 1, 14, 2, 6), num_src_tokens=(4, 0, 5, 2, 0), seed=0):
    """若干文档：ids [L] 与 labels [L]，前 num_src_tokens 个标签为 -100；第二、四篇因此没有目标。

    首个标签总是 -100：移位后没有位置预测它，左侧补齐时却会落到补齐的位置上。
    """
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for length, num_src in zip(lengths, num_src_tokens, strict=True):
        ids = torch.randint(3, vocab_size, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(num_src, 1)] = IGNORE_INDEX
        documents.append((ids, labels))
    return documents


def padded_batch(documents, side="right"):
    longest = max(len(ids) for ids, _ in documents)
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in documents:
        padding = longest - len(ids)
        for name, row, value in (
            ("input_ids", ids, 0),
            ("attention_mask", torch.ones_like(ids), 0),
            ("labels", labels, IGNORE_INDEX),
        ):
            fill = row.new_full((padding,), value)
            rows[name].append(torch.cat([row, fill] if side == "right" else [fill, row]))
    return {name: torch.stack(values) for name, values in rows.items()}


def packed_batch(documents):
    return {
        "input_ids": torch.cat([ids for ids, _ in documents])[None],
        "labels": torch.cat([labels for _, labels in documents])[None],
        "document_lengths": [len(ids) for ids, _ in documents],
    }


def target_rows_of(batch):
    return (batch["labels"][0, 1:] != IGNORE_INDEX).nonzero().flatten()


@pytest.fixture(params=CASES)
def golden(request, golden_dir):
    return load_golden(golden_dir(request.param))


@pytest.fixture(params=ARCHITECTURES)
def architecture(request, golden_dir):
    return load_golden(golden_dir(request.param))


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


# ---------------------------------------------------------------- 黄金值：生成


def greedy(model, ids, attention_mask=None, **options):
    """transformers 5.x 会用检查点的 generation_config 补齐没写的参数，所以重复惩罚与采样都明写。"""
    options = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 16, **options}
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    return model.generate(ids, attention_mask=mask, **options)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "nocache"])
def test_greedy(golden, use_cache):
    model = load_model(golden).eval()
    name = "gen.greedy_cache" if use_cache else "gen.greedy_nocache"
    assert greedy(model, golden.tensors["gen.input_ids"], use_cache=use_cache).equal(golden.tensors[name])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "nocache"])
def test_greedy_with_repetition_penalty(golden, use_cache):
    ids = golden.tensors["gen.input_ids"]
    output = greedy(load_model(golden).eval(), ids, repetition_penalty=1.1, use_cache=use_cache)
    assert output.equal(golden.tensors["gen.greedy_cache_reppen1.1"])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "nocache"])
def test_greedy_left_padded_batch(golden, use_cache):
    ids, mask = golden.tensors["genbatch.input_ids"], golden.tensors["genbatch.attention_mask"]
    name = "genbatch.greedy_cache" if use_cache else "genbatch.greedy_nocache"
    assert greedy(load_model(golden).eval(), ids, mask, use_cache=use_cache).equal(golden.tensors[name])


@pytest.mark.parametrize("penalty", [1.05, 1.1])
def test_sampler_probabilities(golden, penalty):
    """重复惩罚 → 温度 → top_k → top_p，经真正的 generate 取第一步的分数。"""
    ids = golden.tensors["full.input_ids"]
    output = (
        load_model(golden)
        .eval()
        .generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=0.3,
            top_k=5,
            top_p=0.85,
            repetition_penalty=penalty,
            max_new_tokens=1,
            output_scores=True,
            return_dict_in_generate=True,
        )
    )
    probabilities = output.scores[0].float().softmax(-1)
    assert_close(probabilities, golden.tensors[f"sampler.probs_rp{penalty}_t0.3_k5_p0.85"], 1e-4)


def test_generation_config_of_the_checkpoint_is_read(golden):
    expected = json.loads((golden.checkpoint / "generation_config.json").read_text(encoding="utf-8"))
    config = load_model(golden).generation_config
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "do_sample", "pad_token_id", "eos_token_id")
    for name in names:
        if name in expected:
            assert getattr(config, name) == expected[name]


# ---------------------------------------------------------------- 缓存


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(5, 7, 1, 1, 6), (1, 19), (19, 1)], ids=str)
def test_several_new_tokens_on_top_of_a_cache(architecture, chunks):
    ids = architecture.tensors["full.input_ids"]
    model = load_model(architecture).eval()
    cache, pieces = DynamicCache(), []
    for chunk in ids.split(chunks, dim=1):
        output = model(input_ids=chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert cache.get_seq_length() == ids.shape[1]
    assert_close(torch.cat(pieces, dim=1), architecture.tensors["full.eval_logits"], LOGITS_ATOL)


@torch.no_grad()
def test_several_new_tokens_on_top_of_a_left_padded_cache(architecture):
    ids, mask = architecture.tensors["lpad.input_ids"], architecture.tensors["lpad.attention_mask"]
    model = load_model(architecture).eval()
    cache, pieces, stop = None, [], 0
    for chunk in ids.split((7, 6, 1, 2), dim=1):
        stop += chunk.shape[1]
        output = model(input_ids=chunk, attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert_close(torch.cat(pieces, dim=1), architecture.tensors["lpad.eval_logits"], LOGITS_ATOL, where=mask)


@torch.no_grad()
def test_cache_across_the_trained_length(architecture):
    ids = architecture.tensors["long.input_ids"]
    model = load_model(architecture).eval()
    trained = model.config.trained_length
    output = model(input_ids=ids[:, : trained - 3], use_cache=True)
    for position in range(trained - 3, ids.shape[1]):
        output = model(input_ids=ids[:, position : position + 1], past_key_values=output.past_key_values)
    assert_close(output.logits[:, -1], architecture.tensors["long.eval_last_logits"][:, -1], LOGITS_ATOL)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "lookup"])
def test_other_decodings_agree_with_no_cache(architecture, options):
    """束搜索要重排缓存，提示查找要一次验证几个 token 并裁剪缓存。"""
    ids = architecture.tensors["gen.input_ids"]
    ids = torch.cat([ids, ids], dim=1)
    model = load_model(architecture).eval()
    reference = {} if "prompt_lookup_num_tokens" in options else options
    expected = greedy(model, ids, use_cache=False, **reference)
    assert greedy(model, ids, use_cache=True, **options).equal(expected)


@torch.no_grad()
def test_use_cache_flag(architecture):
    ids = architecture.tensors["gen.input_ids"]
    model = load_model(architecture).eval()
    assert model(input_ids=ids, use_cache=False).past_key_values is None
    assert model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == ids.shape[1]
    # 读过的缓存在 use_cache=False 时也不再交出（peft 的前缀调优靠它实现无缓存生成）
    cache = model(input_ids=ids, use_cache=True).past_key_values
    assert model(input_ids=ids[:, :1], past_key_values=cache, use_cache=False).past_key_values is None


@torch.no_grad()
def test_cache_under_its_new_name(architecture):
    """transformers 5.24 的 generate 以 cache= 传缓存：若被 **kwargs 吞掉，生成不报错而结果全错。"""
    ids = architecture.tensors["full.input_ids"]
    model = load_model(architecture).eval()
    cache = DynamicCache()
    model(input_ids=ids[:, :8], cache=cache, use_cache=True)
    assert cache.get_seq_length() == 8
    logits = model(input_ids=ids[:, 8:], cache=cache, use_cache=True).logits
    assert cache.get_seq_length() == ids.shape[1]
    assert_close(logits, architecture.tensors["full.eval_logits"][:, 8:], LOGITS_ATOL)


@torch.no_grad()
def test_inputs_embeds_equal_input_ids(architecture):
    ids, mask = architecture.tensors["lpad.input_ids"], architecture.tensors["lpad.attention_mask"]
    model = load_model(architecture).eval()
    embeds = model.get_input_embeddings()(ids)
    actual = model(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(actual, model(input_ids=ids, attention_mask=mask).logits)


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 3, 19])], ids=["1", "4", "rows"])
def test_logits_to_keep(architecture, keep):
    ids = architecture.tensors["full.input_ids"]
    logits = load_model(architecture).eval()(input_ids=ids, logits_to_keep=keep).logits
    expected = architecture.tensors["full.eval_logits"]
    assert_close(logits, expected[:, keep] if torch.is_tensor(keep) else expected[:, -keep:], LOGITS_ATOL)


@torch.no_grad()
def test_return_dict_false_gives_a_tuple(architecture):
    ids = architecture.tensors["full.input_ids"]
    output = load_model(architecture).eval()(input_ids=ids, use_cache=False, return_dict=False)
    assert isinstance(output, tuple)
    assert_close(output[0], architecture.tensors["full.eval_logits"], LOGITS_ATOL)


@torch.no_grad()
def test_hidden_states_only_when_asked(architecture):
    ids = architecture.tensors["full.input_ids"]
    model = load_model(architecture).eval()
    assert model(input_ids=ids).hidden_states is None
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    # 末尾一个就是词表投影的输入
    assert_close(model.lm_head(states[-1]), architecture.tensors["full.eval_logits"], LOGITS_ATOL)


@torch.no_grad()
def test_attentions_only_when_asked(architecture):
    """官方的 13B 与 Baichuan2-7B 在 output_attentions 时出错；这里给出各层的概率 [b, heads, q, kv]，logits 不变。"""
    ids, mask = architecture.tensors["lpad.input_ids"], architecture.tensors["lpad.attention_mask"]
    model = load_model(architecture).eval()
    assert model(input_ids=ids, attention_mask=mask).attentions is None
    output = model(input_ids=ids, attention_mask=mask, output_attentions=True)
    assert_close(output.logits, architecture.tensors["lpad.eval_logits"], LOGITS_ATOL, where=mask)
    config, length = model.config, ids.shape[1]
    assert len(output.attentions) == config.num_hidden_layers
    for attentions in output.attentions:
        assert attentions.shape == (len(ids), config.num_attention_heads, length, length)
        rows = attentions.transpose(1, 2)[mask.bool()]  # [有效位置, heads, kv]
        assert rows.sum(-1).sub(1).abs().max() < 1e-5
        hidden_keys = (mask == 0)[:, None].expand(-1, length, -1)[mask.bool()]
        assert rows.transpose(0, 1)[:, hidden_keys].abs().max() < 1e-30
        assert attentions[0].triu(1).abs().max() < 1e-30


@torch.no_grad()
def test_base_model_returns_the_last_hidden_state(architecture):
    ids = architecture.tensors["full.input_ids"]
    model = load_model(architecture).eval()
    states = model.model(input_ids=ids).last_hidden_state
    assert_close(states[0], architecture.tensors["full.hidden_states_row0"][-1], LOGITS_ATOL)


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


# ---------------------------------------------------------------- 保存与加载


def raw_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors":
            tensors.update(load_file(path))
        elif path.suffix == ".bin":
            tensors.update(torch.load(path, weights_only=True, map_location="cpu"))
    return tensors


def write_checkpoint(source: Path, target: Path, tensors: dict, form: str = "safetensors") -> Path:
    target.mkdir(parents=True)
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(source / name, target / name)
    if form == "bin":
        torch.save(tensors, target / "pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


@torch.no_grad()
@pytest.mark.parametrize("form", ["checkpoint", "checkpoint-safetensors"])
def test_both_published_forms_load_alike(golden_dir, form):
    for case in CASES:
        golden = load_golden(golden_dir(case, shared_only=True))
        model = load_model(golden, checkpoint=golden.directory / form).eval()
        logits = model(input_ids=golden.tensors["full.input_ids"]).logits
        assert_close(logits, golden.tensors["full.eval_logits"], LOGITS_ATOL)


@torch.no_grad()
def test_save_pretrained_writes_official_names_and_loads_equal(architecture, tmp_path):
    model = load_model(architecture).eval()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    official = {k: v for k, v in raw_tensors(architecture.checkpoint).items() if not k.endswith("rotary_emb.inv_freq")}
    assert saved.keys() - {k for k in saved if k.endswith("rotary_emb.inv_freq")} == official.keys()
    for name, tensor in official.items():
        assert torch.equal(saved[name], tensor), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = architecture.tensors["full.input_ids"]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@torch.no_grad()
def test_sharded_save_loads_equal(architecture, tmp_path):
    model = load_model(architecture).eval()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = architecture.tensors["full.input_ids"]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("present", [True, False], ids=["present", "absent"])
def test_stored_inv_freq_present_or_absent(golden_dir, tmp_path, form, present):
    golden = load_golden(golden_dir("baichuan-7b"))
    tensors = raw_tensors(golden.checkpoint)
    assert sum(name.endswith("rotary_emb.inv_freq") for name in tensors) == 3
    if not present:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}
    checkpoint = write_checkpoint(golden.checkpoint, tmp_path / "checkpoint", tensors, form)
    logits = load_model(golden, checkpoint=checkpoint).eval()(input_ids=golden.tensors["full.input_ids"]).logits
    assert_close(logits, golden.tensors["full.eval_logits"], LOGITS_ATOL)


@torch.no_grad()
@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_position_tables_survive_the_meta_device(architecture, way):
    config = AutoConfig.from_pretrained(architecture.checkpoint, norm_head=architecture.norm_head)
    tensors = {k: v for k, v in raw_tensors(architecture.checkpoint).items() if not k.endswith("rotary_emb.inv_freq")}
    with torch.device("meta"):
        model = BaichuanForCausalLM(config)
    if way == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(tensors, strict=False, assign=way == "assign")
    assert not any(parameter.is_meta for parameter in model.parameters())
    model.eval()
    full = model(input_ids=architecture.tensors["full.input_ids"]).logits
    assert_close(full, architecture.tensors["full.eval_logits"], LOGITS_ATOL)
    long = model(input_ids=architecture.tensors["long.input_ids"]).logits[:, -2:]
    assert_close(long, architecture.tensors["long.eval_last_logits"], LOGITS_ATOL)


def test_a_missing_tensor_is_an_error(architecture, tmp_path):
    tensors = raw_tensors(architecture.checkpoint)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    checkpoint = write_checkpoint(architecture.checkpoint, tmp_path / "checkpoint", tensors)
    with pytest.raises((ValueError, RuntimeError), match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(architecture, checkpoint=checkpoint)


def test_an_unknown_tensor_is_an_error(architecture, tmp_path):
    tensors = raw_tensors(architecture.checkpoint)
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(4, 4)
    checkpoint = write_checkpoint(architecture.checkpoint, tmp_path / "checkpoint", tensors)
    with pytest.raises((ValueError, RuntimeError), match=r"model\.layers\.1\.self_attn\.q_proj\.weight"):
        load_model(architecture, checkpoint=checkpoint)


def test_a_wrong_shape_is_an_error(architecture, tmp_path):
    tensors = raw_tensors(architecture.checkpoint)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    checkpoint = write_checkpoint(architecture.checkpoint, tmp_path / "checkpoint", tensors)
    with pytest.raises((ValueError, RuntimeError), match=r"lm_head\.weight|size mismatch|mismatch"):
        load_model(architecture, checkpoint=checkpoint)


def test_a_missing_shard_is_an_error(golden_dir, tmp_path):
    golden = load_golden(golden_dir("baichuan-13b-oddheads"))
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(golden.checkpoint, checkpoint)
    shard = sorted(path for path in checkpoint.iterdir() if path.suffix in (".bin", ".safetensors"))[-1]
    shard.unlink()
    with pytest.raises((OSError, ValueError), match=shard.name):
        load_model(golden, checkpoint=checkpoint)


def test_bin_files_are_read_without_unpickling_objects(golden_dir, tmp_path):
    """pytorch_model.bin 里的任意对象（此处会写出一个标记文件）不得被还原。"""
    golden = load_golden(golden_dir("baichuan-7b"))
    marker = tmp_path / "executed"

    class Planted:
        def __reduce__(self):
            return (Path.touch, (marker,))

    tensors = {**raw_tensors(golden.checkpoint), "planted": Planted()}
    checkpoint = write_checkpoint(golden.checkpoint, tmp_path / "checkpoint", tensors, "bin")
    with pytest.raises(Exception, match=r"weights_only|Unsupported|Weights only|pickle"):
        load_model(golden, checkpoint=checkpoint)
    assert not marker.exists()


def plant_code(checkpoint: Path, marker: Path) -> None:
    code = (
        f"open({str(marker)!r}, 'w').close()\n"
        "class BaichuanConfig: pass\nclass BaichuanForCausalLM: pass\nclass BaichuanTokenizer: pass\n"
    )
    for kind in ("configuration", "modeling", "tokenization"):
        (checkpoint / f"{kind}_baichuan.py").write_text(code, encoding="utf-8")
    auto_map = {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        "AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None],
    }
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        (checkpoint / name).write_text(json.dumps({**content, "auto_map": auto_map}), encoding="utf-8")


@pytest.mark.parametrize("arch", ["baichuan-7b", "baichuan-13b", "baichuan2-7b", "baichuan2-13b"])
def test_code_in_a_checkpoint_is_never_executed(tiny_checkpoint, tmp_path, arch):
    checkpoint, marker = tmp_path / "checkpoint", tmp_path / "executed"
    shutil.copytree(tiny_checkpoint(arch), checkpoint)
    plant_code(checkpoint, marker)
    assert type(AutoConfig.from_pretrained(checkpoint)) is BaichuanConfig
    assert type(AutoModelForCausalLM.from_pretrained(checkpoint)) is BaichuanForCausalLM
    assert type(AutoTokenizer.from_pretrained(checkpoint)) is BaichuanTokenizer
    assert not marker.exists()


def test_code_in_a_checkpoint_is_mentioned_once(tiny_checkpoint, tmp_path):
    """目录里有代码时说一次：在新进程里看标准错误，两次加载只有一行。"""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("baichuan2-7b"), checkpoint)
    plant_code(checkpoint, tmp_path / "executed")
    program = (
        "import sys\n"
        "from baichuan import BaichuanForCausalLM, BaichuanTokenizer\n"
        "for _ in range(2):\n"
        "    BaichuanTokenizer.from_pretrained(sys.argv[1]); BaichuanForCausalLM.from_pretrained(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(checkpoint)], capture_output=True, text=True, check=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "modeling_baichuan.py" in line]
    assert len(lines) == 1
    assert "不会执行" in lines[0]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("norm_head", [False, True])
@pytest.mark.parametrize("position_embedding", ["rope", "alibi"])
def test_weights_from_scratch(position_embedding, norm_head):
    """13B 的官方代码不初始化 RMSNorm（值可达 1e28）；这里从头建的模型必须可训练。"""
    torch.manual_seed(0)
    config = BaichuanConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        model_max_length=64,
        position_embedding=position_embedding,
        norm_head=norm_head,
    )
    model = BaichuanForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert parameter.eq(1).all(), name
        elif name == "lm_head.weight" and norm_head:
            bound = 64**-0.5  # kaiming_uniform(a=sqrt(5))
            assert parameter.abs().max().item() <= bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
    assert model.model.embed_tokens.weight[0].eq(0).all()
    assert model(input_ids=torch.tensor([[1, 5, 9]]), labels=torch.tensor([[1, 5, 9]])).loss.isfinite()


# ---------------------------------------------------------------- peft


def lora_model(architecture, dropout=0.0, **options):
    options = {"target_modules": ["W_pack"], **options}
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=16, lora_dropout=dropout, task_type="CAUSAL_LM", **options)
    model = get_peft_model(load_model(architecture), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # 缺省为零，增量就看不见了
                parameter.normal_(std=0.05)
    return model


def prefix_model(architecture, num_virtual_tokens=5, **options):
    torch.manual_seed(0)
    config = PrefixTuningConfig(num_virtual_tokens=num_virtual_tokens, task_type="CAUSAL_LM", **options)
    return get_peft_model(load_model(architecture), config)


def real_prefix_model(architecture, prefix_ids):
    """前缀调优模型，其前缀恰是 prefix_ids 的键与值：于是等于把这些 token 接在每个文档之前。"""
    model = prefix_model(architecture, num_virtual_tokens=len(prefix_ids))
    with torch.no_grad():
        cache = model.get_base_model().eval()(input_ids=prefix_ids[None], use_cache=True).past_key_values
        # peft 的一行是 [层, 键或值, 头, 头宽]
        rows = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
        rows = rows.permute(3, 0, 1, 2, 4).reshape(len(prefix_ids), -1)
        embedding = model.prompt_encoder["default"].embedding.weight
        assert embedding.shape == rows.shape
        embedding.copy_(rows)
    return model


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_prefix_of_real_tokens_equals_those_tokens(architecture, training, checkpointing):
    prefix_ids = architecture.tensors["gen.input_ids"][0]
    base = load_model(architecture).eval()
    documents = make_documents(base.config.vocab_size)
    model = real_prefix_model(architecture, prefix_ids)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable()
    model.train(training)
    batch = padded_batch(documents)
    packed = packed_batch(documents)
    with torch.no_grad():
        alone = [
            base(input_ids=torch.cat([prefix_ids, ids])[None]).logits[0, len(prefix_ids) :] for ids, _ in documents
        ]
        padded_logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        packed_logits = model(input_ids=packed["input_ids"], document_lengths=packed["document_lengths"]).logits
    for row, expected in zip(padded_logits, alone, strict=True):
        assert_close(row[: len(expected)], expected, LOGITS_ATOL)
    assert_close(packed_logits[0], torch.cat(alone), LOGITS_ATOL)


@pytest.mark.parametrize("projection", [False, True], ids=["embedding", "mlp"])
def test_prefix_gradients_padded_packed_and_checkpointed(architecture, projection):
    results = {}
    options = {"prefix_projection": projection, **({"encoder_hidden_size": 16} if projection else {})}
    for form in ("padded", "left", "packed", "packed_with_mask", "packed_with_positions"):
        for checkpointing in (False, True):
            model = prefix_model(architecture, **options)
            if checkpointing:
                model.get_base_model().gradient_checkpointing_enable()
            documents = make_documents(model.config.vocab_size)
            if form.startswith("packed"):
                batch = packed_batch(documents)
                if form == "packed_with_mask":
                    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
                if form == "packed_with_positions":
                    batch["position_ids"] = torch.cat([torch.arange(n) for n in batch["document_lengths"]])[None]
            else:
                batch = padded_batch(documents, "left" if form == "left" else "right")
            loss = model.train()(**batch).loss
            loss.backward()
            results[form, checkpointing] = loss.item(), gradients(model)
    reference_loss, reference = results["padded", False]
    assert all("prompt_encoder" in name for name in reference)
    for loss, actual in results.values():
        assert loss == pytest.approx(reference_loss, abs=2e-6)
        assert_same_gradients(actual, reference)


def test_prefix_saves_loads_and_generates(architecture, tmp_path):
    model = prefix_model(architecture)
    model.get_base_model().gradient_checkpointing_enable()
    ids, mask = architecture.tensors["genbatch.input_ids"], architecture.tensors["genbatch.attention_mask"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        batch = padded_batch(make_documents(model.config.vocab_size))
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_model(architecture), tmp_path).eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, attention_mask=mask).logits
        plain = again.get_base_model()(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, expected)
    assert (plain - expected)[mask.bool()].abs().max() > 1e-2  # 前缀确实起作用
    rows = greedy(again, ids, mask)
    assert greedy(again, ids, mask, use_cache=False).equal(rows)
    for row, row_ids, row_mask in zip(rows, ids, mask, strict=True):
        alone = greedy(again, row_ids[row_mask.bool()][None])
        assert alone[0, row_mask.sum() :].equal(row[ids.shape[1] :])


def test_prompt_tuning_padded_left_and_checkpointed(architecture, tmp_path):
    """嵌入层的软提示（P-Tuning v1 的同类）：补齐方式与激活重算都不改变损失和梯度。"""
    results = {}
    for side in ("right", "left"):
        for checkpointing in (False, True):
            torch.manual_seed(0)
            config = PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
            model = get_peft_model(load_model(architecture), config)
            if checkpointing:
                model.get_base_model().gradient_checkpointing_enable()
            loss = model.train()(**padded_batch(make_documents(400), side)).loss
            loss.backward()
            results[side, checkpointing] = loss.item(), gradients(model)
    reference_loss, reference = results["right", False]
    for (side, _), (loss, actual) in results.items():
        if side == "right":
            assert loss == pytest.approx(reference_loss, abs=2e-6)
            assert_same_gradients(actual, reference)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_model(architecture), tmp_path).eval()
    ids = architecture.tensors["full.input_ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_lora_on_w_pack(architecture, tmp_path, checkpointing):
    results = []
    for build in (packed_batch, padded_batch):
        model = lora_model(architecture)
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model.train()(**build(make_documents(model.config.vocab_size))).loss
        loss.backward()
        actual = gradients(model)
        layers = model.config.num_hidden_layers
        assert len(actual) == 2 * layers
        assert all("W_pack.lora_" in name and gradient.abs().max() > 0 for name, gradient in actual.items())
        results.append((loss.item(), actual))
    assert results[0][0] == pytest.approx(results[1][0], abs=2e-6)
    assert_same_gradients(results[0][1], results[1][1])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_model(architecture), tmp_path).eval()
    ids, mask = architecture.tensors["genbatch.input_ids"], architecture.tensors["genbatch.attention_mask"]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, expected)
        plain = load_model(architecture).eval()(input_ids=ids, attention_mask=mask).logits
        assert (plain - expected)[mask.bool()].abs().max() > 1e-2
        merged = again.merge_and_unload()
        assert type(merged) is BaichuanForCausalLM
        assert_close(merged(input_ids=ids, attention_mask=mask).logits, expected, LOGITS_ATOL, where=mask)


def test_lora_gradients_do_not_depend_on_checkpointing(architecture):
    results = []
    for checkpointing in (False, True):
        model = lora_model(architecture, dropout=0.1)
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model.train()(**packed_batch(make_documents(model.config.vocab_size))).loss.backward()
        results.append(gradients(model))
    assert_same_gradients(results[1], results[0])


def test_all_linear_lora_skips_the_head(architecture):
    model = lora_model(architecture, target_modules="all-linear")
    names = {
        name.rsplit(".lora_A", 1)[0].split("base_model.model.")[1]
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }
    parts = ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert names == {f"model.layers.{n}.{part}" for n in range(model.config.num_hidden_layers) for part in parts}
