"""Baichuan 与 Baichuan2（7B、13B）的原生实现；导入本包即向 transformers 的 Auto 类注册，不执行检查点自带的代码。"""

import logging

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from baichuan.configuration_baichuan import BaichuanConfig
from baichuan.modeling_baichuan import BaichuanForCausalLM, BaichuanModel
from baichuan.tokenization_baichuan import BaichuanTokenizer

AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
AutoTokenizer.register(BaichuanConfig, BaichuanTokenizer, exist_ok=True)

# peft 装着 bitsandbytes 就导入它，它在一些 CPU 上提示没有只用于推理的算子；须在导入 peft 之前
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__all__ = ["BaichuanConfig", "BaichuanForCausalLM", "BaichuanModel", "BaichuanTokenizer"]
