"""比较的结果文件：做完一格加一行，随时被杀也不会坏。

results.jsonl 是试跑与正式的格子，extras.jsonl 是基座、重放与核对，details.jsonl 是重写报告要用的逐行计数与损失曲线。
"""

import json
import os
from pathlib import Path
from typing import Any

from utils import replacing

RESULTS, EXTRAS, DETAILS = "results.jsonl", "extras.jsonl", "details.jsonl"
MAIN_STAGES = ("sweep", "final")


def append_row(path: Path, row: dict[str, Any]):
    """在 JSON 行文件末尾加一行，刷到磁盘。"""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False, separators=(", ", ": ")) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def load_rows(path: Path, repair: bool = False) -> list[dict[str, Any]]:
    """读 JSON 行，略去末尾写了一半的一行（当时被杀）；repair 时把它从文件里删去，只在占住目录时可以。

    Raises:
        ValueError: 中间有坏了的行。
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if repair and len(complete) < len(content):
        with replacing(path, "wb") as stream:
            stream.write(complete)
    rows = []
    for number, line in enumerate(complete.decode("utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: 不是合法的 JSON（{error}），请删去这一行再运行") from error
    return rows


def load_results(output_dir: Path) -> list[dict[str, Any]]:
    """全部做完的格子：results.jsonl 与 extras.jsonl。"""
    return [*load_rows(output_dir / RESULTS), *load_rows(output_dir / EXTRAS)]


def repair(output_dir: Path):
    """删去各文件末尾写了一半的一行，接着写之前调用；须已占住目录。"""
    for name in (RESULTS, EXTRAS, DETAILS):
        load_rows(output_dir / name, repair=True)


def record(output_dir: Path, row: dict[str, Any], detail: dict[str, Any]):
    """记下一个做完的格子；先细节后结果：有结果的格子总有细节。"""
    append_row(output_dir / DETAILS, detail)
    append_row(output_dir / (RESULTS if row["stage"] in MAIN_STAGES else EXTRAS), row)
