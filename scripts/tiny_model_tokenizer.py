"""微型检查点的分词器：在给定文本上训练带字节回退的 sentencepiece BPE，特殊片段的编号与官方词表一致。"""

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

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
