"""续训的决定：从哪个检查点接着，核对这确实是同一次训练。"""

import errno
import os
from pathlib import Path
from typing import NamedTuple

from finetune.checkpoint.manifest import verify_checkpoint
from finetune.checkpoint.output_dir import (
    CHECKPOINT_NAME,
    RUN_CONFIG,
    hold_output_dir,
    iter_checkpoints,
    remove_leftovers,
    set_aside_previous_run,
)
from finetune.checkpoint.trainer_state import STATE_DIR
from finetune.options import flags_of
from finetune.process.arithmetic import adopt_arithmetic
from utils import broadcast_from_rank_0, log_rank_0, raise_together, read_json, world_size


class ResumePoint(NamedTuple):
    """续训的起点。"""

    directory: Path
    step: int


def open_run(args, run_config: dict) -> ResumePoint | None:
    """备好 output_dir，返回续训的起点（从头开始为 None）；集合操作，文件只由 0 号进程动。

    写到一半的 .tmp- 删去；从头开始时上一次的结果移进 previous-N/，续训时只移走起点之后的检查点。

    Raises:
        ValueError: output_dir 不能写、正被别的训练使用，或续训会成为另一次训练。
    """

    def prepare() -> str | None:
        output_dir = Path(args.output_dir)
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            if not os.access(output_dir, os.W_OK | os.X_OK):  # 只读的文件系统，root 也写不了
                raise PermissionError(errno.EACCES, "没有写权限，或文件系统是只读的")
            hold_output_dir(output_dir)
            remove_leftovers(output_dir)
            directory = find_resume_point(args.resume, output_dir)
            if directory is not None:
                check_same_run(directory, args, run_config)
            is_here = directory is not None and directory.parent.resolve() == output_dir.resolve()
            set_aside_previous_run(output_dir, after_step=step_of(directory) if is_here else None)
        except OSError as error:
            raise ValueError(
                f"--output_dir {output_dir} 不能写：{error.strerror}，请换一个目录或检查权限与磁盘"
            ) from error
        return None if directory is None else str(directory)

    found = broadcast_from_rank_0(prepare)
    if found is None:
        return None
    directory, error = Path(found), None
    try:
        check_same_run(directory, args, run_config)
    except ValueError as raised:  # 别的机器看不到这个目录：output_dir 须在共享的文件系统上
        error = raised
    raise_together(error)
    differences = adopt_arithmetic(read_json(directory / RUN_CONFIG), run_config)
    if differences:
        log_rank_0("resume: 接着训练，但与没有打断过的一次不再逐位相同：" + "；".join(differences))
    return ResumePoint(directory, step_of(directory))


def step_of(directory: Path) -> int:
    """检查点目录名里的步数。"""
    return int(CHECKPOINT_NAME.match(directory.name)[2])


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


def check_same_run(directory: Path, args, run_config: dict):
    """核对续训与检查点是同一次训练，必要时按进程数调整 args 与 run_config 的梯度累积（全局 batch 不变）。

    args 是 train.py 的全部参数；检查点里没有记的参数，当时就是缺省。

    Raises:
        ValueError: 会使训练成为另一次训练的不同，全部列出。
    """
    saved = read_json(directory / RUN_CONFIG)
    old, new = saved["args"], run_config["args"]
    if saved["precision"] == "bf16":
        old = {"grad_accum_dtype": "bf16"} | old  # 没有记的，当时按 bf16 相加
        if args.grad_accum_dtype == "auto":
            args.grad_accum_dtype = new["grad_accum_dtype"] = old["grad_accum_dtype"]
    before = {field.name: old.get(field.name, field.default) for field in flags_of(type(args))}
    differences = [
        f"--{field.name}：检查点是 {before[field.name]!r}，现在是 {getattr(args, field.name)!r}"
        for field in flags_of(type(args))
        if field.metadata["changes_training"] and before[field.name] != getattr(args, field.name)
    ]
    if saved.get("template") != run_config.get("template"):
        differences.append(f"--prompt_format {args.prompt_format} 的模板变了")
    if (saved.get("added_tokens") or []) != (run_config.get("added_tokens") or []):
        differences.append(f"新词（--add_tokens {args.add_tokens}）变了")
    for name, what in (("train", "训练数据"), ("replay", "重放的文字")):
        if saved["data"].get(name) != run_config["data"].get(name):
            differences.append(f"{what} {getattr(args, f'{name}_path')} 的内容变了")
    if saved["base_model"]["hashes"] != run_config["base_model"]["hashes"]:
        differences.append(f"基座 {args.model_name_or_path} 的文件变了")
    if "adapter" in saved and saved["adapter"] != run_config["adapter"]:
        differences.append(f"起点的适配器 {args.adapter_path} 的文件变了")
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
