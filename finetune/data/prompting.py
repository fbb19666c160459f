"""提示词格式：把一条样本（或一段对话）按 token id 拼成 src 与 tgt；训练与 predict.py 共用这里的函数。

plain（基座模型）：src = instruction + input，tgt = output + eos。
  多轮对话的各轮依次相接，每个回答都是目标并以 eos 收尾；system 文本放在最前，不作目标。
chat（对话模型）：用户消息前是 user_token_id，回答前是 assistant_token_id，system 只有文本、没有角色 id。
  标签与官方 fine-tune.py 一致：上一轮回答的 eos 是「下一个用户标记」处的标签，input_ids 中只有最末尾才有 eos。
template（--prompt_format 文件.json）：每条消息填进自己的一句模板，模板的文字只是普通文字；其余同 plain。

目标是各个回答，除非 Sample.trained 另有规定。作目标的消息连同它的结尾：回答的结尾是 eos，用户与 system 的结尾是
其后的角色标记；不作目标的回答，它的 eos 也不是目标。

角色 id 只由 id 拼入，绝不编码角色字符串；用户文本一律经 tokenizer.encode_plain 编码，
文本里的 <reserved_106>、</s> 之类因此只是普通文字。

src 的截断（max_src_len，训练与预测相同，且与回答无关）：先从最早的一轮起整轮丢弃，最后一轮总是保留；
仍然超长则截去最后一条用户消息的尾部（指令与输入的开头保留），再不够才截 system 的尾部；角色 id 从不截去。
"""

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from utils import shown

IGNORE_INDEX = -100
PROMPT_FORMATS = ("plain", "chat")
TEMPLATE = "template"  # 用户自己的模板；由文件指定
PROMPT_FAMILIES = ("baichuan", "baichuan2")
Message = tuple[str, str]  # (role, text)，role ∈ system | user | assistant


class Turn(NamedTuple):
    """编码后的一条消息。"""

    role: str
    head: list[int]  # 正文之前的角色 id（chat）或文字（template 的回答），从不截去
    ids: list[int]
    text: str
    is_trained: bool = False
    has_control_pieces: bool = False
    is_cut: bool = False  # 截短了：不训练它的结尾


class _Layout:
    """一种提示格式怎样编码一条消息、怎样截短它。"""

    def __init__(self, tokenizer, prompt_format: str, user_id: int, assistant_id: int, template: dict | None):
        _check_choice("prompt_format", prompt_format, (*PROMPT_FORMATS, TEMPLATE))
        self.encode, self.eos = tokenizer.encode_user_text, tokenizer.eos_token_id
        self.is_chat = prompt_format == "chat"
        self.template = template if prompt_format == TEMPLATE else None
        self.heads = {"user": [user_id], "assistant": [assistant_id]} if self.is_chat else {}
        if self.template is not None:
            self.heads = {"assistant": self.encode(self.template["assistant"].partition("{text}")[0])[0]}

    def turn(self, role: str, text: str, is_trained: bool = False, is_open: bool = False) -> Turn:
        """is_open：还没有说完的回答，不接模板里回答之后的文字。"""
        ids, has_control_pieces = self.encode(text if self.template is None or is_open else self._fill(role, text))
        return Turn(role, self.heads.get(role, []), ids, text, is_trained, has_control_pieces)

    def _fill(self, role: str, text: str) -> str:
        """模板里的一条消息；回答之前的文字在 head 里，另行编码：生成时提示词就到那里为止。"""
        if not self.template.get(role):
            raise ValueError(f"--prompt_format 的模板没有 {role}，却有 {role} 的消息，请在模板文件里补上")
        before, _, after = self.template[role].partition("{text}")
        return f"{'' if role == 'assistant' else before}{text}{after}"

    def shorten(self, turn: Turn, size: int) -> Turn:
        """正文截到 size 个 token；模板的文字不截，只截用户的话。"""
        size = max(0, size)
        if self.template is None:
            return turn._replace(ids=turn.ids[:size], is_cut=True)
        low, high = 0, len(turn.text)
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(self.encode(self._fill(turn.role, turn.text[:middle]))[0]) <= size
            low, high = (middle, high) if fits else (low, middle - 1)
        return self.turn(turn.role, turn.text[:low], turn.is_trained)._replace(is_cut=True)


