"""生成官方目录格式的微型 Baichuan 检查点（四种架构任选），供快速上手、测试和用户命令试跑。

python scripts/build_tiny_model.py --arch baichuan2-7b --output_dir baichuan2-6B/ --layers 32

权重是随机的；从它开始预训练见 docs/stages.md 与 benchmarks/comparison/base.py。
"""

import argparse
import io
import json
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.options import ScriptParser
from finetune.process.threads import begin_loading

if __name__ == "__main__":
    begin_loading()

import sentencepiece
import torch
from safetensors.torch import save_file

from finetune.process.precision import NAMED_DTYPES
from finetune.terminal import watched

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_VOCAB_SIZE = 2000
NUM_BYTES = 256
# 控制符号 <unk>、<s>、</s> 固定为 0、1、2 号
NUM_CONTROL = 3
# 聊天模型的角色编号：用户 195，助手 196
ASSISTANT_TOKEN_ID = 196
# 可分配的片段里字符至多占这么多，其余留给合并出的词
CHAR_SHARE = 0.6
MAX_LINE_CHARS = 2000
SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
INITIALIZER_RANGE = 0.02
# 随机数一次取这么多（fp32，64 MiB）：真尺寸的张量不必先有一份 fp32 的；16 的倍数，取出的数与一次取完相同
DRAWN_AT_ONCE = 2**24


@dataclass(frozen=True)
class Architecture:
    """一种官方架构里 config.json 与分词器的差别。"""

    version: int  # 1 是 Baichuan，2 是 Baichuan2（词表投影为 NormHead）
    rope: bool  # 7B 用旋转位置，13B 用 ALiBi
    official_vocab_size: int
    class_prefix: str = "Baichuan"  # 唯独 v1 7B 写作 BaiChuan
    has_chat: bool = True
    repetition_penalty: float = 1.05
    transformers_version: str = "4.29.2"


ARCHITECTURES = {
    "baichuan-7b": Architecture(1, True, 64000, "BaiChuan", has_chat=False, transformers_version="4.29.1"),
    "baichuan-13b": Architecture(1, False, 64000, repetition_penalty=1.1),
    "baichuan2-7b": Architecture(2, True, 125696),
    "baichuan2-13b": Architecture(2, False, 125696),
}


# ---- 各个 JSON 文件 ----


