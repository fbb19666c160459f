"""在读任何权重之前推算显存与内存：由结构、方法、ZeRO 与一个 micro batch 的形状，逐项算出每张卡与主机的峰值。

模型状态用 DeepSpeed 自己的估算（estimate_zero2_model_states_mem_needs、estimate_zero3_…），再作四处修正：
一，它假定全部参数都训练，这里只把可训练的参数交给它，冻结的另加（每个只有权重自己的字节；ZeRO-3 切分）；
二，它的 18 字节里有更新时才出现的 4 字节 fp32 梯度，那时激活已经释放，所以反向与更新分开算，取大的；
三，它的主机部分按整个模型先在内存里造好来估，并乘 1.5；这里逐张量直接读到设备上，只计卸载的状态，不乘余量；
四，ZeRO-3 的估算没有算半精度的梯度（grad_partitions_flat_buffer），也没有算 stage3_max_live_parameters 允许
同时聚集在卡上的参数，这里都加上。
激活见 activation_plan.py。
"""

from typing import Any, NamedTuple

from finetune.cli.train_flags import TrainOptions
from finetune.planning.activations import MicroBatch, PlannedModel, activations, head_bytes, prefix_bytes
from finetune.training.ds_config import GROUP_ELEMENTS, is_offloaded

GIB = 2**30
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# --optimizer 的动量等，每个可训练的参数的字节数，主权重在外；8 位的每 256 个一块，一块有两个 fp32 的系数
STATE_BYTES = {"adamw": 8, "adamw_8bit": 2 + 2 * 4 / 256, "adamw_bf16": 6}
SMALL_SHARE = 0.05  # 按 fp32 相加的梯度多占的不到模型状态的这个份额时，就按 fp32
# 分配器留着的碎片，占权重之外各项（CUDA 上是全部各项，假定）之和：CPU 由 benchmarks/memory/plan_memory.py 量得
# （glibc 缺省）；权重读进来之后一直在，不产生碎片，7B 上量过
FRAGMENTATION = {"cuda": 0.05, "cpu": 0.45}
# 下面三个没有在 GPU 上测过，是假定
CUDA_CONTEXT = 0.6 * GIB  # CUDA 上下文与 cuBLAS 工作区
NCCL_BUFFERS = 0.4 * GIB  # 多卡通信
HOST_RUNTIME = {"cpu": 0.5 * GIB, "cuda": 3.0 * GIB}  # 一个进程的解释器与各库
LAUNCHERS = 0.32 * GIB  # deepspeed 与 launch.py 两个进程，量得


class Setup(NamedTuple):
    """怎样训练：精度、DeepSpeed 的切分与卸载、卡数。"""

    precision: str
    stage: int
    offload_optimizer: bool
    offload_param: bool
    cards: int  # 全部机器的卡数
    cards_per_node: int
    bucket_elements: int = 0  # ZeRO 的梯度桶，元素
    live_elements: int = 0  # ZeRO-3 同时聚集在卡上的参数上限，元素
    device: str = "cuda"
    optimizer: str = "adamw"
    grad_accum_dtype: str | None = None  # 梯度按什么相加；None 是权重的精度

    @property
    def grad_bytes(self) -> int:
        """梯度每个元素的字节数。"""
        return ELEMENT_BYTES[self.grad_accum_dtype or self.precision]

    @property
    def state_bytes(self) -> float:
        """优化器的每个元素的字节数：动量等与主权重；同样精度的主权重与权重共用（engine.save_memory）。"""
        is_shared = self.optimizer == "adamw_bf16" or (self.optimizer == "adamw_8bit" and self.precision == "fp32")
        return STATE_BYTES[self.optimizer] + (0 if is_shared else 4)

    @property
    def element_bytes(self) -> int:
        """权重与激活每个元素的字节数。"""
        return ELEMENT_BYTES[self.precision]


class Plan(NamedTuple):
    """推算的结果，字节。device 是每张卡（没有 GPU 时是每个进程），host 是每台机器。"""

    device: dict[str, int]
    host: dict[str, int]

    @property
    def device_bytes(self) -> int:
        """每张卡的峰值。"""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """每台机器主机内存的峰值。"""
        return sum(self.host.values())


def setup_of(
    ds_config: dict[str, Any],
    precision: str,
    cards: int,
    cards_per_node: int,
    device: str,
    optimizer: str = "adamw",
    grad_accum_dtype: str | None = None,
) -> Setup:
    """由 DeepSpeed 的配置读出切分、卸载与缓冲的大小。"""
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    num_buckets = 2 if stage == 2 and zero.get("overlap_comm", False) else 1
    return Setup(
        precision=precision,
        stage=stage,
        offload_optimizer=is_offloaded(zero, "optimizer"),
        offload_param=stage == 3 and is_offloaded(zero, "param"),
        cards=cards,
        cards_per_node=cards_per_node,
        bucket_elements=num_buckets * int(zero.get("reduce_bucket_size", 5e8)) if stage >= 2 else 0,
        live_elements=int(zero.get("stage3_max_live_parameters", 1e9)),
        device=device,
        optimizer=optimizer,
        grad_accum_dtype=grad_accum_dtype,
    )


