"""模型的测试的夹具：官方代码的各份黄金值，与四种结构各一份。"""

import pytest
from golden_models import ARCHITECTURES, CASES, load_golden


@pytest.fixture(params=CASES)
def golden(request, golden_dir):
    return load_golden(golden_dir(request.param))


@pytest.fixture(params=ARCHITECTURES)
def architecture(request, golden_dir):
    return load_golden(golden_dir(request.param))
