"""推算的正文：一行一项。"""

from finetune.cli.train_flags import TrainOptions
from finetune.data.mixture import data_name
from finetune.planning.activations import PlannedModel
from finetune.planning.estimate import CARD_SIZES, DataSample, Outcome, cards_that_fit, utilisation
from finetune.planning.machine import Machine
from finetune.planning.memory import GIB, checkpoint_bytes


def describe(
    args: TrainOptions,
    model: PlannedModel,
    sample: DataSample,
    machine: Machine,
    outcome: Outcome,
    on_other: Outcome | None = None,
) -> list[str]:
    """推算的正文，一行一项；on_other 是没有 GPU 时 plan_on_cards 的结果。"""
    plan, setup, batch = outcome.plan, outcome.setup, outcome.batch
    read = "全部读了" if sample.num_read == sample.num_rows else f"均匀抽取 {sample.num_read} 行"
    num_tokens, num_targets = sum(sample.lengths) * sample.scale, sum(sample.num_targets) * sample.scale
    where = "每张卡" if machine.device == "cuda" else "每个进程（没有 GPU，都在主机内存里）"
    offload = "，卸载到主机" if setup.offload_optimizer or setup.offload_param else ""
    size = checkpoint_bytes(model, setup.element_bytes, args.save_trainer_state, args.optimizer)
    lines = [
        "推算（--dry_run）：没有读权重，也不训练",
        f"数据：{data_name(args.train_path)} {sample.num_rows} 行（{read}），约 {num_tokens:,.0f} token，目标占 "
        f"{num_targets / num_tokens:.1%}；截断 src {sample.num_src_cut * sample.scale:.0f} 条、"
        f"tgt {sample.num_tgt_cut * sample.scale:.0f} 条，超长丢弃 {sample.num_skipped * sample.scale:.0f} 条",
        f"步数：每轮 {outcome.steps_per_epoch}，共 {outcome.num_steps}；最大的 micro batch {sum(batch.lengths)} token"
        f"（上限 {args.per_device_train_batch_size * sample.max_len}），其中目标 {batch.num_targets}",
        *uncounted(args),
        f"模型：{model.num_total:,} 个参数，可训练 {model.num_trained:,}；{args.train_type}，{setup.precision}，"
        f"{args.optimizer}，梯度按 {setup.grad_accum_dtype} 相加，"
        f"ZeRO-{setup.stage}{offload}，{setup.cards} 个进程，--gradient_checkpointing {args.gradient_checkpointing}",
        f"{where}的峰值：{gib(plan.device_bytes)}",
        *(f"    {name} {gib(number)}" for name, number in plan.device.items()),
        f"每台主机的峰值：{gib(plan.host_bytes)}",
        *(f"    {name} {gib(number)}" for name, number in plan.host.items()),
        f"检查点：每个 {gib(size)}" + ("（含训练状态）" if args.save_trainer_state else "（只有模型）"),
        f"计算：每步 {outcome.step_flops / 1e12:.3g} TFLOP；按 {machine.name} {machine.rate / 1e12:.3g} TFLOP/s"
        f"（{machine.rate_source}）、利用率 {utilisation(setup):.0%}（假定），全部{duration(outcome.hours)}"
        + (f"（含参考模型的 {outcome.extra_passes:.3g} 遍前向）" if outcome.extra_passes else ""),
    ]
    if machine.device_bytes is not None:
        lines.append(f"本机：{machine.name}，显存 {gib(machine.device_bytes)}，主机内存 {gib(machine.host_bytes)}")
    else:
        lines.append(f"本机：没有 GPU，主机内存 {gib(machine.host_bytes)}")
    if on_other is not None:
        sizes = "、".join(f"{card} GB" for card in cards_that_fit(on_other.plan))
        lines.append(
            f"若每个进程一张卡（{on_other.setup.precision}）：每张卡的峰值 {gib(on_other.plan.device_bytes)}，"
            + (f"放得进 {sizes}" if sizes else f"一张卡都放不进（到 {CARD_SIZES[-1]} GB）")
        )
    return lines


def uncounted(args: TrainOptions) -> list[str]:
    """推算没有计入的数据：要读完全部才知道的。"""
    notes = []
    if args.replay_path is not None:
        notes.append(f"重放的文字（--replay_ratio {args.replay_ratio:g}，步数与时间会多）")
    if args.drop_duplicates:
        notes.append("--drop_duplicates 丢弃的行（会少）")
    return [f"没有计入：{'、'.join(notes)}"] if notes else []


def gib(number: float) -> str:
    """字节数写成 GiB；不到 0.1 GiB 的写成 MiB。"""
    if number < 0.1 * GIB:
        return f"{number / 2**20:.3g} MiB"
    return f"{number / GIB:.2f} GiB" if number < 100 * GIB else f"{number / GIB:.0f} GiB"


def duration(hours: float) -> str:
    """小时写成人读的时间。"""
    if hours * 3600 < 1:
        return "不到 1 秒"
    return "约 " + (
        f"{hours:.1f} 小时" if hours >= 1 else f"{hours * 60:.1f} 分钟" if hours * 60 >= 1 else f"{hours * 3600:.0f} 秒"
    )
