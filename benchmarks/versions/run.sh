#!/usr/bin/env bash
# 在支持的最旧与最新的 torch、transformers、DeepSpeed 上各跑一遍缺省的测试，结果写到 results/。
#   bash benchmarks/versions/run.sh [oldest|newest]        缺省两组都跑；要联网装包，每组约 3 GB 磁盘
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
results=$root/benchmarks/versions/results
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$results"

versions_of() {
    case $1 in
        oldest) echo "torch==2.10.0 transformers==5.17.0 deepspeed==0.19.8" ;;
        newest) grep -E '^(torch|deepspeed)==' "$root/requirements.txt" | tr '\n' ' '
                sed -n 's/^\(transformers==[0-9.]*\);.*>=.*/\1/p' "$root/requirements.txt" ;;
        *) echo "不认识 $1，可用 oldest、newest" >&2; exit 2 ;;
    esac
}

sets=("$@")
[ ${#sets[@]} -gt 0 ] || sets=(oldest newest)
for set in "${sets[@]}"; do versions_of "$set" > /dev/null; done    # 写错的名字先说
status=0
for set in "${sets[@]}"; do
    read -ra versions <<< "$(versions_of "$set" | tr '\n' ' ')"
    echo "== $set：${versions[*]}"
    "$python" -m venv "$work/$set"
    bin=$work/$set/bin
    # 先装要测的三个，其余依赖不许改动它们
    printf '%s\n' "${versions[@]}" > "$work/$set.txt"
    grep -vE '^(torch|transformers|deepspeed)==|^-e|^-r' "$root/requirements.txt" > "$work/rest.txt"
    grep -vE '^-r' "$root/requirements-dev.txt" >> "$work/rest.txt"
    "$bin/pip" install --quiet -r "$work/$set.txt" -r "$work/rest.txt"
    report=$results/$set.txt
    {
        date -u +%Y-%m-%d
        "$bin/python" --version
        "$bin/pip" list --format=freeze | grep -iE '^(torch|transformers|deepspeed|peft|accelerate|numpy)=='
    } > "$report"
    (cd "$root" && PYTHONPATH=$root PATH=$bin:$PATH "$bin/python" -m pytest -q -p no:cacheprovider 2>&1) \
        | tee "$work/$set.log" || status=1
    grep -E '^(FAILED|ERROR|SKIPPED)|(passed|failed)' "$work/$set.log" | sed "s#$root/##g; s#$work/##g" >> "$report" || true
    tail -1 "$report"
done
exit $status
