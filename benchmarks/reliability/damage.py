"""损坏战役：按种子造出几百个损坏的数据文件、DeepSpeed 配置、检查点与缓存，逐个交给真实的读取代码，核对结局。

    python benchmarks/reliability/damage.py --seed 1 --output_dir benchmarks/reliability/results

每一例都在 fork 出的子进程里运行，对的结局只有三种：拒绝并说明原因；改动不影响内容；外来文件改动后仍然合法（另计）。
没有说明的异常、挂起、被信号杀死、悄悄接受结构性损坏、我们自己的检查点（有清单）里的任何损坏没有被发现，都算失败。
结果写到 damage.json（每一例）与 damage.md（汇总），退出码 0 表示没有失败。
"""

import argparse
import functools
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from benchmarks.reliability.damage_kinds import (
    FILE_SURGERY,
    GPT,
    HUMAN,
    ROW_SURGERY,
    Damage,
    damage_bytes,
    damage_fields,
    damage_path,
)
from benchmarks.reliability.damage_oracle import data_messages, judge_foreign, judge_json
from benchmarks.reliability.isolated_run import run_isolated
from data_set import BaichuanDataSet
from finetune.checkpoint.base_model import load_base_model, load_config, load_tokenizer
from finetune.checkpoint.manifest import verify_checkpoint
from finetune.checkpoint.save import save_checkpoint
from finetune.data.prompting import resolve_prompt_format
from finetune.data.samples import read_samples
from finetune.data_doctor import check as data_doctor
from finetune.terminal import format_table
from finetune.training.ds_config import read_ds_config, resolve_ds_config
from scripts.build_tiny_model import build_tiny_model
from utils import file_sha256, write_json

ROOT = Path(__file__).resolve().parents[2]


FULL_COUNTS = {"data": 110, "ds_config": 60, "own_checkpoint": 60, "foreign_checkpoint": 80, "token_cache": 15}
VERDICTS = ("rejected", "harmless", "well_formed", "failed")
SIZES = {"layers": 2, "hidden_size": 32, "heads": 4, "intermediate_size": 48, "chat": True}
DATA_FILES = ("spo_0.json", "d2q_0.json", "cls_0.json")
# config.json 里影响计算的键
SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *(
        "rms_norm_eps",
        "max_position_embeddings",
        "model_max_length",
        "position_embedding",
        "norm_head",
        "z_loss_weight",
    ),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "initializer_range"),
)
TEXT = "水温高，风扇低速转动。<reserved_106> Hello 🚗"


class Outcome(NamedTuple):
    """一例的结局；verdict 见 VERDICTS。"""

    kind: str
    number: int
    file: str
    damage: str
    verdict: str
    detail: str


# ---- 完好的原件 ----


