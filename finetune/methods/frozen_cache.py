"""冻结底层的输出的缓存：freeze 只训练上面几层时，从第二轮起不再算底层。"""

import os
import shutil
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from baichuan import BaichuanForCausalLM
from finetune.data.rows import data_sha256
from finetune.methods.registry import base_model_of
from finetune.process.stale_files import SHM_DIRECTORY
from utils import log_rank_0, raise_together


class FrozenCache:
    """冻结底层的输出。

    Args:
        path: 缓存文件（全部进程相同）；另有 path.filled 记录哪些样本已有。
        num_layers: 冻结的底层数。
        num_tokens: 数据集的 token 总数。
        hidden_size、dtype: 隐藏状态的宽与类型。
        needs_agreement: ZeRO-3 下各进程必须走同样的层，有一个进程缺就都重算。

    Raises:
        ValueError: path 所在的地方放不下；各进程一同抛出。
    """

    def __init__(
        self, path: Path, num_layers: int, num_tokens: int, hidden_size: int, dtype: torch.dtype, needs_agreement: bool
    ):
        self.path, self.num_layers, self.needs_agreement = path, num_layers, needs_agreement
        self.cached: Tensor | None = None  # 这一次前向的底层输出；None：要算
        self._missing: tuple | None = None  # 这一次前向要存下的样本
        error = None
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            try:
                self.remove()  # 别的运行留下的；文件由下面的映射重新建立，初值全零
                check_space(path.parent, num_tokens * (hidden_size * dtype.itemsize + 1))
            except (OSError, ValueError) as raised:
                error = raised
        raise_together(error)
        self._states = torch.from_file(str(path), shared=True, size=num_tokens * hidden_size, dtype=dtype)
        self._states = self._states.view(num_tokens, hidden_size)
        self._filled = torch.from_file(f"{path}.filled", shared=True, size=num_tokens, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        """缓存的大小，字节。"""
        return self._states.nbytes

    def attach(self, model: BaichuanForCausalLM):
        """接到模型上：训练时带着 document_offsets 的一次前向，算过的样本跳过底层，没算过的存下来。"""
        model.model.layers = _CachedLayers(self, model.model.layers)
        model.model.layers[self.num_layers].register_forward_pre_hook(self._hand_over)
        model.register_forward_pre_hook(self._look_up, with_kwargs=True)

    def _look_up(self, model: BaichuanForCausalLM, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        offsets = kwargs.pop("document_offsets", None)
        self.cached = self._missing = None
        if offsets is not None and model.training:
            lengths = kwargs["document_lengths"]
            documents = offsets, lengths, kwargs.get("document_parents") or [-1] * len(lengths)
            self.cached = self.read(*documents, model.device)
            self._missing = documents if self.cached is None else None
        return args, kwargs

    def _hand_over(self, layer: nn.Module, args: tuple) -> tuple | None:
        """第一个可训练的层之前：换成存着的底层输出，或把刚算的存下来（重算时不再存）。"""
        if self.cached is not None:
            return (self.cached, *args[1:])
        if self._missing is not None:
            documents, self._missing = self._missing, None
            self.write(*documents, args[0])
        return None

    def read(self, offsets: list[int], lengths: list[int], parents: list[int], device: torch.device) -> Tensor | None:
        """并排样本的底层输出 [1, T, H]，放在 device 上；有样本还没算过则为 None。

        offsets 是各样本的位置；lengths、parents 是各段的（见 BaichuanModel.forward），父段在前，各样本自己的在后。
        """
        has_all = all(bool(self._filled[offset]) for offset in offsets)
        if self.needs_agreement and dist.is_initialized():
            flag = torch.tensor([float(has_all)], device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
            has_all = bool(flag.item())
        if not has_all:
            return None
        pieces = {}
        for offset, segment, parent in self._samples(offsets, parents):
            begin = offset + (lengths[parent] if parent >= 0 else 0)
            pieces[segment] = self._states[begin : begin + lengths[segment]]
            if parent >= 0:
                pieces[parent] = self._states[offset:begin]
        states = torch.cat([pieces[segment] for segment in sorted(pieces)])
        return states[None].to(device, non_blocking=True)

    def write(self, offsets: list[int], lengths: list[int], parents: list[int], hidden_states: Tensor):
        """存下并排样本的底层输出 [1, T, H]，共用的开头在各样本里都存一份；没有样本（占位的 micro batch）时不存。"""
        if not offsets:
            return
        pieces = hidden_states[0].detach().cpu().split(lengths)
        for offset, segment, parent in self._samples(offsets, parents):
            states = torch.cat([pieces[parent], pieces[segment]]) if parent >= 0 else pieces[segment]
            self._states[offset : offset + len(states)] = states
            self._filled[offset] = 1  # 内容在先，标记在后

    @staticmethod
    def _samples(offsets: list[int], parents: list[int]) -> list[tuple[int, int, int]]:
        """各样本的 (位置, 自己的段, 父段或 -1)。"""
        first = max(parents, default=-1) + 1
        return [(offset, first + index, parents[first + index]) for index, offset in enumerate(offsets)]

    def remove(self):
        """删去缓存文件。"""
        for path in (self.path, Path(f"{self.path}.filled")):
            path.unlink(missing_ok=True)


class _CachedLayers(nn.ModuleList):
    """BaichuanModel 的各层；有存着的底层输出时，底层换成直通，不经过模块的调用（ZeRO-3 也就不必聚集它们）。"""

    def __init__(self, cache: FrozenCache, layers: nn.ModuleList):
        super().__init__(layers)
        self.cache = cache

    def __iter__(self):
        skipped = 0 if self.cache.cached is None else self.cache.num_layers
        return iter([_pass_through] * skipped + list(self._modules.values())[skipped:])


class _PassThrough(nn.Module):
    def forward(self, hidden_states: Tensor, *_) -> tuple[Tensor, None]:
        return hidden_states, None


_pass_through = _PassThrough()


def check_space(directory: Path, num_bytes: int):
    """directory 里放得下 num_bytes；映射的文件写到一半没有空间时，进程会被 SIGBUS 杀死，没有说明。

    Raises:
        ValueError: 放不下。
    """
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise ValueError(
            f"--cache_frozen 要 {num_bytes / 2**30:.2f} GiB，{directory} 只有 {free / 2**30:.2f} GiB 可用。"
            "请换成 --cache_frozen disk（内存不够时；缓存在 --output_dir）、腾出空间，或去掉 --cache_frozen；"
            "Docker 的 /dev/shm 缺省只有 64 MB，用 --shm-size 调大"
        )


def num_frozen_layers(model: nn.Module) -> int:
    """从最底下数起，连续有多少层没有可训练的参数；词嵌入可训练时为 0。"""
    base = base_model_of(model).model
    if any(parameter.requires_grad for parameter in base.embed_tokens.parameters()):
        return 0
    for index, layer in enumerate(base.layers):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            return index
    return len(base.layers)


def open_frozen_cache(cache_frozen: str, output_dir: Path, engine, train_set) -> FrozenCache | None:
    """--cache_frozen：给模型接上冻结底层的缓存；没有要求时为 None。集合操作。"""
    if cache_frozen == "none":
        return None
    model = base_model_of(engine.module)
    num_layers = num_frozen_layers(engine.module)
    if not 0 < num_layers < len(model.model.layers):
        where = "词嵌入或第 0 层" if num_layers == 0 else "最后一层之后"
        raise ValueError(
            f"--cache_frozen：最低的可训练参数在{where}，没有可以缓存的底层（共 {len(model.model.layers)} 层）。"
            "请去掉 --cache_frozen，或让 --freeze_module_name 只含上面的几层"
        )
    directory = SHM_DIRECTORY if cache_frozen == "memory" else output_dir
    port = os.environ.get("MASTER_PORT", "0")
    name = f".tmp-frozen-{data_sha256(train_set.paths[0])[:8]}-{socket.gethostname()}-{port}"
    cache = FrozenCache(
        directory / name,
        num_layers=num_layers,
        num_tokens=sum(train_set.lengths),
        hidden_size=model.config.hidden_size,
        dtype=model.dtype,
        needs_agreement=engine.zero_optimization_stage() == 3,
    )
    log_rank_0(f"冻结的底层 {cache.num_layers} 层：输出缓存在 {directory}，共 {cache.num_bytes / 2**30:.2f} GiB")
    cache.attach(model)
    return cache
