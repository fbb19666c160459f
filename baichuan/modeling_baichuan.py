"""Baichuan 与 Baichuan2 的模型：旋转位置编码（7B）或 ALiBi（13B），普通或归一化的词表投影（NormHead）。

张量名、配置键与官方检查点相同，数值与官方代码一致（tests/model/test_goldens.py 对照官方代码算出的结果）。
"""

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from baichuan.attention import (
    AttentionContext,
    RotaryFunction,
    alibi_slopes,
    allowed_mask,
    by_head,
    counted_positions,
    eager_attention,
    packed_attention,
    rotary_tables,
)
from baichuan.configuration_baichuan import BaichuanConfig
from baichuan.linear_cross_entropy import LinearCrossEntropy, RowCrossEntropy, inverse_row_norms, with_added
from baichuan.norm_and_swiglu import RMSNormFunction, SwiGLUFunction
from baichuan.packed_attention_cpu import PackedMatmulAttention
from baichuan.packed_attention_gpu import layout_on_gpu

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100


def chosen_cache(past_key_values, cache):
    """transformers 5.24 把 past_key_values 改名为 cache；peft 每步仍以旧名给出前缀，此时非空的 cache 已含前缀。"""
    if past_key_values is None or (cache is not None and cache.get_seq_length()):
        return cache
    return past_key_values


# ---------------------------------------------------------------------------------------------------------------------
# 层


class BaichuanRMSNorm(nn.Module):
    """RMSNorm：方差用 fp32；权重是半精度时先转回权重的类型再相乘。"""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return RMSNormFunction.apply(hidden_states, self.weight, self.eps)


def take_rows(hidden_states: Tensor, rows: Tensor | None) -> Tensor:
    """[b, L, H] 展平后的这些行，[1, N, H]；rows 为 None 时原样。"""
    return hidden_states if rows is None else hidden_states.flatten(0, 1).index_select(0, rows)[None]


