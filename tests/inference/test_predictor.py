"""predictor.py：适配器挂在任何基座上并在其间切换，停止字符串，标签的得分。"""

import json

import pytest
import torch
from generating import by_hand, make_adapter, make_predictor
from peft import PeftModel

import predict
from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from finetune.checkpoint.base_model import load_config
from finetune.data.samples import read_samples
from finetune.inference.predictor import rows_at_once, short_names

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_switching_gives_each_adapter_its_own_answers(tiny_checkpoint, tmp_path, kind):
    base = tiny_checkpoint("baichuan2-7b")
    paths = [make_adapter(base, tmp_path / name / "epoch-1-step-3", seed, kind) for seed, name in enumerate("ab")]
    predictor = make_predictor("--model_path", base, "--adapter", *paths)
    plain = BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    expected = {None: [by_hand(plain, prompt, 6) for prompt in PROMPTS]}
    for name, path in zip(predictor.adapters, paths, strict=True):
        fresh = BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(fresh, path).eval()
        options = predictor.generation_config
        expected[name] = [
            model.generate(torch.tensor([p]), generation_config=options)[0, len(p) :].tolist() for p in PROMPTS
        ]
    assert list(predictor.adapters) == ["a/epoch-1-step-3", "b/epoch-1-step-3"]
    assert predictor.adapter == "a/epoch-1-step-3"
    assert len({str(answers) for answers in expected.values()}) == 3
    for name in ("a/epoch-1-step-3", "b/epoch-1-step-3", None, "a/epoch-1-step-3"):
        predictor.use_adapter(name)
        assert predictor.generate_batch(PROMPTS) == expected[name]
    with pytest.raises(ValueError, match="没有名为 c 的适配器，可选：a/epoch-1-step-3、b/epoch-1-step-3、无"):
        predictor.use_adapter("c")


