"""检查点：原子改名，左右不留残余；移走的只是我们写的；清单能发现任何改动；每种方法的目录里恰好是这些文件。"""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from asserting import lacks
from paths import ROOT
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.checkpoint import save as save_module
from finetune.checkpoint.__main__ import hash_directory, hash_problems
from finetune.checkpoint.__main__ import main as checkpoint_main
from finetune.checkpoint.base_model import load_config, load_tokenizer
from finetune.checkpoint.manifest import verify_checkpoint
from finetune.checkpoint.output_dir import RUN_RESULTS, iter_checkpoints, remove_leftovers, set_aside_previous_run
from finetune.checkpoint.save import save_checkpoint
from finetune.checkpoint.weights import ShardedWriter
from finetune.cli.train_flags import parse_args
from finetune.methods.registry import TRAIN_METHODS
from model_factory import build_model
from utils import file_sha256

SIZES = {"layers": 2, "hidden_size": 32, "heads": 4, "intermediate_size": 48}
TOKENIZER_FILES = {"tokenizer.model", "tokenizer_config.json"}
FULL = {"config.json", "generation_config.json", "model.safetensors"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
COMMON = {"run_config.json", "manifest.json", *TOKENIZER_FILES}
# (方法, 它的参数, 目录里除 COMMON 之外的文件)
METHOD_ROWS = [
    ("freeze", ["--freeze_module_name", "layers.1."], FULL),
    ("lora", ["--lora_module_name", "all-linear"], ADAPTER),
    ("ptuning", ["--pre_seq_len", "4"], ADAPTER),
    ("ptuning", ["--pre_seq_len", "4", "--prefix_projection", "--prefix_hidden_size", "24"], ADAPTER),
    ("ptuning", ["--pre_seq_len", "4", "--ptuning_version", "1", "--prefix_hidden_size", "24"], ADAPTER),
    ("full", [], FULL),
]
IDS = torch.arange(30, 45).view(1, -1)


@pytest.fixture
def engine_of(tiny_checkpoint):
    """返回 `engine_of(method, *flags, arch=…) -> (engine, tokenizer)`：可训练的参数都已离开初值，像训练过一样。

    单进程、不切分时 save_checkpoint 只用到引擎的 module 与 global_steps；真的引擎见 test_train.py。
    """

    def build(method: str, *flags: str, arch: str = "baichuan2-13b"):
        path = tiny_checkpoint(arch, **SIZES)
        required = ["--train_path", "-", "--output_dir", "-", "--model_name_or_path", str(path)]
        args = parse_args([*required, "--train_type", method, *flags])
        config = load_config(path)
        model = build_model(args, config, "fp32", {})
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        return SimpleNamespace(module=model, global_steps=7), load_tokenizer(path, config.vocab_size)

    return build


@pytest.fixture
def saved(engine_of, tmp_path) -> Path:
    engine, tokenizer = engine_of("lora")
    return save_checkpoint(engine, tokenizer, {"train_type": "lora"}, tmp_path, 1)


def files_of(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


# ---- 保存 ----


@pytest.mark.parametrize(("method", "flags", "own_files"), METHOD_ROWS)
def test_exactly_these_files_and_they_load_again(engine_of, tmp_path, tiny_checkpoint, method, flags, own_files):
    engine, tokenizer = engine_of(method, *flags)
    path = save_checkpoint(engine, tokenizer, {"train_type": method, "world_size": 1}, tmp_path, epoch=2)
    assert path == tmp_path / "epoch-2-step-7"
    assert [entry.name for entry in tmp_path.iterdir()] == ["epoch-2-step-7"]
    assert files_of(path) == own_files | COMMON
    assert verify_checkpoint(path) == []
    run_config = json.loads((path / "run_config.json").read_text(encoding="utf-8"))
    assert run_config == {"train_type": method, "world_size": 1, "epoch": 2, "global_step": 7}

    with torch.no_grad():
        expected = engine.module.eval()(IDS).logits
        if own_files is FULL:
            again, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
            assert not any(info.values())
        else:
            base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("baichuan2-13b", **SIZES), dtype=torch.float32)
            again = PeftModel.from_pretrained(base, path)
        torch.testing.assert_close(again.eval()(IDS).logits, expected, rtol=0, atol=1e-5)
        assert AutoTokenizer.from_pretrained(path)("你好")["input_ids"] == tokenizer("你好")["input_ids"]


def test_the_rows_above_name_every_method():
    assert {method for method, _, _ in METHOD_ROWS} == set(TRAIN_METHODS)


@pytest.mark.parametrize(
    ("method", "flags", "names"),
    [
        (
            "lora",
            [],
            {f"base_model.model.model.layers.{i}.self_attn.W_pack.lora_{p}.weight" for i in (0, 1) for p in "AB"},
        ),
        ("ptuning", ["--prefix_projection"], {"prompt_embeddings"}),
    ],
)
def test_adapter_tensors_have_the_names_of_peft(engine_of, tmp_path, method, flags, names):
    engine, tokenizer = engine_of(method, *flags)
    path = save_checkpoint(engine, tokenizer, {}, tmp_path, 1)
    tensors = load_file(path / "adapter_model.safetensors")
    assert set(tensors) == names
    assert all(tensor.any() for tensor in tensors.values())
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["inference_mode"] is True
    assert engine.module.active_peft_config.inference_mode is False  # 训练还要继续


def test_saved_config_says_the_architecture(engine_of, tmp_path):
    engine, tokenizer = engine_of("full", arch="baichuan-13b")
    path = save_checkpoint(engine, tokenizer, {}, tmp_path, 1)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    assert (config["position_embedding"], config["norm_head"], config["model_type"]) == ("alibi", False, "baichuan")


def test_a_step_is_saved_once(engine_of, tmp_path):
    engine, tokenizer = engine_of("lora")
    first = save_checkpoint(engine, tokenizer, {"run": 1}, tmp_path, 1)
    content = file_sha256(first / "manifest.json")
    assert save_checkpoint(engine, tokenizer, {"run": 2}, tmp_path, 1) == first
    assert file_sha256(first / "manifest.json") == content


def test_save_state_is_part_of_the_checkpoint(engine_of, tmp_path):
    engine, tokenizer = engine_of("lora")

    def save_state(directory: Path):
        assert directory.name == ".tmp-epoch-1-step-7"  # 先写进看不见的目录
        (directory / "state").mkdir()
        (directory / "state" / "optimizer.bin").write_bytes(b"state")

    path = save_checkpoint(engine, tokenizer, {}, tmp_path, 1, save_state)
    assert "state/optimizer.bin" in json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert verify_checkpoint(path) == []


def test_no_umask_surprise(saved):
    """safetensors 建的文件只有属主可读；检查点的各文件权限应当一致，别人也能用。"""
    assert len({path.stat().st_mode & 0o777 for path in saved.iterdir()}) == 1


@pytest.mark.parametrize(
    ("method", "step"), [("full", "model"), ("lora", "adapter"), ("lora", "tokenizer"), ("lora", "rename")]
)
def test_a_failed_write_leaves_nothing(engine_of, tmp_path, monkeypatch, method, step):
    engine, tokenizer = engine_of(method)
    engine.global_steps = 6
    earlier = save_checkpoint(engine, tokenizer, {}, tmp_path, 1)
    engine.global_steps = 7

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {
        "model": (ShardedWriter, "_write"),
        "adapter": (save_module, "save_file"),
        "tokenizer": (type(tokenizer), "save_pretrained"),
        "rename": (os, "rename"),
    }[step]
    monkeypatch.setattr(*target, fail)
    with pytest.raises(RuntimeError) as caught:
        save_checkpoint(engine, tokenizer, {}, tmp_path, 1)
    assert lacks(str(caught.value), "rank 0：", tmp_path / "epoch-1-step-7", "No space left on device") == []
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-1-step-6"]
    assert verify_checkpoint(earlier) == []


# ---- 清单 ----


def test_verify_finds_a_flipped_bit_in_every_file(saved):
    for name in sorted(files_of(saved) - {"manifest.json"}):
        path = saved / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        (problem,) = verify_checkpoint(saved)
        assert problem.startswith(f"{name}: ") and "SHA-256" in problem
        path.write_bytes(content)
    assert verify_checkpoint(saved) == []


def test_verify_finds_truncated_missing_and_extra_files(saved):
    weights = saved / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    (saved / "tokenizer.model").unlink()
    (saved / "notes.txt").write_text("x", encoding="utf-8")
    assert verify_checkpoint(saved) == [
        f"adapter_model.safetensors: 大小 {len(content) - 1}，清单记为 {len(content)}",
        "tokenizer.model: 不存在",
        "notes.txt: 不在清单里",
    ]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "manifest.json 损坏：.*不是合法的 JSON"),
        ("[]", "manifest.json 损坏："),
        ("{}", "manifest.json 损坏："),
        ('{"files": [1]}', "manifest.json 损坏："),
        ('{"files": {"run_config.json": 3}}', "run_config.json"),
        ('{"files": {"../outside": {"bytes": 1, "sha256": ""}}}', "../outside: 清单里的路径指向目录之外"),
        ('{"files": {"/etc/hosts": {"bytes": 1, "sha256": ""}}}', "/etc/hosts: 清单里的路径指向目录之外"),
    ],
)
def test_verify_of_a_broken_manifest(saved, manifest, message):
    (saved / "manifest.json").write_text(manifest, encoding="utf-8")
    assert re.search(message, verify_checkpoint(saved)[0])


