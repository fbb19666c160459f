"""各种数据文件：gzip、CSV、TSV、Parquet 读得与 JSON Lines 相同；编码与写法不对的文件有一句话和一条命令。"""

import csv
import gzip
import json
import subprocess
from pathlib import Path

import pytest

from finetune.data.rows import RawRow, found_encoding, iter_rows
from finetune.data.samples import read_samples

ROWS = [
    {"instruction": "抽取：", "input": "水温高，\n“风扇”", "output": "水温_故障_高"},
    {"instruction": "问", "input": "", "output": ""},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
MESSAGES = [(("user", row["instruction"] + row["input"]), ("assistant", row["output"])) for row in ROWS]


def messages_of(path: Path) -> list:
    return [sample.messages for sample in read_samples(path)]


def write_table(path: Path, delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with open(path, "w", encoding=encoding, newline="") as stream:
        writer = csv.DictWriter(stream, ["instruction", "input", "output"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


# ---- 读得相同 ----


def test_gzip_is_read_like_the_plain_file(tmp_path):
    for name, content in [("a.jsonl.gz", LINES), ("b.json.gz", json.dumps(ROWS)), ("c", LINES)]:
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        assert messages_of(tmp_path / name) == MESSAGES
    table = write_table(tmp_path / "d.csv")
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(table.read_bytes()))
    assert messages_of(tmp_path / "d.csv.gz") == MESSAGES


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("A.CSV", ",")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tables_are_read_by_their_header(tmp_path, name, delimiter, encoding):
    path = write_table(tmp_path / name, delimiter, encoding)
    samples = read_samples(path)
    assert [sample.messages for sample in samples] == MESSAGES
    assert [sample.line for sample in samples] == [2, 4]  # 第一行的内容里有一个换行


def test_parquet_is_read_with_pyarrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    talk = {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}], "score": None}
    rows = [{**row, "messages": None, "score": float("nan")} for row in ROWS] + [talk]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert messages_of(tmp_path / "a.parquet") == [*MESSAGES, (("user", "问"), ("assistant", "答"))]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"b.parquet 已损坏"):
        messages_of(tmp_path / "b.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="pip install pyarrow"):
        messages_of(tmp_path / "a.parquet")


# ---- 说得清的错误 ----


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("gbk", "GB18030"),
        ("gb18030", "GB18030"),
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
    ],
)
@pytest.mark.parametrize("name", ["a b.jsonl", "a.csv", "a.jsonl.gz"])
def test_other_encodings_are_named_with_the_command_that_converts(tmp_path, encoding, named, name):
    text = write_table(tmp_path / "t.csv").read_text(encoding="utf-8") if name == "a.csv" else LINES
    content = text.replace("“", "").replace("”", "").encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ValueError, match=f"是 {named} 编码") as caught:
        read_samples(path)
    command = str(caught.value).partition("：")[2]
    subprocess.run(command, shell=True, check=True)
    (converted,) = tmp_path.glob("*.utf8.*")
    assert [messages[0][1] for messages in messages_of(converted)] == ["抽取：水温高，\n风扇", "问"]


def test_a_few_broken_lines_do_not_make_it_another_encoding():
    good = LINES.encode()
    assert found_encoding(good + b"\xb9\xca\xd5\xcf\n") is None
    assert found_encoding(b'{"a": 1}\n') is None
    assert found_encoding(b"\xff\xff\xff\n") is None
    assert found_encoding("故障\n".encode("gbk")) == "GB18030"


def test_binary_files_are_named(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"PK\x03\x04abc")
    with pytest.raises(ValueError, match=r"a.xlsx 是 zip 或 xlsx.*CSV"):
        read_samples(tmp_path / "a.xlsx")
    (tmp_path / "a.gz").write_bytes(gzip.compress(LINES.encode() * 9)[:-9])
    with pytest.raises(ValueError, match=r"a.gz 的 gzip 压缩已损坏或不完整"):
        read_samples(tmp_path / "a.gz")


@pytest.mark.parametrize(
    ("content", "command"),
    [
        ({"data": ROWS}, "jq -c '.data[]' "),
        (ROWS[0], "jq -c . "),
        ({"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}, "jq -c . "),
    ],
)
def test_an_object_over_several_lines_is_one_sentence(tmp_path, content, command):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    with pytest.raises(ValueError, match="写成了多行") as caught:
        read_samples(path)
    assert command in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("instruction,output\n问,答\n问\n", r":3: 行: 应有 2 列（instruction、output），实际是 1 列"),
        ('instruction,output\n问,"答\n', r":2: 行: CSV 格式有误"),
        ("instruction,instruction\n问,答\n", r":1: 表头: "),
        ("instruction,reply\n问,答\n", r":2: output: 缺少这个字段，.*reply 改名为 output"),
    ],
)
def test_broken_tables_are_reported_by_line(tmp_path, content, place):
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=place):
        read_samples(tmp_path / "a.csv")


def test_rows_of_a_table_are_json_objects(tmp_path):
    rows = list(iter_rows(write_table(tmp_path / "a.csv")))
    assert rows == [
        RawRow(line, json.dumps(row, ensure_ascii=False).encode()) for line, row in zip([2, 4], ROWS, strict=True)
    ]