class EncodedSample(NamedTuple):
    """一条编码后的样本；labels 与 input_ids 等长且未移位，非目标处为 IGNORE_INDEX。"""

    input_ids: Sequence[int]
    labels: Sequence[int]
    num_targets: int  # 移位后真正参与损失的目标数：labels[1:] 中不为 IGNORE_INDEX 的个数
    num_src_tokens: int  # 最后一个回答之前的 token 数（含角色 id）
    src_truncated: bool  # 丢弃了较早的轮次，或截短了用户/system 文本
    tgt_truncated: bool  # 回答被截短（此时没有 eos）
    has_control_pieces: bool  # 文本里有控制符号，已按普通文字编码
    line: int = 0


def max_prompt_tokens(model_max_length: int, max_new_tokens: int, family: str = "baichuan2") -> int:
    """官方对话代码给提示词留的长度；v1（baichuan）至少留上下文的一半。"""
    limit = model_max_length - max_new_tokens
    if family == "baichuan":
        limit = max(model_max_length // 2, limit)
    if limit < 1:
        raise ValueError(
            f"max_new_tokens({max_new_tokens}) 必须小于模型的上下文长度({model_max_length})，请调小 --max_new_tokens"
        )
    return limit


def encode_prompt(
    tokenizer,
    messages: Sequence[Message],
    prompt_format: str,
    *,
    family: str = "baichuan2",
    max_src_len: int | None = None,
    max_input_tokens: int | None = None,
    user_token_id: int = 195,
    assistant_token_id: int = 196,
    template: dict[str, str] | None = None,
) -> list[int]:
    """把对话编成等待回答的提示词 id。

    max_src_len：训练时的截断规则（见模块说明），用训练时的值，预测的提示词就与训练的 src 逐个 id 相同。
    max_input_tokens：官方 chat() 的规则，先整轮丢弃，再从左边硬截（可能截去 system 与角色 id）；
    plain 没有官方规则，按 max_src_len 的规则办。两者都给时先用 max_src_len。
    family="baichuan"（Baichuan-13B-Chat）没有 system 角色，出现即 ValueError；第一条用户消息之前的回答不用。
    来源：v2 为 generation_utils.build_chat_input，v1 为 2023-08 之后的 _build_chat_input。
    """
    _check_choice("family", family, PROMPT_FAMILIES)
    if not messages:
        raise ValueError("对话为空，至少要有一条用户消息")
    layout = _Layout(tokenizer, prompt_format, user_token_id, assistant_token_id, template)
    last = len(messages) - 1
    turns = [
        layout.turn(role, text, is_open=place == last and role == "assistant")
        for place, (role, text) in enumerate(messages)
    ]
    if not layout.is_chat:
        limits = [limit for limit in (max_src_len, max_input_tokens) if limit is not None]
        turns, _ = _fit_turns(turns, min(limits, default=None), layout)
        ending = layout.heads.get("assistant", []) if turns[-1].role != "assistant" else []
        return _lay_out(turns, layout)[0] + ending
    if max_src_len is not None:
        _reject_system(turns, family)
        turns, _ = _fit_turns(turns, max_src_len, layout)
    return _chat_prompt(turns, layout, family, max_input_tokens)


def encode_answer(
    tokenizer,
    text: str,
    prompt_format: str,
    *,
    user_token_id: int = 195,
    assistant_token_id: int = 196,
    template: dict[str, str] | None = None,
    **_: str,
) -> list[int]:
    """一个回答作目标的 id，同训练：连同模板里回答之后的文字与 eos。"""
    layout = _Layout(tokenizer, prompt_format, user_token_id, assistant_token_id, template)
    return [*layout.turn("assistant", text).ids, layout.eos]


def encode_sample(
    sample,
    tokenizer,
    prompt_format: str,
    max_len: int,
    max_src_len: int,
    *,
    family: str = "baichuan2",
    user_token_id: int = 195,
    assistant_token_id: int = 196,
    template: dict[str, str] | None = None,
) -> EncodedSample:
    """把一条训练样本编成 input_ids 与 labels；纯函数，不读文件，不改 sample。

    sample.messages 的最后一条必须是回答。src 截到 max_src_len，tgt（回答 + eos）截到 max_len - len(src)，
    截短的 tgt 没有 eos。labels 未移位，移位只发生在模型里。
    """
    _check_choice("family", family, PROMPT_FAMILIES)
    if max_src_len >= max_len:
        raise ValueError(f"--max_src_len({max_src_len}) 必须小于 --max_len({max_len})，请调小前者")
    roles = [role for role, _ in sample.messages]
    if ("assistant", "assistant") in pairwise(roles):
        raise ValueError("两个回答连在一起，请合成一个，或补上它们之间的提问")
    layout = _Layout(tokenizer, prompt_format, user_token_id, assistant_token_id, template)
    trained = sample.trained or [role == "assistant" for role in roles]
    *context, answer = [layout.turn(*message, flag) for message, flag in zip(sample.messages, trained, strict=True)]
    assert answer.role == "assistant", "训练样本的最后一条必须是回答，由 data/samples 保证"
    has_control_pieces = answer.has_control_pieces or any(turn.has_control_pieces for turn in context)
    if layout.is_chat:
        _reject_system(context, family)
    context, src_truncated = _fit_turns(context, max_src_len, layout)
    input_ids, labels = _lay_out([*context, answer._replace(ids=[])], layout)
    num_src_tokens = len(input_ids)

    target = [*answer.ids, layout.eos]
    budget = max_len - num_src_tokens
    input_ids += target[:budget]
    labels += target[:budget] if answer.is_trained else [IGNORE_INDEX] * len(target[:budget])
    return EncodedSample(
        input_ids=input_ids,
        labels=labels,
        num_targets=sum(label != IGNORE_INDEX for label in labels[1:]),
        num_src_tokens=num_src_tokens,
        src_truncated=src_truncated,
        tgt_truncated=len(target) > budget,
        has_control_pieces=has_control_pieces,
        line=sample.line,
    )


def encode_samples(
    sample, tokenizer, document_overlap: int = 0, document_bos: bool = False, **options
) -> list[EncodedSample]:
    """一行的全部样本：一篇文档的各段；偏好对的好、坏两个回答；别的只有一个。options 同 encode_sample。"""
    if sample.format == "text":
        [(_, text)] = sample.messages
        return encode_document(text, tokenizer, options["max_len"], document_overlap, document_bos, sample.line)
    answers = [sample]
    if sample.rejected is not None:
        answers.append(sample._replace(messages=(*sample.messages[:-1], ("assistant", sample.rejected))))
    return [encode_sample(answer, tokenizer, **options) for answer in answers]


def encode_document(
    text: str, tokenizer, max_len: int, overlap: int = 0, add_bos: bool = False, line: int = 0
) -> list[EncodedSample]:
    """一篇文档 → 至多 max_len 个 token 的各段，以 eos 结尾；每个 token 恰好作一次目标。

    后一段的开头重复前一段末尾的 overlap 个 token，只作上文。没有上文的一段，它的首个 token 不能作目标：
    overlap 为 0 时每个切口处因此少一个。
    """
    ids, has_control_pieces = tokenizer.encode_user_text(text)
    if not ids:
        return [EncodedSample([tokenizer.eos_token_id], [tokenizer.eos_token_id], 0, 0, False, False, False, line)]
    ids = [*([tokenizer.bos_token_id] if add_bos else []), *ids, tokenizer.eos_token_id]
    pieces, begin = [], 0
    while begin == 0 or begin + overlap < len(ids):
        piece = ids[begin : begin + max_len]
        num_seen = overlap if begin else int(add_bos)
        labels = [IGNORE_INDEX] * num_seen + piece[num_seen:]
        num_targets = len(piece) - max(num_seen, 1)
        pieces.append(EncodedSample(piece, labels, num_targets, num_seen, False, False, has_control_pieces, line))
        begin += max_len - overlap
    # 没有上文的一个 token 什么也学不到；别的段总有目标
    return [piece for piece in pieces if piece.num_targets] or pieces[:1]


def _lay_out(turns: Sequence[Turn], layout: _Layout) -> tuple[list[int], list[int]]:
    """把各轮依次拼成 (input_ids, labels)。末尾的回答留待续写，不加 eos。"""
    input_ids: list[int] = []
    labels: list[int] = []
    previous = None
    for position, turn in enumerate(turns):
        input_ids += turn.head
        labels += _head_labels(previous, turn, layout)
        input_ids += turn.ids
        labels += turn.ids if turn.is_trained else [IGNORE_INDEX] * len(turn.ids)
        if turn.role == "assistant" and not layout.is_chat and position < len(turns) - 1:
            input_ids.append(layout.eos)
            labels.append(layout.eos if turn.is_trained else IGNORE_INDEX)
        previous = turn
    return input_ids, labels


def _head_labels(previous: Turn | None, turn: Turn, layout: _Layout) -> list[int]:
    """角色标记处的标签：上一条消息的结尾，它作目标时才有。

    chat 的用户标记处是上一轮回答的 eos；样本首位同官方代码也是 eos（移位后不起作用）。
    """
    if previous is None:
        return [layout.eos] if layout.is_chat and turn.role == "user" else [IGNORE_INDEX] * len(turn.head)
    if not previous.is_trained or previous.is_cut:
        return [IGNORE_INDEX] * len(turn.head)
    if previous.role == "assistant":
        return [layout.eos] if layout.is_chat and turn.role == "user" else [IGNORE_INDEX] * len(turn.head)
    return turn.head


def _split_rounds(turns: Sequence[Turn]) -> tuple[list[Turn], list[list[Turn]]]:
    """拆成开头的 system 与各轮；每条用户消息开始新的一轮，第一轮可能没有用户消息。"""
    system = list(turns[:1]) if turns and turns[0].role == "system" else []
    rounds: list[list[Turn]] = []
    for turn in turns[len(system) :]:
        if turn.role == "system":
            raise ValueError("system 只能是第一条消息，请把它移到对话开头")
        if turn.role not in ("user", "assistant"):
            raise ValueError(f"不认识的角色 {turn.role!r}，可用 system、user、assistant")
        if turn.role == "user" or not rounds:
            rounds.append([])
        rounds[-1].append(turn)
    return system, rounds


def _fit_turns(turns: list[Turn], limit: int | None, layout: _Layout) -> tuple[list[Turn], bool]:
    """按训练规则截到 limit 个 token（含角色标记、历史回答的 eos、末尾的回答标记），返回 (各轮, 是否截过)。"""
    system, rounds = _split_rounds(turns)
    if limit is None:
        return turns, False

    def size() -> int:
        kept = [*system, *(turn for round_ in rounds for turn in round_)]
        closing = len(layout.heads.get("assistant", []))
        if not layout.is_chat:
            closing += sum(turn.role == "assistant" for turn in kept[:-1])  # 各占一个 eos
        return closing + sum(len(turn.head) + len(turn.ids) for turn in kept)

    excess = size() - limit
    if excess <= 0:
        return turns, False
    while excess > 0 and len(rounds) > 1:
        rounds.pop(0)
        excess = size() - limit
    if excess > 0 and rounds and rounds[0][0].role == "user":
        rounds[0][0] = layout.shorten(rounds[0][0], len(rounds[0][0].ids) - excess)
        excess = size() - limit
    if excess > 0 and system:
        system[0] = layout.shorten(system[0], len(system[0].ids) - excess)
        excess = size() - limit
    if excess > 0:
        raise ValueError(f"--max_src_len({limit}) 太小，连角色标记都放不下，请至少调大 {excess}")
    return [*system, *(turn for round_ in rounds for turn in round_)], True


def _chat_prompt(turns: list[Turn], layout: _Layout, family: str, limit: int | None) -> list[int]:
    """官方对话代码的拼法与截断：从最新一轮往前整轮保留，再从左边截到 limit。"""
    system, rounds = _split_rounds(turns)
    old_style = family == "baichuan"
    system_ids = system[0].ids if system and not old_style else []
    kept: list[int] = []
    for round_ in reversed(rounds):
        if old_style and round_[0].role != "user":
            continue  # v1 不用第一条用户消息之前的回答
        round_ids = [token for turn in round_ for token in (*turn.head, *turn.ids)]
        if limit is not None and kept and len(system_ids) + len(kept) + len(round_ids) > limit:
            break
        kept = round_ids + kept
    else:
        # v1 只有把历史读到头时才遇到 system；较新的轮次已经放满时官方代码不报错
        if limit is None or len(kept) < limit:
            _reject_system(turns, family)

    prompt = system_ids + kept
    ending = layout.heads["assistant"] if old_style or turns[-1].role != "assistant" else []
    if old_style:
        return (prompt if limit is None else prompt[-limit:]) + ending  # v1 的标记不占 limit
    prompt += ending
    return prompt if limit is None else prompt[-limit:]


def _reject_system(turns: Sequence[Turn], family: str) -> None:
    if family == "baichuan" and any(turn.role == "system" for turn in turns):
        raise ValueError("Baichuan-13B-Chat（v1）的对话格式没有 system 角色，请把它的内容并入第一条用户消息")


class Prompting(NamedTuple):
    """一个检查点的提示方式；各项就是 encode_prompt 与 encode_sample 的同名参数，存在 run_config.json 里。"""

    prompt_format: str
    family: str
    user_token_id: int
    assistant_token_id: int
    template: dict[str, str] | None = None  # prompt_format 为 template 时的模板，见 read_template

    @property
    def stops(self) -> tuple[str, ...]:
        """模板规定的停止文字。"""
        return (self.template["stop"],) if self.template and "stop" in self.template else ()


def resolve_prompt_format(requested: str, directory: str | Path, config) -> Prompting:
    """由检查点定下提示方式：generation_config.json 里有 user_token_id 的是对话模型（chat），没有的是基座（plain）。

    requested：auto、指定的格式，或模板文件；config：BaichuanConfig（norm_head 区分 Baichuan 与 Baichuan2）。
    """
    path = Path(directory) / "generation_config.json"
    try:
        generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} 不是合法的 JSON，请重新下载：{error}") from error
    problems = generation_config_problems(generation, config.vocab_size)
    if problems:
        raise ValueError(f"{path} 损坏，请重新下载：{'；'.join(problems)}")
    prompting = Prompting(
        prompt_format="chat" if "user_token_id" in generation else "plain",
        # Llama 布局转来的 Baichuan2 没有 NormHead，由词表认出
        family="baichuan2" if config.norm_head or config.vocab_size >= 125696 else "baichuan",
        user_token_id=generation.get("user_token_id", 195),
        assistant_token_id=generation.get("assistant_token_id", 196),
    )
    return requested_prompting(prompting, requested)


