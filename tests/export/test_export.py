"""scripts/export.py：四种结构的每种检查点导出后，别的工具（不认识本项目）给出同样的编号、logits 与贪心 token。"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trained_checkpoints import ARCHITECTURES

from baichuan import BaichuanConfig, BaichuanTokenizer
from finetune.checkpoint.inspection import inspect_checkpoint, load_checkpoint_model, load_checkpoint_tokenizer
from finetune.checkpoint.manifest import verify_checkpoint
from finetune.data.prompting import Prompting, encode_prompt
from finetune.export import check as check_module
from finetune.export import fast_tokenizer as fast_tokenizer_module
from finetune.export import gguf as gguf_module
from finetune.export import tensors as tensors_module
from finetune.inference.generation import generate_batch, make_generation_config
from scripts import export as script
from utils import read_json, write_json

CPU = torch.device("cpu")
MAX_NEW_TOKENS = 8
PROMPTS = [
    "你好", "故障现象：发动机启动困难。", "空调压缩机异响，更换后正常。", "这家店的菜很好吃。", "今天天气怎么样？",
    "请写一首关于春天的诗", "水箱漏水 导致 水温过高", "2023年10月1日，晴。", "Hello, world!", "a b  c   d",
    "，以逗号开头", "１２３全角数字", "第一行\n第二行", "表格\t分隔", "《书名》与【括号】", "😀表情与龘字",
    "def f(x):\n    return x + 1", "不满意，退货了。", "问：三角形的内角和是多少？答：", "——破折号……省略号",
]  # fmt: skip

# 在不能导入本项目的进程里运行：只用 transformers 的 LlamaForCausalLM 与 AutoTokenizer
LLAMA_PROGRAM = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
sys.modules["baichuan"] = sys.modules["finetune"] = None  # 装着也导入不了
torch.set_num_threads(1)
jobs = json.load(open(sys.argv[1], encoding="utf-8"))
results = []
for job in jobs:
    model = AutoModelForCausalLM.from_pretrained(job["path"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["path"])
    model.generation_config = GenerationConfig(
        max_new_tokens=job["max_new_tokens"], do_sample=False, repetition_penalty=1.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2)
    tokens, logits = [], []
    for prompt in job["prompts"]:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logits.append(model(ids).logits[0].numpy())
            tokens.append(model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt):].tolist())
    np.savez(job["output"], *logits)
    results.append({
        "class": type(model).__name__, "dtype": str(next(model.parameters()).dtype), "tokens": tokens,
        "ids": tokenizer(job["texts"])["input_ids"],
        "decoded": [tokenizer.decode(ids) for ids in tokenizer(job["texts"])["input_ids"]],
        "chat": [tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                               return_dict=False) for text in job["texts"]],
    })
json.dump(results, open(sys.argv[2], "w", encoding="utf-8"))
"""
# llama.cpp 的两种 Python 包：llama-cpp-python（从源码编译）或 xllamacpp（现成的轮子，经本机的 HTTP 服务）
LLAMA_CPP_PROGRAM = """
import json, sys
job = json.load(open(sys.argv[1], encoding="utf-8"))

def with_llama_cpp(Llama):
    import numpy as np
    model = Llama(job["path"], n_ctx=256, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1, n_batch=256,
                  **({"type_k": 0, "type_v": 0} if job["f32"] else {}))
    tokens, logits = [], []
    for prompt in job["prompts"]:
        model.reset()
        model.eval(prompt)
        logits.append(np.array(model.scores[model.n_tokens - 1], dtype=np.float64).tolist())
        generated = []
        while len(generated) < job["max_new_tokens"]:
            generated.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval(generated[-1:])
        tokens.append(generated)
    def tokenize(text, special):
        return model.tokenize(text.encode(), add_bos=False, special=special)
    return tokens, logits, tokenize, model.metadata["tokenizer.chat_template"]

def with_xllamacpp(xl):
    import urllib.request
    parameters = xl.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = job["path"], 256, 1
    parameters.warmup, parameters.verbosity = False, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.flash_attn_type = xl.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if job["f32"]:
        parameters.cache_type_k = parameters.cache_type_v = xl.ggml_type.GGML_TYPE_F32
    server = xl.Server(parameters)
    def post(path, body):
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))
    tokens, logits = [], []
    for prompt in job["prompts"]:
        result = post("/completion", {
            "prompt": prompt, "n_predict": job["max_new_tokens"], "temperature": 0, "samplers": ["temperature"],
            "n_probs": job["vocab_size"], "cache_prompt": False, "return_tokens": True})
        tokens.append(result["tokens"])
        steps = result["completion_probabilities"]
        # 没有拼成完整字符的字节片段，服务不给概率，之后的就对不上是第几步了
        aligned = [step["id"] for step in steps] == result["tokens"]
        first = {entry["id"]: entry["logprob"] for entry in steps[0]["top_logprobs"]}
        logits.append([first[index] for index in range(job["vocab_size"])] if aligned else None)
    def tokenize(text, special):
        return post("/tokenize", {"content": text, "add_special": False, "parse_special": special})["tokens"]
    return tokens, logits, tokenize, server

try:
    from llama_cpp import Llama
except ImportError:
    import xllamacpp
    tokens, logits, tokenize, keep = with_xllamacpp(xllamacpp)
else:
    tokens, logits, tokenize, keep = with_llama_cpp(Llama)
json.dump({
    "tokens": tokens, "logits": logits,
    "ids": [tokenize(text, False) for text in job["texts"]],
    "chat": [tokenize(text, True) for text in job["chat_texts"]],
}, open(sys.argv[2], "w"))
"""


