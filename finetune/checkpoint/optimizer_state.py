"""DeepSpeed 引擎的完整优化器状态：按参数名读成与进程数无关的张量，再逐片写回新引擎，全程不用 pickle。

每个可训练参数有三个与它同形的张量：`{name}.master`（主权重，通常 fp32）、`{name}.exp_avg`、`{name}.exp_avg_sq`；
其余（步数、学习率、调度器、loss scale、引擎计数）都是能写进 JSON 的标量。读写必须在累积边界上进行：此时没有挂着的梯度。

支持 ZeRO-0/1/2/3、优化器与参数的 CPU offload、fp32/bf16/fp16、任意多个参数分组，以及 Adam 一族
（torch 的 Adam/AdamW、FusedAdam、DeepSpeedCPUAdam）。依据 DeepSpeed 0.19.8 的内部结构写成，换版本须重跑测试。
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from utils import raise_together

STATE_KEYS = ("master", "exp_avg", "exp_avg_sq")
_ADAM_CLASSES = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam")

# 展平型优化器：类名 → (各组的模型参数, 各组展平的工作权重, 各组展平的主权重) 的属性名。
# 模型参数都是工作权重的视图，主权重与它同序；前两类各进程只有自己的一段主权重，FP16_Optimizer 则各有全份
_FLAT_LAYOUTS = {
    "DeepSpeedZeroOptimizer": ("bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups"),
    "BF16_Optimizer": ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition"),
    "FP16_Optimizer": ("fp16_groups", "fp16_groups_flat", "fp32_groups_flat"),
}
_OTHER_LAYOUTS = ("DeepSpeedZeroOptimizer_Stage3", "FP16_UnfusedOptimizer", *_ADAM_CLASSES)

_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_SEND_CHUNK = 1 << 24  # 一次传送的元素数：fp32 下 64 MB，限住传送用的显存


@dataclass
class _Slot:
    """一个可训练参数在本进程优化器里的位置：参数的 [start, start+length) 存在 owner 的 [offset, offset+length)。"""

    name: str
    shape: torch.Size
    group: int  # 所属参数分组
    owner: torch.Tensor  # 主权重所在的张量，也是 optimizer.state 的键
    start: int
    offset: int
    length: int

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.detach().view(-1).narrow(0, self.offset, self.length)


def iter_optimizer_state(engine) -> Iterator[tuple[str, torch.Tensor | None]]:
    """逐个给出全部优化器张量：0 号进程得到完整的 CPU 张量（与参数同形），其余进程得到 None。

    这是集合操作：所有进程必须以同样的次数走完整个迭代，0 号进程写盘失败也要把余下的取完，否则其余进程会一直等。
    尚未更新过的参数，动量按零给出。内存至多为调用方手里的一个加上正在收集的一个；不支持的配置抛 ValueError。
    """
    slots = _find_slots(engine)
    base = _base_optimizer(engine)
    spans = _exchange_spans(slots)
    for index, slot in enumerate(slots):
        state = base.state.get(slot.owner, {})
        for key in STATE_KEYS:
            flat = slot.owner if key == "master" else state.get(key)
            piece = torch.zeros(slot.length) if flat is None else slot.view(flat)
            yield f"{slot.name}.{key}", _gather_on_rank_0(piece, slot, spans[:, index])


def optimizer_scalars(engine) -> dict:
    """返回张量以外的全部状态，可直接 json.dump（浮点经 JSON 往返不变）；各进程的结果相同，不是集合操作。"""
    slots = _find_slots(engine)
    base = _base_optimizer(engine)
    groups = []
    for index, group in enumerate(base.param_groups):
        members = [slot for slot in slots if slot.group == index]
        steps = {slot.name: int(base.state.get(slot.owner, {}).get("step", 0)) for slot in members}
        step = steps if len(set(steps.values())) > 1 else max(steps.values(), default=0)
        hyper = {key: _plain(value) for key, value in group.items() if key != "params"}
        groups.append({"params": {slot.name: list(slot.shape) for slot in members}, "hyper": hyper, "step": step})
    scheduler, scaler = engine.lr_scheduler, _loss_scaler(engine)
    scalars = {
        "optimizer": type(base).__name__,
        "groups": groups,
        "scheduler": scheduler and {"class": type(scheduler).__name__, "state": scheduler.state_dict()},
        "loss_scaler": {key: _plain(getattr(scaler, key)) for key in _SCALER_KEYS if hasattr(scaler, key)},
        "engine": {key: int(getattr(engine, key)) for key in _COUNTERS},
        "gradient_accumulation_steps": int(engine.gradient_accumulation_steps()),
    }
    try:
        return json.loads(json.dumps(scalars))
    except TypeError as error:
        raise ValueError(f"优化器或调度器的状态不能写进 JSON（{error}），请换用 DeepSpeed 自带的调度器") from error


def load_optimizer_state(
    engine, read_slice: Callable[[str, int, int], torch.Tensor], scalars: dict, restore_lr: bool = True
) -> None:
    """把状态写回一个还没走过任何一步的新引擎，并刷新前向所用的工作权重。集合操作。

    `read_slice(name, start, stop)` 返回展平后的 [start, stop) 一段（一维），各进程只读自己的那些段。
    同样的进程数下续训逐位相同；别的进程数下差在浮点求和的次序上。冻结参数不归这里管，由权重文件恢复。
    restore_lr=False 时学习率由新引擎的调度器按已走的步数重新算出（总步数改变时用）。
    名字、形状、分组不符或引擎不是新的，抛 ValueError；一个进程读取失败时所有进程一起抛错。
    """
    slots = _find_slots(engine)
    base = _base_optimizer(engine)
    problem = _mismatch(engine, slots, scalars)
    raise_together(ValueError(problem) if problem else None)

    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()  # ZeRO-3：常驻参数先收回分片，之后改写的分片才是唯一的一份
    failure = None
    try:
        _read_tensors(base, slots, read_slice, scalars)
    except Exception as error:  # 无论哪种失败，都先让其余进程知道，再原样抛出
        failure = error
    raise_together(failure)

    for group, saved in zip(base.param_groups, scalars["groups"], strict=True):
        for key, value in saved["hyper"].items():
            if key in group and (key != "lr" or restore_lr):
                group[key] = tuple(value) if isinstance(group[key], tuple) else value
    _replay_bias_correction(base, slots)
    _refresh_working_weights(engine, slots)
    _restore_scheduler(engine, scalars["scheduler"], restore_lr)
    scaler = _loss_scaler(engine)
    for key, value in scalars["loss_scaler"].items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)
    for key in _COUNTERS:
        setattr(engine, key, scalars["engine"][key])
    if scalars["gradient_accumulation_steps"] != engine.gradient_accumulation_steps():
        # 累积步数变了（换了进程数）：micro_steps 须仍是它的整倍数，边界才落在原处
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def read_flat_slice(lazy_slice, start: int, stop: int) -> torch.Tensor:
    """从 safetensors 的 `get_slice(name)` 里读展平后的 [start, stop)，只读它所跨的那些行（首维）；返回一维张量。"""
    shape = lazy_slice.get_shape()
    if not shape:
        return lazy_slice[...].reshape(-1)[start:stop]
    row = max(1, torch.Size(shape[1:]).numel())
    first, last = start // row, -(-stop // row)
    return lazy_slice[first:last].reshape(-1)[start - first * row : stop - first * row]


def _base_optimizer(engine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)  # fp32 的 ZeRO-0 没有包装


def _loss_scaler(engine):
    """ZeRO 用 loss_scaler，ZeRO-0 的 fp16/bf16 用 loss_scale_config，其余没有（None）。"""
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)


def _plain(value):
    """标量张量化为 Python 数，容器逐项处理；其余原样返回，能否写进 JSON 由调用方检查。"""
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _check_supported(engine) -> None:
    """不支持的配置一律在动手之前拒绝。"""
    optimizer, base = engine.optimizer, _base_optimizer(engine)
    wrapper, kind = type(optimizer).__name__, type(base).__name__
    known = (*_FLAT_LAYOUTS, *_OTHER_LAYOUTS)
    nvme = getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False)
    scaler = getattr(optimizer, "torch_autocast_gradscaler", None)
    amsgrad = any(group.get("amsgrad") for group in getattr(base, "param_groups", ()))
    ranks = dist.get_world_size(getattr(optimizer, "dp_process_group", None) or engine.data_parallel_group)
    checks = (
        (optimizer is None, "引擎没有优化器，无从保存或恢复优化器状态"),
        (nvme, "不支持 NVMe offload：请把 offload_optimizer、offload_param 的 device 改为 cpu"),
        (wrapper not in known, f"不支持的优化器 {wrapper}（可用：{'、'.join(known)}），请关掉 ZenFlow、MiCS 等选项"),
        (kind not in _ADAM_CLASSES, f"只支持 Adam 一族（{'、'.join(_ADAM_CLASSES)}），得到 {kind}，请换优化器"),
        (amsgrad, "不支持 amsgrad：请从优化器参数中去掉它"),
        (hasattr(optimizer, "backup_optimizer"), "不支持部分 offload：请把 offload_optimizer 的 ratio 改为 1.0"),
        (scaler is not None, "不支持 torch_autocast 的 fp16：请改用 fp16 或 bf16 配置段"),
        (ranks != dist.get_world_size(), f"只支持纯数据并行：数据并行组只有 {ranks} 个进程，请关掉张量、序列并行"),
    )
    for wrong, message in checks:
        if wrong:
            raise ValueError(message)


def _find_slots(engine) -> list[_Slot]:
    """按 named_parameters 的次序给出全部可训练参数的位置；元素数为零的参数 DeepSpeed 不训练，略去。"""
    _check_supported(engine)
    optimizer = engine.optimizer
    wrapper = type(optimizer).__name__
    if wrapper in _FLAT_LAYOUTS:
        places = _places_in_flat_groups(optimizer, *_FLAT_LAYOUTS[wrapper])
    elif wrapper == "DeepSpeedZeroOptimizer_Stage3":
        places = _places_in_stage3(optimizer)
    elif wrapper == "FP16_UnfusedOptimizer":
        places = _places_one_to_one(optimizer.fp16_groups, optimizer.fp32_groups)
    else:  # fp32 的 ZeRO-0：参数自己就是主权重
        groups = [group["params"] for group in optimizer.param_groups]
        places = _places_one_to_one(groups, groups)
    slots, missing = [], []
    for name, param in engine.module.named_parameters():
        shape = torch.Size(getattr(param, "ds_shape", param.shape))
        if not param.requires_grad or shape.numel() == 0:
            continue
        if id(param) not in places:
            missing.append(name)
            continue
        group, owner, start, offset, length = places[id(param)]
        slots.append(_Slot(name, shape, group, owner, start, offset, length))
    if missing:
        raise ValueError(
            f"有可训练参数不在任何优化器分组里：{'、'.join(missing[:5])} 共 {len(missing)} 个；请冻结它们，或加进分组"
        )
    return slots


def _places_one_to_one(groups: list, master_groups: list) -> dict:
    """每个参数各有一个完整的主权重，各进程相同。"""
    places = {}
    for index, (params, masters) in enumerate(zip(groups, master_groups, strict=True)):
        for param, master in zip(params, masters, strict=True):
            places[id(param)] = (index, master, 0, 0, param.numel())
    return places


def _places_in_flat_groups(optimizer, groups_key: str, working_key: str, master_key: str) -> dict:
    """展平型：由参数在展平工作权重中的地址得到次序（轮转、对齐填充都在其中），再与本进程的那一段主权重求交。"""
    places = {}
    parts = (getattr(optimizer, key) for key in (groups_key, working_key, master_key))
    for index, (params, working, master) in enumerate(zip(*parts, strict=True)):
        begin = master.numel() * dist.get_rank() if master.numel() < working.numel() else 0
        for param in params:
            position, rest = divmod(param.data_ptr() - working.data_ptr(), working.element_size())
            assert rest == 0 and 0 <= position <= working.numel() - param.numel(), "参数不再是展平权重的视图"
            low, high = max(position, begin), min(position + param.numel(), begin + master.numel())
            span = (low - position, low - begin, high - low) if low < high else (0, 0, 0)
            places[id(param)] = (index, master, *span)
    return places


def _places_in_stage3(optimizer) -> dict:
    """ZeRO-3：每个参数各自均分，r 号进程占 [r·k, (r+1)·k)，末尾的填充不存。"""
    places = {}
    for sub_group, params in enumerate(optimizer.fp16_groups):
        for param in params:
            _, offset, size = optimizer.grad_position[optimizer.get_param_id(param)]
            start = min(size * dist.get_rank(), param.ds_numel)
            length = min(size, param.ds_numel - start)
            group = optimizer.sub_group_to_group_id[sub_group]
            places[id(param)] = (group, optimizer.fp32_partitioned_groups_flat[sub_group], start, offset, length)
    return places


def _comm_device() -> torch.device:
    if dist.get_backend() == "gloo":
        return torch.device("cpu")
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def _exchange_spans(slots: list[_Slot]) -> torch.Tensor:
    """返回 [world_size, num_slots, 2]：每个进程持有每个参数的哪一段（start, length）。"""
    mine = torch.tensor([[slot.start, slot.length] for slot in slots], dtype=torch.int64, device=_comm_device())
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).cpu()


def _gather_on_rank_0(piece: torch.Tensor, slot: _Slot, spans: torch.Tensor) -> torch.Tensor | None:
    """把各进程的段拼成完整张量，只在 0 号进程；0 号进程本来就有全份时（ZeRO-0）不通信。spans: [world_size, 2]。"""
    rank, device = dist.get_rank(), _comm_device()
    pairs = [tuple(pair) for pair in spans.tolist()]
    if pairs[0][1] == slot.shape.numel():
        return piece.cpu().clone().view(slot.shape) if rank == 0 else None
    assert sum(length for _, length in pairs) == slot.shape.numel(), f"{slot.name} 的各段拼不成整个参数：{pairs}"
    if rank != 0:
        for chunk in piece.split(_SEND_CHUNK) if slot.length else ():
            dist.send(chunk.to(device).contiguous(), dst=0)
        return None
    full = torch.empty(slot.shape.numel(), dtype=piece.dtype)
    full[slot.start : slot.start + slot.length] = piece.cpu()
    for source, (start, length) in enumerate(pairs[1:], start=1):
        for low in range(start, start + length, _SEND_CHUNK):
            chunk = torch.empty(min(_SEND_CHUNK, start + length - low), dtype=piece.dtype, device=device)
            dist.recv(chunk, src=source)
            full[low : low + chunk.numel()] = chunk.cpu()
    return full.view(slot.shape)


def _mismatch(engine, slots: list[_Slot], scalars: dict) -> str | None:
    """检查点与新引擎对不上时说明哪里不同，对得上则返回 None。"""
    if engine.global_steps or engine.micro_steps:
        return f"只能恢复到新建的引擎：它已走过 {engine.global_steps} 步，请重新 deepspeed.initialize"
    groups = _base_optimizer(engine).param_groups
    if len(groups) != len(scalars["groups"]):
        return f"优化器有 {len(groups)} 个参数分组，检查点里有 {len(scalars['groups'])} 个；请用保存时的分组"
    for index, saved in enumerate(scalars["groups"]):
        now, then = {slot.name: list(slot.shape) for slot in slots if slot.group == index}, saved["params"]
        if now != then:
            wrong = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
            return (
                f"第 {index} 组的可训练参数与检查点不同（多出、缺少或形状不同）：{'、'.join(wrong[:5])}"
                f" 共 {len(wrong)} 个；请用保存时的训练方式与参数"
            )
    if (engine.lr_scheduler is None) != (scalars["scheduler"] is None):
        return "检查点与现在的配置只有一方有学习率调度器，请用保存时的配置"
    return None


def _read_tensors(base, slots: list[_Slot], read_slice, scalars: dict) -> None:
    """建立各 owner 的 Adam 状态并填入本进程的各段；填充处的动量为零，与新引擎相同。"""
    saved_steps: dict[str, int] = {}
    for saved in scalars["groups"]:
        step = saved["step"]
        saved_steps.update(step if isinstance(step, dict) else dict.fromkeys(saved["params"], step))
    steps: dict[int, int] = {}  # owner 的 id → 步数；同一 owner 里各参数的步数相同，只有 fp32 的 ZeRO-0 逐参数计步
    for slot in slots:
        steps[id(slot.owner)] = max(saved_steps[slot.name], steps.get(id(slot.owner), 0))
    for slot in slots:
        state, group = base.state[slot.owner], base.param_groups[slot.group]
        state["step"] = steps[id(slot.owner)]
        if type(base).__name__ in ("Adam", "AdamW"):  # torch 的步数是各自的 float32 张量，DeepSpeed 的两种是整数
            device = slot.owner.device if group.get("capturable") or group.get("fused") else "cpu"
            state["step"] = torch.tensor(float(state["step"]), device=device, dtype=torch.float32)
        dtype = torch.float32 if getattr(base, "fp32_optimizer_states", False) else slot.owner.dtype
        for key in STATE_KEYS[1:]:
            if key not in state:
                state[key] = torch.zeros_like(slot.owner.detach(), dtype=dtype)
        for key in STATE_KEYS if slot.length else ():
            piece = read_slice(f"{slot.name}.{key}", slot.start, slot.start + slot.length)
            if piece.numel() != slot.length:
                raise ValueError(f"{slot.name}.{key} 应读到 {slot.length} 个元素，实得 {piece.numel()} 个")
            slot.view(slot.owner if key == "master" else state[key]).copy_(piece)


def _replay_bias_correction(base, slots: list[_Slot]) -> None:
    """重放 C++ Adam 的偏差修正计数：它逐步连乘 beta^t，新进程却从 pow 起算，末位会不同（只有 CPU 上的实现如此）。"""
    kind = type(base).__name__
    on_cpu = any(slot.owner.device.type == "cpu" for slot in slots)
    last = max((int(base.state[slot.owner]["step"]) for slot in slots), default=0)
    if kind not in ("FusedAdam", "DeepSpeedCPUAdam") or not on_cpu:
        return
    # 只有 betas 影响计数，步内的次序是分组的次序；张量用一个元素的替身
    all_betas = [tuple(group["betas"]) for group in base.param_groups]
    sequence = [betas for index, betas in enumerate(all_betas) if index == 0 or betas != all_betas[index - 1]]
    stand_in = [torch.zeros(1) for _ in range(4)]
    lists = [[tensor] for tensor in stand_in]
    for step in range(1, last + 1):
        for betas in sequence:
            if kind == "DeepSpeedCPUAdam":
                base.ds_opt_adam.adam_update(base.opt_id, step, 0.0, *betas, 1e-8, 0.0, True, *stand_in)
            else:
                mode = base.adam_w_mode
                base.multi_tensor_adam(1, base._dummy_overflow_buf, lists, 0.0, *betas, 1e-8, step, mode, 1, 0.0)


def _refresh_working_weights(engine, slots: list[_Slot]) -> None:
    """由主权重重写前向所用的权重；漏了这一步，前向会不声不响地用着旧权重。"""
    optimizer = engine.optimizer
    wrapper = type(optimizer).__name__
    if wrapper == "DeepSpeedZeroOptimizer_Stage3":
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()  # 常驻参数重新收齐
    elif hasattr(optimizer, "update_lp_params"):  # ZeRO-1/2
        optimizer.update_lp_params()
        optimizer._lazy_init_hp_params_optimizer_state()
    elif wrapper in ("FP16_Optimizer", "FP16_UnfusedOptimizer"):
        params = dict(engine.module.named_parameters())
        for slot in slots:
            params[slot.name].data.copy_(slot.view(slot.owner).view(slot.shape))


def _restore_scheduler(engine, saved: dict | None, restore_lr: bool) -> None:
    """调度器回到保存时的位置；restore_lr=False 时改由新的日程算出下一步的学习率。"""
    scheduler = engine.lr_scheduler
    if saved is None:
        return
    if restore_lr:
        scheduler.load_state_dict(saved["state"])
        if hasattr(scheduler, "_last_lr"):  # DeepSpeed 的 state_dict 里没有它
            scheduler._last_lr = [group["lr"] for group in _base_optimizer(engine).param_groups]
    elif hasattr(scheduler, "last_batch_iteration"):  # DeepSpeed 自带的调度器
        scheduler.step(saved["state"]["last_batch_iteration"])
    else:
        raise ValueError(f"不会为调度器 {type(scheduler).__name__} 重算学习率，请用 DeepSpeed 自带的调度器")
