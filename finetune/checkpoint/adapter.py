"""适配器的两个文件：配置与张量。张量必须恰好是配置在这个基座上要的那些，否则 peft 会悄悄只读进一部分。"""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft import __version__ as peft_version
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from baichuan import BaichuanConfig
from finetune.checkpoint.output_dir import ADAPTER_CONFIG, RUN_CONFIG
from finetune.checkpoint.weights import WRAPPER_PARTS, WeightFile
from utils import read_json, shown

# 后一个是 peft 0.7 以前的
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PROMPT_TYPES = ("PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING")
PEFT_TYPES = ("LORA", *PROMPT_TYPES)
PREFIX = "base_model.model."
# peft 在名字中间加的一段；存适配器时本该去掉
PEFT_PARTS = {"modules_to_save", "default"}
# 这样初始化的适配器改写过基座，或要在读进来时再算一次
PLAIN_INITS = (True, False, "gaussian", None)
# 不改变适配器的函数，第二阶段训练可以不同
FREE_FIELDS = {
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode", "task_type"),
    *("lora_dropout", "megatron_core", "qalora_group_size", "encoder_dropout", "ensure_weight_tying"),
    *("encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type", "init_lora_weights"),
    # 与基座相配由 prompt_problems 核对
    *("num_layers", "token_dim", "num_attention_heads", "num_transformer_submodules"),
}
FLAGS = {
    **{"r": "--lora_dim", "lora_alpha": "--lora_alpha", "target_modules": "--lora_module_name"},
    **{"num_virtual_tokens": "--pre_seq_len", "prefix_projection": "--prefix_projection"},
    **{"use_rslora": "--use_rslora", "use_dora": "--use_dora"},
    "peft_type": "--train_type、--ptuning_version",
}


class AdapterPlan(NamedTuple):
    """一个适配器的配置在一个基座上要的：张量的形状；LoRA 各模块的缩放。"""

    shapes: dict[str, tuple[int, ...]]
    scalings: dict[str, float]


def adapter_weights(path: Path) -> Path:
    """适配器的权重文件，safetensors 优先。

    Raises:
        ValueError: 没有。
    """
    for name in ADAPTER_WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path} 有 {ADAPTER_CONFIG}，却没有 {' 或 '.join(ADAPTER_WEIGHTS)}：适配器不完整，请换一个检查点")


def is_set(value: Any) -> bool:
    """配置里的一个值起不起作用：null、false、空的都不起。"""
    return value is not None and value is not False and value not in ("", [], {}, ())


def read_adapter_config(path: str | Path) -> PeftConfig:
    """适配器的配置。

    Raises:
        ValueError: 不是认识的种类，或有 peft 不认识而起作用的设置（peft 会悄悄丢掉它）。
    """
    file = Path(path) / ADAPTER_CONFIG
    content = read_json(file)
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if kind not in PEFT_TYPES:
        raise ValueError(f"{file} 的 peft_type 是 {shown(kind)}，只支持 {'、'.join(PEFT_TYPES)}，请换一个适配器")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(config_class)}
    unknown = [f"{name}={shown(value)}" for name, value in content.items() if name not in known and is_set(value)]
    if unknown:
        raise ValueError(
            f"{file} 的 {'、'.join(unknown)} 是 peft {peft_version} 不认识的设置，不能当作没有；"
            "请用写出它的 peft 版本，或换一个适配器"
        )
    try:
        config = config_class(**{name: value for name, value in content.items() if name in known})
        config.inference_mode = True
    except Exception as error:  # 内容来自外面，peft 对坏的值抛各种异常
        raise ValueError(f"{file} 损坏，请重新下载：{error}") from error
    numbers = ("r",) if kind == "LORA" else ("num_virtual_tokens",)
    bad = [name for name in numbers if type(getattr(config, name)) is not int or getattr(config, name) < 1]
    if bad:
        raise ValueError(f"{file} 的 {bad[0]} 应为正整数，实际是 {shown(getattr(config, bad[0]))}，请重新下载")
    return config


def canonical_name(name: str) -> str:
    """peft 存下的张量名：去掉各种包装与适配器的名字 default，补上 base_model.model.。"""
    result = ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS | PEFT_PARTS)
    return result if result.startswith((PREFIX, "prompt_")) else PREFIX + result


class AdapterFile(WeightFile):
    """一个适配器的张量，名字是 peft 的（见 canonical_name）。"""

    def __init__(self, path: Path):
        super().__init__(adapter_weights(path), canonical_name)

    def read_all(self) -> dict[str, Tensor]:
        return {name: self.read(name) for name in self.names}


