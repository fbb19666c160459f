"""把同时等待的生成请求成批做：一个线程独占模型，同一适配器的请求一起生成，各行有自己的采样、停止与上限。"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from finetune.inference.generation import cut_at_stop, make_generation_config, settled_text
from finetune.inference.predictor import Predictor

MIN_TEMPERATURE = 1e-5  # 更小的与贪心没有分别，而 logits 除以它会溢出


class QueueFull(RuntimeError):
    """等待的请求已满。"""


class TokenChoice(NamedTuple):
    """选中的一个 token 与它的对数概率（nat，温度等改动之前的分布）；alternatives 是概率最高的几个。"""

    token: int
    log_prob: float
    alternatives: list[tuple[int, float]]


class Chunk(NamedTuple):
    """回答的一段。finish_reason 不是 None 的是最后一段：stop（eos 或停止字符串）、length、error。"""

    text: str
    choices: list[TokenChoice]
    num_tokens: int  # 至今生成的 token 数，不含 eos
    finish_reason: str | None = None
    error: BaseException | None = None


@dataclass
class Job:
    """一个请求；send 在生成的线程里调用，依次收到各段。"""

    adapter: str | None
    prompt: list[int]
    max_new_tokens: int
    send: Callable[[Chunk], None]
    stops: tuple[str, ...] = ()
    temperature: float = 0.0  # 0 是贪心
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None  # None 每次不同
    top_logprobs: int | None = None  # None 不要对数概率
    is_streamed: bool = False
    is_cancelled: bool = False
    is_done: bool = False


@dataclass
class Row:
    """一批里的一行：选 token，攒文字，判断停下。"""

    job: Job
    tokenizer: object
    eos_token_id: int
    device: torch.device
    ids: list[int] = field(default_factory=list)
    choices: list[TokenChoice] = field(default_factory=list)  # 与 ids 对应；没有要对数概率时为空
    num_sent: int = 0  # 已送出的字数
    num_choices_sent: int = 0

    def __post_init__(self) -> None:
        job, self.generator = self.job, torch.Generator(self.device)
        self.generator.seed() if job.seed is None else self.generator.manual_seed(job.seed)
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(max(job.temperature, MIN_TEMPERATURE))])
        if job.top_k:
            self._warpers.append(TopKLogitsWarper(job.top_k))
        if job.top_p < 1:
            self._warpers.append(TopPLogitsWarper(job.top_p))
        self._log_probs: torch.Tensor | None = None

    def choose(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """没有填充的 input_ids [1, L] 与下一个 token 的 scores [1, V] → 只看最大值的 scores：贪心的行原样。"""
        job = self.job
        if job.top_logprobs is not None:
            self._log_probs = scores[0].log_softmax(-1)
        if job.repetition_penalty != 1:
            scores = RepetitionPenaltyLogitsProcessor(job.repetition_penalty)(input_ids, scores)
        if job.temperature == 0:
            return scores
        probabilities = self._warpers(input_ids, scores - scores.max()).softmax(-1)
        token = torch.multinomial(probabilities, 1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    def take(self, token: int) -> None:
        """记下选中的 token，送出不会再变的文字；该停时送出最后一段。"""
        if self.job.is_cancelled:
            self.job.is_done = True
            return
        if token == self.eos_token_id:
            self._finish("stop")
            return
        self.ids.append(token)
        if self._log_probs is not None:
            top = self._log_probs.topk(self.job.top_logprobs)
            alternatives = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            self.choices.append(TokenChoice(token, float(self._log_probs[token]), alternatives))
        is_full = len(self.ids) == self.job.max_new_tokens
        if (self.job.is_streamed or self.job.stops) and not is_full:
            text, is_stopped = settled_text(self._decoded(), self.job.stops)
            if is_stopped:
                self._finish("stop")
            elif self.job.is_streamed and len(text) > self.num_sent:
                self._send(text)
        elif is_full:
            self._finish("length")

    def _decoded(self, end: int | None = None) -> str:
        return self.tokenizer.decode(self.ids[:end], skip_special_tokens=True)

    def _finish(self, reason: str) -> None:
        text, is_stopped = cut_at_stop(self._decoded(), self.job.stops)
        self.job.is_done = True
        self._send(text, "stop" if is_stopped else reason, with_all=not is_stopped)

    def _send(self, text: str, finish_reason: str | None = None, with_all: bool = False) -> None:
        """送出 text 里还没有送的，连同写出它的各个 token；with_all 时连同余下的全部 token。"""
        end = len(self.choices) if with_all else self.num_choices_sent
        # 写了一半的字（末尾的 U+FFFD）还不算写出
        while end < len(self.choices) and len(self._decoded(end).rstrip("\ufffd")) < len(text.rstrip("\ufffd")):
            end += 1
        choices = self.choices[self.num_choices_sent : end]
        self.job.send(Chunk(text[self.num_sent :], choices, len(self.ids), finish_reason))
        self.num_sent, self.num_choices_sent = max(self.num_sent, len(text)), end


class ChooseTokens(LogitsProcessor):
    """generate 每一步：各行按自己的设置选 token。"""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        longest = max(len(row.job.prompt) for row in rows)
        self.num_padding = [longest - len(row.job.prompt) for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [b, 左填充 + 提示 + 已生成]，scores [b, V]。"""
        chosen = [
            scores[[index]] if row.job.is_done else row.choose(input_ids[[index], padding:], scores[[index]])
            for index, (row, padding) in enumerate(zip(self.rows, self.num_padding, strict=True))
        ]
        return torch.cat(chosen)


