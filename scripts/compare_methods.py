"""公平地比较 freeze、lora、ptuning、full：任务 × 方法 × 种子，学习率各自试跑，训练的 token 数相等；写出结果与报告。

    python scripts/compare_methods.py benchmarks/comparison/plan.json --output_dir output-comparison --jobs 2
    python scripts/compare_methods.py --report output-comparison       # 只由已有的结果重写 report.md 与 report.html

每个格子都经 deepspeed 启动器训练。做完的格子逐行写进 results.jsonl（基座、重放与核对的写进 extras.jsonl），
随时可以打断：再次运行同样的命令，只做没有做完的格子；做到一半的格子从头做。
"""

import argparse
import shutil
import signal
import sys
from pathlib import Path

from finetune.options import ScriptParser
from finetune.process.libraries import quiet_libraries
from finetune.process.threads import begin_loading

if __name__ == "__main__":
    begin_loading()
if __name__ in ("__main__", "__mp_main__"):  # 后一个是并行的格子的进程
    quiet_libraries("info")

from benchmarks.comparison.base import build_base
from finetune.comparison.plan import read_plan
from finetune.comparison.run import compare, held, prepare


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", nargs="?", type=Path, help="计划，JSON；写法见 benchmarks/comparison/README.md")
    parser.add_argument("--output_dir", type=Path, help="结果、报告与工作文件的目录；已有同一计划的结果就接着做")
    parser.add_argument(
        "--jobs", type=int, default=1, help="并行几个格子，各一个线程；时间也就是并行时测的（缺省 %(default)s）"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="不运行，只由 DIR 里的结果重写报告")
    parser.add_argument("--font", type=Path, help="报告里的中文字体，TTF 或 OTF（缺省用系统里的；没有时不嵌字体）")
    args = parser.parse_args(argv)
    if (args.report is None) == (args.plan is None):
        parser.error("请给出计划与 --output_dir，或者 --report DIR")
    if args.plan is not None and args.output_dir is None:
        parser.error("请给出 --output_dir")
    if args.jobs < 1:
        parser.error(f"--jobs({args.jobs}) 必须至少为 1")
    return args


def main(argv: list[str] | None = None) -> int:
    from finetune.comparison.report import write_report  # 画图的库要一会儿才能载入

    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if args.report is None:
            import predict

            plan, output_dir = read_plan(args.plan), args.output_dir.resolve()
            output_dir.mkdir(parents=True, exist_ok=True)
            with held(output_dir):
                prepare(plan, output_dir, build_base)
                compare(plan, output_dir, args.jobs, predict.main)
                shutil.rmtree(output_dir / "work", ignore_errors=True)
        directory = args.report or args.output_dir
        write_report(directory, args.font)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"错误：{error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("已停下；再次运行同样的命令，接着没有做完的格子", file=sys.stderr)
        return 130
    print(f"报告：{directory / 'report.md'} 与 {directory / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
