"""测试的断言：只看参数名、位置与数值，不看句子。"""


def lacks(text: str, *parts: object) -> list[str]:
    """parts 里不在 text 中的各项；都在时为空。"""
    return [str(part) for part in parts if str(part) not in text]
