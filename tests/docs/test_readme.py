"""说明与代码一致：每条命令能解析，带标记的真的运行（慢）；链接有去处，数字有出处，flags.md 不过时，页不太长。"""

import importlib
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import user_command
from paths import ROOT

from baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer
from finetune.cli import flags_page, predict_flags, train_flags
from finetune.data.prompting import encode_sample
from finetune.data.samples import Sample
from finetune.data_doctor import check as data_doctor
from finetune.methods.registry import TRAIN_METHODS, check_trainable
from finetune.process.training_process import free_port

MAX_LINES = {"README.md": 220, "README_EN.md": 120}
# 先读 README：带 <!-- run --> 的块依次运行，后面的页用它训练出的检查点
PAGES = [
    *(ROOT / name for name in MAX_LINES),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*/README.md")),
    ROOT / "data" / "README.md",
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
BASH_BLOCK = re.compile(r"(?:<!-- (run|network|other) -->\n)?```bash\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# (隐藏宽度, 前馈宽度, 层数, 头数, 词表)
SHAPES = {
    "7B": (4096, 11008, 32, 32, 64000),
    "7B-v2": (4096, 11008, 32, 32, 125696),
    "13B": (5120, 13696, 40, 40, 64000),
    "13B-v2": (5120, 13696, 40, 40, 125696),
}
by_page = pytest.mark.parametrize("page", TEXTS)


# ---- 页 ----


@pytest.mark.parametrize("page", MAX_LINES)
def test_a_person_can_read_it(page):
    assert TEXTS[page].count("\n") <= MAX_LINES[page]


def test_flags_page_is_current():
    """过时了就运行 python -m finetune.cli.flags_page > docs/flags.md。"""
    assert TEXTS["docs/flags.md"] == flags_page.page()


@by_page
def test_words(page):
    assert re.findall("默认|祖先|先祖", TEXTS[page]) == []


def anchors(text: str) -> set[str]:
    """各标题在 GitHub 上的锚。"""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@by_page
def test_links_lead_somewhere(page):
    for link in LINK.findall(TEXTS[page]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@by_page
def test_mentioned_files_exist(page):
    text = TEXTS[page]
    paths = re.findall(
        r"(?<![\w/.-])(?:scripts|data|tests|baichuan|benchmarks|finetune|docs|\.ci)/[\w./-]+\.\w+", text, re.ASCII
    )
    made = {"data/duie_0.json", "data/adgen_0.json", "data/tnews_0.json", "data/chn_0.json"}  # 转换写出的
    assert [path for path in sorted({*paths} - made) if not (ROOT / path).exists()] == []


def test_every_page_is_reachable_from_the_readme():
    linked = {link.partition("#")[0] for link in LINK.findall(TEXTS["README.md"])}
    assert {page for page in TEXTS if page != "README.md"} - linked == set()


# ---- 数 ----


def test_the_four_user_commands_are_verbatim():
    commands = [user_command(*pair) for pair in itertools.product(("0", "0,1,2,3"), ("baichuan-6B/", "baichuan2-6B/"))]
    assert all(f"```bash\n{command}```" in TEXTS["docs/commands.md"] for command in commands)
    assert f"```bash\n{user_command('0', 'baichuan-6B/')}```" in TEXTS["README.md"]


def test_the_user_command_is_the_shared_one(shared_dir):
    assert user_command("0", "baichuan-6B/") in (shared_dir / "commands.md").read_text("utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """各张表的各行的各格，不含分隔行。"""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    rows = [[line for line in table.splitlines() if not re.fullmatch(r"[|\-: ]+", line)] for table in found]
    return [[[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table] for table in rows]


@pytest.mark.parametrize("page", MAX_LINES)
def test_the_evidence_stands_in_the_results(page):
    """第一屏的表：每个数都在那一行链接的结果文件里。"""
    rows = tables(TEXTS[page])[0][1:]
    assert len(rows) >= 5
    for *cells, source in rows:
        [link] = LINK.findall(source)
        result = (ROOT / link).read_text(encoding="utf-8")
        text, own = " ".join(cells), float(re.search(r"[\d.]+", cells[1])[0])
        ratio = re.compile(r"(\d+)\s?[（(](\d+\.\d\d)\s?[倍×]")
        assert [pair for pair in ratio.findall(text) if abs(own / float(pair[0]) - float(pair[1])) > 0.011] == []
        numbers = re.findall(r"\d+(?:\.\d+)?", ratio.sub(r"\1 ", text))
        assert [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", result)] == []


def test_the_memory_table_is_that_of_the_benchmark():
    """README 的每一格都是 benchmarks/memory 的；缺的组合（量化与卸载）写明。"""
    full = {tuple(row[:3]): row[3:] for row in tables(TEXTS["benchmarks/memory/README.md"])[0][1:]}
    [table] = [table for table in tables(TEXTS["README.md"]) if table[0][:2] == ["模型", "方法"]]
    assert len(table) == 11
    for size, method, one_card, four_cards, offloaded in table[1:]:
        row = full[size, method, "ZeRO-2"]
        assert (one_card, four_cards) == (row[0], row[2])
        assert offloaded == full.get((size, method, "ZeRO-3 卸载"), ["不能同用"])[0]
    [english] = [table for table in tables(TEXTS["README_EN.md"]) if "lora" in table[0]]
    for size, *cells in english[1:]:
        assert cells[:4] == [
            full[size, name, "ZeRO-2"][0] for name in ("lora `--load_in_4bit`", "lora", "ptuning", "freeze")
        ]
        assert cells[4] == full[size, "full", "ZeRO-2"][2]


def meta_model(shape: str) -> BaichuanForCausalLM:
    hidden, intermediate, layers, heads, vocab = SHAPES[shape]
    config = BaichuanConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    with torch.device("meta"):
        return BaichuanForCausalLM(config)


@pytest.mark.parametrize("method", TRAIN_METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_trainable_counts(method, shape):
    """方法表里的参数量由真实的结构数出来（meta 设备，不占内存）。"""
    layers = SHAPES[shape][2]
    freeze = ",".join(f"layers.{index}." for index in range(layers - 4, layers))
    flags = ["--train_path", "d", "--model_name_or_path", "m", "--output_dir", "o", "--train_type", method]
    args = train_flags.parse_args([*flags, *(["--freeze_module_name", freeze] if method == "freeze" else [])])
    with torch.device("meta"):
        count = check_trainable(TRAIN_METHODS[method].apply(meta_model(shape), args), args)
    [row] = re.findall(rf"^\| `{method}` \| .*\d,\d\d\d.*$", TEXTS["README.md"], re.MULTILINE)
    assert f"{count:,}" in row


def test_prompt_pictures(shared_dir):
    """两幅 token id 图来自真正的 Baichuan2 分词器与 encode_sample。"""
    tokenizer = BaichuanTokenizer.from_pretrained(shared_dir / "tokenizer" / "v2")
    samples = {
        "plain": (("user", "抽取三元组：怠速不稳"), ("assistant", "怠速_性能故障_不稳")),
        "chat": (("user", "怠速不稳"), ("assistant", "没有"), ("user", "还有吗"), ("assistant", "没有")),
    }
    pictures = re.findall(r"^input_ids (.*)\nlabels (.*)$", TEXTS["docs/data.md"], re.MULTILINE)
    for (prompt_format, messages), (ids, labels) in zip(samples.items(), pictures, strict=True):
        encoded = encode_sample(Sample(messages, 1, "x"), tokenizer, prompt_format, max_len=64, max_src_len=32)
        assert [int(word) for word in ids.replace("│", "").split()] == list(encoded.input_ids)
        assert [int(word) for word in labels.replace("│", "").split()] == list(encoded.labels)


# ---- 命令 ----


def commands_of(block: str) -> list[list[str]]:
    """一个 bash 块里的各条命令：拼好续行，去掉注释。"""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def all_commands() -> dict[tuple[str, ...], str]:
    """各条不同的命令 → 它所在的块的标记；不含要联网的块。"""
    found = [(mark, block) for text in TEXTS.values() for mark, block in BASH_BLOCK.findall(text) if mark != "network"]
    reliability = TEXTS["benchmarks/reliability/README.md"]  # 这一页的命令在表里
    found += [("", command) for command in re.findall(r"^\| `(python .*?)` \|", reliability, re.MULTILINE)]
    return {tuple(words): mark for mark, block in found for words in commands_of(block)}


COMMANDS = all_commands()
ASSIGNMENT = re.compile(r"\w+=")
OWN_PROGRAMS = ("python", "bash", "deepspeed", "export")
# 没有 parse_args(argv) 的：由它们自己的 --help 核对参数的名字
OWN_HELP = ("scripts/deepspeed_ops.py", "data/source/make.py", "finetune.checkpoint", "benchmarks/reliability/")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_parses(words, tmp_path, monkeypatch, capsys):
    """命令的参数能被它自己的解析器接受；别的程序只在标了 <!-- network --> 或 <!-- other --> 的块里。"""
    if words[0].startswith(("CKPT=$(", "PEERS=")):
        return
    program, *rest = itertools.dropwhile(ASSIGNMENT.match, words)
    if program not in OWN_PROGRAMS or rest[:2] == ["-m", "llama_cpp.server"]:
        assert COMMANDS[words] == "other"
        return
    if program == "deepspeed":
        assert train_flags.parse_args(rest[rest.index("train.py") + 1 :]).train_type in TRAIN_METHODS
    elif program == "bash":
        check_launcher(rest, tmp_path)
    elif program == "export":
        assert ASSIGNMENT.match(rest[0])
    elif rest[0] == "-c":
        compile(rest[1], "<README>", "exec")
    else:
        check_python(rest, monkeypatch, capsys)


def check_python(words: list[str], monkeypatch, capsys):
    script, *flags = words[1:] if words[0] == "-m" else words
    module = script.removesuffix(".py").replace("/", ".")
    if script.startswith(OWN_HELP):
        subcommand = [word for word in flags[:1] if not word.startswith("-")]
        monkeypatch.setattr(sys, "argv", [script, *subcommand, "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_module(module, run_name="__main__")
        shown = capsys.readouterr().out
        assert [flag for flag in flags if flag.startswith("--") and flag not in shown] == []
        return
    parsers = {
        "train.py": train_flags.parse_args,
        "predict.py": predict_flags.parse_args,
        "data_set.py": lambda flags: data_doctor.build_parser().parse_args(flags),
    }
    parse = parsers.get(script) or importlib.import_module(module).parse_args
    parse([word for word in flags if word != "$PEERS"])


def check_launcher(words: list[str], tmp_path: Path):
    """启动脚本：让 PATH 上的 deepspeed 把收到的参数写下来，再交给 train.py 的解析器。"""
    script = ROOT / words[0]
    assert script.is_file(), words
    if not script.name.startswith("train_"):
        assert words[1:] == []
        return
    recorded = tmp_path / "argv.json"
    recorder = tmp_path / "bin" / "deepspeed"
    recorder.parent.mkdir(exist_ok=True)
    code = f"import json, sys; json.dump(sys.argv[1:], open({str(recorded)!r}, 'w'))"
    recorder.write_text(f"#!{sys.executable}\n{code}\n", encoding="utf-8")
    recorder.chmod(0o755)
    (tmp_path / "hostfile").write_text("10.0.0.1 slots=8\n", encoding="utf-8")
    environment = os.environ | {
        "PATH": f"{recorder.parent}{os.pathsep}{os.environ['PATH']}",
        "HOSTFILE": str(tmp_path / "hostfile"),
    }
    subprocess.run(["bash", script, *words[1:]], env=environment, check=True, timeout=60)
    argv = json.loads(recorded.read_text(encoding="utf-8"))
    train_flags.parse_args(argv[argv.index("train.py") + 1 :])


def test_what_needs_a_network_is_marked():
    for page, text in TEXTS.items():
        for mark, block in BASH_BLOCK.findall(text):
            needs_network = bool(re.search(r"\bpip install\b|^modelscope ", block, re.MULTILINE))
            assert needs_network == (mark == "network"), page


@pytest.mark.slow
@pytest.mark.deepspeed
def test_marked_blocks_run(tiny_checkpoint, tmp_path):
    """带 <!-- run --> 标记的命令在项目的副本里依次原样运行，微型检查点代替 baichuan2-7B/，各数据文件只留几行。"""
    copy = tmp_path / "copy"
    known = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, known.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(tiny_checkpoint("baichuan2-7b", layers=32, hidden_size=32, heads=2), copy / "baichuan2-7B")
    for path in (copy / "data").glob("*.json"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:8]), encoding="utf-8")
    environment = os.environ | {
        "LOCAL_SIZE": "1",
        "PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(copy),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    blocks = [block for text in TEXTS.values() for mark, block in BASH_BLOCK.findall(text) if mark == "run"]
    assert len(blocks) >= 8
    # 体检的退出码 1 是「只有警告」
    script = re.sub(
        r"^(python data_set\.py check .*?)(?=    #|$)", r"\1 || [ $? -le 1 ]", "\n".join(blocks), flags=re.M
    )
    result = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=copy,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert (copy / "output-lora" / "previous-1").is_dir()
    predictions = (copy / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(predictions) == 8 and all("prediction" in json.loads(line) for line in predictions)
    exported = json.loads((copy / "baichuan2-7B-llama" / "config.json").read_text("utf-8"))
    assert exported["architectures"] == ["LlamaForCausalLM"]
    assert (copy / "report.png").is_file()
    assert "训练早已完成" in result.stdout
