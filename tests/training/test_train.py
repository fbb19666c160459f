"""train.py：真实的 deepspeed 进程。怎样切分都是同样的梯度；日志、检查点与错误如约。"""

import json
import math
import os
import shutil
import socket
import subprocess
import time
import warnings
from pathlib import Path

import pytest
import torch
from commands import USER_COMMAND
from launching import Launch, cpu_environment, free_port, launch, run_group
from paths import ROOT
from peft import PeftModel
from safetensors.torch import load_file, save_file
from train_worker import PROBE_IDS, PROBE_MASK, fill_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from baichuan import BaichuanForCausalLM
from data_set import BaichuanDataSet
from finetune.checkpoint.base_model import load_config, load_tokenizer
from finetune.checkpoint.manifest import verify_checkpoint
from finetune.cli.train_flags import parse_args
from finetune.data.packing import collate, whole_samples
from finetune.data.prompting import resolve_prompt_format
from finetune.methods.registry import TRAIN_METHODS
from finetune.training.engine import parameter_groups
from model_factory import build_model
from utils import read_json, seed_everything

pytestmark = pytest.mark.deepspeed

WORKER = ROOT / "tests" / "helpers" / "train_worker.py"
ZERO2, ZERO3 = ROOT / "ds_zero2_no_offload.json", ROOT / "ds_zero3_offload.json"
SIZES = {"layers": 2, "hidden_size": 32, "heads": 4, "intermediate_size": 48}
RELATIVE = 1e-5


