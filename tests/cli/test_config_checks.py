"""config_check：每一种写错的配置都有原话；官方与项目自己的配置没有问题。"""

import copy
import json

import pytest
from paths import ROOT

from finetune.checkpoint.config_check import model_config_problems, tokenizer_model_problems
from finetune.data.prompting import generation_config_problems
from finetune.training.ds_config_check import ds_config_problems

DS = json.loads((ROOT / "ds_zero3_offload.json").read_text(encoding="utf-8"))
MODEL = {
    "vocab_size": 125696,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "model_max_length": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def changed(content: dict, place: str, value) -> dict:
    """改掉一处的副本；value 为 ... 时删去这个键。"""
    content = copy.deepcopy(content)
    *parents, name = place.split(".")
    node = content
    for parent in parents:
        node = node[parent]
    node[name] = value
    if value is ...:
        del node[name]
    return content


@pytest.mark.parametrize("name", ["ds_zero2_no_offload.json", "ds_zero3_offload.json"])
def test_our_own_ds_configs_are_clean(name):
    assert ds_config_problems(json.loads((ROOT / name).read_text(encoding="utf-8"))) == []
    assert ds_config_problems({}) == []


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (
            "zero_optimisation",
            {},
            "zero_optimisation 不是认识的键，DeepSpeed 会悄悄忽略它；像是 zero_optimization 写错了",
        ),
        ("my_key", 1, "my_key 不是认识的键，DeepSpeed 会悄悄忽略它；可用的有 "),
        ("optimizer.parms", {}, "optimizer.parms 不是认识的键，DeepSpeed 会悄悄忽略它；像是 params 写错了"),
        ("optimizer.params.betaz", [0.9, 0.9], "optimizer.params.betaz 不是认识的键"),
        ("optimizer.params.betas", [0.9], "optimizer.params.betas 应为 [0, 1) 内的两个数，实际是 [0.9]"),
        ("optimizer.params.eps", {"a": 1}, "optimizer.params.eps 应为不小于 0 的数或 \"auto\"，实际是 {'a': 1}"),
        ("optimizer.params.lr", -1, 'optimizer.params.lr 应为不小于 0 的数或 "auto"，实际是 -1'),
        ("optimizer.type", 3, "optimizer.type 应为字符串，实际是 3"),
        ("optimizer", [], "optimizer 应为对象 {…}，实际是 []"),
        ("scheduler", "WarmupLR", "scheduler 应为对象 {…}，实际是 'WarmupLR'"),
        (
            "scheduler.type",
            "CosineLR",
            "scheduler.type='CosineLR' 不支持，可选：WarmupLR | WarmupDecayLR | Warmup",
        ),
        ("scheduler.type", ..., "scheduler.type=None 不支持"),
        ("scheduler.params.total_num_steps", ..., "scheduler.params 缺少 total_num_steps"),
        ("scheduler.params.warmup_max_lr", "auto", "scheduler.params.warmup_max_lr 不是认识的键"),
        ("scheduler.params.warmup_type", "cosine", "scheduler.params.warmup_type='cosine' 不是 DeepSpeed 认得的值"),
        ("gradient_clipping", [[]], 'gradient_clipping 应为不小于 0 的数或 "auto"，实际是 [[]]'),
        ("gradient_clipping", True, 'gradient_clipping 应为不小于 0 的数或 "auto"，实际是 True'),
        ("bf16.enableq", "auto", "bf16.enableq 不是认识的键，DeepSpeed 会悄悄忽略它；像是 enabled 写错了"),
        ("fp16.initial_scale_power", True, "fp16.initial_scale_power 应为不小于 0 的数"),
        ("zero_optimization.overlap_comm", 1, 'zero_optimization.overlap_comm 应为 true、false 或 "auto"，实际是 1'),
        ("zero_optimization.offload_param", None, "zero_optimization.offload_param 应为对象 {…}，实际是 None"),
    ],
)
def test_ds_config_problems(place, value, problem):
    (found,) = ds_config_problems(changed(DS, place, value))
    assert found.startswith(problem)


