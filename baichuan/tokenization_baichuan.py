"""Baichuan 与 Baichuan2 的分词器：编号与 sentencepiece 逐一相同，用户文本里的控制符号只当普通文字。"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer

VOCAB_FILES_NAMES = {"vocab_file": "tokenizer.model"}
# 官方词表里留给角色和后续用途的片段；聊天模型的 195/196 就在其中（v2 是 106/107，v1 是 102/103）
RESERVED_PIECE = re.compile(r"<reserved_\d+>")
# Git LFS 没有真正下载大文件时，原地留下的是这样开头的几行文字
_LFS_POINTER = b"version https://git-lfs"
# 这些键只说明本次从哪里加载，不是分词器的设置；auto_map 指向检查点自带的代码，我们从不执行，也不再写出
_NOT_SAVED = ("auto_map", "backend", "is_local", "local_files_only", "files_loaded")


def _read_model_file(vocab_file: str | os.PathLike | None) -> bytes:
    """读出 sentencepiece 模型文件的全部字节；文件不在、为空或只是 LFS 指针时抛 ValueError。"""
    # 只抛 ValueError：transformers 会把 OSError 和 RuntimeError 换成看不出原因的英文提示
    if vocab_file is None or not Path(vocab_file).is_file():
        raise ValueError(f"找不到分词器文件 tokenizer.model（查找位置：{vocab_file}），请把它放进检查点目录")
    content = Path(vocab_file).read_bytes()
    if not content:
        raise ValueError(f"分词器文件 {vocab_file} 是空的（0 字节），请重新下载 tokenizer.model")
    if content.startswith(_LFS_POINTER):
        raise ValueError(
            f"分词器文件 {vocab_file} 只是 Git LFS 指针（{len(content)} 字节），请用 git lfs pull 取回真正的文件"
        )
    return content


def _load_processor(content: bytes, source: str, sp_model_kwargs: dict[str, Any]) -> SentencePieceProcessor:
    """由模型文件的字节建立 sentencepiece 处理器；不是 sentencepiece 模型时抛 ValueError。"""
    try:
        processor = SentencePieceProcessor(model_proto=content, **sp_model_kwargs)
        num_pieces = processor.get_piece_size()
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{source} 不是可用的 sentencepiece 模型（{len(content)} 字节，可能未下载完整或被别的文件覆盖）：{error}"
        ) from error
    if num_pieces == 0:
        raise ValueError(f"{source} 不是可用的 sentencepiece 模型：其中没有任何片段，请重新下载 tokenizer.model")
    return processor


def _check_text(text: str) -> None:
    """text 不是字符串，或含有写不成 UTF-8 的字符时抛 ValueError。"""
    if not isinstance(text, str):
        raise ValueError(f"要编码的文本必须是字符串，收到的是 {type(text).__name__}：{text!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"文本第 {error.start + 1} 个字符 {text[error.start]!r} 是孤立的代理字符（不完整的 emoji），"
            "无法写成 UTF-8，请删去或换成完整的字符"
        ) from error


class BaichuanTokenizer(PreTrainedTokenizer):
    """四种 Baichuan 架构共用的分词器。

    与官方类的三处不同，都是有意为之：
    - 文本里的 `<s>`、`</s>`、`<unk>` 按普通文字编码（官方类会认成 1、2、0 号，用户文本因此能注入结束符）；
      控制符号只能按编号拼进序列，`add_tokens` 加入的普通新词仍按字面匹配，特殊词不匹配；
    - `add_bos_token`、`add_eos_token` 默认 False：官方检查点的 tokenizer_config.json 全都写 False，
      官方类的默认值 True 从未在发布的模型上生效；配置里写了什么就用什么；
    - `pad_token` 默认 `<unk>`（0 号），与官方配置相同，缺少配置文件时也能补齐批次。
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 （transformers 以类属性读取）
    padding_side = "right"

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        unk_token: Any = "<unk>",
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        pad_token: Any = "<unk>",
        sp_model_kwargs: dict[str, Any] | None = None,
        add_bos_token: bool = False,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = False,
        **kwargs: Any,
    ) -> None:
        for key in _NOT_SAVED:
            kwargs.pop(key, None)
        # 目录里有 tokenizer.model.bak 之类的文件时 transformers 会认错文件名，这里按目录再找一次
        if vocab_file is None and kwargs.get("name_or_path"):
            vocab_file = Path(kwargs["name_or_path"]) / VOCAB_FILES_NAMES["vocab_file"]
        self.vocab_file = None if vocab_file is None else str(vocab_file)
        self.sp_model_kwargs = dict(sp_model_kwargs or {})
        # 先于 super().__init__()：基类初始化时就要查词表
        self._added_words: dict[str, int] = {}
        self._model_bytes = _read_model_file(vocab_file)
        self._attach_processor()
        self.add_bos_token = bool(add_bos_token)
        self.add_eos_token = bool(add_eos_token)
        super().__init__(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            sp_model_kwargs=self.sp_model_kwargs,
            add_bos_token=self.add_bos_token,
            add_eos_token=self.add_eos_token,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )

    def _attach_processor(self) -> None:
        """由 `_model_bytes` 建立处理器和几张查找表。"""
        self.sp_model = _load_processor(self._model_bytes, f"分词器文件 {self.vocab_file}", self.sp_model_kwargs)
        pieces = self.sp_model.id_to_piece(list(range(self.sp_model.get_piece_size())))
        self._pieces: list[str] = pieces
        self._piece_to_id: dict[str, int] = {piece: index for index, piece in enumerate(pieces)}
        # 未知符号和控制符号在 sentencepiece 的解码里会消失或变成占位符，解码时须另行处理
        self._control_ids = frozenset(
            i for i in range(len(pieces)) if self.sp_model.is_unknown(i) or self.sp_model.is_control(i)
        )
        self.reserved_ids = frozenset(i for i, piece in enumerate(pieces) if RESERVED_PIECE.fullmatch(piece))
        self._spelled: dict[int, list[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for key in ("sp_model", "_pieces", "_piece_to_id", "_control_ids", "reserved_ids", "_spelled"):
            state.pop(key, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach_processor()

    # ---- 词表 ----

    @property
    def vocab_size(self) -> int:
        """模型文件里的片段数；不含 add_tokens 加入的词，也不等于模型 config 里可能补大的 vocab_size。"""
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        """片段到编号的字典，含 add_tokens 加入的词。"""
        return {**self._piece_to_id, **self.added_tokens_encoder}

    def _convert_token_to_id(self, token: str) -> int:
        return self._piece_to_id.get(token, self.sp_model.unk_id())

    def _convert_id_to_token(self, index: int) -> str:
        if index < 0:
            raise ValueError(f"编号 {index} 是负数，不能转换成文字；若它来自 labels，请先去掉 -100")
        # 模型 config 的 vocab_size 可以大于片段数，随机权重会生成这些没有片段的编号
        return self._pieces[index] if index < len(self._pieces) else str(self.unk_token)

    # ---- 编码 ----

    def text_to_ids(self, text: str) -> list[int]:
        """一段文本的编号，与 sentencepiece 对这个模型文件的结果逐一相同；不加 bos、eos。

        含有孤立代理字符（半个 emoji，无法写成 UTF-8）时抛 ValueError。
        """
        try:
            return self.sp_model.encode(text)
        except (UnicodeError, RuntimeError, TypeError):
            # sentencepiece 各版本对孤立代理字符抛的异常不同，且都不说位置
            _check_text(text)
            raise

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """文本的片段；未知字符（没有字节回退的模型才有）记作 unk_token。"""
        split_special_tokens = kwargs.pop("split_special_tokens", self.split_special_tokens)
        tokens: list[str] = []
        for part in [text] if split_special_tokens else self._split_added(text):
            tokens.extend([part] if part in self._added_words else [self._pieces[i] for i in self.text_to_ids(part)])
        return tokens

    def _add_tokens(self, new_tokens: list, special_tokens: bool = False) -> int:
        count = super()._add_tokens(new_tokens, special_tokens)
        # 加入词表的新词 → 编号；特殊词不按字面匹配，模型文件里已有的片段由 sentencepiece 切
        self._added_words = {
            token.content: index
            for index, token in self._added_tokens_decoder.items()
            if index >= self.vocab_size and not token.special
        }
        return count

    def _split_added(self, text: str) -> list[str]:
        """在加入的新词处切开，同一处取最长的；新词自成一段。"""
        if not self._added_words:
            return [text]
        longest_first = sorted(self._added_words, key=len, reverse=True)
        return re.split(f"({'|'.join(map(re.escape, longest_first))})", text)

    def find_control_pieces(self, text: str) -> list[str]:
        """文本中会被编码成 `<reserved_N>` 编号（含角色编号）的片段，按出现次序，重复的也逐个列出。

        按编码结果判断而不是查字面：v1 的规范化会把全角的 `＜reserved_102＞` 也变成角色片段。
        """
        return [
            self._pieces[i]
            for part in self._split_added(text)
            if part not in self._added_words
            for i in self.text_to_ids(part)
            if i in self.reserved_ids
        ]

    def encode_plain(self, text: str) -> list[int]:
        """同 `tokenizer(text)`，但结果里不会出现任何 `<reserved_N>` 的编号：它们被换成按普通字符拼写的编号。

        加入词表的新词取它的编号；解码得到的文字与不替换时相同。用于来自用户的文本，见 `find_control_pieces`。
        """
        return self.encode_user_text(text)[0]

    def encode_user_text(self, text: str) -> tuple[list[int], bool]:
        """encode_plain 的结果，与文本里有没有控制符号（见 `find_control_pieces`）：只编码一遍。"""
        if not self._added_words:
            return self._spelled_ids(text)
        ids, has_control = [], False
        for part in self._split_added(text):
            word = self._added_words.get(part)
            found, is_control = self._spelled_ids(part) if word is None else ([word], False)
            ids += found
            has_control |= is_control
        return ids, has_control

    def _spelled_ids(self, text: str) -> tuple[list[int], bool]:
        """同 `text_to_ids`，保留片段换成按普通字符拼写的编号；与有没有换过。"""
        ids = self.text_to_ids(text)
        if self.reserved_ids.isdisjoint(ids):
            return ids, False
        return [spelled for i in ids for spelled in (self._spell(i) if i in self.reserved_ids else (i,))], True

    def _spell(self, reserved_id: int) -> list[int]:
        """一个保留片段按普通字符拼写的编号，如 `<`、`reserved`、`_`……"""
        if reserved_id not in self._spelled:
            piece = self._pieces[reserved_id]
            # 借片段自身作边界来编码它的两半：片段必定切开上下文，v1 的句首空格也就落不到后半段上
            self._spelled[reserved_id] = [
                index
                for half in (piece[:1], piece[1:])
                for index in self._ids_after(reserved_id, self.text_to_ids(piece + half))
            ]
            assert self.reserved_ids.isdisjoint(self._spelled[reserved_id])
        return self._spelled[reserved_id]

    @staticmethod
    def _ids_after(boundary: int, ids: list[int]) -> list[int]:
        return ids[ids.index(boundary) + 1 :]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """按 add_bos_token、add_eos_token 在每一段前后加编号；都为 False 时只是首尾相接。"""
        bos = [self.bos_token_id] if self.add_bos_token else []
        eos = [self.eos_token_id] if self.add_eos_token else []
        second = [] if token_ids_1 is None else [*bos, *token_ids_1, *eos]
        return [*bos, *token_ids_0, *eos, *second]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """特殊编号处为 1，其余为 0，长度同 `build_inputs_with_special_tokens` 的结果。"""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        bos, eos = [1] * self.add_bos_token, [1] * self.add_eos_token
        second = [] if token_ids_1 is None else [*bos, *[0] * len(token_ids_1), *eos]
        return [*bos, *[0] * len(token_ids_0), *eos, *second]

    # ---- 解码 ----

    def _decode(
        self,
        token_ids: int | Iterable[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """编号还原成文字；特殊符号两侧不加空格，字节片段合并成完整的字符。

        没有片段的编号（模型词表补大的部分）按 unk_token 处理；负数抛 ValueError。
        """
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        special_ids = set(self.all_special_ids)
        parts: list[str] = []
        run: list[int] = []
        for index in ids:
            in_model = 0 <= index < len(self._pieces)
            if in_model and index not in special_ids and index not in self._control_ids:
                run.append(index)
                continue
            # 每一段普通编号单独交给 sentencepiece：它会去掉 v1 的句首空格，并拼好多字节字符
            parts.append(self._decode_run(run))
            run = []
            unknown = not in_model and index not in self._added_tokens_decoder
            token = self.convert_ids_to_tokens(index)
            if not (skip_special_tokens and (unknown or index in special_ids)):
                parts.append(token)
        text = "".join([*parts, self._decode_run(run)])
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def _decode_run(self, ids: list[int]) -> str:
        return self.sp_model.decode(ids) if ids else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """片段还原成文字，规则同 `decode`。"""
        return self._decode(self.convert_tokens_to_ids(list(tokens)), clean_up_tokenization_spaces=False)

    # ---- 保存 ----

    def save_vocabulary(self, save_directory: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str, ...]:
        """把 tokenizer.model 逐字节写进目录，返回写出的路径；原文件已被移走也能写。"""
        if not Path(save_directory).is_dir():
            raise ValueError(f"保存分词器的目录不存在：{save_directory}，请先建立它")
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (prefix + VOCAB_FILES_NAMES["vocab_file"])
        # 写回原处时不重写，免得中途失败毁掉唯一的一份
        if not (target.is_file() and target.read_bytes() == self._model_bytes):
            target.write_bytes(self._model_bytes)
        return (str(target),)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """同 transformers，另把 add_bos_token、add_eos_token 写进 tokenizer_config.json。

        transformers 5.x 保存时会丢掉这两项，而官方类的默认值是 add_bos_token=True：不写明，别处加载就会多出 bos。
        """
        if Path(save_directory).is_file():
            raise ValueError(f"保存分词器的位置 {save_directory} 是一个文件，请给出目录")
        files = super().save_pretrained(save_directory, *args, **kwargs)
        config_file = next(Path(file) for file in files if file.endswith("tokenizer_config.json"))
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config = {key: value for key, value in config.items() if key not in _NOT_SAVED}
        config.update(add_bos_token=self.add_bos_token, add_eos_token=self.add_eos_token)
        config_file.write_text(
            json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        return files
