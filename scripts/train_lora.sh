#!/usr/bin/env bash
# LoRA：在 W_pack 旁训练低秩矩阵。用法与环境变量见 _train.sh：
#     bash scripts/train_lora.sh baichuan2-7B/
source "$(dirname "${BASH_SOURCE[0]}")/_train.sh"

METHOD_FLAGS=(
    --lora_dim 8                # 秩
    --lora_alpha 30             # 缩放系数的分子：alpha / dim
    --lora_dropout 0.1          # LoRA 支路的 dropout
    --lora_module_name W_pack   # 套在哪些线性层上，逗号分隔；all-linear 为全部
    --learning_rate 2e-4        # 峰值学习率
)
run_training lora "${METHOD_FLAGS[@]}" -- "$@"
