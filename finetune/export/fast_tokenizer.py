"""由 sentencepiece 的 BPE 模型造出编号完全相同的快速分词器（tokenizer.json）与对话模板，供不认识本项目的工具加载。"""

import json
import re
from functools import partial
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from baichuan import BaichuanTokenizer
from finetune.data.prompting import Prompting
from finetune.export.tensors import CheckFailed
from finetune.terminal import note
from utils import write_json

# 受保护的片段在规范化期间的替身：补充私用区，NFKC 不改它们
PLACEHOLDER_START = 0x10FE00
PIECE_TYPES = {"normal": 1, "unknown": 2, "control": 3, "user_defined": 4, "unused": 5, "byte": 6}
CHECK_TEXTS = (
    "",
    "你好，世界！",
    "  两端有空格  ",
    "第一行\n第二行\t制表",
    "Hello, world! 3.14159",
    "全角ＡＢＣ１２３，：！？",
    "😀🤖龘𠮷",
    "def f(x):\n    return x ** 2  # 注释",
    "<h2>标题</h2>```python---",
    "价格￥199.00……《书名》",
    "e\u0301ﬁ㎏\u3000\u200b",
    *(char * count for char in " =1-a哈" for count in (2, 3, 7, 33)),
)
# 多轮的 plain 要在历史回答后放 eos，而文本里的 </s> 按普通文字编码（用户文本不能注入结束符），模板写不出它
PLAIN_TEMPLATE = """
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{ raise_exception('这个模型按单轮的 plain 格式训练，不支持带历史回答的对话') }}
    {%- endif -%}
    SYSTEM{{ message['content'] }}
{%- endfor -%}
"""
# 一句一句地加空格片段的分词器（第一代）：system 与提问接成一段再编码，就少一个
SPLIT_SYSTEM = """
{%- if message['role'] == 'system' -%}
    {{ raise_exception('这个分词器在每条消息前加一个空格片段，模板写不出 system，请接在提问的开头') }}
{%- endif -%}
"""
CHAT_TEMPLATE_V2 = """
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- if not loop.first -%}{{ raise_exception('system 只能是第一条消息') }}{%- endif -%}
        {{ message['content'] }}
    {%- elif message['role'] == 'user' -%}
        {{ 'USER' + message['content'] }}
    {%- elif message['role'] == 'assistant' -%}
        {{ 'ASSISTANT' + message['content'] }}
    {%- else -%}
        {{ raise_exception('不认识的角色 ' + message['role']) }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}{{ 'ASSISTANT' }}{%- endif -%}
"""
# v1（Baichuan-13B-Chat）：没有 system；第一条用户消息之前的回答不用；末尾总有回答标记
CHAT_TEMPLATE_V1 = """
{%- set seen = namespace(user=false) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {%- set seen.user = true -%}
        {{ 'USER' + message['content'] }}
    {%- elif message['role'] == 'assistant' -%}
        {%- if seen.user -%}{{ 'ASSISTANT' + message['content'] }}{%- endif -%}
    {%- else -%}
        {{ raise_exception('Baichuan-13B-Chat 没有 ' + message['role'] + ' 角色，请并入第一条用户消息') }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT' }}{%- endif -%}
"""


def read_model_proto(tokenizer: BaichuanTokenizer):
    """sentencepiece 的 ModelProto。

    Raises:
        ValueError: 没有安装 protobuf，或不是带字节回退的 BPE。
    """
    try:
        # sentencepiece 自带的那份只认比生成它的更新的 protobuf，transformers 的这份不挑
        from transformers.utils import sentencepiece_model_pb2_new as sentencepiece_model_pb2
    except ImportError as error:
        raise ValueError("导出分词器需要 protobuf，请运行 pip install protobuf") from error
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.sp_model.serialized_model_proto())
    if proto.trainer_spec.model_type != 2 or not proto.trainer_spec.byte_fallback:
        raise ValueError(f"{tokenizer.vocab_file} 不是带字节回退的 BPE 模型，不是 Baichuan 的分词器，不能导出")
    return proto


