"""chat.py：多轮历史、命令、流式输出。"""

import io

import pytest
import torch

import predict
from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from chat import TerminalStreamer
from prompting import encode_prompt
from tests.test_generation import by_hand


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
