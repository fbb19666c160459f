"""合并与导出共用：按官方张量名逐个读任何检查点（LoRA 当场合并），写官方布局的目录。

内存里至多一个张量：权重一个个读，当场写，大的几行几行地变换。
"""

import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import LlamaConfig

from baichuan import BaichuanConfig, BaichuanForCausalLM
from finetune.checkpoint.adapter import PLAIN_INITS, PREFIX, AdapterFile, check_adapter, is_set
from finetune.checkpoint.inspection import Checkpoint, inspect_checkpoint
from finetune.checkpoint.output_dir import ADAPTER_CONFIG, RUN_CONFIG, TEMPORARY_PREFIX, choose_checkpoint
from finetune.checkpoint.weights import ShardedWriter, WeightFile, check_weights, model_files, model_name
from finetune.process.precision import NAMED_DTYPES
from finetune.terminal import watched
from utils import read_json, write_json

MAX_SHARD_BYTES = 5 * 10**9
# 读过这么多字节就重开文件：safetensors 是内存映射，读过的页一直算在进程的内存里
REOPEN_BYTES = 2 * 10**9
# 大的矩阵一次变换这么多个数（fp32 256 MiB）：7B 的词嵌入整个展开成 fp32 有 2 GB
ELEMENTS_AT_ONCE = 2**26
# 合并公式 V = W + 缩放 · B A（DoRA 另把 V 的各行缩放到训练出的大小）之外的设置；秩与缩放各模块可以不同
UNMERGEABLE = (
    *("modules_to_save", "fan_in_fan_out", "trainable_token_indices", "lora_bias", "use_qalora"),
    *("alora_invocation_tokens", "layer_replication", "target_parameters", "use_bdlora", "arrow_config"),
    *("kasa_config", "monteclora_config", "velora_config"),
)
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


Lora = dict[str, tuple[Tensor, Tensor, float]]  # 模块名 → (A [r, in], B [out, r], 缩放)


class CheckFailed(RuntimeError):
    """写出的结果与来源不一致；此时不留下目标目录。"""


# ---------------------------------------------------------------------------------------------------------------------
# 读

ALL_ROWS = slice(None)


