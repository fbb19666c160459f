"""docs/ 里的命令：参数都存在，取值都能解析。"""

import re
import shlex

import pytest
from paths import ROOT

from finetune.cli import predict_flags, train_flags
from scripts import export

PARSERS = {
    "predict.py": predict_flags.parse_args,
    "train.py": train_flags.parse_args,
    "scripts/export.py": export.parse_args,
}


def commands_in(path):
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            script = next((word for word in words if word in PARSERS), None)
            if script is not None:
                yield script, words[words.index(script) + 1 :]


@pytest.mark.parametrize("name", ["serving", "npu"])
def test_commands_parse(name):
    commands = list(commands_in(ROOT / "docs" / f"{name}.md"))
    assert commands
    for script, words in commands:
        PARSERS[script](words)