def test_all_problems_at_once():
    config = changed(changed(DS, "optimizer.params.lr", []), "gradient_cliping", 1.0)
    assert [problem.split()[0] for problem in ds_config_problems(config)] == ["gradient_cliping", "optimizer.params.lr"]


def test_good_model_configs(tiny_checkpoint):
    assert model_config_problems(MODEL) == []
    assert model_config_problems({**MODEL, "eos_token_id": [2, 3], "pad_token_id": None, "norm_head": None}) == []
    for arch in ("baichuan-7b", "baichuan-13b", "baichuan2-7b", "baichuan2-13b"):
        path = tiny_checkpoint(arch, layers=1, hidden_size=16, heads=2)
        assert model_config_problems(json.loads((path / "config.json").read_text(encoding="utf-8"))) == []
        assert tokenizer_model_problems((path / "tokenizer.model").read_bytes()) == []


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        ("num_attention_heads", ..., "缺少 num_attention_heads"),
        ("rms_norm_eps", ..., "缺少 rms_norm_eps"),
        ("vocab_size", "125696", "vocab_size 应为1 到 10^9 的整数，实际是 '125696'"),
        ("hidden_size", True, "hidden_size 应为1 到 10^9 的整数，实际是 True"),
        ("num_hidden_layers", 10**30, "num_hidden_layers 应为1 到 10^9 的整数"),
        ("model_max_length", 0, "model_max_length 应为正整数，实际是 0"),
        ("eos_token_id", None, "eos_token_id 应为不小于 0 的整数，实际是 None"),
        ("pad_token_id", [0], "pad_token_id 应为整数，实际是 [0]"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps 应为不小于 0 的数，实际是 nan"),
        ("tie_word_embeddings", 1, "tie_word_embeddings 应为true 或 false，实际是 1"),
    ],
)
def test_model_config_problems(place, value, problem):
    (found,) = model_config_problems(changed(MODEL, place, value))
    assert found.startswith(problem)


def test_a_misspelt_structure_key_is_found():
    renamed = {("model_max_lenqth" if name == "model_max_length" else name): value for name, value in MODEL.items()}
    assert model_config_problems(renamed) == ["model_max_lenqth 不是认识的键，像是 model_max_length 写错了"]
    assert model_config_problems({**MODEL, "max_window_layers": 3, "_from_model_config": True}) == []
    assert model_config_problems([]) == ["应为 JSON 对象 {…}，实际是 []"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({}, []),
        ({"user_token_id": 195, "assistant_token_id": 196}, []),
        ({"user_token_id": 195}, ["user_token_id 与 assistant_token_id 只有一个"]),
        (
            {"user_token_id": 195, "assistant_token_id": True},
            ["assistant_token_id 应为 [0, 2000) 内的整数，实际是 True"],
        ),
        (
            {"user_token_id": 2000, "assistant_token_id": 0},
            ["user_token_id 应为 [0, 2000) 内的整数，实际是 2000"],
        ),
        ("text", ["应为 JSON 对象 {…}，实际是 'text'"]),
    ],
)
def test_generation_config_problems(content, problem):
    assert generation_config_problems(content, 2000) == problem


def test_tokenizer_model_problems(tiny_checkpoint):
    path = tiny_checkpoint("baichuan2-7b", layers=1, hidden_size=16, heads=2)
    content = (path / "tokenizer.model").read_bytes()
    at = 0
    while content[at] == 0x0A:  # 片段：标签一字节，长度一字节
        at += 2 + content[at + 1]
    pieces = content[:at]
    assert tokenizer_model_problems(pieces) == ["训练设置应有一份，实际有 0 份", "规范化规则应有一份，实际有 0 份"]
    assert tokenizer_model_problems(content[:-1]) == ["不是完整的 sentencepiece 模型（最后一个字段越过了文件末尾）"]
    assert tokenizer_model_problems(content + b"\x3a\x01x") == ["有不认识的字段 7"]
    assert tokenizer_model_problems(content + b"\x18\x01")[0].startswith("不是完整的 sentencepiece 模型（第 ")


def test_the_real_tokenizers_are_clean(shared_dir):
    for path in (shared_dir / "tokenizer").glob("*/tokenizer.model"):
        assert tokenizer_model_problems(path.read_bytes()) == []
