"""成批的贪心续写：各行相同的开头只算一次，做完的行马上让位给下一行，每行各有自己的长度，没有填充。

一批里各行的键值各占一格（Slots），一格里依次是开头、提示词与续写；哪些键看得见由长度决定，每步只算一次。
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, RepetitionPenaltyLogitsProcessor

from baichuan.attention import alibi_slopes
from finetune.methods.registry import base_model_of

# 相同的开头至少这么多 token 才值得分开算
MIN_SHARED_TOKENS = 16
# 一格的长度是它的倍数：注意力的形状不必每步都变
SLOT_STEP = 32


class Prompt(NamedTuple):
    """要续写的一行；前 num_shared 个 token 是与别的行共用的开头。"""

    key: Any
    ids: Sequence[int]
    num_shared: int = 0


def plan_prompts(prompts: Sequence[Sequence[int]], indices: Iterable[int] | None = None) -> list[Prompt]:
    """先做哪一行，哪些行共用开头；key 是行号，indices 是要做的行（缺省全部）。

    开头相同的行在一起，其中从长到短，各组也按最长的一行从长到短：最占显存的最先做，放不下时立刻知道。
    """
    order = sorted(range(len(prompts)) if indices is None else indices, key=lambda index: prompts[index])
    common = [common_length(prompts[a], prompts[b]) for a, b in pairwise(order)]
    groups = _shared(common, 0, len(order))[1]
    alone = set(range(len(order))).difference(*(rows for _, rows in groups))
    planned = [
        [Prompt(order[row], prompts[order[row]], size) for row in rows]
        for size, rows in (*groups, *((0, [row]) for row in alone))
    ]
    for group in planned:
        group.sort(key=lambda prompt: (-len(prompt.ids), prompt.key))
    planned.sort(key=lambda group: (-len(group[0].ids), group[0].key))
    return [prompt for group in planned for prompt in group]


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """两行相同的开头有几个 token；各行至少留一个给自己。"""
    limit = min(len(one), len(other)) - 1
    return next((n for n in range(limit) if one[n] != other[n]), max(0, limit))


def _shared(common: list[int], begin: int, end: int) -> tuple[int, list[tuple[int, list[int]]]]:
    """排好的第 begin 到 end 行哪些共用开头 → (省下多少 token, [(开头的长度, 各行)])。

    common[i] 是第 i 与 i + 1 行相同的开头。在开头最短的各处分开：自己分组省得更多的一段自己分，其余各行同用最短的开头。
    """
    if end - begin < 2:
        return 0, []
    lowest = min(common[begin : end - 1])
    edges = [i + 1 for i in range(begin, end - 1) if common[i] < lowest + MIN_SHARED_TOKENS]
    lowest = lowest if lowest >= MIN_SHARED_TOKENS else 0
    saved, groups, rest = 0, [], []
    for edge in pairwise([begin, *edges, end]):
        saved_here, groups_here = _shared(common, *edge)
        if saved_here > lowest * (edge[1] - edge[0]):
            saved, groups = saved + saved_here, groups + groups_here
        else:
            rest += range(*edge)
    if lowest and len(rest) > 1:
        saved, groups = saved + lowest * (len(rest) - 1), [*groups, (lowest, rest)]
    return saved, groups


class Slots:
    """各行的键值：每层 [格数, heads, 格长, d]，第 i 行在第 i 格；格长随最长的一行增长。

    lengths 是各行已有的键数；update 是各层注意力调用的：把新的一个键写在各行的末尾，给出各行看得到的范围。
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths: list[int] = []
        self._places: tuple[Tensor, Tensor] | None = None
        self.num_keys = 0

    def add(self, cache: DynamicCache, lengths: list[int]) -> None:
        """cache（各行从第 0 个键起，末尾可有填充）的各行放进后面的格；lengths 是各行有效的键数。"""
        first, size = len(self.lengths), cache.get_seq_length()
        self.lengths += lengths
        if not self.keys:
            self.keys, self.values = (
                [getattr(layer, name)[:0] for layer in cache.layers] for name in ("keys", "values")
            )
        self._reserve(size)
        for index, layer in enumerate(cache.layers):
            self.keys[index][first : len(self.lengths), :, :size] = layer.keys
            self.values[index][first : len(self.lengths), :, :size] = layer.values

    def _reserve(self, size: int) -> None:
        """每行有一格，每格至少 size 个键；逐层换成大的，旧的随即放下。"""
        num_rows, _, length, _ = self.keys[0].shape
        if num_rows >= len(self.lengths) and length >= size and num_rows:
            return
        num_rows, size = max(num_rows, len(self.lengths)), -(-max(size, length) // SLOT_STEP) * SLOT_STEP
        for states in (self.keys, self.values):
            for index, old in enumerate(states):
                states[index] = old.new_zeros(num_rows, old.shape[1], size, old.shape[3])
                states[index][: len(old), :, : old.shape[2]] = old

    def remove(self, row: int) -> None:
        """去掉一行：末一行移到它的格里。"""
        last = len(self.lengths) - 1
        if row < last:
            for slots in (*self.keys, *self.values):
                slots[row, :, : self.lengths[last]] = slots[last, :, : self.lengths[last]]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def begin_step(self, device: torch.device) -> Tensor:
        """各行要再写一个键 → 它们的位置 [b, 1]。"""
        longest = max(self.lengths) + 1
        self._reserve(longest)
        self.num_keys = min(-(-longest // SLOT_STEP) * SLOT_STEP, self.keys[0].shape[2])
        positions = torch.tensor(self.lengths, device=device)
        self._places = torch.arange(len(self.lengths), device=device), positions
        self.lengths = [length + 1 for length in self.lengths]
        return positions[:, None]

    def get_seq_length(self) -> int:
        """已有键的行里最长的。"""
        return max(self.lengths, default=0)

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """key、value [b, heads, 1, d] → 各 [b, heads, num_keys, d]。"""
        rows, positions = self._places
        self.keys[layer][rows, :, positions] = key[:, :, 0]
        self.values[layer][rows, :, positions] = value[:, :, 0]
        return self.keys[layer][: len(rows), :, : self.num_keys], self.values[layer][: len(rows), :, : self.num_keys]


class Decoder:
    """一个模型（可有适配器）的续写；一行做完就换下一行。"""

    def __init__(self, model: nn.Module, config: GenerationConfig, batch_size: int) -> None:
        self.model, self.config, self.batch_size = model, config, batch_size
        self.base = base_model_of(model)
        self.device = self.base.model.embed_tokens.weight.device
        self.dtype = self.base.model.embed_tokens.weight.dtype
        self._opening: tuple[Sequence[int], DynamicCache] | None = None
        slopes = alibi_slopes(self.base.config.num_attention_heads).to(self.device)[:, None, None]
        self._slopes = None if self.base.config.position_embedding == "rope" else slopes

    @torch.no_grad()
    def run(
        self, prompts: Iterable[Prompt], is_stopped: Callable[[list[int]], bool] = lambda ids: False
    ) -> Iterator[list[tuple[Any, list[int]]]]:
        """依次取 prompts，每次给出刚做完的几行：[(key, 新生成的 id，不含 eos)]。

        有空的格才取下一行；is_stopped 由至今生成的 id 说要不要停。
        """
        prompts, slots = iter(prompts), Slots()
        running: list[tuple[Prompt, list[int]]] = []
        is_last = False
        while True:
            done = []
            num_free = self.batch_size - len(running)
            if not is_last and num_free >= max(1, self.batch_size // 8):
                new = list(islice(prompts, num_free))
                is_last = len(new) < num_free
                for _, group in groupby(new, key=lambda prompt: prompt.ids[: prompt.num_shared]):
                    group = [(prompt, []) for prompt in group]
                    scores = self._read([prompt for prompt, _ in group], slots)
                    running += group
                    done += self._take(scores, running, len(running) - len(group), slots, is_stopped)
            elif running:
                done = self._take(self._step(running, slots), running, 0, slots, is_stopped)
            if done:
                yield done
            if is_last and not running:
                return

    def _take(self, scores, running, first: int, slots: Slots, is_stopped) -> list[tuple[Any, list[int]]]:
        """running 的第 first 行起各收下得分最高的 token；返回做完的行，它们让出各自的格。"""
        if self.config.repetition_penalty != 1:
            penalize = RepetitionPenaltyLogitsProcessor(self.config.repetition_penalty)
            pairs = zip(running[first:], scores.float().split(1), strict=True)
            seen = ((torch.tensor([[*prompt.ids, *ids]], device=self.device), row) for (prompt, ids), row in pairs)
            scores = torch.cat([penalize(*pair) for pair in seen])
        done = []
        chosen = scores.argmax(-1).tolist()
        for row in reversed(range(first, len(running))):  # 从后往前：移到空格里的总是已经看过的
            prompt, ids = running[row]
            token = chosen[row - first]
            is_end = token == self.config.eos_token_id
            if not is_end:
                ids.append(token)
            if is_end or len(ids) >= self.config.max_new_tokens or is_stopped(ids):
                done.append((prompt.key, ids))
                running[row] = running[-1]
                running.pop()
                slots.remove(row)
        return done[::-1]

    def _read(self, prompts: list[Prompt], slots: Slots) -> Tensor:
        """读开头相同的几行，键值放进后面的格 → 末一个 token 的得分 [k, V]。"""
        opening = self._opening_of(prompts[0].ids[: prompts[0].num_shared])
        num_before = opening.get_seq_length()
        own = [list(prompt.ids[prompt.num_shared :]) for prompt in prompts]
        longest = max(map(len, own))
        pad = self.config.pad_token_id or 0
        input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in own], device=self.device)
        cache = DynamicCache()
        for index, layer in enumerate(opening.layers if num_before else ()):
            cache.update(*(states.expand(len(own), -1, -1, -1) for states in (layer.keys, layer.values)), index)
        last = torch.tensor([row * longest + len(ids) - 1 for row, ids in enumerate(own)], device=self.device)
        hidden = self.base.model(input_ids=input_ids, past_key_values=cache, output_rows=last).last_hidden_state
        slots.add(cache, [num_before + len(ids) for ids in own])
        return self.base.lm_head(hidden[0])

    def _step(self, running, slots: Slots) -> Tensor:
        """各行读入刚选的 token → 下一个的得分 [b, V]。"""
        positions = slots.begin_step(self.device)
        input_ids = torch.tensor([[ids[-1]] for _, ids in running], device=self.device)
        hidden = self.base.model(
            input_ids=input_ids,
            attention_mask=self._bias(positions, slots.num_keys),
            position_ids=positions,
            past_key_values=slots,
        ).last_hidden_state
        return self.base.lm_head(hidden[:, 0])

    def _bias(self, positions: Tensor, num_keys: int) -> Tensor:
        """ALiBi 与看得到的键：positions [b, 1] → [b, heads | 1, 1, num_keys]。"""
        places = torch.arange(num_keys, device=self.device)
        is_hidden = (places > positions)[:, None, None]
        if self._slopes is None:
            bias = torch.zeros(is_hidden.shape, dtype=self.dtype, device=self.device)
        else:
            # 与 BaichuanModel._bias 相同：Baichuan2 用 j - i，Baichuan 用 j
            distances = places - positions if self.base.config.norm_head else places.expand(len(positions), -1)
            bias = (self._slopes * distances[:, None, None].float()).to(self.dtype)
        return bias.masked_fill(is_hidden, torch.finfo(self.dtype).min)

    def _opening_of(self, ids: Sequence[int]) -> DynamicCache:
        """P-Tuning 的提示与共用的开头的键值，[1, heads, 长度, d]；与上一次相同时不再算。"""
        if self._opening is None or self._opening[0] != ids:
            cache, prompt = self._virtual_tokens()
            embeds = self.base.model.embed_tokens(torch.tensor([list(ids)], device=self.device, dtype=torch.long))
            if prompt is not None:
                embeds = torch.cat([prompt.to(embeds.dtype), embeds], dim=1)
            if embeds.shape[1]:
                rows = torch.tensor([embeds.shape[1] - 1], device=self.device)
                self.base.model(inputs_embeds=embeds, past_key_values=cache, output_rows=rows)
            self._opening = ids, cache
        return self._opening[1]

    def _virtual_tokens(self) -> tuple[DynamicCache, Tensor | None]:
        """P-Tuning 第 2 版每层的键值，或第 1 版词嵌入处的提示 [1, V, H]；没有时为空的。"""
        config = getattr(self.model, "active_peft_config", None)
        if config is None or not config.is_prompt_learning or self.model._adapters_disabled:
            return DynamicCache(), None
        prompt = self.model.get_prompt(1)
        return (DynamicCache(), prompt) if isinstance(prompt, Tensor) else (prompt, None)
