"""四十个写错的命令：每个都不载入 torch 就答，一个错误一行，说出该写什么，没有回溯。"""

import ast
import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from finetune.cli import predict_checks, train_checks

MAX_CPU_SECONDS = 1.0
HEAVY = {"torch", "transformers", "peft", "deepspeed"}
TRAIN = "--train_path data/spo_0.json --model_name_or_path {model} --output_dir {out} "
PREDICT = "--model_path {model} --test_path data/spo_1.json --output_path {out} "
# (程序, 参数, 回答里要有的)
LINES = [
    # 写错的名字
    ("train", TRAIN + "--learnig_rate 1e-4", ["--learnig_rate", "--learning_rate"]),
    ("train", TRAIN + "--max-len 512", ["--max-len", "--max_len"]),
    ("train", TRAIN + "-max_len 512", ["-max_len", "--max_len"]),
    ("train", TRAIN + "--Lora_Dim 8", ["--Lora_Dim", "--lora_dim"]),
    ("train", TRAIN + "--num_epochs_train 2", ["--num_epochs_train", "--num_train_epochs"]),
    ("train", TRAIN + "--gradient_checkpoint", ["--gradient_checkpoint", "--gradient_checkpointing"]),
    ("train", TRAIN + "--no_such_thing_at_all 1", ["--no_such_thing_at_all", "--help"]),
    ("predict", PREDICT + "--max_new_token 4", ["--max_new_token", "--max_new_tokens"]),
    ("predict", PREDICT + "--temprature 1", ["--temprature", "--temperature"]),
    # 别的工具的名字
    ("train", TRAIN + "--finetuning_type lora", ["--finetuning_type", "--train_type"]),
    ("train", TRAIN + "--lora_rank 8 --cutoff_len 512", ["--lora_rank", "--lora_dim", "--cutoff_len", "--max_len"]),
    ("train", TRAIN + "--bf16", ["--bf16", "--precision bf16"]),
    ("train", TRAIN + "--fp16 True", ["--fp16", "--precision fp16"]),
    ("train", TRAIN + "--per_device_eval_batch_size 4", ["--per_device_eval_batch_size", "--eval_batch_size"]),
    ("train", TRAIN + "--lora_target q_proj", ["--lora_target", "--lora_module_name"]),
    ("train", TRAIN + "--logging_steps 10 --save_steps 5", ["--show_loss_step", "--save_model_step"]),
    ("train", TRAIN + "--max_grad_norm 1", ["--max_grad_norm", "--ds_file", "gradient_clipping"]),
    ("train", TRAIN + "--resume_from_checkpoint x", ["--resume_from_checkpoint", "--resume auto"]),
    ("train", TRAIN.replace("--train_path", "--dataset"), ["--dataset", "--train_path"]),
    ("train", TRAIN + "--num_gpus 2", ["--num_gpus", "deepspeed --num_gpus"]),
    ("predict", "--model_name_or_path {model} --input 你好", ["--model_name_or_path", "--model_path"]),
    ("predict", PREDICT + "--num_beams 4", ["--num_beams", "--do_sample"]),
    ("predict", PREDICT + "--per_device_eval_batch_size 4", ["--per_device_eval_batch_size", "--batch_size"]),
    # 取值
    ("train", TRAIN + "--train_type lorra", ["--train_type", "'lorra'", "lora"]),
    ("train", TRAIN + "--mode lora --train_type baichuan2", ["--mode", "'lora'", "--train_type", "'baichuan2'"]),
    ("train", TRAIN + "--max_len ten --learning_rate fast", ["--max_len", "'ten'", "--learning_rate", "'fast'"]),
    ("train", TRAIN + "--max_len 0 --warmup_ratio 10", ["--max_len(0)", "--warmup_ratio(10.0)"]),
    ("train", TRAIN + "--learning_rate 2e4", ["--learning_rate(20000.0)", "2e-4"]),
    ("train", TRAIN + "--resume yes", ["--resume yes", "--resume auto"]),
    ("train", TRAIN + "--packing maybe", ["--packing", "True", "'maybe'"]),
    ("train", TRAIN + "--max_len", ["--max_len"]),
    ("train", TRAIN + "--train_type freeze", ["--freeze_module_name"]),
    ("train", TRAIN + "--train_type full --lora_dim 8", ["--lora_dim", "--train_type lora"]),
    ("predict", PREDICT + "--device gpu", ["--device(gpu)", "cuda"]),
    ("predict", PREDICT + "--top_p 0.5", ["--top_p", "--do_sample"]),
    # 文件与次序
    ("train", TRAIN.replace("spo_0", "spo_9"), ["data/spo_9.json"]),
    ("train", TRAIN.replace("{model}", "no-such-model"), ["--model_name_or_path no-such-model", "config.json"]),
    ("train", TRAIN + "--ds_file ds_zero4.json", ["ds_zero4.json"]),
    ("train", "--train_path {model} --model_name_or_path data/spo_0.json --output_dir {out}",
     ["--train_path", "--model_name_or_path", "写反了"]),
    ("train", "{model} " + TRAIN, ["{model}", "--名字 值"]),
    ("predict", PREDICT.replace("{model}", "no-such-model"), ["no-such-model"]),
    ("predict", "--model_path data/spo_1.json --test_path {model}", ["--model_path", "--test_path", "写反了"]),
]  # fmt: skip


