"""推算显存的报告：总表、与公布的数对照、与 CPU 实测对照，写成 Markdown；由 plan_memory.py 使用。"""

from argparse import Namespace

import arguments
from activation_plan import MicroBatch, PlannedModel, plan_model
from baichuan import BaichuanConfig
from memory_plan import GIB, Plan, Setup, plan_memory

# (隐藏宽度, 前馈宽度, 层数, 头数, 位置)
SIZES = {"7B": (4096, 11008, 32, 32, "rope"), "13B": (5120, 13696, 40, 40, "alibi")}
METHODS = ("freeze", "lora", "ptuning", "full")
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


def method_args(method: str, layers: int, *flags: str) -> Namespace:
    """一种方法的参数，缺省值；freeze 训练最后四层。"""
    freeze = ",".join(f"layers.{index}." for index in range(layers - 4, layers))
    return arguments.parse_args(
        [
            *("--train_path", "d", "--model_name_or_path", "m", "--output_dir", "o", "--train_type", method),
            *(("--freeze_module_name", freeze) if method == "freeze" else ()),
            *flags,
        ]
    )


def setup_named(name: str, cards: int, precision: str = "bf16") -> Setup:
    """总表里的一种切分。"""
    return Setup(precision=precision, cards=cards, cards_per_node=cards, live_elements=LIVE, **SETUPS[name])


def main_table() -> list[str]:
    """7B、13B × 方法 × 切分 × 卡数：每张卡的峰值，卸载时再加每台主机的。"""
    lines = ["| 模型 | 方法 | 切分 | " + " | ".join(f"{cards} 张卡" for cards in CARDS) + " |", "|---" * 7 + "|"]
    for size, (_, _, layers, _, _) in SIZES.items():
        for method in METHODS:
            model = plan_model(method_args(method, layers), config_of(size, 125696))
            for name in SETUPS:
                plans = [plan_memory(model, BATCH, setup_named(name, cards), "all") for cards in CARDS]
                cells = [cell(plan, with_host="卸载" in name) for plan in plans]
                lines.append(f"| {size} | {method} | {name} | " + " | ".join(cells) + " |")
        for flag in ("--load_in_8bit", "--load_in_4bit"):
            model = plan_model(method_args("lora", layers, flag), config_of(size, 125696))
            plans = [plan_memory(model, BATCH, setup_named("ZeRO-2", cards), "all") for cards in CARDS]
            lines.append(f"| {size} | lora `{flag}` | ZeRO-2 | " + " | ".join(map(cell, plans)) + " |")
    return lines


def cell(plan: Plan, with_host: bool = False) -> str:
    """一格：每张卡 GiB（与主机 GiB）。"""
    return f"{plan.device_bytes / GIB:.1f}" + (f"（主机 {plan.host_bytes / GIB:.0f}）" if with_host else "")


def parts_table() -> list[str]:
    """一张卡、ZeRO-2 时各项的量，重算与不重算。"""
    names = (
        "权重",
        "梯度",
        "优化器",
        "激活",
        "词表投影与 logits",
        "通信桶",
        "更新时的 fp32 梯度",
        "前缀",
        "碎片",
        "CUDA 与通信",
    )
    lines = ["| 模型 | 方法 | 重算 | " + " | ".join(names) + " | 合计 |", "|---" * (len(names) + 4) + "|"]
    for size, (_, _, layers, _, _) in SIZES.items():
        for method in METHODS:
            model = plan_model(method_args(method, layers), config_of(size, 125696))
            for checkpointing in ("none", "attention", "2", "all"):
                plan = plan_memory(model, BATCH, setup_named("ZeRO-2", 1), checkpointing)
                cells = [f"{plan.device.get(name, 0) / GIB:.2f}" for name in names]
                lines.append(f"| {size} | {method} | {checkpointing} | " + " | ".join(cells) + f" | {cell(plan)} |")
    return lines


