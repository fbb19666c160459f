"""用 DeepSpeed 微调 Baichuan 与 Baichuan2：freeze、lora、ptuning、full，手写的训练循环。

    CUDA_VISIBLE_DEVICES=0 deepspeed train.py --train_path data/spo_0.json --model_name_or_path baichuan2-7B/ \
        --train_type lora --output_dir output-lora

    没有 GPU 时在前面加 LOCAL_SIZE=1（或 2、4）指定 CPU 进程数。
"""

import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from arguments import parse_args, validate_args
from batching import StepBatch, StepLoader
from checkpoint import file_sha256, remove_leftovers, save_checkpoint, set_aside_previous_run
from data_set import BaichuanDataSet
from evaluation import batch_to_device, evaluate_nll
from model_factory import build_model, load_tokenizer
from prompting import resolve_prompt_format
from train_log import TrainLog
from utils import (
    TORCH_DTYPES,
    choose_precision,
    global_rank,
    log_rank_0,
    raise_together,
    resolve_ds_config,
    seed_everything,
    world_size,
    write_json,
)


def main():
    args = parse_args()
    ds_config, config = validate_args(args)
    deepspeed.init_distributed()
    tokenizer = load_tokenizer(args.model_name_or_path, args.mode, config.vocab_size)
    prompting = resolve_prompt_format(args.prompt_format, args.model_name_or_path, config)
    train_set, eval_set = load_data(args, tokenizer, prompting)
    output_dir = prepare_output_dir(args)
    run_config = describe_run(args, prompting)

    loader = StepLoader(
        train_set,
        batch_size=args.per_device_train_batch_size,
        max_len=args.max_len,
        seed=args.seed,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        world_size=world_size(),
        rank=global_rank(),
        pad_token_id=tokenizer.pad_token_id,
        packing=args.packing,
    )
    num_steps = loader.steps_per_epoch * args.num_train_epochs
    if args.max_steps != -1:
        num_steps = min(num_steps, args.max_steps)
    engine, ds_config = build_engine(args, config, ds_config, num_steps)
    if global_rank() == 0:
        write_json(output_dir / "ds_config.json", ds_config)
        write_json(output_dir / "run_config.json", run_config)

    log = TrainLog(output_dir, Path(args.logging_dir or output_dir / "runs"), num_steps, args.show_loss_step)
    train(args, engine, loader, eval_set, tokenizer, run_config, output_dir, log, num_steps)
    log.close()
    log_rank_0(f"训练结束：{engine.global_steps} 步，结果在 {output_dir}")


def train(
    args: Namespace,
    engine,
    loader: StepLoader,
    eval_set,
    tokenizer,
    run_config: dict,
    output_dir: Path,
    log: TrainLog,
    num_steps: int,
):
    """训练循环：每轮一个新的次序，每个优化器步一次 train_step，每轮结束评估并保存。"""
    for epoch in range(args.num_train_epochs):
        for step in loader.epoch(epoch):
            loss, grad_norm = train_step(engine, step)
            progress = engine.global_steps / loader.steps_per_epoch
            log.step(engine.global_steps, progress, loss, step.num_target_tokens, step.num_tokens, *grad_norm)

            is_last_step = engine.global_steps == num_steps
            is_epoch_end = engine.global_steps % loader.steps_per_epoch == 0 or is_last_step
            is_save_step = args.save_model_step and engine.global_steps % args.save_model_step == 0
            if is_epoch_end or is_save_step:
                log.pause()
                if eval_set is not None and is_epoch_end:
                    evaluate(args, engine, eval_set, tokenizer, log, progress)
                save_checkpoint(engine, tokenizer, run_config, output_dir, epoch + 1)
                log.resume()
            if is_last_step:
                return


# ---------------------------------------------------------------------------------------------------------------------
# 一个优化器步