# ---------------------------------------------------------------------------------------------------------------------
# 模型状态


def model_states(model: PlannedModel, setup: Setup) -> tuple[dict[str, int], dict[str, int], int]:
    """权重、梯度、优化器与聚集的参数：(每张卡，每台机器的主机，更新时每张卡另需的)，字节。

    DeepSpeed 的估算按 16 位的权重；fp32 的权重与梯度各多 2 字节，另加。
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    size, trained, cards = setup.element_bytes, model.num_trained, setup.cards
    nodes = max(1, setup.cards // setup.cards_per_node)
    host = {"权重": 0, "梯度与优化器": 0}
    if setup.stage == 3:
        _, on_device, largest = estimate_zero3_model_states_mem_needs(
            trained, 0, setup.cards_per_node, nodes, setup.offload_optimizer, setup.offload_param
        )
        assert largest == 0
        weights = 0 if setup.offload_param else size * model.num_total // cards
        states = on_device - (0 if setup.offload_param else 2 * trained // cards)
        # 一个进程时各段就是全部；没有 GPU 时参数本来就在主机上
        is_gathering = cards > 1 or (setup.offload_param and setup.device != "cpu")
        gathered = size * min(model.num_total, max(setup.live_elements, model.largest_module)) if is_gathering else 0
        host["权重"] = size * model.num_total // nodes if setup.offload_param else 0
    else:
        _, on_device = estimate_zero2_model_states_mem_needs(
            trained, setup.cards_per_node, nodes, setup.offload_optimizer
        )
        weights, gathered = model.weight_bytes(size), 0
        states = on_device - 2 * trained
        if setup.stage < 2:
            raise ValueError(f"推算只支持 ZeRO-2 与 ZeRO-3，配置是 ZeRO-{setup.stage}")
    share = trained / cards
    if setup.offload_optimizer:
        # 主权重与两个动量 12，fp32 梯度 4，ZeRO-3 还有一份相加用的；ZeRO-2 按 fp32 相加的在卡上
        host["梯度与优化器"] = trained * (16 + (setup.grad_bytes if setup.stage == 3 else 0)) // nodes
        gradients, optimizer, update = size * model.largest_module * bool(model.head_is_trained), states, 0
        gradients += int(share * setup.grad_bytes) if setup.stage == 2 and setup.grad_bytes > size else 0
    elif setup.optimizer == "adamw":
        update = 4 * trained // cards
        optimizer = states - update - (2 * trained // cards if setup.stage == 2 else 0)
        assert abs(optimizer - 12 * share) <= 8, "DeepSpeed 的估算变了"
        gradients = setup.grad_bytes * trained // cards
        if setup.stage == 2 and setup.grad_bytes > size:  # 已经是拼好的 fp32
            update = 0
        elif setup.stage == 2 and size == 2:  # 换成 fp32 之前先拼成一整段
            update += 2 * trained // cards
    else:
        group = max(GROUP_ELEMENTS, vocabulary_elements(model))  # 更新与范数的 fp32 一次只有一组的
        optimizer, gradients = int(share * setup.state_bytes), int(share * setup.grad_bytes)
        update = int(4 * min(share, group))
    return {"权重": weights, "聚集的参数": gathered, "梯度": gradients, "优化器": optimizer}, host, update


def vocabulary_elements(model: PlannedModel) -> int:
    """词嵌入、词表投影之一的元素数；都不训练时为 0。"""
    return model.shape.vocab * model.shape.hidden * (model.embedding_is_trained or model.head_is_trained)


def choose_grad_accum_dtype(
    args: TrainOptions, ds_config: dict[str, Any], model: PlannedModel, precision: str
) -> tuple[str, str]:
    """几个 micro batch 的梯度按什么相加 → (类型, 理由)；与进程数无关，续训换了进程数也一样。

    bf16 只有 8 位有效数字：63 个 2⁻⁹ 加在 1 上还是 1。

    Raises:
        ValueError: --grad_accum_dtype bf16 而精度不是 bf16。
    """
    if in_file := ds_config.get("data_types", {}).get("grad_accum_dtype"):
        return in_file, f"由 {args.ds_file} 指定"
    if args.grad_accum_dtype != "auto":
        if args.grad_accum_dtype == "bf16" != precision:
            raise ValueError(f"--grad_accum_dtype bf16 要 --precision bf16，精度是 {precision}，请去掉它")
        return args.grad_accum_dtype, "由 --grad_accum_dtype 指定"
    if precision != "bf16":
        return precision, "与权重相同"
    setup = setup_of(ds_config, precision, 1, 1, "cuda", args.optimizer)
    if setup.stage < 2:
        return "bf16", f"ZeRO-{setup.stage} 按 fp32 相加时存不了训练状态"
    states, host, update = model_states(model, setup)
    share = 2 * model.num_trained / (sum(states.values()) + sum(host.values()) + update)
    return "fp32" if share < SMALL_SHARE else "bf16", f"fp32 多占模型状态的 {share:.2%}，界限 {SMALL_SHARE:.0%}"


def plan_memory(
    model: PlannedModel,
    batch: MicroBatch,
    setup: Setup,
    checkpointing: str,
    num_data_tokens: int = 0,
    accumulates: bool = True,
) -> Plan:
    """每张卡与每台主机的峰值，逐项；没有 GPU 时 device 是一个进程在内存里的量。

    Args:
        batch: 最大的一个 micro batch。
        num_data_tokens: 数据的 token 总数，每个进程各存一份，每个 token 5 字节。
        accumulates: 一步有几个 micro batch：前面的梯度与后面的激活同时在。
    """
    on_cpu, size = setup.device == "cpu", setup.element_bytes
    states, host, update = model_states(model, setup)
    kept = activations(model, batch, size, checkpointing, on_cpu, keeps_inputs=setup.stage == 3)
    loss_peak, head_kept = head_bytes(model, batch, size)
    bucket = setup.bucket_elements * size
    if on_cpu:
        bucket = min(setup.bucket_elements, model.num_trained) * size  # 没有写到的页不占内存
    gradients = states.pop("梯度")
    at_start = gradients if accumulates else 0
    # DeepSpeed 把梯度加进 fp32 的缓冲时，比通信桶大的（词嵌入与词表投影）自己的梯度留到反向之末
    is_summed = setup.stage == 2 and setup.grad_bytes > size and setup.optimizer == "adamw"
    large = vocabulary_elements(model) * (model.embedding_is_trained + model.head_is_trained)
    lingering = size * large if is_summed and vocabulary_elements(model) > setup.bucket_elements else 0
    # 四个时刻：算损失；反向之初，激活都在，多出一层的临时量；反向之末，梯度齐了；更新，激活已释放
    all_kept = kept.saved + kept.shared
    moments = [
        {"激活": all_kept, "词表投影与 logits": loss_peak, "梯度": at_start},
        {
            **{"激活": all_kept + kept.working, "词表投影与 logits": head_kept, "梯度": at_start},
            "通信桶": 0 if on_cpu and not accumulates else bucket,
        },
        {"激活": kept.working, "梯度": gradients + lingering, "通信桶": bucket},
        {"梯度": gradients, "更新时的 fp32 梯度": update, "通信桶": bucket if setup.stage == 3 else 0},
    ]
    peak = max(moments, key=lambda parts: sum(parts.values()))
    device = states | peak
    device["前缀"] = prefix_bytes(model, size)
    steady = device["权重"] if on_cpu else 0
    device["碎片"] = int(FRAGMENTATION[setup.device] * (sum(device.values()) - steady))
    if not on_cpu:
        device["CUDA 与通信"] = int(CUDA_CONTEXT + (NCCL_BUFFERS if setup.cards > 1 else 0))
    processes = min(setup.cards, setup.cards_per_node)
    host["各进程的程序与数据"] = int(LAUNCHERS + processes * (HOST_RUNTIME[setup.device] + 5 * num_data_tokens))
    host["保存检查点"] = min(checkpoint_bytes(model, size, True), size * model.largest_module)  # 一次一个张量
    if on_cpu:  # 保存时激活、通信桶与（除了 ZeRO-3 的）梯度已经释放，只计超出训练的峰值的
        released = sum(peak.values()) - (gradients if setup.stage == 3 else 0)
        host["保存检查点"] = max(0, host["保存检查点"] - processes * released)
        host["训练（各进程）"] = processes * sum(device.values())
    return Plan({name: value for name, value in device.items() if value}, {k: v for k, v in host.items() if v})


def checkpoint_bytes(
    model: PlannedModel, element_bytes: int, with_trainer_state: bool, optimizer: str = "adamw"
) -> int:
    """一个检查点的大小，字节：完整模型或适配器，加每个可训练参数的训练状态（adamw 12 字节）。"""
    is_adapter = bool(model.prefix_length or model.prompt_length or any(use.lora for use in model.layers))
    weights = element_bytes * (model.num_trained if is_adapter else model.num_total)
    if is_adapter and model.prefix_length:  # 存的是算好的前缀，不是产生它的 MLP
        weights = element_bytes * model.prefix_length * 2 * len(model.layers) * model.shape.hidden
    state_bytes = STATE_BYTES[optimizer] + (2 if optimizer == "adamw_bf16" else 4)
    return weights + int(state_bytes * model.num_trained if with_trainer_state else 0)
