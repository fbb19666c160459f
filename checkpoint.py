"""检查点：保存、核对、查找。

保存先写入 .tmp- 开头的目录，逐文件落盘，最后写清单 manifest.json 再改名：看得见的检查点总是完整的。

    python checkpoint.py verify output/epoch-1-step-40      # 核对一个检查点的每个文件
    python checkpoint.py hash baichuan2-7B                  # 任何目录各文件的 SHA-256；--check 文件 与记下的比较
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from utils import global_rank, log_rank_0, raise_together, read_json, write_json
from weights import ShardedWriter, gathered_tensors

CHECKPOINT_NAME = re.compile(r"^epoch-(\d+)-step-(\d+)$")
MANIFEST = "manifest.json"
RUN_CONFIG = "run_config.json"
TEMPORARY_PREFIX = ".tmp-"
# 一次训练留在 output_dir 里的东西：再次运行时移走的只有这些
RUN_RESULTS = ("train_log.jsonl", "loss.png", RUN_CONFIG, "ds_config.json", "runs", "bad_steps")
RUN_RESULTS += ("best.json", "forgetting.json")


# ---------------------------------------------------------------------------------------------------------------------
# 保存


def checkpoint_name(epoch: int, step: int) -> str:
    """第 epoch 轮（从 1 起）、第 step 个优化器步的检查点的目录名。"""
    return f"epoch-{epoch}-step-{step}"


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
    parameters = [(name, p) for name, p in module.named_parameters() if p.requires_grad or not is_adapter]
    for name, tensor in gathered_tensors(parameters):
        if tensor is None or error is not None:
            continue
        if is_adapter:
            adapter[name] = tensor
            continue
        try:
            writer.add(name, tensor)
        except Exception as write_error:  # safetensors 把磁盘满报成它自己的异常
            error = write_error
    prompt = prompt_embedding(module) if is_adapter else None
    if global_rank() != 0 or error is not None:
        return error
    try:
        if is_adapter:
            _write_adapter(module, adapter, prompt, directory)
        else:
            writer.close()
            module.config.save_pretrained(directory)
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


# ---------------------------------------------------------------------------------------------------------------------
# 清单


def file_sha256(path: Path) -> str:
    """文件内容的 SHA-256，十六进制；分块读取。"""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(directory: Path, step: int):
    """写 manifest.json（文件、大小、SHA-256、步数、张量数），并把每个文件刷到磁盘；它总是最后写的文件。"""
    files, umask = {}, os.umask(0)
    os.umask(umask)
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            path.chmod(0o666 & ~umask)  # safetensors 建的文件只有属主可读，这里与别的文件一致
            _fsync(path)
            files[str(path.relative_to(directory))] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = {"step": step, "tensors": _num_tensors(directory), "files": files}
    (directory / MANIFEST).write_bytes(_manifest_bytes(manifest))
    _fsync(directory / MANIFEST)
    _fsync(directory)


def _manifest_bytes(manifest: dict) -> bytes:
    """清单的字节：末尾是其余内容的校验和；写法唯一，所以清单自己的任何一个字节变了也看得出来。"""
    checksum = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**manifest, "manifest_sha256": checksum}, ensure_ascii=False, indent=2) + "\n").encode()


def _num_tensors(directory: Path) -> int:
    from safetensors import safe_open

    count = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weight_file:
            count += len(weight_file.keys())
    return count


def _fsync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify_checkpoint(directory: str | Path) -> list[str]:
    """按清单核对一个检查点，返回发现的问题（空表示完整）。"""
    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        return [f"没有 {MANIFEST}：不是完整的检查点"]
    try:
        manifest = read_json(directory / MANIFEST)
        files = dict(manifest["files"])
        checksum = manifest.pop("manifest_sha256", None)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"{MANIFEST} 损坏：{error}"]
    problems = []
    for name, expected in files.items():
        path = directory / name
        expected = expected if isinstance(expected, dict) else {}
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"{name}: 清单里的路径指向目录之外")
        elif not path.is_file():
            problems.append(f"{name}: 不存在")
        elif path.stat().st_size != expected.get("bytes"):
            problems.append(f"{name}: 大小 {path.stat().st_size}，清单记为 {expected.get('bytes')}")
        elif file_sha256(path) != expected.get("sha256"):
            problems.append(f"{name}: 内容与清单的 SHA-256 不符")
    present = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()} - {MANIFEST}
    problems += [f"{name}: 不在清单里" for name in sorted(present - files.keys())]
    if checksum is None or (directory / MANIFEST).read_bytes() != _manifest_bytes(manifest):
        problems.append(f"{MANIFEST}: 内容与它自己的校验和不符")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# 查找与整理


def iter_checkpoints(output_dir: Path) -> Iterator[tuple[int, int, Path]]:
    """output_dir 下的检查点，从新到旧：(step, epoch, 目录)。"""
    found = []
    for path in output_dir.iterdir() if output_dir.is_dir() else []:
        match = CHECKPOINT_NAME.match(path.name)
        if match and path.is_dir():
            found.append((int(match[2]), int(match[1]), path))
    yield from sorted(found, reverse=True)


def remove_leftovers(output_dir: Path):
    """删去上次被打断的保存留下的 .tmp- 目录。"""
    for path in output_dir.glob(f"{TEMPORARY_PREFIX}*"):
        log_rank_0(f"删除上次没有写完的 {path}")
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def rotate_checkpoints(output_dir: Path, limit: int, best: str | None):
    """只留最新的 limit 个检查点（0 为不限）；最好的（目录名 best）与最新的总是留下。只在 0 号进程调用。"""
    newest_first = [path for _, _, path in iter_checkpoints(output_dir)]
    kept = {path.name for path in newest_first[:1]} | ({best} & {path.name for path in newest_first})
    kept |= {path.name for path in [p for p in newest_first if p.name not in kept][: max(0, limit - len(kept))]}
    for path in newest_first if limit else ():
        if path.name in kept:
            continue
        try:
            doomed = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")  # 先改名：看得见的检查点总是完整的
            os.rename(path, doomed)
            shutil.rmtree(doomed)
            log_rank_0(f"已删除旧的 {path}（--save_total_limit {limit}）")
        except OSError as error:
            log_rank_0(f"删不掉旧的 {path}：{error.strerror}，请手工删除")


def set_aside_previous_run(output_dir: Path, after_step: int | None = None):
    """把 output_dir 里上一次训练的结果（只是我们写的那些）移进 previous-N/，不覆盖任何东西。

    after_step: 续训的起点；此时只移走这一步之后的检查点，日志留下。
    """
    results = [path for step, _, path in iter_checkpoints(output_dir) if after_step is None or step > after_step]
    if after_step is None:
        results += [output_dir / name for name in RUN_RESULTS if (output_dir / name).exists()]
    if not results:
        return
    number = 1
    while (output_dir / f"previous-{number}").exists():
        number += 1
    target = output_dir / f"previous-{number}"
    target.mkdir()
    for path in results:
        os.rename(path, target / path.name)
    log_rank_0(f"{output_dir} 里已有的 {'、'.join(sorted(path.name for path in results))} 移到了 {target}")


# ---------------------------------------------------------------------------------------------------------------------
# 任何目录的哈希


def hash_directory(directory: Path) -> dict[str, str]:
    """目录里各文件的 SHA-256：{相对路径: 十六进制}，按路径排序；跳过以点开头的文件与目录（下载工具的缓存）。

    Raises:
        ValueError: 目录不在，或一个文件也没有。
    """
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    names = [path.relative_to(directory) for path in paths]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise ValueError(f"{directory} 不是目录，或里面没有文件，请给出检查点的目录")
    return {name.as_posix(): file_sha256(directory / name) for name in names}


def hash_problems(found: dict[str, str], listing: Path) -> list[str]:
    """与 sha256sum 格式的清单（每行「哈希 文件名」）比较，返回不同之处；清单里没有的文件不管。

    Raises:
        ValueError: 清单读不了，或有的行不是这个格式。
    """
    try:
        lines = [line.split(maxsplit=1) for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"读不了 {listing}：{error}") from error
    bad = [" ".join(line) for line in lines if len(line) != 2 or not re.fullmatch(r"[0-9a-fA-F]{64}", line[0])]
    if bad or not lines:
        raise ValueError(f"{listing} 的每一行应是「SHA-256 文件名」，得到 {bad[0] if bad else '空文件'!r}")
    problems = []
    for digest, name in lines:
        name = name.strip().lstrip("*")
        if name not in found:
            problems.append(f"{name}: 不存在，请重新下载；清单里应是相对于这个目录的路径")
        elif found[name] != digest.lower():
            problems.append(f"{name}: 内容不符，请重新下载")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="按清单核对一个检查点的每个文件")
    verify.add_argument("directory", type=Path, help="检查点目录")
    hashes = commands.add_parser("hash", help="打印任何目录里各文件的 SHA-256，与 sha256sum 同样的格式")
    hashes.add_argument("directory", type=Path, help="目录，如下载的基座")
    hashes.add_argument("--check", type=Path, help="清单，每行「SHA-256 文件名」；不符时退出码 1")
    args = parser.parse_args()
    if args.command == "verify":
        problems = verify_checkpoint(args.directory)
    else:
        try:
            found = hash_directory(args.directory)
            problems = hash_problems(found, args.check) if args.check else []
        except ValueError as error:
            print(f"错误：{error}", file=sys.stderr)
            sys.exit(2)
        print("".join(f"{digest}  {name}\n" for name, digest in found.items()), end="")
        if args.check is None:
            return
    for problem in problems:
        print(problem)
    print(f"{args.directory}：" + (f"{len(problems)} 处问题" if problems else "完整"))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
