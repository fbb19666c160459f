"""用 DeepSpeed 微调 Baichuan 与 Baichuan2：freeze、lora、ptuning、full，手写的训练循环。

    CUDA_VISIBLE_DEVICES=0 deepspeed train.py --train_path data/spo_0.json --model_name_or_path baichuan2-7B/ \
        --train_type lora --output_dir output-lora

    没有 GPU 时在前面加 LOCAL_SIZE=1（或 2、4）指定 CPU 进程数。被打断后加 --resume auto 接着训练。
"""

import os
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from arguments import parse_args, validate_args
from batching import StepBatch, StepLoader
from checkpoint import file_sha256, save_checkpoint
from data_set import BaichuanDataSet
from evaluation import batch_to_device, evaluate_nll
from frozen_cache import FrozenCache
from interruption import EXIT_INTERRUPTED, WAIT_LIMIT, Interruption, limit_waiting, lost_connection
from leftovers import remove_dead_shared_memory, settle_locks, watch_locks
from model_factory import base_model_of, build_model, load_tokenizer, num_frozen_layers
from prompting import Prompting, resolve_prompt_format
from resume import load_trainer_state, save_trainer_state
from run_record import describe_run, open_run
from train_log import TrainLog
from utils import (
    TORCH_DTYPES,
    broadcast_from_rank_0,
    choose_precision,
    global_rank,
    log_rank_0,
    quiet_libraries,
    raise_together,
    resolve_ds_config,
    seed_everything,
    skip_ops_without_compiler,
    world_size,
    write_json,
)

OUT_OF_MEMORY = (
    "显存不够。依次试：加 --gradient_checkpointing；--per_device_train_batch_size 1 并用 --gradient_accumulation_steps "
    "补足；调小 --max_len；--ds_file ds_zero3_offload.json；换 lora 或 freeze"
)


@dataclass
class Run:
    """一次训练的全部零件。"""

    args: Namespace
    engine: deepspeed.DeepSpeedEngine
    loader: StepLoader
    eval_set: BaichuanDataSet | None
    tokenizer: object
    run_config: dict
    output_dir: Path
    num_steps: int
    log: TrainLog
    interruption: Interruption


def main() -> int:
    """从命令行到训练结束；返回退出码。"""
    quiet_libraries()
    args = parse_args()
    ds_config, config = validate_args(args)
    clean_leftovers()
    skip_ops_without_compiler()
    deepspeed.init_distributed(timeout=WAIT_LIMIT)
    interruption = Interruption()
    tokenizer = load_tokenizer(args.model_name_or_path, args.mode, config.vocab_size)
    prompting = resolve_prompt_format(args.prompt_format, args.model_name_or_path, config)
    train_set, eval_set = load_data(args, tokenizer, prompting)
    precision, reason = choose_precision(args.precision)
    log_rank_0(f"精度：{precision}（{reason}）")

    run_config = broadcast_from_rank_0(lambda: describe_run(args, prompting, ds_config, precision))
    resume_from = open_run(args, run_config)
    loader = StepLoader(
        train_set,
        batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_len=args.max_len,
        seed=args.seed,
        world_size=world_size(),
        rank=global_rank(),
        pad_token_id=tokenizer.pad_token_id,
        packing=args.packing,
    )
    num_steps = loader.steps_per_epoch * args.num_train_epochs
    num_steps = num_steps if args.max_steps == -1 else min(num_steps, args.max_steps)
    if resume_from is not None and resume_from.step >= num_steps:
        log_rank_0(f"resume: {resume_from.directory} 已是第 {resume_from.step} 步，共 {num_steps} 步：训练早已完成")
        return 0

    output_dir = Path(args.output_dir)
    engine, ds_config = build_engine(args, config, ds_config, precision, num_steps)
    limit_waiting()
    progress = {} if resume_from is None else load_trainer_state(engine, resume_from.directory, num_steps)
    where = "0, fresh start" if resume_from is None else f"{resume_from.step} from {resume_from.directory}"
    log_rank_0(f"resume: step {where}")
    if global_rank() == 0:
        write_json(output_dir / "ds_config.json", ds_config)
        write_json(output_dir / "run_config.json", run_config)
    frozen_cache = open_frozen_cache(args, engine, train_set)
    log = TrainLog(
        output_dir, Path(args.logging_dir or output_dir / "runs"), num_steps, args.show_loss_step, progress.get("log")
    )
    run = Run(args, engine, loader, eval_set, tokenizer, run_config, output_dir, num_steps, log, interruption)
    is_finished = train(run)
    log.close()
    if frozen_cache is not None:
        frozen_cache.remove()
    state = (
        "训练结束" if is_finished else f"收到 {interruption.reason or '停止信号'}，已保存；用 --resume auto 接着训练"
    )
    log_rank_0(f"{state}：{engine.global_steps} 步，结果在 {output_dir}")
    return 0 if is_finished else EXIT_INTERRUPTED


