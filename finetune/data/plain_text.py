"""通用文字：一行一段，编成整段都是目标的样本（普通的语言建模）；--general_path 与 --replay_path 共用。"""

import os
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from finetune.data.prompting import EncodedSample
from finetune.data.rows import check_file
from utils import log_rank_0

# 衡量遗忘所用的目标 token 数的上限：基座在这些 token 上的完整分布要留在主机内存里，每个 词表 × 2 字节
GENERAL_TOKENS = 4096

Text = tuple[int, str]  # (行号, 文字)


def read_texts(path: str | os.PathLike) -> list[Text]:
    """文件里各个非空的行，去掉首尾空白。

    Raises:
        ValueError: 文件读不了、不是 UTF-8，或没有文字。
    """
    check_file(path)
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} 不是 UTF-8 编码（{error}），请另存为 UTF-8") from error
    texts = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not texts:
        raise ValueError(f"{path} 里只有空白，请给出纯文本，一行一段（一个词）")
    return texts


def encode_pieces(texts: Sequence[Text], tokenizer, max_len: int, seed: int) -> Iterator[EncodedSample]:
    """按 seed 洗牌后逐段编码，每 max_len 个 token 一条；不加 bos 与 eos，只有一个 token 的没有目标，略去。"""
    for index in np.random.default_rng(seed).permutation(len(texts)):
        line, text = texts[index]
        ids = tokenizer.encode_plain(text)
        for start in range(0, len(ids), max_len):
            piece = ids[start : start + max_len]
            if len(piece) > 1:
                yield EncodedSample(piece, piece, len(piece) - 1, 0, False, False, False, line)


def replay_pieces(path: str, tokenizer, max_len: int, seed: int, num_samples: int) -> list[EncodedSample]:
    """重放用的 num_samples 条，由 seed 选定；文件里不够时从头重复。

    Raises:
        ValueError: 见 read_texts。
    """
    if num_samples == 0:
        raise ValueError(
            "--replay_ratio 太小，相对于训练样本的条数取不到一条重放的文字，请调大它，或去掉 --replay_path"
        )
    pieces = list(islice(encode_pieces(read_texts(path), tokenizer, max_len, seed), num_samples))
    if not pieces:
        raise ValueError(f"--replay_path {path} 的每一行都只有一个 token，没有可训练的目标，请换一个文件")
    return [pieces[index % len(pieces)] for index in range(num_samples)]


def replay_share(path: str, tokenizer, max_len: int, seed: int, num_targets: int, share: float) -> list[EncodedSample]:
    """重放用的各条，由 seed 选定，使它们的目标 token 占全部（加上任务的 num_targets 个）的份额最接近 share。

    Raises:
        ValueError: 见 read_texts；或份额太小，连一条的一半也没有。
    """
    wanted = num_targets * share / (1 - share)
    pieces = list(encode_pieces(read_texts(path), tokenizer, max_len, seed))
    if not pieces:
        raise ValueError(f"--replay_path {path} 的每一行都只有一个 token，没有可训练的目标，请换一个文件")
    chosen, total = [], 0
    for piece in cycle(pieces):
        if total + piece.num_targets / 2 > wanted:  # 再加一条，离得更远
            break
        chosen.append(piece)
        total += piece.num_targets
    if not chosen:
        least = pieces[0].num_targets / (pieces[0].num_targets + num_targets)
        raise ValueError(
            f"--replay_ratio {share} 只合 {wanted:.0f} 个目标 token，不到一条（{pieces[0].num_targets} 个），"
            f"请给出至少 {least:.3f}，或把 --replay_path 的段落切短"
        )
    return chosen


def general_pieces(path: str, tokenizer, max_len: int, replay_path: str | None = None) -> list[EncodedSample]:
    """衡量遗忘用的各条，至多 GENERAL_TOKENS 个目标，散布在整个文件里；重放文件里也有的行不用，0 号进程说有几行。

    Raises:
        ValueError: 见 read_texts；或除去重放的行之后没有剩下的。
    """
    replayed = set() if replay_path is None else {text for _, text in read_texts(replay_path)}
    all_texts = read_texts(path)
    texts = [(line, text) for line, text in all_texts if text not in replayed]
    pieces, num_targets = [], 0
    for piece in encode_pieces(texts, tokenizer, max_len, seed=0):
        num_targets += piece.num_targets
        if pieces and num_targets > GENERAL_TOKENS:
            break
        pieces.append(piece)
    if not pieces:
        raise ValueError(
            f"--general_path {path} 里没有可用的行（重放文件里也有的不算：训练过的文字不能衡量遗忘），请换一个文件"
        )
    if len(texts) < len(all_texts):
        log_rank_0(
            f"通用文字 {path}：{len(all_texts)} 行里有 {len(all_texts) - len(texts)} 行 --replay_path 里也有，"
            f"不用来衡量遗忘，余 {len(texts)} 行"
        )
    return pieces
