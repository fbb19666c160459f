#!/usr/bin/env bash
# sentencepiece 0.2.3 的轮子对 protobuf 没有版本要求（extra 里只写 protobuf），自带的 sentencepiece_model_pb2 却只认 7.36.1 以上的；
# swanlab 0.10.3 要 protobuf < 7，两者同装时 pip check 说没有冲突，导入才失败。transformers 自带的那份不挑版本。
#   期望：protobuf 6.33.6 满足 sentencepiece 声明的全部要求，sentencepiece_model_pb2 能导入。
#   实际：google.protobuf.runtime_version.VersionError。
# 退出码：0 仍是这样，1 变了。
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet sentencepiece==0.2.3 protobuf==6.33.6
"$work/venv/bin/pip" check
"$work/venv/bin/python" - <<'PROGRAM'
import sys

try:
    from sentencepiece import sentencepiece_model_pb2
except Exception as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(0 if type(error).__name__ == "VersionError" else 1)
print("能导入了", sentencepiece_model_pb2.DESCRIPTOR.name)
sys.exit(1)
PROGRAM
