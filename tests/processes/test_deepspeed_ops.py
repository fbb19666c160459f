"""scripts/deepspeed_ops.py：要预编译的算子在 DeepSpeed 里都有。"""

import pytest

from scripts.deepspeed_ops import CPU_OPS


@pytest.mark.parametrize("op_name", CPU_OPS)
def test_op_names_exist_in_deepspeed(op_name):
    from deepspeed.ops.op_builder import cpu

    assert hasattr(cpu, op_name)
