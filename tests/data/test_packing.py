"""batching：一步的样本怎样分给各 rank、装成 micro batch；装箱与不装箱是同一批样本、同样的目标。"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import packing
from finetune.data.packing import collate, deal_step, epoch_steps, shared_prefixes, whole_samples
from finetune.data.prompting import IGNORE_INDEX, EncodedSample
from finetune.data.step_loader import StepLoader

NO = IGNORE_INDEX


def sample(input_ids: list[int], labels: list[int], line: int = 0) -> EncodedSample:
    num_targets = sum(label != NO for label in labels[1:])
    return EncodedSample(input_ids, labels, num_targets, labels.count(NO), False, False, False, line)


class TinyDataSet:
    """StepLoader 所需的最小数据集：样本 i 的 token 都是 i + 10，最后一个是目标。"""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths
        self.offsets = [0, *itertools.accumulate(lengths)]
        self.num_targets = [1] * len(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> EncodedSample:
        length = self.lengths[i]
        return sample([i + 10] * length, [NO] * (length - 1) + [i + 10], i + 1)

    def place(self, i: int) -> tuple[str, int]:
        return "rows.json", i + 1


# ---- epoch_steps ----


def test_epoch_steps_are_fixed_by_seed_and_epoch():
    assert epoch_steps(5, 2, seed=1234, epoch=0) == epoch_steps(5, 2, seed=1234, epoch=0)
    assert epoch_steps(5, 2, seed=None) == [[0, 1], [2, 3], [4]]
    # 写死的次序：numpy 或实现改变了洗牌，续训就会错位
    assert epoch_steps(7, 3, seed=1234, epoch=0) == [[4, 6, 0], [5, 1, 3], [2]]
    assert epoch_steps(7, 3, seed=1234, epoch=1) == [[1, 4, 0], [2, 5, 6], [3]]


@given(num=st.integers(1, 200), batch=st.integers(1, 50), seed=st.integers(-5, 2**40), epoch=st.integers(0, 9))
def test_every_sample_appears_once_an_epoch(num, batch, seed, epoch):
    steps = epoch_steps(num, batch, seed, epoch)
    assert sorted(i for step in steps for i in step) == list(range(num))
    assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1)
    assert 1 <= len(steps[-1]) <= batch


def test_epoch_steps_need_samples():
    with pytest.raises(ValueError, match=r"样本数\(0\)与全局 batch\(4\)都必须至少为 1"):
        epoch_steps(0, 4, seed=1)


# ---- deal_step ----


def test_unpacked_dealing_follows_the_order_of_the_step():
    lengths = [1] * 11
    assert deal_step(lengths, [*range(10, -1, -1)], 2, 2, 20, packing=False) == [
        [[10, 9], [6, 5], [2, 1]],
        [[8, 7], [4, 3], [0]],
    ]
    assert deal_step(lengths, [4, 7], 2, 4, 40, packing=False) == [[[4, 7]], [[]]]


@pytest.mark.parametrize(
    ("lengths", "world_size", "batch_size", "max_tokens", "expected"),
    [
        # 一箱放得下就只用一箱
        ([5, 3, 2, 4], 1, 2, 20, [[[0, 3, 1, 2]]]),
        # 各 rank 的 token 尽量相等：5+2 与 4+3
        ([5, 3, 2, 4], 2, 2, 20, [[[0, 2]], [[3, 1]]]),
        # 平均分放不下时改用首次适应：6+4 与 5+5
        ([6, 5, 5, 4], 1, 1, 10, [[[0, 3], [1, 2]]]),
        # 样本比 micro batch 少：空箱
        ([5], 2, 1, 5, [[[0]], [[]]]),
        # 一个 rank 只分到一条长的，另一个的 micro batch 有两个：匀一条过来，不留空箱
        ([30, 9, 9, 9, 9], 2, 1, 30, [[[0], [3]], [[1], [2, 4]]]),
    ],
)
def test_packed_dealing(lengths, world_size, batch_size, max_tokens, expected):
    assert deal_step(lengths, range(len(lengths)), world_size, batch_size, max_tokens, packing=True) == expected


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 4),
    packing=st.booleans(),
)
def test_dealing_keeps_every_sample_and_every_limit(lengths, world_size, batch_size, packing):
    max_tokens = batch_size * 30
    indices = list(range(len(lengths)))[::-1]
    dealt = deal_step(lengths, indices, world_size, batch_size, max_tokens, packing)
    bins = [micro for rank in dealt for micro in rank]
    assert sorted(i for micro in bins for i in micro) == sorted(indices)
    assert len(dealt) == world_size
    assert len({len(rank) for rank in dealt}) == 1
    assert len(dealt[0]) <= -(-len(lengths) // (world_size * batch_size))
    assert all(sum(lengths[i] for i in micro) <= max_tokens for micro in bins)
    if packing:
        assert sum(not micro for micro in bins) == max(0, len(bins) - len(lengths))
        assert dealt == deal_step(lengths, indices, world_size, batch_size, max_tokens, packing)


def test_ranks_are_balanced_on_uneven_rows():
    lengths = [30 + (i * i * 37) % 900 for i in range(128)]
    dealt = deal_step(lengths, range(128), 4, 8, 8 * 1024, packing=True)
    tokens = [sum(lengths[i] for micro in rank for i in micro) for rank in dealt]
    assert max(tokens) - min(tokens) <= 0.01 * max(tokens)
    assert len(dealt[0]) == -(-sum(lengths) // (4 * 8 * 1024))


def test_overlong_sample_is_refused():
    with pytest.raises(ValueError, match="样本 1 有 9 token，超过一个 micro batch 的上限 8"):
        deal_step([3, 9], [0, 1], 1, 1, 8, packing=True)


# ---- collate ----

TWO = [sample([5, 6, 7], [2, NO, 7]), sample([8, 9, 8, 9], [NO, NO, 8, 9])]


def test_packed_batch_is_one_row():
    batch = collate(TWO, pad_token_id=0, packing=True)
    assert {name: value.tolist() for name, value in batch.items() if torch.is_tensor(value)} == {
        "input_ids": [[5, 6, 7, 8, 9, 8, 9]],
        "labels": [[NO, NO, 7, NO, NO, 8, 9]],
        "target_rows": [1, 4, 5],
    }
    assert batch["document_lengths"] == [3, 4]
    assert batch["document_parents"] == [-1, -1]


def test_padded_batch_is_filled_on_the_right():
    batch = collate(TWO, pad_token_id=0, packing=False)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 0], [8, 9, 8, 9]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        "labels": [[NO, NO, 7, NO], [NO, NO, 8, 9]],
        "target_rows": [1, 5, 6],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


@pytest.mark.parametrize("packing", [True, False])
def test_empty_micro_batch_is_one_pad_without_targets(packing):
    batch = collate([], pad_token_id=3, packing=packing)
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == ([[3]], [[NO]])
    assert (batch["target_rows"].tolist(), batch["target_rows"].dtype) == ([], torch.int64)
    assert batch["document_lengths"] == [1] if packing else batch["attention_mask"].tolist() == [[1]]


SAMPLES = st.lists(
    st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=8), min_size=1, max_size=6
).map(lambda rows: [sample([t for t, _ in row], [t if target else NO for t, target in row]) for row in rows])


def prompt(text: str, answer: str = "z") -> EncodedSample:
    """每个字符一个 token；answer 是目标。"""
    ids = [ord(character) for character in text + answer]
    return sample(ids, [NO] * len(text) + ids[len(text) :])


@pytest.mark.parametrize(
    ("texts", "least", "expected"),
    [
        ([], 2, []),
        (["abcd"], 2, []),
        (["abcd", "abce"], 2, [(3, [0, 1])]),
        (["abcd", "abce"], 4, []),
        (["abcd", "xbcd"], 1, []),
        (["abcd", "abcd"], 2, [(3, [0, 1])]),  # 预测首个目标的那一行各算各的
        (["abc", "abcdef"], 2, [(2, [0, 1])]),
        (["abcx", "pqrx", "abcy", "pqry", "m"], 2, [(3, [0, 2]), (3, [1, 3])]),
        # 两个长的开头胜过一个短的：8 + 8 > 2 × 3
        (["ab111111x", "ab222222x", "ab111111y", "ab222222y"], 2, [(8, [0, 2]), (8, [1, 3])]),
        # 一个短的胜过分成两组：3 × 4 > 3 × 2 + 4
        (["abc1", "abc2", "abc3", "abc4x", "abc4xy"], 2, [(3, [0, 1, 2, 3, 4])]),
    ],
    ids=str,
)
def test_shared_prefixes(monkeypatch, texts, least, expected):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", least)
    assert shared_prefixes([prompt(text) for text in texts]) == expected


def test_chat_samples_share_their_opening():
    """chat 格式没有 system 时，首位的用户标记处有标签（同官方代码），但移位后它不作目标：开头照样共用。"""
    opening, user, assistant = list(range(300, 340)), 195, 196
    rows = []
    for question in ([7, 8], [9, 10, 11]):
        ids = [user, *opening, *question, assistant, 50, 2]
        rows.append(sample(ids, [2, *[NO] * (len(ids) - 3), 50, 2]))
    assert shared_prefixes(rows) == [(41, [0, 1])]
    batch = collate(rows, 0, packing=True)
    assert batch["document_lengths"] == [41, 5, 6] and batch["document_parents"] == [-1, 0, 0]
    assert sum(row.num_targets for row in rows) == len(batch["target_rows"]) == 4


def test_a_small_saving_is_left_alone(monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 2)
    texts = ["abc" + "x" * 26, "abc" + "y" * 26, "m" * 40]  # 省 3，共 30 + 30 + 41
    assert shared_prefixes([prompt(text) for text in texts]) == []
    assert shared_prefixes([prompt(text) for text in texts[:2]]) == [(3, [0, 1])]


def test_shared_prefixes_stop_before_the_first_target(monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    # 回答也相同；没有目标的样本可以一直合并到只剩一个 token
    assert shared_prefixes([prompt("ab", "cd"), prompt("ab", "cd")]) == [(1, [0, 1])]
    assert shared_prefixes([sample([7] * 5, [NO] * 5), sample([7] * 5, [NO] * 5)]) == [(4, [0, 1])]
    assert shared_prefixes([sample([7, 8], [7, 8]), sample([7, 8], [7, 8])]) == []


def test_shared_prefix_is_laid_once_and_first(monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 2)
    samples = [sample([1, 2, 3, 4], [NO, NO, NO, 4]), sample([9, 8], [NO, 8]), sample([1, 2, 5, 6], [NO, NO, NO, 6])]
    batch = collate(samples, pad_token_id=0, packing=True)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 9, 8, 5, 6]]
    assert batch["labels"].tolist() == [[NO, NO, NO, 4, NO, 8, NO, 6]]
    assert batch["target_rows"].tolist() == [2, 4, 6]
    assert batch["document_lengths"] == [2, 2, 2, 2]
    assert batch["document_parents"] == [-1, 0, -1, 0]


@given(samples=st.lists(st.integers(0, 3), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_shared_prefixes_lose_no_token_and_no_target(samples, seed):
    """指令随机地共用；接回之后与原样相同，目标不少。"""
    rng = np.random.default_rng(seed)
    openings = [rng.integers(3, 99, size) for size in (0, 17, 17, 40)]
    rows = [[*openings[which], *rng.integers(3, 99, rng.integers(2, 9))] for which in samples]
    encoded = [sample(list(map(int, row)), [NO] * (len(row) - 1) + [int(row[-1])]) for row in rows]
    batch = collate(encoded, 0, packing=True)
    for name in ("input_ids", "labels"):
        assert [values.tolist() for values in whole_samples(batch, name)] == [getattr(e, name) for e in encoded]
    assert sum(batch["document_lengths"]) == batch["input_ids"].shape[1]
    assert batch["labels"][0, batch["target_rows"] + 1].tolist() == [e.input_ids[-1] for e in encoded]
    saved = sum(map(len, rows)) - batch["input_ids"].shape[1]
    least = sum(size * max(0, samples.count(which) - 1) for which, size in ((1, 17), (2, 17), (3, 40)))
    assert saved >= least or least < 0.05 * sum(map(len, rows))


@given(samples=SAMPLES)
def test_packed_and_padded_hold_the_same_tokens_and_targets(samples):
    packed, padded = (collate(samples, 0, packing) for packing in (True, False))
    mask = padded["attention_mask"].bool()
    for name in ("input_ids", "labels"):
        assert packed[name][0].tolist() == padded[name][mask].tolist()
    for batch in (packed, padded):
        labels, rows = batch["labels"], batch["target_rows"]
        assert len(rows) == sum(item.num_targets for item in samples) == int((labels != NO).sum())
        assert bool((labels.flatten()[rows + 1] != NO).all())
        assert batch["input_ids"].flatten()[rows + 1].tolist() == labels.flatten()[rows + 1].tolist()
        assert bool(((rows + 1) % labels.shape[1] != 0).all())


# ---- StepLoader ----


def steps_of(dataset, world_size=1, start_step=0, epoch=0, **options):
    """[rank][step] 的 StepBatch。"""
    options = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_len": 8, "seed": 7, **options}
    return [
        list(StepLoader(dataset, world_size=world_size, rank=rank, **options).epoch(epoch, start_step))
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_all_ranks_together_see_each_step_once(packing):
    dataset = TinyDataSet([3, 8, 2, 5, 7, 4, 6, 3, 2, 8, 5, 4, 3])
    ranks = steps_of(dataset, world_size=2, packing=packing)
    expected = epoch_steps(13, 8, seed=7, epoch=0)
    assert [len(rank) for rank in ranks] == [2, 2]
    for number, indices in enumerate(expected):
        batches = [rank[number] for rank in ranks]
        assert sorted(line for batch in batches for _, line in batch.rows) == sorted(i + 1 for i in indices)
        assert {len(batch.micro_batches) for batch in batches} == {len(batches[0].micro_batches)}
        assert {batch.num_target_tokens for batch in batches} == {len(indices)}
        assert {batch.num_tokens for batch in batches} == {sum(dataset.lengths[i] for i in indices)}
        tokens = sum(int((micro["input_ids"] != 0).sum()) for batch in batches for micro in batch.micro_batches)
        assert tokens == batches[0].num_tokens
        assert batches[0].rows[0][0] == "rows.json"


def test_starting_in_the_middle_continues_the_same_epoch():
    dataset = TinyDataSet([3, 8, 2, 5, 7, 4, 6, 3, 2, 8, 5, 4, 3])
    (whole,) = steps_of(dataset)
    (rest,) = steps_of(dataset, start_step=2)
    assert len(whole) == 4
    assert [batch.rows for batch in rest] == [batch.rows for batch in whole[2:]]
    for left, right in zip(rest, whole[2:], strict=True):
        for a, b in zip(left.micro_batches, right.micro_batches, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in ("input_ids", "labels", "target_rows"))
    assert steps_of(dataset, start_step=4) == [[]]
    assert [batch.rows for batch in steps_of(dataset, epoch=1)[0]] != [batch.rows for batch in whole]


def test_leaving_the_loop_early_and_errors_in_the_background_end_cleanly():
    dataset = TinyDataSet([3, 4, 5])
    for batch in StepLoader(dataset, batch_size=1, max_len=8, seed=None).epoch(0):
        assert batch.rows == [("rows.json", 1)]
        break
    with pytest.raises(ValueError, match="样本 1 有 4 token，超过一个 micro batch 的上限 3"):
        list(StepLoader(dataset, batch_size=1, max_len=3, seed=None).epoch(0))