def published_table() -> list[str]:
    """与公布的数对照：(谁、条件, 公布, 推算, 差别从哪里来)。"""

    def one(method, lengths, checkpointing, name="ZeRO-2", cards=1, size="7B", vocab=64000, flags=()) -> float:
        model: PlannedModel = plan_model(method_args(method, SIZES[size][2], *flags), config_of(size, vocab))
        batch = MicroBatch(lengths, sum(lengths) // 5)
        return plan_memory(model, batch, setup_named(name, cards), checkpointing).device_bytes / GIB

    short = [512]
    ancestor = [1560]
    rows = [
        (
            "LLaMA-Factory 的规则，7B 全参数，混合精度",
            "120",
            one("full", short, "all"),
            "规则是每参数 16 字节加余量；这里 18 字节（DeepSpeed 的更新峰值），词表投影的归一化另计",
        ),
        ("同上，14B（13B）", "240", one("full", short, "all", size="13B"), "规则的 14B 比 13B 多 5%"),
        (
            "LLaMA-Factory，7B freeze、LoRA，16 位",
            "16",
            one("lora", short, "all"),
            "规则不含激活；这里含 0.75 GiB 的梯度桶、碎片与 CUDA 上下文",
        ),
        ("同上，14B（13B）", "32", one("lora", short, "all", size="13B"), "同上"),
        (
            "LLaMA-Factory，7B QLoRA，4 位",
            "6",
            one("lora", short, "all", flags=("--load_in_4bit",)),
            "规则是每参数 0.5 字节加余量；这里词嵌入与词表投影仍是 16 位",
        ),
        ("同上，14B（13B）", "12", one("lora", short, "all", size="13B", flags=("--load_in_4bit",)), "同上"),
        (
            "祖先（ChatGLM-6B，A40，fp16），freeze 最后 4 层，重算",
            "36",
            one("freeze", ancestor, "all"),
            "祖先的层大（6.2B 参数、28 层），冻结的底层也进反向，logits 全算、fp32",
        ),
        ("祖先，freeze，不重算", "38", one("freeze", ancestor, "none"), "同上；这里底层不建图，激活只有 4 层"),
        ("祖先，freeze，4 张卡", "24", one("freeze", ancestor, "all", cards=4), "优化器切成四份，两边都省约 10 至 14"),
        (
            "祖先，LoRA r8，重算",
            "20",
            one("lora", ancestor, "all"),
            "祖先 12 GiB 权重，加全部行的 fp32 logits（词表 130,528）",
        ),
        (
            "祖先，LoRA r8，不重算",
            "45",
            one("lora", ancestor, "none"),
            "祖先的注意力存 长² 的概率、fp32 的中间结果；这里用 flash 与自写的反向",
        ),
        ("祖先，LoRA，4 张卡", "20", one("lora", ancestor, "all", cards=4), "ZeRO-2 不切分冻结的权重，两边都不省"),
        (
            "祖先，P-Tuning v2 带 MLP，768 token，重算",
            "43",
            one("ptuning", [768], "all", flags=("--prefix_projection", "--prefix_hidden_size", "4096")),
            "这里的 MLP 取模型宽度 4096（10.9 亿个参数），与祖先相当",
        ),
        (
            "祖先，全参数，ZeRO-3 卸载，4 张卡",
            "33",
            one("full", ancestor, "all", "ZeRO-3 卸载", 4),
            "祖先的 33 多半是缺省的梯度桶与聚集的参数（各 5 亿至 10 亿元素）加 fp32 logits",
        ),
        (
            "Qwen-7B LoRA，A100，重算，1024 token",
            "21.5",
            one("lora", [1024], "all", vocab=125696),
            "Qwen 7.7B 参数，LoRA 套全部层，logits 全算（词表 151,936）",
        ),
        (
            "同上，4096 token",
            "29.7",
            one("lora", [4096], "all", vocab=125696),
            "每 token 的差：全部行的 logits（bf16 与 fp32 各一份）",
        ),
    ]
    lines = ["| 谁、什么条件 | 公布，GB | 推算，GiB | 差别从哪里来 |", "|---|---|---|---|"]
    return lines + [f"| {who} | {number} | {planned:.1f} | {why} |" for who, number, planned, why in rows]


def measured_table(measured: dict | None) -> list[str]:
    """CPU 上真的训练的内存峰值，减去最小模型的同一种训练，与推算之差对照。"""
    if measured is None:
        return ["还没有实测：`python scripts/plan_memory.py --measure --work_dir 目录`。"]
    baselines = {run["stage"]: run for run in measured["runs"] if run["method"] == "baseline"}
    lines = [
        "| 切分 | 方法 | 在用的：实测 | 推算 | 推算 / 实测 | glibc 缺省：实测 | 推算 | 推算 / 实测 |",
        "|---" * 8 + "|",
    ]
    for run in measured["runs"]:
        base = baselines[run["stage"]]
        if run is base:
            continue
        cells = []
        for peak, planned in (("peak", "planned_in_use"), ("peak_default", "planned")):
            found, expected = run[peak] - base[peak], run[planned] - base[planned]
            cells += [f"{found / 2**20:.0f}", f"{expected / 2**20:.0f}", f"{expected / found:.2f}"]
        lines.append(f"| {run['stage']} | {run['method']} | " + " | ".join(cells) + " |")
    peaks = "、".join(f"{stage} {run['peak'] / 2**20:.0f} MiB" for stage, run in baselines.items())
    sizes = measured["model"]
    return [
        f"模型：{sizes['layers']} 层，宽 {sizes['hidden_size']}，前馈 {sizes['intermediate_size']}，"
        f"{measured['num_parameters']:,} 个参数；"
        f"bf16，一个 CPU 进程，3 步，一个 micro batch 约 {measured['tokens']} token。",
        f"基线是 1 层、宽 32 的模型的同一种训练（lora）：{peaks}。",
        "",
        *lines,
    ]


def report(measured: dict | None) -> str:
    """整份报告，Markdown。"""
    sections = [
        "# 显存与内存的推算",
        "由 `python scripts/plan_memory.py` 写成；公式见 `memory_plan.py` 与 `activation_plan.py` 的开头。"
        "**没有在任何 GPU 上测过**：显存的各表全部是推算，"
        "其中碎片（5%）、CUDA 上下文（0.6 GiB）与通信缓冲（0.4 GiB）是假定。"
        "激活的公式由 `tests/test_memory_plan.py` 对照 autograd 真正保留的存储，相差不到 2%。",
        "## 总表",
        "GiB，每张卡的峰值（括号里是每台主机），bf16，Baichuan2（词表 125,696），一个 micro batch 4,096 token"
        "（四条 1,024 的样本并排，五分之一是目标），`--gradient_checkpointing all`，freeze 训练最后 4 层。"
        "ZeRO-2、ZeRO-3 卸载是项目里的两份配置；ZeRO-3 是后者去掉两个 offload。",
        "\n".join(main_table()),
        "ZeRO-3 另有「聚集的参数」（多卡或卸载时）：`stage3_max_live_parameters` 十亿个元素，约 1.9 GiB；"
        "lora 与 ptuning 在 ZeRO-2 下加卡不省显存，因为占显存的是冻结的权重。",
        "## 各项",
        "GiB，一张卡，ZeRO-2，同样的 micro batch，四种重算。峰值取四个时刻里最大的：算损失、反向之初、反向之末、更新；"
        "更新时激活已释放，所以「激活」为 0 的行峰值在更新：那时重算省不了什么，要省就加卡或卸载。",
        "\n".join(parts_table()),
        "## 与公布的数对照",
        "公布的多是 GB（10⁹）且凑整；祖先是 ChatGLM-6B，不是 Baichuan。差别的原因由代码与算术推断，没有在卡上核实。",
        "\n".join(published_table()),
        "## 与 CPU 实测对照",
        "\n".join(measured_table(measured)),
        "MiB，超出基线的部分。实测的是匿名与共享内存之和（不含映射的权重文件），每 10 毫秒看一次。"
        "「在用的」让 glibc 把超过 64 KiB 的块一释放就还给系统（`MALLOC_MMAP_THRESHOLD_=65536`），"
        "近于 GPU 的已分配峰值，推算不含碎片；「glibc 缺省」是平常的运行，释放的块大多留着，推算加 45%"
        "（`FRAGMENTATION`，由这张表的实测定出，所以只是自洽，不是预言）。"
        "剩下的差：oneDNN 重排权重的缓冲、DeepSpeed 的临时复制、看的间隔。",
    ]
    return "\n\n".join(sections) + "\n"
