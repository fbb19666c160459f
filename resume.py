"""续训：把训练状态存进检查点的 trainer_state/，再原样读回；找可用的检查点，核对这确实是同一次训练。

状态是按参数名存的完整张量（safetensors）与一个 JSON，没有 pickle，也与进程数无关。基座权重不在其中：
续训总是先照常读基座、套上训练方法，再由主权重重写可训练的部分。
"""

import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint import CHECKPOINT_NAME, RUN_CONFIG, iter_checkpoints, verify_checkpoint
from optimizer_state import iter_optimizer_state, load_optimizer_state, optimizer_scalars, read_flat_slice
from utils import global_rank, log_rank_0, raise_together, read_json, world_size, write_json
from weights import ShardedWriter, weight_map

STATE_DIR = "trainer_state"
# 换了也还是同一次训练的参数：只影响显示、保存、评估、内存与速度，或只决定走多远
FREE_FLAGS = frozenset(
    {
        *(
            "output_dir",
            "logging_dir",
            "show_loss_step",
            "save_model_step",
            "loss_spike_factor",
            "save_trainer_state",
            "resume",
            "cache_dir",
            "cache_frozen",
            "gradient_checkpointing",
        ),
        *("num_train_epochs", "max_steps", "early_stopping_patience", "save_total_limit"),
        *("eval_path", "eval_step", "eval_metric", "eval_max_new_tokens", "general_path", "forgetting_threshold"),
        # 下面几项比较的是内容，不是写法：文件按哈希，精度按结果，累积按全局 batch
        *("model_name_or_path", "train_path", "replay_path"),
        *("ds_file", "precision", "gradient_accumulation_steps"),
    }
)


# ---------------------------------------------------------------------------------------------------------------------
# 存


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


def random_state() -> dict[str, torch.Tensor]:
    """本进程 torch、CUDA、numpy、random 的随机状态，都写成张量。"""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(keys.astype(np.int64)),
        "numpy.rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "random.words": torch.tensor([version, *words], dtype=torch.int64),
        "random.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]):
    """random_state() 的逆。"""
    version, *words = state["random.words"].tolist()
    random.setstate((version, tuple(words), *(state["random.gauss"].tolist() or [None])))
    position, has_gauss, cached = state["numpy.rest"].tolist()
    keys = state["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ---------------------------------------------------------------------------------------------------------------------
# 找


def find_resume_point(resume: str, output_dir: Path) -> Path | None:
    """--resume 所指的检查点：no 为 None；auto 为最新的完整的一个（跳过的说明原因），没有则为 None。

    Raises:
        ValueError: 指定的目录不是完整的检查点，或没有训练状态。
    """
    if resume == "no":
        return None
    if resume != "auto":
        problems = _problems(Path(resume))
        if problems:
            raise ValueError(f"--resume {resume} 不能用：" + "；".join(problems[:5]))
        return Path(resume)
    for _, _, directory in iter_checkpoints(output_dir):
        problems = _problems(directory)
        if not problems:
            return directory
        log_rank_0(f"resume: 跳过 {directory}：" + "；".join(problems[:3]))
    return None


def _problems(directory: Path) -> list[str]:
    if not CHECKPOINT_NAME.match(directory.name) or not directory.is_dir():
        return ["不是检查点目录（名字应为 epoch-E-step-S）"]
    problems = verify_checkpoint(directory)
    if not problems and not (directory / STATE_DIR / "state.json").is_file():
        problems = [f"没有 {STATE_DIR}（保存时用了 --no-save_trainer_state），不能续训，只能用来预测"]
    return problems


def check_same_run(directory: Path, args: Namespace, run_config: dict):
    """核对续训与检查点是同一次训练，必要时按进程数调整 args 与 run_config 的梯度累积（全局 batch 不变）。

    Raises:
        ValueError: 会使训练成为另一次训练的不同，全部列出。
    """
    saved = read_json(directory / RUN_CONFIG)
    old, new = saved["args"], run_config["args"]
    differences = [
        f"--{name}：检查点是 {old.get(name)!r}，现在是 {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if name not in FREE_FLAGS and old.get(name) != new.get(name)
    ]
    for name, what in (("train", "训练数据"), ("replay", "重放的文字")):
        if saved["data"].get(name) != run_config["data"].get(name):
            differences.append(f"{what} {getattr(args, f'{name}_path')} 的内容变了")
    if saved["base_model"]["hashes"] != run_config["base_model"]["hashes"]:
        differences.append(f"基座 {args.model_name_or_path} 的文件变了")
    if saved["ds_file"] != run_config["ds_file"]:
        differences.append(f"DeepSpeed 配置 {args.ds_file} 的内容变了")
    if saved["precision"] != run_config["precision"]:
        differences.append(f"精度：检查点是 {saved['precision']}，现在是 {run_config['precision']}")
    steps, rest = divmod(saved["global_batch_size"], args.per_device_train_batch_size * world_size())
    if rest:
        differences.append(
            f"全局 batch 是 {saved['global_batch_size']}，不能被 per_device_train_batch_size × 进程数 = "
            f"{args.per_device_train_batch_size} × {world_size()} 整除"
        )
    if differences:
        raise ValueError(f"不能从 {directory} 续训，这会成为另一次训练：\n" + "\n".join(differences))
    if steps != args.gradient_accumulation_steps:
        log_rank_0(f"resume: 全局 batch 保持 {saved['global_batch_size']}，gradient_accumulation_steps 改为 {steps}")
        args.gradient_accumulation_steps = new["gradient_accumulation_steps"] = steps
    run_config["global_batch_size"] = saved["global_batch_size"]  # 再次续训时以它为准


# ---------------------------------------------------------------------------------------------------------------------
# 读


def load_trainer_state(engine, directory: Path, num_steps: int) -> dict:
    """把检查点的训练状态写回新引擎，返回保存时的 progress；集合操作。

    总步数变了（改了轮数或 max_steps）时，学习率按新的总步数重新排。
    """
    state_dir = directory / STATE_DIR
    state = locations = error = None
    files = {}
    try:
        state = read_json(state_dir / "state.json")
        locations = weight_map(state_dir, stem="optimizer")
    except ValueError as raised:  # 有的机器读不到：各进程一起停下
        error = raised
    raise_together(error)

    def read_slice(name: str, start: int, stop: int) -> torch.Tensor:
        path = locations[name]
        if path not in files:
            files[path] = safe_open(path, framework="pt")
        return read_flat_slice(files[path].get_slice(name), start, stop)

    same_schedule = state["progress"]["num_steps"] == num_steps
    if not same_schedule:
        log_rank_0(f"resume: 总步数由 {state['progress']['num_steps']} 改为 {num_steps}，学习率按新的总步数重新安排")
    load_optimizer_state(engine, read_slice, state["optimizer"], restore_lr=same_schedule)
    if state["world_size"] == world_size():
        prefix = f"{global_rank()}."
        saved = load_file(state_dir / "random.safetensors")
        set_random_state({name[len(prefix) :]: tensor for name, tensor in saved.items() if name.startswith(prefix)})
    return state["progress"]
