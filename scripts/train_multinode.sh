#!/usr/bin/env bash
# 多台机器上的 LoRA：在每台机器上各运行一次，不需要 ssh；代码、数据、检查点目录与 OUTPUT_DIR 须在共享的文件系统上。
#     cat hostfile                     # 每行一台：地址 slots=卡数，第一行是 0 号机器
#         10.0.0.1 slots=8
#         10.0.0.2 slots=8
#     NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/train_multinode.sh baichuan2-13B/     # 在 10.0.0.1 上
#     NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash scripts/train_multinode.sh baichuan2-13B/     # 在 10.0.0.2 上
# 有免密 ssh 与 pdsh 时，只在 0 号机器上运行一次，不给 NODE_RANK，其余由 deepspeed 经 ssh 启动：
#     bash scripts/train_multinode.sh baichuan2-13B/
# 其余参数原样交给 train.py；中断之后在每台机器上用同样的命令加 --resume auto。
# 环境变量：HOSTFILE（缺省 hostfile），PORT 通信端口（缺省 29500），TRAIN_PATH、OUTPUT_DIR、DS_FILE；
#     DEEPSPEED_TIMEOUT 等别的机器的时限，分钟（缺省 30；要比存一个检查点久）；
#     NCCL_SOCKET_IFNAME、GLOO_SOCKET_IFNAME 走哪块网卡（机器有几块时须指定）。
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL="${1:?请给出检查点目录，例如 bash scripts/train_multinode.sh baichuan2-13B/}"
HOSTFILE="${HOSTFILE:-hostfile}"
[ -f "$HOSTFILE" ] || {
    echo "错误：没有 $HOSTFILE。请写一个 hostfile（每行「地址 slots=卡数」），或用 HOSTFILE=路径 指定。" >&2
    exit 2
}

LAUNCH=(--hostfile "$HOSTFILE" --master_port "${PORT:-29500}")
if [ -n "${NODE_RANK:-}" ]; then
    # 每台机器各自启动：谁是几号由 NODE_RANK 说，0 号的地址由 MASTER_ADDR 说
    LAUNCH+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:?请给出 0 号机器的地址，例如 MASTER_ADDR=10.0.0.1}")
elif [ -n "${MASTER_ADDR:-}" ]; then
    LAUNCH+=(--master_addr "$MASTER_ADDR")
fi

exec deepspeed "${LAUNCH[@]}" train.py \
    --train_path "${TRAIN_PATH:-data/spo_0.json}" \
    --model_name_or_path "$MODEL" \
    --output_dir "${OUTPUT_DIR:-./output-multinode}" \
    --train_type lora \
    --ds_file "${DS_FILE:-ds_zero2_no_offload.json}" \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 4 \
    --max_len 1560 \
    --max_src_len 1024 \
    --num_train_epochs 2 \
    --gradient_checkpointing \
    "${@:2}"
