# 四个 train_*.sh 共用的部分：source 它，再 run_training 方法 "${METHOD_FLAGS[@]}" -- "$@"。
#     bash scripts/train_lora.sh baichuan2-7B/                    # 一张卡
#     GPUS=0,1,2,3 bash scripts/train_lora.sh baichuan2-7B/       # 四张卡
#     bash scripts/train_lora.sh baichuan-7B/ baichuan            # Baichuan（第一代）；结构以检查点的 config.json 为准
#     LOCAL_SIZE=2 bash scripts/train_lora.sh 检查点目录          # 没有 GPU 的机器：两个 CPU 进程
# 路径相对仓库根目录。其余参数原样交给 train.py，与下面重复的以后给的为准：
#     bash scripts/train_lora.sh 检查点目录 baichuan2 --max_steps 100
#     bash scripts/train_lora.sh 检查点目录 --max_steps 100
# 环境变量：GPUS 用哪些卡（缺省 0），PORT 通信端口（缺省找一个空闲的），TRAIN_PATH 数据，OUTPUT_DIR 输出目录，DS_FILE。
# Ctrl-C：等训练存好检查点才还给你命令行，退出码 75；再按一次立即停下。
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run_training() {
    local method="$1" method_flags=()
    shift
    while [ "$1" != -- ]; do
        method_flags+=("$1")
        shift
    done
    shift
    local usage="请给出检查点目录，例如 bash scripts/train_$method.sh baichuan2-7B/"
    local model="${1:-}" mode=baichuan2 # 模型族：baichuan | baichuan2
    case "$model" in -* | "") echo "$usage；得到的是「$model」" >&2 && return 2 ;; esac
    shift
    case "${1:--}" in -*) ;; *) mode="$1" && shift ;; esac # 第二个可以省去，直接写参数
    local flags=(
        --train_path "${TRAIN_PATH:-data/spo_0.json}"          # 训练数据：JSON 行或 JSON 数组
        --model_name_or_path "$model"                          # 检查点目录
        --mode "$mode"                                         # 模型族
        --output_dir "${OUTPUT_DIR:-./output-$method}"         # 检查点与日志；已有的结果会移到 previous-N/

        --train_type "$method"                                 # 训练方法
        --per_device_train_batch_size 1                        # 每张卡一次前向的样本数
        --gradient_accumulation_steps 4                        # 攒几次再更新：全局批 = 卡数 × 1 × 4
        --max_len 1560                                         # 一条样本的 token 上限，超过的截断（--is_skip 则丢弃）
        --max_src_len 1024                                     # 其中提示词的上限，必须小于 max_len
        --num_train_epochs 2                                   # 训练几遍数据
        --warmup_ratio 0.1                                     # 前 10% 的步数预热
        --weight_decay 0.1                                     # 权重衰减，只作用于矩阵
        --gradient_checkpointing                               # 反向时重算激活，省显存
        --precision auto                                       # bf16、fp16 或 fp32，按设备决定并说明理由

        --ds_file "${DS_FILE:-ds_zero2_no_offload.json}"       # ZeRO-2；显存不够时改用 ds_zero3_offload.json
        --show_loss_step 10                                    # 每 10 步记录一次
        --save_model_step 0                                    # 0：只在每轮结束时保存
        --seed 1234                                            # 随机种子
    )
    if [ -n "${GPUS:-}" ] && ! has_gpu; then
        echo "GPUS=$GPUS，但是没有找到卡；没有卡就去掉它，CPU 的进程数写在 LOCAL_SIZE 里" >&2
        return 2
    elif compgen -G "/dev/davinci[0-9]*" > /dev/null; then # 昇腾
        export ASCEND_RT_VISIBLE_DEVICES="${GPUS:-0}"
    elif has_gpu; then
        export CUDA_VISIBLE_DEVICES="${GPUS:-0}"
    else # 启动器见到 CUDA_VISIBLE_DEVICES 就不看 LOCAL_SIZE
        unset CUDA_VISIBLE_DEVICES
        export LOCAL_SIZE="${LOCAL_SIZE:-1}" DS_ACCELERATOR=cpu
    fi
    wait_for deepspeed -q --master_port "${PORT:-$(free_port)}" train.py "${flags[@]}" "${method_flags[@]}" "$@"
}

has_gpu() {
    compgen -G "/dev/nvidia[0-9]*" > /dev/null || compgen -G "/dev/davinci[0-9]*" > /dev/null || [ -e /dev/kfd ] ||
        nvidia-smi -L > /dev/null 2>&1
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# wait_for deepspeed …：Ctrl-C 只交给训练的各进程，等它们存好；启动器自己收到会立即走开，退出码也不对。
wait_for() {
    set -m # 自成一个进程组：终端的 Ctrl-C 不直接到它
    "$@" < /dev/null &
    local runner=$! code=0
    set +m
    trap 'stop_training "$runner" INT' INT
    trap 'stop_training "$runner" TERM' TERM HUP
    while :; do
        wait "$runner" && code=0 || code=$?
        kill -0 "$runner" 2> /dev/null || break # 还在：wait 是被信号打断的
    done
    trap - INT TERM HUP
    return "$code"
}

# stop_training 启动器 信号：deepspeed → launch.py → 各进程；信号给最里面的一层，还没有起来就给启动器。
stop_training() {
    local launcher process found=0
    for launcher in $(cat "/proc/$1/task/$1/children" 2> /dev/null); do
        for process in $(cat "/proc/$launcher/task/$launcher/children" 2> /dev/null); do
            kill "-$2" "$process" 2> /dev/null && found=1
        done
    done
    [ "$found" = 1 ] || kill -TERM -- "-$1" 2> /dev/null || true
}