def build_originals(directory: Path) -> Path:
    """在 directory 里造出各种完好的文件，返回它。"""
    torch.set_num_threads(1)
    rows = []
    for name in DATA_FILES:
        rows += (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()[:8]
    rows += [json.dumps({"conversations": [HUMAN, GPT, {**HUMAN, "value": text}, GPT]}) for text in ("再见", "谢谢")]
    (directory / "data").mkdir(parents=True)
    (directory / "data" / "rows.json").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    shutil.copytree(
        ROOT, directory / "ds_config", ignore=lambda _, names: {n for n in names if not n.startswith("ds_")}
    )
    foreign = directory / "foreign_checkpoint"
    build_tiny_model("baichuan2-7b", foreign / "single", **SIZES)
    build_tiny_model("baichuan2-13b", foreign / "sharded", max_shard_size="100KB", **SIZES)
    build_tiny_model("baichuan-7b", foreign / "bin", format="bin", **{**SIZES, "chat": False})
    for method in ("lora", "full"):
        _save_own_checkpoint(foreign / "single", directory / "own_checkpoint" / method, method)
    load_cached(directory / "data" / "rows.json", foreign / "single", directory / "token_cache")
    # 原件都读得进来，后面的拒绝才说明问题
    read_data(directory / "data", foreign / "single")
    for path in [*foreign.iterdir()]:
        read_foreign(path, path)
    for path in [*(directory / "own_checkpoint").glob("*/*")]:
        assert verify_checkpoint(path) == [], path
    assert load_cached(directory / "data" / "rows.json", foreign / "single", directory / "token_cache")[
        "note"
    ].startswith("命中")
    return directory


def _save_own_checkpoint(base: Path, output_dir: Path, method: str) -> None:
    """用真实的保存代码写一个检查点；单进程不切分时它只用到引擎的 module 与 global_steps。"""
    from finetune.cli.train_flags import parse_args
    from model_factory import build_model

    flags = ["--train_path", "-", "--output_dir", "-", "--model_name_or_path", str(base), "--train_type", method]
    config = load_config(base)
    model = build_model(parse_args(flags), config, "fp32", {})
    output_dir.mkdir(parents=True)
    tokenizer = load_tokenizer(base, config.vocab_size)
    save_checkpoint(SimpleNamespace(module=model, global_steps=7), tokenizer, {"train_type": method}, output_dir, 1)


# ---- 各类的损坏 ----


def damage_data(directory: Path, rng: random.Random, number: int) -> Damage:
    """双数改字节，单数依次用各种手术，前一百来例因此遍历每一种。"""
    path = directory / "rows.json"
    content = path.read_bytes()
    surgeries = [*ROW_SURGERY, *FILE_SURGERY, "path"]
    name = surgeries[number // 2 % len(surgeries)]
    if number % 2 == 0:
        damaged, what = damage_bytes(content, rng)
        path.write_bytes(damaged)
        return Damage(path.name, what, None)
    if name == "path":
        return Damage(path.name, damage_path(path, rng), True)
    if name in FILE_SURGERY:
        change, is_structural = FILE_SURGERY[name]
        path.write_bytes(change(content))
        return Damage(path.name, name, is_structural)
    lines = content.strip().split(b"\n")
    at = rng.randrange(len(lines) - 2)  # 末两行是对话
    lines[at] = ROW_SURGERY[name](json.loads(lines[at]))
    path.write_bytes(b"\n".join(lines) + b"\n")
    return Damage(path.name, f"{name}（第 {at + 1} 行）", True)


def damage_directory(directory: Path, rng: random.Random, number: int) -> Damage:
    """损坏目录里的某个文件：JSON 多半动字段，其他的动字节；少数换掉整个文件。"""
    path = rng.choice(sorted(path for path in directory.rglob("*") if path.is_file()))
    name = str(path.relative_to(directory))
    if rng.random() < 0.08:
        return Damage(name, damage_path(path, rng), None)
    content = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.65:
        text, what, _ = damage_fields(json.loads(content), rng)
        path.write_text(text, encoding="utf-8")
        if path.read_bytes() != content:
            return Damage(name, what, None)
    damaged, what = damage_bytes(content, rng)
    path.write_bytes(damaged)
    return Damage(name, what, None)


def damage_own_checkpoint(directory: Path, rng: random.Random, number: int) -> Damage:
    """我们的检查点另有几种整份的损坏：多一个文件、两个文件对调。"""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    choice = rng.random()
    if choice < 0.06:
        (files[0].parent / "extra.bin").write_bytes(b"x")
        return Damage("extra.bin", "多出一个文件", True)
    if choice < 0.12:
        first, second = rng.sample(files, 2)
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])
        return Damage(first.name, f"与 {second.name} 对调", True)
    return damage_directory(directory, rng, number)


# ---- 各类的读取 ----


def read_data(directory: Path, base: Path) -> dict[str, Any]:
    """读取、编码、体检三处都走一遍：体检的退出码必须与是否拒绝一致。"""
    path = str(directory / "rows.json")
    config = load_config(base)
    tokenizer = load_tokenizer(base, config.vocab_size)
    prompting = resolve_prompt_format("auto", base, config)._asdict()
    encoding = data_doctor.Encoding(tokenizer, 512, 256, prompting)
    reports, _ = data_doctor.check_files([path], None, encoding, 20, workers=1)
    has_errors = any(severity == "error" for severity, _ in reports[0].counts)
    try:
        samples = read_samples(path)
        data = BaichuanDataSet(path, tokenizer, max_len=512, max_src_len=256, num_workers=1, **prompting)
    except ValueError as error:
        if not has_errors:
            raise RuntimeError("读取拒绝了这份文件，体检却没有报错误") from error
        raise
    if has_errors or len(data) != len(samples):
        raise RuntimeError("体检报了错误，读取却接受了这份文件")
    return {"messages": [sample.messages for sample in samples]}