def model_config(arch: str, **sizes: Any) -> dict[str, Any]:
    """官方键名的 config.json；自有键 norm_head 只在看不出是否 NormHead（词表不是官方大小）时写出。

    sizes 是 vocab_size、hidden_size、intermediate_size、layers、heads、model_max_length、dtype。
    """
    spec = ARCHITECTURES[arch]
    length = sizes["model_max_length"]
    config = {
        "architectures": [f"{spec.class_prefix}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_baichuan.{spec.class_prefix}Config",
            "AutoModelForCausalLM": f"modeling_baichuan.{spec.class_prefix}ForCausalLM",
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": sizes["hidden_size"],
        "initializer_range": INITIALIZER_RANGE,
        "intermediate_size": sizes["intermediate_size"],
        "model_type": "baichuan",
        "num_attention_heads": sizes["heads"],
        "num_hidden_layers": sizes["layers"],
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": sizes["dtype"],
        "transformers_version": spec.transformers_version,
        "use_cache": True,
        "vocab_size": sizes["vocab_size"],
    }
    # 官方凭这两个键区分位置编码：v1 7B 只有前者，13B 只有后者，v2 7B 两者都有
    if spec.rope:
        config["max_position_embeddings"] = length
    if not spec.rope or spec.version == 2:
        config["model_max_length"] = length
    if spec.version == 2:
        config["tokenizer_class"] = "BaichuanTokenizer"
    if spec.version == 2 and not spec.rope:
        config["gradient_checkpointing"] = False
    if arch != "baichuan-7b":
        config["_from_model_config"] = True
    # v1 7B 的 BaiChuan 拼写已经说明是普通投影，除非词表恰是 Baichuan2 的大小
    told_apart = sizes["vocab_size"] == spec.official_vocab_size or (
        spec.class_prefix == "BaiChuan" and sizes["vocab_size"] != 125696
    )
    if not told_apart:
        config["norm_head"] = spec.version == 2
    return dict(sorted(config.items()))


def generation_config(arch: str, chat: bool) -> dict[str, Any]:
    """官方键名的 generation_config.json；聊天模型带角色编号与采样默认值。"""
    spec = ARCHITECTURES[arch]
    config: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if chat:
        config |= {
            "user_token_id": 195,
            "assistant_token_id": ASSISTANT_TOKEN_ID,
            "max_new_tokens": 2048,
            "temperature": 0.3,
            "top_k": 5,
            "top_p": 0.85,
            "repetition_penalty": spec.repetition_penalty,
            "do_sample": True,
        }
    else:
        config = {"_from_model_config": True, **config}
    return {**config, "transformers_version": spec.transformers_version}


# ---- 分词器：给定文本上训练的、带字节回退的 sentencepiece BPE，特殊片段的编号与官方词表一致 ----


def _tag_pieces(names: str) -> list[str]:
    return [piece for name in names.split() for piece in (f"<{name}>", f"<{name}/>", f"</{name}>")]


def official_user_pieces(version: int) -> list[str]:
    """官方词表从 3 号起的自定义片段，次序与官方模型文件相同；v1 有 390 个，v2 有 1086 个。"""
    head = ["<SEP>", "<CLS>", "\n", "\t"]
    wide_digits = list("０１２３４５６７８９")
    marks = ["```", "<!--", "-->", "---", "<!DOCTYPE>"]
    if version == 1:
        tags = _tag_pieces("h2 br strong h1 p h5 h3 table li tr h4 tbody img b td")
        symbols = [*"0123456789", *wide_digits, *"，。！？、：￥.!?《》【】『』", *marks]
        return [*head, *tags, *symbols, *(f"<reserved_{n}>" for n in range(300))]
    tags = _tag_pieces("img h2 td strong table tr li b h3 br h4 h5 p h1 tbody")
    dots = ["...", "。。。", "。。。。。。"]
    symbols = [*wide_digits, *"+-=，。！？、：￥.!?", *dots, *"《》【】『』", *marks, *"；．＝＜＞－＋％‼㊣／｜"]
    return [*head, *tags, *symbols, *(f"<reserved_{n}>" for n in range(12, 1000))]


def user_pieces(version: int, vocab_size: int) -> list[str]:
    """微型词表用的自定义片段：词表够大时同官方，否则只留到 199 号，角色编号 195/196 不变。"""
    pieces = official_user_pieces(version)
    return pieces if vocab_size >= 4 * len(pieces) else pieces[: 200 - NUM_CONTROL]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)


def read_training_lines(files: Iterable[Path]) -> list[str]:
    """读出训练分词器的文本行：.json/.jsonl 取其中所有字符串值，其他文件按纯文本；长行切成至多 2000 字。

    文件不存在、JSON 有误或一行文字也没有时抛 ValueError。
    """
    files = list(files)
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"训练分词器的文本文件不存在：{'、'.join(missing)}，请检查 --train_text")
    lines: list[str] = []
    for file in files:
        try:
            content = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} 不是 UTF-8 文本（第 {error.start} 字节起无法解码），请先转成 UTF-8") from error
        if file.suffix in (".json", ".jsonl"):
            content = "\n".join(_strings(_parse_json(content, file)))
        # 换行与制表符是自定义片段，不参与合并；孤立的代理字符写不成 UTF-8
        for line in re.split(r"[\r\n\t\ud800-\udfff]+", content):
            lines.extend(line[i : i + MAX_LINE_CHARS] for i in range(0, len(line), MAX_LINE_CHARS))
    if not lines:
        raise ValueError(f"训练分词器的文本里没有文字：{'、'.join(map(str, files))}")
    return lines


def _parse_json(content: str, file: Path) -> list[Any]:
    if content.lstrip().startswith("["):
        try:
            return json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{error.lineno}: 不是合法的 JSON 数组：{error.msg}") from error
    rows = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: 不是合法的 JSON：{error.msg}") from error
    return rows


