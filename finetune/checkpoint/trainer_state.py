"""训练状态存进检查点的 trainer_state/，再原样读回。

状态是按参数名存的完整张量（safetensors）与一个 JSON，没有 pickle，也与进程数无关。基座权重不在其中：
续训总是先照常读基座、套上训练方法，再由主权重重写可训练的部分。
"""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from finetune.checkpoint.optimizer_state import iter_optimizer_state, load_optimizer_state, optimizer_scalars
from finetune.checkpoint.weights import ShardedWriter, WeightFile, weight_map
from finetune.process.random_state import random_state, set_random_state
from utils import global_rank, log_rank_0, raise_together, read_json, world_size, write_json

STATE_DIR = "trainer_state"


def save_trainer_state(engine, directory: Path, progress: dict) -> Exception | None:
    """把优化器、调度器、损失缩放、各进程的随机状态与 progress 存进 directory/trainer_state；集合操作。

    Args:
        progress: 可写成 JSON 的其他状态（日志的累计、最好的检查点等）。

    Returns:
        写盘的错误；收集还要继续，不能中途抛出。
    """
    state_dir, error, writer = directory / STATE_DIR, None, None
    try:
        if global_rank() == 0:
            state_dir.mkdir()
            writer = ShardedWriter(state_dir, stem="optimizer")
    except OSError as os_error:
        error = os_error
    scalars = optimizer_scalars(engine)
    for name, tensor in iter_optimizer_state(engine):
        if writer is None or error is not None:
            continue
        try:
            writer.add(name, tensor)
        except Exception as write_error:  # safetensors 把磁盘满报成它自己的异常
            error = write_error
    random_states = [None] * world_size()
    dist.all_gather_object(random_states, random_state())
    if writer is None or error is not None:
        return error
    try:
        writer.close()
        flat = {f"{rank}.{name}": tensor for rank, state in enumerate(random_states) for name, tensor in state.items()}
        save_file(flat, state_dir / "random.safetensors")
        write_json(state_dir / "state.json", {"optimizer": scalars, "world_size": world_size(), "progress": progress})
    except Exception as write_error:
        error = write_error
    return error


def load_trainer_state(engine, directory: Path, num_steps: int) -> dict:
    """把检查点的训练状态写回新引擎，返回保存时的 progress；集合操作。

    总步数变了（改了轮数或 max_steps）时，学习率按新的总步数重新排。
    """
    state_dir = directory / STATE_DIR
    state = locations = error = None
    files: dict[Path, WeightFile] = {}
    try:
        state = read_json(state_dir / "state.json")
        locations = weight_map(state_dir, stem="optimizer")
    except ValueError as raised:  # 有的机器读不到：各进程一起停下
        error = raised
    raise_together(error)

    def read_slice(name: str, start: int, stop: int) -> torch.Tensor:
        path = locations[name]
        if path not in files:
            files[path] = WeightFile(path)
        return files[path].read_flat(name, start, stop)

    same_schedule = state["progress"]["num_steps"] == num_steps
    if not same_schedule:
        log_rank_0(f"resume: 总步数由 {state['progress']['num_steps']} 改为 {num_steps}，学习率按新的总步数重新安排")
    load_optimizer_state(engine, read_slice, state["optimizer"], restore_lr=same_schedule)
    if state["world_size"] == world_size():
        prefix = f"{global_rank()}."
        saved = load_file(state_dir / "random.safetensors")
        set_random_state({name[len(prefix) :]: tensor for name, tensor in saved.items() if name.startswith(prefix)})
    return state["progress"]
