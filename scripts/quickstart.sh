#!/usr/bin/env bash
# 从一台只有 Python 3.10 至 3.12 的机器开始，走完整个流程：环境、微型 Baichuan2、全参数与 LoRA 训练、预测。
#     bash scripts/quickstart.sh
# 两个 CPU 核上不到 10 分钟（安装依赖与编译算子另计）；有 GPU 时自动使用。结果在 .quickstart/ 下，可整个删去。
# 环境变量：VENV 虚拟环境的位置（缺省 .venv），PYTHON 指定解释器。
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
setup_env requirements.txt
trap 'python scripts/deepspeed_ops.py clean_shm > /dev/null || true' EXIT

WORK=.quickstart
rm -rf "$WORK"
mkdir "$WORK"
# 没有 GPU 时 DeepSpeed 按 LOCAL_SIZE 决定 CPU 进程数；这么小的模型一个线程最快
export LOCAL_SIZE="${LOCAL_SIZE:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# train 方法 基座 输出目录 其余参数：情感分类（data/cls_0.json），每轮在 data/cls_1.json 上评估；端口取一个空闲的
train() {
    local port
    port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
    deepspeed -q --num_gpus 1 --master_port "$port" train.py \
        --train_path data/cls_0.json \
        --eval_path data/cls_1.json \
        --train_type "$1" \
        --model_name_or_path "$2" \
        --output_dir "$3" \
        --precision fp32 \
        --per_device_train_batch_size 16 \
        --gradient_accumulation_steps 1 \
        --max_len 128 \
        --max_src_len 112 \
        --eval_metric label_f1 \
        --eval_max_new_tokens 8 \
        "${@:4}"
}

# score 检查点 名字：在没有训练过的 data/cls_1.json 上预测、打分
score() {
    python predict.py --model_path "$1" --test_path data/cls_1.json --output_path "$WORK/$2.jsonl" \
        --metric label_f1 --max_new_tokens 8
}

echo "== 1/4 生成微型 Baichuan2（随机权重，官方布局，分词器由 data/ 训练）"
python scripts/build_tiny_model.py --arch baichuan2-7b --output_dir "$WORK/tiny-baichuan2" \
    --layers 4 --hidden_size 128 --heads 4 --vocab_size 2000
score "$WORK/tiny-baichuan2" untrained

echo "== 2/4 全参数训练：从随机权重学会判断评论的情感"
train full "$WORK/tiny-baichuan2" "$WORK/full" --learning_rate 1e-3 --num_train_epochs 3
score "$WORK/full" full

echo "== 3/4 LoRA：接着它再训练一轮，只存适配器"
BASE="$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["checkpoint"])' "$WORK/full/best.json")"
train lora "$WORK/full/$BASE" "$WORK/lora" --lora_module_name all-linear --learning_rate 1e-3 --num_train_epochs 1
score "$WORK/lora" lora

echo "== 4/4 预测与参考答案对照"
python - "$WORK" <<'PY'
import json, sys
from pathlib import Path

work = Path(sys.argv[1])
results = {name: json.loads((work / f"{name}.metrics.json").read_text()) for name in ("untrained", "full", "lora")}
rows = [json.loads(line) for line in (work / "lora.jsonl").read_text(encoding="utf-8").splitlines()]
for number, row in enumerate(rows[:8], 1):
    print(f"[{number}] {row['input']}\n    参考：{row['output']}    预测：{row['prediction']}")
print("data/cls_1.json 的宏 F1（95% 区间），训练时没有见过这些行：")
for name, title in (("untrained", "没有训练"), ("full", "全参数"), ("lora", "再加 LoRA")):
    found = results[name]
    print(f"    {title}：{found['score']:.3f} [{found['ci_low']:.3f}, {found['ci_high']:.3f}]")
empty = sum(not row["prediction"].strip() for row in rows)
assert empty == 0, f"{len(rows)} 条预测里有 {empty} 条是空的"
assert results["lora"]["ci_low"] > max(0.5, results["untrained"]["ci_high"]), "没有学会：区间没有高出没有训练的与碰运气的 0.5"
print("换成真正的检查点与自己的数据，其余命令不变。")
print(f"quickstart: OK, {len(rows)} predictions")
PY
