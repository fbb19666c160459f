"""模型 → DeepSpeed 引擎：参数分组与学习率调度的起点。"""

from collections.abc import Callable

import deepspeed
from torch import nn

from finetune.checkpoint.optimizer_state import check_resumable


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
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=ds_config)
    if saves_state:
        check_resumable(engine)
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.step()  # DeepSpeed 的调度从「第 -1 步」开始，走一下才是第一步的学习率
    engine.train()
    return engine


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
