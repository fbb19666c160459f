"""配置文件的检查：每一种写错的地方都说出位置与值；官方、项目自己与别的项目的配置没有问题，或一次列全。"""

import copy
import json

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from paths import ROOT

from finetune.checkpoint.config_check import model_config_problems, tokenizer_model_problems
from finetune.data.prompting import generation_config_problems
from finetune.training.ds_config import GRADIENT_CLIPPING, OPTIMIZER, SCHEDULER, read_ds_config, resolve_ds_config
from finetune.training.ds_config_check import ds_config_problems
from utils import write_json

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
    config = json.loads((ROOT / name).read_text(encoding="utf-8"))
    assert ds_config_problems(config) == []
    assert (config["optimizer"], config["scheduler"]) == (OPTIMIZER, SCHEDULER)
    assert config["gradient_clipping"] == GRADIENT_CLIPPING


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("zero_optimisation", {}, "zero_optimization"),
        ("my_key", 1, "my_key"),
        ("bfloat16", {"enabled": True}, "bf16"),
        ("tensor_parallel", {"autotp_size": 2}, "数据并行"),
        ("torch_autocast", {"enabled": True, "dtype": "float16"}, "torch_autocast"),
        *((name, {}, "已经删去") for name in ("elasticity", "compression_training", "nebula", "curriculum_learning")),
        ("sparse_gradients", False, "已经删去"),
        ("managed_gradient_accumulation", False, "应为 true"),
        ("prescale_gradients", True, "应为 false"),
        ("gradient_predivide_factor", 4.0, "应为 1，实际是 4.0"),
        ("gradient_allreduce_op", "sum", "应为 mean，实际是 'sum'"),
        ("communication_data_type", "float32", "fp16 | bf16 | fp32，实际是 'float32'"),
        ("gradient_clipping", [[]], "实际是 [[]]"),
        ("gradient_clipping", True, "实际是 True"),
        ("train_batch_size", 1.5, "整数"),
        ("log_level", "auto", "请写具体的值"),
        ("optimizer.parms", {}, "params"),
        ("optimizer.params.betaz", [0.9, 0.9], "betas"),
        ("optimizer.params.betas", [0.9], "实际是 [0.9]"),
        ("optimizer.params.eps", {"a": 1}, "实际是 {'a': 1}"),
        ("optimizer.params.lr", -1, "实际是 -1"),
        ("optimizer.params.fused", True, "可用的有"),
        ("optimizer.params.amsgrad", False, "可用的有"),
        ("optimizer.params.adamw_mode", True, "adam_w_mode"),
        ("optimizer", [], "实际是 []"),
        ("optimizer.type", ..., "AdamW"),
        ("optimizer.type", "SGD", "zero_allow_untested_optimizer"),
        ("optimizer.type", "NoSuch", "'NoSuch'"),
        ("scheduler", "WarmupLR", "实际是 'WarmupLR'"),
        ("scheduler.type", "CosineLR", "WarmupLR | WarmupDecayLR | WarmupCosineLR"),
        ("scheduler.type", ..., "WarmupCosineLR"),
        ("scheduler.params.total_num_steps", ..., "total_num_steps"),
        ("scheduler.params.warmup_max_lr", "auto", "warmup_min_ratio"),
        ("scheduler.params.warmup_type", "cosine", "WarmupCosineLR"),
        ("scheduler.params.warmup_num_steps", 0, "--warmup_ratio"),
        ("scheduler.params.warmup_num_steps", 2.0, "--warmup_ratio"),
        ("bf16.enableq", "auto", "enabled"),
        ("bf16.bf16_optimizer_states", True, "bf16_master_weights_and_grads"),
        ("fp16.enabled", "yes", "实际是 'yes'"),
        ("fp16.initial_scale_power", True, "实际是 True"),
        ("zero_optimization", 3, "实际是 3"),
        ("zero_optimization.stage", ..., "没有写"),
        ("zero_optimization.stage", 0, "1 | 2 | 3，实际是 0"),
        ("zero_optimization.stage", 4, "实际是 4"),
        ("zero_optimization.stage", "2", "实际是 '2'"),
        ("zero_optimization.overlapcomm", True, "overlap_comm"),
        ("zero_optimization.overlap_comm", 1, "实际是 1"),
        ("zero_optimization.mics_shard_size", 2, "mics_shard_size"),
        ("zero_optimization.reduce_bucket_size", 0, "实际是 0"),
        ("zero_optimization.cpu_offload", True, "cpu_offload"),
        ("zero_optimization.offload_param", None, "实际是 None"),
        ("zero_optimization.offload_param.device", "gpu", "none | cpu | nvme，实际是 'gpu'"),
        ("zero_optimization.offload_optimizer.ratio", 2, "实际是 2"),
    ],
)
def test_ds_config_problems(place, value, said):
    """一处错误只说一条，以它的位置开头（缺的键以所在的节开头）。"""
    (found,) = ds_config_problems(changed(DS, place, value))
    assert found.split()[0].split("=")[0] in (place, place.rpartition(".")[0])
    assert said in found


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("zero_optimization.sub_group_size", 1e9),
        ("zero_optimization.reduce_bucket_size", "auto"),
        ("optimizer.params.betas", "auto"),
        ("gradient_clipping", "auto"),
        ("optimizer", ...),
        ("scheduler", ...),
        ("gradient_allreduce_op", "mean"),
    ],
)
def test_what_others_write_and_we_take(place, value):
    assert ds_config_problems(changed(DS, place, value)) == []


