"""写 llama.cpp 的 GGUF 文件（架构 "baichuan"），含分词器与对话模板；张量一个个写，也能一个个读回来核对。

llama.cpp 只凭层数认 Baichuan 的位置编码：32 层是旋转位置（7B），40 层是 ALiBi（13B）。
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from baichuan import BaichuanConfig, BaichuanTokenizer
from finetune.data.prompting import Prompting
from finetune.export.fast_tokenizer import PIECE_TYPES, added_words, chat_template, read_model_proto
from finetune.export.tensors import ALL_ROWS, TensorSource, normalized_head, row_parts
from finetune.terminal import watched

# --gguf_type → 核对的精度名
GGUF_TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}
LAYERS_OF_POSITIONS = {"rope": 32, "alibi": 40}
GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
PACKED_NAMES = ("attn_q.weight", "attn_k.weight", "attn_v.weight")


def import_gguf():
    """gguf 库；没有安装时抛 ValueError，写明安装命令。"""
    try:
        import gguf
    except ImportError as error:
        raise ValueError("导出 GGUF 需要 gguf 库，请运行 pip install gguf") from error
    return gguf


def check_gguf(config: BaichuanConfig, gguf_type: str):
    """在读权重之前检查能不能导出。

    Raises:
        ValueError: 层数不是 llama.cpp 认得的，或 q8_0 的行宽不是 32 的倍数，或没有 gguf 库。
    """
    expected = LAYERS_OF_POSITIONS[config.position_embedding]
    if config.num_hidden_layers != expected:
        is_rope = config.position_embedding == "rope"
        raise ValueError(
            "llama.cpp 只凭层数认 Baichuan 的位置编码：32 层是旋转位置（7B），40 层是 ALiBi（13B）；这个模型是 "
            f"{config.position_embedding}、{config.num_hidden_layers} 层，导出后位置编码会错，只接受 {expected} 层。"
            f"可以改用 {'--to baichuan，或 --to llama' if is_rope else 'predict.py --serve（不导出）'}"
        )
    narrow = [width for width in (config.hidden_size, config.intermediate_size) if width % 32]
    if gguf_type == "q8_0" and narrow:
        raise ValueError(f"q8_0 每 32 个数一组，行宽 {narrow[0]} 不是 32 的倍数，请用 --gguf_type f16")
    import_gguf()


def permute_rows(weight: Tensor, num_heads: int) -> Tensor:
    """q 或 k [H, H] 的行从「前半、后半」改排成 llama.cpp 旋转位置用的相邻两行一对；各头内部进行。

    13B 没有旋转位置，q 与 k 同样改排后分数不变，llama.cpp 的转换脚本也是这样做的。
    """
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def unpermute_rows(weight: Tensor, num_heads: int) -> Tensor:
    """permute_rows 的逆。"""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def gguf_names(name: str) -> list[str]:
    """官方张量名 → GGUF 里的名字；W_pack 是 q、k、v 三个。"""
    if name in GLOBAL_NAMES:
        return [GLOBAL_NAMES[name]]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    if rest == "self_attn.W_pack.weight":
        return [f"blk.{layer}.{packed}" for packed in PACKED_NAMES]
    return [f"blk.{layer}.{LAYER_NAMES[rest]}"]


def gguf_tensors(config: BaichuanConfig, name: str, tensor: Tensor) -> list[Tensor]:
    """官方张量 → GGUF 里的张量，次序同 gguf_names；fp32，词表投影已归一化。"""
    if not name.endswith("W_pack.weight"):
        return [normalized_head(config, name, tensor)]
    query, key, value = tensor.chunk(3)
    return [*(permute_rows(part, config.num_attention_heads) for part in (query, key)), value]


def write_gguf(
    source: TensorSource, tokenizer: BaichuanTokenizer, prompting: Prompting, path: Path, gguf_type: str, name: str
):
    """写一个 GGUF 文件；向量总是 f32，矩阵是 gguf_type。内存里至多一个张量。"""
    gguf = import_gguf()
    types = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    quantization = gguf.GGMLQuantizationType[types[gguf_type]]
    writer = gguf.GGUFWriter(path, "baichuan")
    _add_hyperparameters(writer, source.config, name, gguf.LlamaFileType[file_types[gguf_type]])
    _add_tokenizer(writer, gguf, tokenizer, prompting, source.config.vocab_size)

    def kind_of(shape: tuple[int, ...]):
        return quantization if len(shape) > 1 else gguf.GGMLQuantizationType.F32

    for gguf_name, shape in _tensor_shapes(source):
        kind = kind_of(shape)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        num_bytes = int(np.prod(shape)) // block * block_bytes
        writer.add_tensor_info(gguf_name, shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for official in watched(source.names, "写权重", "个"):
            quantized: list[list[np.ndarray]] = [[] for _ in gguf_names(official)]
            for rows in row_parts(official, source.shapes[official]):
                tensors = gguf_tensors(source.config, official, source.read(official, rows))
                for parts, tensor in zip(quantized, tensors, strict=True):
                    if gguf_type == "f16" and not tensor.abs().max() <= torch.finfo(torch.float16).max:
                        raise ValueError(
                            f"{official} 有 f16 放不下的数，或来源就有 NaN；前者请换 --gguf_type bf16 或 f32"
                        )
                    parts.append(gguf.quants.quantize(tensor.contiguous().numpy(), kind_of(tensor.shape)))
            for parts in quantized:
                writer.write_tensor_data(parts[0] if len(parts) == 1 else np.concatenate(parts))
    finally:
        writer.close()


def _tensor_shapes(source: TensorSource) -> Iterator[tuple[str, tuple[int, ...]]]:
    """GGUF 里各张量的名字与形状（行在前），次序与写的次序相同。"""
    for name in source.names:
        rows, *rest = source.shapes[name]
        names = gguf_names(name)
        for gguf_name in names:
            yield gguf_name, (rows // len(names), *rest)


def _add_hyperparameters(writer, config: BaichuanConfig, name: str, file_type):
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_tensor_data_layout("Meta AI original pth")
    writer.add_context_length(config.trained_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer, gguf, tokenizer: BaichuanTokenizer, prompting: Prompting, vocab_size: int):
    """sentencepiece 的片段、得分与类型，接着是加入的新词（自定义片段）；模型词表比片段多的部分补成不用的片段。

    保留片段（含角色片段）作控制符号。不解析特殊符号时（llama_tokenize 的 parse_special 为假）它们按普通字符编码，
    同 encode_plain；对话的接口把模板拼好的整段文字连特殊符号一起解析，用户文本里的 <reserved_106> 因此成了角色。
    v1 在句首加空格，llama.cpp 会在每个自定义片段之后再加一次，所以 v1 的自定义片段作普通片段（单个字符的不受影响）。
    """
    proto = read_model_proto(tokenizer)
    kinds = {number: gguf.TokenType[kind.upper()] for kind, number in PIECE_TYPES.items()}
    add_prefix = proto.normalizer_spec.add_dummy_prefix
    if add_prefix:
        kinds[PIECE_TYPES["user_defined"]] = gguf.TokenType.NORMAL
    pieces = [piece.piece.encode() for piece in proto.pieces]
    scores = [piece.score for piece in proto.pieces]
    types = [
        gguf.TokenType.CONTROL if index in tokenizer.reserved_ids else kinds[piece.type]
        for index, piece in enumerate(proto.pieces)
    ]
    words = added_words(tokenizer)
    pieces += [word.encode() for word in words]
    scores += [0.0] * len(words)
    types += [gguf.TokenType.USER_DEFINED] * len(words)
    num_padding = vocab_size - len(pieces)
    pieces += [f"[PAD{index}]".encode() for index in range(num_padding)]
    scores += [-1000.0] * num_padding
    types += [gguf.TokenType.UNUSED] * num_padding
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(add_prefix)
    writer.add_chat_template(chat_template(tokenizer, prompting))


class GgufFile:
    """读回 GGUF 文件的张量，名字与排列还原成官方的。"""

    def __init__(self, path: Path, num_heads: int):
        self._gguf = import_gguf()
        self._path = path
        # 只留位置，不留 GGUFReader 的内存映射：读过的页会一直算在进程的内存里
        self._tensors = {
            tensor.name: (int(tensor.data_offset), int(tensor.n_bytes), tensor.tensor_type, tensor.shape.tolist())
            for tensor in self._gguf.GGUFReader(path).tensors
        }
        self._num_heads = num_heads

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """官方名字 → fp32 张量的这些行。"""
        names = gguf_names(name)
        if len(names) == 1:
            return self._dequantized(names[0], rows)
        *first, value = (self._dequantized(gguf_name, ALL_ROWS) for gguf_name in names)
        return torch.cat([*(unpermute_rows(part, self._num_heads) for part in first), value])[rows]

    def _dequantized(self, gguf_name: str, rows: slice) -> Tensor:
        offset, num_bytes, kind, shape = self._tensors[gguf_name]
        num_rows, *width = shape[::-1]  # GGUF 的形状是列在前
        begin, end, _ = rows.indices(num_rows)
        row_bytes = num_bytes // num_rows
        content = np.fromfile(
            self._path, dtype=np.uint8, count=(end - begin) * row_bytes, offset=offset + begin * row_bytes
        )
        content = content.reshape(end - begin, -1) if width else content
        return torch.from_numpy(self._gguf.quants.dequantize(content, kind)).reshape(end - begin, *width)