def plan_adapter(path: Path, config: BaichuanConfig) -> AdapterPlan:
    """适配器的配置在这个基座（也可以是 LlamaConfig）上要的张量，由 peft 自己在没有存储的模型上造出来。

    Raises:
        ValueError: 这个配置不能用在这个基座上。
    """
    adapter, file = read_adapter_config(path), path / ADAPTER_CONFIG
    if adapter.peft_type in PROMPT_TYPES:
        problems = prompt_problems(adapter, config)
        if problems:
            raise ValueError(f"{file} 与基座不相配：{'；'.join(problems)}，请用 --base_model_path 给出训练时的基座")
        is_prefix = adapter.peft_type == "PREFIX_TUNING"
        width = config.hidden_size * (2 * config.num_hidden_layers if is_prefix else 1)
        return AdapterPlan({"prompt_embeddings": (adapter.num_virtual_tokens, width)}, {})
    on_head = [name for name in _names(adapter.target_modules) if name.split(".")[-1] == "lm_head"]
    if on_head:
        raise ValueError(
            f"{file} 的 target_modules 有 {on_head[0]}：本项目的词表投影（NormHead）不是 nn.Linear，上面不能有 LoRA，"
            "请用只套在各层上的适配器"
        )
    plain = copy.deepcopy(adapter)
    plain.init_lora_weights = True
    try:
        with torch.device("meta"):
            model = get_peft_model(AutoModelForCausalLM.from_config(config), plain, autocast_adapter_dtype=False)
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        }
    except Exception as error:  # 内容来自外面，peft 对配不上的设置抛各种异常
        is_llama = "q_proj" in str(adapter.target_modules) and config.model_type != "llama"
        remedy = (
            "；这是 Llama 布局的适配器，请先用 scripts/export.py --from llama --to baichuan 转换" if is_llama else ""
        )
        raise ValueError(f"{file} 不能用在这个基座上：{error}{remedy}") from error
    scalings = {
        name.removeprefix(PREFIX): module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    return AdapterPlan(shapes, scalings)


def _names(modules: Any) -> list[str]:
    return [modules] if isinstance(modules, str) else sorted(modules or ())


def prompt_problems(adapter: PeftConfig, config: BaichuanConfig) -> list[str]:
    """P-Tuning 适配器记下的尺寸与基座不同的地方。"""
    expected = {
        "num_layers": config.num_hidden_layers,
        "token_dim": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_transformer_submodules": 1,
    }
    return [
        f"{name} 是 {shown(getattr(adapter, name))}，基座是 {value}"
        for name, value in expected.items()
        if getattr(adapter, name) not in (None, value)
    ]


def check_adapter(path: str | Path, config: BaichuanConfig) -> AdapterPlan:
    """适配器的张量恰好是它的配置在这个基座上要的；只读文件头。

    Raises:
        ValueError: 缺少、多出或形状不符的张量（各有多少，列出两个），或配置不能用在这个基座上。
    """
    path = Path(path)
    plan, file = plan_adapter(path, config), AdapterFile(path)
    missing = sorted(plan.shapes.keys() - file.names)
    extra = sorted(file.stored[name] for name in file.names - plan.shapes.keys())
    problems = []
    if missing:
        problems.append(f"缺少 {len(missing)} 个（共 {len(plan.shapes)} 个），如 {missing[:2]}")
    if extra:
        problems.append(f"多出 {len(extra)} 个，如 {extra[:2]}")
    problems += [
        f"{name} 的形状是 {file.shape(name)}，应为 {plan.shapes[name]}"
        for name in sorted(plan.shapes.keys() & file.names)
        if file.shape(name) != plan.shapes[name]
    ][:2]
    if problems:
        raise ValueError(
            f"适配器 {path} 的张量不是它的配置在这个基座上要的那些：{'；'.join(problems)}；"
            "请检查基座是不是训练时的那个、适配器有没有存完整"
        )
    return plan


def check_second_stage(path: Path, model: PeftModel, words: Sequence[str] = ()):
    """从已有的适配器接着训练（--adapter_path）：配置与 model 的、新词与 words 相同，张量恰好是 model 要的；只读文件头。

    Raises:
        ValueError: 不同之处全部列出。
    """
    current = model.active_peft_config
    problems = second_stage_problems(path, current)
    trained = read_json(path / RUN_CONFIG).get("added_tokens") if (path / RUN_CONFIG).is_file() else None
    if trained and trained != list(words):
        problems.append(f"新词（--add_tokens）：适配器有 {len(trained)} 个，如 {trained[:3]}，现在是 {list(words[:3])}")
    if problems:
        raise ValueError(
            f"--adapter_path {path} 与现在的参数不符：{'；'.join(problems)}；请改成一样的。"
            "没有对应参数的，先用 scripts/merge_lora.py 合并进基座再训练（合并不了的，请在写出它的工具里合并）"
        )
    check_adapter(path, model.get_base_model().config)


def second_stage_problems(path: Path, current: PeftConfig) -> list[str]:
    """从已有的适配器接着训练（--adapter_path）时，它的配置里会改变函数、而现在的方法没有的设置。"""
    saved = read_adapter_config(path)
    if saved.peft_type != current.peft_type:
        return [f"peft_type（{FLAGS['peft_type']}）：适配器是 {saved.peft_type}，现在是 {current.peft_type}"]
    problems = []
    for field in dataclasses.fields(current):
        before, now = getattr(saved, field.name), getattr(current, field.name)
        is_same = before == now or not (is_set(before) or is_set(now))
        if field.name == "target_modules":
            is_same = set(_names(before)) == set(_names(now))
        if is_same or field.name in FREE_FIELDS:
            continue
        flag = f"（{FLAGS[field.name]}）" if field.name in FLAGS else ""
        problems.append(f"{field.name}{flag}：适配器是 {shown(before)}，现在是 {shown(now)}")
    if getattr(saved, "init_lora_weights", None) not in PLAIN_INITS:
        problems.append(f"init_lora_weights：适配器是 {shown(saved.init_lora_weights)}，它改写过基座")
    if getattr(current, "prefix_projection", False):
        problems.append("prefix_projection 的 MLP 没有存在适配器里，只能不带 --prefix_projection 接着训练")
    return problems