def train_step(engine, step: StepBatch) -> tuple[float, tuple[float, float]]:
    """一个优化器步：逐个 micro batch 前向、反向、累积，最后更新一次 → (损失, (学习率, 梯度范数))。

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
    return mean_loss, (learning_rate, check_grad_norm(engine, step))


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
        error = not_finite("损失", losses[bad_ranks[0]], engine, step) if global_rank() == bad_ranks[0] else None
        raise_together(error)
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
        f"第 {engine.global_steps + 1} 步的{what}是 {value}，在更新权重之前停下；rank {global_rank()}，精度 {precision}，"
        f"本进程的数据行：{rows}。请检查这些行，调小 --learning_rate，或换 --precision bf16 / fp32"
    )


# ---------------------------------------------------------------------------------------------------------------------
# 准备与收尾


def load_data(args: Namespace, tokenizer, prompting) -> tuple[BaichuanDataSet, BaichuanDataSet | None]:
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


def prepare_output_dir(args: Namespace) -> Path:
    """建好 output_dir：清掉写了一半的，移走上一次的结果。"""
    output_dir, error = Path(args.output_dir), None
    if global_rank() == 0:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            remove_leftovers(output_dir)
            set_aside_previous_run(output_dir)
        except OSError as os_error:
            error = ValueError(f"--output_dir {output_dir} 不能写：{os_error.strerror}，请换一个目录或检查权限与磁盘")
    raise_together(error)
    return output_dir


def describe_run(args: Namespace, prompting) -> dict:
    """run_config.json 的内容：预测、合并与续训由此知道一切，不必再输入一遍。哈希在后台计算时训练照常准备。"""
    base = Path(args.model_name_or_path)
    hashed = [
        p for p in sorted(base.iterdir()) if p.suffix in (".json", ".model", ".bin", ".safetensors") and p.is_file()
    ]
    with ThreadPoolExecutor() as pool:
        hashes = (
            dict(zip([p.name for p in hashed], pool.map(file_sha256, hashed), strict=True))
            if global_rank() == 0
            else {}
        )
    return {
        "args": {name: value for name, value in vars(args).items() if name not in ("given", "local_rank")},
        "train_type": args.train_type,
        **prompting._asdict(),
        "base_model": {"path": args.model_name_or_path, "absolute_path": str(base.resolve()), "hashes": hashes},
        "data": {p: file_sha256(Path(p)) for p in (args.train_path, args.eval_path) if p is not None},
        "world_size": world_size(),
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def build_engine(args: Namespace, config, ds_config: dict, num_steps: int):
    """模型 → DeepSpeed 引擎；返回 (引擎, 填好的配置)。"""
    precision, reason = choose_precision(args.precision)
    log_rank_0(f"精度：{precision}（{reason}）；共 {num_steps} 步")
    ds_config = resolve_ds_config(
        ds_config,
        precision,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        world_size(),
        args.learning_rate,
        args.weight_decay,
        num_steps,
        args.warmup_ratio,
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


def parameter_groups(model, args: Namespace) -> list[dict]:
    """权重衰减只作用于矩阵（RMSNorm 的向量不衰减）；只含可训练的参数。"""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def evaluate(args: Namespace, engine, eval_set, tokenizer, log: TrainLog, epoch: float):
    """在 --eval_path 上算目标 token 的平均损失，写进日志。"""
    nll = evaluate_nll(
        engine, eval_set, args.per_device_train_batch_size, args.max_len, tokenizer.pad_token_id, args.packing
    )
    log.write({"step": engine.global_steps, "epoch": round(epoch, 4), "eval/nll": nll}, engine.global_steps)
    log_rank_0(f"评估 {args.eval_path}：步 {engine.global_steps}，目标 token 的平均损失 {nll:.4f}")


def run() -> int:
    """main() 的外壳：用户的错误只打印说明，不打印回溯；返回退出码。"""
    try:
        main()
    except ValueError as error:
        log_rank_0(f"错误：\n{error}")
        return 2
    except RuntimeError as error:
        log_rank_0(f"错误：{error}")
        if dist.is_initialized() and "rank" in str(error):
            return 1
        raise
    return 0


if __name__ == "__main__":
    sys.exit(run())