def default_training_files() -> list[Path]:
    """项目自带的 data/*.json；没有时抛 ValueError。"""
    files = sorted((ROOT / "data").glob("*.json"))
    if not files:
        raise ValueError(
            f"{ROOT / 'data'} 里没有 *.json，无法训练分词器；请用 --train_text 给出文本，或用 --tokenizer_model"
        )
    return files


def train_tokenizer(version: int, vocab_size: int, lines: list[str]) -> bytes:
    """训练带字节回退的 BPE，返回 sentencepiece 模型文件的字节；同样的输入得到同样的字节。

    片段数不超过 vocab_size；文本太少时会更少。vocab_size 放不下必需片段时抛 ValueError。
    """
    pieces = user_pieces(version, vocab_size)
    room = vocab_size - NUM_CONTROL - len(pieces) - NUM_BYTES
    if room < 64:
        raise ValueError(f"--vocab_size({vocab_size}) 太小，放不下字节与角色片段，至少需要 {vocab_size - room + 64}")
    kept_lines = _cut_rare_chars(lines, int(room * CHAR_SHARE), set(pieces))
    # 与官方模型文件一致：v2 不改动文本，v1 做 NFKC 规范化、合并空格并在句首加空格
    lossless = version == 2
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(kept_lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=pieces,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity" if lossless else "nmt_nfkc",
        add_dummy_prefix=not lossless,
        remove_extra_whitespaces=not lossless,
        allow_whitespace_only_pieces=lossless,
        max_sentencepiece_length=32 if lossless else 16,
        max_sentence_length=16 * MAX_LINE_CHARS,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _cut_rare_chars(lines: list[str], max_chars: int, user_defined: set[str]) -> list[str]:
    """在字表（最常见的 max_chars 个字）之外的字处把行切断，这些字以后走字节回退。

    sentencepiece 的 character_coverage 不能低于 0.98，小词表装不下那么多汉字，所以自己裁。
    """
    counts = Counter("".join(lines))
    ranked = sorted((char for char in counts if char not in user_defined), key=lambda char: (-counts[char], char))
    rare = set(ranked[max_chars:])
    if not rare:
        return lines
    table = dict.fromkeys(map(ord, rare), "\n")
    return [part for line in lines for part in line.translate(table).split("\n") if part]


def check_tokenizer(content: bytes, source: str) -> sentencepiece.SentencePieceProcessor:
    """载入 sentencepiece 模型，确认它有角色编号 195/196 的位置；不合用时抛 ValueError。"""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ValueError(f"{source} 不是可用的 sentencepiece 模型：{error}") from error
    if processor.get_piece_size() <= ASSISTANT_TOKEN_ID:
        raise ValueError(f"{source} 只有 {processor.get_piece_size()} 个片段，放不下角色编号 195、196")
    return processor


def build_tokenizer(
    version: int, vocab_size: int | None, tokenizer_model: str | Path | None, train_text: Iterable[str | Path] | None
) -> tuple[bytes, int]:
    """取得分词器文件的字节和模型 config 应写的 vocab_size（不小于片段数）。"""
    if tokenizer_model is not None:
        if train_text is not None:
            raise ValueError("--tokenizer_model 与 --train_text 只能给一个：前者用现成的分词器，后者用来训练新的")
        if not Path(tokenizer_model).is_file():
            raise ValueError(f"--tokenizer_model({tokenizer_model}) 不存在，请给出 tokenizer.model 文件的路径")
        content, source = Path(tokenizer_model).read_bytes(), f"--tokenizer_model({tokenizer_model})"
    else:
        files = default_training_files() if train_text is None else [Path(file) for file in train_text]
        lines = read_training_lines(files)
        content = train_tokenizer(version, vocab_size or DEFAULT_VOCAB_SIZE, lines)
        source = "训练出的分词器"
        vocab_size = vocab_size or DEFAULT_VOCAB_SIZE
    num_pieces = check_tokenizer(content, source).get_piece_size()
    vocab_size = vocab_size or num_pieces
    if vocab_size < num_pieces:
        raise ValueError(f"--vocab_size({vocab_size}) 小于分词器的片段数 {num_pieces}，请调大或不写")
    if vocab_size > num_pieces:
        print(f"分词器只有 {num_pieces} 个片段，模型词表按 --vocab_size 补大到 {vocab_size}")
    return content, vocab_size


def tokenizer_files(model_max_length: int) -> dict[str, dict[str, Any]]:
    """官方写法的 tokenizer_config.json 与 special_tokens_map.json：文件名到内容。"""

    def token(content: str, **extra: Any) -> dict[str, Any]:
        return {**extra, "content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": True}

    contents = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        "sp_model_kwargs": {},
        "tokenizer_class": "BaichuanTokenizer",
        **{name: token(content, __type="AddedToken") for name, content in contents.items()},
    }
    special = {name: token(content) for name, content in contents.items()}
    return {"tokenizer_config.json": dict(sorted(config.items())), "special_tokens_map.json": special}


