"""predict.py：一条样本、一个文件、评测与全部用法错误。"""

import json

import pytest
import torch
from generating import ROWS, by_hand

import predict
import utils
from baichuan import BaichuanForCausalLM
from finetune.data.prompting import encode_prompt, encode_sample
from finetune.data.samples import read_samples
from finetune.inference.generation import generate_batch, make_generation_config
from finetune.metrics.registry import METRICS


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return tiny_checkpoint("baichuan2-7b")


@pytest.fixture
def test_file(tmp_path):
    path = tmp_path / "test.json"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


def run(*arguments):
    return predict.main([str(argument) for argument in arguments])


def common(base):
    return ["--model_path", base, "--device", "cpu", "--precision", "fp32", "--max_new_tokens", 8]


def expected_predictions(base, test_file, tokenizer, **options):
    model = BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    prompts = [encode_prompt(tokenizer, s.messages, "plain", **options) for s in read_samples(test_file, "predict")]
    return [tokenizer.decode(by_hand(model, prompt, 8), skip_special_tokens=True) for prompt in prompts]


@pytest.fixture
def tokenizer(base):
    from baichuan import BaichuanTokenizer

    return BaichuanTokenizer.from_pretrained(base)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_file_keeps_order_and_fields(base, test_file, tmp_path, tokenizer, capsys, batch_size):
    output = tmp_path / "new" / "out.jsonl"
    assert run(*common(base), "--test_path", test_file, "--output_path", output, "--batch_size", batch_size) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [{k: v for k, v in row.items() if k != "prediction"} for row in rows] == ROWS
    assert [row["prediction"] for row in rows] == expected_predictions(base, test_file, tokenizer)
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.jsonl"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "预测" in captured.err
    assert "4 条" in captured.err


def test_default_output_path(base, test_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*common(base), "--test_path", test_file) == 0
    assert (tmp_path / "test.predictions.jsonl").is_file()


def test_single_sample_prints_only_the_answer(base, tokenizer, capsys):
    assert run(*common(base), "--instruction", "抽取", "--input", "三元组") == 0
    model = BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = by_hand(model, tokenizer.encode_plain("抽取三元组"), 8)
    assert capsys.readouterr().out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_chat_checkpoint_is_greedy_in_chat_format(tiny_checkpoint, capsys):
    chat_base = tiny_checkpoint("baichuan2-7b", chat=True)
    assert run(*common(chat_base), "--instruction", "你好") == 0
    model = BaichuanForCausalLM.from_pretrained(chat_base, dtype=torch.float32).eval()
    from baichuan import BaichuanTokenizer

    tokenizer = BaichuanTokenizer.from_pretrained(chat_base)
    prompt = [195, *tokenizer.encode_plain("你好"), 196]
    expected = tokenizer.decode(by_hand(model, prompt, 8), skip_special_tokens=True)
    assert capsys.readouterr().out == expected + "\n"


def test_prompts_are_cut_as_in_training(base, test_file, tmp_path, tokenizer, capsys):
    output = tmp_path / "out.jsonl"
    arguments = [*common(base), "--test_path", test_file, "--output_path", output, "--max_src_len", 4]
    assert run(*arguments) == 0
    assert " 4 个 token" in capsys.readouterr().err
    predictions = [json.loads(line)["prediction"] for line in output.read_text(encoding="utf-8").splitlines()]
    assert predictions == expected_predictions(base, test_file, tokenizer, max_src_len=4)


def test_sampling_flags(base, capsys):
    sampled = [*common(base), "--instruction", "抽取", "--do_sample", "--temperature", 3]
    outputs = []
    for extra in (["--seed", 1], ["--seed", 1], ["--seed", 2], ["--seed", 1, "--top_k", 1]):
        assert run(*sampled, *extra) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert run(*common(base), "--instruction", "抽取") == 0
    assert outputs[3] == capsys.readouterr().out  # 只剩一个候选，与贪心相同


# ---- 评测 ----


@pytest.mark.parametrize("metric", ["triple_f1", "label_f1", "rouge"])
def test_metric_writes_predictions_metrics_and_a_table(base, test_file, tmp_path, capsys, metric):
    output = tmp_path / "out.jsonl"
    assert run(*common(base), "--test_path", test_file, "--output_path", output, "--metric", metric) == 0
    assert output.is_file()
    result = json.loads((tmp_path / "out.metrics.json").read_text(encoding="utf-8"))
    predictions = [json.loads(line)["prediction"] for line in output.read_text(encoding="utf-8").splitlines()]
    references = ["发动机_部件故障_水温高", ["风扇_部件故障_不转", "风扇_性能故障_不转"], "你好！", ""]
    expected = json.loads(json.dumps(METRICS[metric](predictions, references)))
    assert result == {**expected, "model_path": str(base), "test_path": str(test_file)}
    assert capsys.readouterr().out.startswith(f"{metric}（4 行）  ")


