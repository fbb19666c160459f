"""--config：参数写在文件里；YAML、JSON，或一次训练留下的 run_config.json。"""

from pathlib import Path
from typing import Any

from utils import read_json

# 记录里有、照样再来一次时不该照抄的：从头训练，不是续训
NOT_REPEATED = ("resume", "config")


def read_config(path: str) -> tuple[list[str], bool]:
    """文件 → (同样意思的命令行, 是不是 run_config.json)；None 是没有写。

    run_config.json 里的精度与线程数取当时实际用的，结果才相同。

    Raises:
        ValueError: 文件读不了，或不是「名字: 值」。
    """
    content = _read_yaml(path) if Path(path).suffix in (".yaml", ".yml") else read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} 应是「参数名: 值」的一张表，实际是 {type(content).__name__}")
    is_record = isinstance(content.get("args"), dict)
    if is_record:
        used = {"precision": content.get("precision"), "num_threads": content.get("arithmetic", {}).get("num_threads")}
        content = {name: value for name, value in {**content["args"], **used}.items() if name not in NOT_REPEATED}
    words = []
    for name, value in content.items():
        flag = f"--{str(name).lstrip('-')}"
        if isinstance(value, list):
            words += [flag, *map(str, value)]
        elif isinstance(value, dict):
            raise ValueError(f"--config {path} 的 {name} 应是一个值，实际是一张表")
        elif value is not None:
            words.append(f"{flag}={value}")
    return words, is_record


def _read_yaml(path: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"读不了 --config {path}：{error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} 不是合法的 YAML：{' '.join(str(error).split())}") from error
