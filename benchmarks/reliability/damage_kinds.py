"""损坏的种类：字节、整份文件、数据行、JSON 字段；由 damage.py 按种子取用，tests/data/test_fuzz_rows.py 也用。"""

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Damage(NamedTuple):
    """一处损坏。is_structural：True 必须被拒绝，False 不影响读取，None 由独立的判断决定。"""

    file: str
    what: str
    is_structural: bool | None


# ---- 字节 ----


def damage_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """随机改动一段字节，结果必与原来不同：翻转、覆盖、清零一个扇区、截断、删去、插入、重复、续上垃圾。"""
    # 头部是结构所在，一半的改动落在前 4 KiB
    reach = len(content) if rng.random() < 0.5 else min(len(content), 4096)
    at = rng.randrange(max(1, reach))
    length = rng.choice([1, 2, 8, 64])
    junk = rng.randbytes(length)
    kind = rng.choice(
        ["翻转一位", "翻转一位", "覆盖", "清零一段", "截断", "截断", "删去一段", "插入", "重复一段", "续上垃圾"]
    )
    if kind == "翻转一位":
        damaged = content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    elif kind == "覆盖":
        damaged = content[:at] + junk + content[at + length :]
    elif kind == "清零一段":
        damaged = content[:at] + bytes(min(512, len(content) - at)) + content[at + 512 :]
    elif kind == "截断":
        damaged = content[:at]
    elif kind == "删去一段":
        damaged = content[:at] + content[at + length :]
    elif kind == "插入":
        damaged = content[:at] + junk + content[at:]
    elif kind == "重复一段":
        damaged = content[: at + 64] + content[at:]
    else:
        damaged = content + junk
    if damaged == content:
        return content[:-1], "截断于末字节"
    return damaged, f"{kind}于 {at}/{len(content)}"


def damage_path(path: Path, rng: random.Random) -> str:
    """把文件换成不是普通文件的东西，返回说明。"""
    kind = rng.choice(["目录", "FIFO", "断开的链接", "自己指向自己的链接", "删去"])
    path.unlink()
    if kind == "目录":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "断开的链接":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "自己指向自己的链接":
        path.symlink_to(path)
    return f"换成{kind}" if kind != "删去" else kind


# ---- 数据 ----


def _dump(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def _instruction_row(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], bytes]:
    def damaged(row: dict[str, Any]) -> bytes:
        row = dict(row)
        changed = change(row)
        return changed if isinstance(changed, bytes) else _dump(row if changed is None else changed)

    return damaged