def write_rows(path: Path, num_rows: int, start: int = 0) -> Path:
    """项目自己的数据里的若干行。"""
    lines = (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[start : start + num_rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def flags_of(*, rows: Path, model: Path, output: Path, ds: Path = ZERO2, **options) -> list[str]:
    """train.py 的参数；options 是其余的 --名字 值，True 只写名字。"""
    options = {"max_len": 96, "max_src_len": 64, "precision": "fp32", "show_loss_step": 1, **options}
    flags = ["--train_path", str(rows), "--model_name_or_path", str(model), "--output_dir", str(output)]
    flags += ["--ds_file", str(ds)]
    for name, value in options.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flags


def checkpoints_in(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if path.is_dir() and "epoch-" in path.name)


def reload_logits(checkpoint: Path, base: Path) -> torch.Tensor:
    """用 transformers 或 peft 的 from_pretrained 原样读回，算与训练引擎相同的输入。"""
    if (checkpoint / "adapter_config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, checkpoint)
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(input_ids=PROBE_IDS, attention_mask=PROBE_MASK).logits


# ---------------------------------------------------------------------------------------------------------------------
# 同一个全局 batch 的梯度，与怎样切分无关

# (结构, 方法, 它的参数)：四种方法分在四种结构上
GRADIENT_ROWS = {
    "freeze": ("baichuan-13b", ["--freeze_module_name", "layers.1.,lm_head"]),
    "lora": ("baichuan2-7b", ["--lora_module_name", "all-linear", "--lora_dropout", "0"]),
    "ptuning": ("baichuan2-13b", ["--pre_seq_len", "5", "--prefix_projection", "--prefix_hidden_size", "24"]),
    "full": ("baichuan-7b", []),
}
# (每进程的样本数, 累积次数, ZeRO, 其余参数)；全局 batch 都是 8，实际只有 7 行，所以总有不满的、空的 micro batch
CUTS = {
    1: [
        (8, 1, ZERO2, []),
        (1, 8, ZERO2, ["--no-packing"]),
        (8, 1, ZERO3, ["--no-packing"]),
        (2, 4, ZERO3, ["--gradient_checkpointing"]),
    ],
    2: [
        (4, 1, ZERO2, []),
        (1, 4, ZERO2, ["--no-packing", "--gradient_checkpointing"]),
        (4, 1, ZERO3, ["--no-packing"]),
        (1, 4, ZERO3, []),
    ],
}
NUM_ROWS = 7


def cut_name(method: str, cut: tuple) -> str:
    batch_size, accumulation, ds, extra = cut
    return "_".join([method, f"{batch_size}x{accumulation}", ds.stem, *(flag.strip("-") for flag in extra)])


@pytest.fixture(scope="module")
def gradient_rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("gradients") / "rows.json", NUM_ROWS)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint, gradient_rows):
    """返回 `reference(method) -> {名字: 梯度}`：不用 DeepSpeed，全部样本在一个批里，损失取目标 token 的平均。"""
    found: dict[str, dict] = {}

    def compute(method: str) -> dict[str, torch.Tensor]:
        if method not in found:
            arch, flags = GRADIENT_ROWS[method]
            path = tiny_checkpoint(arch, **SIZES)
            args = parse_args(flags_of(rows=gradient_rows, model=path, output=Path("-"), train_type=method) + flags)
            config = load_config(path)
            tokenizer = load_tokenizer(path, config.vocab_size)
            prompting = resolve_prompt_format("auto", path, config)
            rows = BaichuanDataSet(gradient_rows, tokenizer, max_len=96, max_src_len=64, **prompting._asdict())
            seed_everything(args.seed)
            model = fill_adapter(build_model(args, config, "fp32", {})).train()
            batch = collate([rows[i] for i in range(len(rows))], tokenizer.pad_token_id, packing=False)
            assert sum(rows.num_targets) == len(batch["target_rows"])
            model(**batch, num_items_in_batch=sum(rows.num_targets), use_cache=False).loss.backward()
            found[method] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return found[method]

    return compute


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def gradients(request, tiny_checkpoint, gradient_rows, tmp_path_factory) -> tuple[int, Path]:
    """各种方法、各种切分的梯度；同样进程数的任务在同一组进程里做完。"""
    num_ranks, directory = request.param, tmp_path_factory.mktemp(f"gradients-{request.param}")
    tasks = {}
    for method, (arch, flags) in GRADIENT_ROWS.items():
        for cut in CUTS[num_ranks]:
            batch_size, accumulation, ds, extra = cut
            tasks[cut_name(method, cut)] = [
                *flags_of(
                    rows=gradient_rows, model=tiny_checkpoint(arch, **SIZES), output=directory / cut_name(method, cut),
                    ds=ds, train_type=method, per_device_train_batch_size=batch_size,
                    gradient_accumulation_steps=accumulation,
                ),
                *flags, *extra,
            ]  # fmt: skip
    (directory / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    run = launch(
        ["--gradients", directory / "tasks.json"],
        num_ranks=num_ranks,
        script=WORKER,
        env={"OBSERVE_DIR": str(directory)},
        launcher=False,
    )
    assert run.returncode == 0, run.tail()
    return num_ranks, directory


def test_the_rows_above_name_every_method():
    assert set(GRADIENT_ROWS) == set(TRAIN_METHODS)


@pytest.mark.parametrize("method", GRADIENT_ROWS)
def test_gradients_do_not_depend_on_the_cut(gradients, reference, method):
    num_ranks, directory = gradients
    expected = reference(method)
    assert all(gradient.norm() > 0 for gradient in expected.values())
    for cut in CUTS[num_ranks]:
        name = cut_name(method, cut)
        found = load_file(directory / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        for parameter, gradient in expected.items():
            error = (found[parameter].view_as(gradient) - gradient).norm() / gradient.norm()
            assert error < RELATIVE, f"{name} {parameter}：相对误差 {error:.1e}"


def test_the_cuts_are_really_different(gradients):
    """不装箱时 micro batch 数就是累积次数；装箱时不会更多。"""
    num_ranks, directory = gradients
    for method in GRADIENT_ROWS:
        for cut in CUTS[num_ranks]:
            batch_size, accumulation, _, extra = cut
            found = read_json(directory / f"{cut_name(method, cut)}.json")["micro_batches"]
            if "--no-packing" in extra:
                assert found == math.ceil(NUM_ROWS / (num_ranks * batch_size))
            else:
                assert 1 <= found <= accumulation


# ---------------------------------------------------------------------------------------------------------------------
# 参数组


def test_weight_decay_is_the_flag_and_only_for_matrices(tiny_checkpoint):
    path = tiny_checkpoint("baichuan2-7b", **SIZES)
    args = parse_args(flags_of(rows=Path("-"), model=path, output=Path("-"), train_type="full", weight_decay=0.03))
    model = build_model(args, load_config(path), "fp32", {})
    model.model.norm.requires_grad_(False)
    decayed, kept = parameter_groups(model, args.weight_decay)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.03, 0.0)
    assert {parameter.dim() for parameter in decayed["params"]} == {2}
    assert {parameter.dim() for parameter in kept["params"]} == {1}
    assert len(decayed["params"]) == 2 + 2 * 5
    assert len(kept["params"]) == 2 * 2  # 末尾的归一化已冻结


# ---------------------------------------------------------------------------------------------------------------------
# 观察一次真实的训练：LoRA，ZeRO-3 offload，两个进程，26 行，全局 batch 8（每轮 4 步，最后一步 2 行），4 轮

OBSERVED_ROWS, OBSERVED_EPOCHS, STEPS_PER_EPOCH = 26, 4, 4
NUM_STEPS = OBSERVED_EPOCHS * STEPS_PER_EPOCH
PEAK = 2e-2


class Observed:
    """一次观察的全部结果。"""

    def __init__(self, run: Launch, output: Path, base: Path, seen: list[dict], directory: Path):
        self.run, self.output, self.base, self.seen, self.directory = run, output, base, seen, directory


@pytest.fixture(scope="module")
def observed(tiny_checkpoint, tmp_path_factory) -> Observed:
    directory = tmp_path_factory.mktemp("observed")
    base = tiny_checkpoint("baichuan2-7b", **SIZES)
    flags = flags_of(
        rows=write_rows(directory / "rows.json", OBSERVED_ROWS), model=base, output=directory / "output", ds=ZERO3,
        train_type="lora", lora_module_name="all-linear", lora_dropout=0.5, learning_rate=PEAK, warmup_ratio=0.25,
        weight_decay=0.02, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        num_train_epochs=OBSERVED_EPOCHS, save_model_step=6, show_loss_step=5, gradient_checkpointing=True,
        eval_path=write_rows(directory / "eval.json", 5, start=100),
    )  # fmt: skip
    run = launch(flags, num_ranks=2, script=WORKER, env={"OBSERVE_DIR": str(directory)})
    assert run.returncode == 0, run.tail()
    seen = [read_json(directory / f"seen-{rank}.json") for rank in range(2)]
    return Observed(run, directory / "output", base, seen, directory)


def test_loss_falls(observed):
    losses = observed.run.losses
    assert losses[-1] < losses[0] - 0.5, losses
    evaluated = [record["eval/nll"] for record in observed.run.records if "eval/nll" in record]
    assert len(evaluated) == OBSERVED_EPOCHS
    assert evaluated[-1] < evaluated[0]


def test_global_step_has_one_source(observed):
    """26 行除不尽全局 batch 8：日志、引擎、检查点的步数仍然一致。"""
    assert [record["step"] for record in observed.run.records if "loss" in record] == [1, 5, 10, 15, 16]
    for seen in observed.seen:
        assert [step["step"] for step in seen["steps"]] == list(range(1, NUM_STEPS + 1))
    assert checkpoints_in(observed.output) == [
        "epoch-1-step-4",
        "epoch-2-step-6",
        "epoch-2-step-8",
        "epoch-3-step-12",
        "epoch-4-step-16",
    ]
    for name in checkpoints_in(observed.output):
        run_config = read_json(observed.output / name / "run_config.json")
        assert name == f"epoch-{run_config['epoch']}-step-{run_config['global_step']}"


def test_every_row_once_an_epoch_in_a_new_order(observed):
    orders = []
    for epoch in range(OBSERVED_EPOCHS):
        steps = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
        rows = [[line for seen in observed.seen for _, line in seen["steps"][step]["rows"]] for step in steps]
        assert [len(step) for step in rows] == [8, 8, 8, 2]
        assert sorted(line for step in rows for line in step) == list(range(1, OBSERVED_ROWS + 1))
        orders.append([sorted(step) for step in rows])
    assert len({json.dumps(order) for order in orders}) == OBSERVED_EPOCHS


def test_learning_rate_follows_the_flags(observed):
    """预热 4 步：s/5；之后余弦降到峰值的十分之一。"""
    found = {record["step"]: record["lr"] for record in observed.run.records if "lr" in record}
    for step, rate in found.items():
        progress = (step - 4) / (NUM_STEPS - 4)
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
        assert rate == pytest.approx(PEAK * (step / 5 if step <= 4 else cosine), rel=1e-9)
    ds_config = read_json(observed.output / "ds_config.json")
    assert ds_config["optimizer"]["params"]["weight_decay"] == 0.02
    assert ds_config["train_micro_batch_size_per_gpu"] == 2


def observed_samples(batch: dict, name: str) -> list[list[int]]:
    """记下的 micro batch 里各样本的 input_ids 或 labels，接回共用的开头。"""
    return [values.tolist() for values in whole_samples({**batch, name: torch.tensor(batch[name])}, name)]


def test_train_log_has_what_was_promised(observed):
    total = 0
    for record in (record for record in observed.run.records if "loss" in record):
        assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "elapsed_seconds"} <= set(
            record
        )
        assert record["epoch"] == record["step"] / STEPS_PER_EPOCH
        assert 0 < record["grad_norm"] < 1e3
        total += record["tokens"]
    lengths = [
        len(ids)
        for seen in observed.seen for step in seen["steps"] for batch in step["batches"]
        if any(label != -100 for label in batch["labels"][0])
        for ids in observed_samples(batch, "input_ids")
    ]  # fmt: skip
    assert total == sum(lengths)
    assert (observed.output / "loss.png").is_file()
    assert list((observed.output / "runs").glob("events.out.tfevents.*"))


def test_both_ranks_have_equally_many_micro_batches(observed):
    for first, second in zip(*(seen["steps"] for seen in observed.seen), strict=True):
        assert len(first["batches"]) == len(second["batches"])
        assert first["targets"] == second["targets"]
        found = sum(
            label != -100 for step in (first, second) for batch in step["batches"] for label in batch["labels"][0]
        )
        assert found == first["targets"]


def test_eos_follows_every_whole_answer_and_no_cut_one(observed):
    config = load_config(observed.base)
    tokenizer = load_tokenizer(observed.base, config.vocab_size)
    prompting = resolve_prompt_format("auto", observed.base, config)
    rows = BaichuanDataSet(
        observed.directory / "rows.json", tokenizer, max_len=96, max_src_len=64, **prompting._asdict()
    )
    cut = {line: rows[i].tgt_truncated for i, line in enumerate(rows.lines)}
    assert 3 <= sum(cut.values()) <= OBSERVED_ROWS - 3  # 两种都有
    eos, num_checked = tokenizer.eos_token_id, 0
    for seen in observed.seen:
        for step in seen["steps"]:
            lines = iter(line for _, line in step["rows"])
            for batch in step["batches"]:
                samples = (observed_samples(batch, name) for name in ("input_ids", "labels"))
                for own_ids, own_labels in zip(*samples, strict=True):
                    if all(label == -100 for label in own_labels):
                        assert own_ids == [tokenizer.pad_token_id]  # 空的 micro batch
                        continue
                    is_cut = cut[next(lines)]
                    assert (own_ids[-1] == eos) is not is_cut
                    assert (own_labels[-1] == eos) is not is_cut
                    assert own_ids.count(eos) == own_labels.count(eos) == (not is_cut)
                    num_checked += 1
            assert next(lines, None) is None
    assert num_checked == OBSERVED_ROWS * OBSERVED_EPOCHS


def test_ranks_start_equal_and_drop_differently(observed):
    first, second = observed.seen
    assert first["initial"] == second["initial"]
    assert len(first["initial"]) == 2 * 2 * 5  # 两层 × A、B × 五个线性层
    assert sum(first["dropout"]) not in (0, 64)
    assert first["dropout"] != second["dropout"]


def test_each_rank_holds_only_its_part(observed):
    for seen in observed.seen:
        assert len(seen["parts"]) > 17
        for name, (whole, local) in seen["parts"].items():
            assert local == math.ceil(whole / 2), name


def test_saved_adapter_is_whole_and_not_zero(observed):
    for name in checkpoints_in(observed.output):
        tensors = load_file(observed.output / name / "adapter_model.safetensors")
        widths = {
            "W_pack": (32, 96),
            "o_proj": (32, 32),
            "gate_proj": (32, 48),
            "up_proj": (32, 48),
            "down_proj": (48, 32),
        }
        expected = {}
        for layer in range(2):
            for module, (inputs, outputs) in widths.items():
                part = "self_attn" if module in ("W_pack", "o_proj") else "mlp"
                prefix = f"base_model.model.model.layers.{layer}.{part}.{module}"
                expected |= {f"{prefix}.lora_A.weight": (8, inputs), f"{prefix}.lora_B.weight": (outputs, 8)}
        assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
        for key, tensor in tensors.items():
            assert tensor.ne(0).float().mean() > 0.9, f"{name} {key}"


def test_checkpoint_gives_the_logits_of_training(observed):
    previous = None
    for name in checkpoints_in(observed.output):
        assert verify_checkpoint(observed.output / name) == []
        expected = load_file(observed.directory / f"{name}.safetensors")["logits"]
        found = reload_logits(observed.output / name, observed.base)
        torch.testing.assert_close(found[PROBE_MASK == 1], expected[PROBE_MASK == 1], rtol=1e-5, atol=2e-5)
        assert previous is None or not torch.allclose(found, previous, atol=1e-3)  # 训练确实在动
        previous = found
        assert AutoTokenizer.from_pretrained(observed.output / name).eos_token_id == 2


def test_run_config_tells_everything(observed):
    run_config = read_json(observed.output / "epoch-4-step-16" / "run_config.json")
    assert (run_config["train_type"], run_config["prompt_format"], run_config["world_size"]) == ("lora", "plain", 2)
    assert run_config["args"]["max_src_len"] == 64
    assert run_config["args"]["learning_rate"] == PEAK
    assert run_config["base_model"]["path"] == str(observed.base)
    assert run_config["base_model"]["absolute_path"] == str(observed.base.resolve())
    assert set(run_config["base_model"]["hashes"]) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }


# ---------------------------------------------------------------------------------------------------------------------
# 用户的错误：说清楚，非零退出，不留下像是完整的东西


def failing_runs(tiny_checkpoint, directory: Path) -> dict[str, tuple[list[str], str]]:
    """任务名 → (参数, 输出里应有的文字)。"""
    good = tiny_checkpoint("baichuan2-7b", **SIZES)
    rows = write_rows(directory / "rows.json", 4)

    def damaged(name: str, damage, **options) -> Path:
        path = Path(shutil.copytree(tiny_checkpoint("baichuan2-7b", **SIZES, **options), directory / name))
        damage(path)
        return path

    def cut_weights(path: Path):
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])

    def nan_weight(path: Path):
        tensors = load_file(path / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    def content(name: str, text: str) -> Path:
        (directory / name).write_text(text, encoding="utf-8")
        return directory / name

    def task(name: str, *flags: str, model: Path = good, data: Path = rows, **options) -> list[str]:
        return [*flags_of(rows=data, model=model, output=directory / f"output-{name}", **options), *flags]

    broken = content(
        "broken.json", '{"instruction": "问", "output": "答"}\n{"instruction": "问"}\n{"instruction": 3,\n'
    )
    small = tiny_checkpoint("baichuan2-7b", **SIZES, vocab_size=600)

    return {
        "max_src_len": (task("max_src_len", max_src_len=96), "--max_src_len(96) 必须小于 --max_len(96)，请调小前者"),
        "foreign": (task("foreign", train_type="full", lora_dim=4), "--lora_dim 属于 --train_type lora"),
        "unknown_value": (task("unknown_value", train_type="qlora"), "参数错误：argument --train_type"),
        "empty": (task("empty", data=content("empty.json", "")), "empty.json 是空的（0 字节），没有任何样本"),
        "blank": (task("blank", data=content("blank.json", "\n \n")), "blank.json 里没有任何样本（只有空白）"),
        "broken_rows": (task("broken_rows", data=broken), f"{broken}:2: output:"),
        "no_weights": (
            task("no_weights", model=damaged("no_weights", lambda path: (path / "model.safetensors").unlink())),
            "里没有权重文件",
        ),
        "cut_weights": (task("cut_weights", model=damaged("cut_weights", cut_weights)), "model.safetensors（"),
        "no_shard": (
            task("no_shard", model=damaged(
                "no_shard", lambda path: next(path.glob("model-00002*")).unlink(), max_shard_size="100KB")),
            "缺少权重分片 ['model-00002-of-",
        ),
        "wrong_tokenizer": (
            task("wrong_tokenizer", model=damaged(
                "wrong_tokenizer",
                lambda path: [shutil.copy(small / name, path) for name in ("config.json", "model.safetensors")])),
            "的分词器有 2000 个词，config.json 的 vocab_size 只有 600：分词器与权重不是一套",
        ),
        "freeze_name": (
            task("freeze_name", train_type="freeze", freeze_module_name="layers.27."),
            "--freeze_module_name 的 ['layers.27.'] 没有匹配到任何参数",
        ),
        "fp16": (task("fp16", precision="fp16"), "--precision fp16"),
        "nan": (
            task("nan", model=damaged("nan", nan_weight), train_type="full"),
            "rank 0：第 1 步的损失是 nan，没有更新权重；精度 fp32，本进程的数据行：",
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def failures(tiny_checkpoint, tmp_path_factory) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("failures")
    expected = failing_runs(tiny_checkpoint, directory)
    tasks = {name: flags for name, (flags, _) in expected.items()}
    for name in tasks:  # 上一次训练的结果
        (directory / f"output-{name}").mkdir()
        (directory / f"output-{name}" / "train_log.jsonl").touch()
    (directory / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    run = launch(
        ["--failures", directory / "tasks.json"], script=WORKER, env={"OBSERVE_DIR": str(directory)}, launcher=False
    )
    assert run.returncode == 0, run.tail()
    return directory, expected


@pytest.mark.parametrize(
    "name",
    [
        "max_src_len",
        "foreign",
        "unknown_value",
        "empty",
        "blank",
        "broken_rows",
        "no_weights",
        "cut_weights",
        "no_shard",
        "wrong_tokenizer",
        "freeze_name",
        "fp16",
        "nan",
    ],
)
def test_a_mistake_is_told_and_leaves_nothing(failures, name):
    directory, expected = failures
    if name == "fp16" and torch.cuda.is_available():
        pytest.skip("这里有 GPU，可以用 fp16")
    result = read_json(directory / f"{name}.json")
    assert expected[name][1] in result["output"]
    assert "Traceback" not in result["output"]
    assert result["code"] in (1, 2)
    assert checkpoints_in(directory / f"output-{name}") == []


def test_every_mistake_is_looked_at(failures):
    names = test_a_mistake_is_told_and_leaves_nothing.pytestmark[0].args[1]
    assert set(names) == set(failures[1])


@pytest.mark.parametrize(
    "name", ["no_weights", "cut_weights", "no_shard", "wrong_tokenizer", "broken_rows", "freeze_name", "empty"]
)
def test_a_mistake_does_not_move_the_earlier_run(failures, name):
    """输入有错的命令不应先把上一次的结果挪走。"""
    directory, _ = failures
    assert [path.name for path in (directory / f"output-{name}").iterdir()] == ["train_log.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# 较慢的


@pytest.mark.slow
def test_nan_stops_both_ranks_through_the_launcher(tiny_checkpoint, tmp_path):
    model = Path(shutil.copytree(tiny_checkpoint("baichuan2-13b", **SIZES), tmp_path / "nan"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.W_pack.weight"][0] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    rows, output = write_rows(tmp_path / "rows.json", 8), tmp_path / "output"
    run = launch(flags_of(rows=rows, model=model, output=output, ds=ZERO3, train_type="lora"), num_ranks=2)
    assert run.returncode != 0
    assert run.seconds < 120
    assert "第 1 步的损失是 nan，没有更新权重" in run.output
    assert "请检查这些行与基座权重，" in run.output
    assert "Traceback" not in run.output
    assert checkpoints_in(output) == []
    assert run.records == []
    dumps = sorted((output / "bad_steps").iterdir())
    assert [path.name for path in dumps] == ["step-1-rank-0.json", "step-1-rank-1.json"]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in dumps]
    told = [one["row"] for batch in found for micro in batch["micro_batches"] for one in micro["samples"]]
    assert {*told} <= {f"{rows}:{line}" for line in range(1, 9)} and len(told) == len({*told}) > 0


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_mistake_ends_all_ranks_through_the_launcher(tiny_checkpoint, tmp_path, num_ranks):
    model = Path(shutil.copytree(tiny_checkpoint("baichuan2-7b", **SIZES), tmp_path / "cut"))
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1000])
    rows, output = write_rows(tmp_path / "rows.json", 8), tmp_path / "output"
    run = launch(flags_of(rows=rows, model=model, output=output), num_ranks=num_ranks)
    assert run.returncode != 0
    assert run.output.count("损坏或不完整，请重新下载并核对大小") == 1
    assert "Traceback" not in run.output


@pytest.mark.slow
def test_the_same_command_again_overwrites_nothing(tiny_checkpoint, tmp_path):
    rows, output = write_rows(tmp_path / "rows.json", 6), tmp_path / "output"
    flags = flags_of(
        rows=rows, model=tiny_checkpoint("baichuan-7b", **SIZES), output=output, train_type="full", num_train_epochs=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=1,
    )  # fmt: skip
    first = launch(flags)
    assert first.returncode == 0, first.tail()
    content = {path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    (output / "mine.txt").write_text("别动", encoding="utf-8")
    (output / ".tmp-epoch-1-step-2").mkdir()
    second = launch(flags)
    assert second.returncode == 0, second.tail()
    assert f"移到了 {output / 'previous-1'}" in second.output
    moved = output / "previous-1"
    assert {path.relative_to(moved): path.read_bytes() for path in moved.rglob("*") if path.is_file()} == content
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [
            "epoch-1-step-3",
            "ds_config.json",
            "loss.png",
            "mine.txt",
            "previous-1",
            "run_config.json",
            "runs",
            "train_log.jsonl",
        ]
    )
    # 同样的命令，同样的种子：同样的损失
    assert [record["loss"] for record in second.records] == [record["loss"] for record in first.records]


@pytest.mark.slow
@pytest.mark.parametrize(("num_steps", "rows"), [(1, 2), (2, 8)])
def test_a_run_of_one_or_two_steps(tiny_checkpoint, tmp_path, num_steps, rows):
    output = tmp_path / "output"
    flags = flags_of(
        rows=write_rows(tmp_path / "rows.json", rows), model=tiny_checkpoint("baichuan2-13b", **SIZES), output=output,
        train_type="ptuning", per_device_train_batch_size=4, gradient_accumulation_steps=1, num_train_epochs=1,
    )  # fmt: skip
    run = launch(flags)
    assert run.returncode == 0, run.tail()
    assert [record["step"] for record in run.records] == list(range(1, num_steps + 1))
    assert run.records[0]["lr"] == TRAIN_METHODS["ptuning"].learning_rate  # 没有预热
    assert checkpoints_in(output) == [f"epoch-1-step-{num_steps}"]
    assert (output / "loss.png").is_file()


@pytest.fixture
def small_disk(tmp_path):
    """返回 `small_disk(size) -> Path`：装满就没有空间的目录（tmpfs，需要 root）。"""
    mounted = []

    def mount(size: str) -> Path:
        path = tmp_path / "disk"
        path.mkdir()
        if os.geteuid() != 0:
            pytest.skip("没有 root 权限，不能挂载 tmpfs，跳过磁盘满的测试")
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True
        )
        if result.returncode:
            pytest.skip(f"这里不能挂载 tmpfs（{result.stderr.strip()}），跳过磁盘满的测试")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "ds", "num_ranks", "size"), [("full", ZERO3, 2, "400k"), ("lora", ZERO2, 1, "220k")]
)
def test_a_full_disk_at_save(tiny_checkpoint, tmp_path, small_disk, method, ds, num_ranks, size):
    disk = small_disk(size)
    flags = flags_of(
        rows=write_rows(tmp_path / "rows.json", 8), model=tiny_checkpoint("baichuan2-7b", **SIZES), ds=ds,
        output=disk / "output", train_type=method, logging_dir=tmp_path / "runs", per_device_train_batch_size=4,
        num_train_epochs=1,
    )  # fmt: skip
    if method == "lora":
        flags += ["--lora_dim", "64", "--lora_module_name", "all-linear"]
    run = launch(flags, num_ranks=num_ranks)
    assert run.returncode != 0
    assert f"保存 {disk / 'output' / 'epoch-1-step-1'} 失败：" in run.output
    assert "请检查磁盘空间与写权限" in run.output
    assert "Traceback" not in run.output
    assert checkpoints_in(disk / "output") == []
    assert len(run.records) == 1


@pytest.mark.slow
def test_an_output_dir_that_cannot_be_written(tiny_checkpoint, tmp_path):
    (tmp_path / "file").touch()
    run = launch(
        flags_of(
            rows=write_rows(tmp_path / "rows.json", 4), model=tiny_checkpoint("baichuan2-7b", **SIZES),
            output=tmp_path / "file" / "output",
        ),
        num_ranks=2,
    )  # fmt: skip
    assert run.returncode != 0
    assert f"--output_dir {tmp_path / 'file' / 'output'} 不能写：Not a directory" in run.output
    assert "Traceback" not in run.output


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "hidden_size"), [(2, 512), (4, 1024)])
def test_loading_under_zero3_takes_the_memory_of_a_part(tiny_checkpoint, tmp_path, num_ranks, hidden_size):
    """每个进程加载时的峰值 = 自己的一份 + 一两个张量，不是整个模型。"""
    model = tiny_checkpoint("baichuan2-7b", layers=12, hidden_size=hidden_size, heads=8)
    tensors = [tensor.numel() * 4 / 2**20 for tensor in load_file(model / "model.safetensors").values()]
    whole, largest = sum(tensors), max(tensors)
    assert whole > 140
    flags = flags_of(
        rows=write_rows(tmp_path / "rows.json", 2), model=model, output=tmp_path / "output", ds=ZERO3,
        train_type="lora", per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=1,
    )  # fmt: skip
    run = launch(flags, num_ranks=num_ranks, script=WORKER, env={"OBSERVE_DIR": str(tmp_path)})
    assert run.returncode == 0, run.tail()
    part = whole / num_ranks
    for rank in range(num_ranks):
        memory = read_json(tmp_path / f"seen-{rank}.json")["memory"]
        grown = memory["peak_mb"] - memory["start_mb"]
        print(f"进程 {rank}/{num_ranks}：模型 {whole:.0f} MB，加载的峰值 {grown:.0f} MB")
        # 下界略小于一份：有的内存是进程早先用过、没有还给系统的
        assert 0.8 * part < grown < part + 3 * largest + 25, (memory, whole, largest)