def test_another_optimizer_must_be_asked_for():
    config = changed(DS, "optimizer", {"type": "SGD", "params": {"lr": 0.1}})
    assert len(ds_config_problems(config)) == 1
    assert ds_config_problems({**config, "zero_allow_untested_optimizer": True}) == []


def test_all_problems_at_once():
    config = changed(changed(DS, "optimizer.params.lr", []), "gradient_cliping", 1.0)
    assert [problem.split()[0] for problem in ds_config_problems(config)] == ["gradient_cliping", "optimizer.params.lr"]


# ---- 别的项目的配置文件：照样能用，或一次列出要改的全部 ----

HF_ZERO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
}
HF_STAGE3 = {
    "stage": 3,
    "overlap_comm": False,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
HF_STAGE2 = {
    "stage": 2,
    "allgather_partitions": True,
    "allgather_bucket_size": 5e8,
    "overlap_comm": False,
    "reduce_scatter": True,
    "reduce_bucket_size": 5e8,
    "contiguous_gradients": True,
    "round_robin_gradients": True,
}
CPU = {"device": "cpu", "pin_memory": True}
CLASSIC = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "steps_per_print": 2000,
    "gradient_clipping": "auto",
    "wall_clock_breakdown": False,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto",
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
        },
    },
    "zero_optimization": HF_STAGE2,
}


@pytest.mark.parametrize(
    ("config", "places"),
    [
        pytest.param(HF_ZERO | {"zero_optimization": HF_STAGE2}, [], id="trainer-z2"),
        pytest.param(HF_ZERO | {"zero_optimization": HF_STAGE2 | {"offload_optimizer": CPU}}, [], id="trainer-z2-off"),
        pytest.param(HF_ZERO | {"zero_optimization": HF_STAGE3}, [], id="trainer-z3"),
        pytest.param(
            HF_ZERO | {"zero_optimization": HF_STAGE3 | {"offload_optimizer": CPU, "offload_param": CPU}},
            [],
            id="trainer-z3-off",
        ),
        pytest.param(
            HF_ZERO | {"zero_optimization": {**HF_STAGE2, "stage": 0}}, ["zero_optimization.stage"], id="trainer-z0"
        ),
        pytest.param(
            HF_ZERO | {"zero_optimization": HF_STAGE2, "tensor_parallel": {"autotp_size": 2}},
            ["tensor_parallel"],
            id="trainer-autotp",
        ),
        pytest.param(
            {
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": 1.0,
                "bf16": {"enabled": "auto"},
                "zero_optimization": HF_STAGE3,
            },
            [],
            id="baichuan2",
        ),
        pytest.param(CLASSIC, [], id="trainer-classic"),
        pytest.param(
            CLASSIC | {"zero_optimization": HF_STAGE2 | {"compute_grad_norm": False}},
            ["zero_optimization.compute_grad_norm"],
            id="no-norm",
        ),
        pytest.param(
            CLASSIC
            | {
                "sparse_gradients": False,
                "zero_optimization": {"stage": 0, "cpu_offload": True},
                "optimizer": {"type": "Adam", "params": {"lr": "auto", "amsgrad": False}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0, "warmup_type": "cosine"}},
            },
            [
                "zero_optimization.cpu_offload",
                "sparse_gradients",
                "optimizer.params.amsgrad",
                "scheduler.params.warmup_num_steps",
                "scheduler.params.warmup_type",
                "zero_optimization.stage",
            ],
            id="all-at-once",
        ),
    ],
)
def test_the_files_of_other_projects(tmp_path, capsys, config, places):
    """没有要改的，就填得满，DeepSpeed 自己也接受；有的话一次列全。"""
    assert [problem.split()[0] for problem in ds_config_problems(config)] == places
    if places:
        return
    write_json(tmp_path / "ds.json", config)
    read = read_ds_config(tmp_path / "ds.json")
    said = capsys.readouterr().out
    assert [name in said for name in ("optimizer", "scheduler")] == ["optimizer" not in config] * 2
    assert ("gradient_clipping" in said) == (config["gradient_clipping"] == "auto")
    resolved = resolve_ds_config(read, "bf16", 4, 2, 1, 1e-4, 0.1, 100, 0.1)
    assert "auto" not in json.dumps(resolved | {"fp16": None})
    assert resolved["gradient_clipping"] == 1.0
    assert resolved["optimizer"]["params"] == {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    assert DeepSpeedConfig(resolved).gradient_clipping == 1.0


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
