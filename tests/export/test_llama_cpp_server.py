"""llama.cpp 的 OpenAI 服务载入我们的 GGUF：一段对话的提示词 id 与贪心 token 同 predict.py。"""

import json
import os
import re
import subprocess

import pytest
import torch

from finetune.checkpoint.inspection import inspect_checkpoint, load_checkpoint_model, load_checkpoint_tokenizer
from finetune.data.prompting import encode_prompt
from finetune.inference.generation import generate_batch, make_generation_config
from scripts import export as script

MAX_NEW_TOKENS = 8
CONVERSATION = [
    ("user", "发动机启动困难，怎么办？"), ("assistant", "请先检查火花塞与蓄电池。"),
    ("user", "换过火花塞了。\n还是不行"), ("assistant", "那就量一下燃油压力，标准是 2.5～3.0 bar。"),
    ("user", "压力正常😀"), ("assistant", "检查曲轴位置传感器。"),
    ("user", "Where is it？"),
]  # fmt: skip
SYSTEM = ("system", "你是汽车维修的助手，请简短回答。")

# 在不能导入本项目的进程里；llama-cpp-python 用它自带的服务，xllamacpp 里就是 llama-server 的服务
PROGRAM = """
import json, socket, subprocess, sys, time, urllib.request
job = json.load(open(sys.argv[1], encoding="utf-8"))

def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=300))

def ask(address, messages):
    body = {"model": "x", "messages": messages, "max_tokens": job["max_new_tokens"], "temperature": 0,
            "top_k": 1, "logprobs": True, "top_logprobs": 1, "repeat_penalty": 1.0}
    return post(address + "/v1/chat/completions", body)

def with_llama_cpp(path):
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", path, "--host", "127.0.0.1", "--port", str(port),
               "--n_ctx", "512", "--n_threads", "1", "--n_threads_batch", "1", "--logits_all", "true"]
    if job["f32"]:
        command += ["--type_k", "0", "--type_v", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    model = Llama(path, vocab_only=True, verbose=False)
    form = Jinja2ChatFormatter(model.metadata["tokenizer.chat_template"], eos_token="</s>", bos_token="<s>")
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(address + "/v1/models", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        answers = [ask(address, messages) for messages in job["conversations"]]
        ids = [model.tokenize(form(messages=messages).prompt.encode(), add_bos=False, special=True)
               for messages in job["conversations"]]
    finally:
        process.terminate()
    return ids, answers

def with_xllamacpp(path):
    import xllamacpp as xl
    parameters = xl.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = path, 512, 1
    parameters.warmup, parameters.verbosity, parameters.use_jinja = False, 0, True
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.flash_attn_type = xl.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if job["f32"]:
        parameters.cache_type_k = parameters.cache_type_v = xl.ggml_type.GGML_TYPE_F32
    server = xl.Server(parameters)
    address = server.listening_address
    ids, answers = [], []
    for messages in job["conversations"]:
        prompt = post(address + "/apply-template", {"messages": messages})["prompt"]
        ids.append(post(address + "/tokenize",
                        {"content": prompt, "add_special": True, "parse_special": True})["tokens"])
        answers.append(ask(address, messages))
    return ids, answers

def quantized(path):
    import ctypes
    parameters, target = llama_cpp.llama_model_quantize_default_params(), path.replace(".gguf", "-Q4_K_M.gguf")
    parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 1
    assert llama_cpp.llama_model_quantize(path.encode(), target.encode(), ctypes.byref(parameters)) == 0
    return target

try:
    import llama_cpp
except ImportError:
    ids, answers = (None, None) if job["quantize"] else with_xllamacpp(job["path"])
else:
    ids, answers = with_llama_cpp(quantized(job["path"]) if job["quantize"] else job["path"])
json.dump({"ids": ids, "answers": answers}, open(sys.argv[2], "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "layers"),
    [("baichuan2-7b", 32), ("baichuan2-13b", 40), ("baichuan-13b", 40)],
    ids=lambda value: str(value),
)
def test_a_conversation_gives_the_tokens_of_predict(llama_cpp, tiny_checkpoint, shared_dir, tmp_path, arch, layers):
    """system 加四轮（v1 没有 system），真分词器的布局；f32 逐个 token 相同，q8_0 与 Q4_K_M 只打印差别。"""
    options = {"chat": True, "layers": layers, "hidden_size": 256, "intermediate_size": 512, "heads": 4}
    if arch.startswith("baichuan2"):
        options["tokenizer_model"] = str(shared_dir / "tokenizer" / "v2" / "tokenizer.model")
    base = tiny_checkpoint(arch, **options)
    checkpoint = inspect_checkpoint(base)
    tokenizer = load_checkpoint_tokenizer(checkpoint)
    model = load_checkpoint_model(checkpoint, torch.float32, torch.device("cpu"))
    start = [SYSTEM] if arch.startswith("baichuan2") else []
    conversations = [[*start, *CONVERSATION[:end]] for end in (1, 3, 5, 7)]
    prompts = [encode_prompt(tokenizer, messages, **checkpoint.prompting._asdict()) for messages in conversations]
    config = make_generation_config(model, MAX_NEW_TOKENS)
    expected = [generate_batch(model, [prompt], config)[0] for prompt in prompts]
    for kind, gguf_type in (("f32", "f32"), ("q8_0", "q8_0"), ("Q4_K_M", "f16")):
        script.export(base, "gguf", tmp_path / gguf_type, gguf_type=gguf_type)
        job = {
            "path": str(tmp_path / gguf_type / f"{gguf_type}-{gguf_type}.gguf"), "f32": kind == "f32",
            "quantize": kind == "Q4_K_M", "max_new_tokens": MAX_NEW_TOKENS,
            "conversations": [[{"role": role, "content": text} for role, text in one] for one in conversations],
        }  # fmt: skip
        (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
        (tmp_path / "job.json").write_text(json.dumps(job, ensure_ascii=False), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [llama_cpp, "program.py", "job.json", "results.json"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        results = json.loads((tmp_path / "results.json").read_text())
        if results["ids"] is None:  # xllamacpp 不会量化
            continue
        assert results["ids"] == prompts
        texts = [answer["choices"][0]["message"]["content"] for answer in results["answers"]]
        # 保留片段在 GGUF 里是控制片段，llama.cpp 不显示它们
        own = [re.sub(r"<reserved_\d+>", "", tokenizer.decode(ids, skip_special_tokens=True)) for ids in expected]
        print(f"{arch} {kind}：{sum(a == b for a, b in zip(texts, own, strict=True))}/4 个回答相同")
        assert [answer["usage"]["prompt_tokens"] for answer in results["answers"]] == [len(ids) for ids in prompts]
        if kind == "f32":
            found = [answer["choices"][0]["logprobs"] for answer in results["answers"]]
            if all("id" in entry for one in found for entry in one["content"]):
                assert [[entry["id"] for entry in one["content"]] for one in found] == expected
            assert texts == own