def test_metric_nll(base, test_file, tmp_path, tokenizer):
    output = tmp_path / "out.jsonl"
    assert run(*common(base), "--test_path", test_file, "--output_path", output, "--metric", "nll") == 0
    assert output.is_file()
    result = json.loads((tmp_path / "out.metrics.json").read_text(encoding="utf-8"))
    model = BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    sums, counts = [], []
    for sample in read_samples(test_file, "predict"):
        options = []
        for reference in sample.references:
            row = sample._replace(messages=(*sample.messages, ("assistant", reference)))
            encoded = encode_sample(row, tokenizer, "plain", 4096, 4000)
            with torch.no_grad():
                loss = model(torch.tensor([encoded.input_ids]), labels=torch.tensor([encoded.labels])).loss
            options.append((float(loss), encoded.num_targets))
        best = min(options)  # 多条参考取平均最低的
        sums.append(best[0] * best[1])
        counts.append(best[1])
    assert result["score"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert result["details"]["num_target_tokens"] == sum(counts)


# ---- 错误 ----


def errors(capsys, *arguments):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--instruction", "甲", "--test_path", "x.json"], "--instruction/--input 与 --test_path 不能同时给"),
        (["--instruction", "", "--input", " "], "--instruction 与 --input 都是空的"),
        (["--output_path", "x.jsonl"], "--output_path 只用于文件预测，请同时给出 --test_path"),
        (["--metric", "rouge"], "--metric 只用于文件预测"),
        (["--instruction", "甲", "--batch_size", "2"], "--batch_size 只用于文件预测"),
        (["--max_src_len", "9"], "--max_src_len 在对话中不起作用"),
        (["--instruction", "甲", "--temperature", "0.5"], "--temperature 在贪心生成时不起作用，请加上 --do_sample"),
        (["--instruction", "甲", "--do_sample", "--temperature", "0"], "--temperature(0.0) 必须大于 0"),
        (["--instruction", "甲", "--do_sample", "--top_p", "1.5"], "--top_p(1.5) 必须在 (0, 1] 之内"),
        (["--instruction", "甲", "--do_sample", "--top_k", "-1"], "--top_k(-1) 不能是负数"),
        (["--instruction", "甲", "--repetition_penalty", "0"], "--repetition_penalty(0.0) 必须大于 0"),
        (["--instruction", "甲", "--max_new_tokens", "0"], "--max_new_tokens(0) 必须是正整数"),
        (["--instruction", "甲", "--max_new_tokens", "5000"], "max_new_tokens(5000) 必须小于模型的上下文长度(4096)"),
        (["--instruction", "甲", "--device", "tpu9"], "--device(tpu9) 不可用"),
        (["--instruction", "甲", "--device", "cuda:99"], "--device(cuda:99) 不可用"),
        (["--test_path", "no-such-file.json"], "找不到数据文件 no-such-file.json"),
        (["--instruction", "甲", "--base_model_path", "x"], "是完整的模型，不需要基座"),
        (["--instruction", "甲", "--compare", "x", "y"], "请给出 --model_path（一个检查点）或 --compare（两个以上）"),
        (["--instruction", "甲", "--num_gpus", "2"], "--num_gpus(2) 必须是正整数，大于 1 时只用于 --test_path"),
        (["--test_path", "x.json", "--num_gpus", "0"], "--num_gpus(0) 必须是正整数"),
        (["--instruction", "甲", "--adapter", "x", "y"], "几个 --adapter 只用于对话"),
        (["--adapter", "no-such"], "no-such"),
        (["--instruction", "甲", "--stop", "乙", ""], "--stop 里有空的文字"),
        (["--label_scores", "甲", "乙"], "--label_scores 不用于对话"),
        (["--instruction", "甲", "--label_scores", "甲", "甲"], "--label_scores 要两个以上不同的标签"),
        (["--instruction", "甲", "--adapter", "x", "--label_scores", "甲"], "要两个以上不同的标签，现在是 ['甲']"),
    ],
)
def test_misuse(base, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in errors(capsys, "--model_path", base, *arguments)


def test_too_few_labels_are_one_error(base, tmp_path, capsys):
    path = tmp_path / "cls.json"
    path.write_text('{"input": "好", "output": "正"}\n{"input": "坏"}\n', encoding="utf-8")
    one, rows, flags = ["--input", "甲"], ["--test_path", path], ["--output_path", tmp_path / "out.jsonl"]
    for arguments, message in (
        ([*one, "--label_scores", "甲"], "--label_scores 要两个以上不同的标签，现在是 ['甲']"),
        ([*rows, *flags, "--label_scores", "甲"], "--label_scores 要两个以上不同的标签，现在是 ['甲']"),
        (
            [*one, "--label_scores"],
            "--label_scores 没有写标签，也没有 --test_path 可以从中取，请在它后面写明两个以上的标签",
        ),
        (
            [*rows, *flags, "--label_scores"],
            f"--label_scores 要两个以上的标签，{path} 的 output 里只有 ['正']，请在它后面写明",
        ),
    ):
        assert errors(capsys, "--model_path", base, *arguments) == f"错误：\n{message}\n"
    assert errors(capsys, "--compare", base, base, *one, "--label_scores").splitlines() == [
        "错误：",
        "--label_scores 不能与 --compare 同用，请去掉它",
    ]


def test_all_problems_at_once(capsys, tmp_path):
    text = errors(
        capsys, "--model_path", tmp_path / "nothing", "--test_path", tmp_path / "nothing.json", "--top_k", 3,
        "--batch_size", 0, "--device", "tpu9",
    )  # fmt: skip
    for part in ("nothing 不存在", "找不到数据文件", "--top_k 在贪心", "--batch_size(0)", "--device(tpu9)"):
        assert part in text


def test_rows_without_output_cannot_be_scored(base, tmp_path, capsys):
    path = tmp_path / "test.json"
    path.write_text('{"instruction": "甲", "output": "乙"}\n{"instruction": "丙"}\n', encoding="utf-8")
    text = errors(capsys, "--model_path", base, "--test_path", path, "--metric", "rouge")
    assert "第 2 行" in text and "--metric" in text


def test_broken_rows_are_reported_with_their_line(base, tmp_path, capsys):
    path = tmp_path / "test.json"
    path.write_text('{"instruction": "甲"}\n{"instruction": 3}\n', encoding="utf-8")
    assert "test.json:2: instruction: 应为字符串" in errors(capsys, "--model_path", base, "--test_path", path)


def test_output_path_problems(base, test_file, tmp_path, capsys):
    arguments = ["--model_path", base, "--test_path", test_file, "--output_path"]
    assert "是一个目录" in errors(capsys, *arguments, tmp_path)
    assert "同一个文件" in errors(capsys, *arguments, test_file)
    assert "建不了" in errors(capsys, *arguments, test_file / "x" / "out.jsonl")


def test_system_message_in_a_v1_chat_checkpoint(tiny_checkpoint, tmp_path, capsys):
    path = tmp_path / "test.json"
    turns = [{"role": "system", "content": "甲"}, {"role": "user", "content": "乙"}]
    path.write_text(json.dumps({"conversations": turns}), encoding="utf-8")
    text = errors(capsys, "--model_path", tiny_checkpoint("baichuan-13b", chat=True), "--test_path", path)
    assert "test.json:1: " in text
    assert "没有 system 角色" in text


def test_unknown_flags_and_values(base, capsys):
    for arguments in (["--nosuch"], ["--metric", "bleu"], ["--max_new_tokens", "x"]):
        with pytest.raises(SystemExit) as caught:
            run("--model_path", base, *arguments)
        assert caught.value.code == 2
        assert "参数错误" in "".join(capsys.readouterr())


def test_a_failed_write_leaves_the_old_result(base, test_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("旧的结果\n", encoding="utf-8")

    def full_disk(*arguments):
        raise OSError(28, "No space left on device", str(output))

    monkeypatch.setattr(utils.os, "replace", full_disk)
    assert run(*common(base), "--test_path", test_file, "--output_path", output) == 1
    assert "做完的行" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == "旧的结果\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.partial", "test.json"]
    monkeypatch.undo()
    # 全部做完了，只差写出：不必再载入模型
    monkeypatch.setattr(predict.Predictor, "load_model", lambda *arguments: pytest.fail("又载入了模型"))
    assert run(*common(base), "--test_path", test_file, "--output_path", output) == 0
    assert len(output.read_text(encoding="utf-8").splitlines()) == len(ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.previous-1", "test.json"]
    assert (tmp_path / "out.jsonl.previous-1").read_text(encoding="utf-8") == "旧的结果\n"


def test_every_metric_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert all(name in text for name in METRICS)


def test_generate_batch_accepts_options(base):
    model = BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    options = make_generation_config(model, 4)
    assert generate_batch(model, [[5, 6]], options, synced_gpus=False) == [by_hand(model, [5, 6], 4)]
