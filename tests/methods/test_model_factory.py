"""造模型：四种方法在四种结构上恰好训练该训练的参数；权重与分词器的每种毛病都在训练之前说清楚。"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from asserting import lacks
from peft import PeftModel
from safetensors.torch import load_file, save_file

from baichuan import BaichuanForCausalLM
from finetune.checkpoint.base_model import load_base_model, load_config, load_tokenizer
from finetune.checkpoint.options import MODEL_FAMILIES
from finetune.cli.train_flags import TrainOptions, parse_args
from finetune.methods.registry import TRAIN_METHODS, check_trainable, num_elements
from model_factory import build_model

CPU = torch.device("cpu")
ARCHITECTURES = ["baichuan-7b", "baichuan-13b", "baichuan2-7b", "baichuan2-13b"]
SIZES = {"layers": 2, "hidden_size": 32, "heads": 4, "intermediate_size": 48}
LAYER = {
    "self_attn.W_pack": (96, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
    "input_layernorm": (32,),
    "post_attention_layernorm": (32,),
}
LINEAR = [name for name, shape in LAYER.items() if len(shape) == 2]
LAYER_NAMES = {f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in LAYER}
ALL_NAMES = LAYER_NAMES | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
PEFT = "base_model.model.model.layers"


def lora_names(modules: list[str], layers=range(2)) -> set[str]:
    return {f"{PEFT}.{i}.{module}.lora_{part}.default.weight" for i in layers for module in modules for part in "AB"}


# (方法, 它的参数, 恰好可训练的名字)；每种方法至少一行
METHOD_ROWS = [
    ("freeze", ["--freeze_module_name", "layers.1."], {n for n in LAYER_NAMES if ".layers.1." in n}),
    ("freeze", ["--freeze_module_name", " layers.0.mlp , lm_head,"],
     {f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")} | {"lm_head.weight"}),
    ("freeze", ["--freeze_module_name", "norm"], {n for n in ALL_NAMES if "norm" in n}),
    ("lora", [], lora_names(["self_attn.W_pack"])),
    ("lora", ["--lora_module_name", "W_pack, o_proj"], lora_names(["self_attn.W_pack", "self_attn.o_proj"])),
    ("lora", ["--lora_module_name", "all-linear"], lora_names(LINEAR)),
    ("ptuning", [], {"prompt_encoder.default.embedding.weight"}),
    ("ptuning", ["--prefix_projection", "True", "--prefix_hidden_size", "24"],
     {"prompt_encoder.default.embedding.weight"} | {
        f"prompt_encoder.default.transform.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}),
    ("ptuning", ["--ptuning_version", "1", "--prefix_hidden_size", "24"],
     {"prompt_encoder.default.embedding.weight"} | {
        f"prompt_encoder.default.mlp_head.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}),
    ("full", [], ALL_NAMES),
]  # fmt: skip


@pytest.fixture
def make(tiny_checkpoint):
    """返回 `make(arch, method, *flags) -> (模型, 参数)`：走 build_model，fp32。"""

    def build(arch: str, method: str, *flags: str):
        path = tiny_checkpoint(arch, **SIZES)
        args = parse_args(
            [
                "--train_path",
                "-",
                "--output_dir",
                "-",
                "--model_name_or_path",
                str(path),
                "--train_type",
                method,
                *flags,
            ]
        )
        return build_model(args, load_config(path), "fp32", {}), args

    return build


@pytest.fixture
def broken(tiny_checkpoint, tmp_path) -> Path:
    """可以弄坏的检查点。"""
    return Path(shutil.copytree(tiny_checkpoint("baichuan2-7b", **SIZES), tmp_path / "broken"))


def load(path: Path, mode: str = "baichuan") -> BaichuanForCausalLM:
    return load_base_model(path, load_config(path), torch.float32, CPU)


def edit_tensors(path: Path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


# ---- 可训练的参数 ----


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("method", "flags", "expected"), METHOD_ROWS)
def test_exactly_these_parameters_are_trainable(make, arch, method, flags, expected):
    model, args = make(arch, method, *flags)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(trainable) == expected
    assert check_trainable(model, args) == sum(parameter.numel() for parameter in trainable.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_rows_above_name_every_method():
    assert {method for method, _, _ in METHOD_ROWS} == set(TRAIN_METHODS)


def test_both_families_read_every_architecture(tiny_checkpoint):
    """结构以 config.json 为准，不看 --mode：用户用 --mode baichuan 训练 Baichuan2。"""
    assert list(MODEL_FAMILIES) == ["baichuan", "baichuan2"]
    for arch in ARCHITECTURES:
        path = tiny_checkpoint(arch, **SIZES)
        found = {mode: load_config(path) for mode in MODEL_FAMILIES}
        for config in found.values():
            assert config.position_embedding == ("rope" if arch.endswith("7b") else "alibi")
            assert config.norm_head == arch.startswith("baichuan2")


@pytest.mark.parametrize(
    ("method", "flags"),
    [("freeze", ["--freeze_module_name", "layers.1."]), ("lora", []), ("ptuning", []), ("full", [])],
)
def test_gradient_checkpointing_is_on_and_changes_no_gradient(make, method, flags):
    gradients = []
    for extra in ([], ["--gradient_checkpointing"]):
        torch.manual_seed(5)
        model, _ = make("baichuan2-13b", method, *flags, *extra)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        assert base.model.gradient_checkpointing is bool(extra)
        ids = torch.arange(40, 52)[None]
        torch.manual_seed(6)  # LoRA 的 dropout
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-9)


def test_freeze_lists_what_exists_when_a_name_matches_nothing(make):
    with pytest.raises(ValueError) as caught:
        make("baichuan2-7b", "freeze", "--freeze_module_name", "layers.1.,layers.27.,ln_f")
    inner = ["input_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm"]
    inner += ["self_attn.W_pack", "self_attn.o_proj"]
    told = ["--freeze_module_name", ["layers.27.", "ln_f"], "layers.0.", "layers.1.", inner]
    assert lacks(str(caught.value), *told, ["lm_head", "model.embed_tokens", "model.norm"]) == []


def test_a_dot_at_the_end_tells_layer_1_from_layer_11(tiny_checkpoint, make):
    path = tiny_checkpoint("baichuan2-7b", **{**SIZES, "layers": 12})
    args = TrainOptions(train_type="freeze", freeze_module_name="layers.1.", model_name_or_path=path)
    model = build_model(args, load_config(path), "fp32", {})
    trained = {name.split(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"1"}


@pytest.mark.parametrize(("names", "unknown"), [("q_proj", ["q_proj"]), ("W_pack,lm_head", ["lm_head"]), (" , ", [])])
def test_lora_lists_the_modules_when_one_is_unknown(make, names, unknown):
    with pytest.raises(ValueError) as caught:
        make("baichuan-13b", "lora", "--lora_module_name", names)
    known = "W_pack、down_proj、gate_proj、o_proj、up_proj、all-linear"
    assert lacks(str(caught.value), f"--lora_module_name 的 {unknown} ", known) == []


def test_lora_settings_reach_peft(make):
    model, _ = make("baichuan2-7b", "lora", "--lora_dim", "4", "--lora_alpha", "12", "--lora_dropout", "0.25")
    layer = model.get_base_model().model.layers[0].self_attn.W_pack
    assert layer.lora_A["default"].weight.shape == (4, 32)
    assert layer.lora_B["default"].weight.shape == (96, 4)
    assert layer.scaling["default"] == 3.0
    assert layer.lora_dropout["default"].p == 0.25
    assert not layer.lora_B["default"].weight.any()  # 从基座本身出发


@pytest.mark.parametrize(
    ("flags", "shapes"),
    [
        # 每层的键与值，各 hidden 宽：2 层 × 2 × 32
        (["--pre_seq_len", "5"], {"embedding.weight": (5, 128)}),
        (
            ["--pre_seq_len", "5", "--prefix_projection", "--prefix_hidden_size", "24"],
            {
                "embedding.weight": (5, 32),
                "transform.0.weight": (24, 32),
                "transform.0.bias": (24,),
                "transform.2.weight": (128, 24),
                "transform.2.bias": (128,),
            },
        ),
        (
            ["--pre_seq_len", "5", "--ptuning_version", "1", "--prefix_hidden_size", "24"],
            {
                "embedding.weight": (5, 32),
                "mlp_head.0.weight": (24, 32),
                "mlp_head.0.bias": (24,),
                "mlp_head.2.weight": (24, 24),
                "mlp_head.2.bias": (24,),
                "mlp_head.4.weight": (32, 24),
                "mlp_head.4.bias": (32,),
            },
        ),
    ],
)
def test_ptuning_shapes(make, flags, shapes):
    model, _ = make("baichuan-7b", "ptuning", *flags)
    found = {name: tuple(p.shape) for name, p in model.prompt_encoder["default"].named_parameters()}
    assert found == shapes


def test_build_model_reports_the_share_trained(make, capsys):
    make("baichuan2-7b", "lora")
    # W_pack 32 → 96，秩 8：8 × (32 + 96) × 2 层；其余 2000 × 32 × 2 + 2 × (4·32² + 3·32·48 + 2·32) + 32
    total = 2000 * 32 * 2 + 2 * (4 * 32**2 + 3 * 32 * 48 + 2 * 32) + 32 + 2048
    assert (
        f"2 层，rope，norm_head=True；可训练 2,048 / {total:,}（{100 * 2048 / total:.4f}%）" in capsys.readouterr().out
    )


# ---- check_trainable ----


def test_check_trainable_needs_something(make):
    model, args = make("baichuan2-7b", "full")
    with pytest.raises(ValueError, match="--train_type full "):
        check_trainable(model.requires_grad_(False), args)


@pytest.mark.parametrize(
    ("method", "flags", "intruder"),
    [
        ("freeze", ["--freeze_module_name", "layers.1."], "model.norm.weight"),
        ("lora", [], "base_model.model.lm_head.weight"),
        ("ptuning", [], "base_model.lm_head.weight"),
    ],
)
def test_check_trainable_refuses_parameters_of_no_method(make, method, flags, intruder):
    model, args = make("baichuan2-7b", method, *flags)
    dict(model.named_parameters())[intruder].requires_grad_(True)
    with pytest.raises(ValueError, match=rf"--train_type {method} .*\['{intruder}'\]"):
        check_trainable(model, args)


@pytest.mark.parametrize(
    ("method", "flags", "expected"), [METHOD_ROWS[0], METHOD_ROWS[3], METHOD_ROWS[7], METHOD_ROWS[9]]
)
def test_check_trainable_refuses_a_frozen_parameter_of_the_method(make, method, flags, expected):
    model, args = make("baichuan2-7b", method, *flags)
    frozen = sorted(expected)[0]
    dict(model.named_parameters())[frozen].requires_grad_(False)
    with pytest.raises(ValueError, match=rf"--train_type {method} .*\['{frozen}'\]"):
        check_trainable(model, args)


def test_num_elements_of_a_partitioned_parameter_is_the_whole():
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_numel = 12
    assert num_elements(parameter) == 12
    assert num_elements(torch.nn.Parameter(torch.empty(3, 2))) == 6


# ---- 读权重 ----


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_every_layout_loads_bit_for_bit(tiny_checkpoint, arch, weights, shard):
    path = tiny_checkpoint(arch, **SIZES, format=weights, max_shard_size=shard)
    assert len(list(path.glob("*.index.json"))) == (shard == "100KB")
    expected = BaichuanForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    assert set(expected) == ALL_NAMES
    found = load(path).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_weights_are_rounded_once_to_the_dtype_asked_for(tiny_checkpoint, stored, dtype):
    path = tiny_checkpoint("baichuan2-7b", **SIZES, dtype=stored)
    model = load_base_model(path, load_config(path), dtype, CPU)
    tensors = load_file(path / "model.safetensors")
    assert all(torch.equal(parameter, tensors[name].to(dtype)) for name, parameter in model.named_parameters())
    assert model.config.dtype == dtype


def test_generation_config_of_the_checkpoint_is_kept(tiny_checkpoint):
    model = load(tiny_checkpoint("baichuan2-7b", **SIZES, chat=True))
    assert (model.generation_config.top_k, model.generation_config.user_token_id) == (5, 195)


def test_a_truncated_weight_file(broken):
    path = broken / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    with pytest.raises(ValueError, match=rf"model\.safetensors（{size // 2} 字节）"):
        load(broken)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 200])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_weight_file_cut_anywhere(broken, name, keep):
    content = (broken / "model.safetensors").read_bytes()
    if name.endswith(".bin"):
        torch.save(load_file(broken / "model.safetensors"), broken / name)
        content = (broken / name).read_bytes()
    (broken / "model.safetensors").unlink()
    (broken / name).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=rf"{name}（{keep} 字节）"):
        load(broken)


def test_a_truncated_bin(broken):
    torch.save(load_file(broken / "model.safetensors"), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    content = (broken / "pytorch_model.bin").read_bytes()
    (broken / "pytorch_model.bin").write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin（\d+ 字节）"):
        load(broken)


def test_a_bin_with_code_is_never_run(broken, tmp_path):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was_run",))

    torch.save({"model.norm.weight": Code()}, broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin（\d+ 字节）"):
        load(broken)
    assert not (tmp_path / "was_run").exists()


def test_no_weight_file(broken):
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError) as caught:
        load(broken)
    files = "model.safetensors、pytorch_model.bin、model.safetensors.index.json、pytorch_model.bin.index.json"
    assert lacks(str(caught.value), broken, files) == []


def test_missing_extra_and_wrong_tensors_are_listed_together(broken):
    def edit(tensors):
        del tensors["model.norm.weight"], tensors["lm_head.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(48, 32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # 官方文件里有，不算多出
        tensors["model.layers.0.self_attn.W_pack.weight"] = torch.ones(32, 96)

    edit_tensors(broken, edit)
    with pytest.raises(ValueError) as caught:
        load(broken)
    missing, unknown = ["lm_head.weight", "model.norm.weight"], ["model.layers.2.mlp.up_proj.weight"]
    told = [f"{broken} ", f" 2 个张量，如 {missing}", " 1 个", f"如 {unknown}", "(32, 96)", "(96, 32)"]
    assert lacks(str(caught.value), *told, "model.layers.0.self_attn.W_pack.weight") == []


def test_a_vocabulary_size_that_does_not_fit_the_weights(broken):
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": 2048}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"lm_head\.weight 的形状是 \(2000, 32\)，按 config\.json 应为 \(2048, 32\)"):
        load(broken)


# ---- 分词器 ----


def test_a_tokenizer_larger_than_the_vocabulary(broken):
    with pytest.raises(ValueError) as caught:
        load_tokenizer(broken, 1999)
    assert lacks(str(caught.value), f"{broken} ", " 2000 ", "vocab_size", " 1999") == []


def test_a_much_smaller_tokenizer_is_told(broken, capsys):
    load_tokenizer(broken, 2200)
    assert capsys.readouterr().out == ""
    load_tokenizer(broken, 2300)
    assert lacks(capsys.readouterr().err, f"警告：{broken} ", " 2000 ", "vocab_size", " 2300") == []


def test_the_tokenizer_of_another_model_in_a_real_checkpoint(tiny_checkpoint, tmp_path):
    """真实的弄错：把大词表的分词器放进小词表的检查点。"""
    path = Path(shutil.copytree(tiny_checkpoint("baichuan2-7b", **SIZES, vocab_size=600), tmp_path / "m"))
    shutil.copy(tiny_checkpoint("baichuan2-7b", **SIZES) / "tokenizer.model", path)
    with pytest.raises(ValueError, match=r" 2000 .*config\.json 的 vocab_size .* 600"):
        load_tokenizer(path, load_config(path).vocab_size)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_a_tokenizer_that_cannot_be_read(broken, damage):
    path = broken / "tokenizer.model"
    content = {"empty": b"", "cut": path.read_bytes()[:1000], "text": "不是模型".encode()}.get(damage)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        load_tokenizer(broken, 2000)
