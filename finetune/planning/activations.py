"""套上训练方法之后的模型各层为反向保留多少激活：不读权重，由结构逐个张量相加。

与 baichuan/ 的代码一一对应，tests/test_memory_plan.py 对照 autograd 真正保留的存储（各种方法与重算的取值）。
"""

from typing import NamedTuple

import torch
from torch import nn

from baichuan import BaichuanConfig, BaichuanForCausalLM
from baichuan.linear_cross_entropy import MAX_LOGITS_ELEMENTS
from baichuan.packed_attention_cpu import MAX_SAVED_SCORES, query_blocks
from finetune.checkpoint.options import quantization_of, read_words
from finetune.cli.train_flags import TrainOptions
from finetune.methods.registry import TRAIN_METHODS, apply_method, num_elements
from finetune.planning.flops import Shape

# nf4 每 64 个权重一个系数，系数再量化成 8 位；LLM.int8() 每行一个系数，不计
QUANTIZED_BYTES = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}


class LayerUse(NamedTuple):
    """一层里什么在训练。"""

    trained: frozenset[str]  # 自身可训练的子模块：W_pack、o_proj、gate_proj、up_proj、down_proj、两个归一化
    lora: frozenset[str]  # 套了 LoRA 的线性层
    input_needs_grad: bool


class PlannedModel(NamedTuple):
    """套上训练方法之后的模型，没有存储。"""

    shape: Shape
    is_alibi: bool
    norm_head: bool
    num_total: int
    num_trained: int
    num_trained_vectors: int
    largest_module: int  # 一个模块自己的参数数，最大的那个
    layers: list[LayerUse]
    head_is_trained: bool
    embedding_is_trained: bool
    prefix_length: int  # P-Tuning v2 在每层的前缀；其他为 0
    prompt_length: int  # P-Tuning v1 加在每个样本前的 token；其他为 0
    lora_dim: int
    lora_dropout: float
    quantized_bytes: float | None = None  # 各层的线性层量化之后每个权重的字节数；不量化为 None

    def weight_bytes(self, element_bytes: int) -> int:
        """全部权重的字节数。"""
        num_quantized = 0 if self.quantized_bytes is None else len(self.layers) * self.shape.layer_weights
        return int(element_bytes * (self.num_total - num_quantized) + (self.quantized_bytes or 0) * num_quantized)

    @property
    def first_trained_layer(self) -> int:
        """最低的、反向要走到的层；没有则为层数。"""
        reached = (
            index
            for index, use in enumerate(self.layers)
            if use.trained or use.lora or use.input_needs_grad or self.prefix_length
        )
        return next(reached, len(self.layers))


class MicroBatch(NamedTuple):
    """一个 micro batch 的形状：各样本（补齐之后）的长度、目标 token 数、是否并排。"""

    lengths: list[int]
    num_targets: int
    packing: bool = True


class Activations(NamedTuple):
    """激活，字节：反向之前一直保留的，反向中一层的临时量，各层共用的位置与掩码。"""

    saved: int
    working: int
    shared: int


def plan_model(args: TrainOptions, config: BaichuanConfig) -> PlannedModel:
    """在 meta 设备上造模型、套上训练方法，数出参数与各层的用法；不占内存。

    Raises:
        ValueError: 方法的模块名没有匹配到（见各方法的 apply）。
    """
    method = TRAIN_METHODS[args.train_type]
    with torch.device("meta"):
        model = BaichuanForCausalLM(config)
        if words := read_words(args.add_tokens):
            model.add_rows(config.vocab_size, *torch.empty(2, len(words), config.hidden_size))
        model = apply_method(model, args)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    prompt = method.prompt(args)
    needs_grad = any("embed_tokens" in name for name in trainable) or prompt.tokens > 0
    layers = []
    for index in range(config.num_hidden_layers):
        names = [name for name in trainable if f"layers.{index}." in name and "prompt_encoder" not in name]
        lora = frozenset(name.split(".lora_")[0].split(".")[-1] for name in names if ".lora_" in name)
        trained = frozenset(name.split(".")[-2] for name in names if ".lora_" not in name)
        layers.append(LayerUse(trained, lora, needs_grad))
        needs_grad = needs_grad or bool(names) or prompt.key_values > 0
    return PlannedModel(
        shape=shape_of(config),
        is_alibi=config.position_embedding == "alibi",
        norm_head=config.norm_head,
        num_total=sum(num_elements(parameter) for parameter in model.parameters()),
        num_trained=sum(num_elements(parameter) for parameter in trainable.values()),
        num_trained_vectors=sum(num_elements(p) for p in trainable.values() if p.dim() <= 1),
        largest_module=max(_own_parameters(module) for module in model.modules()),
        layers=layers,
        head_is_trained=any("lm_head.weight" in name for name in trainable),
        embedding_is_trained=any("embed_tokens.weight" in name for name in trainable),
        prefix_length=prompt.key_values,
        prompt_length=prompt.tokens,
        lora_dim=args.lora_dim,
        lora_dropout=args.lora_dropout,
        quantized_bytes=QUANTIZED_BYTES.get(quantization_of(args)),
    )


