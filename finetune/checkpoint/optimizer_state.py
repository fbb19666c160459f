"""DeepSpeed 引擎的完整优化器状态：按参数名读成与进程数无关的张量，再逐片写回新引擎，全程不用 pickle。

每个可训练参数有几个与它同形的张量：`{name}.master`（主权重，通常 fp32）与优化器的状态（STATE_KEYS）；
其余（步数、学习率、调度器、loss scale、引擎计数）都是能写进 JSON 的标量。读写必须在累积边界上进行：此时没有挂着的梯度。

支持 ZeRO-1/2/3、CPU offload、fp32/bf16/fp16 与 STATE_KEYS 里的优化器，别的由 check_resumable 在建引擎之后拒绝。
AdamW8bit 的状态每 256 个元素一块、各有一个系数，块不按参数分：系数另按进程存（`blocks.{n}.absmax1`），所以只能用同样的
进程数续训。
依据 DeepSpeed 0.19.8 的内部结构写成，换版本须重跑测试；它公开的 safe_get_full_optimizer_state 在 ZeRO-1/2 有多个参数
分组时只认第一组。
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from utils import raise_together

_ADAM = ("exp_avg", "exp_avg_sq")
# 优化器 → 它的状态里与参数同形的张量
STATE_KEYS = {
    **dict.fromkeys(("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"), _ADAM),
    "AdamWBF16": (*_ADAM, "compensation"),
    "AdamW8bit": ("state1", "state2"),
}
_BLOCK_KEYS = ("absmax1", "absmax2")  # AdamW8bit 的每块一个的系数
_WRAPPERS = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")
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


def check_resumable(engine) -> None:
    """存不了训练状态的引擎在训练之前就拒绝，而不是等到第一次保存。

    Raises:
        ValueError: 优化器、它的包装或卸载的方式不在支持之列。
    """
    optimizer = engine.optimizer
    wrapper, kind = type(optimizer).__name__, type(getattr(optimizer, "optimizer", optimizer)).__name__
    nvme = getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False)
    checks = (
        (wrapper not in _WRAPPERS, f"{wrapper}（只支持 ZeRO-1、2、3，不带 ZenFlow、SuperOffload）"),
        (kind not in STATE_KEYS, f"优化器 {kind}（只支持 Adam、AdamW 与 --optimizer 的几种）"),
        (nvme, "卸载到 NVMe（请把 offload_optimizer、offload_param 的 device 写成 cpu）"),
        (hasattr(optimizer, "backup_optimizer"), "只卸载一部分（请把 offload_optimizer 的 ratio 写成 1.0）"),
    )
    wrong = [what for is_wrong, what in checks if is_wrong]
    if wrong:
        raise ValueError(
            f"这样的 DeepSpeed 配置存不了训练状态：{'；'.join(wrong)}；请改配置，不要续训的话加 --no-save_trainer_state"
        )


def iter_optimizer_state(engine) -> Iterator[tuple[str, torch.Tensor | None]]:
    """逐个给出全部优化器张量：0 号进程得到完整的 CPU 张量（与参数同形），其余进程得到 None。

    这是集合操作：所有进程必须以同样的次数走完整个迭代，0 号进程写盘失败也要把余下的取完，否则其余进程会一直等。
    尚未更新过的参数，动量按零给出。内存至多为调用方手里的一个加上正在收集的一个。
    """
    slots, base = _find_slots(engine), engine.optimizer.optimizer
    _start_states(base, slots)
    spans = _exchange_spans(slots)
    for index, slot in enumerate(slots):
        state = base.state.get(slot.owner, {})
        for key in ("master", *STATE_KEYS[type(base).__name__]):
            flat = slot.owner if key == "master" else state.get(key)
            piece = torch.zeros(slot.length) if flat is None else slot.view(flat)
            yield f"{slot.name}.{key}", _gather_on_rank_0(piece, slot, spans[:, index])
    blocks = _block_slots(base, slots)
    spans = _exchange_spans(blocks) if blocks else None
    for index, slot in enumerate(blocks):
        yield slot.name, _gather_on_rank_0(slot.view(slot.owner), slot, spans[:, index])


def optimizer_scalars(engine) -> dict:
    """返回张量以外的全部状态，可直接 json.dump（浮点经 JSON 往返不变）；各进程的结果相同，不是集合操作。"""
    slots, base = _find_slots(engine), engine.optimizer.optimizer
    groups = []
    for index, group in enumerate(base.param_groups):
        members = [slot for slot in slots if slot.group == index]
        step = max((int(base.state.get(slot.owner, {}).get("step", 0)) for slot in members), default=0)
        hyper = {key: value for key, value in group.items() if key != "params"}
        groups.append({"params": {slot.name: list(slot.shape) for slot in members}, "hyper": hyper, "step": step})
    scheduler, scaler = engine.lr_scheduler, engine.optimizer.loss_scaler
    scalars = {
        "optimizer": type(base).__name__,
        "groups": groups,
        "scheduler": {"class": type(scheduler).__name__, "state": scheduler.state_dict()},
        "loss_scaler": {key: getattr(scaler, key) for key in _SCALER_KEYS if hasattr(scaler, key)},
        "engine": {key: int(getattr(engine, key)) for key in _COUNTERS},
        "gradient_accumulation_steps": int(engine.gradient_accumulation_steps()),
    }
    _start_states(base, slots)
    if blocks := _block_slots(base, slots):
        scalars["blocks"] = {slot.name: list(slot.shape) for slot in blocks}
    return json.loads(json.dumps(scalars))


def load_optimizer_state(
    engine, read_slice: Callable[[str, int, int], torch.Tensor], scalars: dict, restore_lr: bool = True
) -> None:
    """把状态写回一个还没走过任何一步的新引擎，并刷新前向所用的工作权重。集合操作。

    `read_slice(name, start, stop)` 返回展平后的 [start, stop) 一段（一维），各进程只读自己的那些段。
    同样的进程数下续训逐位相同；别的进程数下差在浮点求和的次序上。冻结参数不归这里管，由权重文件恢复。
    restore_lr=False 时学习率由新引擎的调度器按已走的步数重新算出（总步数改变时用）。
    名字、形状、分组不符，抛 ValueError；一个进程读取失败时所有进程一起抛错。
    """
    check_resumable(engine)
    assert engine.global_steps == engine.micro_steps == 0, "只能恢复到新建的引擎"
    optimizer, slots = engine.optimizer, _find_slots(engine)
    base = optimizer.optimizer
    _start_states(base, slots)
    blocks = _block_slots(base, slots)
    problem = _mismatch(base, slots, blocks, scalars)
    raise_together(ValueError(problem) if problem else None)

    is_stage3 = engine.zero_optimization_stage() == 3
    if is_stage3:
        optimizer.checkpoint_event_prologue()  # 常驻参数先收回分片，之后改写的分片才是唯一的一份
    failure = None
    try:
        _read_tensors(base, slots, read_slice, scalars)
        for slot in blocks:
            slot.view(slot.owner).copy_(read_slice(slot.name, slot.start, slot.start + slot.length))
    except Exception as error:  # 无论哪种失败，都先让其余进程知道，再原样抛出
        failure = error
    raise_together(failure)

    for group, saved in zip(base.param_groups, scalars["groups"], strict=True):
        for key, value in saved["hyper"].items():
            if key in group and (key != "lr" or restore_lr):
                group[key] = tuple(value) if isinstance(group[key], tuple) else value
    _replay_bias_correction(base, slots)
    # 由主权重重写前向所用的权重；漏了这一步，前向会不声不响地用着旧权重
    if is_stage3:
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()  # 常驻参数重新收齐
    else:
        optimizer.update_lp_params()
        optimizer._lazy_init_hp_params_optimizer_state()
    scheduler, position = engine.lr_scheduler, scalars["scheduler"]["state"]
    if restore_lr:
        scheduler.load_state_dict(position)
        scheduler._last_lr = [group["lr"] for group in base.param_groups]  # state_dict 里没有它
    else:
        scheduler.step(position["last_batch_iteration"])
    for key, value in scalars["loss_scaler"].items():
        if hasattr(optimizer.loss_scaler, key):
            setattr(optimizer.loss_scaler, key, value)
    for key in _COUNTERS:
        setattr(engine, key, scalars["engine"][key])
    if scalars["gradient_accumulation_steps"] != engine.gradient_accumulation_steps():
        # 累积步数变了（换了进程数）：micro_steps 须仍是它的整倍数，边界才落在原处
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def _find_slots(engine) -> list[_Slot]:
    """按 named_parameters 的次序给出全部可训练参数的位置；元素数为零的参数 DeepSpeed 不训练，略去。"""
    optimizer = engine.optimizer
    is_stage3 = engine.zero_optimization_stage() == 3
    places = _places_in_stage3(optimizer) if is_stage3 else _places_in_flat_groups(optimizer)
    slots = []
    for name, param in engine.module.named_parameters():
        shape = torch.Size(getattr(param, "ds_shape", param.shape))
        if param.requires_grad and shape.numel():
            slots.append(_Slot(name, shape, *places[id(param)]))
    return slots


def _places_in_flat_groups(optimizer) -> dict:
    """ZeRO-1/2：模型参数是展平工作权重的视图，由地址得到次序（轮转、对齐填充都在其中），再与本进程的一段主权重求交。"""
    places = {}
    parts = (optimizer.bit16_groups, optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups)
    for index, (params, working, master) in enumerate(zip(*parts, strict=True)):
        begin = master.numel() * dist.get_rank()
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


def _start_states(base, slots: list[_Slot]) -> None:
    """--optimizer 的几种：还没有更新过的也建好状态，与第一次更新时所建的相同；Adam 一族由它们自己建。"""
    for slot in slots if hasattr(base, "init_state") else ():
        if not base.state[slot.owner]:
            group = {**base.param_groups[slot.group], "params": [slot.owner]}
            groups, base.param_groups = base.param_groups, [group]  # bitsandbytes 由下标找参数
            base.init_state(group, slot.owner, 0, 0)
            base.param_groups = groups


def _block_slots(base, slots: list[_Slot]) -> list[_Slot]:
    """AdamW8bit 的系数：每个 owner 的各进程的首尾相接；别的优化器没有。"""
    found = []
    for index, owner in enumerate(dict.fromkeys(slot.owner for slot in slots)):
        for key in (key for key in _BLOCK_KEYS if key in base.state.get(owner, {})):
            absmax = base.state[owner][key]
            shape, start = (dist.get_world_size(), absmax.numel()), dist.get_rank() * absmax.numel()
            name = f"blocks.{index}.{key}"
            found.append(_Slot(name, torch.Size(shape), -1, absmax, start, 0, absmax.numel()))
    return found


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
    """把各进程的段拼成完整张量，只在 0 号进程。spans: [world_size, 2]。"""
    device, pairs = _comm_device(), spans.tolist()
    assert sum(length for _, length in pairs) == slot.shape.numel(), f"{slot.name} 的各段拼不成整个参数：{pairs}"
    if dist.get_rank() != 0:
        for chunk in piece.split(_SEND_CHUNK) if slot.length else ():
            dist.send(chunk.to(device).contiguous().view(torch.uint8), dst=0)  # NCCL 与 gloo 都不传 int16
        return None
    full = torch.empty(slot.shape.numel(), dtype=piece.dtype)
    full[slot.start : slot.start + slot.length] = piece.cpu()
    for source, (start, length) in enumerate(pairs[1:], start=1):
        for low in range(start, start + length, _SEND_CHUNK):
            chunk = torch.empty(min(_SEND_CHUNK, start + length - low), dtype=piece.dtype, device=device)
            dist.recv(chunk.view(torch.uint8), src=source)
            full[low : low + chunk.numel()] = chunk.cpu()
    return full.view(slot.shape)


def _mismatch(base, slots: list[_Slot], blocks: list[_Slot], scalars: dict) -> str | None:
    """检查点与新引擎的参数分组对不上时说明哪里不同，对得上则返回 None。"""
    if len(base.param_groups) != len(scalars["groups"]):
        count = len(scalars["groups"])
        return f"优化器有 {len(base.param_groups)} 个参数分组，检查点里有 {count} 个；请用保存时的分组"
    for index, saved in enumerate(scalars["groups"]):
        now, then = {slot.name: list(slot.shape) for slot in slots if slot.group == index}, saved["params"]
        wrong = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        if wrong:
            return (
                f"第 {index} 组的可训练参数与检查点不同（多出、缺少或形状不同）：{'、'.join(wrong[:5])}"
                f" 共 {len(wrong)} 个；请用保存时的训练方式与参数"
            )
    if scalars.get("blocks", {}) != {slot.name: list(slot.shape) for slot in blocks}:
        world = dist.get_world_size()
        return f"8 位的优化器状态按进程分块，{world} 个进程的分块与检查点的不同；请用保存时的进程数续训"
    return None


def _read_tensors(base, slots: list[_Slot], read_slice, scalars: dict) -> None:
    """建立各 owner 的状态并填入本进程的各段；填充处的动量为零，与新引擎相同。"""
    for slot in slots:
        state, group = base.state[slot.owner], base.param_groups[slot.group]
        state["step"] = scalars["groups"][slot.group]["step"]
        if type(base).__name__ in ("Adam", "AdamW"):  # torch 的步数是 float32 张量，DeepSpeed 的两种是整数
            device = slot.owner.device if group.get("capturable") or group.get("fused") else "cpu"
            state["step"] = torch.tensor(float(state["step"]), device=device, dtype=torch.float32)
        dtype = torch.float32 if getattr(base, "fp32_optimizer_states", False) else slot.owner.dtype
        keys = STATE_KEYS[type(base).__name__]
        for key in keys:
            if key not in state:
                state[key] = torch.zeros_like(slot.owner.detach(), dtype=dtype)
        for key in ("master", *keys) if slot.length else ():
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
