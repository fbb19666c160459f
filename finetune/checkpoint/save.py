"""保存检查点：先写入 .tmp- 开头的目录，逐文件落盘，最后写清单再改名：看得见的检查点总是完整的。"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from finetune.checkpoint.added_tokens import AddedRows, rows_in
from finetune.checkpoint.manifest import _fsync, write_manifest
from finetune.checkpoint.output_dir import RUN_CONFIG, TEMPORARY_PREFIX, checkpoint_name
from finetune.checkpoint.weights import ShardedWriter, gathered_tensors
from finetune.methods.registry import base_model_of, is_added
from utils import global_rank, log_rank_0, raise_together, write_json


def save_checkpoint(
    engine, tokenizer, run_config: dict, output_dir: Path, epoch: int, save_state: Callable[[Path], None] | None = None
) -> Path:
    """把模型存为 output_dir/epoch-{epoch}-step-{global_steps}/；集合操作，所有进程都要调用。

    freeze、full 存完整模型（transformers 可读），lora、ptuning 只存适配器（peft 可读）；张量名与官方相同。

    Args:
        run_config: 写入 run_config.json 的内容（这里补上 epoch 与 global_step）。
        save_state: 把续训所需的状态写进给定目录；同样所有进程都会调用。

    Returns:
        检查点目录；这一步已经存过时直接返回它。

    Raises:
        RuntimeError: 任一进程写盘失败（磁盘满、没有权限……）；所有进程一起抛出，已有的检查点不受影响。
    """
    final = output_dir / checkpoint_name(epoch, engine.global_steps)
    if final.is_dir():
        return final
    temporary = output_dir / f"{TEMPORARY_PREFIX}{final.name}"
    error = None
    try:
        if global_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()  # output_dir 不在了（挂载点消失）是错误，不能悄悄重建
    except OSError as os_error:
        error = os_error
    raise_together(_save_error(final, error))

    error = _save_model(engine.module, temporary)
    if save_state is not None:
        error = save_state(temporary) or error
    try:
        if global_rank() == 0 and error is None:
            tokenizer.save_pretrained(temporary)
            write_json(temporary / RUN_CONFIG, {**run_config, "epoch": epoch, "global_step": engine.global_steps})
            write_manifest(temporary, engine.global_steps)
            os.rename(temporary, final)
            _fsync(output_dir)
    except OSError as os_error:
        error = os_error
    if error is not None:
        shutil.rmtree(temporary, ignore_errors=True)
    raise_together(_save_error(final, error))
    log_rank_0(f"已保存 {final}")
    return final


def _save_error(path: Path, error: Exception | None) -> Exception | None:
    if error is None:
        return None
    reason = getattr(error, "strerror", None) or str(error)
    return OSError(f"保存 {path} 失败：{reason}。请检查磁盘空间与写权限；之前的检查点没有受影响")


def _save_model(module: nn.Module, directory: Path) -> Exception | None:
    """写权重与配置；写盘的错误作为返回值：别的进程还在等着一起收集后面的参数，不能中途跳出。"""
    from peft import PeftModel  # verify、hash 不必等它导入

    is_adapter = isinstance(module, PeftModel)
    writer = None if is_adapter else ShardedWriter(directory)
    adapter, error = {}, None
    added = AddedRows(base_model_of(module).lm_head.first_added, dict(gathered_tensors(rows_in(module).items())))
    parameters = [
        (name, p) for name, p in module.named_parameters() if (p.requires_grad or not is_adapter) and not is_added(name)
    ]
    for name, tensor in gathered_tensors(parameters):
        if tensor is None or error is not None:
            continue
        if is_adapter:
            adapter[name] = tensor
            continue
        try:
            writer.add(name, added.grow(name, tensor))
        except Exception as write_error:  # safetensors 把磁盘满报成它自己的异常
            error = write_error
    prompt = prompt_embedding(module) if is_adapter else None
    if global_rank() != 0 or error is not None:
        return error
    try:
        if is_adapter:
            _write_adapter(module, adapter, prompt, directory)
            added.save(directory)
        else:
            writer.close()
            added.grown(module.config).save_pretrained(directory)
            module.generation_config.save_pretrained(directory)
    except Exception as write_error:
        error = write_error
    return error


def prompt_embedding(module: nn.Module) -> torch.Tensor | None:
    """P-Tuning 要存的提示 [V, …]：经过 prefix_projection 之后的结果；LoRA 没有，返回 None。集合操作。"""
    if not module.active_peft_config.is_prompt_learning:
        return None
    import deepspeed

    encoder = module.prompt_encoder[module.active_adapter]
    parameters = [parameter for parameter in encoder.parameters() if hasattr(parameter, "ds_tensor")]
    with torch.no_grad(), deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
        return module.get_prompt_embedding_to_save(module.active_adapter)


def _write_adapter(module: nn.Module, adapter: dict, prompt: torch.Tensor | None, directory: Path):
    """peft 的两个文件：adapter_model.safetensors 与 adapter_config.json。"""
    from peft.utils import get_peft_model_state_dict

    if prompt is None:
        state = get_peft_model_state_dict(module, state_dict=adapter, save_embedding_layers=False)
    else:
        state = {"prompt_embeddings": prompt}
    save_file({k: v.contiguous() for k, v in state.items()}, directory / "adapter_model.safetensors", {"format": "pt"})
    config = module.active_peft_config
    was_inference, config.inference_mode = config.inference_mode, True
    config.save_pretrained(directory)
    config.inference_mode = was_inference
