"""训练数据：读取、编码、缓存与报告。怎样装成 micro batch 见 finetune/data/packing.py。

python data_set.py check data/spo_0.json --model_name_or_path baichuan2-7B/      # 数据体检，见 finetune/data_doctor/
"""

import copy
import json
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from finetune.data.encoding import (
    CONTROL,
    EMPTY_OUTPUT,
    ENCODING_VERSION,
    EOS_TARGET,
    PER_SAMPLE,
    SAME_TARGET,
    SEVERAL_TURNS,
    SRC_CUT,
    TGT_CUT,
    encode_file,
    to_arrays,
)
from finetune.data.prompting import IGNORE_INDEX, EncodedSample
from finetune.data.rows import files_of, unread_files
from finetune.data.samples import RowOptions
from finetune.data.token_cache import TokenCache


class BaichuanDataSet:
    """一份数据文件的全部样本，编码后以 numpy 数组存放（每个 token 5 字节；命中缓存或给了 spool_dir 时在磁盘上）。

    参数与 encode_sample 相同；is_skip 丢弃超长的行（默认截断），drop_duplicates 丢弃内容完全相同的行（默认保留）。
    cache_dir 给出时，编码结果按数据内容、分词器与设置缓存，换了任何一项都会重新编码。
    spool_dir：不用缓存时，编码的结果放在这个目录的临时文件里，内存不随数据增长。
    num_workers：编码的进程数，None 为按 CPU 核数自动决定，1 为不起子进程。
    文件有错、没有样本、全部超长都抛 ValueError，一次列出至多 20 处。
    """

    def __init__(
        self,
        path: str | os.PathLike,
        tokenizer,
        *,
        prompt_format: str,
        max_len: int,
        max_src_len: int,
        family: str = "baichuan2",
        user_token_id: int = 195,
        assistant_token_id: int = 196,
        template: dict[str, str] | None = None,
        row_options: RowOptions = RowOptions(),
        is_skip: bool = False,
        drop_duplicates: bool = False,
        cache_dir: str | os.PathLike | None = None,
        spool_dir: str | os.PathLike | None = None,
        num_workers: int | None = None,
        show_progress: bool = False,
    ):
        if max_src_len >= max_len:
            raise ValueError(f"--max_src_len({max_src_len}) 必须小于 --max_len({max_len})，请调小前者")
        self.path, self.max_len, self.eos_token_id = str(path), max_len, tokenizer.eos_token_id
        options = {
            "prompt_format": prompt_format,
            "max_len": max_len,
            "max_src_len": max_src_len,
            "family": family,
            "user_token_id": user_token_id,
            "assistant_token_id": assistant_token_id,
            "template": template,
        }
        choices = {"is_skip": is_skip, "drop_duplicates": drop_duplicates}
        files_of(path)
        self.cache_note = "未使用"
        cached = None
        if cache_dir is not None:
            settings = {"version": ENCODING_VERSION, **options, **choices, **row_options._asdict()}
            cache = TokenCache(cache_dir, self.path, tokenizer, json.loads(json.dumps(settings)))
            cached, self.cache_note = cache.load()
        if cached is None:
            cached = encode_file(
                *(self.path, tokenizer, options, row_options),
                **choices,
                workers=num_workers,
                progress=show_progress,
                spool_dir=spool_dir,
            )
            if cache_dir is not None:
                self.cache_note += cache.save(*cached)
        arrays, self.counts = cached
        self.prompt_format = prompt_format
        self._set_columns(
            [arrays], [self.path], [{**_columns_of(arrays), "source": np.zeros(len(arrays["lengths"]), "i4")}]
        )

    def _set_columns(self, sources: list[dict], names: list[str], parts: list[dict[str, np.ndarray]]):
        """sources 是各文件的 token 的数组，names 是它们的路径；parts 的各列首尾相接，每个样本一项。"""
        self._sources, self._names = sources, names
        self.columns = (
            parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        )
        for name in ("offsets", "lengths", "num_targets", "lines", "paths"):
            self.__dict__.pop(name, None)

    @cached_property
    def offsets(self) -> np.ndarray:
        """各样本在全部 token 里的起点，[样本数 + 1]。"""
        return np.concatenate([[0], np.cumsum(self.columns["lengths"], dtype=np.int64)])

    @cached_property
    def lengths(self) -> list[int]:
        return self.columns["lengths"].tolist()

    @cached_property
    def num_targets(self) -> list[int]:
        return self.columns["num_targets"].tolist()

    @cached_property
    def lines(self) -> list[int]:
        """各样本的行号，从 1 起。"""
        return self.columns["lines"].tolist()

    @cached_property
    def paths(self) -> list[str]:
        """各样本的文件。"""
        return [self._names[source] for source in self.columns["source"]]

    def append(self, samples: Sequence[EncodedSample], path: str):
        """在末尾接上 path 里的样本（重放的通用文字）；它们与原有的一起洗牌、装箱。"""
        arrays = to_arrays(samples, [0] * len(samples), range(len(samples)))
        added = {**_columns_of(arrays), "source": np.full(len(samples), len(self._sources))}
        self._set_columns([*self._sources, arrays], [*self._names, path], [self.columns, added])

    def take(self, indices: np.ndarray) -> "BaichuanDataSet":
        """其中的这些样本（可以重复），依 indices 的次序；自己不变，token 不另存一份。"""
        taken = copy.copy(self)
        taken._set_columns(
            self._sources, self._names, [{name: column[indices] for name, column in self.columns.items()}]
        )
        return taken

    @staticmethod
    def join(parts: Sequence["BaichuanDataSet"]) -> "BaichuanDataSet":
        """几份首尾相接成一份；一份时就是它自己。"""
        if len(parts) == 1:
            return parts[0]
        joined = copy.copy(parts[0])
        joined.path = "、".join(part.path for part in parts)
        sources, names, columns = [], [], []
        for part in parts:
            columns.append({**part.columns, "source": part.columns["source"] + len(sources)})
            sources += part._sources
            names += part._names
        joined._set_columns(sources, names, columns)
        return joined

    def place(self, index: int) -> tuple[str, int]:
        """一个样本的 (文件, 行号)。"""
        return self._names[int(self.columns["source"][index])], int(self.columns["lines"][index])

    @property
    def rows(self) -> np.ndarray:
        """各样本在它的文件里是第几行（从 0 起，数组则是第几个元素）。"""
        return self.columns["rows"]

    def __len__(self) -> int:
        return len(self.columns["lengths"])

    def __getitem__(self, index: int) -> EncodedSample:
        """第 index 个样本；input_ids 与 labels 是 int32 数组。"""
        columns = self.columns
        begin, source = int(columns["begins"][index]), self._sources[int(columns["source"][index])]
        tokens = slice(begin, begin + int(columns["lengths"][index]))
        input_ids, kinds = (np.asarray(source[name][tokens]) for name in ("input_ids", "target_kinds"))
        labels = np.where(
            kinds == SAME_TARGET, input_ids, np.where(kinds == EOS_TARGET, self.eos_token_id, IGNORE_INDEX)
        )
        flags = int(columns["flags"][index])
        return EncodedSample(
            input_ids=input_ids,
            labels=labels.astype(np.int32),
            num_targets=int(columns["num_targets"][index]),
            num_src_tokens=int(columns["src_lengths"][index]),
            src_truncated=bool(flags & SRC_CUT),
            tgt_truncated=bool(flags & TGT_CUT),
            has_control_pieces=bool(flags & CONTROL),
            line=int(columns["lines"][index]),
        )

    @property
    def statistics(self) -> dict[str, Any]:
        """各项统计：行数、空输出、重复、截断、跳过、含控制符号的行数，token 长度的分位数，目标 token 的份额。"""
        lengths = self.columns["lengths"]
        flags = self.columns["flags"][np.diff(self.rows, prepend=-1) != 0]  # 一行的几个样本的相同，只数一次
        num_tokens, num_targets = int(lengths.sum()), int(self.columns["num_targets"].sum())
        return {
            **self.counts,
            "num_samples": len(self),
            "num_kept_rows": len(flags),
            "num_empty_outputs": int((flags & EMPTY_OUTPUT > 0).sum()),
            "num_src_truncated": int((flags & SRC_CUT > 0).sum()),
            "num_tgt_truncated": int((flags & TGT_CUT > 0).sum()),
            "num_control_rows": int((flags & CONTROL > 0).sum()),
            "num_conversations": int((flags & SEVERAL_TURNS > 0).sum()),
            "num_tokens": num_tokens,
            "num_target_tokens": num_targets,
            "target_share": num_targets / num_tokens,
            "length_percentiles": {p: int(np.percentile(lengths, p, method="lower")) for p in (50, 90, 95, 99, 100)},
        }

    def report(self) -> str:
        """中文的数据报告，几行文字。"""
        found = self.statistics
        duplicates = f"重复 {found['num_duplicates']}（{'已丢弃' if found['duplicates_dropped'] else '保留'}）"
        kept = f"（{found['num_kept_rows']} 行的）" if found["num_kept_rows"] != len(self) else ""
        skipped = f"，因超长跳过 {found['num_skipped']} 行" if found["num_skipped"] else ""
        p50, p90, p95, p99, longest = found["length_percentiles"].values()
        lines = [
            f"数据报告：{self.path}",
            f"  文件 {found['num_rows']} 行，样本 {len(self)} 条{kept}{skipped}",
            f"  写法：{_listing(found['formats'])}",
            f"  空输出 {found['num_empty_outputs']}（目标只有 eos），{duplicates}",
            f"  截断：src {found['num_src_truncated']} 条，tgt {found['num_tgt_truncated']} 条（截短的 tgt 没有 eos）",
            f"  长度（token）：p50 {p50}，p90 {p90}，p95 {p95}，p99 {p99}，最长 {longest}（上限 {self.max_len}）",
            f"  共 {found['num_tokens']} token，其中目标 {found['num_target_tokens']}（{found['target_share']:.1%}）",
        ]
        if found["num_control_rows"]:
            lines.append(f"  {found['num_control_rows']} 条的文本里有 <reserved_N> 之类的控制符号，已按普通文字编码")
        if found["unused_fields"]:
            lines.append(f"  没有用上的字段：{_listing(found['unused_fields'])}")
        if found["num_conversations"] and self.prompt_format == "plain":
            lines.append(
                f"  警告：{found['num_conversations']} 条是多轮或有 system 的对话，而提示格式是 plain：各轮之间只有"
                "回答之后的 eos，system 与用户的话直接相接；模型若是对话模型，请加 --prompt_format chat"
            )
        if unread := unread_files(self.path):
            shown = "、".join(unread[:3]) + ("……" if len(unread) > 3 else "")
            lines.append(f"  目录里只读 .txt，没有读另外的 {len(unread)} 个文件：{shown}")
        return "\n".join([*lines, f"  分词缓存：{self.cache_note}"])


def _columns_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """每个样本一项的各列，与各样本的起点。"""
    columns = {name: arrays[name] for name in PER_SAMPLE}
    begins = np.cumsum(columns["lengths"], dtype=np.int64)
    begins -= columns["lengths"]
    return {**columns, "begins": begins}


def _listing(counts: dict[str, int]) -> str:
    """{名字: 行数} → 「a 3 行、b 2 行」，多的在前，至多十项。"""
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    return "、".join(f"{name} {count} 行" for name, count in ranked[:10]) + ("……" if len(ranked) > 10 else "")


if __name__ == "__main__":
    import sys

    from finetune.data_doctor.check import main

    sys.exit(main())