def bpe_merges(proto) -> list[tuple[str, str]]:
    """合并规则，先合并的在前：每个普通片段的每一种二分，按片段的得分从高到低。

    sentencepiece 每次合并得分最高的相邻一对，得分相同时取最左边的。
    """
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == PIECE_TYPES["normal"]}
    user_defined = {piece.piece for piece in proto.pieces if piece.type == PIECE_TYPES["user_defined"]}
    known = scores.keys() | user_defined
    merges = [
        (-score, cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    return [(left, right) for *_, left, right in sorted(merges)]


def build_fast_tokenizer(tokenizer: BaichuanTokenizer, prompting: Prompting) -> Tokenizer:
    """tokenizers 库的分词器，编号与 tokenizer.text_to_ids 相同。

    v2 的模型不改动文本，自定义片段就是 added token。v1 要规范化、合并空格并在句首加空格，都按整段文本进行（对话里按
    每条消息），而 added token 会先把文本切开，所以 v1 的自定义片段在规范化之后切出，只有角色片段是 added token。
    """
    proto = read_model_proto(tokenizer)
    spec = proto.normalizer_spec
    user_defined = [piece.piece for piece in proto.pieces if piece.type == PIECE_TYPES["user_defined"]]
    whole_text = spec.add_dummy_prefix or spec.remove_extra_whitespaces
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    # ignore_merges：切出的整段就是一个片段时直接取它的编号，自定义片段没有合并规则
    fast = Tokenizer(
        models.BPE(vocab, bpe_merges(proto), unk_token="<unk>", byte_fallback=True, ignore_merges=whole_text)
    )
    fast.normalizer = normalizers.Sequence([*_normalizer_steps(spec, user_defined), normalizers.Replace(" ", "▁")])
    added = user_defined
    if whole_text:
        longest_first = sorted(user_defined, key=len, reverse=True)
        fast.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
        added = list(role_pieces(tokenizer, prompting).values())
    added += added_words(tokenizer)
    fast.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in added])
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return fast


def added_words(tokenizer: BaichuanTokenizer) -> list[str]:
    """加入词表的新词，次序同编号。

    Raises:
        ValueError: 编号不紧接着词表，别的格式放不下。
    """
    found = {index: word for word, index in tokenizer.get_added_vocab().items() if index >= tokenizer.vocab_size}
    expected = list(range(tokenizer.vocab_size, len(tokenizer)))
    if sorted(found) != expected:
        raise ValueError(
            f"新词的编号 {sorted(found)[:5]} 没有紧接着词表（{tokenizer.vocab_size} 个），请用 --to baichuan"
        )
    return [found[index] for index in expected]


def _normalizer_steps(spec, user_defined: list[str]) -> list:
    """sentencepiece 的规范化：字符表、合并与去掉首尾空格、句首空格；自定义片段（如全角逗号、换行）不受其影响。"""
    steps, restore = [], []
    charsmap = normalizers.Precompiled(spec.precompiled_charsmap) if spec.precompiled_charsmap else None
    if charsmap is not None:
        changed = [piece for piece in user_defined if charsmap.normalize_str(piece) != piece]
        placeholders = {piece: chr(PLACEHOLDER_START + index) for index, piece in enumerate(changed)}
        steps = [normalizers.Replace(piece, mark) for piece, mark in placeholders.items()] + [charsmap]
        restore = [normalizers.Replace(mark, piece) for piece, mark in placeholders.items()]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex("^ +| +$"), "")]
    return [*steps, *restore, *([normalizers.Prepend("▁")] if spec.add_dummy_prefix else [])]


