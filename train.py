"""用 DeepSpeed 微调 Baichuan 与 Baichuan2：freeze、lora、ptuning、full，手写的训练循环。

    CUDA_VISIBLE_DEVICES=0 deepspeed train.py --train_path data/spo_0.json --model_name_or_path baichuan2-7B/ \
        --train_type lora --output_dir output-lora

    没有 GPU 时在前面加 LOCAL_SIZE=1（或 2、4）指定 CPU 进程数。被打断后加 --resume auto 接着训练。
"""

from finetune.cli.train_checks import first_look, validate_args
from finetune.cli.train_flags import TrainOptions, describe_flags, parse_args, recorded_run

if __name__ == "__main__":
    first_look()  # 命令行写错了马上说：下面的库要载入好几秒

import sys
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import deepspeed

from baichuan import BaichuanConfig
from data_set import BaichuanDataSet
from finetune.checkpoint.added_tokens import add_words
from finetune.checkpoint.base_model import load_tokenizer
from finetune.checkpoint.output_dir import checkpoint_name, rotate_checkpoints
from finetune.checkpoint.resume import open_run
from finetune.checkpoint.run_record import describe_run, hashing_base
from finetune.checkpoint.save import save_checkpoint
from finetune.checkpoint.trainer_state import load_trainer_state, save_trainer_state
from finetune.data.mixture import hold_out_rows, mix, parse_sources
from finetune.data.plain_text import replay_pieces, replay_share
from finetune.data.prompting import Prompting, prompting_reason, resolve_prompt_format
from finetune.data.samples import row_options
from finetune.data.step_loader import StepBatch, StepLoader, batch_to_device
from finetune.methods.frozen_cache import open_frozen_cache
from finetune.methods.registry import TRAIN_METHODS
from finetune.planning.activations import plan_model
from finetune.planning.dry_run import dry_run
from finetune.planning.memory import choose_grad_accum_dtype
from finetune.process.accelerator import has_accelerator, return_free_memory
from finetune.process.arithmetic import settle_arithmetic, settle_threads
from finetune.process.errors import explain
from finetune.process.interruption import EXIT_INTERRUPTED, WAIT_LIMIT, Interruption, leave, limit_waiting
from finetune.process.launching import join_or_stand_alone, process_count_note
from finetune.process.libraries import quiet_libraries
from finetune.process.matmul_on_cpu import settle_products
from finetune.process.precision import choose_precision
from finetune.process.stale_files import clean_leftovers, release_shared_memory
from finetune.tasks.registry import TASKS
from finetune.tasks.token_loss import TokenLoss
from finetune.training.anomaly import NumberWatch
from finetune.training.ds_config import resolve_ds_config, skip_ops_without_compiler
from finetune.training.engine import open_engine
from finetune.training.evaluation import Evaluation
from finetune.training.forgetting import Forgetting, open_forgetting
from finetune.training.log import TrainLog, open_log
from finetune.training.options import total_steps
from finetune.training.summary import write_summary
from model_factory import build_model
from utils import (
    broadcast_from_rank_0,
    global_rank,
    log_rank_0,
    raise_together,
    seed_everything,
    world_size,
    write_failed,
)


@dataclass
class Run:
    """一次训练的全部零件。"""

    args: TrainOptions
    engine: deepspeed.DeepSpeedEngine
    loader: StepLoader
    evaluation: Evaluation
    forgetting: Forgetting | None
    tokenizer: object
    run_config: dict
    output_dir: Path
    num_steps: int
    log: TrainLog
    objective: TokenLoss
    numbers: NumberWatch
    interruption: Interruption

    @property
    def is_finished(self) -> bool:
        """走完了全部的步，或不再进步而停下。"""
        return self.engine.global_steps >= self.num_steps or self.evaluation.has_stopped


