"""推算显存的报告：总表、各项、与 CPU 实测对照，写成 Markdown；由 plan_memory.py 使用。"""

from baichuan import BaichuanConfig
from finetune.cli.train_flags import TrainOptions, parse_args
from finetune.planning.activations import MicroBatch, PlannedModel, plan_model
from finetune.planning.memory import GIB, Plan, Setup, choose_grad_accum_dtype, plan_memory
from finetune.terminal import markdown_table

# (隐藏宽度, 前馈宽度, 层数, 头数, 位置)
SIZES = {"7B": (4096, 11008, 32, 32, "rope"), "13B": (5120, 13696, 40, 40, "alibi")}
METHODS = ("freeze", "lora", "ptuning", "full")
# 总表里另加的几行，ZeRO-2
OTHER_ROWS = [("lora", "--load_in_8bit"), ("lora", "--load_in_4bit")]
OTHER_ROWS += [("full", "--optimizer adamw_8bit"), ("full", "--optimizer adamw_bf16")]
CARDS = (1, 2, 4, 8)
# 总表的 micro batch：四条 1024 token 的样本并排，五分之一是目标
BATCH = MicroBatch([1024] * 4, 820)
BUCKET, LIVE = 200_000_000, 1_000_000_000  # 两份配置文件里的值
SETUPS = {
    "ZeRO-2": {"stage": 2, "offload_optimizer": False, "offload_param": False, "bucket_elements": 2 * BUCKET},
    "ZeRO-3": {"stage": 3, "offload_optimizer": False, "offload_param": False, "bucket_elements": BUCKET},
    "ZeRO-3 卸载": {"stage": 3, "offload_optimizer": True, "offload_param": True, "bucket_elements": BUCKET},
}


def config_of(size: str, vocab_size: int) -> BaichuanConfig:
    """官方尺寸的结构。"""
    hidden, intermediate, layers, heads, position = SIZES[size]
    return BaichuanConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        position_embedding=position,
        norm_head=vocab_size == 125696,
    )


def method_args(method: str, layers: int, *flags: str) -> TrainOptions:
    """一种方法的参数，缺省值；freeze 训练最后四层。"""
    freeze = ",".join(f"layers.{index}." for index in range(layers - 4, layers))
    return parse_args(
        [
            *("--train_path", "d", "--model_name_or_path", "m", "--output_dir", "o", "--train_type", method),
            *(("--freeze_module_name", freeze) if method == "freeze" else ()),
            *flags,
        ]
    )


def planned(args: TrainOptions, model: PlannedModel, name: str, cards: int, checkpointing: str) -> Plan:
    """总表里的一种切分，bf16；梯度按什么相加同训练。"""
    offload = {"device": "cpu" if SETUPS[name]["offload_param"] else "none"}
    zero = {"stage": SETUPS[name]["stage"], "offload_optimizer": offload, "offload_param": offload}
    grad_accum_dtype, _ = choose_grad_accum_dtype(args, {"zero_optimization": zero}, model, "bf16")
    setup = Setup(
        precision="bf16", cards=cards, cards_per_node=cards, live_elements=LIVE, optimizer=args.optimizer,
        grad_accum_dtype=grad_accum_dtype, **SETUPS[name],
    )  # fmt: skip
    return plan_memory(model, BATCH, setup, checkpointing)


def main_table() -> str:
    """7B、13B × 方法 × 切分 × 卡数：每张卡的峰值，卸载时再加每台主机的。"""
    rows = []
    for size, (_, _, layers, _, _) in SIZES.items():
        config = config_of(size, 125696)
        for method in METHODS:
            args = method_args(method, layers)
            model = plan_model(args, config)
            for name in SETUPS:
                plans = [planned(args, model, name, cards, "all") for cards in CARDS]
                cells = [cell(plan, with_host="卸载" in name) for plan in plans]
                rows.append([size, method, name, *cells])
        for method, flag in OTHER_ROWS:
            args = method_args(method, layers, *flag.split())
            plans = [planned(args, plan_model(args, config), "ZeRO-2", cards, "all") for cards in CARDS]
            rows.append([size, f"{method} `{flag}`", "ZeRO-2", *map(cell, plans)])
    return markdown_table(["模型", "方法", "切分", *(f"{cards} 张卡" for cards in CARDS)], rows)


def cell(plan: Plan, with_host: bool = False) -> str:
    """一格：每张卡 GiB（与主机 GiB）。"""
    return f"{plan.device_bytes / GIB:.1f}" + (f"（主机 {plan.host_bytes / GIB:.0f}）" if with_host else "")