def role_pieces(tokenizer: BaichuanTokenizer, prompting: Prompting) -> dict[str, str]:
    """对话格式的角色片段 {"user": …, "assistant": …}；plain 格式没有角色，为空。"""
    if prompting.prompt_format != "chat":
        return {}
    ids = {"user": prompting.user_token_id, "assistant": prompting.assistant_token_id}
    return {role: tokenizer.convert_ids_to_tokens(index) for role, index in ids.items()}


def chat_template(tokenizer: BaichuanTokenizer, prompting: Prompting) -> str:
    """Jinja 对话模板，与 encode_prompt 的拼法相同，不加 bos。

    模板接成一整段再编码；第一代的分词器在每条消息前加一个空格片段，自己的模板因此同训练时差几个，提醒一声。
    """
    splits = read_model_proto(tokenizer).normalizer_spec.add_dummy_prefix
    if prompting.template is not None:
        if splits:
            note(
                "注意：这个分词器在每条消息前加一个空格片段「▁」，对话模板接成一整段再编码，编号同训练时差几个「▁」；"
                "要逐个相同请用 predict.py --serve"
            )
        return own_template(prompting.template)
    template = PLAIN_TEMPLATE.replace("SYSTEM", SPLIT_SYSTEM if splits else "")
    roles = role_pieces(tokenizer, prompting)
    if roles:
        template = CHAT_TEMPLATE_V1 if prompting.family == "baichuan" else CHAT_TEMPLATE_V2
    for role, piece in roles.items():
        template = template.replace(role.upper(), piece)
    return "".join(line.strip() for line in template.splitlines())


def own_template(template: dict[str, str]) -> str:
    """--prompt_format 文件.json 的模板写成 Jinja；同 plain，写不出历史回答之后的 eos。"""

    def filled(role: str) -> str:
        if role not in template:
            return f"{{{{ raise_exception('这个模型的提示格式没有 {role}') }}}}"
        before, _, after = template[role].partition("{text}")
        return f"{{{{ {quoted(before)} + message['content'] + {quoted(after)} }}}}"

    quoted = partial(json.dumps, ensure_ascii=False)  # Jinja 不认 JSON 的代理对
    ending = quoted(template["assistant"].partition("{text}")[0])
    return (
        "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
        "{{ raise_exception('这个模型按单轮的格式训练，不支持带历史回答的对话') }}"
        f"{{%- elif message['role'] == 'system' -%}}{filled('system')}{{%- else -%}}{filled('user')}{{%- endif -%}}"
        f"{{%- endfor -%}}{{%- if add_generation_prompt -%}}{{{{ {ending} }}}}{{%- endif -%}}"
    )


def write_fast_tokenizer(tokenizer: BaichuanTokenizer, prompting: Prompting, directory: Path, max_length: int):
    """写 tokenizer.json、tokenizer_config.json 与 special_tokens_map.json，并核对编号。

    Raises:
        CheckFailed: 有文本的编号与来源不同。
    """
    fast = build_fast_tokenizer(tokenizer, prompting)
    roles = role_pieces(tokenizer, prompting).values()
    long_pieces = (piece.replace("▁", " ") for piece in tokenizer.get_vocab() if len(piece) > 8)
    differing = [
        text
        for text in (*CHECK_TEXTS, *long_pieces, *(f"前 {word}{word}后 。" for word in added_words(tokenizer)))
        if not any(role in text for role in roles)
        and fast.encode(text, add_special_tokens=False).ids != tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
    ]
    if differing:
        raise CheckFailed(f"快速分词器有 {len(differing)} 段文本的编号与来源不同，如 {differing[:3]!r}，请报告这个问题")
    fast.save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    write_json(directory / "special_tokens_map.json", special)
    write_json(
        directory / "tokenizer_config.json",
        {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "padding_side": "left",
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            # 用户文本里的 </s> 按普通文字编码，不会注入结束符；角色片段是普通的 added token，模板照常可用
            "split_special_tokens": True,
            "chat_template": chat_template(tokenizer, prompting),
        },
    )
