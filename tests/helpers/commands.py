"""用户的命令，与 ../shared/commands.md 逐字相同。"""

# 用户的命令（deepspeed 之后、train.py 的参数），与 ../shared/commands.md 逐字相同
USER_COMMAND = r"""
                --train_path data/spo_0.json \
                --model_name_or_path baichuan-6B/ \
                --per_device_train_batch_size 1 \
                --max_len 1560 \
                --max_src_len 1024 \
                --learning_rate 1e-4 \
                --weight_decay 0.1 \
                --num_train_epochs 2 \
                --gradient_accumulation_steps 4 \
                --warmup_ratio 0.1 \
                --mode baichuan \
                --train_type freeze \
                --freeze_module_name "layers.27.,layers.26.,layers.25.,layers.24." \
                --seed 1234 \
                --ds_file ds_zero2_no_offload.json \
                --gradient_checkpointing \
                --show_loss_step 10 \
                --output_dir ./output-baichuan
"""


def user_command(cards: str, model: str) -> str:
    """四条命令之一：只差在卡与检查点这两处。"""
    return f"CUDA_VISIBLE_DEVICES={cards} deepspeed --master_port 520 train.py \\" + USER_COMMAND.replace(
        "baichuan-6B/", model
    )