def run_elsewhere(tmp_path, program, jobs, python=sys.executable):
    """在空目录里、没有本项目的模块搜索路径的进程里运行程序，返回它写的 JSON。"""
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    (tmp_path / "jobs.json").write_text(json.dumps(jobs, ensure_ascii=False), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "program.py", "jobs.json", "results.json"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))


def ours(path, texts=PROMPTS):
    """本项目对一个检查点的结果：(提示词 id, 贪心 token, logits)。"""
    checkpoint = inspect_checkpoint(path)
    tokenizer = load_checkpoint_tokenizer(checkpoint)
    model = load_checkpoint_model(checkpoint, torch.float32, CPU)
    prompts = [encode_prompt(tokenizer, [("user", text)], **checkpoint.prompting._asdict()) for text in texts]
    config = make_generation_config(model, MAX_NEW_TOKENS)
    tokens = [generate_batch(model, [prompt], config)[0] for prompt in prompts]
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([prompt])).logits[0].numpy() for prompt in prompts]
    return prompts, tokens, logits


def until_eos(tokens):
    return tokens[: tokens.index(2)] if 2 in tokens else tokens


def max_difference(expected, actual):
    return max(float(np.abs(a - b).max()) for a, b in zip(expected, actual, strict=True))


# ---- llama ----

LLAMA_CASES = [
    (arch, method)
    for arch in ("baichuan-7b", "baichuan2-7b")
    for method in ("base", "full", "freeze", "lora")
] + [("baichuan2-7b-chat", "lora")]  # fmt: skip


def checkpoint_of(trained, tiny_checkpoint, arch, method, **options):
    if arch.endswith("-chat"):
        arch, options = arch.removesuffix("-chat"), {**options, "chat": True}
    return tiny_checkpoint(arch, **options) if method == "base" else trained(arch, method, **options)


@pytest.fixture(scope="module")
def llama_results(trained, tiny_checkpoint, tmp_path_factory):
    """全部 llama 导出一次读完（transformers 只启动一次）：(结构, 方法) → (导出目录, 来源, 我们的结果, 别处的结果)。"""
    directory = tmp_path_factory.mktemp("elsewhere")
    jobs, cases = [], []
    for arch, method in LLAMA_CASES:
        source = checkpoint_of(trained, tiny_checkpoint, arch, method)
        target = directory / f"{arch}-{method}"
        comparison = script.export(source, "llama", target, dtype="float32")
        assert comparison.max_difference < 1e-4
        expected = ours(source)
        jobs.append({
            "path": str(target), "prompts": expected[0], "texts": PROMPTS, "max_new_tokens": MAX_NEW_TOKENS,
            "output": f"{arch}-{method}.npz",
        })  # fmt: skip
        cases.append((target, source, expected))
    results = run_elsewhere(directory, LLAMA_PROGRAM, jobs)
    for job, result in zip(jobs, results, strict=True):
        result["logits"] = list(np.load(directory / job["output"]).values())
    return {case: (*found, result) for case, found, result in zip(LLAMA_CASES, cases, results, strict=True)}


