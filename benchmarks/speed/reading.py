"""读数据的速度：各种写法混在一起的文件，与 d90914c 读 instruction/input/output 的文件相比，一个进程里交替地量。

    git worktree add --detach OLD d90914c
    PYTHONPATH=.:OLD python benchmarks/speed/reading.py --model_name_or_path baichuan2-7B/ --rows 100000

「读」是从文件的一行到 input_ids 与 labels（训练开头的「分词」）；「解析」只到消息。单位是每秒（CPU 时间）的行数。
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

from baichuan import BaichuanTokenizer
from finetune.data.prompting import encode_sample
from finetune.data.rows import RawRow
from finetune.data.samples import parse_row

DATA = Path(__file__).resolve().parents[2] / "data"
LIMITS = {"prompt_format": "chat", "max_len": 1024, "max_src_len": 768}


def rewritten(index: int, row: dict) -> dict:
    """同样的一问一答，九种写法轮流。"""
    question, answer = row["instruction"] + row["input"], row["output"]
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [
        row,
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        {"messages": talk},
        {"conversation": [{"human": question, "assistant": answer}], "category": "x"},
        {"query": question, "response": answer},
        {"prompt": question, "response": answer},
        {"prompt": question, "completion": answer},
        {"id": index, "messages": [*talk[:1], {**talk[1], "loss": True}]},
        {**row, "history": None},
    ][index % 9]


def measure(lines: list[bytes], parse: Callable, encode: Callable | None) -> float:
    """每秒多少行。"""
    start = time.process_time()
    for number, line in enumerate(lines):
        sample, problems = parse(number, line)
        assert not problems
        if encode is not None:
            encode(sample)
    return len(lines) / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="有分词器的检查点目录（必填）")
    parser.add_argument("--rows", type=int, default=100_000, help="行数（缺省 %(default)s）")
    parser.add_argument("--repeats", type=int, default=5, help="交替几遍（缺省 %(default)s）")
    args = parser.parse_args()
    import data_check  # d90914c 的
    import prompting

    tokenizer = BaichuanTokenizer.from_pretrained(args.model_name_or_path)
    names = ("spo_0", "d2q_0", "cls_0")
    lines = [line for name in names for line in (DATA / f"{name}.json").read_text(encoding="utf-8").splitlines()]
    texts = [json.loads(line) for line in lines]
    rows = list(islice(cycle(texts), args.rows))
    own = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    mixed = [json.dumps(rewritten(i, row), ensure_ascii=False).encode() for i, row in enumerate(rows)]
    before = (
        lambda number, line: data_check.parse_row(data_check.RawRow(number, line), "f"),
        lambda sample: prompting.encode_sample(sample, tokenizer, **LIMITS),
    )
    now = (
        lambda number, line: parse_row(RawRow(number, line), "f"),
        lambda sample: encode_sample(sample, tokenizer, **LIMITS),
    )
    for name, has_encoding in (("读", True), ("解析", False)):
        speeds = {"d90914c": [], "现在，同样的文件": [], "现在，混合的写法": []}
        for _ in range(args.repeats):
            for found, (lines, (parse, encode)) in zip(
                speeds.values(), [(own, before), (own, now), (mixed, now)], strict=True
            ):
                found.append(measure(lines, parse, encode if has_encoding else None))
        for label, found in speeds.items():
            ratio = statistics.median(a / b for a, b in zip(found, speeds["d90914c"], strict=True))
            print(f"{name}：{label} {statistics.median(found):,.0f} 行/秒，是 d90914c 的 {ratio:.2f} 倍", flush=True)


if __name__ == "__main__":
    main()
