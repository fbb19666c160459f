"""各库写给自己开发者的话：只略去认得出处的，debug 时都在。"""

import logging
import warnings

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupDecayLR

from finetune.process import libraries


@pytest.fixture
def recorded():
    """DeepSpeed 的记录，过滤之后的；试完恢复原样。"""
    logger, messages = logging.getLogger("DeepSpeed"), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    filters = list(logger.filters)
    logger.addHandler(handler)
    with warnings.catch_warnings():
        yield messages
    logger.removeHandler(handler)
    logger.filters[:] = filters


@pytest.mark.parametrize(("level", "is_shown"), [("info", False), ("debug", True)])
def test_a_line_that_means_nothing_is_left_out_by_its_origin(recorded, level, is_shown):
    logging.getLogger("DeepSpeed").filters.clear()
    libraries.quiet_libraries(level)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    WarmupDecayLR(optimizer, total_num_steps=4, warmup_num_steps=2).get_lr()
    assert any("learning rate from scheduler" in message for message in recorded) == is_shown
    logging.getLogger("DeepSpeed").warning("Attempting to get learning rate: 出处不同，要显示")
    assert recorded[-1].endswith("要显示")


def test_only_named_warnings_are_left_out():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        libraries.quiet_libraries("info")
        renamed = "The PEFT config's `base_model_name_or_path` was renamed from 'a' to 'b'."
        for module in ("peft.mapping_func", "elsewhere"):
            warnings.warn_explicit(renamed, UserWarning, "file.py", 1, module=module)
        warnings.warn_explicit("别的", UserWarning, "file.py", 2, module="peft.mapping_func")
        warnings.warn_explicit("改名", FutureWarning, "file.py", 3, module="transformers.modeling_utils")
    assert [(str(item.message)[:3], item.lineno) for item in caught] == [("The", 1), ("别的", 2)]