def main() -> int:
    """从命令行到训练结束；返回退出码。"""
    args = parse_args()
    quiet_libraries(args.log_level)
    ds_config, config = validate_args(args)
    log_rank_0(describe_flags(args))
    if args.dry_run:
        return dry_run(args, ds_config, config)
    settle_arithmetic()
    clean_leftovers()
    skip_ops_without_compiler()
    join_or_stand_alone()
    deepspeed.init_distributed(timeout=WAIT_LIMIT)
    release_shared_memory()
    interruption = Interruption()
    settle_threads(args.num_threads)
    if note := process_count_note():
        log_rank_0(note)
    tokenizer = add_words(load_tokenizer(args.model_name_or_path, config.vocab_size), args.add_tokens)
    prompting = resolve_prompt_format(args.prompt_format, args.model_name_or_path, config)
    log_rank_0(f"提示格式：{prompting_reason(prompting, args.prompt_format)}")
    train_set, eval_set = load_data(args, tokenizer, prompting)
    precision, reason = broadcast_from_rank_0(lambda: settle_precision(args, config))
    log_rank_0(f"精度：{precision}（{reason}）{settle_products(precision)}")

    run_config = broadcast_from_rank_0(lambda: describe_run(args, prompting, ds_config, precision, reason))
    resume_from = open_run(args, run_config)
    objective = TASKS[args.task].open(args)
    loader = StepLoader(
        train_set,
        batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_len=train_set.max_len,
        seed=args.seed,
        world_size=world_size(),
        rank=global_rank(),
        pad_token_id=tokenizer.pad_token_id,
        packing=args.packing,
        with_offsets=args.cache_frozen != "none",
        with_samples=objective.with_samples,
        partners=objective.partners,
    )
    num_steps = total_steps(loader.steps_per_epoch, args)
    if resume_from is not None and resume_from.step >= num_steps:
        log_rank_0(f"resume: {resume_from.directory} 已是第 {resume_from.step} 步，共 {num_steps} 步：训练早已完成")
        return 0

    output_dir = Path(args.output_dir)
    with hashing_base(run_config):
        engine, ds_config = build_engine(args, config, ds_config, precision, num_steps)
    limit_waiting()
    forgetting = open_forgetting(args, args.max_len, engine, tokenizer)  # 在读训练状态之前：此刻还是基座
    objective.start(engine, [data for data in (train_set, eval_set) if data is not None], tokenizer.pad_token_id)
    progress = {} if resume_from is None else load_trainer_state(engine, resume_from.directory, num_steps)
    where = "0, fresh start" if resume_from is None else f"{resume_from.step} from {resume_from.directory}"
    log_rank_0(f"resume: step {where}")
    configs = {"ds_config.json": ds_config, "run_config.json": run_config}
    reports = args.report_to.split(",")
    log = open_log(output_dir, args.logging_dir, num_steps, args.show_loss_step, progress.get("log"), configs, reports)
    frozen_cache = open_frozen_cache(args.cache_frozen, output_dir, engine, train_set)
    numbers = NumberWatch(output_dir, tokenizer, args.loss_spike_factor, progress.get("numbers"))
    eval_sha256 = run_config["data"].get("eval")
    evaluation = Evaluation(
        args, args, eval_set, tokenizer, prompting, eval_sha256, progress.get("evaluation"), objective
    )
    run = Run(
        *(args, engine, loader, evaluation, forgetting, tokenizer, run_config, output_dir),
        *(num_steps, log, objective, numbers, interruption),
    )
    broadcast_from_rank_0(lambda: settle_checkpoints(run))
    train(run)
    raise_together(log.close())
    if frozen_cache is not None:
        frozen_cache.remove()
    reason = interruption.reason or "停止信号"
    state = "训练结束" if run.is_finished else f"收到 {reason}，已保存；用 --resume auto 接着训练"
    log_rank_0(f"{state}：{engine.global_steps} 步，结果在 {output_dir}")
    if run.is_finished:
        log_rank_0(broadcast_from_rank_0(lambda: summary_of(run)))
    return 0 if run.is_finished else EXIT_INTERRUPTED


def summary_of(run: Run) -> str:
    """写 summary.json，返回打印的几行；只在 0 号进程调用。"""
    try:
        return write_summary(run.output_dir, run.args, run.args.eval_path, run.evaluation.best, run.evaluation.seconds)
    except OSError as error:
        raise write_failed(error) from error


def train(run: Run):
    """训练循环：每轮一个新的次序，每步一次 train_step，之后该评估的评估、该保存的保存，直到走完或该停下。"""
    engine, loader = run.engine, run.loader
    if run.is_finished or (run.evaluation.is_owed and after_step(run, False)):  # 上次停在评估的途中：先补上
        return
    first_epoch, first_step = divmod(engine.global_steps, loader.steps_per_epoch)
    for epoch in range(first_epoch, run.args.num_train_epochs):
        for step in loader.epoch(epoch, start_step=first_step if epoch == first_epoch else 0):
            loss, learning_rate, grad_norm = train_step(engine, step, run.numbers, run.objective)
            run.log.step(
                engine.global_steps,
                engine.global_steps / loader.steps_per_epoch,
                loss=loss,
                num_targets=step.num_items,
                num_tokens=step.num_tokens,
                lr=learning_rate,
                grad_norm=grad_norm,
                num_overflows=run.numbers.overflows.total,
                figures=run.objective.figures(engine, step),
            )
            if after_step(run, run.interruption.agreed(engine.device, run.log.error)):
                return


