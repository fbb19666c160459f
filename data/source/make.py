"""生成 data/ 下三个任务的样例数据，同一种子每次写出同样的字节。

启动：python data/source/make.py [--output_dir data] [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from data.source import cls as sample_data_cls
from data.source import d2q as sample_data_d2q
from data.source import spo as sample_data_spo

DATA_DIR = Path(__file__).resolve().parents[1]
# 任务名 → (生成函数, 种子, 训练行数, 测试行数)
TASKS = {
    "spo": (sample_data_spo.make_rows, 20240601, 480, 100),
    "d2q": (sample_data_d2q.make_rows, 20240602, 400, 100),
    "cls": (sample_data_cls.make_rows, 20240603, 600, 100),
}


def make_files() -> dict[str, bytes]:
    """返回文件名 → 文件的全部字节（UTF-8，每行一个 JSON 对象，行尾为换行符）。"""
    files = {}
    for task, (make_rows, seed, num_train, num_test) in TASKS.items():
        for split, rows in enumerate(make_rows(seed, num_train, num_test)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            files[f"{task}_{split}.json"] = "".join(lines).encode("utf-8")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description="生成 data/ 下的样例数据")
    parser.add_argument("--output_dir", type=Path, default=DATA_DIR, help="写入的目录，默认为仓库的 data/")
    parser.add_argument("--check", action="store_true", help="不写文件，只核对目录里的文件与生成结果逐字节相同")
    args = parser.parse_args()
    files = make_files()
    if args.check:
        differing = [
            name
            for name, content in files.items()
            if not (args.output_dir / name).is_file() or (args.output_dir / name).read_bytes() != content
        ]
        if differing:
            sys.exit(f"{args.output_dir}: 与生成结果不同的文件：{'、'.join(differing)}，请重新运行本脚本")
    else:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (args.output_dir / name).write_bytes(content)
    for name, content in files.items():
        print(f"{name}: {content.count(10)} 行，{len(content)} 字节")


if __name__ == "__main__":
    main()
