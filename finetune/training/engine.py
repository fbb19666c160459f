"""模型 → DeepSpeed 引擎：参数分组与学习率调度的起点。"""

from collections.abc import Callable

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn
from torch.optim import Optimizer

from finetune.checkpoint.optimizer_state import check_resumable
from finetune.training.ds_config import GROUP_ELEMENTS, OWN_OPTIMIZERS


def open_engine(
    model: nn.Module,
    weight_decay: float,
    ds_config: dict,
    saves_state: bool,
    ratio_of: Callable[[str], float] = lambda name: 1.0,
):
    """把模型交给 DeepSpeed；ds_config 是 resolve_ds_config 填好的配置。集合操作。

    ratio_of：参数名 → 它的学习率是配置里的多少倍。

    Raises:
        ValueError: saves_state 而这样的引擎存不了训练状态；或有的学习率是几倍，而调度器会把它们改成一样。
    """
    groups = parameter_groups(model, weight_decay, ratio_of)
    if any("ratio" in group for group in groups):
        scheduler = ds_config.get("scheduler", {}).get("type")
        if scheduler not in (None, "WarmupCosineLR"):
            raise ValueError(f"--loraplus_ratio 要调度器 WarmupCosineLR，--ds_file 里是 {scheduler}，请改过来")
        for group in groups:
            group["lr"] = ds_config["optimizer"]["params"]["lr"] * group.pop("ratio", 1.0)
    load_muon()
    engine = initialize(model, groups, ds_config)
    if saves_state:
        check_resumable(engine)
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.step()  # DeepSpeed 的调度从「第 -1 步」开始，走一下才是第一步的学习率
    engine.train()
    return engine


def initialize(model: nn.Module, groups: list[dict], ds_config: dict):
    """deepspeed.initialize，优化器也可以是 OWN_OPTIMIZERS 里的。"""
    section = ds_config.get("optimizer", {})
    if section.get("type") not in OWN_OPTIMIZERS.values():
        return deepspeed.initialize(model=model, model_parameters=groups, config=ds_config)[0]
    optimizer = own_optimizer(section, split_groups(groups))
    config = {name: value for name, value in ds_config.items() if name != "optimizer"}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    save_memory(engine.optimizer)
    return engine


def load_muon() -> None:
    """先载入 DeepSpeed 的 Muon，不让它载入时就编译。

    ZeRO 在第一次反向时看优化器是不是 Muon，为此载入它，而它当即把几个函数交给 torch.compile，连带载入 inductor
    （48 MB，DeepSpeed 0.19.8，见 findings/deepspeed_zero_loads_inductor.sh）。这里从不用 Muon。
    """
    compiled, torch.compile = torch.compile, lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        torch.compile = compiled


def parameter_groups(
    model: nn.Module, weight_decay: float, ratio_of: Callable[[str], float] = lambda name: 1.0
) -> list[dict]:
    """权重衰减只作用于矩阵（RMSNorm 的向量不衰减）；只含可训练的参数。

    ratio_of 不是 1 的参数各成一组，ratio 是它们的学习率的倍数；别的在前，记录的学习率是第一组的。
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = []
    for ratio in sorted({ratio_of(name) for name, _ in trainable}, key=lambda ratio: ratio != 1.0):
        chosen = [parameter for name, parameter in trainable if ratio_of(name) == ratio]
        matrices = [p for p in chosen if len(getattr(p, "ds_shape", p.shape)) > 1]
        vectors = [p for p in chosen if len(getattr(p, "ds_shape", p.shape)) <= 1]
        marked = {} if ratio == 1.0 else {"ratio": ratio}
        groups += [{"params": matrices, "weight_decay": weight_decay, **marked}]
        groups += [{"params": vectors, "weight_decay": 0.0, **marked}]
    return [group for group in groups if group["params"]]


def split_groups(groups: list[dict], limit: int = GROUP_ELEMENTS) -> list[dict]:
    """元素数超过 limit 的组按参数的次序分成几组，其余相同。"""
    found = []
    for group in groups:
        room = 0
        for parameter in group["params"]:
            size = getattr(parameter, "ds_numel", parameter.numel())
            if size > room:
                found.append({**group, "params": []})
                room = limit
            found[-1]["params"].append(parameter)
            room -= size
    return found


def own_optimizer(section: dict, groups: list[dict]) -> Optimizer:
    """不由 DeepSpeed 建的优化器；section 是填好的配置的 optimizer 一节。"""
    if section["type"] == OWN_OPTIMIZERS["adamw_bf16"]:
        from finetune.training.adamw_bf16 import AdamWBF16 as kind
    else:
        from bitsandbytes.optim import AdamW8bit as kind
    return kind(groups, **section["params"])


def save_memory(zero) -> None:
    """让 ZeRO 不存多余的东西；依据 DeepSpeed 0.19.8 的内部结构。

    与工作权重同样精度的主权重总是与它相同：共用一块内存。ZeRO-2 把各 micro batch 的梯度加进同一个缓冲，它对 fp32 的累加
    本来就这样做；否则已加好的、新的、更新时拼接的各有一份。加进去的就放掉：比通信桶大的（词嵌入）原来留到反向之末。
    """
    if isinstance(zero, DeepSpeedZeroOptimizer):
        working = [parts[dist.get_rank()] for parts in zero.parallel_partitioned_bit16_groups]
        masters = zero.single_partition_of_fp32_groups
    else:
        working, masters = zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat
    for master, weight in zip(masters, working, strict=True):
        if master.dtype == weight.dtype:
            master.data = weight.data
    zero._link_all_hp_params()  # ZeRO-1/2 另有一套指向主权重的视图
    if isinstance(zero, DeepSpeedZeroOptimizer) and zero.partition_gradients:

        def release(parameter: nn.Parameter, group: int | None = None):
            if zero.overlap_comm and not get_accelerator().resolves_data_dependency():
                parameter.grad.record_stream(zero.reduction_stream)
            parameter.grad = None

        zero._use_compact_grad_partition_buffer = lambda group: True
        zero.copy_grads_in_partition = release