def requested_prompting(prompting: Prompting, requested: str) -> Prompting:
    """--prompt_format 改过的提示方式：auto 不改。"""
    if requested == "auto":
        return prompting
    if requested.endswith(".json"):
        return prompting._replace(prompt_format=TEMPLATE, template=read_template(requested))
    _check_choice("prompt_format", requested, ("auto", *PROMPT_FORMATS))
    return prompting._replace(prompt_format=requested, template=None)


def prompt_format_choice(value: str) -> str:
    """--prompt_format 的取值：auto、plain、chat，或一个 .json 的模板文件。"""
    if value not in ("auto", *PROMPT_FORMATS) and not value.endswith(".json"):
        raise argparse.ArgumentTypeError(
            f"应为 auto、{'、'.join(PROMPT_FORMATS)} 或一个 .json 的模板文件，得到 {value!r}"
        )
    return value


def read_template(path: str | Path) -> dict[str, str]:
    """--prompt_format 的模板文件：user、assistant 必有，system、stop 可缺；除 stop 外都含一个 {text}。

    stop 是出现了就停止生成的文字，predict.py 照用；回答之后总有 eos，stop 不必是它。
    """
    try:
        template = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"--prompt_format {path} 读不了（{error.strerror}），请检查路径") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--prompt_format {path} 不是合法的 UTF-8 JSON（{error}），请改正") from error
    roles = ("system", "user", "assistant")
    if not isinstance(template, dict) or not set(template) <= {*roles, "stop"}:
        found = "、".join(map(str, template)) if isinstance(template, dict) else type(template).__name__
        raise ValueError(f"--prompt_format {path} 应是有 system、user、assistant、stop 的对象，实际是 {found}，请改正")
    for name, value in template.items():
        if not isinstance(value, str):
            raise ValueError(f"--prompt_format {path} 的 {name} 应为字符串，实际是 {value!r}，请改正")
    problems = [name for name in ("user", "assistant") if not template.get(name)]
    problems += [name for name in roles if template.get(name) and template[name].count("{text}") != 1]
    if problems:
        raise ValueError(f"--prompt_format {path} 的 {'、'.join(problems)} 里要恰好有一个 {{text}}，请补上")
    return {name: value for name, value in template.items() if value}