# ---- 权重 ----


def tensor_shapes(arch: str, config: dict[str, Any], with_inv_freq: bool) -> dict[str, tuple[int, ...]]:
    """全部张量的官方名称与形状，按官方文件里的次序；with_inv_freq 时含 v1 7B 保存的旋转频率。"""
    hidden, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.self_attn.W_pack.weight"] = (3 * hidden, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, hidden)
        if with_inv_freq and arch == "baichuan-7b":
            shapes[f"{prefix}.self_attn.rotary_emb.inv_freq"] = (hidden // config["num_attention_heads"] // 2,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (inter, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inter)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (inter, hidden)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def init_tensor(
    name: str,
    shape: tuple[int, ...],
    norm_head: bool,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """官方初始化的一个张量：归一化权重为 1，NormHead 用 kaiming，其余 N(0, 0.02)，补齐行为 0；inv_freq 总是 fp32。"""
    if name.endswith("inv_freq"):
        return 10000.0 ** -(torch.arange(shape[0], dtype=torch.float32) / shape[0])
    # 13B 的官方代码从不初始化归一化权重（torch.empty），从头开始时必须置 1
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    weight = torch.empty(shape, dtype=dtype)
    # kaiming_uniform(a=sqrt(5)) 的界恰是 1/sqrt(fan_in)
    bound = 1 / math.sqrt(shape[1])
    for part in weight.view(-1).split(DRAWN_AT_ONCE):
        drawn = torch.empty(part.shape)
        if name == "lm_head.weight" and norm_head:
            part.copy_(drawn.uniform_(-bound, bound, generator=generator))
        else:
            part.copy_(drawn.normal_(0.0, INITIALIZER_RANGE, generator=generator))
    if name == "model.embed_tokens.weight":
        weight[0] = 0.0
    return weight


def parse_size(text: str | int) -> int:
    """把 "5GB"、"200KB"、"1000" 读成字节数；写法不对时抛 ValueError。"""
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", str(text).strip())
    unit = SIZE_UNITS.get((match[2] or "B").upper()) if match else None
    if unit is None or int(match[1]) == 0:
        raise ValueError(f"--max_shard_size({text}) 的写法不对，请写成 5GB、200KB 或字节数")
    return int(match[1]) * unit


def plan_shards(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """按次序把张量装进不超过 max_bytes 的分片；单个张量更大时独占一片。"""
    shards: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not shards or used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def initial_weights(
    arch: str, shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32
) -> Callable[[str], torch.Tensor]:
    """返回 `weight(name)`：按种子的初值，dtype 是舍入成的类型；须按 shapes 的次序逐个取。"""
    generator = torch.Generator().manual_seed(seed)
    norm_head = ARCHITECTURES[arch].version == 2
    return lambda name: init_tensor(name, shapes[name], norm_head, generator, dtype)


def write_weights(
    directory: Path,
    shapes: dict[str, tuple[int, ...]],
    weight: Callable[[str], torch.Tensor],
    dtype: str,
    format: str,
    max_shard_size: str | int,
) -> None:
    """逐片取得并写出权重与索引文件；weight(name) 给出一个张量，内存里至多有一个分片。"""
    suffix = {"safetensors": ".safetensors", "bin": ".bin"}[format]
    stem = "model" if format == "safetensors" else "pytorch_model"
    # inv_freq 是缓冲区，半精度检查点里也按 fp32 存
    dtypes = {name: torch.float32 if name.endswith("inv_freq") else NAMED_DTYPES[dtype] for name in shapes}
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes, parse_size(max_shard_size))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}{suffix}" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}"
        tensors = {name: weight(name).to(dtypes[name]) for name in watched(names, f"写 {file}", "个")}
        if format == "safetensors":
            save_file(tensors, directory / file, metadata={"format": "pt"})
        else:
            torch.save(tensors, directory / file)
        # safetensors 建的文件只有属主可读，这里改成与其他文件一致
        (directory / file).chmod((directory / "config.json").stat().st_mode)
        weight_map |= dict.fromkeys(names, file)
        del tensors  # 下一片做好之前不留着这一片
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / f"{stem}{suffix}.index.json", index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# ---- 入口 ----