@pytest.fixture
def line(request, tiny_checkpoint, tmp_path):
    """(程序, 参数, 回答里要有的)，占位换成真的路径。"""
    program, flags, expected = LINES[request.param]
    places = {"{model}": str(tiny_checkpoint("baichuan2-7b")), "{out}": str(tmp_path / "out")}

    def fill(text: str) -> str:
        for name, path in places.items():
            text = text.replace(name, path)
        return text

    return program, shlex.split(fill(flags)), [fill(text) for text in expected]


def check(output: str, expected: list[str]):
    assert [text for text in expected if text not in output] == []
    assert "Traceback" not in output
    assert len(output.splitlines()) <= 4, "一个错误一行"


@pytest.mark.parametrize("line", range(len(LINES)), indirect=True)
def test_each_is_refused_and_told(line, monkeypatch, capsys):
    program, flags, expected = line
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught:
        {"train": train_checks, "predict": predict_checks}[program].first_look(flags)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    check(captured.out + captured.err, expected)


@pytest.mark.slow
@pytest.mark.parametrize("line", range(len(LINES)), indirect=True)
def test_each_is_answered_within_a_second(line):
    program, flags, expected = line
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, f"{program}.py", *flags], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 2
    check(run.stdout + run.stderr, expected)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= MAX_CPU_SECONDS


@pytest.mark.parametrize("room", ["train", "predict"])
def test_nothing_heavy_is_imported_for_the_first_look(room):
    """顺着各模块顶上的 import 走：到不了这四个库。"""
    seen, waiting, heavy = set(), [f"finetune.cli.{room}_checks"], []
    while waiting:
        module = waiting.pop()
        path = ROOT / f"{module.replace('.', '/')}.py"
        if module in seen or not path.is_file():
            continue
        seen.add(module)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            heavy += [(module, name) for name in names if name.split(".")[0] in HEAVY]
            waiting += names
    assert heavy == []


