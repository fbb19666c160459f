"""chat.py：多轮历史、命令、流式输出。"""

import io
import re
from types import SimpleNamespace

import pytest
import torch
from generating import by_hand

import predict
from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from finetune.data.prompting import encode_prompt
from finetune.inference.chat import TerminalStreamer, chat


@pytest.fixture(scope="module")
def chat_base(tiny_checkpoint):
    return tiny_checkpoint("baichuan2-7b", chat=True)


def talk(chat_base, monkeypatch, capsys, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    arguments = ["--model_path", str(chat_base), "--precision", "fp32", "--device", "cpu", "--max_new_tokens", "6"]
    assert predict.main(arguments) == 0
    return capsys.readouterr()


def replies(chat_base, *rounds):
    """逐轮手算的回答；None 表示清空历史。"""
    model = BaichuanForCausalLM.from_pretrained(chat_base, dtype=torch.float32).eval()
    tokenizer = BaichuanTokenizer.from_pretrained(chat_base)
    history, answers = [], []
    for text in rounds:
        if text is None:
            history = []
            continue
        history.append(("user", text))
        ids = by_hand(model, encode_prompt(tokenizer, history, "chat"), 6)
        answers.append(tokenizer.decode(ids, skip_special_tokens=True))
        history.append(("assistant", answers[-1]))
    return answers


def test_turns_remember_and_clear_forgets(chat_base, monkeypatch, capsys):
    captured = talk(chat_base, monkeypatch, capsys, "你好\n\n风扇不转\n/clear\n风扇不转\n/exit\n不会读到\n")
    expected = replies(chat_base, "你好", "风扇不转", None, "风扇不转")
    assert expected[1] != expected[2]
    # 空行只是再问一次；/clear 的提示走标准错误
    answers = [f"用户：模型：{answer}\n" for answer in expected]
    assert captured.out == f"{answers[0]}用户：{answers[1]}用户：{answers[2]}用户："
    assert "历史已清空" in captured.err


def test_end_of_input_ends_the_chat(chat_base, monkeypatch, capsys):
    assert talk(chat_base, monkeypatch, capsys, "").out == "用户：\n"


class OneIdAtATime:
    """按给定的切分返回解码结果的分词器：前缀可能停在半个字符上。"""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", errors="replace")


def test_streamer_holds_back_incomplete_characters(capsys):
    streamer = TerminalStreamer(OneIdAtATime())
    streamer.put(torch.tensor([[1, 2, 3]]))  # 提示词不打印
    shown = []
    for byte in "风a😀".encode():
        streamer.put(torch.tensor([byte]))
        shown.append(capsys.readouterr().out)
    assert shown == ["", "", "风", "a", "", "", "", "😀"]
    streamer.end()
    assert capsys.readouterr().out == "\n"
    assert bytes(streamer.ids).decode() == "风a😀"


def test_streamer_prints_the_rest_at_the_end(capsys):
    streamer = TerminalStreamer(OneIdAtATime())
    streamer.put(torch.tensor([[1]]))
    for byte in b"a\xe9":
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert capsys.readouterr().out == "a\ufffd\n"


def test_streamer_never_prints_a_stop_string(capsys):
    streamer = TerminalStreamer(OneIdAtATime(), ["\n用", "完"])
    streamer.put(torch.tensor([[1]]))
    shown = []
    for byte in "甲\n乙\n用".encode():
        streamer.put(torch.tensor([byte]))
        shown.append(capsys.readouterr().out)
    assert "".join(shown) == "甲\n乙"
    assert shown[3] == ""  # 换行可能是停止字符串的开头
    streamer.end()
    assert capsys.readouterr().out == "\n"


def test_adapter_command(chat_base, tmp_path, monkeypatch, capsys):
    from generating import make_adapter, make_predictor

    paths = [make_adapter(chat_base, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    predictor = make_predictor("--model_path", chat_base, "--adapter", *paths)
    prompt = encode_prompt(predictor.tokenizer, [("user", "你好")], "chat")
    expected = []
    for name in ("one", "two", None):
        predictor.use_adapter(name)
        expected.append(predictor.decode(predictor.generate_batch([prompt])[0]))
    assert len(set(expected)) == 3
    predictor.use_adapter("one")
    capsys.readouterr()
    text = "你好\n/clear\n/adapter two\n你好\n/clear\n/adapter 无\n你好\n/adapter\n/adapter 三\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    chat(predictor)
    captured = capsys.readouterr()
    assert re.findall("模型：(.*)\n", captured.out) == expected
    assert "：two；" in captured.err and "：one、无" in captured.err
    assert "：无；" in captured.err and "：one、two" in captured.err
    assert "错误：没有名为 三 的适配器，可选：one、two、无" in captured.err


def test_an_unknown_command_is_not_sent_to_the_model(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("finetune.inference.chat.answer", lambda predictor, history, text: asked.append(text))
    monkeypatch.setattr("sys.stdin", io.StringIO("/help\n/exit now\n/\n/etc/hosts 是什么\n1/2\n/adapters\n/exit\n"))
    chat(SimpleNamespace(adapters={}))
    assert asked == ["/etc/hosts 是什么", "1/2"]
    commands = "可用的命令：/clear 清空历史，/adapter 名字 换适配器，/exit 退出。"
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"没有命令 {text}；{commands}" for text in ("/help", "/exit now", "/", "/adapters")
    ]
