"""模糊测试数据的读取与对话格式：随机的文件与对话，只允许 ValueError，结果与独立的解析一致，编码的不变式成立。

    python benchmarks/reliability/fuzz.py --seconds 600 --seed 1 --output_dir benchmarks/reliability/results

失败时把当时的输入留在 --failures_dir，退出码 1；同样的种子给出同样的次序。
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from baichuan import BaichuanTokenizer
from benchmarks.reliability.damage_kinds import GPT, HUMAN, ROW_SURGERY, damage_bytes
from benchmarks.reliability.damage_oracle import data_messages
from finetune.data import rows as reader
from finetune.data.prompting import IGNORE_INDEX, PROMPT_FAMILIES, PROMPT_FORMATS, encode_prompt, encode_sample
from finetune.data.samples import Sample, read_samples
from finetune.data_doctor import check as data_doctor
from utils import write_json

HANG_SECONDS = 30
ALPHABET = [
    "水温",
    "高",
    " ",
    "\n",
    "\t",
    "a",
    "Z9",
    "，",
    "。",
    "🚗",
    "é",
    "\u200b",
    "＜",
    "<reserved_106>",
    "</s>",
    "<s>",
]
ALPHABET += [
    "<unk>",
    "<reserved_",
    "\\",
    '"',
    "'",
    "{",
    "]",
    ",",
    "\x01",
    "\u2028",
    "𠮷",
    "ﬁ",
    "<reserved_999>",
    "\ufffd",
]
FIELDS = ["instruction", "input", "output", "conversations", "id", "role", "from", "value", "content", "输出"]
ROLE_NAMES = ["human", "gpt", "user", "assistant", "system", "User", "", "tool"]


# ---- 造输入 ----


def random_text(rng: random.Random, most: int = 12) -> str:
    return "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(most)))


def random_value(rng: random.Random, depth: int = 0) -> Any:
    """随意的 JSON 值。"""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return rng.choice([None, True, False, 0, -1, 1.5, 1e300, 10**300])
    if kind <= 5:
        return random_text(rng)
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(FIELDS): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def random_row(rng: random.Random) -> Any:
    """多半合法的一行；有时字段、角色、类型是随意的。"""
    choice = rng.random()
    if choice < 0.5:
        return {"instruction": "问" + random_text(rng), "input": random_text(rng), "output": random_text(rng)}
    if choice < 0.92:
        turns = [HUMAN, GPT] * rng.randrange(1, 4)
        turns = [{**turn, "value": turn["value"] + random_text(rng)} for turn in turns]
        if rng.random() < 0.3:
            turns.insert(rng.choice([0, 0, len(turns)]), {"from": rng.choice(ROLE_NAMES), "value": random_text(rng)})
        return {"conversations": turns}
    return random_value(rng)


def random_file(rng: random.Random) -> bytes:
    """一份随机的数据文件：行或数组，各种写法，四成再损坏几处。"""
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(200))
    rows = [random_row(rng) for _ in range(rng.randrange(1, 6))]
    style = {"ensure_ascii": rng.random() < 0.5, "separators": rng.choice([(",", ":"), (", ", ": "), (" , ", " : ")])}
    if rng.random() < 0.5:
        content = json.dumps(rows, indent=rng.choice([None, 0, 1, "\t"]), **style).encode()
    else:
        lines = [json.dumps(row, **style).encode() for row in rows]
        if rng.random() < 0.15:
            good = {"instruction": "问", "input": "题", "output": "答"}
            lines.append(rng.choice(list(ROW_SURGERY.values()))(good))
        content = rng.choice([b"\n", b"\r\n", b"\n\n"]).join(lines) + rng.choice([b"", b"\n"])
    if rng.random() < 0.1:
        content = b"\xef\xbb\xbf" + content
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        if content:
            content, _ = damage_bytes(content, rng)
    return content


def random_messages(rng: random.Random) -> list[tuple[str, str]]:
    """一段对话，以回答结尾；有时角色的次序是随意的。"""
    messages = [(role, random_text(rng, 30)) for _ in range(rng.randrange(1, 5)) for role in ("user", "assistant")]
    if rng.random() < 0.3:
        messages.insert(0, ("system", random_text(rng, 30)))
    if rng.random() < 0.1:
        messages.insert(rng.randrange(len(messages)), (rng.choice(["system", "user", "assistant"]), random_text(rng)))
    return messages


# ---- 核对 ----


def check_reader(content: bytes, path: Path, rng: random.Random) -> str:
    """读一份文件，核对与独立的解析、与体检、与读取的块大小都一致；返回结局。"""
    path.write_bytes(content)
    expected = data_messages(content)
    whole_block = reader._READ_BYTES
    outcomes = []
    for block in (whole_block, rng.randrange(1, 60)):
        reader._READ_BYTES = block
        try:
            outcomes.append([sample.messages for sample in read_samples(path)])
        except ValueError as error:
            assert "数据文件" in str(error), f"说明里没有提到数据文件：{error}"
            outcomes.append(None)
        finally:
            reader._READ_BYTES = whole_block
    assert outcomes[0] == outcomes[1], "读取的块大小改变了结果"
    assert outcomes[0] == expected, f"与独立的解析不同：{outcomes[0]!r} 与 {expected!r}"
    try:
        read_samples(path, "predict")
    except ValueError as error:
        assert "数据文件" in str(error), f"说明里没有提到数据文件：{error}"
    reports, _ = data_doctor.check_files([str(path)], str(path), None, 20, workers=1)
    has_errors = any(severity == "error" for severity, _ in reports[0].counts)
    assert has_errors == (expected is None), "体检与读取的结论不同"
    return "rejected" if expected is None else "read"


def check_conversation(messages: list[tuple[str, str]], tokenizer: BaichuanTokenizer, rng: random.Random) -> str:
    """编码一段对话，核对长度、角色 id、结束符、标签，以及预测的提示词与训练的 src 相同。"""
    prompt_format, family = rng.choice(PROMPT_FORMATS), rng.choice(PROMPT_FAMILIES)
    max_src_len = rng.choice([1, 2, 5, 20, 60, 200])
    max_len = max_src_len + rng.choice([1, 2, 10, 100])
    options = {"prompt_format": prompt_format, "family": family}
    try:
        item = encode_sample(
            Sample(tuple(messages), 1, "fuzz"), tokenizer, max_len=max_len, max_src_len=max_src_len, **options
        )
    except ValueError:
        return "refused"
    ids, labels = list(item.input_ids), list(item.labels)
    assert len(ids) == len(labels) <= max_len, "长度"
    assert item.num_src_tokens <= max_src_len, "src 长度"
    assert item.num_targets == sum(label != IGNORE_INDEX for label in labels[1:]), "目标数"
    reserved = [token for token in ids if token in tokenizer.reserved_ids]
    assert set(reserved) <= ({195, 196} if prompt_format == "chat" else set()), "文字里的控制符号成了角色 id"
    eos = tokenizer.eos_token_id
    assert prompt_format == "plain" or ids.count(eos) <= (ids[-1] == eos), "chat 的 eos 只在末尾"
    assert item.tgt_truncated != (ids[-1] == eos and labels[-1] == eos), "截短的回答没有 eos，完整的必有"
    same = [label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True)]
    assert all(ok or (token == 195 and label == eos) for ok, token, label in zip(same, ids, labels, strict=True)), (
        "标签"
    )
    # v1 的官方代码不用第一条用户消息之前的回答；这样的行读取时就会拒绝
    starts_with_user = next(role for role, _ in messages if role != "system") == "user"
    if messages[-2][0] == "user" and starts_with_user:
        prompt = encode_prompt(tokenizer, messages[:-1], max_src_len=max_src_len, **options)
        assert prompt == ids[: item.num_src_tokens], "预测的提示词与训练的 src 不同"
    limit = rng.choice([None, 1, 10, 50])
    try:
        encode_prompt(tokenizer, messages, max_input_tokens=limit, **options)
    except ValueError:
        return "prompt_refused"
    return "encoded"


def _on_alarm(number: int, frame: Any) -> None:
    raise TimeoutError(f"{HANG_SECONDS} 秒没有结束")


def fuzz(seconds: float, seed: int, tokenizer: BaichuanTokenizer, failures_dir: Path) -> tuple[Counter, list[str]]:
    """跑 seconds 秒 → (各结局的次数, 失败的说明)；十处失败即停。"""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    signal.signal(signal.SIGALRM, _on_alarm)
    started, number = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as scratch:
        while time.monotonic() - started < seconds and len(failures) < 10:
            rng = random.Random(f"{seed}-{number}")
            number += 1
            content, messages = random_file(rng), random_messages(rng)
            signal.alarm(HANG_SECONDS)
            try:
                counts[f"file_{check_reader(content, Path(scratch) / 'rows.json', rng)}"] += 1
                counts[f"conversation_{check_conversation(messages, tokenizer, rng)}"] += 1
            except Exception:
                failures_dir.mkdir(parents=True, exist_ok=True)
                (failures_dir / f"{seed}-{number - 1}.json").write_bytes(content)
                failures.append(f"第 {number - 1} 例 {messages!r}\n{traceback.format_exc()}")
            finally:
                signal.alarm(0)
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="时长，秒（缺省 %(default)s）")
    parser.add_argument("--seed", type=int, default=1, help="随机种子（缺省 %(default)s）")
    parser.add_argument("--model_name_or_path", help="用它的分词器（缺省现造一个微型的）")
    parser.add_argument(
        "--failures_dir", type=Path, default=Path("output-fuzz"), help="失败的输入留在这里（缺省 %(default)s）"
    )
    parser.add_argument("--output_dir", type=Path, help="把次数写成 fuzz.json（缺省不写）")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = args.model_name_or_path
        if path is None:
            from scripts.build_tiny_model import build_tiny_model

            path = build_tiny_model("baichuan2-7b", Path(scratch) / "tiny", layers=1, hidden_size=16, heads=2)
        tokenizer = BaichuanTokenizer.from_pretrained(path)
        counts, failures = fuzz(args.seconds, args.seed, tokenizer, args.failures_dir)
    total = sum(count for name, count in counts.items() if name.startswith("file_"))
    print(f"{args.seconds:g} 秒，{total} 份文件与对话，失败 {len(failures)}：{dict(sorted(counts.items()))}")
    for failure in failures:
        print(failure)
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        result = {"seconds": args.seconds, "seed": args.seed, "failures": len(failures), **dict(sorted(counts.items()))}
        write_json(args.output_dir / "fuzz.json", result)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