def prompting_reason(prompting: Prompting, requested: str) -> str:
    """用哪种提示格式、为什么：一句话。"""
    if requested != "auto":
        return f"{prompting.prompt_format}（--prompt_format {requested}）"
    if prompting.prompt_format == "chat":
        return "chat（检查点的 generation_config.json 里有 user_token_id）"
    reason = "检查点的 generation_config.json 里没有 user_token_id，当作基座模型；是对话模型请加 --prompt_format chat"
    return f"{prompting.prompt_format}（{reason}）"


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} 应为 {' | '.join(choices)}，实际是 {value!r}")


ROLE_TOKENS = ("user_token_id", "assistant_token_id")


def generation_config_problems(content: Any, vocab_size: int) -> list[str]:
    """generation_config.json 里角色编号的问题：两个要么都有、要么都没有，且在词表之内。"""
    if not isinstance(content, dict):
        return [f"应为 JSON 对象 {{…}}，实际是 {shown(content)}"]
    present = [name for name in ROLE_TOKENS if name in content]
    if len(present) == 1:
        return [f"{' 与 '.join(ROLE_TOKENS)} 只有一个"]
    return [
        f"{name} 应为 [0, {vocab_size}) 内的整数，实际是 {shown(content[name])}"
        for name in present
        if not (type(content[name]) is int and 0 <= content[name] < vocab_size)
    ]
