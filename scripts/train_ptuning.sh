#!/usr/bin/env bash
# P-Tuning v2：在每一层前放可训练的键值。
#     bash scripts/train_ptuning.sh baichuan2-7B/                    # 一张卡
#     GPUS=0,1,2,3 bash scripts/train_ptuning.sh baichuan2-7B/       # 四张卡
#     bash scripts/train_ptuning.sh baichuan-7B/ baichuan            # Baichuan（第一代）；结构以检查点的 config.json 为准
#     LOCAL_SIZE=2 bash scripts/train_ptuning.sh 检查点目录         # 没有 GPU 的机器：两个 CPU 进程
# 路径相对仓库根目录。其余参数原样交给 train.py，与下面重复的以后给的为准：
#     bash scripts/train_ptuning.sh 检查点目录 baichuan2 --max_steps 100
# 环境变量：GPUS 用哪些卡（缺省 0），PORT 通信端口（缺省 29500），TRAIN_PATH 数据，OUTPUT_DIR 输出目录，DS_FILE。
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL="${1:?请给出检查点目录，例如 bash scripts/train_ptuning.sh baichuan2-7B/}"
MODE="${2:-baichuan2}" # baichuan | baichuan2

FLAGS=(
    --train_path "${TRAIN_PATH:-data/spo_0.json}"      # 训练数据：JSON 行或 JSON 数组
    --model_name_or_path "$MODEL"                      # 检查点目录
    --mode "$MODE"                                     # 模型族
    --output_dir "${OUTPUT_DIR:-./output-ptuning}"     # 检查点与日志；已有的结果会移到 previous-N/

    --train_type ptuning                               # 训练方法
    --ptuning_version 2                                # 2：每层的键值；1：只在词嵌入处
    --pre_seq_len 16                                   # 前缀长度（token）
    --prefix_projection False                          # True：前缀由 MLP 生成（宽度 --prefix_hidden_size），参数更多

    --per_device_train_batch_size 1                    # 每张卡一次前向的样本数
    --gradient_accumulation_steps 4                    # 攒几次再更新：全局批 = 卡数 × 1 × 4
    --max_len 1560                                     # 一条样本的 token 上限，超过的截断（--is_skip 则丢弃）
    --max_src_len 1024                                 # 其中提示词的上限，必须小于 max_len
    --num_train_epochs 2                               # 训练几遍数据
    --learning_rate 5e-3                               # 峰值学习率
    --warmup_ratio 0.1                                 # 前 10% 的步数预热
    --weight_decay 0.1                                 # 权重衰减，只作用于矩阵
    --gradient_checkpointing                           # 反向时重算激活，省显存
    --precision auto                                   # bf16、fp16 或 fp32，按设备决定并说明理由

    --ds_file "${DS_FILE:-ds_zero2_no_offload.json}"   # ZeRO-2；显存不够时改用 ds_zero3_offload.json
    --show_loss_step 10                                # 每 10 步记录一次
    --save_model_step 0                                # 0：只在每轮结束时保存
    --seed 1234                                        # 随机种子
)

CUDA_VISIBLE_DEVICES="${GPUS:-0}" deepspeed --master_port "${PORT:-29500}" train.py "${FLAGS[@]}" "${@:3}"