def read_config(directory: Path, base: Path, name: str) -> dict[str, Any]:
    """读配置、填 auto，再用 DeepSpeed 自己的解析、优化器与学习率调度核对一遍。"""
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DeepSpeedConfig

    config = resolve_ds_config(read_ds_config(directory / name), "fp32", 4, 2, 1, 1e-4, 0.1, 100, 0.1)
    DeepSpeedConfig(config)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
    if section := config.get("optimizer"):
        params = {key: value for key, value in section.get("params", {}).items() if key != "torch_adam"}
        optimizer = torch.optim.AdamW(optimizer.param_groups[0]["params"], **params)
    if section := config.get("scheduler"):
        getattr(lr_schedules, section["type"])(optimizer, **section.get("params", {})).step()
    return {"config": json.dumps(config, sort_keys=True)}


def read_foreign(directory: Path, base: Path) -> dict[str, Any]:
    """读配置、分词器、提示格式与全部权重，返回内容的指纹。"""
    config = load_config(directory)
    tokenizer = load_tokenizer(directory, config.vocab_size)
    prompting = resolve_prompt_format("auto", directory, config)
    model = load_base_model(directory, config, torch.float32, torch.device("cpu"))
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode() + tensor.numpy().tobytes())
    settings = {key: getattr(config, key) for key in SETTINGS}
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer))
    return {
        "fingerprint": repr((weights.hexdigest(), settings, prompting, tokenizer.encode_plain(TEXT), special)),
        "hashes": {p.name: file_sha256(p) for p in sorted(directory.iterdir()) if p.is_file()},
    }