def test_prompt_format_follows_the_adapter(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("baichuan2-7b", chat=True)
    path = make_adapter(base, tmp_path / "plain")
    (path / "run_config.json").write_text(json.dumps({"prompt_format": "plain", "args": {"max_src_len": 2}}))
    predictor = make_predictor("--model_path", base, "--adapter", path)
    ids = predictor.tokenizer.encode_plain("你好")
    assert predictor.encode((("user", "你好"),)) == ids
    predictor.use_adapter(None)
    assert predictor.encode((("user", "你好"),)) == [195, *ids, 196]


def test_adapter_of_another_base_is_only_noted(tiny_checkpoint, tmp_path, capsys):
    base, other = tiny_checkpoint("baichuan2-7b"), tiny_checkpoint("baichuan2-7b", seed=7)
    path = make_adapter(base, tmp_path / "one")
    (path / "run_config.json").write_text(json.dumps({"base_model": {"hashes": {"config.json": "0"}}}))
    make_predictor("--model_path", other, "--adapter", path)
    assert "config.json（" in capsys.readouterr().err


def test_adapters_that_do_not_go_together(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("baichuan2-7b")
    lora, prefix = (make_adapter(base, tmp_path / kind, kind=kind) for kind in ("lora", "prefix"))
    (lora / "run_config.json").write_text(json.dumps({"base_model": {"path": str(base)}}))
    for flags, message in (
        (["--model_path", base, "--adapter", lora, prefix], "必须是同一种，现在是 .*LORA.*PREFIX_TUNING"),
        (["--model_path", base, "--adapter", lora, lora], "有重复的目录"),
        (
            ["--model_path", lora, "--adapter", prefix],
            "--adapter 要挂在完整的模型上，而 --model_path .*lora 是适配器；"
            f"请改成它的基座：--model_path {base}（记在 {lora / 'run_config.json'}）$",
        ),
        (
            ["--model_path", base, "--adapter", base],
            r"里没有 adapter_config\.json，请给出 lora 或 ptuning 的检查点目录",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make_predictor(*flags)


def test_short_names(tmp_path):
    paths = [tmp_path / "x" / "a", tmp_path / "y" / "a", tmp_path / "b"]
    assert short_names(paths) == ["x/a", "y/a", "b"]


# ---- 停止字符串、标签 ----


def test_stop_strings_cut_the_answer(tiny_checkpoint, capsys):
    base = tiny_checkpoint("baichuan2-7b")
    flags = ["--model_path", str(base), "--device", "cpu", "--precision", "fp32", "--max_new_tokens", "12"]
    assert predict.main([*flags, "--instruction", "抽取"]) == 0
    full = capsys.readouterr().out.removesuffix("\n")
    stop = full[len(full) // 2 :][:2]
    assert predict.main([*flags, "--instruction", "抽取", "--stop", "没有的文字", stop]) == 0
    captured = capsys.readouterr()
    assert captured.out == full[: full.index(stop)] + "\n"
    assert "还没有写完" not in captured.err


def test_label_scores_of_one_sample(tiny_checkpoint, capsys):
    base = tiny_checkpoint("baichuan2-7b")
    flags = ["--model_path", str(base), "--device", "cpu", "--precision", "fp32"]
    assert predict.main([*flags, "--input", "很好", "--label_scores", "正面", "负面", "中"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[-3:]]
    assert lines[0] == table[0][0]  # 不生成：预测是得分最高的标签
    model = BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = BaichuanTokenizer.from_pretrained(base)
    prompt = tokenizer.encode_plain("很好")
    expected = {}
    for label in ("正面", "负面", "中"):
        target = [*tokenizer.encode_plain(label), tokenizer.eos_token_id]
        with torch.no_grad():
            log_probs = model(torch.tensor([[*prompt, *target]])).logits[0].log_softmax(-1)
        expected[label] = sum(float(log_probs[len(prompt) - 1 + k, token]) for k, token in enumerate(target))
    shares = torch.tensor([*expected.values()]).softmax(0).tolist()
    ranked = sorted(zip(expected, expected.values(), shares, strict=True), key=lambda row: -row[1])
    assert [row[0] for row in table] == [row[0] for row in ranked]
    for row, (_, log_prob, share) in zip(table, ranked, strict=True):
        assert float(row[1]) == pytest.approx(log_prob, abs=2e-4)
        assert float(row[2]) == pytest.approx(share, abs=2e-4)


def test_nll_counts_the_reference_alone_up_to_the_context(tiny_checkpoint, tmp_path, capsys):
    base = tiny_checkpoint("baichuan2-7b", model_max_length=64)
    rows = tmp_path / "rows.json"
    history = [("user", "你好"), ("assistant", "您好，很高兴认识您，今天天气不错"), ("user", "再见")]
    messages = [{"role": role, "content": text} for role, text in history]
    lines = [{"messages": [*messages, {"role": "assistant", "content": answer}]} for answer in ("再见", "长" * 99)]
    rows.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    predictor = make_predictor("--model_path", base, "--prompt_format", "chat")
    predictor.args.metric = "nll"
    samples = read_samples(rows, "predict")
    prompts = predictor.encode_rows(samples)
    assert "1 行的参考连同提示词超过上下文的 64 个 token" in capsys.readouterr().err
    target = [*predictor.tokenizer.encode_plain("再见"), predictor.tokenizer.eos_token_id]
    with torch.no_grad():
        log_probs = predictor.model(torch.tensor([[*prompts[0], *target]])).logits[0].log_softmax(-1)
    expected = -sum(float(log_probs[len(prompts[0]) - 1 + k, token]) for k, token in enumerate(target))
    assert predictor.reference_nll(samples[0]) == (pytest.approx(expected, abs=1e-4), len(target))
    assert predictor.reference_nll(samples[1])[1] == 64 - len(prompts[1])
    # 训练时的 --max_len 不限制评测：同样的权重，同样的数
    predictor.checkpoint.run_config["args"] = {"max_len": 16, "max_src_len": 60}
    assert predictor.reference_nll(samples[0]) == (pytest.approx(expected, abs=1e-4), len(target))


def test_label_scores_are_of_the_whole_answer_of_a_template(tiny_checkpoint, tmp_path):
    template = {"user": "问：{text}\n", "assistant": "答：{text}\n"}
    path = tmp_path / "template.json"
    path.write_text(json.dumps(template, ensure_ascii=False), encoding="utf-8")
    base = tiny_checkpoint("baichuan2-7b")
    predictor = make_predictor("--model_path", base, "--prompt_format", path)
    predictor.args.label_scores = ["正面", "负面"]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps({"prompt": "很好", "response": "正面"}, ensure_ascii=False), encoding="utf-8")
    [sample] = read_samples(rows, "predict")
    [scores] = predictor.label_scores([predictor.encode(sample.messages)])
    assert -scores["正面"]["log_prob"] == pytest.approx(predictor.reference_nll(sample)[0], abs=1e-4)


def test_how_many_rows_at_once(tiny_checkpoint):
    """2 GiB 的键值：7B 的一行 1024 token 是 1 GiB，仍做 8 行；小的模型至多 64 行。"""
    config = load_config(tiny_checkpoint("baichuan2-7b"))
    assert rows_at_once(config, 1024) == 64
    config.num_hidden_layers, config.hidden_size = 12, 768
    assert rows_at_once(config, 1024) == 28
    config.num_hidden_layers, config.hidden_size = 32, 4096
    assert rows_at_once(config, 1024) == 8