class BaichuanMLP(nn.Module):
    """SwiGLU：down(silu(gate(x)) · up(x))。"""

    def __init__(self, config: BaichuanConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(SwiGLUFunction.apply(self.gate_proj(hidden_states), self.up_proj(hidden_states)))


class BaichuanAttention(nn.Module):
    """自注意力。W_pack 的输出前 H 列是 q，中间 H 列是 k，最后 H 列是 v，各自再按头切分。"""

    def __init__(self, config: BaichuanConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        context: AttentionContext,
        past_key_values=None,
        prefix_key: Tensor | None = None,
        prefix_value: Tensor | None = None,
        output_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [b, L, H] → ([b, L, H]，给了 output_rows [N] 时为 [1, N, H]；注意力概率或 None)。

        prefix_key、prefix_value: [b, heads, V, d]。
        """
        batch_size, length, hidden_size = hidden_states.shape
        head_dim = self.config.head_dim
        packed_states = self.W_pack(hidden_states)
        is_packed = context.document_lengths is not None
        prefix = (None, None) if prefix_key is None else (prefix_key[0], prefix_value[0])
        if is_packed and hidden_states.device.type == "cpu":
            output = PackedMatmulAttention.apply(
                packed_states,
                *(context.rotary or (None, None)),
                context.bias,
                context.document_lengths,
                context.document_parents,
                head_dim,
                *prefix,
            )
            return self.o_proj(take_rows(output, output_rows)), None
        if context.layout is not None:
            output = context.layout.attend(packed_states, context.rotary, head_dim, *prefix)
            return self.o_proj(take_rows(output, output_rows)), None

        if context.rotary is not None:
            packed_states = RotaryFunction.apply(packed_states, *context.rotary)
        query, key, value = by_head(packed_states, head_dim).unbind(dim=2)  # 各 [b, L, heads, d]
        attentions = None
        if is_packed:
            documents = context.document_lengths, context.document_parents
            is_rotary = context.rotary is not None
            output = packed_attention(query[0], key[0], value[0], *documents, context.bias, is_rotary, *prefix)
        else:
            query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # [b, heads, L, d]
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
            elif prefix_key is not None:
                key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
            if context.output_attentions or context.is_exact:
                output, attentions = eager_attention(query, key, value, context.bias)
            else:
                output = nn.functional.scaled_dot_product_attention(
                    query, key, value, attn_mask=context.bias, is_causal=context.is_causal
                )
            output = output.transpose(1, 2)
        output = output.reshape(batch_size, length, hidden_size)
        return self.o_proj(take_rows(output, output_rows)), attentions


class BaichuanDecoderLayer(nn.Module):
    """前置归一化的一层：注意力与 SwiGLU，各加残差。"""

    def __init__(self, config: BaichuanConfig, layer_idx: int):
        super().__init__()
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = BaichuanMLP(config)
        self.input_layernorm = BaichuanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BaichuanRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        context: AttentionContext,
        past_key_values=None,
        prefix_key: Tensor | None = None,
        prefix_value: Tensor | None = None,
        output_rows: Tensor | None = None,
        checkpoint_attention=None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [b, L, H] → ([b, L, H], 注意力概率或 None)。

        output_rows [N]：只算展平后的这些行，[1, N, H]；其余各行在注意力里只作键与值，之后不再有人用。
        """
        attend = (
            self.self_attn.__call__ if checkpoint_attention is None else partial(checkpoint_attention, self.self_attn)
        )
        attention_output, attentions = attend(
            self.input_layernorm(hidden_states), context, past_key_values, prefix_key, prefix_value, output_rows
        )
        hidden_states = take_rows(hidden_states, output_rows) + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), attentions


class BaichuanEmbedding(nn.Embedding):
    """词嵌入；add_rows 之后，新词用它自己的行 added_rows，词表原有的行可以照旧冻结。"""

    def __init__(self, config: BaichuanConfig):
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.first_added = config.vocab_size
        self.register_parameter("added_rows", None)

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.added_rows is None:
            return super().forward(input_ids)
        offsets = input_ids - self.first_added
        is_added = (offsets >= 0) & (offsets < len(self.added_rows))
        rows = nn.functional.embedding(offsets.where(is_added, 0), self.added_rows)
        return torch.where(is_added[..., None], rows, super().forward(input_ids.masked_fill(is_added, 0)))


class BaichuanHead(nn.Module):
    """词表投影。Baichuan2 的 NormHead 把各行归一化，这里是前向里的一个系数：参数从不被改写。

    add_rows 之后，新词用 added_rows（归一化之前的）。
    """

    def __init__(self, config: BaichuanConfig):
        super().__init__()
        self.norm_head = config.norm_head
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.first_added = config.vocab_size
        self.register_parameter("added_rows", None)
        self._frozen_scale: tuple[tuple, Tensor] | None = None

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, norm_head={self.norm_head}"

    def row_scale(self) -> Tensor | None:
        """NormHead 各行（含新词的）范数的倒数；普通投影为 None。"""
        if not self.norm_head or self.added_rows is None:
            return self._weight_scale()
        return with_added(self._weight_scale(), inverse_row_norms(self.added_rows.detach()), self.first_added)

    def _weight_scale(self) -> Tensor | None:
        """weight 各行范数的倒数 [V]；权重冻结时只算一次。"""
        if not self.norm_head:
            return None
        if self.weight.requires_grad:
            return inverse_row_norms(self.weight.detach())
        key = (self.weight.data_ptr(), self.weight._version, self.weight.device)
        if self._frozen_scale is None or self._frozen_scale[0] != key:
            self._frozen_scale = (key, inverse_row_norms(self.weight))
        return self._frozen_scale[1]

    def forward(self, hidden_states: Tensor, targets: Tensor | None = None, by_row: bool = False) -> Tensor:
        """没有 targets：[..., H] → logits [..., V]；有：hidden [N, H] 与 targets [N] → 交叉熵之和（标量 fp32）。

        by_row：各行的交叉熵 [N]，不求和。
        """
        added = self.added_rows
        if targets is not None:
            tensors = hidden_states, self.weight, added
            if not torch.is_grad_enabled():  # autograd.Function 只看 requires_grad：评估时不让它算梯度
                tensors = [tensor if tensor is None else tensor.detach() for tensor in tensors]
            function = RowCrossEntropy if by_row else LinearCrossEntropy
            return function.apply(*tensors[:2], self.row_scale(), targets, tensors[2], self.first_added)
        logits = self._weight_logits(hidden_states)
        if added is None:
            return logits
        added = nn.functional.normalize(added) if self.norm_head else added
        return with_added(logits, nn.functional.linear(hidden_states, added), self.first_added)

    def _weight_logits(self, hidden_states: Tensor) -> Tensor:
        if not self.norm_head:
            return nn.functional.linear(hidden_states, self.weight)
        if self.weight.requires_grad and torch.is_grad_enabled():
            return nn.functional.linear(hidden_states, nn.functional.normalize(self.weight))
        return nn.functional.linear(hidden_states, self.weight) * self._weight_scale().to(hidden_states.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# 模型


class BaichuanPreTrainedModel(PreTrainedModel):
    config_class = BaichuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BaichuanDecoderLayer"]  # noqa: RUF012  （transformers 的约定写法）
    _skip_keys_device_placement = "past_key_values"
    _supports_sdpa = True
    # Baichuan-7B 的官方文件存有 rotary_emb.inv_freq；这里由位置现算
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """与 transformers 相同，但权重与结构不符（缺张量、多张量）是错误，而不是随机初始化加一句警告。

        目录里的 *.py 从不执行，有则提示一次。

        Raises:
            ValueError: 缺少张量，或有结构里没有的张量。
        """
        directory = Path(str(pretrained_model_name_or_path))
        code = sorted(path.name for path in directory.glob("*.py")) if directory.is_dir() else []
        if code:
            logger.warning_once(f"{directory} 里有代码（{'、'.join(code)}）：本项目用自己的实现，不会执行它们")
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        problems = [
            f"{kind} {len(names)} 个张量：{'、'.join(sorted(names)[:5])}"
            for kind, names in (("缺少", info["missing_keys"]), ("多出", info["unexpected_keys"]))
            if names
        ]
        if problems:
            raise ValueError(
                f"{directory} 的权重与结构不符：{'；'.join(problems)}；请检查文件是否完整、config.json 是否配套"
            )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)  # Linear、Embedding：N(0, initializer_range)；RMSNorm：1
        if isinstance(module, BaichuanHead):
            if self.config.norm_head:
                init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            else:
                init.normal_(module.weight, std=self.config.initializer_range)


class BaichuanModel(BaichuanPreTrainedModel):
    """词嵌入、各层与最后的归一化；输出隐藏状态。"""

    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        self.embed_tokens = BaichuanEmbedding(config)
        self.layers = nn.ModuleList(BaichuanDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = BaichuanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.checkpoint_every = 1  # 重算第 0、n、2n… 层；0 表示只重算各层的注意力
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        document_lengths: list[int] | None = None,
        document_parents: list[int] | None = None,
        output_rows: Tensor | None = None,
        cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """前向。

        Args:
            input_ids: [b, L]；或用 inputs_embeds [b, L, H]。
            attention_mask: 见 allowed_mask；长度含 past。
            position_ids: [b, L]；缺省按 attention_mask 数出（左填充也对），并排样本各自从头数。
            past_key_values: transformers 的 Cache。训练与并排时视为固定的前缀（P-Tuning）：不追加，不返回。
            document_lengths: 并排的各段的长度（此时 b = 1，L 为其和）；各段只看自己与它的父段。
            document_parents: 各段的父段（在它之前，自成开头）：位置接着它数；-1 表示没有。缺省都没有。
            output_rows: [N]，只要展平后的这些行（如目标行）：最后一层的注意力之后只算它们，输出是 [1, N, H]；
                要 output_hidden_states 或 output_attentions 时不可用。

        Raises:
            ValueError: input_ids 与 inputs_embeds 没有恰好给一个，或 document_lengths 与输入不符。
        """
        past_key_values = chosen_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids 与 inputs_embeds 必须恰好给一个")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if document_lengths is not None and (
            len(hidden_states) != 1 or sum(document_lengths) != hidden_states.shape[1]
        ):
            raise ValueError(
                f"并排的输入必须是 [1, {sum(document_lengths)}]（document_lengths 之和），"
                f"得到 {list(hidden_states.shape[:2])}"
            )
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )

        if document_lengths is not None and document_parents is None:
            document_parents = [-1] * len(document_lengths)

        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        prefixes = None
        if document_lengths is not None or self.training:
            # 训练时前缀以普通张量交给各层：重算（gradient checkpointing）不会把它追加两次
            if past_length:
                prefixes = [(layer.keys, layer.values) for layer in past_key_values.layers]
            past_key_values = None
        elif past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()

        context = self._attention_context(
            hidden_states,
            attention_mask,
            position_ids,
            past_length,
            document_lengths,
            document_parents,
            bool(output_attentions),
        )
        all_hidden_states, all_attentions = [], []
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            prefix = (None, None) if prefixes is None else prefixes[index]
            rows = output_rows if layer is self.layers[-1] else None
            if self._checkpoints(index, layer, hidden_states, prefix[0]):
                checkpoint = self._gradient_checkpointing_func
                if self.checkpoint_every:
                    run = partial(checkpoint, layer.__call__)
                else:
                    run = partial(layer, checkpoint_attention=checkpoint)
                hidden_states, attentions = run(hidden_states, context, None, *prefix, rows)
            else:
                hidden_states, attentions = layer(hidden_states, context, past_key_values, *prefix, rows)
            all_attentions.append(attentions)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache is not False else None,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )

    def _checkpoints(self, index: int, layer: nn.Module, hidden_states: Tensor, prefix_key: Tensor | None) -> bool:
        """这一层要不要重算：只有会被反向经过的层才值得（freeze 的底层没有计算图，不必重算）。"""
        if not (self.gradient_checkpointing and self.training) or index % max(1, self.checkpoint_every):
            return False
        needs_graph = hidden_states.requires_grad or (prefix_key is not None and prefix_key.requires_grad)
        return needs_graph or any(parameter.requires_grad for parameter in layer.parameters())

    def _attention_context(
        self,
        hidden_states,
        attention_mask,
        position_ids,
        past_length,
        document_lengths,
        document_parents,
        output_attentions,
    ) -> AttentionContext:
        """位置与偏置。hidden_states [b, L, H] 只用来取形状、类型与设备。"""
        device, dtype, length = hidden_states.device, hidden_states.dtype, hidden_states.shape[1]
        is_rope = self.config.position_embedding == "rope"
        if document_lengths is not None:  # 各段在它的样本里的起止
            begins = [document_lengths[parent] if parent >= 0 else 0 for parent in document_parents]
            spans = [(begin, begin + n) for begin, n in zip(begins, document_lengths, strict=True)]

        rotary = None
        if is_rope:
            if document_lengths is not None and position_ids is None:
                position_ids = torch.cat([torch.arange(*span) for span in spans])[None].to(device) + past_length
            elif position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
                position_ids = counted_positions(attention_mask)[:, -length:]
            elif position_ids is None:
                position_ids = torch.arange(past_length, past_length + length, device=device)[None]
            rotary = rotary_tables(position_ids, self.config.head_dim)
            if not self.config.norm_head:  # Baichuan-7B 在半精度里旋转，Baichuan2-7B 在 fp32 里
                rotary = tuple(table.to(dtype) for table in rotary)

        if document_lengths is not None:
            documents = document_lengths, document_parents
            slopes = None if is_rope else alibi_slopes(self.config.num_attention_heads)
            layout = layout_on_gpu(*documents, past_length, device, dtype, self.config.head_dim, slopes)
            if layout is not None:
                return AttentionContext(rotary, None, False, *documents, layout=layout)
            # 整包只需要最长样本那么大的一块偏置，各段按它的位置裁取
            longest = max(end for _, end in spans)
            needs_bias = not is_rope or past_length > 0 or max(document_parents) >= 0 or device.type == "cpu"
            bias = self._bias(None, longest, past_length + longest, device, dtype)[0] if needs_bias else None
            return AttentionContext(rotary, bias, bias is None, document_lengths, document_parents)

        if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.is_floating_point():
            # 已是加性掩码
            return AttentionContext(rotary, attention_mask.to(dtype), False, output_attentions=output_attentions)
        if attention_mask is not None and not self.training and bool((attention_mask == 1).all()):
            attention_mask = None  # 没有填充：注意力可以走不带掩码的快路
        if is_rope and attention_mask is None and not output_attentions and (past_length == 0 or length == 1):
            return AttentionContext(rotary, None, length > 1)
        bias = self._bias(attention_mask, length, past_length + length, device, dtype)
        # SDPA 的反向由 logsumexp 重算概率，全被遮住的行会差 kv 倍
        is_exact = bool(self.training and self.config.z_loss_weight) and attention_mask is not None
        return AttentionContext(rotary, bias, False, output_attentions=output_attentions, is_exact=is_exact)

    def _bias(self, attention_mask, query_length: int, key_length: int, device, dtype) -> Tensor:
        """ALiBi 与掩码之和，[b | 1, heads | 1, q, kv]；看不到的位置是该类型的最小值（全被遮住的填充行不会出 NaN）。"""
        allowed = allowed_mask(
            attention_mask, query_length, key_length, device, self.config.position_embedding == "rope"
        )
        allowed = allowed[None, None] if allowed.dim() == 2 else allowed
        lowest = torch.finfo(dtype).min
        if self.config.position_embedding == "rope":
            return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, lowest)
        slopes = alibi_slopes(self.config.num_attention_heads).to(device)[:, None, None]
        if attention_mask is not None and attention_mask.dim() == 2:
            distances = counted_positions(attention_mask)[:, None, None, :].float()
        else:
            distances = torch.arange(key_length, device=device, dtype=torch.float32)[None, None, None]  # 键的位置 j
        if self.config.norm_head:
            # Baichuan2 用 j - i，Baichuan 用 j：softmax 相同，半精度的舍入不同，各随其官方形式
            distances = distances - distances[..., -query_length:].transpose(-1, -2)
        past_length = key_length - query_length
        future = torch.ones(query_length, key_length, dtype=torch.bool, device=device).triu(past_length + 1)
        return (slopes * distances).to(dtype).masked_fill(~allowed, lowest).masked_fill_(future, float("-inf"))

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value


