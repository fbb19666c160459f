"""--to gguf_lora：W_pack 的适配器拆成 q、k、v，读回来逐位相同；llama.cpp 里与合并后的模型给出同样的贪心 token。"""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
from trained_checkpoints import ARCHITECTURES

from finetune.checkpoint.inspection import inspect_checkpoint, load_checkpoint_model, load_checkpoint_tokenizer
from finetune.checkpoint.manifest import verify_checkpoint
from finetune.data.prompting import encode_prompt
from finetune.export import gguf_lora as module
from finetune.export.tensors import CheckFailed, TensorSource
from finetune.inference.generation import generate_batch, make_generation_config
from scripts import export as script

SIZES = {"hidden_size": 64, "intermediate_size": 96, "heads": 4}
LAYERS = {"baichuan-7b": 32, "baichuan-13b": 40, "baichuan2-7b": 32, "baichuan2-13b": 40}
TEXTS = ["你好", "故障现象：发动机启动困难。", "Hello, world!", "第一行\n第二行", "这家店的菜很好吃。"]
LINEAR = ("W_pack", "o_proj", "gate_proj", "up_proj", "down_proj")


def greedy(path, num_tokens):
    """不经 llama.cpp 的：(提示词 id, 贪心 token)，适配器没有合并。"""
    checkpoint = inspect_checkpoint(path)
    tokenizer = load_checkpoint_tokenizer(checkpoint)
    model = load_checkpoint_model(checkpoint, torch.float32, torch.device("cpu"))
    prompts = [encode_prompt(tokenizer, [("user", text)], **checkpoint.prompting._asdict()) for text in TEXTS]
    config = make_generation_config(model, num_tokens)
    return prompts, [generate_batch(model, [prompt], config)[0] for prompt in prompts]


def test_adapter_file(gguf, trained, tmp_path):
    source = trained("baichuan2-7b", "lora", layers=32, **SIZES)
    comparison = script.export(source, "gguf_lora", tmp_path / "spo")
    assert (comparison.max_difference, comparison.agreement) == (0.0, 1.0)
    assert sorted(path.name for path in (tmp_path / "spo").iterdir()) == ["README.md", "manifest.json", "spo-lora.gguf"]
    assert verify_checkpoint(tmp_path / "spo") == []
    reader = gguf.GGUFReader(tmp_path / "spo" / "spo-lora.gguf")
    value = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF")}
    assert value["general.architecture"] == "baichuan"
    assert (value["general.type"], value["adapter.type"], value["adapter.lora.alpha"]) == ("adapter", "lora", 30.0)
    assert len(reader.tensors) == 32 * 6
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    lora_a, lora_b, _ = TensorSource(inspect_checkpoint(source)).lora["model.layers.3.self_attn.W_pack"]
    for part in "qkv":
        assert np.array_equal(tensors[f"blk.3.attn_{part}.weight.lora_a"], lora_a.numpy())
    assert np.array_equal(tensors["blk.3.attn_v.weight.lora_b"], lora_b[128:].numpy())
    # 头宽 16：前半的第 1 行排到第 2 行，后半的第 0 行（原第 8 行）排到第 1 行
    query = tensors["blk.3.attn_q.weight.lora_b"]
    assert np.array_equal(query[[0, 1, 2, 3]], lora_b[[0, 8, 1, 9]].numpy())
    assert np.array_equal(tensors["blk.3.attn_k.weight.lora_b"][[16, 17]], lora_b[[80, 88]].numpy())


