"""README 与代码一致：参数表、参数量、用户的四条命令、提到的文件；每条命令能解析，带标记的真的运行（慢）。"""

import argparse
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import user_command
from paths import ROOT

from baichuan import BaichuanConfig, BaichuanForCausalLM
from finetune.checkpoint.options import MODEL_FAMILIES
from finetune.cli import predict_flags, train_flags
from finetune.data_doctor import check as data_doctor
from finetune.methods.registry import TRAIN_METHODS, check_trainable
from finetune.metrics.registry import METRICS
from finetune.process.training_process import free_port

READMES = ("README.md", "README_EN.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in READMES}
# (隐藏宽度, 前馈宽度, 层数, 头数, 词表)
SHAPES = {
    "7B": (4096, 11008, 32, 32, 64000),
    "7B-v2": (4096, 11008, 32, 32, 125696),
    "13B": (5120, 13696, 40, 40, 64000),
    "13B-v2": (5120, 13696, 40, 40, 125696),
}
BASH_BLOCK = re.compile(r"(<!-- run -->\n)?```bash\n(.*?)```", re.DOTALL)
# 不属于本项目、不解析的命令
FOREIGN = ("pip", "modelscope", "source")


@pytest.fixture(params=READMES)
def text(request) -> str:
    return TEXTS[request.param]


# ---------------------------------------------------------------------------------------------------------------------
# 参数表


def table_rows(text: str, heading: str) -> dict[str, str]:
    """标题之后的参数表：{参数名: 缺省值一栏}。"""
    section = text.split(f"\n### {heading}\n", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| `--(\w+)` \| (.*?) \| .+ \|$", section, re.MULTILINE)
    assert len(rows) == len(dict(rows)), "参数表里有重复的行"
    return dict(rows)


def check_default(name: str, cell: str, default, is_required: bool):
    """缺省值一栏：必填的写明；有缺省值的是 `值`；没有的不能是 `值`。"""
    if is_required:
        assert cell in ("必填", "required"), name
    elif default is None:
        assert cell and "`" not in cell, f"--{name} 没有缺省值，表里却写 {cell}"
    else:
        assert cell == f"`{default}`", f"--{name} 的缺省值是 {default!r}，表里写 {cell}"


def test_train_flags_match_argparse(text):
    actions = {
        action.dest: action
        for action in train_flags.build_parser()._actions
        if not isinstance(action, argparse._HelpAction)
    }
    rows = table_rows(text, "train.py")
    assert rows.keys() == actions.keys()
    for name, cell in rows.items():
        check_default(name, cell, actions[name].default, actions[name].required)


def test_predict_flags_match_argparse(text):
    defaults = vars(predict_flags.parse_args(["--model_path", "checkpoint"]))
    rows = table_rows(text, "predict.py")
    assert rows.keys() == defaults.keys()
    for name, cell in rows.items():
        check_default(name, cell, defaults[name], name == "model_path")


def test_learning_rates_are_those_of_the_methods(text):
    [row] = re.findall(r"^\| `--learning_rate` .*$", text, re.MULTILINE)
    found = {name: float(value) for name, value in re.findall(r"(\w+) (\de-\d)", row)}
    assert found == {name: method.learning_rate for name, method in TRAIN_METHODS.items()}


def test_every_registry_key_is_mentioned(text):
    for key in (*MODEL_FAMILIES, *TRAIN_METHODS, *METRICS):
        assert f"`{key}`" in text, f"{key} 没有写进 README"


# ---------------------------------------------------------------------------------------------------------------------
# 四条命令、文件、数字


def test_the_four_user_commands_are_verbatim(text):
    for cards, model in itertools.product(("0", "0,1,2,3"), ("baichuan-6B/", "baichuan2-6B/")):
        assert f"```bash\n{user_command(cards, model)}```" in text


def test_the_user_command_is_the_shared_one(shared_dir):
    assert user_command("0", "baichuan-6B/") in (shared_dir / "commands.md").read_text("utf-8")


def test_mentioned_paths_exist(text):
    paths = re.findall(r"(?<![\w/.-])(?:scripts|data|tests|baichuan|benchmarks|\.ci)/[\w.-]+\.\w+", text)
    assert len(paths) > 10
    assert [path for path in sorted({*paths}) if not (ROOT / path).exists()] == []


def test_mentioned_modules_exist(text):
    """foo.py 之类的裸名字：在根目录、scripts/、baichuan/ 或 tests/ 里。"""
    names = {*re.findall(r"(?<![\w/.*-])[a-z]\w*\.(?:py|sh|txt|toml)\b", text, re.ASCII)}
    names -= {"launch.py"}  # DeepSpeed 的
    places = [ROOT, *(ROOT / place for place in ("scripts", "baichuan", "tests"))]
    assert [name for name in sorted(names) if not any((place / name).is_file() for place in places)] == []
    for name in re.findall(r"\bds_\w+\.json", text):
        assert name == "ds_config.json" or (ROOT / name).is_file(), name


def test_every_module_is_in_the_layout(text):
    assert [path.name for path in sorted(ROOT.glob("*.py")) if path.name not in text] == []


def test_links_lead_somewhere(text):
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        assert link[1:] in headings if link.startswith("#") else (ROOT / link).is_file(), link


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
    for name, text in TEXTS.items():
        [row] = re.findall(rf"^\| `{method}` \| .*\d,\d\d\d.*$", text, re.MULTILINE)
        assert f"{count:,}" in row, f"{name} 的方法表里没有 {shape} {method} 的 {count:,}"


def test_memory_floors():
    """推算表：权重每参数 2 字节，可训练的另加 14 字节；卸载每参数 18 字节。"""
    expected = {"权重": [], "freeze": [], "lora": [], "full，状态": [], "主机内存": []}
    for hidden, intermediate, layers, _, vocab in SHAPES.values():
        layer = 4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden
        total = 2 * vocab * hidden + layers * layer + hidden
        trained = {"权重": 0, "freeze": 4 * layer, "lora": 32 * hidden * layers, "full，状态": total}
        for name, count in trained.items():
            expected[name].append(f"{(2 * total + 14 * count) / 2**30:.1f}")
        expected["主机内存"].append(f"{18 * total / 2**30:.0f}")
    table = TEXTS["README.md"].split("| 推算 |", 1)[1].split("\n\n", 1)[0]
    for name, numbers in expected.items():
        [row] = [line for line in table.splitlines() if name in line.split("|")[1]]
        assert [cell.strip() for cell in row.split("|")[2:-1]] == numbers


def test_prompt_pictures(shared_dir):
    """两幅 token id 图来自真正的 Baichuan2 分词器与 encode_sample。"""
    from baichuan import BaichuanTokenizer
    from finetune.data.prompting import encode_sample
    from finetune.data.samples import Sample

    tokenizer = BaichuanTokenizer.from_pretrained(shared_dir / "tokenizer" / "v2")
    samples = {
        "plain": (("user", "抽取三元组：怠速不稳"), ("assistant", "怠速_性能故障_不稳")),
        "chat": (("user", "怠速不稳"), ("assistant", "没有"), ("user", "还有吗"), ("assistant", "没有")),
    }
    for text in TEXTS.values():
        pictures = re.findall(r"^input_ids (.*)\nlabels (.*)$", text, re.MULTILINE)
        assert len(pictures) == 2
        for (prompt_format, messages), (ids, labels) in zip(samples.items(), pictures, strict=True):
            encoded = encode_sample(Sample(messages, 1, "x"), tokenizer, prompt_format, max_len=64, max_src_len=32)
            assert [int(word) for word in ids.replace("│", "").split()] == list(encoded.input_ids)
            assert [int(word) for word in labels.replace("│", "").split()] == list(encoded.labels)


# ---------------------------------------------------------------------------------------------------------------------
# 命令


def commands_of(block: str) -> list[list[str]]:
    """一个 bash 块里的各条命令：拼好续行，去掉注释。"""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def all_commands() -> list[tuple[str, list[str]]]:
    return [
        (name, words)
        for name in READMES
        for _, block in BASH_BLOCK.findall(TEXTS[name])
        for words in commands_of(block)
    ]


def script_parser(name: str):
    """scripts/ 下一个工具的 parse_args。"""
    return importlib.import_module(f"scripts.{name}").parse_args


def check_command(words: list[str], tmp_path: Path):
    """命令的参数能被它自己的解析器接受。"""
    while "=" in words[0] and not words[0].startswith("-"):
        value = words.pop(0).partition("=")[2]
        assert value
        if value.startswith("$("):
            return  # CKPT=$(ls …)
    program, *rest = words
    if program in FOREIGN or program.startswith("python3."):
        return
    if program == "deepspeed":
        flags = rest[rest.index("train.py") + 1 :]
        args = train_flags.parse_args(flags)
        assert args.train_type in TRAIN_METHODS
        return
    if program == "bash":
        check_launcher(rest, tmp_path)
        return
    assert program == "python", words
    if rest[0] == "-c":
        compile(rest[1], "<README>", "exec")
        return
    parsers = {
        "train.py": train_flags.parse_args,
        "predict.py": predict_flags.parse_args,
        "data_set.py": lambda flags: data_doctor.build_parser().parse_args(flags),
        "checkpoint.py": check_verify,
        "scripts/deepspeed_ops.py": lambda flags: flags in (["build"], ["clean_shm"]) or pytest.fail(str(flags)),
    }
    script, *flags = rest
    parse = parsers.get(script) or script_parser(Path(script).stem)
    parse(flags)


def check_verify(flags: list[str]):
    command, _directory, *rest = flags
    assert not rest or (command == "hash" and rest[0] in (">", "--check"))
    assert command in ("verify", "hash")


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


@pytest.mark.parametrize(("readme", "words"), all_commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_parses(readme, words, tmp_path):
    check_command([*words], tmp_path)


def test_marked_blocks_are_the_same_in_both_languages():
    english, chinese = (
        [commands_of(block) for mark, block in BASH_BLOCK.findall(TEXTS[name]) if mark] for name in reversed(READMES)
    )
    assert len(chinese) >= 4
    assert english == chinese


@pytest.mark.slow
@pytest.mark.deepspeed
def test_marked_blocks_run(tiny_checkpoint, tmp_path):
    """带 <!-- run --> 标记的命令在项目的副本里依次原样运行，微型检查点代替 baichuan2-7B/，各数据文件只留几行。"""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "output*", "*-[67]B*", "*-13B*"))
    shutil.copytree(tiny_checkpoint("baichuan2-7b", layers=32, hidden_size=32, heads=2), copy / "baichuan2-7B")
    for path in (copy / "data").glob("*.json"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:8]), encoding="utf-8")
    port = free_port()
    environment = os.environ | {
        "LOCAL_SIZE": "1",
        "PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    blocks = [block for mark, block in BASH_BLOCK.findall(TEXTS["README.md"]) if mark]
    # 体检的退出码 1 是「只有警告」
    script = re.sub(r"^(python data_set\.py check .*)$", r"\1 || [ $? -le 1 ]", "\n".join(blocks), flags=re.MULTILINE)
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
    assert json.loads((copy / "baichuan2-7B-llama" / "config.json").read_text("utf-8"))["architectures"] == [
        "LlamaForCausalLM"
    ]
    assert (copy / "report.png").is_file()
    assert "训练早已完成" in result.stdout
