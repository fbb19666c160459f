"""memory_plan.py、activation_plan.py 与 dry_run.py：公式对照 autograd 真正保留的存储，以及 --dry_run 的真实运行。"""

import re
import shutil
import weakref

import pytest
import torch
from launching import launch
from paths import ROOT

from baichuan import BaichuanConfig, BaichuanForCausalLM
from finetune.checkpoint.base_model import load_config, load_tokenizer
from finetune.cli.train_checks import validate_args
from finetune.cli.train_flags import parse_args
from finetune.data.packing import collate
from finetune.data.prompting import IGNORE_INDEX, EncodedSample, resolve_prompt_format
from finetune.methods.registry import TRAIN_METHODS
from finetune.planning.activations import (
    MicroBatch,
    activations,
    checkpointed_layers,
    head_bytes,
    plan_model,
    rotary_bytes,
)
from finetune.planning.dry_run import dry_run
from finetune.planning.estimate import DataSample, cards_that_fit, evaluate, fits, plan_on_cards, sample_data
from finetune.planning.machine import Machine
from finetune.planning.memory import GIB, Setup, checkpoint_bytes, model_states, plan_memory
from finetune.planning.report import describe, duration, gib
from finetune.planning.suggestions import last_resorts, suggestions
from finetune.training.ds_config import read_ds_config
from model_factory import enable_gradient_checkpointing

LAYERS, HIDDEN, INTERMEDIATE, HEADS, VOCAB = 4, 64, 172, 4, 500
METHOD_FLAGS = {
    "freeze": ["--freeze_module_name", "layers.3.,layers.2."],
    "freeze-part": ["--freeze_module_name", "W_pack,layers.1.mlp.down"],
    "lora": [],
    "lora-all": ["--lora_module_name", "all-linear"],
    "lora-no-dropout": ["--lora_module_name", "all-linear", "--lora_dropout", "0"],
    "ptuning": [],
    "full": [],
}


def parse(method: str, *flags: str):
    base = ["--train_path", "d", "--model_name_or_path", "m", "--output_dir", "o", "--train_type", method.split("-")[0]]
    return parse_args([*base, *METHOD_FLAGS[method], *flags])


def config_of(arch: str) -> BaichuanConfig:
    return BaichuanConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        position_embedding="rope" if "7b" in arch else "alibi",
        norm_head="2" in arch,
    )


def saved_bytes(model, batch: dict) -> int:
    """前向之后，autograd 为反向保留的存储的总字节数；权重不算，同一块存储只算一次。"""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive[storage.data_ptr()] = (storage.nbytes(), weakref.ref(storage))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch, use_cache=False).loss
        total = sum(size for size, _ in alive.values())
    loss.backward()
    return total


