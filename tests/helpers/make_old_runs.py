"""生成 tests/goldens/old_runs：每种方法一次真实的训练，停在一轮的途中，像是刚存完第 3 步的检查点就被 SIGKILL。

    python tests/helpers/make_old_runs.py --root 检出目录 --output tests/goldens/old_runs

另有 expected.json：没有打断过的同一次训练余下各步的损失，与最终权重的 SHA-256。只用命令行与标准库，不导入项目。
训练在 --work_dir 里进行：run_config.json 会记下这个绝对路径，读它的一方不能依赖它存在。
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from recorder import DS_FILES, describe, environment, run_ranks, sha256

# 方法 → (DeepSpeed 配置, 它的参数)
METHODS = {
    "freeze": ("zero2", ["--freeze_module_name", "layers.1.,lm_head"]),
    "lora": ("zero3", ["--lora_module_name", "all-linear", "--lora_dim", "2"]),
    "ptuning": ("zero2", ["--pre_seq_len", "4", "--prefix_projection", "--prefix_hidden_size", "8"]),
    "full": ("zero3", []),
}
SIZES = ["--layers", "2", "--hidden_size", "8", "--heads", "2", "--intermediate_size", "12", "--vocab_size", "520"]
# 13 行、全局 batch 4：每轮 4 步，最后一步只有 1 行；两轮 8 步，停在第 3 步
NUM_ROWS, GLOBAL_BATCH, EPOCHS, STEPS, STOP = 13, 4, 2, 8, 3


def main():
    """命令行入口。"""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2], help="用哪个检出目录训练")
    parser.add_argument("--output", type=Path, required=True, help="写在哪里；已有的会删去")
    parser.add_argument("--work_dir", type=Path, default=Path("/srv/old_runs"), help="训练的目录；做完删去")
    args = parser.parse_args()
    root, work = args.root.resolve(), args.work_dir
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True)
    work.mkdir(parents=True)
    try:
        lines = (root / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
        (work / "rows.json").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        words = ["--arch", "baichuan2-7b", "--output_dir", "base", "--train_text", "rows.json", *SIZES]
        build = [sys.executable, str(root / "scripts" / "build_tiny_model.py"), *words]
        subprocess.run(build, cwd=work, env=environment(root), check=True)
        expected = describe(root)
        for method, (zero, method_flags) in METHODS.items():
            shutil.copy(root / DS_FILES[zero], work)
            flags = [
                *("--train_path", "rows.json", "--eval_path", "rows.json", "--model_name_or_path", "base"),
                *("--output_dir", method, "--train_type", method, "--ds_file", DS_FILES[zero], "--precision", "fp32"),
                *("--max_len", "96", "--max_src_len", "64", "--learning_rate", "5e-3", "--show_loss_step", "2"),
                *("--num_train_epochs", str(EPOCHS), "--save_model_step", str(STOP)),
                *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", str(GLOBAL_BATCH)),
                *method_flags,
            ]
            run_ranks([sys.executable, str(root / "train.py"), *flags], root, 1, cwd=work)
            expected[method] = {"flags": flags, **whole_run(work / method)}
            keep_stopped(work / method, args.output / method)
        shutil.copytree(work / "base", args.output / "base")
        shutil.copy(work / "rows.json", args.output)
        text = json.dumps(expected, ensure_ascii=False, indent=1)
        (args.output / "expected.json").write_text(text + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(work)


def whole_run(output: Path) -> dict:
    """整次训练的 {"records": 记录里停下之后各条的步、损失与评估, "weights": 最终检查点的文件 → SHA-256}。"""
    lines = (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    kept = ("step", "loss", "grad_norm", "eval/nll")
    records = [{key: record[key] for key in kept if key in record} for record in map(json.loads, lines)]
    last = output / f"epoch-{EPOCHS}-step-{STEPS}"
    weights = {path.name: sha256(path) for path in sorted(last.glob("*.safetensors"))}
    return {"records": [record for record in records if record["step"] > STOP], "weights": weights}


def keep_stopped(output: Path, target: Path):
    """只留下被 SIGKILL 时会有的：第一个检查点、到下一步为止的记录与写了一半的一行、两个配置。"""
    shutil.copytree(output / f"epoch-1-step-{STOP}", target / f"epoch-1-step-{STOP}")
    for name in ("run_config.json", "ds_config.json"):
        shutil.copy(output / name, target)
    lines = (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    early = [line for line in lines if json.loads(line)["step"] <= STOP + 1]
    (target / "train_log.jsonl").write_text("".join(early) + '{"step": 6, "lo', encoding="utf-8")


if __name__ == "__main__":
    main()
