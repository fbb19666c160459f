"""--add_tokens：训练、保存、续训、预测、合并、导出，各处的编号与贪心 token 相同；真实的 deepspeed 训练。"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import run_tasks
from resume_runs import assert_same_bits
from safetensors.torch import load_file
from train_runs import DS_FILES, SIZES
from transformers import AutoModelForCausalLM, AutoTokenizer

from baichuan import BaichuanTokenizer
from finetune.checkpoint.adapter import check_second_stage
from finetune.checkpoint.added_tokens import add_words, first_rows, rows_in
from finetune.checkpoint.base_model import load_config, load_tokenizer
from finetune.checkpoint.inspection import inspect_checkpoint, load_checkpoint_model, load_checkpoint_tokenizer
from finetune.cli.train_checks import early_problems
from finetune.cli.train_flags import parse_args
from finetune.data.prompting import encode_prompt
from finetune.data_doctor.check import main as doctor_main
from finetune.inference.generation import generate_batch, make_generation_config
from finetune.planning.activations import plan_model
from finetune.process.interruption import EXIT_INTERRUPTED
from model_factory import build_model
from predict import main as predict_main
from scripts.export import main as export_main
from scripts.merge_lora import main as merge_main
from utils import read_json

WORDS = ["[三元组]", "<|无|>"]
TEXT = "抽取：怠速[三元组]抖动<|无|>1"
METHODS = {
    "lora": ["--lora_dropout", "0"],
    "freeze": ["--freeze_module_name", "layers.1."],
    "full": [],
}
LAST = "epoch-2-step-6"
CPU = torch.device("cpu")


def word_file(path: Path, words=WORDS) -> Path:
    path.write_text("\n".join(words) + "\n\n", encoding="utf-8")
    return path


def train_all(directory: Path, base: Path, num_ranks: int, cases: list[tuple[str, str]]) -> dict[str, dict]:
    """(方法, ZeRO) 各训练 6 步；另有第 2 步被打断、再接着走完的一次。"""
    rows = [
        {"instruction": "抽取：", "input": f"怠速[三元组]抖动{i}", "output": f"<|无|>[三元组]{i}"} for i in range(12)
    ]
    data, words = directory / "rows.json", word_file(directory / "words.txt")
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    def flags(name: str, method: str, zero: str, *more) -> list[str]:
        given = [
            *("--train_path", data, "--model_name_or_path", base, "--output_dir", directory / name),
            *("--ds_file", DS_FILES[zero], "--train_type", method, "--add_tokens", words, "--precision", "fp32"),
            *("--max_len", 96, "--max_src_len", 64, "--learning_rate", "2e-2", "--num_train_epochs", 2),
            *("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4 // num_ranks),
            *(*METHODS[method], *more),
        ]
        return [str(flag) for flag in given]

    tasks = {}
    for method, zero in cases:
        name = f"{method}-{zero}"
        tasks[name] = {"flags": flags(name, method, zero)}
        again = flags(f"{name}-again", method, zero)
        kill = {"step": 2, "rank": num_ranks - 1, "signal": "SIGTERM"}
        tasks[f"{name} cut"] = {"flags": again, "kill": kill}
        tasks[f"{name} again"] = {"flags": [*again, "--resume", "auto"]}
    results = run_tasks(directory, tasks, num_ranks)
    for name, result in results.items():
        assert result["code"] == (EXIT_INTERRUPTED if name.endswith("cut") else 0), (name, result["output"][-3000:])
    return results


def ids_and_tokens(path: Path) -> tuple[list[int], list[int]]:
    """一个检查点对 TEXT 的提示词 id 与贪心 token。"""
    checkpoint = inspect_checkpoint(path)
    tokenizer = load_checkpoint_tokenizer(checkpoint)
    assert {word: tokenizer.convert_tokens_to_ids(word) for word in WORDS} == {WORDS[0]: 2000, WORDS[1]: 2001}
    assert tokenizer.find_control_pieces(TEXT + "<reserved_106>") == ["<reserved_106>"]
    prompt = encode_prompt(tokenizer, [("user", TEXT)], **checkpoint.prompting._asdict())
    model = load_checkpoint_model(checkpoint, torch.float32, CPU)
    return prompt, generate_batch(model, [prompt], make_generation_config(model, 6))[0]


def check_run(directory: Path, base: Path, name: str, capsys):
    """一次训练：只动了该动的，续训逐位相同，预测、合并、导出的编号与贪心 token 相同。"""
    checkpoint = directory / name / LAST
    assert_same_bits(directory / f"{name}-again" / LAST, checkpoint)
    assert read_json(checkpoint / "added_tokens.json") == {WORDS[0]: 2000, WORDS[1]: 2001}
    original = load_file(base / "model.safetensors")
    start = first_rows(base, load_config(base), load_tokenizer(base, 2000), WORDS).rows
    is_adapter = (checkpoint / "adapter_config.json").is_file()
    if is_adapter:
        rows = load_file(checkpoint / "added_rows.safetensors")
        assert rows.pop("ids").tolist() == [2000, 2001]
    else:
        saved = load_file(checkpoint / "model.safetensors")
        rows = {name: saved[name][2000:] for name in start}
        assert read_json(checkpoint / "config.json")["vocab_size"] == 2002
        is_kept = [torch.equal(saved[name][:2000], original[name]) for name in start]
        assert is_kept == [not name.startswith("full")] * 2
    for tensor_name, first in start.items():
        moved = (rows[tensor_name] - first).abs().amax(dim=1)
        assert first.shape == rows[tensor_name].shape and (moved > 1e-3).all()

    prompt, tokens = ids_and_tokens(checkpoint)
    assert [index for index in prompt if index >= 2000] == [2000, 2001] and set(tokens) & {2000, 2001}
    text = BaichuanTokenizer.from_pretrained(checkpoint).decode(tokens, skip_special_tokens=True)
    capsys.readouterr()
    arguments = ["--model_path", str(checkpoint), "--instruction", TEXT, "--max_new_tokens", "6"]
    assert predict_main([*arguments, "--precision", "fp32", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == text.strip()
    source = checkpoint
    if is_adapter:
        source = directory / f"{name}-merged"
        assert merge_main(["--model_path", str(checkpoint), "--output_dir", str(source)]) == 0
        assert ids_and_tokens(source) == (prompt, tokens)
        assert read_json(source / "added_tokens.json") == read_json(checkpoint / "added_tokens.json")
    for path, to in ((checkpoint, "llama"), (source, "baichuan")):
        target = directory / f"{name}-{to}"
        arguments = ["--model_path", str(path), "--to", to, "--output_dir", str(target), "--dtype", "float32"]
        assert export_main(arguments) == 0
    assert ids_and_tokens(directory / f"{name}-baichuan") == (prompt, tokens)
    plain = AutoModelForCausalLM.from_pretrained(directory / f"{name}-llama").eval()
    assert type(plain).__name__ == "LlamaForCausalLM" and plain.config.vocab_size == 2002
    found = AutoTokenizer.from_pretrained(directory / f"{name}-llama")(TEXT)["input_ids"]
    assert found == prompt
    generated = plain.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6, repetition_penalty=1.0)
    generated = generated[0, len(prompt) :].tolist()
    assert (generated[: generated.index(2)] if 2 in generated else generated) == tokens


@pytest.fixture(scope="module")
def base(tiny_checkpoint) -> Path:
    return tiny_checkpoint("baichuan2-7b", **SIZES)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, base) -> Path:
    directory = tmp_path_factory.mktemp("one-rank")
    train_all(directory, base, 1, [("lora", "zero2"), ("lora", "zero3"), ("freeze", "zero2"), ("full", "zero2")])
    return directory


@pytest.mark.parametrize("name", ["lora-zero2", "lora-zero3", "freeze-zero2", "full-zero2"])
def test_one_rank(one_rank, base, name, capsys):
    check_run(one_rank, base, name, capsys)


def test_first_rows_are_the_means_of_the_pieces(base, tiny_checkpoint):
    tokenizer = load_tokenizer(base, 2000)
    pieces = tokenizer.text_to_ids(WORDS[0])
    assert len(pieces) > 1
    for path, norm_head in ((base, True), (tiny_checkpoint("baichuan-7b", **SIZES), False)):
        weights, config = load_file(path / "model.safetensors"), load_config(path)
        pieces = load_tokenizer(path, 2000).text_to_ids(WORDS[0])
        rows = first_rows(path, config, load_tokenizer(path, 2000), WORDS[:1]).rows
        embedding, head = (weights[name][pieces] for name in ("model.embed_tokens.weight", "lm_head.weight"))
        torch.testing.assert_close(rows["model.embed_tokens.weight"][0], embedding.mean(0))
        lengths = head.norm(dim=1, keepdim=True)
        direction = torch.nn.functional.normalize((head / lengths).mean(0), dim=0)
        torch.testing.assert_close(rows["lm_head.weight"][0], direction * lengths.mean() if norm_head else head.mean(0))


def test_bad_words_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"words\.txt:3: '<reserved_106>' 本来就是一个 token（195 号）"):
        words = word_file(tmp_path / "words.txt", [*WORDS, "<reserved_106>"])
        add_words(load_tokenizer(base, 2000), str(words))
    command = ["--train_path", "data/spo_0.json", "--model_name_or_path", str(base), "--output_dir", str(tmp_path)]
    for content, parts in {
        "[a]\n\n [a] \n": ("words.txt:3", "第 1 行重复"),
        " \n": ("words.txt", "只有空白"),
        None: ("words.txt",),
    }.items():
        (tmp_path / "words.txt").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "words.txt").write_text(content, encoding="utf-8")
        problems = early_problems(parse_args([*command, "--add_tokens", str(tmp_path / "words.txt")]))
        assert [problem for problem in problems if all(part in problem for part in parts)], problems
    words = word_file(tmp_path / "words.txt")
    problems = early_problems(parse_args([*command, "--add_tokens", str(words), "--train_type", "ptuning"]))
    assert len(problems) == 1 and "--add_tokens" in problems[0]


def test_show_and_the_dry_run_know_the_words(base, tmp_path, capsys):
    row = {"instruction": "抽取：", "input": TEXT, "output": WORDS[1]}
    (tmp_path / "rows.json").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    words, data = str(word_file(tmp_path / "words.txt")), str(tmp_path / "rows.json")
    shown = ["show", data, "--model_name_or_path", str(base), "--json", str(tmp_path / "out.jsonl")]
    assert doctor_main([*shown, "--add_tokens", words]) == 0
    found = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert [index for index in found["input_ids"] if index >= 2000] == [2000, 2001, 2001]
    assert found["labels"][-2:] == [2001, 2]
    command = ["--train_path", data, "--model_name_or_path", str(base), "--output_dir", "out", "--add_tokens", words]
    planned = [plan_model(parse_args([*command, *METHODS["lora"]][:count]), load_config(base)) for count in (6, 8)]
    assert planned[1].num_trained - planned[0].num_trained == 2 * 2 * 32


def test_what_cannot_hold_the_new_words_is_refused(one_rank, base, tmp_path, capsys):
    checkpoint = one_rank / "lora-zero2" / LAST

    def refused(main, *arguments):
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    text = refused(predict_main, "--model_path", base, "--adapter", checkpoint, "--instruction", "你好")
    assert "--adapter" in text and "新词" in text
    arguments = ("--model_path", checkpoint, "--output_dir", tmp_path / "out")
    assert "--to gguf" in refused(export_main, *arguments, "--to", "gguf_lora")
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    (broken / "added_rows.safetensors").unlink()
    assert "added_rows.safetensors" in refused(merge_main, "--model_path", broken, *arguments[2:])
    (broken / "added_tokens.json").unlink()
    shutil.copyfile(base / "tokenizer_config.json", broken / "tokenizer_config.json")
    shutil.copyfile(checkpoint / "added_rows.safetensors", broken / "added_rows.safetensors")
    assert "2000 个词" in refused(merge_main, "--model_path", broken, *arguments[2:])


def test_a_second_stage_starts_from_the_rows_of_the_adapter(one_rank, base):
    checkpoint = one_rank / "lora-zero2" / LAST
    words = str(one_rank / "words.txt")
    command = ["--train_path", "data/spo_0.json", "--model_name_or_path", str(base), "--output_dir", "out"]
    command += ["--adapter_path", str(checkpoint), "--precision", "fp32", *METHODS["lora"]]
    model = build_model(parse_args([*command, "--add_tokens", words]), load_config(base), "fp32", {})
    saved = load_file(checkpoint / "added_rows.safetensors")
    assert {name: parameter.requires_grad for name, parameter in rows_in(model).items()} == dict.fromkeys(
        ("model.embed_tokens.weight", "lm_head.weight"), True
    )
    for name, parameter in rows_in(model).items():
        assert torch.equal(parameter, saved[name])
    for other in ([], WORDS[:1], WORDS[::-1]):
        with pytest.raises(ValueError, match=r"--add_tokens.*适配器有 2 个"):
            check_second_stage(checkpoint, model, other)


@pytest.mark.slow
def test_two_ranks(tmp_path, base, capsys):
    cases = [(method, zero) for method in METHODS for zero in DS_FILES]
    train_all(tmp_path, base, 2, cases)
    for method, zero in cases:
        check_run(tmp_path, base, f"{method}-{zero}", capsys)
