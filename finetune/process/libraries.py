"""各库写给自己开发者的话，用户改不了也用不上：按出处逐条略去；--log_level debug 时照样显示。"""

import logging
import sys
import warnings

LOG_LEVELS = ("info", "debug")
LOG_LEVEL_HELP = "debug 时也显示各库写给自己开发者的提示（缺省略去，见 finetune/process/libraries.py）"
# DeepSpeed 的记录：(文件, 函数) → 开头的字
DEEPSPEED_LINES = {
    ("real_accelerator.py", "get_accelerator"): "Setting accelerator to CPU",  # 用什么设备，精度一行里说
    ("lr_schedules.py", "get_lr"): "Attempting to get learning rate",  # 建引擎时 DeepSpeed 自己先取了一次
}


def is_meaningful(record: logging.LogRecord) -> bool:
    """DeepSpeed 的一条记录是否该给用户看。"""
    start = DEEPSPEED_LINES.get((record.filename, record.funcName))
    return start is None or not record.getMessage().startswith(start)


def quiet_libraries(log_level: str) -> None:
    """装上过滤；载入各库之前与之后各调用一次（后一次管已经载入的模块）。"""
    if log_level == "debug":
        return
    # 将来改名之类
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers|peft)\b")
    # 适配器的基座由 run_config.json 与哈希核对，不看 peft 记的路径
    renamed = "The PEFT config's `base_model_name_or_path` was renamed"
    warnings.filterwarnings("ignore", message=renamed, module=r"peft\.mapping_func")
    logging.getLogger("DeepSpeed").addFilter(is_meaningful)
    if module := sys.modules.get("deepspeed.comm.torch"):
        module.print = lambda *words: None  # 只有一句「算子编译好了」，每个进程一遍