@pytest.mark.parametrize("checkpointing", ["none", "all", "2", "attention"])
@pytest.mark.parametrize("arch", ["baichuan2-7b", "baichuan-13b"])
@pytest.mark.parametrize("method", METHOD_FLAGS)
def test_saved_activations(method, arch, checkpointing):
    """一次前向为反向保留的存储，公式与 autograd 相差不到 2%。"""
    args, config = parse(method), config_of(arch)
    torch.manual_seed(0)
    model = TRAIN_METHODS[args.train_type].apply(BaichuanForCausalLM(config).to(torch.bfloat16), args)
    if checkpointing != "none":
        enable_gradient_checkpointing(model, checkpointing)
    model.train()
    lengths = [150, 90, 60]
    samples = []
    for length in lengths:
        ids = (torch.arange(length) + length) % (VOCAB - 3) + 3  # 开头各不相同：公式不计共用的
        labels = torch.where(torch.arange(length) < length // 2, IGNORE_INDEX, ids)
        samples.append(
            EncodedSample(ids.numpy(), labels.numpy(), length - length // 2, length // 2, False, False, False, 1)
        )
    batch = collate(samples, 0, packing=True)
    planned = plan_model(args, config)
    expected = activations(planned, MicroBatch(lengths, len(batch["target_rows"])), 2, checkpointing, on_cpu=True).saved
    expected += 8 * len(batch["target_rows"])  # 目标行的下标
    expected += 8 * planned.prefix_length + 8 * sum(lengths) * planned.embedding_is_trained  # 词嵌入的下标
    if checkpointing in ("all", "2") and planned.prefix_length:  # 重算的层另外留着它们的前缀
        expected += len(checkpointed_layers(planned, checkpointing)) * 2 * 2 * planned.prefix_length * HIDDEN
    layers = range(planned.first_trained_layer, LAYERS)
    if checkpointing in ("none", "2") and any(index % 2 or checkpointing == "none" for index in layers):
        expected += rotary_bytes(planned, sum(lengths), 2)  # 重算时它在闭包里，不经过保留的钩子
    assert saved_bytes(model, batch) == pytest.approx(expected, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# 模型状态


def seven_b(method: str, vocab_size: int = 64000, *flags: str):
    config = BaichuanConfig(
        vocab_size=vocab_size,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        position_embedding="rope",
        norm_head=vocab_size == 125696,
    )
    return plan_model(parse(method, *flags), config)


def setup(stage: int, cards: int, is_offloaded: bool = False) -> Setup:
    return Setup("bf16", stage, is_offloaded, is_offloaded and stage == 3, cards, cards)


@pytest.mark.parametrize("cards", [1, 2, 8])
def test_states_are_those_of_deepspeed(cards):
    """全参数时与 DeepSpeed 的估算相同；有冻结的参数时，冻结的只多出权重。"""
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    model = seven_b("full")
    assert model.num_total == model.num_trained == 7_000_559_616
    states, host, update = model_states(model, setup(2, cards))
    _, expected = estimate_zero2_model_states_mem_needs(model.num_total, cards, 1, cpu_offload=False)
    flat_copy = 2 * model.num_total // cards  # 估算没有算：换成 fp32 之前拼成一整段的 bf16 梯度
    assert sum(states.values()) + update - flat_copy == pytest.approx(expected, abs=16)
    assert sum(host.values()) == 0

    model = seven_b("lora")
    states, _, update = model_states(model, setup(2, cards))
    assert states["权重"] == 2 * model.num_total and model.num_trained == 4_194_304
    assert states["优化器"] == 12 * model.num_trained // cards and update == 6 * model.num_trained // cards


def test_offloaded_states_are_on_the_host():
    model = seven_b("full")
    states, host, update = model_states(model, setup(3, 4, is_offloaded=True))
    assert host == {"权重": 2 * model.num_total, "梯度与优化器": 18 * model.num_total}
    assert (states["权重"], states["优化器"], update) == (0, 0, 0)


def test_peak_moments_and_head():
    """全参数的峰值在更新；lora 在反向；可训练的 NormHead 在算损失时多出一块的三个 fp32 的临时量。"""
    batch = MicroBatch([1024] * 4, 800)
    assert "更新时的 fp32 梯度" in plan_memory(seven_b("full"), batch, setup(2, 1), "all").device
    lora = plan_memory(seven_b("lora"), batch, setup(2, 1), "all")
    assert lora.device["权重"] == pytest.approx(13.05 * GIB, rel=0.01) and lora.device_bytes < 17.5 * GIB
    head = 125696 * 4096
    kept = 800 * 8192 + 2 * head
    assert head_bytes(seven_b("full", 125696), batch, 2) == (kept + 12 * 2**27, kept)


def test_saving_on_a_cpu_counts_what_exceeds_training():
    """7B 的 freeze（最后一层）在 CPU 上量过：保存时 18,485 MB，训练的峰值 19,109 MB。"""
    model, cpu = seven_b("lora"), setup(2, 1)._replace(device="cpu")
    short, long = MicroBatch([1], 1), MicroBatch([1024] * 4, 800)
    saving, released = 14 * model.num_trained, 8 * model.num_trained  # 一行很短时峰值在更新：梯度与 fp32 的一份
    assert plan_memory(model, short, setup(2, 1), "all").host["保存检查点"] == saving
    assert plan_memory(model, short, cpu, "all").host["保存检查点"] == saving - released
    assert "保存检查点" not in plan_memory(model, long, cpu, "all").host


def test_checkpoint_sizes():
    assert checkpoint_bytes(seven_b("full"), 2, True) == 14 * 7_000_559_616
    assert checkpoint_bytes(seven_b("lora"), 2, False) == 2 * 4_194_304
    with_mlp = seven_b("ptuning", 64000, "--prefix_projection")
    assert with_mlp.num_trained == 136_643_072
    assert checkpoint_bytes(with_mlp, 2, False) == 2 * 4_194_304


# ---------------------------------------------------------------------------------------------------------------------
# --dry_run


def flags_for(model, output_dir, *flags) -> list[str]:
    base = ["--train_path", ROOT / "data" / "spo_0.json", "--model_name_or_path", model, "--output_dir", output_dir]
    return [str(flag) for flag in (*base, "--ds_file", ROOT / "ds_zero2_no_offload.json", *flags)]


def run_dry(*words) -> int:
    args = parse_args(flags_for(*words, "--dry_run"))
    return dry_run(args, *validate_args(args))


def test_dry_run_of_a_tiny_model(tiny_checkpoint, tmp_path, capsys):
    model = tiny_checkpoint("baichuan2-7b")
    assert run_dry(model, tmp_path / "output", "--per_device_train_batch_size", "2") == 0
    printed = capsys.readouterr().out
    assert "480 行（全部读了）" in printed and "截断 src 0 条、tgt 0 条" in printed
    assert "步数：每轮 60，共 180；" in printed  # 480 / (2 × 4)
    assert "结论：本机（没有 GPU）放得下" in printed
    assert " 0.00 GiB" not in printed
    assert re.search(r"（bf16）：.* \d\.\d\d GiB，放得进 16 GB、24 GB、40 GB", printed)
    assert not (tmp_path / "output").exists() and not torch.distributed.is_initialized()


def test_dry_run_follows_the_launcher(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run_dry(tiny_checkpoint("baichuan2-7b"), tmp_path / "output", "--max_steps", "7") == 0
    printed = capsys.readouterr().out
    assert "4 个进程" in printed and "步数：每轮 8，共 7；" in printed  # 480 / (4 × 4 × 4)
    monkeypatch.setenv("RANK", "1")
    assert run_dry(tiny_checkpoint("baichuan2-7b"), tmp_path / "output") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("task", "method", "passes"),
    [("sft", "lora", 0), ("simpo", "full", 0), ("dpo", "lora", 3), ("dpo", "full", 1), ("kto", "lora", 9)],
)
def test_the_passes_of_the_reference_are_counted(task, method, passes, tiny_checkpoint, tmp_path):
    """3 轮：新的 LoRA 每步另作一次前向，full 在第一步之前一遍，kto 另有搭档的两遍。"""
    flags = ["--task", task, "--train_type", method, "--num_train_epochs", "3", "--precision", "fp32"]
    args = parse_args(flags_for("-", tmp_path, *flags))
    model = plan_model(args, load_config(tiny_checkpoint("baichuan2-7b")))
    outcome = evaluate(args, ZERO2, model, SAMPLE, cpu_machine(64), 1)
    shape = model.shape
    matrices = (4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate) * shape.layers
    forward = 2 * 1_024_000 * matrices + 2 * 1000 * 1024**2 * shape.hidden * shape.layers
    forward += 2 * 200_000 * shape.hidden * shape.vocab
    forward -= 2 * (1_024_000 - 200_000) * (shape.hidden**2 + 3 * shape.hidden * shape.intermediate)
    assert outcome.extra_passes == passes
    flops = outcome.num_steps * outcome.step_flops + passes * forward
    assert outcome.hours == pytest.approx(flops / (0.6e12 * 3600))


@pytest.fixture
def large_model(tiny_checkpoint, tmp_path):
    """宽而深的 config.json 与微型的分词器，没有权重。"""
    path = tmp_path / "large"
    tiny = tiny_checkpoint("baichuan2-7b")
    shutil.copytree(tiny, path, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = BaichuanConfig.from_pretrained(tiny)
    BaichuanConfig(**{**config.to_dict(), **sizes}).save_pretrained(path)
    return path


def test_dry_run_needs_no_weights_and_says_what_does_not_fit(large_model, tmp_path, capsys):
    assert run_dry(large_model, tmp_path / "output", "--train_type", "full") == 1
    printed = capsys.readouterr().out
    assert "（到 141 GB）" in printed
    assert re.search("结论：.*放不下.*--train_type lora 或 freeze", printed)


def test_suggestions_fit_and_are_ranked(large_model, tmp_path):
    """一张 80 GB 的卡放不下 60B 的 lora：建议都放得下，卡少的、快的在前。"""
    args = parse_args(flags_for(large_model, tmp_path / "output", "--dry_run", "--precision", "bf16"))
    ds_config, config = validate_args(args)
    tokenizer = load_tokenizer(large_model, config.vocab_size)
    sample = sample_data(args, tokenizer, resolve_prompt_format("auto", large_model, config))
    model = plan_model(args, config)
    machine = Machine("cuda", "NVIDIA H100", 80 * GIB, 512 * GIB, 989e12, "标称")
    assert not fits(evaluate(args, ds_config, model, sample, machine, 1), machine)
    found = suggestions(args, ds_config, model, sample, machine, 1)
    alone = [label for label, _ in found if "，" not in label]
    assert alone[:2] == ["--load_in_4bit", "--ds_file ds_zero3_offload.json"]
    assert all(fits(outcome, machine) for _, outcome in found)
    cards = [outcome.setup.cards for _, outcome in found]
    assert cards == sorted(cards) and cards[0] == 1


SAMPLE = DataSample(1000, 1000, [1024] * 1000, [200] * 1000, 0, 0, 0, 1024)
ZERO2, ZERO3 = (read_ds_config(ROOT / name) for name in ("ds_zero2_no_offload.json", "ds_zero3_offload.json"))


def cpu_machine(host_gib: float) -> Machine:
    return Machine("cpu", "CPU", None, int(host_gib * GIB), 1e12, "实测")


@pytest.mark.parametrize(("cards", "gib_of_card"), [(1, "31.38 GiB"), (4, "31.70 GiB")])
def test_cards_are_planned_as_cards(cards, gib_of_card):
    """没有 GPU 的机器上推算卡：13B lora、重算、4,096 token 放得进 40 GB，与 README 的表相同。"""
    args = parse("lora", "--gradient_checkpointing")
    sizes = {"hidden_size": 5120, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 40}
    model = plan_model(args, BaichuanConfig(vocab_size=125696, position_embedding="alibi", norm_head=True, **sizes))
    machine = cpu_machine(500)
    on_other = plan_on_cards(args, ZERO2, model, SAMPLE, machine, cards)
    assert (sum(on_other.batch.lengths), on_other.setup.device, on_other.setup.precision) == (4096, "cuda", "bf16")
    assert cards_that_fit(on_other.plan) == [40, 48, 80, 141]
    others = sum(size for name, size in on_other.plan.device.items() if name not in ("碎片", "CUDA 与通信"))
    assert on_other.plan.device["碎片"] == int(0.05 * others)
    lines = describe(args, model, SAMPLE, machine, evaluate(args, ZERO2, model, SAMPLE, machine, cards), on_other)
    assert lines[-1].endswith(f" {gib_of_card}，放得进 40 GB、48 GB、80 GB、141 GB")


def test_full_7b_is_suggested_in_16_bits_on_one_card():
    """一张 80 GB 的卡：Baichuan2-7B 全参数，不卸载的改法是 adamw_bf16；各种优化器的字节。"""
    args, model = parse("full", "--precision", "bf16", "--gradient_checkpointing"), seven_b("full", 125696)
    card = Machine("cuda", "NVIDIA H100", int(79.1 * GIB), 64 * GIB, 989e12, "标称")
    found = dict(suggestions(args, ZERO2, model, SAMPLE, card, 1))
    alone = found["--optimizer adamw_bf16"].plan
    assert alone.device["优化器"] == 6 * model.num_trained and alone.device["权重"] == 2 * model.num_trained
    assert alone.device["梯度"] == 2 * model.num_trained
    assert not any("offload" in label for label in found)  # 主机内存放不下卸载的
    states, _, update = model_states(model, setup(2, 1)._replace(optimizer="adamw_8bit"))
    assert states["优化器"] == int((4 + 2 + 8 / 256) * model.num_trained)
    assert (states["梯度"], update) == (2 * model.num_trained, 4 * 125696 * 4096)
    with_sums = setup(2, 1)._replace(grad_accum_dtype="fp32")
    states, _, update = model_states(model, with_sums)  # 加进 fp32 的缓冲，更新时不再要
    assert (states["梯度"], update) == (4 * model.num_trained, 0)
    _, host, _ = model_states(model, setup(3, 1, is_offloaded=True)._replace(grad_accum_dtype="fp32"))
    assert host["梯度与优化器"] == 20 * model.num_trained


def test_suggestions_on_a_cpu():
    """减少进程（累积补足）、量化都试；ZeRO-3 不量化，先换成 ZeRO-2；改得少的在前。"""
    args, model = parse("lora", "--precision", "bf16"), seven_b("lora", 125696)
    assert not fits(evaluate(args, ZERO2, model, SAMPLE, cpu_machine(40), 4), cpu_machine(40))
    found = suggestions(args, ZERO2, model, SAMPLE, cpu_machine(40), 4)
    labels = [label for label, _ in found]
    assert labels[:3] == [
        "LOCAL_SIZE=1（1 个进程） --gradient_accumulation_steps 16",
        "LOCAL_SIZE=1（1 个进程） --gradient_accumulation_steps 16，--load_in_4bit",
        "LOCAL_SIZE=1（1 个进程） --gradient_accumulation_steps 16，--load_in_8bit",
    ]
    assert len({outcome.num_steps for _, outcome in found}) == 1  # 一步的样本数没有变
    labels = [label for label, _ in suggestions(args, ZERO2, model, SAMPLE, cpu_machine(64), 4)]
    assert "--load_in_4bit，--per_device_train_batch_size 1 --gradient_accumulation_steps 16" in labels
    labels = [label for label, _ in suggestions(args, ZERO3, model, SAMPLE, cpu_machine(40), 1)]
    assert labels[0] == "--ds_file ds_zero2_no_offload.json"
    with_bits = [label for label in labels if "--load_in" in label]
    assert with_bits and all("--ds_file ds_zero2_no_offload.json" in label for label in with_bits)
    assert not any("--load_in" in label for label, _ in suggestions(
        parse("ptuning", "--precision", "bf16"), ZERO2, seven_b("ptuning", 125696), SAMPLE, cpu_machine(64), 4
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("method", "flags", "expected"),
    [
        ("lora", [], "调小 --max_len；换内存更大的机器"),
        ("ptuning", ["--prefix_projection"], "去掉 --prefix_projection；调小 --max_len；换内存更大的机器"),
        ("freeze", [], "少选几层或换 --train_type lora；调小 --max_len；换内存更大的机器"),
        ("full", [], "换 --train_type lora 或 freeze；调小 --max_len；换内存更大的机器"),
    ],
)
def test_last_resorts_are_not_in_use(method, flags, expected):
    args, model, machine = parse(method, "--precision", "bf16", *flags), seven_b(method), cpu_machine(2)
    assert suggestions(args, ZERO2, model, SAMPLE, machine, 1) == []
    assert last_resorts(args, machine, evaluate(args, ZERO2, model, SAMPLE, machine, 1)) == expected
    card = Machine("cuda", "卡", 2 * GIB, 512 * GIB, 1e14, "标称")
    on_card = last_resorts(args, card, evaluate(args, ZERO2, model, SAMPLE, card, 1))
    assert on_card == expected.replace("内存更大的机器", "更大的卡")


def test_units():
    assert [gib(size) for size in (3072, 5 << 20, 100 << 20, 103 << 20, 99.5 * GIB, 150 * GIB)] == [
        *("0.00293 MiB", "5 MiB", "100 MiB", "0.10 GiB", "99.50 GiB", "150 GiB")
    ]
    assert [duration(seconds / 3600) for seconds in (0, 0.9, 1, 59.4, 1800, 7200)] == [
        *("不到 1 秒", "不到 1 秒", "约 1 秒", "约 59 秒", "约 30.0 分钟", "约 2.0 小时")
    ]


def test_broken_rows_are_errors(tiny_checkpoint, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{"instruction": "x"}\n', encoding="utf-8")
    args = parse_args(
        [*flags_for(tiny_checkpoint("baichuan2-7b"), tmp_path / "output", "--dry_run"), "--train_path", str(path)]
    )
    with pytest.raises(ValueError, match="output"):
        dry_run(args, *validate_args(args))


@pytest.mark.slow
@pytest.mark.deepspeed
def test_dry_run_through_the_launcher(tiny_checkpoint, tmp_path):
    flags = flags_for(tiny_checkpoint("baichuan2-7b"), tmp_path / "output", "--dry_run")
    result = launch(flags, num_ranks=2)
    assert result.returncode == 0, result.tail()
    assert "2 个进程" in result.output and "放得下" in result.output
    assert not (tmp_path / "output").exists()


def test_the_committed_table_is_current():
    """benchmarks/memory/README.md 就是 benchmarks/memory/plan_memory.py 会写出的。"""
    from benchmarks.memory import report as plan_report
    from utils import read_json

    measured = ROOT / "benchmarks" / "memory" / "results" / "measured.json"
    committed = (ROOT / "benchmarks" / "memory" / "README.md").read_text(encoding="utf-8")
    assert plan_report.report(read_json(measured) if measured.is_file() else None) == committed