def row_parts(name: str, shape: tuple[int, ...]) -> list[slice]:
    """一个官方张量分几次变换，各是哪些行；W_pack 要拆成 q、k、v，总是整个。"""
    if name.endswith("W_pack.weight"):
        return [ALL_ROWS]
    size = max(1, ELEMENTS_AT_ONCE // math.prod(shape[1:]))
    return [slice(begin, begin + size) for begin in range(0, shape[0], size)]


class WeightDirectory:
    """一个目录里的全部权重，按名字读；同一时刻只开着一个文件。"""

    def __init__(self, directory: Path):
        self._paths = {name: file.path for file in model_files(directory) for name in file.names}
        self._open: WeightFile | None = None
        self._bytes_read = 0

    @property
    def names(self) -> list[str]:
        """张量名。"""
        return list(self._paths)

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """一个张量的这些行，CPU，文件里的类型。"""
        path = self._paths[name]
        if self._open is None or self._open.path != path or self._bytes_read > REOPEN_BYTES:
            self._open, self._bytes_read = None, 0  # 先放开旧的映射
            self._open = WeightFile(path, model_name)
        tensor = self._open.read(name)[rows]
        self._bytes_read += tensor.numel() * tensor.element_size()
        return tensor


class TensorSource:
    """一个检查点的权重：完整模型原样，LoRA 合并进基座；按官方名字逐个给出 fp32 张量。

    names 是官方次序的张量名，shapes 是各自的形状，dtype 是基座自己的类型；
    lora 是 {模块名: (A [r, in], B [out, r], 缩放)}，magnitudes 是 DoRA 的 {模块名: 各行的大小 [out]}，都是 fp32。

    Raises:
        ValueError: 权重与 config.json 不符，或适配器与基座不相配、不能合并。
    """

    def __init__(self, checkpoint: Checkpoint):
        with torch.device("meta"):
            skeleton = BaichuanForCausalLM(checkpoint.config)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        check_weights(checkpoint.base_path, self.shapes)
        self.config, self.added = checkpoint.grown_config, checkpoint.added
        self.names = list(self.shapes)
        self._weights = WeightDirectory(checkpoint.base_path)
        self.dtype = self._weights.read(self.names[0]).dtype
        for name in self.added.rows if self.added else ():
            self.shapes[name] = (self.config.vocab_size, self.config.hidden_size)
        self.lora, self.magnitudes = {}, {}
        if checkpoint.is_adapter:
            self.lora, self.magnitudes = read_lora(checkpoint.path, checkpoint.config)

    def read_base(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """没有合并 LoRA 的张量的这些行，基座的类型；已接上新词。"""
        if self.added is None:
            return self._weights.read(name, rows)
        return self.added.grow(name, self._weights.read(name))[rows]

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """合并之后的张量的这些行，fp32：W + 缩放 · B A；DoRA 的各行再缩放到训练出的大小。"""
        weight = self.read_base(name, rows).float()
        adapter = self.lora.get(name.removesuffix(".weight"))
        if adapter is None:
            return weight
        lora_a, lora_b, scaling = adapter
        merged = torch.addmm(weight, lora_b[rows], lora_a, alpha=scaling)
        magnitude = self.magnitudes.get(name.removesuffix(".weight"))
        return merged if magnitude is None else merged * dora_factor(magnitude[rows], merged)


def dora_factor(magnitude: Tensor, merged: Tensor) -> Tensor:
    """DoRA：合并之后的权重各行要乘的系数 [out, 1]，训练出的大小除以现在的。"""
    return (magnitude / torch.linalg.vector_norm(merged, dim=1))[:, None]


def read_lora(path: Path, config: BaichuanConfig | LlamaConfig) -> tuple[Lora, dict[str, Tensor]]:
    """读 peft 的 LoRA 适配器 → ({模块名: (A, B, 缩放)}, DoRA 的 {模块名: 各行的大小})；config 是基座的，布局由它定。

    Raises:
        ValueError: 有合并公式之外的设置，或张量与基座不相配，或文件损坏。
    """
    settings = read_json(path / ADAPTER_CONFIG)
    unsupported = [f"{name}={settings[name]!r}" for name in UNMERGEABLE if is_set(settings.get(name))]
    if settings.get("bias", "none") != "none":
        unsupported.append(f"bias={settings['bias']!r}")
    if settings.get("init_lora_weights", True) not in PLAIN_INITS:
        unsupported.append(f"init_lora_weights={settings['init_lora_weights']!r}")
    if unsupported:
        raise ValueError(f"{path / ADAPTER_CONFIG} 的 {'、'.join(unsupported)} 不是本项目训练出的设置，不能合并")
    plan, file = check_adapter(path, config), AdapterFile(path)
    names = {f"{PREFIX}{module}.lora_{side}.weight" for module in plan.scalings for side in "AB"}
    magnitudes = {module: f"{PREFIX}{module}.lora_magnitude_vector" for module in plan.scalings}
    if settings.get("use_dora"):
        names |= set(magnitudes.values())
    if names != plan.shapes.keys():
        other = sorted(plan.shapes.keys() - names)
        raise ValueError(f"{path / ADAPTER_CONFIG} 要的 {other[:2]} 等 {len(other)} 个张量不是线性层的 LoRA，不能合并")
    lora = {
        module: (*(file.read(f"{PREFIX}{module}.lora_{side}.weight").float() for side in "AB"), scaling)
        for module, scaling in plan.scalings.items()
    }
    return lora, {module: file.read(name).float() for module, name in magnitudes.items() if name in names}


def open_checkpoint(path: str | Path, base_model_path: str | Path | None) -> Checkpoint:
    """检查点的说明；只读 JSON，核对基座的哈希。

    Raises:
        ValueError: 目录不对、基座找不到或被换过；或是 P-Tuning 等不能合并的适配器，说明原因与办法。
    """
    path = choose_checkpoint(path)
    if (path / ADAPTER_CONFIG).is_file():
        peft_type = read_json(path / ADAPTER_CONFIG).get("peft_type")
        if peft_type in ("PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING"):
            raise ValueError(
                f"{path} 是 P-Tuning 检查点（{peft_type}）：它训练的是附加在输入或各层之前的前缀，不是权重的改变，"
                "没有可以合并的矩阵。可以直接用 predict.py --model_path 推理，或用 peft 的 PeftModel 加载；"
                "要合并或导出，请改用 --train_type lora、freeze 或 full 训练"
            )
        if peft_type != "LORA":
            raise ValueError(f"{path} 的 peft_type 是 {peft_type!r}，只能合并 LORA")
    return inspect_checkpoint(path, base_model_path)


def resolve_dtype(requested: str, source: TensorSource) -> torch.dtype:
    """--dtype → torch 的类型；auto 是基座自己的。"""
    return source.dtype if requested == "auto" else NAMED_DTYPES[requested]


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 → "bfloat16"。"""
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------------------
# 写


@contextmanager
def staged_directory(output_dir: str | Path) -> Iterator[Path]:
    """先写同级的 .tmp- 目录，正常结束才改名成 output_dir；出错时删去，目标要么没有，要么完整。

    Raises:
        ValueError: output_dir 已有内容。
        OSError: 写盘失败（磁盘满、没有权限）。
    """
    target = Path(output_dir).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--output_dir {output_dir} 已有内容，不会覆盖，请换一个目录")
    staging = target.parent / f"{TEMPORARY_PREFIX}{target.name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in staging.iterdir():
            path.chmod(0o644)  # safetensors 建的文件只有属主可读，别的用户的推理服务也要读
        if target.is_dir():
            target.rmdir()
        staging.rename(target)
    except SafetensorError as error:  # safetensors 把磁盘满也报成自己的错误
        raise OSError(None, str(error), str(output_dir)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_tensors(
    source: TensorSource, directory: Path, dtype: torch.dtype, convert: Callable[[str, Tensor], dict[str, Tensor]]
) -> int:
    """把来源的张量逐个变换、舍入一次、写成 safetensors 分片，返回张量数。

    convert：(官方名字, fp32 张量的一些行) → {写出的名字: 张量}。
    """
    writer = ShardedWriter(directory, max_shard_bytes=MAX_SHARD_BYTES)
    for name in watched(source.names, "写权重", "个"):
        converted: dict[str, list[Tensor]] = {}
        for rows in row_parts(name, source.shapes[name]):
            for new_name, tensor in convert(name, source.read(name, rows)).items():
                rounded = tensor.to(dtype)
                if not rounded.isfinite().all():
                    raise ValueError(
                        f"{name} 有 {dtype_name(dtype)} 放不下的数（或来源就有 NaN），请换 --dtype bfloat16 或 float32"
                    )
                converted.setdefault(new_name, []).append(rounded)
        for new_name, parts in converted.items():
            writer.add(new_name, *parts)
    return writer.close()


def normalized_head(config: BaichuanConfig, name: str, tensor: Tensor) -> Tensor:
    """NormHead 的词表投影按行归一化（fp32）；别的张量原样。"""
    if name == "lm_head.weight" and getattr(config, "norm_head", False):
        return torch.nn.functional.normalize(tensor)
    return tensor


def write_baichuan(checkpoint: Checkpoint, source: TensorSource, directory: Path, dtype: torch.dtype, normalize: bool):
    """官方布局的目录：配置、分词器、生成配置、run_config.json（提示词格式等）与权重；normalize 时词表投影已归一化。"""

    def convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name: normalized_head(source.config, name, tensor) if normalize else tensor}

    base = checkpoint.base_path
    code_files = sorted(base.glob("*.py"))  # 官方目录自带的代码，我们从不执行
    for path in [base / name for name in (*TOKENIZER_FILES, "generation_config.json")] + code_files:
        if path.is_file():
            shutil.copyfile(path, directory / path.name)
    config = official_config(read_json(base / "config.json"), source.config, dtype)
    if not code_files:
        config.pop("auto_map", None)
    write_json(directory / "config.json", config)
    copy_added_words(checkpoint.path, directory)
    write_tensors(source, directory, dtype, convert)
    if checkpoint.run_config:
        write_json(directory / RUN_CONFIG, {**checkpoint.run_config, "merged_from": str(checkpoint.path)})


def copy_added_words(checkpoint: Path, directory: Path):
    """适配器的分词器比基座多的词（added_tokens.json）也带走，其余设置留着基座的。"""
    added, config = (directory / name for name in ("added_tokens.json", "tokenizer_config.json"))
    if not (checkpoint / added.name).is_file() or (checkpoint / "config.json").is_file():
        return
    shutil.copyfile(checkpoint / added.name, added)
    words = read_json(checkpoint / config.name).get("added_tokens_decoder")
    if words and config.is_file():
        write_json(config, {**read_json(config), "added_tokens_decoder": words})


def official_config(raw: dict[str, Any], config: BaichuanConfig, dtype: torch.dtype) -> dict[str, Any]:
    """官方键名的 config.json：架构名、长度键、torch_dtype 与官方四种检查点一致，自有的两个键也写明。"""
    is_rope, is_v2 = config.position_embedding == "rope", config.norm_head
    dropped = ("dtype", "max_position_embeddings", "model_max_length", "quantization_config")
    result = {key: value for key, value in raw.items() if key not in dropped}
    if is_rope:
        result["max_position_embeddings"] = config.max_position_embeddings or config.trained_length
    if is_v2 or not is_rope:
        result["model_max_length"] = config.model_max_length or config.trained_length
    prefix = "BaiChuan" if is_rope and not is_v2 else "Baichuan"
    result |= {
        "architectures": [f"{prefix}ForCausalLM"],
        "torch_dtype": dtype_name(dtype),
        "vocab_size": config.vocab_size,
        "position_embedding": config.position_embedding,
        "norm_head": is_v2,
    }
    return dict(sorted(result.items()))


# ---------------------------------------------------------------------------------------------------------------------
# 命令行


def run_command(main: Callable[[], None]) -> int:
    """命令行的外壳：只打印说明，不打印回溯；返回退出码（0 正常，1 写盘或核对失败，2 用法错误）。"""
    try:
        main()
    except ValueError as error:
        print(f"错误：\n{error}", file=sys.stderr)
        return 2
    except CheckFailed as error:
        print(f"错误：{error}", file=sys.stderr)
        return 1
    except OSError as error:
        reason = error.strerror or str(error)
        print(f"错误：写不了 {error.filename or '输出目录'}：{reason}，请检查磁盘空间与权限", file=sys.stderr)
        return 1
    return 0
