"""Baichuan 与 Baichuan2（7B、13B）的原生实现；导入本包即向 transformers 的 Auto 类注册，不执行检查点自带的代码。"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from baichuan.configuration_baichuan import BaichuanConfig
from baichuan.modeling_baichuan import BaichuanForCausalLM, BaichuanModel
from baichuan.tokenization_baichuan import BaichuanTokenizer

AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
AutoTokenizer.register(BaichuanConfig, BaichuanTokenizer, exist_ok=True)

__all__ = ["BaichuanConfig", "BaichuanForCausalLM", "BaichuanModel", "BaichuanTokenizer"]
