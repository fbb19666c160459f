"""终端里的多轮对话，边生成边显示；由 predict.py 在没有给出输入时调用。"""

import contextlib
import sys

import torch
from transformers.generation.streamers import BaseStreamer

from generation import generate_batch


def note(message: str) -> None:
    """给人看的一行，走标准错误：标准输出只有模型的回答。"""
    print(message, file=sys.stderr, flush=True)


class TerminalStreamer(BaseStreamer):
    """边生成边打印；凑不成完整字符的字节片段先留着。"""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.printed = 0
        self.seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """generate 先送来提示词，此后每步送来一个 id。"""
        if not self.seen_prompt:
            self.seen_prompt = True
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        self._print(text.rstrip("\ufffd"))

    def end(self) -> None:
        """打印剩下的，换行。"""
        self._print(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        print(flush=True)

    def _print(self, text: str) -> None:
        print(text[self.printed :], end="", flush=True)
        self.printed = max(self.printed, len(text))


def chat(predictor) -> None:
    """与 predict.Predictor 的多轮对话；/clear 清空历史，/exit 或文件结束退出，生成时按 Ctrl-C 停下这一句。"""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 （载入后 input() 才能正确退格汉字）

    note("输入文字开始对话；/clear 清空历史，/exit 退出，生成时 Ctrl-C 停下这一句。")
    history: list[tuple[str, str]] = []
    while True:
        try:
            text = input("用户：").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/exit":
            return
        if text == "/clear":
            history.clear()
            note("历史已清空。")
        elif text:
            answer(predictor, history, text)


def answer(predictor, history: list[tuple[str, str]], text: str) -> None:
    """对话的一轮：流式打印回答，并把问与答记入 history；用户文字不能编码时说明原因，不记入。"""
    messages = (*history, ("user", text))
    try:
        prompt = predictor.encode(messages, max_input_tokens=predictor.max_input_tokens)
    except ValueError as error:
        note(f"错误：{error}")
        return
    streamer = TerminalStreamer(predictor.tokenizer)
    print("模型：", end="", flush=True)
    try:
        ids = generate_batch(predictor.model, [prompt], predictor.generation_config, streamer=streamer)[0]
    except KeyboardInterrupt:
        ids = streamer.ids
        streamer.end()
    history[:] = [*messages, ("assistant", predictor.decode(ids))]
