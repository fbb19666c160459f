"""BaichuanConfig 的测试：由官方键推断结构、自有键优先、Auto 类注册、错误信息。"""

import json

import pytest
from transformers import AutoConfig

from baichuan import BaichuanConfig

# 官方 config.json 里决定结构的键 → (position_embedding, norm_head, trained_length)
OFFICIAL = [
    pytest.param(
        {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 4096, "vocab_size": 64000},
        ("rope", False, 4096),
        id="Baichuan-7B",
    ),
    pytest.param(
        {"architectures": ["BaichuanForCausalLM"], "model_max_length": 4096, "vocab_size": 64000, "hidden_size": 5120},
        ("alibi", False, 4096),
        id="Baichuan-13B",
    ),
    pytest.param(
        {
            "architectures": ["BaichuanForCausalLM"],
            "max_position_embeddings": 4096,
            "model_max_length": 4096,
            "vocab_size": 125696,
        },
        ("rope", True, 4096),
        id="Baichuan2-7B",
    ),
    pytest.param(
        {"architectures": ["BaichuanForCausalLM"], "model_max_length": 4096, "vocab_size": 125696, "hidden_size": 5120},
        ("alibi", True, 4096),
        id="Baichuan2-13B",
    ),
    # 词表被裁剪或微型的检查点：大小不再能说明问题
    pytest.param(
        {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 128, "vocab_size": 512},
        ("rope", False, 128),
        id="tiny-Baichuan-7B",
    ),
    pytest.param(
        {
            "architectures": ["BaichuanForCausalLM"],
            "max_position_embeddings": 128,
            "model_max_length": 128,
            "vocab_size": 512,
        },
        ("rope", True, 128),
        id="tiny-Baichuan2-7B",
    ),
    pytest.param(
        {"architectures": ["BaichuanForCausalLM"], "model_max_length": 128, "vocab_size": 512},
        ("alibi", False, 128),
        id="tiny-13B",
    ),
]

SIZES = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}


def write_config(directory, **keys):
    directory.mkdir(parents=True, exist_ok=True)
    content = {"model_type": "baichuan", **SIZES, **keys}
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.mark.parametrize(("keys", "expected"), OFFICIAL)
def test_structure_is_inferred_from_official_keys(tmp_path, keys, expected):
    keys = {**keys, "num_attention_heads": 40} if keys.get("hidden_size") == 5120 else keys
    config = AutoConfig.from_pretrained(write_config(tmp_path, **keys))
    assert type(config) is BaichuanConfig
    assert (config.position_embedding, config.norm_head, config.trained_length) == expected


@pytest.mark.parametrize(("keys", "expected"), OFFICIAL)
def test_own_keys_win_over_inference(tmp_path, keys, expected):
    keys = {**keys, "num_attention_heads": 40} if keys.get("hidden_size") == 5120 else keys
    flipped = {"position_embedding": "rope" if expected[0] == "alibi" else "alibi", "norm_head": not expected[1]}
    in_file = AutoConfig.from_pretrained(write_config(tmp_path / "file", **keys, **flipped))
    as_argument = AutoConfig.from_pretrained(write_config(tmp_path / "argument", **keys), **flipped)
    for config in (in_file, as_argument):
        assert {"position_embedding": config.position_embedding, "norm_head": config.norm_head} == flipped


@pytest.mark.parametrize(("keys", "expected"), OFFICIAL)
def test_saved_config_states_both_own_keys(tmp_path, keys, expected):
    keys = {**keys, "num_attention_heads": 40} if keys.get("hidden_size") == 5120 else keys
    AutoConfig.from_pretrained(write_config(tmp_path / "a", **keys)).save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "config.json").read_text(encoding="utf-8"))
    assert (saved["position_embedding"], saved["norm_head"]) == expected[:2]
    assert saved["model_type"] == "baichuan"
    # 官方的长度键原样写回：值不变，没有的不补成别的数
    for name in ("max_position_embeddings", "model_max_length"):
        assert saved.get(name) == keys.get(name)
    again = AutoConfig.from_pretrained(tmp_path / "b")
    assert (again.position_embedding, again.norm_head, again.trained_length) == expected


def test_norm_head_set_by_hand_survives_a_round_trip(tmp_path):
    config = AutoConfig.from_pretrained(
        write_config(tmp_path / "a", model_max_length=128, vocab_size=512), norm_head=True
    )
    config.save_pretrained(tmp_path / "b")
    assert AutoConfig.from_pretrained(tmp_path / "b").norm_head is True


def test_defaults_of_absent_keys(tmp_path):
    config = AutoConfig.from_pretrained(write_config(tmp_path, model_max_length=128, vocab_size=512))
    assert config.z_loss_weight == 0
    assert config.rms_norm_eps == 1e-6
    assert config.initializer_range == 0.02
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.tie_word_embeddings is False
    assert config.use_cache is True
    assert config.hidden_act == "silu"
    # peft 的前缀调优按这些名字取值
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 64, 4)


def test_ambiguous_checkpoint_warns_what_to_write():
    from transformers.utils import logging as transformers_logging

    logger = transformers_logging.get_logger("baichuan.configuration_baichuan")
    seen = []
    original, logger.warning_once = logger.warning_once, seen.append
    try:
        BaichuanConfig(**SIZES, model_max_length=128, vocab_size=512)
        BaichuanConfig(**SIZES, model_max_length=128, vocab_size=512, norm_head=True)
    finally:
        logger.warning_once = original
    assert len(seen) == 1
    assert "512" in seen[0] and '"norm_head": true' in seen[0]


def test_unknown_position_embedding_is_an_error():
    with pytest.raises(ValueError, match=r"position_embedding='learned' 无效，可选：rope \| alibi"):
        BaichuanConfig(position_embedding="learned")


def test_overriding_argument_is_checked(tmp_path):
    directory = write_config(tmp_path, model_max_length=128, vocab_size=513)
    with pytest.raises(ValueError, match="position_embedding='learned' 无效"):
        AutoConfig.from_pretrained(directory, position_embedding="learned")
    assert BaichuanConfig.from_pretrained(directory, norm_head=True).norm_head is True


@pytest.mark.parametrize("value", ["yes", "false", 2])
def test_norm_head_must_be_a_bool(value):
    with pytest.raises((ValueError, TypeError), match="norm_head"):
        BaichuanConfig(**SIZES, model_max_length=128, vocab_size=512, norm_head=value)


def test_hidden_size_must_divide_into_heads():
    with pytest.raises(ValueError, match=r"hidden_size\(64\) 必须能被 num_attention_heads\(5\) 整除"):
        BaichuanConfig(hidden_size=64, num_attention_heads=5)


def test_auto_map_in_config_is_never_followed(tmp_path):
    auto_map = {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    }
    directory = write_config(tmp_path, model_max_length=128, vocab_size=512, auto_map=auto_map)
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w').close()\nclass BaichuanConfig: pass\nclass BaichuanForCausalLM: pass\n"
    for name in ("configuration_baichuan.py", "modeling_baichuan.py"):
        (directory / name).write_text(code, encoding="utf-8")
    assert type(AutoConfig.from_pretrained(directory)) is BaichuanConfig
    assert not marker.exists()