def check_options(arch: str, sizes: dict[str, int | None], dtype: str, format: str, chat: bool) -> None:
    """一次列出全部不合法的取值，抛 ValueError；sizes 是各个数量选项，None 表示没有给。"""
    if arch not in ARCHITECTURES:
        raise ValueError(f"--arch({arch}) 不认识，可选：{'、'.join(ARCHITECTURES)}")
    problems = [f"--{name}({size}) 必须是正整数" for name, size in sizes.items() if size is not None and size < 1]
    hidden_size, heads = sizes["hidden_size"], sizes["heads"]
    if not problems and hidden_size % heads:
        problems.append(f"--hidden_size({hidden_size}) 必须能被 --heads({heads}) 整除")
    elif not problems and ARCHITECTURES[arch].rope and hidden_size // heads % 2:
        problems.append(
            f"旋转位置要求每个头的宽度是偶数，现在是 {hidden_size // heads}，请调整 --hidden_size 或 --heads"
        )
    if dtype not in NAMED_DTYPES:
        problems.append(f"--dtype({dtype}) 不认识，可选：{'、'.join(NAMED_DTYPES)}")
    if format not in ("safetensors", "bin"):
        problems.append(f"--format({format}) 不认识，可选：safetensors、bin")
    if chat and not ARCHITECTURES[arch].has_chat:
        problems.append("Baichuan-7B 只有基座模型，没有聊天版，请去掉 --chat")
    if problems:
        raise ValueError("；".join(problems))


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """目录里已有别的内容时抛 ValueError；overwrite 时只允许盖掉一个检查点。"""
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir({output_dir}) 是一个文件，请换一个目录")
    present = sorted(path.name for path in output_dir.iterdir()) if output_dir.is_dir() else []
    if not present:
        return
    if not overwrite:
        raise ValueError(
            f"--output_dir({output_dir}) 已有内容（{present[0]} 等 {len(present)} 项），请换一个目录或加 --overwrite"
        )
    ours = re.compile(
        r"(model|pytorch_model)[^/]*\.(safetensors|bin|json)|[a-z_]*config\.json|special_tokens_map\.json|tokenizer\.model"
    )
    foreign = [name for name in present if not ours.fullmatch(name)]
    if foreign:
        raise ValueError(
            f"--output_dir({output_dir}) 里有不属于检查点的内容：{'、'.join(foreign[:5])}，不会覆盖，请换一个目录"
        )


