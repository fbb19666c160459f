"""分词结果的缓存：按数据内容、分词器与设置取名，写入是原子的，损坏会被发现。"""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.rows import data_sha256
from utils import replacing


class TokenCache:
    """编码结果的缓存文件：一行 SHA-256，一行 JSON 头，其后是各数组的字节；不含 pickle。

    文件名取自数据内容、分词器与设置的哈希；先写临时文件再改名，所以几个 rank 或几次运行同时写也只会得到完整的文件。
    """

    def __init__(self, cache_dir: str | os.PathLike, path: str, tokenizer, settings: dict[str, Any]):
        self.identity = {
            "data_sha256": data_sha256(path),
            "tokenizer_sha256": _tokenizer_sha256(tokenizer),
            "settings": settings,
        }
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.directory = Path(cache_dir)
        self.stem = f"{Path(path).stem}-{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:8]}"
        self.file = self.directory / f"{self.stem}-{key[:16]}.tokens"

    def load(self) -> tuple[tuple[dict[str, np.ndarray], dict[str, int]] | None, str]:
        """读缓存，返回 (内容或 None, 说明)；损坏的缓存当作没有。"""
        if not self.file.is_file():  # 目录、FIFO 也当作没有：打开 FIFO 会一直等下去
            others = list(self.directory.glob(f"{self.stem}-*.tokens"))
            return None, "数据、分词器或设置与旧缓存不同，已重新编码" if others else "没有缓存，已编码"
        try:
            with self.file.open("rb") as stream:
                checksum, begin = stream.readline().rstrip(b"\n"), stream.tell()
                if hashlib.file_digest(stream, "sha256").hexdigest().encode() != checksum:
                    return None, f"{self.file} 已损坏（校验和不符），已重新编码"
                stream.seek(begin)
                header = json.loads(stream.readline())
                begin = stream.tell()
        except (OSError, ValueError) as error:
            return None, f"{self.file} 读不出来（{error}），已重新编码"
        if header["identity"] != self.identity:
            return None, f"{self.file} 的内容与文件名不符，已重新编码"
        arrays = {}
        for name, (dtype, size) in header["arrays"].items():  # 映射文件：用到哪里才读哪里，不占内存
            arrays[name] = (
                np.memmap(self.file, dtype=dtype, mode="r", offset=begin, shape=(size,))
                if size
                else (np.zeros(0, dtype))
            )
            begin += arrays[name].nbytes
        return (arrays, header["counts"]), f"命中 {self.file}"

    def save(self, arrays: dict[str, np.ndarray], counts: dict[str, int]) -> str:
        """写缓存，返回说明；写不成（磁盘满、没有权限）不影响训练。"""
        layout = {name: (array.dtype.str, len(array)) for name, array in arrays.items()}
        header = {"identity": self.identity, "counts": counts, "arrays": layout}
        parts = [
            json.dumps(header).encode() + b"\n",
            *(memoryview(array).cast("B") for array in arrays.values() if len(array)),
        ]
        checksum = hashlib.sha256()
        for part in parts:
            checksum.update(part)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_left_overs()
            with replacing(self.file, "wb") as stream:
                stream.writelines([checksum.hexdigest().encode() + b"\n", *parts])
        except OSError as error:
            return f"；缓存没有写成（{error}），不影响训练"
        return f"；缓存写到 {self.file}"

    def _remove_left_overs(self) -> None:
        """删去一天以前的临时文件：写到一半被杀的运行留下的；别的运行正在写的不会这么旧。"""
        for left_over in self.directory.glob(".tmp-*"):
            with suppress(OSError):  # 别的 rank 可能抢先删了
                if time.time() - left_over.stat().st_mtime > 86400:
                    left_over.unlink()


def _tokenizer_sha256(tokenizer) -> str:
    """分词器的指纹：词表文件的内容、后来加入的词与 eos 的编号。"""
    digest = hashlib.sha256(tokenizer.sp_model.serialized_model_proto())
    added = {token: index for token, index in tokenizer.get_added_vocab().items()}
    digest.update(json.dumps([added, tokenizer.eos_token_id], sort_keys=True).encode())
    return digest.hexdigest()
