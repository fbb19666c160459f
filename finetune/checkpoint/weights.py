"""权重张量的读与写：逐个张量，不把整个模型再复制一份；ZeRO-3 下每个进程只读自己的那一段。"""

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from finetune.process.threads import allowed_cores
from finetune.terminal import long_job
from utils import global_rank, read_json, write_json

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_NAMES = ("model.safetensors", "pytorch_model.bin")
# 官方文件里有、我们现算的张量
IGNORED_SUFFIX = "rotary_emb.inv_freq"
# 写出的 safetensors：文件头（含它前面的 8 字节长度）占的字节数，与各类型的名字
HEADER_BYTES = 2**16
SAFETENSORS_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.bool: "BOOL"},
}
# torch.compile、FSDP、DDP 加的一段
WRAPPER_PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
# bitsandbytes、官方 -4bits 目录与 GPTQ、AWQ 存下的量化状态
QUANTIZED = re.compile(r"\.(quant_state|quant_map|absmax|nested_absmax|SCB|qweight|qzeros|g_idx)(\.|$)|\.weight\.data$")
# 至多几个线程同时读；每个线程手上只有一个张量
MAX_READERS = 8
Result = TypeVar("Result")


def weight_files(directory: str | Path) -> list[Path]:
    """检查点目录里的权重文件，官方布局：safetensors 或 bin，单个文件或带索引的分片；safetensors 优先。

    Raises:
        ValueError: 没有权重文件；索引指向目录之外，或缺了分片（列出缺的）。
    """
    directory = Path(directory)
    for single, index in zip(SINGLE_NAMES, INDEX_NAMES, strict=True):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            content = read_json(directory / index)
            weight_map = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{directory / index} 没有 weight_map，请重新下载这个文件")
            names = sorted(set(map(str, weight_map.values())))
            outside = [name for name in names if Path(name).name != name]
            if outside:
                raise ValueError(f"{directory / index} 里的 {outside[0]!r} 不是本目录下的文件名，拒绝读取")
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise ValueError(f"{directory} 缺少权重分片 {missing}，请补全后再运行")
            return [directory / name for name in names]
    raise ValueError(f"{directory} 里没有权重文件（{'、'.join(SINGLE_NAMES + INDEX_NAMES)} 都不在）")


def weight_map(directory: Path, stem: str) -> dict[str, Path]:
    """ShardedWriter 写下的张量各在哪个文件里：{张量名: 路径}。"""
    index = directory / f"{stem}.safetensors.index.json"
    if index.is_file():
        return {name: directory / Path(file).name for name, file in read_json(index)["weight_map"].items()}
    path = directory / f"{stem}.safetensors"
    return dict.fromkeys(WeightFile(path).names, path)


def model_name(name: str) -> str:
    """模型的张量名：去掉 DDP、torch.compile、FSDP 与 peft 加在前面或中间的一段。"""
    return ".".join(part for part in name.removeprefix("base_model.model.").split(".") if part not in WRAPPER_PARTS)


def model_files(directory: str | Path) -> "Iterator[WeightFile]":
    """检查点目录里的各个权重文件，张量名见 model_name。"""
    return (WeightFile(path, model_name) for path in weight_files(directory))


