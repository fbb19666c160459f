# 准备虚拟环境；由 quickstart.sh 与 run_tests.sh 以 source 引入，不单独运行：
#     source scripts/setup_env.sh; setup_env requirements.txt
# 结果：$VENV 已就绪（默认仓库下的 .venv，可用环境变量 VENV 指定），PATH 指向它，DeepSpeed 的 CPU 算子已编译。
# shellcheck shell=bash

REPO_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# HOME、TMPDIR 为空串时，pip 与 torch 会把缓存写到意外的位置
if [ -z "${HOME:-}" ]; then
    HOME="$(getent passwd "$(id -u)" | cut -d: -f6)"
    export HOME="${HOME:-$REPO_ROOT/.venv/home}"
fi
[ -n "${TMPDIR:-}" ] || unset TMPDIR

# 打印一个可用的 Python 3.10 至 3.12：先找带头文件的（编译算子要用 Python.h），再退而求其次
find_python() {
    local need_headers candidate
    for need_headers in 1 0; do
        for candidate in ${PYTHON:-} python3.11 python3.12 python3.10 python3 python; do
            # pyenv 的垫片可能存在却不能运行，所以要真的执行一次
            if "$candidate" - "$need_headers" 2>/dev/null <<'PY'
import ensurepip, os, sys, sysconfig, venv
has_headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
sys.exit(not ((3, 10) <= sys.version_info[:2] <= (3, 12) and (has_headers or sys.argv[1] == "0")))
PY
            then
                command -v "$candidate"
                return 0
            fi
        done
    done
    echo "错误：没有找到带 venv 的 Python 3.10、3.11 或 3.12。请先安装（例如 apt-get install python3-venv python3-dev），" \
         "或用 PYTHON=/path/to/python 指定。" >&2
    return 1
}

# setup_env 依赖文件：建立或复用虚拟环境，依赖文件没有变化时跳过安装
setup_env() {
    local requirements="$REPO_ROOT/$1" python stamp want quiet
    export VENV="${VENV:-$REPO_ROOT/.venv}"
    if ! "$VENV/bin/python" -c '' 2>/dev/null; then
        if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
            echo "错误：VENV=$VENV 已存在，但不是虚拟环境。请换一个位置。" >&2
            return 1
        fi
        python="$(find_python)" || return 1
        echo "== 建立虚拟环境 $VENV（$("$python" --version)）"
        "$python" -m venv "$VENV" || return 1
    fi
    stamp="$VENV/.installed-$1.sha256"
    # requirements-dev.txt 引用 requirements.txt；换了目录，-e . 指向别处
    want="$( (echo "$REPO_ROOT"; cat "$REPO_ROOT/requirements.txt" "$requirements" "$REPO_ROOT/pyproject.toml") | sha256sum | cut -d' ' -f1)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        echo "== 安装 $1（CUDA 版 torch 约 3 GB，取决于网速）"
        [ -t 1 ] && quiet="" || quiet="-qq" # 终端里显示下载进度，日志里只留错误
        # requirements.txt 的末行是 -e .，相对当前目录
        (cd "$REPO_ROOT" && "$VENV/bin/python" -m pip install --disable-pip-version-check $quiet -r "$requirements") || return 1
        echo "$want" > "$stamp"
    fi
    export PATH="$VENV/bin:$PATH"
    # 算子编在虚拟环境里：换一个环境（头文件路径不同）不会互相触发重编
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VENV/torch_extensions}"
    echo "== 准备 DeepSpeed 算子"
    python "$REPO_ROOT/scripts/deepspeed_ops.py" build
}