def test_refusals(gguf, trained, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("baichuan2-7b", layers=32, **SIZES)
    lora = trained("baichuan2-7b", "lora", layers=32, **SIZES)
    for source, options, match in (
        (base, {}, "没有适配器，请用 --to gguf"),
        (lora, {"gguf_type": "f16"}, "--to gguf_lora 总是 f32"),
        (lora, {"dtype": "float16"}, "--to gguf_lora 总是 f32"),
        (trained("baichuan2-7b", "lora"), {}, "只接受 32 层"),
        (trained("baichuan2-7b", "ptuning"), {}, "P-Tuning"),
    ):
        with pytest.raises(ValueError, match=match):
            script.export(source, "gguf_lora", tmp_path / "exported", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mistake", ["swap_qk", "not_permuted", "scaling"])
def test_mistakes_are_noticed(gguf, trained, tmp_path, monkeypatch, mistake):
    source = TensorSource(inspect_checkpoint(trained("baichuan2-7b", "lora", layers=32, **SIZES)))
    right = dict(source.lora)
    if mistake == "scaling":
        source.lora = {name: (a, b, 2 * scaling) for name, (a, b, scaling) in right.items()}
    elif mistake == "swap_qk":
        source.lora = {n: (a, torch.cat([b[64:128], b[:64], b[128:]]), s) for n, (a, b, s) in right.items()}
    else:
        monkeypatch.setattr(module, "gguf_tensors", lambda config, name, tensor: list(tensor.chunk(3)))
    module.write_gguf_lora(source, tmp_path / "wrong.gguf", "wrong")
    source.lora = right
    with pytest.raises(CheckFailed, match="的适配器与来源不同"):
        module.check_gguf_lora(source, tmp_path / "wrong.gguf", [[5, 300, 77]])


# 在不能导入本项目的进程里：一个基座，两个适配器，逐个提示词的贪心 token
PROGRAM = """
import json, sys
job = json.load(open(sys.argv[1]))

def with_llama_cpp(Llama):
    import numpy as np
    results = []
    for path in job["adapters"]:
        model = Llama(job["base"], n_ctx=256, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1,
                      type_k=0, type_v=0, lora_path=path)
        tokens = []
        for prompt in job["prompts"]:
            model.reset()
            model.eval(prompt)
            generated = []
            while len(generated) < job["max_new_tokens"]:
                generated.append(int(np.argmax(model.scores[model.n_tokens - 1])))
                model.eval(generated[-1:])
            tokens.append(generated)
        results.append(tokens)
    return results

def with_xllamacpp(xl):
    import urllib.request
    parameters = xl.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = job["base"], 256, 1
    parameters.warmup, parameters.verbosity = False, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.flash_attn_type = xl.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = xl.ggml_type.GGML_TYPE_F32
    adapters = []
    for path in job["adapters"]:
        adapter = xl.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = path, 0.0
        adapters.append(adapter)
    parameters.lora_adapters = adapters
    server = xl.Server(parameters)
    def post(body):
        request = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))
    return [
        [post({"prompt": prompt, "n_predict": job["max_new_tokens"], "temperature": 0, "samplers": ["temperature"],
               "cache_prompt": False, "return_tokens": True,
               "lora": [{"id": other, "scale": float(other == index)} for other in range(len(adapters))]})["tokens"]
         for prompt in job["prompts"]]
        for index in range(len(adapters))
    ]

try:
    from llama_cpp import Llama
except ImportError:
    import xllamacpp
    results = with_xllamacpp(xllamacpp)
else:
    results = with_llama_cpp(Llama)
json.dump(results, open(sys.argv[2], "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_llama_cpp_gives_the_merged_models_tokens(llama_cpp, trained, tiny_checkpoint, tmp_path, arch):
    """f32 的一个基座，两个适配器（只有 W_pack，与全部线性层）；各与 predict.py 对合并前的检查点的回答相同。"""
    options = {"layers": LAYERS[arch], **SIZES}
    script.export(tiny_checkpoint(arch, **options), "gguf", tmp_path / "base", gguf_type="f32")
    sources = [trained(arch, "lora", targets=targets, **options) for targets in (("W_pack",), LINEAR)]
    paths = []
    for index, source in enumerate(sources):
        script.export(source, "gguf_lora", tmp_path / f"adapter{index}")
        paths.append(str(tmp_path / f"adapter{index}" / f"adapter{index}-lora.gguf"))
    expected = [greedy(source, 8) for source in sources]
    prompts = expected[0][0]
    job = {
        "base": str(tmp_path / "base" / "base-f32.gguf"), "adapters": paths, "prompts": prompts, "max_new_tokens": 8,
    }  # fmt: skip
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [llama_cpp, "program.py", "job.json", "results.json"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    for found, (_, tokens) in zip(json.loads((tmp_path / "results.json").read_text()), expected, strict=True):
        assert [ids[: ids.index(2)] if 2 in ids else ids for ids in found] == tokens
    assert expected[0][1] != expected[1][1]