class BaichuanForCausalLM(BaichuanPreTrainedModel, GenerationMixin):
    """带词表投影与损失的 Baichuan。"""

    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.lm_head = BaichuanHead(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError(
            "Baichuan 的词表不能改变大小：词表投影按行归一化，官方的 id 也是固定的；加新词请用 --add_tokens"
        )

    def add_rows(self, first: int, embedding: Tensor, head: Tensor):
        """新词的行：从 first 号起的 n 个词用 embedding、head（各 [n, H]，head 是归一化之前的），各成一个参数。"""
        for module, rows in ((self.model.embed_tokens, embedding), (self.lm_head, head)):
            module.first_added, module.added_rows = first, nn.Parameter(rows)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_lengths: list[int] | None = None,
        document_parents: list[int] | None = None,
        target_rows: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        return_logits: bool | None = None,
        row_losses: bool = False,
        return_dict: bool | None = None,
        cache=None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """前向；labels [b, L] 未移位，移位只在这里发生一次。

        损失是各目标 token 交叉熵之和除以 num_items_in_batch（缺省为本批的目标数）。训练模式下只有目标行进入词表投影，
        logits 为 None；评估模式，或 return_logits=True 时，给出完整的 logits [b, L, V]。

        Args:
            target_rows: [N]，展平后的行号 t，其下一个 label 是目标；由 batching.collate 在主机上算好，
                免去设备同步；缺省由 labels 算出。
            row_losses: 损失是各目标行的交叉熵 [N]，依 target_rows 的次序，不求和也不除；不含 z_loss。
            logits_to_keep: 只算最后几行（或给定下标）的 logits，generate() 用。
            其余见 BaichuanModel.forward。
        """
        if return_logits is None:
            return_logits = labels is None or not self.training
        next_labels = None
        if labels is not None:  # 第 t 行的目标是第 t+1 个 label
            next_labels = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()
            # 提示放在词嵌入处时（P-Tuning 第 1 版），主机上按原来的长度算好的行号不对
            if target_rows is None or inputs_embeds is not None:
                target_rows = (next_labels != IGNORE_INDEX).nonzero()[:, 0]
        needs_all_rows = return_logits or output_hidden_states or output_attentions
        is_loss_only = not (needs_all_rows or (self.config.z_loss_weight and not row_losses))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=chosen_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            document_lengths=document_lengths,
            document_parents=document_parents,
            output_rows=target_rows if is_loss_only else None,
        )
        hidden_states = outputs.last_hidden_state

        logits = loss = None
        if return_logits:
            rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states if labels is not None else hidden_states[:, rows])
        if labels is not None:
            num_items = max(1, len(target_rows)) if num_items_in_batch is None else num_items_in_batch
            targets = next_labels[target_rows]
            rows = None if is_loss_only else target_rows  # 只要损失时，模型的输出已经只有目标行
            if row_losses:
                loss = self.lm_head(take_rows(hidden_states, rows)[0], targets, by_row=True)
            else:
                loss = self._loss(hidden_states, logits, targets, rows, num_items)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result.to_tuple() if return_dict is False else result

    def _loss(self, hidden_states, logits, targets, target_rows, num_items) -> Tensor:
        """标量 fp32；z_loss_weight 不为 0 时需要所有行的 logits。target_rows 为 None：hidden_states 只有目标行。"""
        if logits is None and not self.config.z_loss_weight:
            return self.lm_head(take_rows(hidden_states, target_rows)[0], targets) / num_items
        if logits is None:
            logits = self.lm_head(hidden_states)
        row_logits = logits.flatten(0, 1)[target_rows].float()
        loss = nn.functional.cross_entropy(row_logits, targets, reduction="sum") / num_items
        if self.config.z_loss_weight:
            largest = logits[:, :-1].float().amax(dim=-1)
            share = len(target_rows) / num_items  # 各微批按目标数加权，合起来仍是平均
            loss = loss + self.config.z_loss_weight * share * largest.square().mean()
        return loss


__all__ = ["BaichuanForCausalLM", "BaichuanModel", "BaichuanPreTrainedModel"]