class WeightFile:
    """一个权重文件里的张量，按名字惰性读取；.bin 只按 weights_only 读，绝不执行其中的代码。

    Args:
        rename: 文件里的名字 → 这里用的名字。

    Raises:
        ValueError: 文件损坏或不完整，或两个张量改名之后同名。
    """

    def __init__(self, path: Path, rename: Callable[[str], str] = str):
        self.path = path
        try:
            if path.suffix == ".safetensors":
                self._file = safe_open(path, framework="pt")
                stored = list(self._file.keys())
            else:
                try:
                    self._file = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError as error:
                    if "mmap" not in str(error):
                        raise
                    self._file = torch.load(path, map_location="cpu", weights_only=True)  # 旧式（非 zip）的 .bin
                stored = [name for name, value in self._file.items() if isinstance(value, Tensor)]
        except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, AttributeError, MemoryError) as error:
            raise ValueError(self._broken(error)) from error
        except Exception as error:  # pickle 的 UnpicklingError 等：内容不可信，一律按损坏处理
            raise ValueError(self._broken(error)) from error
        self.stored = {rename(name): name for name in stored}  # 这里的名字 → 文件里的
        self.names = set(self.stored)
        if len(self.names) < len(stored):
            twice = sorted(set(stored) - set(self.stored.values()))
            raise ValueError(f"{path} 的 {twice[0]} 与 {self.stored[rename(twice[0])]} 是同一个张量，请换一个检查点")

    def _broken(self, error: Exception) -> str:
        size = self.path.stat().st_size if self.path.exists() else 0
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{self.path}（{size} 字节）损坏或不完整，请重新下载并核对大小：{reason}"

    def shape(self, name: str) -> tuple[int, ...]:
        """张量的形状，不读内容。"""
        name = self.stored[name]
        if self.path.suffix == ".safetensors":
            return tuple(self._file.get_slice(name).get_shape())
        return tuple(self._file[name].shape)

    def nbytes(self, name: str) -> int:
        """张量的字节数，不读内容。"""
        if self.path.suffix != ".safetensors":
            return self._file[self.stored[name]].nbytes
        bits = re.search(r"\d+", self._file.get_slice(self.stored[name]).get_dtype()) or ["8"]  # BOOL
        return math.prod(self.shape(name)) * int(bits[0]) // 8

    def is_quantized(self, name: str) -> bool:
        """是量化的权重或它的状态，不读内容。"""
        name = self.stored[name]
        if self.path.suffix == ".safetensors":
            is_float = self._file.get_slice(name).get_dtype().startswith(("F", "BF"))
        else:
            is_float = self._file[name].is_floating_point()
        return not is_float or bool(QUANTIZED.search(name))

    def read(self, name: str) -> Tensor:
        """整个张量，CPU。"""
        name = self.stored[name]
        return self._file.get_tensor(name) if self.path.suffix == ".safetensors" else self._file[name]

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """展平后第 start 到 stop 个元素，[stop - start]；只读到所在的行。"""
        shape, name = self.shape(name), self.stored[name]
        row_elements = max(1, int(torch.Size(shape[1:]).numel()))
        first_row, last_row = start // row_elements, -(-stop // row_elements)
        if self.path.suffix == ".safetensors":
            rows = self._file.get_slice(name)[first_row:last_row]
        else:
            rows = self._file[name][first_row:last_row]
        return rows.reshape(-1)[start - first_row * row_elements : stop - first_row * row_elements]


def check_weights(directory: str | Path, expected_shapes: dict[str, tuple[int, ...]]):
    """只读文件头，核对名字与形状是否与模型一致。

    Raises:
        ValueError: 是量化过的权重；缺少、多出或形状不符的张量（各列出几个），或文件损坏。
    """
    found = {}
    for weight_file in model_files(directory):
        quantized = [name for name in sorted(weight_file.names) if weight_file.is_quantized(name)]
        if quantized:
            raise ValueError(
                f"{directory} 里是量化过的权重（{quantized[0]} 等 {len(quantized)} 个张量），不能训练，也不能在这里读："
                "请换成完整的检查点；显存不够时加 --load_in_4bit，读的时候再量化"
            )
        found.update({name: weight_file.shape(name) for name in weight_file.names})
    problems = []
    missing = sorted(expected_shapes.keys() - found.keys())
    extra = sorted(name for name in found.keys() - expected_shapes.keys() if not name.endswith(IGNORED_SUFFIX))
    wrong = sorted(name for name in found.keys() & expected_shapes.keys() if found[name] != expected_shapes[name])
    if missing:
        problems.append(f"缺少 {len(missing)} 个张量，如 {missing[:3]}")
    if extra:
        problems.append(f"多出 {len(extra)} 个不认识的张量，如 {extra[:3]}")
    problems += [f"{name} 的形状是 {found[name]}，按 config.json 应为 {expected_shapes[name]}" for name in wrong[:3]]
    if problems:
        raise ValueError(f"{directory} 的权重与 config.json 不符：" + "；".join(problems))


