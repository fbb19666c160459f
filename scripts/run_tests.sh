#!/usr/bin/env bash
# 从一台只有 Python 3.10 至 3.12 的机器开始跑测试：建环境、装依赖、编译算子，再运行 pytest。
#     bash scripts/run_tests.sh                          # 默认测试（两核约十分钟，不联网，不用 GPU）
#     bash scripts/run_tests.sh -n 0 -m slow -k matrix   # 参数原样交给 pytest；-n 0 不分给两个进程
# 环境变量：VENV 虚拟环境的位置（默认 .venv），PYTHON 指定解释器。
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
setup_env requirements-dev.txt

# 被测试杀掉的训练进程会在 /dev/shm 留下文件；只删本用户的、已无进程使用的
trap 'python scripts/deepspeed_ops.py clean_shm > /dev/null || true' EXIT
python -m pytest -n 2 --dist loadfile "$@"
