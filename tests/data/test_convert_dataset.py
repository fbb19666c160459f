"""scripts/convert_dataset.py：四种公开格式的小样转换、错误信息、抽样与原子写出。"""

import json
import os
import resource

import pytest

from finetune.metrics.triples import parse_triples
from scripts import convert_dataset


@pytest.fixture(scope="module")
def tool():
    return convert_dataset


@pytest.fixture
def convert(tool, tmp_path):
    """`convert(dataset, content, **options) -> (行, 计数)`；content 为文本、字节或对象的列表。"""

    def run(dataset, content, **options):
        source, target = tmp_path / "source.txt", tmp_path / "out" / "rows.json"
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        source.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        counts = tool.convert_file(dataset, str(source), str(target), **options)
        return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()], counts

    return run


def spo(subject, predicate, **slots):
    return {
        "predicate": predicate,
        "object_type": {"@value": "人物"},
        "subject_type": "影视作品",
        "object": {slot.replace("value", "@value"): value for slot, value in slots.items()},
        "subject": subject,
    }


DUIE = [
    {
        "text": "《山河谣》由周立行执导，林小满在剧中饰演阿秀",
        "spo_list": [
            spo("山河谣", "导演", value="周立行"),
            spo("林小满", "饰演", value="阿秀", inWork="山河谣"),
            spo("山河谣", "导演", value="周立行"),
        ],
    },
    {"text": "今天天气不错", "spo_list": []},
    {"text": "旧版的客体是字符串", "spo_list": [{"subject": "旧版", "predicate": "客体", "object": "字符串"}]},
]


def test_duie_rows(tool, convert):
    rows, counts = convert("duie", DUIE)
    assert [row["input"] for row in rows] == [row["text"] for row in DUIE]
    assert [row["output"] for row in rows] == [
        "山河谣_导演_周立行\n林小满_饰演_阿秀\n林小满_饰演@inWork_山河谣",
        "",
        "旧版_客体_字符串",
    ]
    assert {row["instruction"] for row in rows} == {tool.DATASETS["duie"].instruction}
    assert counts == {"read": 3, "written": 3, "dropped_triples": 0}


def test_duie_output_is_readable_by_metrics(convert):
    rows, _ = convert("duie", DUIE)
    assert parse_triples(rows[0]["output"]) == (
        {("山河谣", "导演", "周立行"), ("林小满", "饰演", "阿秀"), ("林小满", "饰演@inWork", "山河谣")},
        0,
    )


@pytest.mark.parametrize("bad", ["甲_乙", "甲＿乙", "甲\n乙", " "])
def test_duie_drops_triples_that_cannot_be_written(convert, bad):
    rows, counts = convert(
        "duie", [{"text": "文本", "spo_list": [spo("主", "谓", value=bad), spo("主", "谓", value="宾")]}]
    )
    assert rows[0]["output"] == "主_谓_宾"
    assert counts["dropped_triples"] == 1


def test_duie_empty_slot_is_no_triple(convert):
    rows, counts = convert(
        "duie", [{"text": "文本", "spo_list": [spo("主", "获奖", value="金奖", inWork="", onDate="")]}]
    )
    assert rows[0]["output"] == "主_获奖_金奖"
    assert counts["dropped_triples"] == 0


def test_advertisegen_rows(convert):
    source = [
        {"content": "类型#裙*材质#棉麻*风格#文艺", "summary": "棉麻的料子，穿出一身文艺气。"},
        {"content": "类型#上衣*颜色#米白", "summary": "米白色温柔耐看。"},
    ]
    rows, counts = convert("advertisegen", source, instruction="写广告：")
    assert rows == [{"instruction": "写广告：", "input": row["content"], "output": row["summary"]} for row in source]
    assert (counts["read"], counts["written"]) == (2, 2)


def test_tnews_rows(tool, convert):
    rows, _ = convert(
        "tnews",
        [
            {"label": "108", "label_desc": "news_edu", "sentence": "开学第一课怎么上？", "keywords": ""},
            {"label": "115", "label_desc": "news_agriculture", "sentence": "今年小麦长势好", "keywords": "小麦,长势"},
        ],
    )
    assert [(row["input"], row["output"]) for row in rows] == [
        ("开学第一课怎么上？", "教育"),
        ("今年小麦长势好", "农业"),
    ]
    assert len(tool.TNEWS_LABELS) == 15
    assert all(name in rows[0]["instruction"] for _, name in tool.TNEWS_LABELS.values())