def train(run: Run) -> bool:
    """训练循环：每轮一个新的次序，每步一次 train_step，之后该评估的评估、该保存的保存；返回是否走完。"""
    engine, loader = run.engine, run.loader
    first_epoch, first_step = divmod(engine.global_steps, loader.steps_per_epoch)
    for epoch in range(first_epoch, run.args.num_train_epochs):
        for step in loader.epoch(epoch, start_step=first_step if epoch == first_epoch else 0):
            loss, learning_rate, grad_norm = train_step(engine, step)
            run.log.step(
                engine.global_steps,
                engine.global_steps / loader.steps_per_epoch,
                loss=loss,
                num_targets=step.num_target_tokens,
                num_tokens=step.num_tokens,
                lr=learning_rate,
                grad_norm=grad_norm,
            )
            is_interrupted = run.interruption.agreed(engine.device)
            after_step(run, epoch, is_interrupted)
            if is_interrupted or engine.global_steps == run.num_steps:
                return engine.global_steps == run.num_steps
    return True


def after_step(run: Run, epoch: int, is_interrupted: bool):
    """一步之后：轮末评估；轮末、每 --save_model_step 步、被打断时保存。"""
    step = run.engine.global_steps
    is_epoch_end = step % run.loader.steps_per_epoch == 0 or step == run.num_steps
    is_save_step = run.args.save_model_step > 0 and step % run.args.save_model_step == 0
    if not (is_epoch_end or is_save_step or is_interrupted):
        return
    run.log.pause()
    if run.eval_set is not None and is_epoch_end:
        evaluate(run)

    def save_state(directory: Path) -> Exception | None:
        progress = {"num_steps": run.num_steps, "log": run.log.state()}
        return save_trainer_state(run.engine, directory, progress) if run.args.save_trainer_state else None

    save_checkpoint(run.engine, run.tokenizer, run.run_config, run.output_dir, epoch + 1, save_state)
    run.log.resume()


# ---------------------------------------------------------------------------------------------------------------------
# 一个优化器步


def train_step(engine, step: StepBatch) -> tuple[float, float, float]:
    """一个优化器步：逐个 micro batch 前向、反向、累积，最后更新一次 → (损失, 学习率, 裁剪前的梯度范数)。

    这一步所有进程、所有 micro batch 的每个目标 token 权重相同：损失之和除以全局目标数 N。DeepSpeed 对进程取平均，
    所以各进程先乘 world_size。裁剪、精度与优化器由 DeepSpeed 按它的 JSON 完成。
    """
    learning_rate = engine.get_lr()[0]
    step_loss = torch.zeros((), device=engine.device)
    for index, batch in enumerate(step.micro_batches):
        is_last = index == len(step.micro_batches) - 1
        engine.set_gradient_accumulation_boundary(is_last)
        batch = batch_to_device(batch, engine.device)
        loss = engine(**batch, num_items_in_batch=step.num_target_tokens / world_size(), use_cache=False).loss
        engine.backward(loss, scale_wrt_gas=False)
        step_loss += loss.detach()
        if is_last:
            mean_loss = check_finite_loss(step_loss, engine, step)  # 更新之前：坏的一步不能进入权重
        engine.step()
    return mean_loss, learning_rate, check_grad_norm(engine, step)


# ---------------------------------------------------------------------------------------------------------------------
# 数值


def check_finite_loss(step_loss: Tensor, engine, step: StepBatch) -> float:
    """各进程平均后的损失；不是有限数就在更新之前停下，所有进程一起。

    Raises:
        RuntimeError: 损失为 NaN 或无穷；信息里有步数、进程、数据行、精度与办法。
    """
    losses = [torch.zeros_like(step_loss) for _ in range(world_size())]
    dist.all_gather(losses, step_loss)
    losses = torch.stack(losses).tolist()
    bad_ranks = [rank for rank, loss in enumerate(losses) if not abs(loss) < float("inf")]
    if bad_ranks:
        is_here = global_rank() == bad_ranks[0]
        raise_together(not_finite("损失", losses[bad_ranks[0]], engine, step) if is_here else None)
    return sum(losses) / len(losses)


def check_grad_norm(engine, step: StepBatch) -> float:
    """这一步裁剪前的梯度范数。DeepSpeed 在范数不是有限数时不更新；fp16 是正常的缩放调整，其他精度到此为止。"""
    norm = engine.get_global_grad_norm()
    norm = float("nan") if norm is None else float(norm)
    if getattr(engine.optimizer, "overflow", False) and not engine.fp16_enabled():
        raise_together(not_finite("梯度范数", norm, engine, step))
    return norm


def not_finite(what: str, value: float, engine, step: StepBatch) -> RuntimeError:
    """一条说得清的错误：哪一步、哪个进程、哪些行、什么精度、怎么办。"""
    rows = "、".join(f"{path}:{line}" for path, line in step.rows[:8]) + ("……" if len(step.rows) > 8 else "")
    precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    return RuntimeError(
        f"第 {engine.global_steps + (what == '损失')} 步的{what}是 {value}，没有更新权重；"
        f"rank {global_rank()}，精度 {precision}，本进程的数据行：{rows}。"
        "请检查这些行与基座权重，调小 --learning_rate，或换 --precision bf16 / fp32"
    )


# ---------------------------------------------------------------------------------------------------------------------
# 准备与收尾


