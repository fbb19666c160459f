"""读基座：config.json、分词器、权重（普通、ZeRO-3 逐层切分、量化）。"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer
from finetune.checkpoint.config_check import check_config_file, tokenizer_model_problems
from finetune.checkpoint.quantized import load_quantized
from finetune.checkpoint.weights import check_weights, load_weights
from finetune.process.accelerator import forget_mapped_peak
from utils import log_rank_0

# 词表比分词器大一些是常有的补齐；分词器不到词表的这个比例就提醒
UNUSED_ROWS_ALLOWED = 0.9


def load_config(path: str | Path) -> BaichuanConfig:
    """读检查点的 config.json。

    Raises:
        ValueError: 目录或 config.json 不在，或不是 baichuan。
    """
    path = Path(path)
    check_config_file(path)
    try:
        config = BaichuanConfig.from_pretrained(path)
    except ValueError:
        raise
    except Exception as error:  # 内容来自外面，transformers 对坏的值抛各种异常
        raise ValueError(f"{path / 'config.json'} 读不了：{error}") from error
    if hasattr(config, "auto_map"):  # 自带的代码（可能在别人的仓库里）不在写出的目录里
        del config.auto_map
    if hasattr(config, "quantization_config"):
        # 写出去的话，别的工具会悄悄把完整的权重量化；权重真是量化过的，由 check_weights 拒绝
        del config.quantization_config
        log_rank_0(f"注意：{path / 'config.json'} 里有 quantization_config，不使用，也不写进结果", sys.stderr)
    return config


def load_tokenizer(path: str | Path, vocab_size: int) -> BaichuanTokenizer:
    """读检查点的分词器，并核对它与词表大小相配。

    Raises:
        ValueError: tokenizer.model 不在或损坏，或分词器的词比模型的词表多。
    """
    try:
        tokenizer = BaichuanTokenizer.from_pretrained(path)
    except ValueError:
        raise
    except Exception as error:  # 内容来自外面，transformers 对坏的 JSON 抛各种异常
        raise ValueError(f"{path} 里没有可用的分词器（tokenizer.model、tokenizer_config.json）：{error}") from error
    problems = tokenizer_model_problems((Path(path) / "tokenizer.model").read_bytes())
    if problems:
        raise ValueError(f"{Path(path) / 'tokenizer.model'} 损坏，请重新下载：{'；'.join(problems)}")
    for name, expected in (("bos", tokenizer.sp_model.bos_id()), ("eos", tokenizer.sp_model.eos_id())):
        token, found = getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")
        if found != expected:
            raise ValueError(
                f"{path} 的 {name}_token 是 {token!r}（{found} 号），tokenizer.model 里是 {expected} 号："
                "tokenizer_config.json 或 special_tokens_map.json 损坏，请重新下载"
            )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{path} 的分词器有 {len(tokenizer)} 个词，config.json 的 vocab_size 只有 {vocab_size}："
            "分词器与权重不是一套"
        )
    if len(tokenizer) < UNUSED_ROWS_ALLOWED * vocab_size:
        log_rank_0(
            f"警告：{path} 的分词器只有 {len(tokenizer)} 个词，config.json 的 vocab_size 是 {vocab_size}："
            "一代是 64,000，二代是 125,696，请确认 tokenizer.model 与权重是一套",
            sys.stderr,  # predict.py 的标准输出只有回答
        )
    return tokenizer


def checked_skeleton(path: str | Path, config: BaichuanConfig) -> BaichuanForCausalLM:
    """没有存储的模型（meta 设备），并核对权重文件的名字与形状与它一致；只读文件头。

    Raises:
        ValueError: 权重文件缺少、损坏，或与 config.json 不符。
    """
    with torch.device("meta"):
        skeleton = BaichuanForCausalLM(config)
    check_weights(path, {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()})
    return skeleton


def load_base_model(
    path: str | Path,
    config: BaichuanConfig,
    dtype: torch.dtype,
    device: torch.device,
    zero3_config: dict | None = None,
    quantization: str | None = None,
) -> BaichuanForCausalLM:
    """造模型并读入权重；没有复制整个模型的一步。

    Args:
        dtype、device: 权重的类型与位置（ZeRO-3 的位置由 DeepSpeed 决定）。
        zero3_config: ZeRO-3 的 DeepSpeed 配置：各层一造出来就切分，每个进程只读自己的一段；其他情况为 None。
        quantization: 4bit、8bit，见 quantized.py；None 为不量化。

    Raises:
        ValueError: 权重文件缺少、损坏，或与 config.json 不符。
    """
    code = sorted(file.name for file in Path(path).glob("*.py"))
    if code:
        log_rank_0(f"{path} 里有代码（{'、'.join(code)}）：本项目用自己的实现，不会执行它们")
    skeleton = checked_skeleton(path, config)
    if quantization is not None:
        model = load_quantized(skeleton, path, dtype, device, quantization)
    elif zero3_config is None:
        model = skeleton.to(dtype).to_empty(device=device)
    else:
        import deepspeed

        # 类型由配置里的 bf16、fp16 定；不传 dtype：没有 fp16 的设备（CPU）上 DeepSpeed 0.19.8 会把它当作 bf16
        with no_init_weights(), freed_blocks_returned(), deepspeed.zero.Init(config_dict_or_path=zero3_config):
            model = BaichuanForCausalLM(config)
    assert next(model.parameters()).dtype == dtype, "模型的类型与 --precision 不符"
    if quantization is None:
        load_weights(model, path)
    forget_mapped_peak()
    if (Path(path) / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path)
        except Exception as error:  # 内容来自外面，transformers 对坏的值抛各种异常
            raise ValueError(f"{Path(path) / 'generation_config.json'} 损坏，请重新下载：{error}") from error
    model.config.dtype = dtype
    model.name_or_path = str(path)  # peft 把它写进 adapter_config.json
    return model


@contextmanager
def freed_blocks_returned() -> Iterator[None]:
    """1 MB 以上的内存块一释放就还给系统，不在堆里留下空洞；只对 glibc 有作用，退出时换成它自己会调到的上限。

    ZeRO-3 逐层造出完整的张量再切分，CPU 上的空洞曾使 4 个进程中的一个多占 240 MB（模型 595 MB）。
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)
    mmap_threshold, trim_threshold = -3, -1  # malloc.h 的 M_MMAP_THRESHOLD、M_TRIM_THRESHOLD
    mallopt(mmap_threshold, 2**20)
    try:
        yield
    finally:
        mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, 2**26)