@pytest.mark.parametrize("case", LLAMA_CASES, ids="-".join)
def test_plain_transformers_gives_our_tokens_and_logits(llama_results, case):
    _, source, (prompts, tokens, logits), result = llama_results[case]
    assert result["class"] == "LlamaForCausalLM"
    assert result["dtype"] == "torch.float32"
    assert max_difference(logits, result["logits"]) < 1e-4
    assert [until_eos(ids) for ids in result["tokens"]] == tokens
    tokenizer = BaichuanTokenizer.from_pretrained(source)
    assert result["ids"] == [tokenizer.text_to_ids(text) for text in PROMPTS]
    assert result["decoded"] == [tokenizer.decode(ids) for ids in result["ids"]]
    assert result["chat"] == prompts


def test_llama_directory(llama_results, tiny_checkpoint):
    target, *_ = llama_results["baichuan2-7b-chat", "lora"]
    assert sorted(path.name for path in target.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "manifest.json", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert verify_checkpoint(target) == []
    base = tiny_checkpoint("baichuan2-7b", chat=True)
    assert read_json(target / "generation_config.json") == read_json(base / "generation_config.json")
    tensors = load_file(target / "model.safetensors")
    assert torch.allclose(tensors["lm_head.weight"].norm(dim=1), torch.ones(2000), atol=1e-6)
    names = {name.split(".", 3)[3] for name in tensors if name.startswith("model.layers.0.")}
    assert {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"} <= names
    assert "self_attn.W_pack.weight" not in names


def test_model_card(llama_results):
    target, source, *_ = llama_results["baichuan2-7b-chat", "lora"]
    card = (target / "README.md").read_text(encoding="utf-8")
    for line in (
        "# epoch-1-step-3（llama，float32）",
        f"- 来源：`{source}`，第 3 步",
        "- 基座：`gone/`",
        "- 方法：lora，适配器已合并",
        "- 提示词格式：chat（baichuan2），角色 id 195/196",
        f"- 数据：`data/spo_0.json`，SHA-256 {'ab' * 32}",
        '  "learning_rate": 0.0002',
    ):
        assert line in card.splitlines()


def test_model_card_has_the_scores(trained, tmp_path):
    output = shutil.copytree(trained("baichuan2-7b", "full").parent, tmp_path / "output")
    rows = [{"step": 2, "eval/nll": 3.0}, {"step": 3, "eval/nll": 2.5}, {"step": 3, "loss": 1.0}]
    (output / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {"triple_f1": 0.25, "model_path": str(output / "epoch-1-step-3"), "test_path": "data/spo_1.json"}
    (output / "a.metrics.json").write_text(json.dumps(metrics))
    (output / "b.metrics.json").write_text(json.dumps({**metrics, "model_path": "other", "triple_f1": 0.75}))
    script.export(output / "epoch-1-step-3", "baichuan", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert [line for line in card.splitlines() if "成绩" in line] == [
        "- 成绩：eval/nll 2.5000",
        "- 成绩：data/spo_1.json：triple_f1 0.25",
    ]


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.3), ("float16", 0.05)])
def test_half_precision_is_only_rounding(trained, tmp_path, dtype, limit):
    comparison = script.export(trained("baichuan2-7b", "lora"), "llama", tmp_path / "exported", dtype=dtype)
    assert 0 < comparison.relative_rms < limit
    assert read_json(tmp_path / "exported" / "config.json")["torch_dtype"] == dtype


# ---- baichuan ----


@pytest.mark.parametrize("method", ["full", "freeze", "lora"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_official_layout(trained, tmp_path, arch, method):
    source = trained(arch, method)
    script.export(source, "baichuan", tmp_path / "exported")
    _, tokens, logits = ours(source, PROMPTS[:4])
    _, exported_tokens, exported_logits = ours(tmp_path / "exported", PROMPTS[:4])
    assert exported_tokens == tokens
    assert max_difference(logits, exported_logits) < 1e-4
    config = read_json(tmp_path / "exported" / "config.json")
    is_v1_7b = arch == "baichuan-7b"
    assert config["architectures"] == ["BaiChuanForCausalLM" if is_v1_7b else "BaichuanForCausalLM"]
    lengths = {name for name in ("max_position_embeddings", "model_max_length") if name in config}
    assert lengths == {
        "baichuan-7b": {"max_position_embeddings"}, "baichuan2-7b": {"max_position_embeddings", "model_max_length"}
    }.get(arch, {"model_max_length"})  # fmt: skip
    assert config["torch_dtype"] == "float32"
    # 去掉自有键，按官方键推断出的结构不变
    official = {key: value for key, value in config.items() if key not in ("position_embedding", "norm_head")}
    assert BaichuanConfig.from_dict(official).position_embedding == config["position_embedding"]
    assert verify_checkpoint(tmp_path / "exported") == []


def test_normalizing_again_changes_nothing(trained, tmp_path):
    script.export(trained("baichuan2-13b", "lora"), "baichuan", tmp_path / "once")
    script.export(tmp_path / "once", "baichuan", tmp_path / "twice")
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert once.keys() == twice.keys()
    head = once.pop("lm_head.weight")
    assert torch.allclose(twice.pop("lm_head.weight"), head, rtol=3e-7, atol=0)
    assert all(torch.equal(tensor, twice[name]) for name, tensor in once.items())


# ---- 拒绝 ----


@pytest.mark.parametrize("target", ["llama", "baichuan", "gguf"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ptuning_is_refused(trained, tmp_path, arch, target):
    with pytest.raises(ValueError, match=r"P-Tuning.*predict\.py"):
        script.export(trained(arch, "ptuning"), target, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arch", ["baichuan-13b", "baichuan2-13b"])
def test_alibi_is_no_llama(tiny_checkpoint, tmp_path, arch):
    with pytest.raises(ValueError, match=r"ALiBi 位置编码（13B）.*请改用 --to gguf.*predict\.py --serve"):
        script.export(tiny_checkpoint(arch), "llama", tmp_path / "exported")


def test_options_without_effect_are_refused(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("baichuan2-7b")
    with pytest.raises(ValueError, match="--gguf_type 只对 --to gguf 起作用"):
        script.export(base, "llama", tmp_path / "exported", gguf_type="f16")
    with pytest.raises(ValueError, match="--dtype float32 与 --gguf_type q8_0 矛盾"):
        script.export(base, "gguf", tmp_path / "exported", dtype="float32", gguf_type="q8_0")
    with pytest.raises(ValueError, match="--to\\(onnx\\) 不认识，可选：llama、baichuan、gguf"):
        script.export(base, "onnx", tmp_path / "exported")


def test_float16_overflow_is_refused(tiny_checkpoint, tmp_path):
    base = Path(shutil.copytree(tiny_checkpoint("baichuan2-7b"), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 70000.0
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight 有 float16 放不下的数.*--dtype bfloat16"):
        script.export(base, "llama", tmp_path / "exported", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_command_line(trained, tmp_path, capsys):
    arguments = ["--model_path", trained("baichuan2-7b", "lora"), "--to", "llama", "--output_dir", tmp_path / "out"]
    assert script.main([str(argument) for argument in arguments]) == 0
    assert "核对（" in capsys.readouterr().out
    assert script.main([str(argument) for argument in arguments]) == 2
    assert "已有内容，不会覆盖" in capsys.readouterr().err


# ---- 核对真的会发现错误 ----


@pytest.fixture
def source(trained):
    return tensors_module.TensorSource(inspect_checkpoint(trained("baichuan2-7b", "lora")))


@pytest.mark.parametrize("mistake", ["swap_qk", "one_weight", "not_normalized", "not_merged"])
def test_mistakes_are_noticed(source, mistake):
    check = check_module
    config = BaichuanConfig.from_dict({**source.config.to_dict(), "norm_head": False})

    def read(name, *rows):
        if mistake == "not_merged":
            return source.read_base(name, *rows)
        tensor = source.read(name, *rows)
        if mistake != "not_normalized":
            tensor = tensors_module.normalized_head(source.config, name, tensor)
        if mistake == "swap_qk" and name.endswith("layers.3.self_attn.W_pack.weight"):
            query, key, value = tensor.chunk(3)
            tensor = torch.cat([key, query, value])
        if mistake == "one_weight" and name.endswith("layers.2.mlp.up_proj.weight"):
            tensor = tensor.clone()
            tensor[5, 7] += 1e-6
        return tensor

    with pytest.raises(tensors_module.CheckFailed, match=r"（float32）"):
        check.check_export(source, config, read, [[5, 300, 77]], "float32")


def test_wrong_scaling_is_noticed(source):
    """合并公式与不合并的适配器互相独立：缩放错一倍就不相等。"""
    check = check_module
    expected = check.streamed_logits(source.config, source.read_base, [[5, 300, 77]], source.lora)
    doubled = {name: (a, b, 2 * scaling) for name, (a, b, scaling) in source.lora.items()}
    wrong = check.streamed_logits(source.config, source.read_base, [[5, 300, 77]], doubled)
    right = check.streamed_logits(source.config, source.read, [[5, 300, 77]])
    assert check.compare_logits(expected, right).max_difference < 1e-5
    assert check.compare_logits(expected, wrong).max_difference > 1e-3


# ---- 真分词器 ----


@pytest.fixture(scope="module", params=["v2", "v1-reconstructed"])
def real_tokenizer(request, shared_dir):
    directory = shared_dir / "tokenizer" / request.param
    family = "baichuan2" if request.param == "v2" else "baichuan"
    tokenizer = BaichuanTokenizer.from_pretrained(directory)
    return directory, tokenizer, Prompting("chat", family, 195, 196)


@pytest.fixture(scope="module")
def real_fast_tokenizer(real_tokenizer, tmp_path_factory):
    from transformers import AutoTokenizer

    _, tokenizer, prompting = real_tokenizer
    target = tmp_path_factory.mktemp("fast")
    fast_tokenizer_module.write_fast_tokenizer(tokenizer, prompting, target, 4096)
    return AutoTokenizer.from_pretrained(target)


def test_real_tokenizer_gives_the_recorded_ids(real_tokenizer, real_fast_tokenizer):
    directory, tokenizer, _ = real_tokenizer
    rows = read_json(directory / "encodings.json")
    skipped = [row["text"] for row in rows if tokenizer.find_control_pieces(row["text"])]
    gated = [row for row in rows if row["text"] not in skipped]
    assert len(gated) >= 75
    different = [row["text"] for row in gated if real_fast_tokenizer(row["text"])["input_ids"] != row["sp_ids"]]
    assert different == []
    assert [text for row in gated if (text := real_fast_tokenizer.decode(row["sp_ids"])) != row["sp_decode"]] == []


def test_real_chat_template_gives_the_recorded_prompts(real_tokenizer, real_fast_tokenizer):
    _, tokenizer, prompting = real_tokenizer
    chats = [
        [("user", "你好")],
        [("user", "问题：</s>怎么写？"), ("assistant", " 两端空格 "), ("user", "１２３")],
        [("user", "写代码"), ("assistant", "```python\nprint(1)\n```"), ("user", "，逗号开头")],
    ]
    if prompting.family == "baichuan2":
        chats += [[("system", "你是助手。"), *chats[1]], [("user", "a"), ("assistant", "b")]]
    else:
        chats += [[("assistant", "没有问题的回答"), ("user", "问题")]]
    for chat in chats:
        messages = [{"role": role, "content": text} for role, text in chat]
        ids = real_fast_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == encode_prompt(tokenizer, chat, **prompting._asdict())


def test_a_template_of_ones_own_is_rendered_as_trained(real_tokenizer, tmp_path, capsys):
    """第二代逐个 id 相同，四个字节的字也是；第一代说差在哪里，plain 的 system 不给写。"""
    from transformers import AutoTokenizer

    _, tokenizer, chat = real_tokenizer
    template = {"user": "👤：{text}\n", "assistant": "🤖：{text}"}
    for prompting in (chat._replace(prompt_format="template", template=template), chat._replace(prompt_format="plain")):
        fast_tokenizer_module.write_fast_tokenizer(tokenizer, prompting, tmp_path, 4096)
        fast = AutoTokenizer.from_pretrained(tmp_path)
        is_plain, warned = prompting.template is None, "差几个「▁」" in capsys.readouterr().err
        assert warned == (chat.family == "baichuan" and not is_plain)
        for messages in ([("user", "你好")], [("system", "规矩。"), ("user", "你好")]):
            rows = [{"role": role, "content": text} for role, text in messages]
            if messages[0][0] == "system" and (not is_plain or chat.family == "baichuan"):
                with pytest.raises(Exception, match=r"没有 system|写不出 system"):
                    fast.apply_chat_template(rows)
                continue
            ids = fast.apply_chat_template(rows, add_generation_prompt=True, return_dict=False)
            expected = encode_prompt(tokenizer, messages, **prompting._asdict())
            texts = [fast.decode(found).replace(" ", "") for found in (ids, expected)]
            assert texts[0] == texts[1] and (ids == expected) == (not warned)


def test_real_tokenizer_on_random_text(real_tokenizer, real_fast_tokenizer):
    _, tokenizer, _ = real_tokenizer
    generator = random.Random(0)
    pieces = [piece.replace("▁", " ") for piece in tokenizer.get_vocab() if "reserved" not in piece]
    texts = ["".join(generator.choices(pieces, k=generator.randint(1, 6))) for _ in range(3000)]
    backend = real_fast_tokenizer.backend_tokenizer
    assert [text for text in texts if backend.encode(text).ids != tokenizer.text_to_ids(text)] == []


# ---- gguf ----


# q8_0 要求行宽是 32 的倍数；llama.cpp 凭层数认位置编码
GGUF_SIZES = {"hidden_size": 64, "intermediate_size": 96, "heads": 4}
GGUF_LAYERS = {"baichuan-7b": 32, "baichuan-13b": 40, "baichuan2-7b": 32, "baichuan2-13b": 40}


@pytest.mark.parametrize(("gguf_type", "kind"), [("f16", 1), ("q8_0", 7)])
def test_gguf_file(gguf, trained, tmp_path, gguf_type, kind):
    source = trained("baichuan2-7b", "lora", layers=32, chat=True, **GGUF_SIZES)
    comparison = script.export(source, "gguf", tmp_path / "exported", gguf_type=gguf_type)
    assert comparison.relative_rms < 0.3
    assert "认作角色" in (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == [
        "README.md", f"exported-{gguf_type}.gguf", "manifest.json",
    ]  # fmt: skip
    reader = gguf.GGUFReader(tmp_path / "exported" / f"exported-{gguf_type}.gguf")
    value = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF")}
    assert value["general.architecture"] == "baichuan"
    assert value["general.file_type"] == kind
    assert value["baichuan.block_count"] == 32
    assert value["baichuan.context_length"] == 4096
    assert value["baichuan.rope.dimension_count"] == 16
    assert value["baichuan.attention.head_count_kv"] == 4
    assert value["tokenizer.ggml.model"] == "llama"
    assert value["tokenizer.ggml.add_space_prefix"] is False
    assert value["tokenizer.ggml.add_bos_token"] is False
    assert len(value["tokenizer.ggml.tokens"]) == 2000
    types = value["tokenizer.ggml.token_type"]
    assert [types[index] for index in (0, 1, 5, 195, 196)] == [2, 3, 4, 3, 3]
    assert "<reserved_" in value["tokenizer.chat_template"]
    names = [tensor.name for tensor in reader.tensors]
    assert names[:4] == ["token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"]
    assert len(names) == 3 + 32 * 9
    matrix = gguf.GGMLQuantizationType.F16 if gguf_type == "f16" else gguf.GGMLQuantizationType.Q8_0
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert types["output.weight"] == types["token_embd.weight"] == types["blk.3.ffn_down.weight"] == matrix
    assert types["output_norm.weight"] == types["blk.3.attn_norm.weight"] == gguf.GGMLQuantizationType.F32


def test_rows_are_paired_for_the_rotation():
    """一个头宽 4：前半 0、1 与后半 2、3 排成 (0, 2)、(1, 3)；各头分开。"""
    module = gguf_module
    rows = torch.arange(8.0)[:, None] * torch.ones(1, 8)
    permuted = module.permute_rows(rows, 2)
    assert permuted[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(module.unpermute_rows(permuted, 2), rows)


@pytest.mark.parametrize(
    ("arch", "layers", "message"),
    [
        ("baichuan2-7b", 4, r"rope、4 层.*只接受 32 层。可以改用 --to baichuan，或 --to llama"),
        ("baichuan2-7b", 40, r"rope、40 层.*只接受 32 层"),
        ("baichuan-13b", 32, r"alibi、32 层.*只接受 40 层。可以改用 predict\.py --serve"),
    ],
)
def test_layer_count_decides_the_positions(tiny_checkpoint, tmp_path, arch, layers, message):
    base = tiny_checkpoint(arch, layers=layers, **GGUF_SIZES)
    with pytest.raises(ValueError, match=message):
        script.export(base, "gguf", tmp_path / "exported")


def test_q8_needs_rows_of_32(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("baichuan2-7b", layers=32, hidden_size=48, intermediate_size=96, heads=4)
    with pytest.raises(ValueError, match="行宽 48 不是 32 的倍数，请用 --gguf_type f16"):
        script.export(base, "gguf", tmp_path / "exported", gguf_type="q8_0")


def test_missing_gguf_names_the_install(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    base = tiny_checkpoint("baichuan2-7b", layers=32, **GGUF_SIZES)
    with pytest.raises(ValueError, match="请运行 pip install gguf"):
        script.export(base, "gguf", tmp_path / "exported")


# ---- 加入的新词 ----

ADDED_TEXT = "怠速 [三元组][三元组]<reserved_106>\n[无]，抖动"


def with_added_words(base, path):
    """词表大出 32 行，added_tokens.json 里有两个词的检查点。"""
    shutil.copytree(base, path)
    weights = load_file(path / "model.safetensors")
    torch.manual_seed(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], 0.1 * torch.randn(32, weights[name].shape[1])])
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    write_json(path / "config.json", {**read_json(path / "config.json"), "vocab_size": 2032})
    write_json(path / "added_tokens.json", {"[三元组]": 2000, "[无]": 2001})
    return path


@pytest.mark.parametrize("arch", ["baichuan-7b", "baichuan2-7b"])
def test_added_words_of_a_base_are_exported(tiny_checkpoint, tmp_path, arch):
    from transformers import AutoTokenizer

    source = with_added_words(tiny_checkpoint(arch), tmp_path / "source")
    ids = BaichuanTokenizer.from_pretrained(source)(ADDED_TEXT)["input_ids"]
    assert ids.count(2000) == 2 and ids.count(2001) == 1
    for to in ("llama", "baichuan"):
        script.export(source, to, tmp_path / to)
    assert AutoTokenizer.from_pretrained(tmp_path / "llama")(ADDED_TEXT)["input_ids"] == ids
    assert BaichuanTokenizer.from_pretrained(tmp_path / "baichuan")(ADDED_TEXT)["input_ids"] == ids


def test_added_words_in_gguf(gguf, tiny_checkpoint, tmp_path):
    source = with_added_words(tiny_checkpoint("baichuan2-7b", layers=32, **GGUF_SIZES), tmp_path / "source")
    script.export(source, "gguf", tmp_path / "gguf")
    fields = gguf.GGUFReader(tmp_path / "gguf" / "gguf-f16.gguf").fields
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert tokens[2000:2003] == ["[三元组]", "[无]", "[PAD0]"] and kinds[2000:2003] == [4, 4, 5]
    assert len(tokens) == 2032 == fields["baichuan.vocab_size"].contents()


def test_added_words_with_gaps_are_refused(tiny_checkpoint, tmp_path):
    source = with_added_words(tiny_checkpoint("baichuan2-7b"), tmp_path / "source")
    write_json(source / "added_tokens.json", {"[三元组]": 2000, "[无]": 2010})
    with pytest.raises(ValueError, match=r"\[2000, 2010\].*--to baichuan"):
        script.export(source, "llama", tmp_path / "exported")


# ---- llama.cpp ----


def log_probabilities(logits):
    return torch.log_softmax(torch.as_tensor(np.asarray(logits)), dim=-1).numpy()


# 对数概率之差的上限与至少多少条提示词的贪心 token 相同；q8_0 时 llama.cpp 把激活也量化成 8 位
LLAMA_CPP_LIMITS = {"f32": (1e-4, 20), "f16": (0.02, 18), "q8_0": (0.3, 10)}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_llama_cpp_gives_our_tokens_and_logits(llama_cpp, trained, tmp_path, arch, method):
    source = trained(arch, method, layers=GGUF_LAYERS[arch], **GGUF_SIZES)
    tokenizer = BaichuanTokenizer.from_pretrained(source)
    prompts, tokens, logits = ours(source)
    expected = log_probabilities([rows[-1] for rows in logits])
    for gguf_type, (limit, num_same) in LLAMA_CPP_LIMITS.items():
        script.export(source, "gguf", tmp_path / gguf_type, gguf_type=gguf_type)
        job = {
            "path": str(tmp_path / gguf_type / f"{gguf_type}-{gguf_type}.gguf"), "f32": gguf_type == "f32",
            "prompts": prompts, "texts": PROMPTS, "chat_texts": [], "max_new_tokens": MAX_NEW_TOKENS,
            "vocab_size": tokenizer.vocab_size,
        }  # fmt: skip
        result = run_elsewhere(tmp_path, LLAMA_CPP_PROGRAM, job, llama_cpp)
        known = [index for index, found in enumerate(result["logits"]) if found is not None]
        assert len(known) > 10
        actual = log_probabilities([result["logits"][index] for index in known])
        difference = float(np.abs(actual - expected[known]).max())
        same = sum(until_eos(ids) == own for ids, own in zip(result["tokens"], tokens, strict=True))
        print(f"{arch} {method} {gguf_type}: 对数概率最大相差 {difference:.2g}，贪心相同 {same}/20")
        assert difference < limit
        assert same >= num_same
        if "2" in arch:
            assert result["ids"] == [tokenizer.text_to_ids(text) for text in PROMPTS]


@pytest.mark.slow
def test_llama_cpp_chats_with_the_real_tokenizer(llama_cpp, tiny_checkpoint, shared_dir, tmp_path):
    directory = shared_dir / "tokenizer" / "v2"
    base = tiny_checkpoint(
        "baichuan2-7b", chat=True, layers=32, hidden_size=32, intermediate_size=64, heads=2,
        tokenizer_model=str(directory / "tokenizer.model"),
    )  # fmt: skip
    script.export(base, "gguf", tmp_path / "exported")
    tokenizer = BaichuanTokenizer.from_pretrained(base)
    rows = read_json(directory / "encodings.json")
    questions = ["你好", "发动机故障怎么办？", "第一行\n第二行"]
    job = {
        "path": str(tmp_path / "exported" / "exported-f16.gguf"), "f32": False, "prompts": [], "max_new_tokens": 0,
        "vocab_size": tokenizer.vocab_size, "texts": [row["text"] for row in rows],
        "chat_texts": [f"<reserved_106>{question}<reserved_107>" for question in questions],
    }  # fmt: skip
    result = run_elsewhere(tmp_path, LLAMA_CPP_PROGRAM, job, llama_cpp)
    listed = [row["text"] for row, ids in zip(rows, result["ids"], strict=True) if ids != row["sp_ids"]]
    # 只有含保留片段的不同：不解析特殊符号时 llama.cpp 把保留片段按普通字符编码，同 encode_plain
    assert listed == ["<reserved_106>你好<reserved_107>", "<reserved_102> 你好<reserved_103> 我是人工智能助理"]
    assert result["ids"] == [tokenizer.encode_plain(row["text"]) for row in rows]
    prompting = inspect_checkpoint(base).prompting._asdict()
    assert result["chat"] == [encode_prompt(tokenizer, [("user", text)], **prompting) for text in questions]