def parts_table() -> str:
    """一张卡、ZeRO-2 时各项的量，重算与不重算。"""
    names = ["权重", "梯度", "优化器", "激活", "词表投影与 logits", "通信桶", "更新时的 fp32 梯度", "前缀"]
    names += ["碎片", "CUDA 与通信"]
    rows = []
    for size, (_, _, layers, _, _) in SIZES.items():
        for method in METHODS:
            args = method_args(method, layers)
            model = plan_model(args, config_of(size, 125696))
            for checkpointing in ("none", "attention", "2", "all"):
                plan = planned(args, model, "ZeRO-2", 1, checkpointing)
                cells = [f"{plan.device.get(name, 0) / GIB:.2f}" for name in names]
                rows.append([size, method, checkpointing, *cells, cell(plan)])
    return markdown_table(["模型", "方法", "重算", *names, "合计"], rows)


def measured_table(measured: dict | None) -> list[str]:
    """CPU 上真的训练的内存峰值，减去最小模型的同一种训练，与推算之差对照。"""
    if measured is None:
        return ["还没有实测：`python benchmarks/memory/plan_memory.py --measure --work_dir 目录`。"]
    baselines = {run["stage"]: run for run in measured["runs"] if run["method"] == "baseline"}
    rows = []
    for run in measured["runs"]:
        base = baselines[run["stage"]]
        if run is base:
            continue
        cells = []
        for peak, planned in (("peak", "planned_in_use"), ("peak_default", "planned")):
            found, expected = run[peak] - base[peak], run[planned] - base[planned]
            cells += [f"{found / 2**20:.0f}", f"{expected / 2**20:.0f}", f"{expected / found:.2f}"]
        rows.append([run["stage"], run["method"], *cells])
    columns = ["实测", "推算", "推算 / 实测"]
    header = ["切分", "方法", *(f"在用的：{name}" for name in columns), *(f"glibc 缺省：{name}" for name in columns)]
    peaks = "、".join(f"{stage} {run['peak'] / 2**20:.0f} MiB" for stage, run in baselines.items())
    sizes = measured["model"]
    return [
        f"模型：{sizes['layers']} 层，宽 {sizes['hidden_size']}，前馈 {sizes['intermediate_size']}，"
        f"{measured['num_parameters']:,} 个参数；"
        f"bf16，一个 CPU 进程，3 步，一个 micro batch 约 {measured['tokens']} token。",
        f"基线是 1 层、宽 32 的模型的同一种训练（lora）：{peaks}。",
        "",
        markdown_table(header, rows),
    ]


def report(measured: dict | None) -> str:
    """整份报告，Markdown。"""
    sections = [
        "# 显存与内存的推算",
        "由 `python benchmarks/memory/plan_memory.py` 写成；"
        "公式见 `finetune/planning/memory.py` 与 `activations.py` 的开头。"
        "**显存的各表全部是推算**；H200 上量过的三种（[gpu-h200](../speed/results/gpu-h200.md)：7B 的 LoRA 与 freeze、"
        "13B 的 LoRA）与推算差 2% 以内，不含碎片与上下文。"
        "其中碎片（5%）、CUDA 上下文（0.6 GiB）与通信缓冲（0.4 GiB）是假定。"
        "激活的公式由 `tests/planning/test_planning.py` 对照 autograd 真正保留的存储，相差不到 2%。",
        "## 总表",
        "GiB，每张卡的峰值（括号里是每台主机），bf16，Baichuan2（词表 125,696），一个 micro batch 4,096 token"
        "（四条 1,024 的样本并排，五分之一是目标），`--gradient_checkpointing all`，freeze 训练最后 4 层。"
        "ZeRO-2、ZeRO-3 卸载是项目里的两份配置；ZeRO-3 是后者去掉两个 offload。",
        main_table(),
        "ZeRO-3 另有「聚集的参数」（多卡或卸载时）：`stage3_max_live_parameters` 十亿个元素，约 1.9 GiB；"
        "lora 与 ptuning 在 ZeRO-2 下加卡不省显存，因为占显存的是冻结的权重。",
        "## 各项",
        "GiB，一张卡，ZeRO-2，同样的 micro batch，四种重算。峰值取四个时刻里最大的：算损失、反向之初、反向之末、更新；"
        "更新时激活已释放，所以「激活」为 0 的行峰值在更新：那时重算省不了什么，要省就加卡或卸载。",
        parts_table(),
        "## 与 CPU 实测对照",
        "\n".join(measured_table(measured)),
        "MiB，超出基线的部分。实测的是匿名与共享内存之和（不含映射的权重文件），每 10 毫秒看一次。"
        "「在用的」让 glibc 把超过 64 KiB 的块一释放就还给系统（`MALLOC_MMAP_THRESHOLD_=65536`），"
        "近于 GPU 的已分配峰值，推算不含碎片；「glibc 缺省」是平常的运行，释放的块大多留着，推算给权重之外的加 45%"
        "（`FRAGMENTATION`，由这张表的实测定出，所以只是自洽，不是预言）。"
        "剩下的差：oneDNN 重排权重的缓冲、DeepSpeed 的临时复制、看的间隔。",
    ]
    return "\n\n".join(sections) + "\n"