def build_tiny_model(
    arch: str,
    output_dir: str | Path,
    *,
    layers: int = 4,
    hidden_size: int = 64,
    heads: int = 4,
    intermediate_size: int | None = None,
    vocab_size: int | None = None,
    model_max_length: int = 4096,
    seed: int = 1234,
    dtype: str = "float32",
    chat: bool = False,
    tokenizer_model: str | Path | None = None,
    train_text: Iterable[str | Path] | None = None,
    format: str = "safetensors",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> Path:
    """生成一个微型检查点，返回其目录；各参数与同名命令行选项相同，同样的参数得到逐字节相同的文件。

    先写进同级的 `.tmp-` 目录，完整后才改名，因此目标目录要么没有，要么完整。参数不合法时抛 ValueError。
    """
    target = Path(output_dir).resolve()
    sizes = {
        "layers": layers,
        "hidden_size": hidden_size,
        "heads": heads,
        # 官方的中间层宽度是 11008 / 4096 = 2.6875 倍
        "intermediate_size": round(hidden_size * 2.6875) if intermediate_size is None else intermediate_size,
        "model_max_length": model_max_length,
    }
    check_options(arch, {**sizes, "vocab_size": vocab_size}, dtype, format, chat)
    parse_size(max_shard_size)
    check_output_dir(target, overwrite)
    tokenizer, vocab_size = build_tokenizer(ARCHITECTURES[arch].version, vocab_size, tokenizer_model, train_text)
    config = model_config(arch, vocab_size=vocab_size, dtype=dtype, **sizes)
    json_files = {
        "config.json": config,
        "generation_config.json": generation_config(arch, chat),
        **tokenizer_files(model_max_length),
    }
    staging = target.parent / f".tmp-{target.name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        for name, content in json_files.items():
            write_json(staging / name, content)
        (staging / "tokenizer.model").write_bytes(tokenizer)
        shapes = tensor_shapes(arch, config, with_inv_freq=format == "bin")
        weight = initial_weights(arch, shapes, seed, NAMED_DTYPES[dtype])
        write_weights(staging, shapes, weight, dtype, format, max_shard_size)
        if target.is_dir():
            shutil.rmtree(target)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Path(output_dir)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(description=__doc__.splitlines()[0], formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--arch", required=True, choices=list(ARCHITECTURES), help="架构：v1 或 v2，7B（旋转位置）或 13B（ALiBi）")
    add("--output_dir", required=True, help="检查点目录；已有内容时报错，见 --overwrite")
    add("--layers", type=int, default=4, help="层数，默认 4")
    add("--hidden_size", type=int, default=64, help="隐藏层宽度，默认 64")
    add("--heads", type=int, default=4, help="注意力头数，默认 4")
    add("--intermediate_size", type=int, help="前馈层宽度，默认 hidden_size 的 2.6875 倍（官方 7B 的比例）")
    add("--vocab_size", type=int, help="模型词表大小，默认 2000；给了 --tokenizer_model 时默认其片段数")
    add("--model_max_length", type=int, default=4096, help="config 里写的训练长度（token 数），默认 4096")
    add("--seed", type=int, default=1234, help="权重的随机种子，默认 1234")
    add("--dtype", choices=list(NAMED_DTYPES), default="float32", help="权重精度，默认 float32")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--chat", action="store_true", help="写出聊天模型的 generation_config（角色编号 195/196 与采样默认值）"
    )
    kind.add_argument("--base", dest="chat", action="store_false", help="基座模型（默认）")
    add("--tokenizer_model", help="直接使用这个 sentencepiece 文件，不训练新的")
    add("--train_text", nargs="+", help="训练分词器的文本：JSON、JSON lines 或纯文本；默认项目的 data/*.json")
    add("--format", choices=["safetensors", "bin"], default="safetensors", help="权重文件格式，默认 safetensors")
    add("--max_shard_size", default="5GB", help="单个权重文件的上限，如 200KB、5GB，默认 5GB")
    add("--overwrite", action="store_true", help="输出目录里已有的检查点可以覆盖；有别的文件时仍报错")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = vars(parse_args(argv))
    try:
        path = build_tiny_model(options.pop("arch"), options.pop("output_dir"), **options)
    except (ValueError, OSError) as error:
        print(f"错误：{error}", file=sys.stderr)
        raise SystemExit(2) from error
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    layers, width, vocab = (config[name] for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
    print(f"已生成 {path}：{layers} 层，宽 {width}，词表 {vocab}，{config['torch_dtype']}")


if __name__ == "__main__":
    main()