def _own_parameters(module: nn.Module) -> int:
    return sum(num_elements(parameter) for parameter in module.parameters(recurse=False))


def shape_of(config: BaichuanConfig) -> Shape:
    """模型的尺寸。"""
    return Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.vocab_size,
    )


def layer_activations(
    model: PlannedModel,
    use: LayerUse,
    batch: MicroBatch,
    element_bytes: int,
    on_cpu: bool,
    output_rows: int,
    keeps_inputs: bool,
) -> tuple[int, int]:
    """一层为反向保留的字节数：(注意力之外，注意力之内)；归一化之后、W_pack 之前是分界。

    output_rows: 注意力之后的行数，最后一层只有目标行，其他层是全部 token。
    keeps_inputs: ZeRO-3 换上的线性层（deepspeed.runtime.zero.linear）不论权重是否训练都留着输入。
    """
    lengths = model_lengths(model, batch)
    tokens, width, inner = sum(lengths), model.shape.hidden, model.shape.intermediate

    mask_bytes = element_bytes if on_cpu else 1  # CPU 上 dropout 的掩码是普通的张量，GPU 上是 bool

    def linear(rows: int, size: int, *names: str) -> int:
        """几个共用输入的线性层保留的：自身训练的留输入；LoRA 各留 dropout 之后的输入、掩码与 dim 宽的中间结果。"""
        with_lora = [name for name in names if name in use.lora]
        keeps_input = any(name in use.trained for name in names) or (with_lora and not model.lora_dropout)
        keeps_input = keeps_input or (keeps_inputs and needs_grad)
        dropped = size * (element_bytes + mask_bytes) if model.lora_dropout else 0
        per_row = size * element_bytes * bool(keeps_input)
        return rows * (per_row + len(with_lora) * (dropped + model.lora_dim * element_bytes))

    def is_used(*names: str) -> bool:
        return any(name in use.trained or name in use.lora for name in names)

    norm = width * element_bytes + 4
    needs_grad = use.input_needs_grad or is_used("input_layernorm")
    outside = tokens * norm if needs_grad else 0
    inside = linear(tokens, width, "W_pack")
    needs_grad = needs_grad or is_used("W_pack")
    if needs_grad or model.prefix_length:
        inside += _attention_activations(model, lengths, element_bytes, on_cpu, batch.packing, needs_grad)
        needs_grad = True
    inside += linear(output_rows, width, "o_proj")
    needs_grad = needs_grad or is_used("o_proj", "post_attention_layernorm")
    outside += output_rows * norm if needs_grad else 0
    outside += linear(output_rows, width, "gate_proj", "up_proj")
    needs_grad = needs_grad or is_used("gate_proj", "up_proj")
    outside += 2 * output_rows * inner * element_bytes if needs_grad else 0
    outside += linear(output_rows, inner, "down_proj")
    return outside, inside


def model_lengths(model: PlannedModel, batch: MicroBatch) -> list[int]:
    """模型里各样本的长度：P-Tuning v1 的提示加在每个样本前。"""
    return [length + model.prompt_length for length in batch.lengths]


def _attention_activations(
    model: PlannedModel, lengths: list[int], element_bytes: int, on_cpu: bool, packing: bool, qkv_needs_grad: bool
) -> int:
    """注意力保留的：q、k、v 的存储，概率（CPU 上并排的短样本）或输出与 logsumexp（SDPA）。"""
    tokens, width, heads, prefix = sum(lengths), model.shape.hidden, model.shape.heads, model.prefix_length
    if packing and on_cpu:
        short = [n for n in lengths if n * (prefix + n) <= MAX_SAVED_SCORES]
        saved = [(end - begin, prefix + end) for n in short for begin, end in query_blocks(n)]
        return (3 * tokens * width + heads * sum(rows * keys for rows, keys in saved)) * element_bytes
    if packing and element_bytes == 2:  # packed_attention_gpu；共用的开头另抄的键不计：它们省下的更多
        if model.is_alibi:  # q、k、v 是 W_pack 输出的视图；有前缀时 k、v 另有一份
            elements = (4 * tokens + 2 * (tokens + prefix) * bool(prefix)) * width
        else:  # 各段的键前面都抄一份前缀
            elements = (4 * tokens + 2 * len(lengths) * prefix) * width
        return elements * element_bytes + 4 * heads * tokens
    # W_pack 的输出是一块，q、k、v 是它的视图：只要还有一个在用，整块都在；有前缀时 k、v 另有一份
    with_prefix = (tokens + len(lengths) * prefix) * bool(prefix)
    elements = (3 * tokens + 2 * with_prefix) * width
    if not qkv_needs_grad:
        elements -= with_prefix * width  # 第 0 层的 q 不要梯度，不必留 k
    return (elements + tokens * width) * element_bytes + 4 * heads * tokens


