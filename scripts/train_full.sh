#!/usr/bin/env bash
# full：训练全部参数。用法与环境变量见 _train.sh：
#     bash scripts/train_full.sh baichuan2-7B/
source "$(dirname "${BASH_SOURCE[0]}")/_train.sh"

METHOD_FLAGS=(
    --ds_file "${DS_FILE:-ds_zero3_offload.json}"   # ZeRO-3 加 CPU 卸载；卡多时改用 ds_zero2_no_offload.json
    --learning_rate 1e-5                            # 峰值学习率
)
run_training full "${METHOD_FLAGS[@]}" -- "$@"