def load_cached(data_path: Path, base: Path, cache_dir: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(base, load_config(base).vocab_size)
    data = BaichuanDataSet(
        data_path, tokenizer, prompt_format="chat", max_len=512, max_src_len=256, cache_dir=cache_dir, num_workers=1
    )
    return {"content": [item.input_ids.tolist() for item in data], "note": data.cache_note}


# ---- 战役 ----


def run_case(kind: str, number: int, seed: int, originals: Path, scratch: Path, timeout_s: float) -> Outcome:
    """造一例损坏，读它，判断结局；scratch 用后即删。"""
    rng = random.Random(f"{seed}-{kind}-{number}")
    base = originals / "foreign_checkpoint" / "single"
    source = originals / kind
    if kind in ("own_checkpoint", "foreign_checkpoint"):
        source = rng.choice(sorted(source.iterdir()))
    if kind == "own_checkpoint":
        source = next(source.iterdir())
    work = scratch / f"{kind}-{number}"
    shutil.copytree(source, work)
    choose = {"data": damage_data, "own_checkpoint": damage_own_checkpoint}
    damage = choose.get(kind, damage_directory)(work, rng, number)
    readers: dict[str, Callable[[], dict[str, Any]]] = {
        "data": lambda: read_data(work, base),
        "ds_config": lambda: read_config(work, base, damage.file),
        "own_checkpoint": lambda: {"problems": verify_checkpoint(work)},
        "foreign_checkpoint": lambda: read_foreign(work, base),
        "token_cache": lambda: load_cached(originals / "data" / "rows.json", base, work),
    }
    status, value = run_isolated(readers[kind], timeout_s)
    verdict, detail = judge(kind, source, work, damage, status, value)
    shutil.rmtree(work)
    return Outcome(kind, number, damage.file, damage.what, verdict, str(detail).replace(f"{scratch}/", ""))


def judge(kind: str, source: Path, work: Path, damage: Damage, status: str, value: Any) -> tuple[str, str]:
    """一例的 (结局, 说明)。"""
    if status in ("crash", "hang", "killed"):
        return "failed", f"{status}: {value.strip().splitlines()[-1]}\n{value}"
    if kind == "own_checkpoint":
        problems = value["problems"] if status == "accepted" else [value]
        return ("rejected", problems[0]) if problems else ("failed", "清单核对没有发现这处损坏")
    if kind == "token_cache":
        good = encode_without_cache(source.parent)
        noticed = not value["note"].startswith("命中")
        if value["content"] != good:
            return "failed", "读出的内容不对"
        return ("rejected", value["note"]) if noticed else ("failed", "损坏的缓存被当成完好的")
    if kind == "data":
        return _judge_data(source, work, damage, status, value)
    if status == "rejected":
        return "rejected", value
    if kind == "ds_config":
        original, damaged = source / damage.file, work / damage.file
        if value["config"] == read_config(source, source, damage.file)["config"]:
            return "harmless", "填好的配置与原来相同"
        return judge_json(original, damaged, optional_keys=True)
    good = read_original(source)
    if value["fingerprint"] == good["fingerprint"]:
        return "harmless", "读出的权重、分词与设置与原来相同"
    if value["hashes"] == good["hashes"]:
        return "failed", "内容变了，文件的哈希却没有变"
    return judge_foreign(source / damage.file, work / damage.file)


def _judge_data(source: Path, work: Path, damage: Damage, status: str, value: Any) -> tuple[str, str]:
    path = work / damage.file
    expected = data_messages(path.read_bytes()) if path.is_file() else None
    if status == "rejected":
        if expected is not None and damage.is_structural is not True:
            return "failed", f"独立的判断认为文件合法，却被拒绝：{value}"
        return "rejected", value
    if damage.is_structural is True or expected is None:
        return "failed", "结构性的损坏被悄悄接受"
    if expected != value["messages"]:
        return "failed", "读出的内容与独立的解析不同"
    if expected == data_messages((source / damage.file).read_bytes()):
        return "harmless", "读出的样本与原来相同"
    return "well_formed", "改动之后每一行仍然合法"


@functools.cache
def encode_without_cache(originals: Path) -> list:
    """不用缓存时的编码结果，与缓存无关的正确答案。"""
    with tempfile.TemporaryDirectory() as empty:
        base = originals / "foreign_checkpoint" / "single"
        return load_cached(originals / "data" / "rows.json", base, Path(empty))["content"]


@functools.cache
def read_original(directory: Path) -> dict[str, Any]:
    return read_foreign(directory, directory)


def run_campaign(counts: dict[str, int], seed: int, scratch: Path, timeout_s: float = 60) -> list[Outcome]:
    """按 counts 跑完各类，返回每一例的结局；同样的种子得到同样的损坏。"""
    if counts.get("ds_config"):
        import deepspeed  # noqa: F401 （在父进程里导入一次，子进程不再花几秒）
    originals = build_originals(scratch / "originals")
    cases = [(kind, number) for kind, count in counts.items() for number in range(count)]
    return [run_case(kind, number, seed, originals, scratch, timeout_s) for kind, number in cases]


def summarize(outcomes: list[Outcome]) -> str:
    """每类各种结局的数目，文本表。"""
    table = Counter((outcome.kind, outcome.verdict) for outcome in outcomes)
    kinds = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    rows = [
        [kind, *(str(table[kind, v]) for v in VERDICTS), str(sum(table[kind, v] for v in VERDICTS))] for kind in kinds
    ]
    totals = [sum(table[kind, verdict] for kind in kinds) for verdict in VERDICTS]
    rows.append(["合计", *map(str, totals), str(len(outcomes))])
    return format_table(["类别", "拒绝并说明", "不影响内容", "仍然合法", "失败", "总数"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="随机种子（缺省 %(default)s）")
    parser.add_argument("--scale", type=float, default=1.0, help="各类数目的倍数；1 为 325 例（缺省 %(default)s）")
    parser.add_argument("--only", choices=list(FULL_COUNTS), help="只跑一类（缺省全部）")
    parser.add_argument("--timeout_s", type=float, default=60, help="一例的时限，秒（缺省 %(default)s）")
    parser.add_argument("--output_dir", type=Path, help="结果的目录（缺省不写）")
    args = parser.parse_args()
    counts = {
        kind: max(1, round(args.scale * count)) for kind, count in FULL_COUNTS.items() if args.only in (None, kind)
    }
    started = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = run_campaign(counts, args.seed, Path(scratch), args.timeout_s)
    seconds = time.time() - started
    failures = [outcome for outcome in outcomes if outcome.verdict == "failed"]
    table = summarize(outcomes)
    print(table)
    for outcome in failures:
        print(f"\n失败 {outcome.kind} #{outcome.number} {outcome.file} {outcome.damage}\n{outcome.detail}")
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        cases = [outcome._replace(detail=" ".join(outcome.detail.split())[:300])._asdict() for outcome in outcomes]
        write_json(args.output_dir / "damage.json", {"seed": args.seed, "seconds": round(seconds), "cases": cases})
        command = f"python benchmarks/reliability/damage.py --seed {args.seed} --scale {args.scale:g}"
        title = f"# 损坏战役\n\n`{command}`，用时 {seconds:.0f} 秒"
        note = (
            "「仍然合法」：外来的权重、数据或配置改动之后仍然合法，读取时看不出来；run_config.json 里的内容哈希会变。"
        )
        (args.output_dir / "damage.md").write_text(f"{title}。\n\n```\n{table}\n```\n\n{note}\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
