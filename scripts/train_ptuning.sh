#!/usr/bin/env bash
# P-Tuning v2：在每一层前放可训练的键值。用法与环境变量见 _train.sh：
#     bash scripts/train_ptuning.sh baichuan2-7B/
source "$(dirname "${BASH_SOURCE[0]}")/_train.sh"

METHOD_FLAGS=(
    --ptuning_version 2         # 2：每层的键值；1：只在词嵌入处
    --pre_seq_len 16            # 前缀长度（token）
    --prefix_projection False   # True：前缀由 MLP 生成（宽度 --prefix_hidden_size），参数更多
    --learning_rate 5e-3        # 峰值学习率
)
run_training ptuning "${METHOD_FLAGS[@]}" -- "$@"
