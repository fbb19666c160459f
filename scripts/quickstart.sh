#!/usr/bin/env bash
# 从一台只有 Python 3.10 至 3.12 的机器开始，走完整个流程：环境、微型 Baichuan2、LoRA 训练、预测。
#     bash scripts/quickstart.sh
# 两个 CPU 核上不到 10 分钟（安装依赖与编译算子另计）；有 GPU 时自动使用。结果在 .quickstart/ 下，可整个删去。
# 环境变量：VENV 虚拟环境的位置（缺省 .venv），PYTHON 指定解释器。
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
setup_env requirements.txt
trap 'python scripts/deepspeed_ops.py clean_shm > /dev/null || true' EXIT

WORK=.quickstart
NUM_PREDICTIONS=8
rm -rf "$WORK"
mkdir "$WORK"
# 没有 GPU 时 DeepSpeed 按 LOCAL_SIZE 决定 CPU 进程数；端口取一个空闲的，免得与别的训练相撞
export LOCAL_SIZE="${LOCAL_SIZE:-1}"
PORT="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"

echo "== 1/3 生成微型 Baichuan2（随机权重，官方布局，分词器由 data/ 训练）"
python scripts/build_tiny_model.py --arch baichuan2-7b --output_dir "$WORK/tiny-baichuan2" \
    --layers 4 --hidden_size 128 --heads 4 --vocab_size 2000

echo "== 2/3 用 LoRA 训练（deepspeed 启动器，data/spo_0.json）"
deepspeed --num_gpus 1 --master_port "$PORT" train.py \
    --train_path data/spo_0.json \
    --model_name_or_path "$WORK/tiny-baichuan2" \
    --mode baichuan2 \
    --train_type lora \
    --lora_module_name all-linear \
    --lora_dim 32 \
    --learning_rate 5e-3 \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 1 \
    --max_len 384 \
    --max_src_len 256 \
    --num_train_epochs 1 \
    --max_steps 40 \
    --output_dir "$WORK/output"

echo "== 3/3 预测，与参考答案对照"
CHECKPOINT="$(ls -dt "$WORK"/output/epoch-*-step-* | head -n 1)"
head -n "$NUM_PREDICTIONS" data/spo_1.json > "$WORK/test.json"
python predict.py --model_path "$CHECKPOINT" --test_path "$WORK/test.json" \
    --output_path "$WORK/predictions.jsonl" --metric triple_f1 --max_new_tokens 64
python - "$WORK/predictions.jsonl" "$NUM_PREDICTIONS" <<'PY'
import json, sys

rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
for number, row in enumerate(rows, 1):
    print(f"[{number}] 输入：{row['input'][:60]}")
    print("    参考：" + " | ".join(row["output"].splitlines()))
    print("    预测：" + " | ".join(row["prediction"].splitlines()))
assert len(rows) == int(sys.argv[2]), f"应有 {sys.argv[2]} 条预测，只有 {len(rows)} 条"
print("微型模型的权重是随机的，这里只为走通流程；换成真正的检查点，其余命令不变。")
print(f"quickstart: OK, {len(rows)} predictions")
PY