def after_step(run: Run, is_interrupted: bool) -> bool:
    """一步之后：还回空着的内存；该评估的先评估，该保存的再保存；返回是否停下（走完、不再进步或被打断）。"""
    step, evaluation = run.engine.global_steps, run.evaluation
    return_free_memory(step)
    is_epoch_end = step % run.loader.steps_per_epoch == 0 or step == run.num_steps
    is_save_step = run.args.save_model_step > 0 and step % run.args.save_model_step == 0
    is_eval_step = evaluation.is_due(step, is_epoch_end)
    if not (is_epoch_end or is_save_step or is_eval_step or is_interrupted):
        return False
    run.log.pause()
    is_better = is_eval_step and evaluate(run)
    is_stopping = run.is_finished or is_interrupted or evaluation.is_owed
    if run.is_finished and run.forgetting is not None:
        run.forgetting.report(run.engine, run.output_dir)
    if is_epoch_end or is_save_step or is_better or is_stopping:
        save(run)
    run.log.resume()
    return is_stopping


def evaluate(run: Run) -> bool:
    """评估一次，返回分数是否超过以往；被打断时放弃（最后一步的除外），续训时补上。"""
    step = run.engine.global_steps
    name = checkpoint_name(epoch_of(run), step)
    epoch = round(step / run.loader.steps_per_epoch, 4)

    def should_stop() -> bool:
        return step != run.num_steps and run.interruption.agreed(run.engine.device, run.log.error)

    return run.evaluation.run(run.engine, run.log, name, epoch, should_stop)


def save(run: Run):
    """存一个检查点，再记下哪个最好、删去多余的旧的。"""

    def save_state(directory: Path) -> Exception | None:
        progress = {
            "num_steps": run.num_steps,
            "log": {**run.log.state(), "owes_evaluation": run.evaluation.is_owed},
            "numbers": run.numbers.state(),
            "evaluation": run.evaluation.state(),
        }
        return save_trainer_state(run.engine, directory, progress) if run.args.save_trainer_state else None

    save_checkpoint(run.engine, run.tokenizer, run.run_config, run.output_dir, epoch_of(run), save_state)
    broadcast_from_rank_0(lambda: settle_checkpoints(run))


def epoch_of(run: Run) -> int:
    """刚走完的一步属于第几轮，从 1 起。"""
    return (run.engine.global_steps - 1) // run.loader.steps_per_epoch + 1


def settle_checkpoints(run: Run):
    """写 best.json，删去 --save_total_limit 以外的旧检查点；只在 0 号进程调用。"""
    try:
        run.evaluation.write_best(run.output_dir)
    except OSError as error:
        raise write_failed(error) from error
    rotate_checkpoints(run.output_dir, run.args.save_total_limit, (run.evaluation.best or {}).get("checkpoint"))


def train_step(
    engine, step: StepBatch, numbers: NumberWatch | None = None, objective: TokenLoss | None = None
) -> tuple[float, float, float]:
    """一个优化器步：逐个 micro batch 前向、反向、累积，最后更新一次 → (损失, 学习率, 裁剪前的梯度范数)。

    损失由这一阶段的 objective 定（见 finetune/tasks/），这一步的各项（目标 token，或偏好的行）权重相同，
    与怎样切成进程、micro batch 无关。裁剪、精度与优化器由 DeepSpeed 按它的 JSON 完成。
    """
    numbers, objective = numbers or NumberWatch(), objective or TokenLoss()
    learning_rate, losses = engine.get_lr()[0], []
    objective.prepare(engine, step)
    for index, batch in enumerate(step.micro_batches):
        is_last = index == len(step.micro_batches) - 1
        engine.set_gradient_accumulation_boundary(is_last)
        loss = objective.loss(engine, batch_to_device(batch, engine.device), step)
        engine.backward(loss, scale_wrt_gas=False)
        losses.append(loss.detach())
        if is_last:
            mean_loss = numbers.check_loss(losses, engine, step)  # 更新之前：坏的一步不能进入权重
        engine.step()
    return mean_loss, learning_rate, numbers.check_grad_norm(engine, step, losses)


