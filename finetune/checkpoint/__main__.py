"""核对一个检查点，或打印任何目录的哈希。

python -m finetune.checkpoint verify output/epoch-1-step-40      # 核对一个检查点的每个文件
python -m finetune.checkpoint hash baichuan2-7B                  # 任何目录各文件的 SHA-256；--check 文件 与记下的比较
"""

import argparse
import re
import sys
from pathlib import Path

from finetune.checkpoint.manifest import hash_files, verify_checkpoint
from finetune.options import ScriptParser


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
    digests = hash_files([directory / name for name in names])
    return dict(zip([name.as_posix() for name in names], digests, strict=True))


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
    parser = ScriptParser(
        prog="python -m finetune.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
