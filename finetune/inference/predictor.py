"""一个检查点与把文字变成提示词、把 id 变回文字的设置：编码、生成、评分，可挂几个适配器并在其间切换。"""

import os
from collections.abc import Container, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from baichuan import BaichuanConfig
from finetune.checkpoint.inspection import Checkpoint, attach_adapter, load_checkpoint_model, load_checkpoint_tokenizer
from finetune.checkpoint.options import quantization_of
from finetune.data.prompting import (
    EncodedSample,
    encode_answer,
    encode_prompt,
    encode_sample,
    max_prompt_tokens,
    prompting_reason,
)
from finetune.data.samples import Sample
from finetune.inference.decoding import Decoder, Prompt, plan_prompts
from finetune.inference.generation import (
    StopStrings,
    cut_at_stop,
    generate_batch,
    label_log_probs,
    make_generation_config,
    plan_batches,
    target_nll,
)
from finetune.inference.options import SAMPLING_DEFAULTS, GenerationOptions
from finetune.process.matmul_on_cpu import settle_products
from finetune.process.precision import TORCH_DTYPES, choose_precision, cpu_bf16_speedup
from finetune.terminal import long_job, note

# 对话里不用任何适配器的名字
NO_ADAPTER = "无"
Record = dict[str, Any]
Task = tuple[list[Prompt], list[Sample]]  # 一起做的几行，key 是行号


def prediction_dtype(requested: str, device: torch.device) -> torch.dtype:
    """--precision 对应的类型；auto 按实际使用的设备决定，而不是按机器上有没有 GPU。"""
    if requested == "auto" and device.type == "cpu":
        return TORCH_DTYPES["bf16" if cpu_bf16_speedup() >= 1 else "fp32"]
    return TORCH_DTYPES[choose_precision(requested)[0]]


def sampling_options(args: GenerationOptions) -> dict[str, Any]:
    """采样时交给 generate 的设置，没有写的取缺省；贪心时为空。"""
    if not args.do_sample:
        return {}
    given = {name: getattr(args, name) for name in SAMPLING_DEFAULTS}
    return {"do_sample": True, **SAMPLING_DEFAULTS, **{k: v for k, v in given.items() if v is not None}}


def short_names(paths: Iterable[Path]) -> list[str]:
    """各目录最短的、彼此不同的名字：先取末一段，重名的逐段往上加；符号链接用它自己的名字。"""
    parts = [Path(os.path.abspath(path)).parts for path in paths]

    def name(index: int) -> str:
        for length in range(1, len(parts[index]) + 1):
            suffix = parts[index][-length:]
            if sum(other[-length:] == suffix for other in parts) == 1:
                break
        return "/".join(suffix)

    return [name(index) for index in range(len(parts))]


def batches_left(batches: list[list[int]], done: Container[int], whole: bool) -> list[list[int]]:
    """还没有做完的批；whole 时做了一部分的批整批重做，否则只留没有做的行。"""
    left = [(batch, [index for index in batch if index not in done]) for batch in batches]
    return [batch if whole else missing for batch, missing in left if missing]