def build_engine(args: TrainOptions, config: BaichuanConfig, ds_config: dict, precision: str, num_steps: int):
    """读基座、套上方法、交给 DeepSpeed → (引擎, 填好的配置)。集合操作。"""
    grad_accum_dtype, reason = choose_grad_accum_dtype(args, ds_config, plan_model(args, config), precision)
    if precision == "bf16":
        log_rank_0(f"梯度按 {grad_accum_dtype} 相加（{reason}）")
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
        optimizer=args.optimizer,
        grad_accum_dtype=None if grad_accum_dtype == precision else grad_accum_dtype,
    )
    seed_everything(args.seed)  # 各进程相同：新参数的初值要一致
    model = build_model(args, config, precision, ds_config)
    ratio_of = partial(TRAIN_METHODS[args.train_type].learning_rate_ratio, options=args)
    engine = open_engine(model, args.weight_decay, ds_config, args.save_trainer_state, ratio_of)
    seed_everything(args.seed + global_rank())  # 各进程的 dropout 不同
    return engine, ds_config


def settle_precision(args: TrainOptions, config: BaichuanConfig) -> tuple[str, str]:
    """定下精度 → (精度, 理由)；CPU 上是量出来的，续训时同检查点。"""
    recorded = recorded_run(args).get("precision") if args.precision == "auto" and not has_accelerator() else None
    return (recorded, "同检查点") if recorded in ("bf16", "fp32") else choose_precision(args.precision, config)


def load_data(args: TrainOptions, tokenizer, prompting: Prompting) -> tuple[BaichuanDataSet, BaichuanDataSet | None]:
    """读训练与评估数据，打印数据报告；有 --replay_path 时训练数据的末尾接上重放的文字。

    Raises:
        ValueError: 数据有错；列出 文件:行: 字段: 问题。
    """

    options = row_options(vars(args))

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
            spool_dir=args.output_dir if args.task == "pretrain" else None,
            show_progress=global_rank() == 0,
            row_options=options,
            **prompting._asdict(),
        )
        log_rank_0(data_set.report())
        return data_set

    sources, held = parse_sources(args.train_path), None
    if args.val_ratio is not None:
        held = broadcast_from_rank_0(lambda: hold_out_rows(sources, args.val_ratio, args.seed, options))
    task = TASKS[args.task]
    train_set, eval_set = mix([load(source.path) for source in sources], sources, args.seed, held, task.width)
    unit = "条" if task.width == 1 else "对"
    if held is not None:
        num_held, num_kept = len(eval_set) // task.width, len(train_set) // task.width
        log_rank_0(f"评估集：按文档留出 {num_held} {unit}（--val_ratio {args.val_ratio}），训练 {num_kept} {unit}")
    elif len(sources) > 1 or sources[0].weight != 1:
        log_rank_0(f"{len(sources)} 个文件按份量合成 {len(train_set) // task.width} {unit}训练样本")
    eval_set = load(args.eval_path) or eval_set
    if args.replay_path is not None:
        source, num_targets = (args.replay_path, tokenizer, args.max_len, args.seed), sum(train_set.num_targets)
        if args.replay_by == "rows":
            pieces = replay_pieces(*source, round(args.replay_ratio * len(train_set)))
        else:
            pieces = replay_share(*source, num_targets, args.replay_ratio)
        replayed = sum(piece.num_targets for piece in pieces)
        log_rank_0(
            f"重放：{args.replay_path} 的 {len(pieces)} 条混入 {len(train_set)} 条训练样本，"
            f"占目标 token 的 {replayed / (replayed + num_targets):.1%}"
        )
        train_set.append(pieces, args.replay_path)
    return task.group(train_set), None if eval_set is None else task.group(eval_set)


def run_main() -> int:
    """main() 的外壳：说得清的错误只打印说明，不打印回溯；返回退出码。"""
    try:
        return main()
    except Exception as error:
        # ValueError 是用户的错；RuntimeError 若由 raise_together 抛出，各进程原因相同
        if isinstance(error, ValueError) or getattr(error, "is_agreed", False):
            log_rank_0(f"错误：\n{error}")
            return 2 if isinstance(error, ValueError) else 1
        reason = explain(error)
        if reason is None:
            raise
        print(f"错误：rank {global_rank()} {reason}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    try:
        code = run_main()
    except Exception:  # 没有料到的：回溯由这里打印，leave 不再回到解释器
        traceback.print_exc()
        code = 1
    leave(code)