class RowsDone(StoppingCriteria):
    """generate 每一步之后：各行收下选中的 token，停了的行不再生成。"""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """input_ids [b, 提示 + 已生成] → [b] 的布尔值。"""
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if not row.job.is_done:
                row.take(token)
        return torch.tensor([row.job.is_done for row in self.rows], device=input_ids.device)


class Batcher:
    """请求的队列与生成的线程；predictor 已载入模型，此后只有这个线程用它的模型。"""

    def __init__(self, predictor: Predictor, batch_size: int, max_waiting: int) -> None:
        self.predictor, self.batch_size, self.max_waiting = predictor, batch_size, max_waiting
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="生成", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """排队；已满时抛 QueueFull。"""
        with self._changed:
            self._drop_cancelled()
            if len(self._waiting) >= self.max_waiting:
                raise QueueFull
            self._waiting.append(job)
            self._changed.notify()

    def counts(self) -> dict[str, int]:
        """等待与正在生成的请求数。"""
        with self._changed:
            self._drop_cancelled()
            return {"waiting": len(self._waiting), "running": len(self._running)}

    def _drop_cancelled(self) -> None:
        """取消了的不再排队；调用时握着锁。"""
        self._waiting = deque(job for job in self._waiting if not job.is_cancelled)

    def close(self) -> None:
        """不再收请求；还没有做完的取消。"""
        with self._changed:
            self._is_closed = True
            for job in (*self._waiting, *self._running):
                job.is_cancelled = True
            self._changed.notify()
        self._thread.join()

    def _next_batch(self) -> list[Job]:
        """最早的请求，与排在它之后、同一适配器的；次序不变。没有请求时等待，关闭后为空。"""
        with self._changed:
            self._running = []
            while True:
                self._drop_cancelled()
                if self._waiting or self._is_closed:
                    break
                self._changed.wait()
            if not self._waiting:
                return []
            adapter = self._waiting[0].adapter
            self._running = [job for job in self._waiting if job.adapter == adapter][: self.batch_size]
            chosen = {id(job) for job in self._running}
            self._waiting = deque(job for job in self._waiting if id(job) not in chosen)
            return self._running

    def _run(self) -> None:
        while jobs := self._next_batch():
            self._generate(jobs)

    def _generate(self, jobs: list[Job]) -> None:
        """一批请求，各送出最后一段；generate 出错或提早返回时，最后一段是错误。"""
        predictor = self.predictor
        failure: Exception = RuntimeError("generate 返回时这个请求还没有做完")
        try:
            predictor.use_adapter(jobs[0].adapter)
            eos, device = predictor.tokenizer.eos_token_id, predictor.model.device
            rows = [Row(job, predictor.tokenizer, eos, device) for job in jobs]
            predictor.generate_batch(
                [job.prompt for job in jobs],
                make_generation_config(predictor.model, max(job.max_new_tokens for job in jobs)),
                logits_processor=LogitsProcessorList([ChooseTokens(rows)]),
                stopping_criteria=[RowsDone(rows)],
            )
        except Exception as error:
            failure = error
        for job in jobs:
            if not (job.is_done or job.is_cancelled):
                job.is_done = True
                job.send(Chunk("", [], 0, "error", failure))
