"""加速卡一律经 DeepSpeed 询问：产品里只有一个模块提到 torch.cuda；名为 npu 的假卡从头训练、续训，不碰 torch.cuda。"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from launching import launch
from paths import ROOT
from resume_runs import NUM_ROWS, flags_of
from safetensors.torch import load_file
from train_runs import SIZES, write_rows

from finetune.process import accelerator

FAKE = ROOT / "tests" / "helpers" / "fake_npu.py"


def test_only_one_module_speaks_of_torch_cuda():
    product = [*ROOT.glob("*.py"), *(ROOT / "finetune").rglob("*.py"), *(ROOT / "baichuan").rglob("*.py")]
    found = [path for path in product if re.search(r"torch\.cuda", path.read_text(encoding="utf-8"))]
    assert [str(path.relative_to(ROOT)) for path in found] == ["finetune/process/accelerator.py"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="有 GPU 的机器上问到的是 GPU")
def test_without_an_accelerator_everything_is_the_cpu():
    tensor = torch.ones(3)
    assert (accelerator.accelerator_name(), accelerator.has_accelerator(), accelerator.device_count()) == (
        "cpu",
        False,
        0,
    )
    assert accelerator.default_device() == torch.device("cpu")
    assert accelerator.pin_memory(tensor) is tensor
    assert accelerator.random_state_of_card() == {}
    accelerator.set_random_state_of_card({"cuda": torch.zeros(1)})  # 在 GPU 上存的检查点，换到 CPU 上接着训练


MEMORY_PROGRAM = """
import mmap, sys
import torch
from finetune.process.accelerator import forget_mapped_peak, peak_memory_mb, process_status_mb, return_free_memory
peak_memory_mb()
forget_mapped_peak()
print(peak_memory_mb())
with open(sys.argv[1], "rb") as stream:
    mapped = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
    sum(mapped[::4096])
    print(peak_memory_mb())
    mapped.close()
forget_mapped_peak()
print(peak_memory_mb())
kept = [torch.ones(2**14) for _ in range(1024)]  # 各 64 KiB，在堆里；末一个留着，堆顶就退不下去
del kept[:-1]
print(peak_memory_mb())
own = lambda: process_status_mb()["RssAnon"]
before = own()
return_free_memory(15)
assert before - own() < 1
return_free_memory(16)
print(before - own())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="有 GPU 的机器上问到的是显存")
def test_the_peak_on_a_cpu_is_what_the_process_owns(tmp_path):
    """映射的 64 MB 文件不算，自己的 64 MB 算；用完的还给系统。"""
    (tmp_path / "file").write_bytes(bytes(range(256)) * 2**18)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, tmp_path / "file"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    start, while_mapped, unmapped, own, returned = map(float, run.stdout.split())
    assert abs(while_mapped - start) < 8
    assert abs(unmapped - start) < 8
    assert 64 <= own - start < 72
    assert 56 < returned <= 64.5


@pytest.mark.deepspeed
def test_a_fake_npu_trains_and_resumes(tiny_checkpoint, tmp_path):
    """train.py 自己的 main()：从头训练一轮，再续训一轮；卡的随机状态存进检查点，续训时放回。"""
    base, rows = tiny_checkpoint("baichuan2-7b", **SIZES), write_rows(tmp_path / "rows.json", NUM_ROWS)
    output, calls = tmp_path / "output", tmp_path / "calls.json"
    flags = flags_of(base, rows, output, "zero2", "lora", 1)
    environment = {"FAKE_NPU_CALLS": str(calls), "PYTHONPATH": str(ROOT)}
    found = []
    for num_epochs, resume in ((1, "no"), (2, "auto")):
        words = [*flags, "--num_train_epochs", num_epochs, "--resume", resume]
        run = launch(words, script=FAKE, env=environment, launcher=False, timeout=900)
        assert run.returncode == 0, run.tail()
        found.append(json.loads(calls.read_text(encoding="utf-8")))
        if num_epochs == 1:
            states = load_file(output / "epoch-1-step-4" / "trainer_state" / "random.safetensors")
            assert states["0.npu"].tolist() == [7] * 16
    assert f"step 4 from {output / 'epoch-1-step-4'}" in run.output
    assert (output / "epoch-2-step-8").is_dir()
    assert {record["memory_mb"] for record in run.records if "loss" in record} == {123.0}
    assert {"get_rng_state", "pin_memory", "max_memory_allocated"} <= found[0].keys()
    assert found[1]["set_rng_state"] == found[0].get("set_rng_state", 0) + 1


def test_the_fake_npu_does_fail_on_torch_cuda(tmp_path):
    """守卫真的会发现：产品目录里的一行 torch.cuda 使它失败。"""
    program = (
        "import fake_npu, torch; fake_npu.forbid_cuda();"
        "torch.cuda.is_available();"
        f"code = compile('import torch; torch.cuda.is_available()', {str(ROOT / 'train.py')!r}, 'exec');"
        "exec(code)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'helpers'}"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "产品调用了 torch.cuda.is_available" in result.stderr
