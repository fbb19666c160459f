"""BaichuanConfig：四种结构（7B/13B × Baichuan/Baichuan2）共用的配置，键名与官方 config.json 相同。"""

from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

POSITION_EMBEDDINGS = ("rope", "alibi")


class BaichuanConfig(PreTrainedConfig):
    """Baichuan 与 Baichuan2 的结构参数。

    官方四种检查点的 model_type 都是 "baichuan"，结构由两个自有键说明；缺省时按官方键推断，保存时总会写出：

    - position_embedding: "rope"（7B）| "alibi"（13B）。有 max_position_embeddings 即 rope，
      只有 model_max_length 即 alibi。
    - norm_head: 词表投影前是否把权重按行归一化（Baichuan2）。词表 125696 为是，64000 为否；其他词表（裁剪过的、微型的）
      按 architectures 的拼写（BaiChuan… 是 Baichuan-7B）与长度键判断，判断不了的按否处理并警告。

    Raises:
        ValueError: position_embedding 不是上述两者之一，或 hidden_size 不能被 num_attention_heads 整除。
    """

    model_type = "baichuan"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  （transformers 的约定写法）

    vocab_size: int = 125696
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int | None = None
    model_max_length: int | None = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    z_loss_weight: float = 0.0
    position_embedding: str | None = None
    norm_head: bool | None = None

    def __post_init__(self, **kwargs):
        if self.position_embedding is None:
            only_model_max_length = self.max_position_embeddings is None and self.model_max_length is not None
            self.position_embedding = "alibi" if only_model_max_length else "rope"
        if self.norm_head is None:
            self.norm_head = self._infer_norm_head(kwargs.get("architectures") or self.architectures or [])
        if not isinstance(self.norm_head, bool):
            raise ValueError(f"norm_head={self.norm_head!r} 无效，只能是 true 或 false")
        if self.position_embedding not in POSITION_EMBEDDINGS:
            raise ValueError(
                f"position_embedding={self.position_embedding!r} 无效，可选：{' | '.join(POSITION_EMBEDDINGS)}"
            )
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act={self.hidden_act!r} 不支持，Baichuan 只用 silu")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size({self.hidden_size}) 必须能被 num_attention_heads({self.num_attention_heads}) 整除，"
                "请检查 config.json"
            )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # from_pretrained(..., norm_head=True) 的值要在推断与检查之前生效
        own = {name: kwargs.pop(name) for name in ("position_embedding", "norm_head") if name in kwargs}
        return super().from_dict({**config_dict, **own}, **kwargs)

    def _infer_norm_head(self, architectures: list[str]) -> bool:
        if self.vocab_size == 125696:
            return True
        if self.vocab_size == 64000 or any(name.startswith("BaiChuan") for name in architectures):
            return False
        if self.max_position_embeddings is not None:  # 只有 Baichuan2-7B 同时写了两个长度键
            return self.model_max_length is not None
        if self.model_max_length is not None:
            logger.warning_once(
                f"config.json 没有 norm_head，词表大小 {self.vocab_size} 也看不出是 Baichuan 还是 Baichuan2："
                '按 norm_head=false 处理；若是 Baichuan2，请在 config.json 写入 "norm_head": true'
            )
        return False

    @property
    def head_dim(self) -> int:
        """每个注意力头的宽度。"""
        return self.hidden_size // self.num_attention_heads

    @property
    def trained_length(self) -> int:
        """预训练时的最大长度（token 数）；两种长度键都没有时取官方的 4096。"""
        return self.model_max_length or self.max_position_embeddings or 4096


__all__ = ["BaichuanConfig"]