@pytest.mark.parametrize("program", ["train", "predict"])
def test_the_first_look_does_not_load_torch(program):
    """真的命令：--help 之后没有载入 torch。"""
    code = (
        f"import runpy, sys; sys.argv = ['{program}.py', '--help']\n"
        f"try: runpy.run_path('{program}.py', run_name='__main__')\n"
        "finally: print('loaded', sorted({'torch', 'transformers', 'peft', 'deepspeed'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "loaded []"


def test_values_are_forgiving_and_a_file_may_hold_them(tiny_checkpoint, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "train_path: data/spo_0.json\nmodel_name_or_path: m\noutput_dir: out\nlearning_rate: 1e-4\n"
        "lora_module_name: [W_pack, o_proj]\npacking: false\nmax_len: 600\n", encoding="utf-8"
    )  # fmt: skip
    args = train_checks.parse_args(
        ["--config", str(tmp_path / "run.yaml"), "--train_type", "LoRA", "--max_len", "1e3", "--precision", "BF16"]
    )
    assert (args.train_path, args.learning_rate, args.lora_module_name) == ("data/spo_0.json", 1e-4, "W_pack,o_proj")
    assert (args.packing, args.train_type, args.max_len, args.precision) == (False, "lora", 1000, "bf16")
    assert {"learning_rate", "max_len", "packing"} <= set(args.given)


@pytest.mark.parametrize("words", [["W_pack o_proj"], ["W_pack,o_proj"], ["W_pack", "o_proj"], ["W_pack，", "o_proj"]])
def test_lists_take_commas_and_spaces(words):
    required = shlex.split(TRAIN)
    assert train_checks.parse_args([*required, "--lora_module_name", *words]).lora_module_name == "W_pack,o_proj"
    labels = predict_checks.parse_args(
        ["--model_path", "m", "--input", "x", "--label_scores", "正面，负面"]
    ).label_scores
    assert labels == ["正面", "负面"]


def test_a_run_record_repeats_the_run(tmp_path):
    first = train_checks.parse_args([*shlex.split(TRAIN), "--lora_dim", "4", "--resume", "auto"])
    record = {"args": {name: value for name, value in vars(first).items() if name not in ("given", "local_rank")}}
    record |= {"precision": "fp32", "arithmetic": {"num_threads": 3}}  # 当时实际用的
    (tmp_path / "run_config.json").write_text(json.dumps(record), encoding="utf-8")
    again = train_checks.parse_args(["--config", str(tmp_path / "run_config.json"), "--seed", "7"])
    changed = {"seed": 7, "precision": "fp32", "num_threads": 3, "resume": "no", "given": 0}
    assert vars(again) | {"given": 0} == vars(first) | changed | {"config": str(tmp_path / "run_config.json")}
    assert "lora_dim" in again.given and "lora_dropout" not in again.given  # 等于缺省的不算写出


def test_a_run_record_with_another_stage_or_method_takes_their_defaults(tmp_path):
    record = str(tmp_path / "run_config.json")

    def kept(*flags):
        args = train_checks.parse_args([*shlex.split(TRAIN), *flags])
        values = {name: value for name, value in vars(args).items() if name != "given"}
        Path(record).write_text(json.dumps({"args": values}), encoding="utf-8")

    def again(*flags):
        args = train_checks.parse_args(["--config", record, *flags])
        return args.task, args.train_type, args.learning_rate, args.beta, args.eval_metric, args.lora_dropout

    kept("--task", "dpo")
    assert again() == ("dpo", "lora", 1e-5, 0.1, "loss", 0.0)
    assert again("--task", "simpo")[2:] == (1e-5, 2.0, "loss", 0.0)
    assert again("--task", "sft") == ("sft", "lora", 2e-4, None, "nll", 0.1)
    assert again("--train_type", "full")[2] == pytest.approx(5e-7)
    kept("--task", "dpo", "--beta", "0.3", "--learning_rate", "7e-6")
    assert again("--task", "simpo")[2:4] == (7e-6, 0.3)  # 写明过的照用


def test_mistakes_in_a_file_name_the_file(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("lora_rank: 8\ntrain_path: x\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        train_checks.parse_args(["--config", str(tmp_path / "run.yaml"), "--output_dir", "o"])
    rank, missing = capsys.readouterr().out.splitlines()
    assert f"{tmp_path / 'run.yaml'}：--lora_rank" in rank and "--lora_dim" in rank
    assert "--model_name_or_path" in missing
