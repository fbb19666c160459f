"""train.py：真实的 deepspeed 进程，较慢的各种情形与用户的四条命令。"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from commands import USER_COMMAND
from launching import cpu_environment, free_port, launch, run_group
from paths import ROOT
from peft import PeftModel
from safetensors.torch import load_file, save_file
from train_runs import (
    GRADIENT_ROWS,
    SIZES,
    WORKER,
    ZERO2,
    ZERO3,
    checkpoints_in,
    flags_of,
    write_rows,
)
from train_worker import PROBE_IDS, PROBE_MASK

from baichuan import BaichuanForCausalLM
from finetune.methods.registry import TRAIN_METHODS
from utils import read_json

pytestmark = pytest.mark.deepspeed


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
    assert re.search("第 1 步.* nan", run.output)
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
    assert run.output.count(" 字节）损坏") == 1
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


def test_without_a_launcher_python_runs_one_process(tiny_checkpoint, tmp_path):
    output = tmp_path / "output"
    flags = flags_of(
        rows=write_rows(tmp_path / "rows.json", 8), model=tiny_checkpoint("baichuan2-7b", **SIZES), output=output
    )
    run = subprocess.run(
        [sys.executable, "train.py", *map(str, flags), "--max_steps", "1"],
        cwd=ROOT, env={**cpu_environment(1), "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert checkpoints_in(output) == ["epoch-1-step-1"]
    assert read_json(output / "run_config.json")["world_size"] == 1
    loaded = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time")}
    assert "deepspeed.runtime.zero.muon.original_muon" in loaded
    assert not loaded & {"torch._inductor.compile_fx", "bitsandbytes.functional"}  # 几十 MB，CPU 上用不上


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
    assert "No space left on device" in run.output
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