def rows_at_once(config: BaichuanConfig, num_tokens: int) -> int:
    """没有写明 --batch_size 时贪心同时做几行，8 到 64：每行 num_tokens 个 token 的键值（按 4 字节计）合起来至多 2 GiB。

    行越多，每步读一遍的权重与固定的开销分给越多的行；每行的结果与同时做几行无关。
    """
    num_bytes = 8 * config.num_hidden_layers * config.hidden_size * num_tokens
    return max(8, min(64, 2**31 // num_bytes))


class Predictor:
    """一个检查点（与挂在上面的适配器）；先能编码，load_model 之后才能生成。"""

    def __init__(
        self, args: GenerationOptions, checkpoint: Checkpoint, adapters: dict[str, Checkpoint] | None = None
    ) -> None:
        self.args, self.base, self.adapters = args, checkpoint, adapters or {}
        self.tokenizer = load_checkpoint_tokenizer(checkpoint)
        self.model: torch.nn.Module | None = None
        self.use_adapter(next(iter(self.adapters), None))

    def use_adapter(self, name: str | None) -> None:
        """换用一个适配器（None 为不用），提示方式随之改变；name 不在 adapters 里时抛 ValueError。"""
        if name is not None and name not in self.adapters:
            raise ValueError(f"没有名为 {name} 的适配器，可选：{'、'.join((*self.adapters, NO_ADAPTER))}")
        self.adapter = name
        self.checkpoint = self.base if name is None else self.adapters[name]
        self.max_input_tokens = max_prompt_tokens(
            self.checkpoint.context_length, self.args.max_new_tokens, self.checkpoint.prompting.family
        )
        if self.model is not None and name is not None:
            self.model.set_adapter(self._peft_name(name))

    def _peft_name(self, name: str) -> str:
        return f"adapter{[*self.adapters].index(name)}"  # peft 的名字里不能有点号

    def _with_adapter(self) -> AbstractContextManager:
        return self.model.disable_adapter() if self.adapters and self.adapter is None else nullcontext()

    def load_model(self, device: torch.device) -> None:
        """读权重与适配器，定下生成配置。"""
        dtype = prediction_dtype(self.args.precision, device)
        products = settle_products("bf16") if (device.type, dtype) == ("cpu", torch.bfloat16) else ""
        model = load_checkpoint_model(self.base, dtype, device, quantization_of(self.args))
        for name, adapter in self.adapters.items():
            model = attach_adapter(model, adapter, dtype, device, self._peft_name(name))
        self.model = model
        self.use_adapter(self.adapter)
        options = {"repetition_penalty": self.args.repetition_penalty, **sampling_options(self.args)}
        self.generation_config = make_generation_config(self.model, self.args.max_new_tokens, **options)
        kind = f"适配器，基座 {self.base.base_path}" if self.base.is_adapter else "完整模型"
        loaded = f"{self.base.path}（{kind}）" + (f"与适配器 {'、'.join(self.adapters)}" if self.adapters else "")
        note(f"已载入 {loaded}；{device}，{dtype}{products}，提示格式 {self.prompting_reason}")

    @property
    def prompting_reason(self) -> str:
        """用哪种提示格式、为什么。"""
        prompting, recorded = self.checkpoint.prompting, self.checkpoint.run_config.get("prompt_format")
        if self.args.prompt_format == "auto" and recorded is not None:
            return f"{recorded}（训练时的）"
        return prompting_reason(prompting, self.args.prompt_format)

    @property
    def stops(self) -> list[str]:
        """出现任一就停的文字：--stop 的，与模板的 stop。"""
        return [*(self.args.stop or ()), *self.checkpoint.prompting.stops]

    # ---- 文字 ↔ id ----

    def encode(self, messages: tuple[tuple[str, str], ...], **limits: int | None) -> list[int]:
        """对话 → 提示词 id；limits 是 encode_prompt 的 max_src_len（同训练）与 max_input_tokens（上下文长度）。"""
        return encode_prompt(self.tokenizer, messages, **limits, **self.checkpoint.prompting._asdict())

    def decode(self, ids: list[int]) -> str:
        """生成的 id → 文字，不含特殊符号，截到停止字符串之前。"""
        return cut_at_stop(self.tokenizer.decode(ids, skip_special_tokens=True), self.stops)[0]

    @property
    def max_src_len(self) -> int | None:
        """提示词按训练的规则截到这么长：--max_src_len，没有写时是训练时的。"""
        return self.args.max_src_len or self.checkpoint.run_config.get("args", {}).get("max_src_len")

    @property
    def prompt_limits(self) -> list[int]:
        """提示词至多多长：max_src_len 与上下文留给它的。"""
        return [limit for limit in (self.max_src_len, self.max_input_tokens) if limit is not None]

    def encode_rows(self, rows: list[Sample]) -> list[list[int]]:
        """各行的提示词，截断规则同训练；报告截断了多少行。对话格式不合要求时抛 ValueError，带行号。"""
        limits = {"max_src_len": self.max_src_len, "max_input_tokens": self.max_input_tokens}
        prompts, num_cut = [], 0
        if self.checkpoint.prompting.prompt_format == "plain" and any(len(row.messages) > 1 for row in rows):
            note(
                "注意：有多轮或有 system 的对话，而提示格式是 plain（各轮之间只有回答之后的 eos）；"
                "模型若是对话模型，请加 --prompt_format chat"
            )
        for row in rows:
            try:
                prompts.append(self.encode(row.messages, **limits))
                num_cut += len(prompts[-1]) < len(self.encode(row.messages))
            except ValueError as error:
                raise ValueError(f"{row.place}: {error}") from error
        if num_cut:
            note(f"{num_cut} 行的提示词超过 {min(self.prompt_limits)} 个 token，已按训练的规则截断")
        if self.args.metric == "nll":
            num_cut = sum(any(sample.tgt_truncated for sample in self.encode_references(row)) for row in rows)
            if num_cut:
                length = self.checkpoint.context_length
                note(f"{num_cut} 行的参考连同提示词超过上下文的 {length} 个 token，超出的部分不计入 NLL")
        return prompts

    def encode_references(self, row: Sample) -> list[EncodedSample]:
        """一行的各条参考，接在它的提示词之后，只有参考是目标；超出上下文长度的部分截去。"""
        limits = {"max_src_len": min(self.prompt_limits), "max_len": self.checkpoint.context_length}
        trained = (*[False] * len(row.messages), True)
        return [
            encode_sample(
                row._replace(messages=(*row.messages, ("assistant", reference)), trained=trained),
                self.tokenizer,
                **limits,
                **self.checkpoint.prompting._asdict(),
            )
            for reference in row.references
        ]

    # ---- 生成 ----

    def generate_batch(
        self, prompts: list[list[int]], config: GenerationConfig | None = None, **options: Any
    ) -> list[list[int]]:
        """一批提示词的续写，用现在的适配器与停止字符串；config 缺省是命令行的，options 原样传给 generate。

        options 里有 stopping_criteria 的自己管停止字符串。
        """
        if self.stops and "stopping_criteria" not in options:
            options["stopping_criteria"] = [StopStrings(self.tokenizer, self.stops)]
        with self._with_adapter():
            return generate_batch(self.model, prompts, config or self.generation_config, **options)

    @property
    def is_continuous(self) -> bool:
        """贪心生成：不分批，一行做完就换下一行；采样的结果取决于整批，标签的得分一批一批地算。"""
        return not (self.args.do_sample or self.args.label_scores)

    def plan(self, prompts: list[list[int]], done: Container[int] = ()) -> list[list[Prompt]]:
        """还没有做完的行，依次哪几行一起做。

        采样时做了一部分的批整批重做（采样的结果取决于整批），否则只留没有做的行。
        """
        if self.is_continuous:
            if "batch_size" not in self.args.given:
                self.args.batch_size = rows_at_once(self.base.config, max(map(len, prompts)) + self.args.max_new_tokens)
            return [[prompt] for prompt in plan_prompts(prompts, [i for i in range(len(prompts)) if i not in done])]
        batches = batches_left(plan_batches(prompts, self.args.batch_size), done, whole=self.args.do_sample)
        return [[Prompt(index, prompts[index]) for index in batch] for batch in batches]

    def predict_tasks(self, tasks: Iterable[Task]) -> Iterator[tuple[list[int], list[Record]]]:
        """依次预测 plan 的各份，产出做完的 (行号, 各行的记录)；记录见 predict_batch。

        采样时每批各用自己的种子：结果与先做哪些批、由哪个进程做无关。
        """
        if self.is_continuous:
            yield from self._predict_continuously(tasks)
            return
        for batch, rows in tasks:
            torch.manual_seed(self.args.seed + batch[0].key)
            yield [prompt.key for prompt in batch], self.predict_batch(rows, [prompt.ids for prompt in batch])

    def _predict_continuously(self, tasks: Iterable[Task]) -> Iterator[tuple[list[int], list[Record]]]:
        rows: dict[int, Sample] = {}

        def incoming() -> Iterator[Prompt]:
            for batch, samples in tasks:
                rows.update(zip((prompt.key for prompt in batch), samples, strict=True))
                yield from batch

        stops = [StopStrings(self.tokenizer, self.stops).is_in] if self.stops else []
        decoder = Decoder(self.model, self.generation_config, self.args.batch_size)
        with self._with_adapter():
            for done in decoder.run(incoming(), *stops):
                indices = [index for index, _ in done]
                records = self.generated_records([ids for _, ids in done])
                yield indices, self.with_nll(records, [rows.pop(index) for index in indices])

    def predict_batch(self, rows: list[Sample], prompts: list[list[int]]) -> list[Record]:
        """一批行的记录：prediction，is_cut（没有写完），要求时还有 label_scores 与 nll（和, 目标数）。

        要求 label_scores 时不生成，prediction 是得分最高的标签。
        """
        if self.args.label_scores:
            records = [
                {"prediction": next(iter(scores)), "is_cut": False, "label_scores": scores}
                for scores in self.label_scores(prompts)
            ]
        else:
            records = self.generated_records(self.generate_batch(prompts))
        return self.with_nll(records, rows)

    def with_nll(self, records: list[Record], rows: list[Sample]) -> list[Record]:
        """--metric nll 时各行的记录加上 nll。"""
        if self.args.metric == "nll":
            for record, row in zip(records, rows, strict=True):
                record["nll"] = self.reference_nll(row)
        return records

    def generated_records(self, generated: list[list[int]]) -> list[Record]:
        """各行新生成的 id → 记录：prediction，is_cut。"""
        records = []
        for ids in generated:
            text, is_stopped = cut_at_stop(self.tokenizer.decode(ids, skip_special_tokens=True), self.stops)
            records.append({"prediction": text, "is_cut": len(ids) >= self.args.max_new_tokens and not is_stopped})
        return records

    def predict(self, rows: list[Sample], prompts: list[list[int]], title: str = "预测") -> list[Record]:
        """全部行的记录，次序同输入。"""
        records: list[Record] = [{} for _ in rows]
        with long_job(title, len(rows), "条", is_hidden=len(rows) == 1) as progress:
            tasks = ((batch, [rows[prompt.key] for prompt in batch]) for batch in self.plan(prompts))
            for batch, found in self.predict_tasks(tasks):
                for index, record in zip(batch, found, strict=True):
                    records[index] = record
                progress.update(len(batch))
        report_unfinished(records, self.args.max_new_tokens)
        return records

    # ---- 评分 ----

    def label_scores(self, prompts: list[list[int]]) -> list[dict[str, dict[str, float]]]:
        """各行各标签的得分，由高到低：log_prob 是回答恰好为这个标签（连同 eos）的对数概率，nat，没有除以长度；
        probability 是它在各标签之间归一化的概率。"""
        prompting = self.checkpoint.prompting._asdict()
        labels = [encode_answer(self.tokenizer, label, **prompting) for label in self.args.label_scores]
        with self._with_adapter():
            scores = label_log_probs(
                self.model, prompts, labels, self.args.batch_size, self.generation_config.pad_token_id
            )
        results = []
        for log_probs in scores:
            shares = torch.tensor(log_probs, dtype=torch.float64).softmax(0).tolist()
            ranked = sorted(zip(self.args.label_scores, log_probs, shares, strict=True), key=lambda item: -item[1])
            results.append({name: {"log_prob": total, "probability": share} for name, total, share in ranked})
        return results

    def reference_nll(self, row: Sample) -> tuple[float, int]:
        """参考答案（不含历史的回答）的 NLL 之和与目标数；有多条参考时取平均每 token 最低的一条。"""
        with self._with_adapter():
            sums, counts = target_nll(self.model, self.encode_references(row))
        return min(zip(sums, counts, strict=True), key=lambda pair: pair[0] / max(1, pair[1]))


def report_unfinished(records: Iterable[Record], max_new_tokens: int) -> None:
    """报告没有写完的行数。"""
    num_unfinished = sum(record["is_cut"] for record in records)
    if num_unfinished:
        note(f"{num_unfinished} 行到 --max_new_tokens({max_new_tokens}) 还没有写完，可能需要调大")
