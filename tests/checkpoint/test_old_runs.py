"""旧的训练目录：它们的检查点以前能续训、预测、合并、导出，以后也要能。

goldens/old_runs 由 helpers/make_old_runs.py 在 expected.json 所记的提交上生成，每种方法一个，停在第一轮的途中；
其中的绝对路径早已不在，基座与数据按相对路径找到。
"""

import importlib
import json
import shutil
from pathlib import Path

import pytest
from launching import RESUME_WORKER, launch
from paths import LOCAL_GOLDENS, ROOT

import predict
from finetune.checkpoint.manifest import verify_checkpoint
from utils import read_json, write_json

OLD_RUNS = LOCAL_GOLDENS / "old_runs"
EXPECTED = read_json(OLD_RUNS / "expected.json")
METHODS = ("freeze", "lora", "ptuning", "full")
LAST = "epoch-2-step-8"
# 同一型号的 CPU 上逐位相同；换了指令集，fp32 的求和次序不同：ATEN_CPU_CAPABILITY=default 时这几个数至多相差 3e-7
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """旧目录的副本，每种方法都已用 --resume auto 走完。"""
    directory = tmp_path_factory.mktemp("old") / "runs"
    shutil.copytree(OLD_RUNS, directory)
    for path in ROOT.glob("ds_zero*.json"):
        shutil.copy(path, directory)
    tasks = {method: {"flags": [*EXPECTED[method]["flags"], "--resume", "auto"]} for method in METHODS}
    write_json(directory / "tasks.json", tasks)
    run = launch(["tasks.json", "results.json"], script=RESUME_WORKER, cwd=directory, launcher=False)
    assert run.returncode == 0, run.tail()
    for method, result in read_json(directory / "results.json").items():
        assert result["code"] == 0, f"{method}\n{result['output'][-4000:]}"
        assert f"resume: step 3 from {method}/epoch-1-step-3" in result["output"]
    return directory


def run_script(name: str, *arguments) -> int:
    """scripts/NAME.py 的 main(argv)，返回退出码。"""
    return importlib.import_module(f"scripts.{name}").main([str(argument) for argument in arguments])


@pytest.mark.parametrize("method", METHODS)
def test_resume_continues_the_same_training(resumed, method):
    lines = (resumed / method / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1, 2, 4, 4, 6, 8, 8]
    expected = EXPECTED[method]["records"]
    for found, wanted in zip(records[2:], expected, strict=True):
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=TOLERANCE)
    checkpoint = resumed / method / LAST
    assert verify_checkpoint(checkpoint) == []
    assert sorted(path.name for path in checkpoint.glob("*.safetensors")) == sorted(EXPECTED[method]["weights"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["epoch-1-step-3", LAST])
def test_predict(resumed, method, name, monkeypatch, capsys):
    monkeypatch.chdir(resumed)
    output = f"{method}-{name}.jsonl"
    flags = ["--model_path", f"{method}/{name}", "--test_path", "rows.json", "--output_path", output]
    assert predict.main([*flags, "--max_new_tokens", "4"]) == 0, capsys.readouterr().err
    assert len(Path(output).read_text(encoding="utf-8").splitlines()) == 13


@pytest.mark.parametrize("method", METHODS)
def test_export(resumed, method, monkeypatch, capsys):
    monkeypatch.chdir(resumed)
    flags = ["--model_path", f"{method}/{LAST}", "--to", "llama", "--output_dir", f"{method}-llama"]
    assert run_script("export", *flags) == (2 if method == "ptuning" else 0), capsys.readouterr().err
    assert Path(f"{method}-llama", "model.safetensors").is_file() == (method != "ptuning")


def test_merge_lora(resumed, monkeypatch, capsys):
    monkeypatch.chdir(resumed)
    assert run_script("merge_lora", "--model_path", f"lora/{LAST}", "--output_dir", "merged") == 0, capsys.readouterr()
    assert verify_checkpoint("merged") == []
