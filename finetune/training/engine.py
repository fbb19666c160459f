"""模型 → DeepSpeed 引擎：参数分组与学习率调度的起点。"""

import deepspeed
from torch import nn

from finetune.checkpoint.optimizer_state import check_resumable


def open_engine(model: nn.Module, weight_decay: float, ds_config: dict, saves_state: bool):
    """把模型交给 DeepSpeed；ds_config 是 resolve_ds_config 填好的配置。集合操作。

    Raises:
        ValueError: saves_state 而这样的引擎存不了训练状态。
    """
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameter_groups(model, weight_decay), config=ds_config
    )
    if saves_state:
        check_resumable(engine)
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.step()  # DeepSpeed 的调度从「第 -1 步」开始，走一下才是第一步的学习率
    engine.train()
    return engine


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """权重衰减只作用于矩阵（RMSNorm 的向量不衰减）；只含可训练的参数。"""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