def test_chnsenticorp_csv(convert):
    content = '\ufefflabel,review\r\n1,"房间干净，早餐""丰盛"""\r\n0,隔音差\r\n1,\r\n0,"第一行\n第二行"\r\n'
    rows, counts = convert("chnsenticorp", content)
    assert [(row["input"], row["output"]) for row in rows] == [
        ('房间干净，早餐"丰盛"', "正面"),
        ("隔音差", "负面"),
        ("第一行\n第二行", "负面"),
    ]
    assert counts == {"read": 4, "written": 3, "blank": 1, "dropped_triples": 0}


@pytest.mark.parametrize(
    "content",
    ['label\ttext_a\n1\t"半个引号，也照原样\n0\t不好\n', 'qid\tlabel\ttext_a\n0\t1\t"半个引号，也照原样\n1\t0\t不好\n'],
)
def test_chnsenticorp_tsv_keeps_quotes(convert, content):
    rows, _ = convert("chnsenticorp", content)
    assert [(row["input"], row["output"]) for row in rows] == [('"半个引号，也照原样', "正面"), ("不好", "负面")]


@pytest.mark.parametrize(
    ("dataset", "content", "message"),
    [
        ("duie", [DUIE[0], {"text": "没有标注"}], r"source.txt:2: spo_list: 缺少这个字段: 官方测试集不含标注"),
        ("duie", [{"text": 3, "spo_list": []}], r"source.txt:1: text: 应为字符串，实际是 3"),
        ("duie", [{"text": "文", "spo_list": {}}], r"source.txt:1: spo_list: 应为数组，实际是 \{\}"),
        ("duie", [{"text": "文", "spo_list": ["甲"]}], r"source.txt:1: spo_list\[0\]: 应为对象，实际是 '甲'"),
        (
            "duie",
            [{"text": "文", "spo_list": [{"subject": "甲", "object": {"@value": "乙"}}]}],
            r"source.txt:1: spo_list\[0\].predicate: 应为字符串，实际是 None",
        ),
        (
            "duie",
            [{"text": "文", "spo_list": [spo("甲", "谓", inWork="乙")]}],
            r"source.txt:1: spo_list\[0\].object: 没有 @value",
        ),
        (
            "duie",
            [{"text": "文", "spo_list": [spo("甲", "谓", value="乙", inWork=1)]}],
            r"source.txt:1: spo_list\[0\].object.inWork: 应为字符串，实际是 1",
        ),
        ("advertisegen", '{"content": "类型#裙"}\n', r"source.txt:1: summary: 缺少这个字段，已有的字段：content"),
        ("advertisegen", '{"content": \n', r"source.txt:1: JSON: 不是合法的 JSON"),
        ("advertisegen", "\n[1]\n", r"source.txt:2: 行: 应为 JSON 对象，实际是 int"),
        ("advertisegen", '{"content": "\\ud83d", "summary": ""}\n', r"source.txt:1: 编码: 不是合法的 UTF-8 文本"),
        ("tnews", '{"sentence": "开学第一课"}\n'.encode("gbk"), r"source.txt 是 GB18030 编码.*iconv -f GB18030"),
        (
            "tnews",
            [{"id": 0, "sentence": "无标注", "keywords": ""}],
            r"source.txt:1: label: 缺少这个字段，.*官方测试集",
        ),
        ("tnews", [{"label": "105", "sentence": "某"}], r"source.txt:1: label: 不认识的类别 '105': 应为 100、101"),
        (
            "tnews",
            [{"label": "108", "label_desc": "news_car", "sentence": "某"}],
            r"source.txt:1: label_desc: 'news_car' 与 label 108 不符: 应为 news_edu",
        ),
        (
            "chnsenticorp",
            "label,review\n1,好\n2,一般\n",
            r"source.txt:3: label: 应为 0（负面）或 1（正面），实际是 '2'",
        ),
        (
            "chnsenticorp",
            "score,review\n1,好\n",
            r"source.txt:1: 表头: 不认识的列名 'score、review': 应为：label、review",
        ),
        (
            "chnsenticorp",
            'label,review\n0,"跨\n行"\n1,好,多一列\n',
            r"source.txt:4: 行: 应有 2 列（label、review），实际是 3 列",
        ),
        ("chnsenticorp", 'label,review\n0,差\n1,"没有配对\n0,差\n', r"source.txt:3: 行: CSV 格式有误"),
        (
            "chnsenticorp",
            "label\ttext_a\n1\t好\n0\t".encode() + "差".encode("gbk"),
            r"source.txt:3: 编码: 不是合法的 UTF-8",
        ),
        ("chnsenticorp", "label,review\n", r"没有可以转换的行，没有写出"),
        ("advertisegen", "", r"是空的（0 字节）"),
    ],
)
def test_errors_name_file_line_and_field(convert, tmp_path, dataset, content, message):
    with pytest.raises(ValueError, match=message):
        convert(dataset, content)
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("out/.*"))


