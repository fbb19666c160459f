"""data_set：整份文件的编码、统计与报告、并行与缓存。真实的 BaichuanTokenizer，文件现写。"""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from baichuan import BaichuanTokenizer
from data_set import BaichuanDataSet
from finetune.data import encoding
from finetune.data.parallel import map_chunks, num_bytes_of, split_chunks
from finetune.data.prompting import IGNORE_INDEX, encode_sample
from finetune.data.rows import Problem, RawRow
from finetune.data.samples import check_first_rows, read_samples

ROWS = [
    {"instruction": "抽取：", "input": "水温高，风扇低速转动。", "output": "水温_故障_高"},
    {"instruction": "抽取：", "input": "没有可抽取的内容。", "output": ""},
    {"instruction": "抽取：", "input": "水温高，风扇低速转动。", "output": "水温_故障_高"},
    {"instruction": "抽取：", "input": "更换水泵后正常。" * 20, "output": "水泵_组成_发动机"},
    {"instruction": "抽取：", "input": "短。", "output": "更换_操作_水泵\n" * 30},
    {"instruction": "抽取：", "input": "文本里有<reserved_106>符号", "output": "无"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return BaichuanTokenizer.from_pretrained(tiny_checkpoint("baichuan2-7b"))


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


def load(path: Path, tokenizer, **options) -> BaichuanDataSet:
    return BaichuanDataSet(path, tokenizer, **{"prompt_format": "chat", "max_len": 96, "max_src_len": 64, **options})


def contents(data: BaichuanDataSet) -> list:
    return [(item.input_ids.tolist(), item.labels.tolist(), item[2:]) for item in data]


# ---- 内容 ----


@pytest.mark.parametrize("prompt_format", ["plain", "chat"])
def test_items_equal_encode_sample(rows_file, tokenizer, prompt_format):
    data = load(rows_file, tokenizer, prompt_format=prompt_format)
    expected = [encode_sample(sample, tokenizer, prompt_format, 96, 64) for sample in read_samples(rows_file)]
    assert contents(data) == [(item.input_ids, item.labels, item[2:]) for item in expected]
    assert data.lengths == [len(item.input_ids) for item in expected]
    assert data.num_targets == [item.num_targets for item in expected]
    assert data.lines == [1, 2, 3, 4, 5, 6]
    assert data[0].input_ids.dtype == data[0].labels.dtype == np.int32


def test_role_like_text_never_becomes_a_role_id(rows_file, tokenizer):
    item = load(rows_file, tokenizer)[5]
    assert item.has_control_pieces
    assert [item.input_ids.tolist().count(token) for token in (195, 196, 2)] == [1, 1, 1]
    assert "文本里有<reserved_106>符号" in tokenizer.decode(item.input_ids.tolist())


def test_conversation_labels_survive_storage(tmp_path, tokenizer):
    turns = [("human", "你好"), ("gpt", "你好！"), ("human", "再见"), ("gpt", "再见！")]
    path = tmp_path / "talk.json"
    path.write_text(
        json.dumps({"conversations": [{"from": who, "value": text} for who, text in turns]}), encoding="utf-8"
    )
    (item,) = load(path, tokenizer)
    hello, hello_back, bye, bye_back = (tokenizer.encode_plain(text) for _, text in turns)
    no = [IGNORE_INDEX]
    assert item.input_ids.tolist() == [195, *hello, 196, *hello_back, 195, *bye, 196, *bye_back, 2]
    assert item.labels.tolist() == [
        *[2, *no * len(hello), *no, *hello_back],
        *[2, *no * len(bye), *no, *bye_back, 2],
    ]


def test_statistics_and_report(rows_file, tokenizer):
    data = load(rows_file, tokenizer)
    found = data.statistics
    assert {name: found[name] for name in found if name.startswith("num_") and not name.endswith("tokens")} == {
        "num_rows": 6,
        "num_samples": 6,
        "num_kept_rows": 6,
        "num_duplicates": 1,
        "num_skipped": 0,
        "num_empty_outputs": 1,
        "num_src_truncated": 1,
        "num_tgt_truncated": 1,
        "num_control_rows": 1,
        "num_conversations": 0,
    }
    assert found["num_tokens"] == sum(data.lengths)
    assert found["num_target_tokens"] == sum(data.num_targets)
    assert found["length_percentiles"][100] == 96
    report = data.report()
    for text in [
        f"数据报告：{rows_file}",
        "文件 6 行，样本 6 条\n",
        "空输出 1（目标只有 eos），重复 1（保留）",
        "截断：src 1 条，tgt 1 条",
        "最长 96（上限 96）",
        f"共 {sum(data.lengths)} token，其中目标 {sum(data.num_targets)}（{found['target_share']:.1%}）",
        "1 条的文本里有 <reserved_N> 之类的控制符号，已按普通文字编码",
        "分词缓存：未使用",
    ]:
        assert text in report


def test_overlong_rows_are_skipped_and_duplicates_dropped_on_request(rows_file, tokenizer):
    data = load(rows_file, tokenizer, is_skip=True, drop_duplicates=True)
    assert data.lines == [1, 2, 6]
    assert "文件 6 行，样本 3 条，因超长跳过 2 行" in data.report()
    assert "重复 1（已丢弃）" in data.report()
    whole = load(rows_file, tokenizer)
    assert contents(data) == [contents(whole)[i] for i in (0, 1, 5)]


def test_shared_data_has_its_known_flaws(shared_dir):
    tokenizer = BaichuanTokenizer.from_pretrained(shared_dir / "tokenizer" / "v2")
    counted = {}
    for name in ("spo_0", "d2q_0", "cls_0"):
        data = load(shared_dir / "data" / f"{name}.json", tokenizer, max_len=1560, max_src_len=1024)
        counted[name] = [data.statistics[key] for key in ("num_samples", "num_empty_outputs", "num_duplicates")]
    assert counted["spo_0"] == [1441, 22, 0]
    assert counted["d2q_0"] == [3143, 0, 53]
    assert counted["cls_0"][:2] == [3000, 0]


# ---- 报错 ----


def test_broken_rows_are_listed_by_line(tmp_path, tokenizer):
    path = tmp_path / "bad.json"
    path.write_text('{"instruction": "问", "output": 1}\n{"instruction": "问", "output": ""}\n{\n', encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"有 2 处错误，请改正后重试：\n  .*bad.json:1: output: .*\n  .*bad.json:3: JSON: "
    ):
        load(path, tokenizer)


def test_system_row_of_a_format_without_system_is_reported_by_line(tmp_path, tokenizer):
    path = tmp_path / "talk.json"
    turns = [{"role": role, "content": "你好"} for role in ("system", "user", "assistant")]
    path.write_text("\n" + json.dumps({"conversations": turns}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"talk.json:2: 提示词: Baichuan-13B-Chat（v1）的对话格式没有 system 角色"):
        load(path, tokenizer, family="baichuan")
    assert len(load(path, tokenizer)) == 1


def test_row_without_a_target_is_an_error(tmp_path, tiny_checkpoint):
    # v1 的规范化去掉空白：src 为空，唯一的目标 eos 落在首位，移位后没有目标
    tokenizer = BaichuanTokenizer.from_pretrained(tiny_checkpoint("baichuan-7b"))
    path = tmp_path / "blank.json"
    path.write_text(json.dumps({"instruction": "\u200b", "input": "", "output": ""}), encoding="utf-8")
    if tokenizer.encode_plain("\u200b"):
        pytest.skip("这个词表不会把零宽空格规范化成空串")
    with pytest.raises(ValueError, match=r"blank.json:1: output: 截断之后没有任何目标 token（src 0 个 token）"):
        load(path, tokenizer, prompt_format="plain")


def test_chunks_are_bounded_in_rows_and_bytes():
    rows = [RawRow(1, b"x" * 5000), RawRow(2, b"x" * 400), Problem("f", 3, "行", "", ""), RawRow(4, b"x" * 700)]
    rows += [RawRow(line, b"x") for line in range(5, 305)]
    chunks = list(split_chunks(iter(rows), bytes_per_chunk=1000))
    assert [len(chunk) for chunk in chunks] == [1, 3, 256, 44]
    assert [row for chunk in chunks for row in chunk] == rows


def test_huge_lines_stay_in_bounded_memory():
    """在途的字节有上限（一行再长也至少放一行）；结果与次序不变。"""
    rows = [RawRow(line, b"x" * 4000 * (1 + line % 3)) for line in range(12)]
    taken, most = [], []

    def counted():
        for chunk in split_chunks(rows, bytes_per_chunk=1):
            taken.append(len(chunk[0].content))
            yield chunk

    for done, size in enumerate(map_chunks(num_bytes_of, counted(), "huge.json", workers=2, bytes_in_flight=20_000)):
        assert size == len(rows[done].content)
        most.append(sum(taken[done:]))
    assert len(most) == len(rows) and max(most) <= 20_000 + max(taken)


def test_first_rows_are_checked_without_the_rest(tmp_path):
    path = tmp_path / "rows.json"
    good = json.dumps({"instruction": "问", "output": "答"}, ensure_ascii=False) + "\n"
    path.write_text(good * 5 + "{\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.json:6: JSON: "):
        check_first_rows(path)
    check_first_rows(path, max_rows=5)
    check_first_rows(path, max_bytes=3 * len(good.encode()))


def test_other_user_mistakes(tmp_path, rows_file, tokenizer):
    with pytest.raises(ValueError, match=r"--max_src_len\(96\) 必须小于 --max_len\(96\)，请调小前者"):
        load(rows_file, tokenizer, max_src_len=96)
    with pytest.raises(ValueError, match="的 6 行全部超长，被 --is_skip 丢弃，请调大 --max_len"):
        load(rows_file, tokenizer, max_len=4, max_src_len=3, is_skip=True)
    with pytest.raises(ValueError, match="找不到数据文件"):
        load(tmp_path / "none.json", tokenizer, cache_dir=tmp_path)
    blank = tmp_path / "blank.json"
    blank.write_text("\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="没有任何样本"):
        load(blank, tokenizer)


# ---- 并行 ----


def test_processes_give_the_same_samples_in_the_same_order(tmp_path, tokenizer):
    path = tmp_path / "many.json"
    rows = [{**ROWS[i % 6], "input": f"{ROWS[i % 6]['input']}{i}"} for i in range(700)] + ROWS
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=0), encoding="utf-8")
    alone, together = (load(path, tokenizer, num_workers=n, drop_duplicates=True) for n in (1, 2))
    assert len(alone) == 705
    assert contents(alone) == contents(together)
    path.write_text("[1,\n" + path.read_text(encoding="utf-8")[1:], encoding="utf-8")
    with pytest.raises(ValueError, match="有 1 处错误"):
        load(path, tokenizer, num_workers=2)


def test_a_killed_worker_is_reported_not_waited_for(rows_file, tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "encode_chunk", lambda rows, **_: os._exit(9))
    with pytest.raises(RuntimeError, match="的子进程意外退出（多半是内存不足）"):
        load(rows_file, tokenizer, num_workers=2)


# ---- 缓存 ----


def test_cache_is_used_and_gives_the_same_samples(rows_file, tokenizer, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    fresh = load(rows_file, tokenizer, cache_dir=cache, drop_duplicates=True)
    (file,) = cache.iterdir()
    assert fresh.cache_note == f"没有缓存，已编码；缓存写到 {file}"
    monkeypatch.setattr(encoding, "encode_chunk", None)  # 命中时不再编码
    cached = load(rows_file, tokenizer, cache_dir=cache, drop_duplicates=True)
    assert cached.cache_note == f"命中 {file}"
    assert contents(cached) == contents(fresh)
    assert cached.statistics == fresh.statistics


def test_any_change_of_content_tokenizer_or_settings_encodes_again(rows_file, tokenizer, tiny_checkpoint, tmp_path):
    cache = tmp_path / "cache"
    other = BaichuanTokenizer.from_pretrained(tiny_checkpoint("baichuan-7b"))
    load(rows_file, tokenizer, cache_dir=cache)
    for used, options in [
        (other, {}),
        (tokenizer, {"max_len": 97}),
        (tokenizer, {"is_skip": True}),
        (tokenizer, {"prompt_format": "plain"}),
    ]:
        note = load(rows_file, used, cache_dir=cache, **options).cache_note
        assert note.startswith("数据、分词器或设置与旧缓存不同，已重新编码；缓存写到")
    rows_file.write_text(json.dumps(ROWS[0]), encoding="utf-8")
    changed = load(rows_file, tokenizer, cache_dir=cache)
    assert changed.cache_note.startswith("数据、分词器或设置与旧缓存不同")
    assert len(changed) == 1
    assert len(list(cache.iterdir())) == 6


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [flip_a_bit, lambda content: content[:-5], lambda content: b"", lambda content: content + b"x"]
)
def test_damaged_cache_is_noticed_and_replaced(rows_file, tokenizer, tmp_path, damage):
    cache = tmp_path / "cache"
    fresh = load(rows_file, tokenizer, cache_dir=cache)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = load(rows_file, tokenizer, cache_dir=cache)
    assert again.cache_note == f"{file} 已损坏（校验和不符），已重新编码；缓存写到 {file}"
    assert contents(again) == contents(fresh)
    assert file.read_bytes() == whole


def test_cache_of_another_file_under_this_name_is_not_used(rows_file, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    load(rows_file, tokenizer, cache_dir=cache)
    (first,) = cache.iterdir()
    load(rows_file, tokenizer, cache_dir=cache, max_len=97)
    (second,) = set(cache.iterdir()) - {first}
    second.replace(first)
    data = load(rows_file, tokenizer, cache_dir=cache)
    assert data.cache_note.startswith(f"{first} 的内容与文件名不符，已重新编码")
    assert max(data.lengths) == 96


def test_cache_that_cannot_be_written_does_not_stop_the_run(rows_file, tokenizer, tmp_path):
    (tmp_path / "cache").write_text("这里是一个文件", encoding="utf-8")
    data = load(rows_file, tokenizer, cache_dir=tmp_path / "cache")
    assert "缓存没有写成（" in data.cache_note
    assert len(data) == 6


def test_left_overs_of_killed_runs_are_removed_after_a_day(rows_file, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, age in [("old", 90_000), ("new", 60)]:
        (cache / f".tmp-{name}").write_bytes(b"half")
        os.utime(cache / f".tmp-{name}", (time.time() - age,) * 2)
    load(rows_file, tokenizer, cache_dir=cache)
    assert [path.name for path in cache.glob(".tmp-*")] == [".tmp-new"]


def test_two_runs_writing_at_once_leave_one_whole_cache(rows_file, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                load(rows_file, tokenizer, cache_dir=cache)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert len(list(cache.iterdir())) == 1
    assert load(rows_file, tokenizer, cache_dir=cache).cache_note.startswith("命中")
