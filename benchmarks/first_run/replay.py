"""头一个下午：真的命令、微型模型，在伪终端里依次运行，屏幕上的原样写进 docs/first-run.md。

python benchmarks/first_run/replay.py                  # 约十分钟；改写 docs/first-run.md 里的记录
python benchmarks/first_run/replay.py --output 记录.txt # 只看看

在项目的副本里运行，只带 git 认得的文件。进度条不留，虚拟环境的路径写成 .venv。
末行是各库的行数：它们至多占 5%。
"""

import argparse
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE, BEGIN, END = ROOT / "docs" / "first-run.md", "<!-- 记录开始 -->\n", "<!-- 记录结束 -->\n"
COLUMNS = 110
# 各库自己的行：带时间的记录、警告、编译与载入扩展、回溯
LIBRARY_LINE = re.compile(
    r"^\[(W?\d|rank)|Warning|warnings\.warn|^(DeepSpeed|Using|Loading|Building|Detected|ninja) |Traceback|^ +File "
)
PROGRESS_BAR = re.compile(r"\S[^|]*: +\d+%\|.*?(?=\^C|$)")
MOST_LIBRARY_LINES = 0.05
FULL = (
    "TRAIN_PATH=data/cls_0.json bash scripts/train_full.sh baichuan2-tiny --learning_rate 1e-3 "
    "--eval_path data/cls_1.json --eval_metric label_f1 --eval_max_new_tokens 8 --per_device_train_batch_size 16 "
    "--gradient_accumulation_steps 1 --max_len 128 --max_src_len 112 --show_loss_step 20"
)


class Scene(NamedTuple):
    """一条命令；press 是屏幕上出现它时按 Ctrl-C。"""

    command: str
    code: int = 0
    press: str = ""


SCENES = [
    Scene("python scripts/build_tiny_model.py --arch baichuan2-7b --output_dir baichuan2-tiny --hidden_size 128"),
    Scene("python data_set.py check data/cls_0.json --test_path data/cls_1.json --model_name_or_path baichuan2-tiny"),
    Scene("python data_set.py check cls_0.json", code=2),
    Scene(
        "python train.py --model baichuan2-tiny --dataset data/cls_0.json --finetuning_type lora --lora_rnk 8", code=2
    ),
    Scene(FULL, code=75, press="步 20/"),
    Scene(f"{FULL} --resume auto"),
    Scene(
        "python predict.py --model_path output-full --test_path data/cls_1.json --metric label_f1 --max_new_tokens 8"
    ),
    Scene(
        "head -n 3 data/cls_1.json > three.json; python predict.py --compare baichuan2-tiny output-full "
        "--test_path three.json --metric label_f1 --max_new_tokens 8"
    ),
    Scene(
        "TRAIN_PATH=data/spo_0.json LOCAL_SIZE=2 bash scripts/train_lora.sh baichuan2-tiny --max_steps 4 "
        "--max_len 512 --max_src_len 384 --show_loss_step 2"
    ),
    Scene("python scripts/merge_lora.py --model_path output-lora --output_dir baichuan2-tiny-merged"),
    Scene("python predict.py --model_path output-full --instruction 请判断情感： --input 味道不错 --max_new_tokens 8"),
]


def play(scene: Scene, directory: Path, environment: dict[str, str]) -> tuple[int, str]:
    """在伪终端里运行一条命令 → (退出码, 屏幕上的文字)。"""
    process, terminal = pty.fork()
    if process == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 40, COLUMNS, 0, 0))
        os.chdir(directory)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # 后台运行的程序忽略它，bash 就接不到 Ctrl-C
        os.execvpe("bash", ["bash", "-c", scene.command], environment)
    screen, is_pressed = b"", False
    with suppress(OSError):  # 另一端关了
        while True:
            if select.select([terminal], [], [], 0.01)[0]:
                if not (chunk := os.read(terminal, 65536)):
                    break
                screen += chunk
            if scene.press and not is_pressed and scene.press.encode() in screen:
                os.write(terminal, b"\x03")
                is_pressed = True
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), screen.decode("utf-8", "replace")


def lines_on_screen(text: str) -> list[str]:
    """终端的输出 → 各行：去掉颜色与光标的移动，回车回到行首重写，进度条不留。"""
    lines = []
    for line in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r\n", "\n").split("\n"):
        shown: list[str] = []
        for part in line.split("\r"):
            shown[: len(part)] = part
        lines.append("".join(shown).rstrip())
    while lines and not lines[-1]:
        lines.pop()
    return without_bars(lines)


def without_bars(lines: list[str]) -> list[str]:
    """略去进度条，只有进度条的行整行略去。"""
    kept = []
    for line in lines:
        rest = PROGRESS_BAR.sub("", line)
        if rest or not line:
            kept.append(rest)
    return kept


def copy_project(directory: Path) -> None:
    """git 认得的文件（含还没有提交的）复制一份。"""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)


def replay(directory: Path) -> list[str]:
    """依次运行 SCENES，返回记录的各行。

    Raises:
        RuntimeError: 有一条的退出码不是该有的。
    """
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "LOCAL_SIZE", "COLUMNS")
    }
    environment |= {"PYTHONPATH": str(directory), "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    record = []
    for scene in SCENES:
        began = time.monotonic()
        code, text = play(scene, directory, environment)
        shown = lines_on_screen(text.replace(sys.prefix, ".venv"))
        record += [f"$ {scene.command}", *shown, f"（退出码 {code}，{time.monotonic() - began:.0f} 秒）", ""]
        print("\n".join(record[-len(shown) - 3 :]), flush=True)
        if code != scene.code:
            raise RuntimeError(f"退出码应为 {scene.code}，得到 {code}：{scene.command}")
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="写在这里（缺省改写 docs/first-run.md 里的记录）")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        copy_project(Path(directory))
        record = replay(Path(directory))
    printed = [line for line in record if line]
    library = [line for line in printed if LIBRARY_LINE.search(line)]
    text = "\n".join(record)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    else:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}```text\n{text.rstrip()}\n```\n{END}{after}", encoding="utf-8")
    print(f"共 {len(printed)} 行，其中各库的 {len(library)} 行（{len(library) / len(printed):.1%}）")
    return 0 if len(library) <= MOST_LIBRARY_LINES * len(printed) else 1


if __name__ == "__main__":
    sys.exit(main())
