#!/usr/bin/env bash
# freeze：只训练最后四层，其余冻结。用法与环境变量见 _train.sh：
#     bash scripts/train_freeze.sh baichuan2-7B/
source "$(dirname "${BASH_SOURCE[0]}")/_train.sh"

METHOD_FLAGS=(
    # 名字里含任一片段的参数参与训练（片段末尾的点不能省）；13B 有 40 层，可在命令末尾另给 --freeze_module_name
    --freeze_module_name "layers.31.,layers.30.,layers.29.,layers.28."
    --learning_rate 1e-4        # 峰值学习率
)
run_training freeze "${METHOD_FLAGS[@]}" -- "$@"