def test_errors_are_collected_up_to_twenty(convert):
    with pytest.raises(ValueError, match="有 25 处错误（只列出前 20 处）") as caught:
        convert("advertisegen", [{"content": "类型#裙"}] * 25)
    first, others = str(caught.value).splitlines()[1:]
    assert ":1: summary: " in first
    assert others == "    同样的：第 2–20 行"


def test_failure_keeps_the_earlier_output(convert, tmp_path):
    before, _ = convert("duie", DUIE)
    with pytest.raises(ValueError, match="spo_list"):
        convert("duie", [DUIE[0], {"text": "没有标注"}])
    written = (tmp_path / "out" / "rows.json").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in written] == before
    assert os.listdir(tmp_path / "out") == ["rows.json"]


def numbered(count):
    return [{"content": f"编号#{number}", "summary": "文案"} for number in range(count)]


def test_limit_without_seed_takes_the_first_rows(convert):
    # 够数即停：第 4 行虽坏，也不影响
    rows, counts = convert("advertisegen", [*numbered(3), {"content": "坏行"}], limit=3)
    assert [row["input"] for row in rows] == ["编号#0", "编号#1", "编号#2"]
    assert (counts["read"], counts["written"]) == (3, 3)


def test_limit_with_seed_samples_in_file_order(convert):
    first, counts = convert("advertisegen", numbered(200), limit=10, seed=7)
    again, _ = convert("advertisegen", numbered(200), limit=10, seed=7)
    other, _ = convert("advertisegen", numbered(200), limit=10, seed=8)
    numbers = [int(row["input"].split("#")[1]) for row in first]
    assert numbers == sorted(set(numbers)) and len(numbers) == 10 and max(numbers) > 10
    assert first == again != other
    assert (counts["read"], counts["written"]) == (200, 10)


def test_sample_is_uniform(tool):
    records = [tool.Converted(str(number), "") for number in range(10)]
    hits = [0] * 10
    for seed in range(2000):
        for record in tool.sample_records(records, 3, seed):
            hits[int(record.input)] += 1
    # 每行的期望是 600，标准差约 20
    assert all(500 < count < 700 for count in hits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, r"--limit\(0\) 应为正整数"),
        ({"seed": 3}, r"--seed\(3\) 只在给出 --limit 时有作用"),
    ],
)
def test_option_errors(convert, options, message):
    with pytest.raises(ValueError, match=message):
        convert("advertisegen", numbered(3), **options)


def test_output_must_not_be_the_input(tool, tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"content": "甲", "summary": "乙"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="是同一个文件"):
        tool.convert_file("advertisegen", str(path), str(path))
    with pytest.raises(ValueError, match="是一个目录"):
        tool.convert_file("advertisegen", str(path), str(tmp_path))
    with pytest.raises(ValueError, match="找不到数据文件"):
        tool.convert_file("advertisegen", str(tmp_path / "none.json"), str(tmp_path / "b.json"))


def test_unwritable_output_is_reported(tool, tmp_path):
    source = tmp_path / "a.json"
    source.write_text('{"content": "甲", "summary": "乙"}\n', encoding="utf-8")
    blocker = tmp_path / "file"
    blocker.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"写 .*rows.json 失败（.+），请检查磁盘空间与目录权限"):
        tool.convert_file("advertisegen", str(source), str(blocker / "rows.json"))


def test_full_disk_leaves_nothing_behind(tool, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = [{"content": f"编号#{number}", "summary": "长文案" * 200} for number in range(100)]
    source = tmp_path / "source.json"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # 内核把写出的文件限在 4 KiB 以内，write 返回真的 OSError
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ValueError, match="失败（File too large），请检查磁盘空间与目录权限"):
            tool.convert_file("advertisegen", str(source), str(tmp_path / "out" / "rows.json"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "out") == []


def test_command_line(tool, tmp_path, capsys):
    source, target = tmp_path / "a.json", tmp_path / "b.json"
    rows = [("甲", "乙"), (" ", "丙"), ("丁", " ")]
    lines = (json.dumps({"content": given, "summary": wanted}) for given, wanted in rows)
    source.write_text("\n".join(lines), encoding="utf-8")
    arguments = ["--dataset", "advertisegen", "--input_path", str(source), "--output_path", str(target)]
    tool.main(arguments)
    assert "读入 3 行，写出 1 行，跳过空白的输入或文案 2 行" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^2$"):
        tool.main([*arguments, "--limit", "-1"])
    assert "错误：--limit" in capsys.readouterr().err