def test_verify_without_a_manifest(saved):
    (saved / "manifest.json").unlink()
    (problem,) = verify_checkpoint(saved)
    assert "manifest.json" in problem


def test_manifest_counts_tensors(saved):
    manifest = json.loads((saved / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["step"], manifest["tensors"]) == (7, 4)  # 两层 × A、B
    assert manifest["files"]["run_config.json"]["sha256"] == file_sha256(saved / "run_config.json")


@pytest.mark.deepspeed
def test_verify_at_the_command_line(saved):
    def verify(directory: Path):
        command = [sys.executable, "-m", "finetune.checkpoint", "verify", str(directory)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    good = verify(saved)
    assert (good.returncode, good.stdout) == (0, f"{saved}：完整\n")
    (saved / "run_config.json").write_text("{}", encoding="utf-8")
    bad = verify(saved)
    assert bad.returncode == 1
    assert bad.stdout.splitlines()[0].startswith("run_config.json: 大小 2，清单记为 ")
    assert bad.stdout.splitlines()[1] == f"{saved}：1 处问题"


# ---- 查找与整理 ----


def test_checkpoints_are_listed_from_new_to_old(tmp_path):
    for name in ("epoch-1-step-9", "epoch-2-step-10", "epoch-10-step-100", ".tmp-epoch-3-step-200", "epoch-x-step-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "epoch-9-step-999").touch()  # 文件不是检查点
    assert [(step, epoch, path.name) for step, epoch, path in iter_checkpoints(tmp_path)] == [
        (100, 10, "epoch-10-step-100"),
        (10, 2, "epoch-2-step-10"),
        (9, 1, "epoch-1-step-9"),
    ]
    assert list(iter_checkpoints(tmp_path / "absent")) == []


def test_leftovers_are_removed(tmp_path, capsys):
    (tmp_path / ".tmp-epoch-1-step-3" / "sub").mkdir(parents=True)
    (tmp_path / ".tmp-run_config.json").touch()
    for kept in ("epoch-1-step-2", "mine"):
        (tmp_path / kept).mkdir()
    (tmp_path / ".hidden").touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "epoch-1-step-2", "mine"]
    assert f" {tmp_path / '.tmp-epoch-1-step-3'}" in capsys.readouterr().out


def test_only_our_results_are_set_aside(tmp_path, capsys):
    foreign = ("mine.txt", "notes", "epoch-1", "model.safetensors", "previous-notes")

    def fill(number: int):
        for name in ("epoch-1-step-5", "epoch-2-step-10", "runs", "bad_steps"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "content").write_text(str(number), encoding="utf-8")
        for name in sorted(ours - {path.name for path in tmp_path.iterdir()}):
            (tmp_path / name).write_text(str(number), encoding="utf-8")

    for name in foreign:
        (tmp_path / name).mkdir()
    set_aside_previous_run(tmp_path)
    assert not (tmp_path / "previous-1").exists()  # 没有我们的结果，什么也不做

    ours = {
        "epoch-1-step-5",
        "epoch-2-step-10",
        "runs",
        "train_log.jsonl",
        "loss.png",
        "run_config.json",
        "ds_config.json",
        "bad_steps",
        "best.json",
        "forgetting.json",
        "summary.json",
    }
    assert set(RUN_RESULTS) <= ours
    for number in (1, 2, 3):
        fill(number)
        set_aside_previous_run(tmp_path)
        target = tmp_path / f"previous-{number}"
        assert {path.name for path in target.iterdir()} == ours
        assert (target / "epoch-1-step-5" / "content").read_text(encoding="utf-8") == str(number)
        assert f"{tmp_path} 里已有的 {'、'.join(sorted(ours))} 移到了 {target}" in capsys.readouterr().out
    previous = {f"previous-{number}" for number in (1, 2, 3)}
    assert {path.name for path in tmp_path.iterdir()} == {*foreign, *previous}


def test_a_continued_run_keeps_its_log_and_earlier_checkpoints(tmp_path):
    for name in ("epoch-1-step-5", "epoch-2-step-10", "epoch-2-step-8"):
        (tmp_path / name).mkdir()
    (tmp_path / "train_log.jsonl").touch()
    set_aside_previous_run(tmp_path, after_step=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-1-step-5",
        "epoch-2-step-8",
        "previous-1",
        "train_log.jsonl",
    ]
    assert [path.name for path in (tmp_path / "previous-1").iterdir()] == ["epoch-2-step-10"]


def test_a_used_number_is_never_used_again(tmp_path):
    (tmp_path / "previous-1").mkdir()
    (tmp_path / "previous-1" / "mine").touch()
    (tmp_path / "train_log.jsonl").touch()
    set_aside_previous_run(tmp_path)
    assert files_of(tmp_path) == {"previous-1/mine", "previous-2/train_log.jsonl"}


# ---- 任何目录的哈希 ----


def test_hash_of_any_directory(tmp_path):
    """与 sha256sum 同样的格式；以点开头的（下载工具的缓存）不算；--check 指出不符与缺少的文件。"""
    base = tmp_path / "base"
    (base / "part").mkdir(parents=True)
    (base / ".cache").mkdir()
    (base / ".cache" / "x").write_bytes(b"x")
    (base / "a.bin").write_bytes(b"abc")
    (base / "part" / "b.bin").write_bytes(b"")
    abc, empty = hashlib.sha256(b"abc").hexdigest(), hashlib.sha256(b"").hexdigest()
    assert hash_directory(base) == {"a.bin": abc, "part/b.bin": empty}

    listing = tmp_path / "hashes.txt"
    listing.write_text(f"{abc}  a.bin\n{empty} *part/b.bin\n", encoding="utf-8")
    assert hash_problems(hash_directory(base), listing) == []
    listing.write_text(f"{empty}  a.bin\n{abc}  c.bin\n", encoding="utf-8")
    problems = hash_problems(hash_directory(base), listing)
    assert [problem.partition(": ")[0] for problem in problems] == ["a.bin", "c.bin"]
    listing.write_text("不是哈希 a.bin\n", encoding="utf-8")
    with pytest.raises(ValueError, match="每一行应是"):
        hash_problems(hash_directory(base), listing)
    with pytest.raises(ValueError, match="nothing 不是目录，或里面没有文件"):
        hash_directory(tmp_path / "nothing")


def test_hash_mistakes_are_told_in_chinese(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.bin").touch()
    missing, listing = tmp_path / "nothing", tmp_path / "none.txt"
    for arguments, message in (
        ([missing], f"错误：{missing} 不是目录，或里面没有文件，请给出检查点的目录\n"),
        ([tmp_path, "--check", listing], f"错误：读不了 {listing}："),
    ):
        monkeypatch.setattr("sys.argv", ["finetune.checkpoint", "hash", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            checkpoint_main()
        captured = capsys.readouterr()
        assert (caught.value.code, captured.out) == (2, "")
        assert captured.err.startswith(message) and "usage" not in captured.err