@contextmanager
def reading_pool() -> Iterator[ThreadPoolExecutor]:
    """读权重的线程：用上本机的各个核（几个进程时平分），每个线程里的运算只用一个核，不记梯度。"""

    def start() -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)

    num_threads = torch.get_num_threads()
    num_readers = max(1, min(MAX_READERS, allowed_cores() // int(os.environ.get("LOCAL_SIZE") or 1)))
    try:
        with ThreadPoolExecutor(num_readers, initializer=start) as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)  # 它对以后的新线程也是缺省


def read_all(
    directory: str | Path, names: Collection[str], work: Callable[[WeightFile, str], Result]
) -> Iterator[tuple[str, Result]]:
    """检查点里的这些张量，几个线程同时各做一个 work(文件, 张量名)，依次给出 (张量名, 结果)；显示进度。"""
    total = sum(path.stat().st_size for path in weight_files(directory))
    with long_job("读权重", total, "B") as job, reading_pool() as pool:
        for weight_file in model_files(directory):
            wanted = sorted(weight_file.names & set(names))
            for name, result in zip(wanted, pool.map(partial(work, weight_file), wanted), strict=True):
                yield name, result
                job.update(weight_file.nbytes(name))


def load_weights(model: nn.Module, directory: str | Path):
    """把检查点的权重读进模型，按模型的类型转换。被 ZeRO-3 切分的参数只读本进程的一段，每个线程至多多出一个张量。

    Args:
        model: 参数名与官方检查点相同的模型，已经分配好存储。
    """
    parameters = dict(model.named_parameters())

    def load(weight_file: WeightFile, name: str) -> None:
        parameter = parameters[name]
        if not hasattr(parameter, "ds_tensor"):
            parameter.copy_(weight_file.read(name))
            return
        # ZeRO-3：第 r 个进程持有展平后的 [r·k, (r+1)·k)，k 是本段长度，尾部补零
        partition = parameter.ds_tensor
        start = min(partition.numel() * global_rank(), parameter.ds_numel)
        stop = min(start + partition.numel(), parameter.ds_numel)
        partition.zero_()
        if stop > start:
            partition[: stop - start].copy_(weight_file.read_flat(name, start, stop))

    for _ in read_all(directory, parameters, load):
        pass


def gathered_tensors(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor | None]]:
    """逐个给出完整的参数：0 号进程得到 CPU 张量，其余进程得到 None；集合操作，所有进程按同样的顺序走完。"""
    import deepspeed

    for name, parameter in parameters:
        is_partitioned = hasattr(parameter, "ds_tensor")
        with deepspeed.zero.GatheredParameters([parameter]) if is_partitioned else nullcontext():
            yield name, parameter.detach().cpu().clone() if global_rank() == 0 else None


class ShardedWriter:
    """把张量一个个收下，当场写进分片，内存里一个也不留；只在 0 号进程使用。

    分片是 safetensors：文件头的位置先空出来，一片满了再填（格式许可末尾的空格）。
    """

    def __init__(self, directory: Path, stem: str = "model", max_shard_bytes: int = 5 * 10**9):
        self.directory, self.stem, self.max_shard_bytes = directory, stem, max_shard_bytes
        self._stream: BinaryIO | None = None
        self._header: dict[str, dict] = {}
        self._shards: list[list[str]] = []
        self._shard_bytes = self._total_bytes = 0

    def add(self, name: str, *parts: Tensor):
        """收下一个张量：整个，或依次的各些行。"""
        size = sum(part.numel() * part.element_size() for part in parts)
        entry = {
            "dtype": SAFETENSORS_NAMES[parts[0].dtype],
            "shape": [sum(len(part) for part in parts), *parts[0].shape[1:]] if parts[0].dim() else [],
        }
        if self._stream is not None and (self._shard_bytes + size > self.max_shard_bytes or not self._has_room(name)):
            self._finish_shard()
        if self._stream is None:
            self._start_shard()
        self._header[name] = entry | {"data_offsets": [self._shard_bytes, self._shard_bytes + size]}
        for part in parts:
            self._write(part)
        self._shard_bytes += size
        self._total_bytes += size

    def _has_room(self, name: str) -> bool:
        return len(json.dumps(self._header)) + len(json.dumps(name)) + 200 < HEADER_BYTES

    def _start_shard(self):
        path = self.directory / f"{self.stem}-{len(self._shards) + 1:05d}.safetensors"
        self._stream, self._shard_bytes, self._header = path.open("wb"), 0, {"__metadata__": {"format": "pt"}}
        self._stream.seek(HEADER_BYTES)

    def _write(self, part: Tensor):
        self._stream.write(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    def _finish_shard(self):
        header = json.dumps(self._header).encode()
        self._stream.truncate(HEADER_BYTES + self._shard_bytes)
        self._stream.seek(0)
        self._stream.write((HEADER_BYTES - 8).to_bytes(8, "little") + header.ljust(HEADER_BYTES - 8))
        self._stream.close()
        self._stream = None
        self._shards.append([name for name in self._header if name != "__metadata__"])

    def close(self) -> int:
        """写完最后一片；多于一片时按官方布局改名并写索引。返回张量总数。"""
        if self._stream is None and not self._shards:
            self._start_shard()
        if self._stream is not None:
            self._finish_shard()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            suffix = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
            final_name = f"{self.stem}{suffix}.safetensors"
            os.replace(self.directory / f"{self.stem}-{number:05d}.safetensors", self.directory / final_name)
            weight_map.update(dict.fromkeys(names, final_name))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            write_json(self.directory / f"{self.stem}.safetensors.index.json", index)
        return len(weight_map)