def checkpointed_layers(model: PlannedModel, checkpointing: str) -> list[int]:
    """--gradient_checkpointing 下要重算的层：只有反向经过的层才重算。"""
    if checkpointing == "none":
        return []
    every = 1 if checkpointing in ("all", "attention") else int(checkpointing)
    return [index for index in range(model.first_trained_layer, len(model.layers)) if index % every == 0]


def activations(
    model: PlannedModel,
    batch: MicroBatch,
    element_bytes: int,
    checkpointing: str,
    on_cpu: bool,
    keeps_inputs: bool = False,
) -> Activations:
    """整个模型的激活。

    checkpointing: --gradient_checkpointing 的取值；on_cpu: 注意力走 CPU 的写法；keeps_inputs: 见 layer_activations。
    """
    tokens = sum(model_lengths(model, batch))
    target_rows = min(tokens, batch.num_targets)
    hidden_bytes = tokens * model.shape.hidden * element_bytes
    recomputed = set(checkpointed_layers(model, checkpointing))
    saved, again = 0, 0
    for index, use in enumerate(model.layers):
        rows = target_rows if index == len(model.layers) - 1 else tokens
        outside, inside = layer_activations(model, use, batch, element_bytes, on_cpu, rows, keeps_inputs)
        if index not in recomputed:
            saved += outside + inside
        elif checkpointing == "attention":
            saved, again = saved + outside + hidden_bytes, max(again, inside)
        else:
            saved, again = saved + hidden_bytes, max(again, outside + inside)
    reaches_any = model.first_trained_layer < len(model.layers)
    if reaches_any:
        saved += target_rows * (model.shape.hidden * element_bytes + 4)  # 最后的归一化，只有目标行
        # SwiGLU 的反向同时有 4 份前馈宽度的张量，外加残差与它的梯度
        again += tokens * (4 * model.shape.intermediate + 2 * model.shape.hidden) * element_bytes
    if model.quantized_bytes is not None:  # 每次乘法现展开一个权重
        again += model.shape.hidden * max(3 * model.shape.hidden, model.shape.intermediate) * element_bytes
    rotary = rotary_bytes(model, tokens, element_bytes)
    return Activations(saved, again, rotary + bias_bytes(model, batch, element_bytes, on_cpu))


def rotary_bytes(model: PlannedModel, tokens: int, element_bytes: int) -> int:
    """各层共用的旋转表 cos、sin；ALiBi 没有。"""
    head_dim = model.shape.hidden // model.shape.heads
    return 0 if model.is_alibi else 2 * tokens * head_dim * (4 if model.norm_head else element_bytes)


def bias_bytes(model: PlannedModel, batch: MicroBatch, element_bytes: int, on_cpu: bool) -> int:
    """各层共用的偏置与掩码：ALiBi 的是 [头, 长, 前缀 + 长]；GPU 上 16 位、并排时不需要。"""
    on_gpu_packed = batch.packing and not on_cpu
    if on_gpu_packed and (element_bytes == 2 or not (model.is_alibi or model.prefix_length)):
        return 0
    longest = max(batch.lengths) + model.prompt_length
    rows = (1 if batch.packing else len(batch.lengths)) * (model.shape.heads if model.is_alibi else 1)
    return rows * longest * (longest + model.prefix_length) * element_bytes


def prefix_bytes(model: PlannedModel, element_bytes: int) -> int:
    """P-Tuning v2 的前缀：词嵌入的查表、变形与各层的切分，共三份。"""
    return 3 * model.prefix_length * 2 * len(model.layers) * model.shape.hidden * element_bytes


def head_bytes(model: PlannedModel, batch: MicroBatch, element_bytes: int) -> tuple[int, int]:
    """词表投影与损失：(算损失时的峰值，之后留到反向的)；logits 分块，梯度在前向里就算好。"""
    shape, rows = model.shape, batch.num_targets
    chunk = min(rows, max(1, MAX_LOGITS_ELEMENTS // shape.vocab))
    kept = rows * shape.hidden * element_bytes
    working = chunk * shape.vocab * 8  # fp32 的 logits 与 logsumexp 的临时量
    if model.head_is_trained:
        kept += shape.vocab * shape.hidden * element_bytes
        if model.norm_head:  # 把梯度投影回未归一化的权重：一块的三个 fp32 的临时量
            working = max(working, min(shape.vocab * shape.hidden, MAX_LOGITS_ELEMENTS) * 12)
    return kept + working, kept