def clean_leftovers():
    """清理本机被杀的进程留下的编译锁与共享内存，否则后来的运行会一直等，或耗尽内存。"""
    settle_locks()
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    dead = remove_dead_shared_memory()
    if dead:
        log_rank_0(f"删除了已死的运行留在 /dev/shm 的 {len(dead)} 个文件")
    watch_locks()  # 本次运行等着的编译也可能中途死去


def load_data(args: Namespace, tokenizer, prompting: Prompting) -> tuple[BaichuanDataSet, BaichuanDataSet | None]:
    """读训练与评估数据，打印数据报告。

    Raises:
        ValueError: 数据有错；列出 文件:行: 字段: 问题。
    """

    def load(path: str | None) -> BaichuanDataSet | None:
        if path is None:
            return None
        data_set = BaichuanDataSet(
            path,
            tokenizer,
            max_len=args.max_len,
            max_src_len=args.max_src_len,
            is_skip=args.is_skip,
            drop_duplicates=args.drop_duplicates,
            cache_dir=args.cache_dir,
            show_progress=global_rank() == 0,
            **prompting._asdict(),
        )
        log_rank_0(data_set.report())
        return data_set

    return load(args.train_path), load(args.eval_path)


def build_engine(args: Namespace, config, ds_config: dict, precision: str, num_steps: int):
    """模型 → DeepSpeed 引擎；返回 (引擎, 填好的配置)。"""
    ds_config = resolve_ds_config(
        ds_config,
        precision,
        batch_size=args.per_device_train_batch_size,
        accumulation_steps=args.gradient_accumulation_steps,
        num_ranks=world_size(),
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        num_steps=num_steps,
        warmup_ratio=args.warmup_ratio,
    )
    seed_everything(args.seed)  # 各进程相同：新参数的初值要一致
    device = torch.device(deepspeed.get_accelerator().current_device_name())
    is_zero3 = ds_config.get("zero_optimization", {}).get("stage") == 3
    model = build_model(args, config, TORCH_DTYPES[precision], device, ds_config if is_zero3 else None)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameter_groups(model, args), config=ds_config)
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.step()  # DeepSpeed 的调度从「第 -1 步」开始，走一下才是第一步的学习率
    seed_everything(args.seed + global_rank())  # 各进程的 dropout 不同
    engine.train()
    return engine, ds_config


def open_frozen_cache(args: Namespace, engine, train_set: BaichuanDataSet) -> FrozenCache | None:
    """--cache_frozen：给模型接上冻结底层的缓存；没有要求时为 None。集合操作。"""
    if args.cache_frozen == "none":
        return None
    model = base_model_of(engine.module)
    directory = Path("/dev/shm") if args.cache_frozen == "memory" else Path(args.output_dir)
    name = f".tmp-frozen-{file_sha256(Path(args.train_path))[:8]}-{os.environ.get('MASTER_PORT', '0')}"
    cache = FrozenCache(
        directory / name,
        num_layers=num_frozen_layers(engine.module),
        num_tokens=sum(train_set.lengths),
        hidden_size=model.config.hidden_size,
        dtype=model.dtype,
        needs_agreement=engine.zero_optimization_stage() == 3,
    )
    log_rank_0(f"冻结的底层 {cache.num_layers} 层：输出缓存在 {directory}，共 {cache.num_bytes / 2**30:.2f} GiB")
    model.model.frozen_cache = cache
    return cache


def parameter_groups(model, args: Namespace) -> list[dict]:
    """权重衰减只作用于矩阵（RMSNorm 的向量不衰减）；只含可训练的参数。"""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def evaluate(run: Run):
    """在 --eval_path 上算目标 token 的平均损失，写进日志。"""
    args, step = run.args, run.engine.global_steps
    nll = evaluate_nll(
        run.engine,
        run.eval_set,
        args.per_device_train_batch_size,
        args.max_len,
        run.tokenizer.pad_token_id,
        args.packing,
    )
    run.log.write({"step": step, "epoch": round(step / run.loader.steps_per_epoch, 4), "eval/nll": nll}, step)
    log_rank_0(f"评估 {args.eval_path}：步 {step}，目标 token 的平均损失 {nll:.4f}")


def run_main() -> int:
    """main() 的外壳：说得清的错误只打印说明，不打印回溯；返回退出码。"""
    try:
        return main()
    except (ValueError, RuntimeError, OSError) as error:
        # ValueError 是用户的错；RuntimeError 若由 raise_together 抛出，各进程原因相同
        if isinstance(error, ValueError) or getattr(error, "is_agreed", False):
            log_rank_0(f"错误：\n{error}")
            return 2 if isinstance(error, ValueError) else 1
        reason = OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else lost_connection(error)
        if isinstance(error, OSError) and error.strerror:  # 写日志时磁盘满、变成只读、挂载点消失
            reason = (
                f"读写 {error.filename or '文件'} 失败：{error.strerror}。请检查磁盘空间与权限；已有的检查点没有受影响"
            )
        if reason is None:
            raise
        print(f"错误：rank {global_rank()} {reason}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(run_main())