@pytest.mark.slow
@pytest.mark.parametrize("ds", [ZERO2, ZERO3], ids=["zero2", "zero3"])
@pytest.mark.parametrize("method", list(GRADIENT_ROWS))
def test_bf16_checkpoints_give_the_logits_of_training(tiny_checkpoint, tmp_path, method, ds):
    arch, extra = GRADIENT_ROWS[method]
    base, output = tiny_checkpoint(arch, **SIZES, dtype="bfloat16"), tmp_path / "output"
    flags = flags_of(
        rows=write_rows(tmp_path / "rows.json", 16), model=base, output=output, ds=ds, train_type=method,
        precision="bf16", per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=5e-3,
        num_train_epochs=1,
    )  # fmt: skip
    run = launch([*flags, *extra], script=WORKER, env={"OBSERVE_DIR": str(tmp_path)})
    assert run.returncode == 0, run.tail()
    path = output / "epoch-1-step-4"
    is_adapter = (path / "adapter_config.json").is_file()
    model = BaichuanForCausalLM.from_pretrained(base if is_adapter else path, dtype=torch.bfloat16)
    if is_adapter:
        model = PeftModel.from_pretrained(model, path, autocast_adapter_dtype=False)
    with torch.no_grad():
        found = model.eval()(input_ids=PROBE_IDS, attention_mask=PROBE_MASK).logits.float()
    expected = load_file(tmp_path / "epoch-1-step-4.safetensors")["logits"]
    torch.testing.assert_close(found[PROBE_MASK == 1], expected[PROBE_MASK == 1], rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# 用户的四条命令，一字不改（只在前面加 LOCAL_SIZE）


def can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


@pytest.fixture(scope="module")
def user_project(tiny_checkpoint, tmp_path_factory) -> Path:
    """项目的一份副本：160 行数据，baichuan-6B/ 与 baichuan2-6B/ 是 32 层的微型检查点。"""
    project = tmp_path_factory.mktemp("project")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.json")]:
        shutil.copy(path, project)
    shutil.copytree(ROOT / "baichuan", project / "baichuan", ignore=shutil.ignore_patterns("__pycache__"))
    (project / "data").mkdir()
    write_rows(project / "data" / "spo_0.json", 160)
    for name, arch in (("baichuan-6B", "baichuan-7b"), ("baichuan2-6B", "baichuan2-7b")):
        shutil.copytree(tiny_checkpoint(arch, **{**SIZES, "layers": 32}), project / name)
    return project


@pytest.mark.slow
@pytest.mark.parametrize("model", ["baichuan-6B/", "baichuan2-6B/"])
@pytest.mark.parametrize(("cards", "num_steps"), [("0", 80), ("0,1,2,3", 20)], ids=["1card", "4cards"])
def test_user_commands_run_verbatim(user_project, cards, model, num_steps):
    num_ranks = len(cards.split(","))
    command = f"CUDA_VISIBLE_DEVICES={cards} deepspeed --master_port 520 train.py \\" + USER_COMMAND.replace(
        "baichuan-6B/", model
    )
    port = 520
    deadline = time.monotonic() + 20  # 前一条命令的套接字可能还没有完全关上
    while not can_bind(port) and time.monotonic() < deadline:
        time.sleep(0.5)
    if not can_bind(port):
        port = free_port()
        warnings.warn(f"端口 520 在这里不能用（被占用，或没有 root 权限），改用 {port}", stacklevel=1)
        command = command.replace("--master_port 520", f"--master_port {port}")
    environment = {name: value for name, value in cpu_environment(num_ranks).items() if name != "CUDA_VISIBLE_DEVICES"}
    environment.pop("LOCAL_SIZE")
    prefix = "" if torch.cuda.is_available() else f"LOCAL_SIZE={num_ranks} "
    code, output, _ = run_group([(["bash", "-c", prefix + command], environment)], user_project, 900, port)
    assert code == 0, output[-4000:]

    result = user_project / "output-baichuan"
    lines = (result / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1, *range(10, num_steps + 1, 10)]
    assert [record["epoch"] for record in records][-1] == 2.0
    assert records[-1]["loss"] < records[0]["loss"]
    assert checkpoints_in(result) == [f"epoch-1-step-{num_steps // 2}", f"epoch-2-step-{num_steps}"]
    saved = load_file(result / f"epoch-2-step-{num_steps}" / "model.safetensors")
    original = load_file(user_project / model / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, tensor in saved.items():  # 恰好只有这四层变了
        is_trained = any(f"layers.{layer}." in name for layer in (24, 25, 26, 27))
        is_same = torch.equal(tensor, original[name].to(tensor.dtype))
        assert is_same or is_trained, name
        assert not is_same or not is_trained or tensor.dim() == 1, name  # bf16 里归一化权重可能一步都舍掉
    shutil.rmtree(result)
