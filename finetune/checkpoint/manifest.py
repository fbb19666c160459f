"""检查点的清单 manifest.json：每个文件的大小与 SHA-256，写与核对。"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune.terminal import long_job
from utils import file_sha256, read_json

MANIFEST = "manifest.json"


def hash_files(paths: Sequence[Path], is_hidden: bool = False) -> list[str]:
    """各文件的 SHA-256，几个文件并行计算；文件大时显示进度（is_hidden 时不）。"""
    num_bytes = sum(path.stat().st_size for path in paths)
    with (
        long_job("计算 SHA-256", num_bytes, "B", is_hidden=is_hidden) as job,
        ThreadPoolExecutor(max_workers=8) as pool,
    ):
        return list(pool.map(lambda path: file_sha256(path, job.update), paths))


def write_manifest(directory: Path, step: int):
    """写 manifest.json（文件、大小、SHA-256、步数、张量数），并把每个文件刷到磁盘；它总是最后写的文件。"""
    umask = os.umask(0)
    os.umask(umask)
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    for path in paths:
        path.chmod(0o666 & ~umask)  # safetensors 建的文件只有属主可读，这里与别的文件一致
        _fsync(path)
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, hash_files(paths), strict=True)
    }
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
    problems, whole = [], {}
    for name, expected in files.items():
        path = directory / name
        expected = expected if isinstance(expected, dict) else {}
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"{name}: 清单里的路径指向目录之外")
        elif not path.is_file():
            problems.append(f"{name}: 不存在")
        elif path.stat().st_size != expected.get("bytes"):
            problems.append(f"{name}: 大小 {path.stat().st_size}，清单记为 {expected.get('bytes')}")
        else:
            whole[name] = expected.get("sha256")
    for name, digest in zip(whole, hash_files([directory / name for name in whole]), strict=True):
        if digest != whole[name]:
            problems.append(f"{name}: 内容与清单的 SHA-256 不符")
    present = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()} - {MANIFEST}
    problems += [f"{name}: 不在清单里" for name in sorted(present - files.keys())]
    if checksum is None or (directory / MANIFEST).read_bytes() != _manifest_bytes(manifest):
        problems.append(f"{MANIFEST}: 内容与它自己的校验和不符")
    return problems