def _talk(*turns: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda row: _dump({"conversations": list(turns)})


HUMAN, GPT = {"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}
# 名称 → 由一条好的 instruction 行造出坏行；全部必须被拒绝
ROW_SURGERY: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "去掉 output": _instruction_row(lambda row: row.pop("output") and None),
    "output 为 null": _instruction_row(lambda row: {**row, "output": None}),
    "output 为数字": _instruction_row(lambda row: {**row, "output": 3}),
    "output 为数组": _instruction_row(lambda row: {**row, "output": [row["output"]]}),
    "input 为对象": _instruction_row(lambda row: {**row, "input": {"text": row["input"]}}),
    "instruction 为布尔值": _instruction_row(lambda row: {**row, "instruction": True}),
    "指令与输入都空": _instruction_row(lambda row: {**row, "instruction": "", "input": " \n"}),
    "只有不认识的字段": _instruction_row(lambda row: {"question": "问", "output": "答"}),
    "数组代替对象": _instruction_row(lambda row: _dump([row])),
    "字符串代替对象": _instruction_row(lambda row: b'"text"'),
    "重复的键": _instruction_row(lambda row: _dump(row)[:-1] + b', "output": "again"}'),
    "单引号": _instruction_row(lambda row: str(row).encode()),
    "一行两个对象": _instruction_row(lambda row: _dump(row) * 2),
    "NaN": _instruction_row(lambda row: _dump(row)[:-1] + b', "score": NaN}'),
    "五千位的整数": _instruction_row(lambda row: _dump(row)[:-1] + b', "id": ' + b"7" * 5000 + b"}"),
    "嵌套十万层": _instruction_row(lambda row: _dump(row)[:-1] + b', "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    "半个代理字符": _instruction_row(lambda row: _dump({**row, "output": "X"}).replace(b'"X"', b'"\\ud83d"')),
    "NUL 字节": _instruction_row(lambda row: _dump(row).replace(b"instruction", b"instruction\0")),
    "GBK 编码": _instruction_row(
        lambda row: json.dumps({**row, "input": "故障"}, ensure_ascii=False).encode("gbk", "replace")
    ),
    "没有转义的换行": _instruction_row(lambda row: _dump({**row, "input": "X"}).replace(b'"X"', b'"a\nb"')),
    "行被拦腰截断": _instruction_row(lambda row: _dump(row)[: len(_dump(row)) // 2]),
    "空的对话": _talk(),
    "对话不是数组": lambda row: _dump({"conversations": "你好"}),
    "不认识的角色": _talk({"from": "robot", "value": "你好"}, GPT),
    "消息缺 value": _talk({"from": "human"}, GPT),
    "消息是字符串": _talk("你好", "你好！"),
    "消息正文是数字": _talk({"role": "user", "content": 1}, {"role": "assistant", "content": "1"}),
    "连着两个回答": _talk(HUMAN, GPT, GPT),
    "以回答开头": _talk(GPT, HUMAN, GPT),
    "以用户结尾": _talk(HUMAN, GPT, HUMAN),
    "只有 system": _talk({"role": "system", "content": "你是助手"}),
    "system 在中间": _talk(HUMAN, GPT, {"from": "system", "value": "x"}, HUMAN, GPT),
    "空的用户消息": _talk({"from": "human", "value": " "}, GPT),
    "两种写法混用": lambda row: _dump({**row, "conversations": [HUMAN, GPT]}),
}
# 名称 → (对整个 JSON Lines 文件的改动, 是否必须被拒绝)
FILE_SURGERY: dict[str, tuple[Callable[[bytes], bytes], bool]] = {
    "加 BOM": (lambda content: b"\xef\xbb\xbf" + content, False),
    "改成 CRLF": (lambda content: content.replace(b"\n", b"\r\n"), False),
    "插入空行": (lambda content: content.replace(b"\n", b"\n\n  \n"), False),
    "去掉末尾换行": (lambda content: content.rstrip(b"\n"), False),
    "改成数组": (lambda content: _array(content) + b"]", False),
    "改成 CR": (lambda content: content.replace(b"\n", b"\r"), True),
    "改成 UTF-16": (lambda content: content.decode().encode("utf-16"), True),
    "改成没有 BOM 的 UTF-16": (lambda content: content.decode().encode("utf-16-le"), True),
    "改成 GBK": (lambda content: content.decode().encode("gbk", "ignore"), True),
    "清空": (lambda content: b"", True),
    "只有空白": (lambda content: b" \n\t\n", True),
    "换成 PNG": (lambda content: b"\x89PNG\r\n\x1a\n" + content, True),
    "换成 LFS 指针": (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", True),
    "数组缺 ]": (lambda content: _array(content), True),
    "数组多逗号": (lambda content: _array(content) + b",]", True),
    "数组少逗号": (lambda content: _array(content).replace(b"},", b"}", 1) + b"]", True),
    "数组之后有内容": (lambda content: _array(content) + b"]\n{}", True),
    "一行超过 64 MiB": (lambda content: content + b'{"input": "' + b"x" * (65 << 20) + b'", "output": ""}\n', True),
}


def _array(content: bytes) -> bytes:
    return b"[" + b",\n".join(content.strip().split(b"\n"))


# ---- JSON 字段 ----


def _key_paths(node: Any, prefix: tuple = ()) -> list[tuple]:
    if isinstance(node, dict):
        return [path for key, value in node.items() for path in ((*prefix, key), *_key_paths(value, (*prefix, key)))]
    return []


def damage_fields(content: Any, rng: random.Random) -> tuple[str, str, tuple]:
    """对一个 JSON 对象动一处手术 → (新的文本, 说明, 字段的路径)；手术有删去、改名、改类型、荒唐的值、重复的键。"""
    content = copy.deepcopy(content)
    path = rng.choice(_key_paths(content))
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    key, value = path[-1], parent[path[-1]]
    kind = rng.choice(["删去", "改名", "改类型", "改类型", "荒唐的值", "整体换掉"])
    if kind == "删去":
        del parent[key]
    elif kind == "改名":
        at = rng.randrange(len(key))
        renamed = key[:at] + rng.choice("xq") + key[at + 1 :]
        items = [(renamed if name == key else name, old) for name, old in parent.items()]
        parent.clear()
        parent.update(items)
    elif kind == "改类型":
        others = [new for new in (None, "text", 3, True, [], {}, [1], {"a": 1}) if type(new) is not type(value)]
        parent[key] = rng.choice(others)
    elif kind == "荒唐的值":
        parent[key] = rng.choice([-1, 10**30, -0.5, "", "../../etc/passwd", float("nan"), [[]], {"enabled": "maybe"}])
    else:
        return rng.choice(["[]", "null", "3", '"text"', "{", "", "[" * 10**5]), "整个内容换掉", ()
    return json.dumps(content, ensure_ascii=False, indent=2), f"{kind} {'.'.join(path)}", path
