"""终端里的多轮对话，边生成边显示；由 predict.py 在没有给出输入时调用。"""

import contextlib
import re
from collections.abc import Sequence

import torch
from transformers.generation.streamers import BaseStreamer

from finetune.inference.generation import cut_at_stop, settled_text
from finetune.inference.predictor import NO_ADAPTER
from finetune.terminal import note

COMMANDS = "/clear 清空历史，/adapter 名字 换适配器，/exit 退出"


class TerminalStreamer(BaseStreamer):
    """边生成边打印不会再变的部分。"""

    def __init__(self, tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.printed = 0
        self.seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """generate 先送来提示词，此后每步送来一个 id。"""
        if not self.seen_prompt:
            self.seen_prompt = True
            return
        self.ids += value.flatten().tolist()
        self._print(settled_text(self.tokenizer.decode(self.ids, skip_special_tokens=True), self.stops)[0])

    def end(self) -> None:
        """打印剩下的，换行。"""
        self._print(cut_at_stop(self.tokenizer.decode(self.ids, skip_special_tokens=True), self.stops)[0])
        print(flush=True)

    def _print(self, text: str) -> None:
        print(text[self.printed :], end="", flush=True)
        self.printed = max(self.printed, len(text))


def chat(predictor) -> None:
    """与 predictor.Predictor 的多轮对话；/clear 清空历史，/exit 或文件结束退出，生成时按 Ctrl-C 停下这一句。

    挂了适配器时，/adapter 名字 换用一个，/adapter 无 不用，/adapter 列出；历史不变。别的命令只说明有哪些命令，
    不交给模型；第一个词里还有别的 / 的是路径，不是命令。
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 （载入后 input() 才能正确退格汉字）

    switching = "/adapter 换适配器，" if predictor.adapters else ""
    note(f"输入文字开始对话；/clear 清空历史，{switching}/exit 退出，生成时 Ctrl-C 停下这一句。")
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
        elif text.split(maxsplit=1)[:1] == ["/adapter"]:
            switch_adapter(predictor, text.partition("/adapter")[2].strip())
        elif re.match(r"/[^/\s]*(\s|$)", text):
            note(f"没有命令 {text}；可用的命令：{COMMANDS}。")
        elif text:
            answer(predictor, history, text)


def switch_adapter(predictor, name: str) -> None:
    """/adapter 命令：name 为空时列出，否则换用；没有这个适配器时说明有哪些。"""
    try:
        if name:
            predictor.use_adapter(None if name == NO_ADAPTER else name)
    except ValueError as error:
        note(f"错误：{error}")
        return
    now = predictor.adapter or NO_ADAPTER
    others = [item for item in (*predictor.adapters, NO_ADAPTER) if item != now]
    note(f"现在的适配器：{now}；还可选：{'、'.join(others) or '没有（用 --adapter 给出）'}")


def answer(predictor, history: list[tuple[str, str]], text: str) -> None:
    """对话的一轮：流式打印回答，并把问与答记入 history；用户文字不能编码时说明原因，不记入。"""
    messages = (*history, ("user", text))
    try:
        prompt = predictor.encode(messages, max_input_tokens=predictor.max_input_tokens)
    except ValueError as error:
        note(f"错误：{error}")
        return
    streamer = TerminalStreamer(predictor.tokenizer, predictor.stops)
    print("模型：", end="", flush=True)
    try:
        ids = predictor.generate_batch([prompt], streamer=streamer)[0]
    except KeyboardInterrupt:
        ids = streamer.ids
        streamer.end()
    history[:] = [*messages, ("assistant", predictor.decode(ids))]
