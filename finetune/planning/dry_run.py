"""--dry_run：不读权重，推算 token、步数、显存、主机内存与时间。"""

import os

from baichuan import BaichuanConfig
from finetune.checkpoint.added_tokens import add_words
from finetune.checkpoint.base_model import load_tokenizer
from finetune.cli.train_flags import TrainOptions
from finetune.data.prompting import resolve_prompt_format
from finetune.planning.activations import plan_model
from finetune.planning.estimate import evaluate, fits, plan_on_cards, sample_data
from finetune.planning.machine import find_machine
from finetune.planning.report import describe, duration, gib
from finetune.planning.suggestions import last_resorts, suggestions
from finetune.process.precision import choose_precision
from utils import global_rank, log_rank_0

EXIT_FITS, EXIT_TOO_LARGE = 0, 1


def dry_run(args: TrainOptions, ds_config: dict, config: BaichuanConfig) -> int:
    """打印推算；返回退出码：0 放得下，1 放不下。只有 0 号进程做事。

    Raises:
        ValueError: 分词器或数据有错，或 DeepSpeed 的配置不是 ZeRO-2、ZeRO-3。
    """
    if global_rank() != 0:
        return EXIT_FITS
    tokenizer = add_words(load_tokenizer(args.model_name_or_path, config.vocab_size), args.add_tokens)
    prompting = resolve_prompt_format(args.prompt_format, args.model_name_or_path, config)
    sample = sample_data(args, tokenizer, prompting)
    model = plan_model(args, config)
    machine = find_machine(model, choose_precision(args.precision)[0])
    cards = int(os.environ.get("WORLD_SIZE") or 1)
    outcome = evaluate(args, ds_config, model, sample, machine, cards)
    is_fitting = fits(outcome, machine)
    on_cards = machine.device == "cuda"
    on_other = None if on_cards else plan_on_cards(args, ds_config, model, sample, machine, cards)
    log_rank_0("\n".join(describe(args, model, sample, machine, outcome, on_other)))
    found = suggestions(args, ds_config, model, sample, machine, cards)
    # 没有 GPU 时只说本机，换成卡的话见「若每个进程一张卡」一行
    place, order = ("", "卡少的、改得少的、快的") if on_cards else ("本机（没有 GPU）", "改得少的、快的")
    if is_fitting:
        faster = [
            (label, better)  # 量化会改变结果，放得下就不提
            for label, better in found
            if better.setup.cards == cards and better.hours < 0.97 * outcome.hours and "--load_in" not in label
        ]
        log_rank_0(f"结论：{place}放得下" + ("；还可以更快：" if faster else ""))
        found = faster[:3]
    elif found:
        log_rank_0(f"结论：{place}放不下。下面的改法放得下（{order}在前）：")
    else:
        log_rank_0(f"结论：{place}放不下，能推算的改法都不够。还可以试：{last_resorts(args, machine, outcome)}")
    where = "每张卡" if on_cards else "每个进程"
    for number, (label, better) in enumerate(found[:6], start=1):
        log_rank_0(
            f"  {number}. {label}：{where} {gib(better.plan.device_bytes)}，主机 {gib(better.plan.host_bytes)}，"
            f"{duration(better.hours)}"
        )
    return EXIT_FITS if is_fitting else EXIT_TOO_LARGE
