"""predict.py --serve：与 predict.py 同样的 id 与回答；流式、停止、对数概率、几个适配器；错的请求；信号与并发。"""

import copy
import json
import os
import queue
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from generating import make_adapter, make_predictor
from paths import ROOT

from baichuan import BaichuanTokenizer
from finetune.cli.predict_checks import prepare
from finetune.cli.predict_flags import parse_args
from finetune.inference import serve as module
from finetune.inference.batcher import Batcher, Job, QueueFull, Row
from finetune.inference.generation import make_generation_config
from finetune.inference.predictor import Predictor

httpx = pytest.importorskip("httpx2", reason="没有安装 httpx2，跳过 --serve 的测试")
pytest.importorskip("uvicorn", reason="没有安装 uvicorn，跳过 --serve 的测试")
TestClient = pytest.importorskip("starlette.testclient", reason="没有安装 starlette，跳过 --serve 的测试").TestClient

QUESTIONS = ["你好", "发动机启动困难，怎么办？", "换过火花塞了。\n还是不行", "再说一遍<reserved_106>", "Hello, world!"]
CHAT = "/v1/chat/completions"


def by_predict(predictor, messages, max_new_tokens, adapter=None, stop=()):
    """predict.py 对一段对话的贪心回答：(提示词 id, 生成的 id)。"""
    predictor.use_adapter(adapter)
    predictor.args.stop = list(stop)
    config = make_generation_config(predictor.model, max_new_tokens)
    prompt = predictor.encode(tuple(messages), max_input_tokens=predictor.max_input_tokens)
    return prompt, predictor.generate_batch([prompt], config)[0]


def as_messages(pairs):
    return [{"role": role, "content": text} for role, text in pairs]


@contextmanager
def in_process(*flags):
    """(进程内的客户端, 它的 Service)。"""
    flags = (*flags, "--serve", "0", "--device", "cpu", "--precision", "fp32", "--max_new_tokens", 6)
    args = parse_args([str(flag) for flag in flags])
    plan = prepare(args)
    plan.listener.close()
    predictor = Predictor(args, plan.checkpoints[0], plan.adapters)
    predictor.load_model(plan.device)
    service = module.Service(predictor)
    try:
        yield TestClient(module.make_app(service, args.api_key)), service
    finally:
        service.batcher.close()


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return tiny_checkpoint("baichuan2-7b", chat=True)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    return [make_adapter(base, directory / name, seed) for seed, name in enumerate(("spo", "cls"))]


@pytest.fixture(scope="module")
def oracle(base, adapters):
    """另一个进程里的服务应当给出的：同样的检查点，不经服务。"""
    return make_predictor("--model_path", base, "--adapter", *adapters)


@contextmanager
def running(*flags, output=None):
    """真的 predict.py --serve 进程：(进程, 地址)；此后它写到标准错误的各行放进 output。"""
    command = [sys.executable, "predict.py", "--serve", "0", "--device", "cpu", "--precision", "fp32", *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if match := re.search(r"http://\S+?:\d+", line):
                break
        else:
            pytest.fail(f"服务没有起来，退出码 {process.wait()}")
        # 之后的输出没有人读，管道写满会卡住
        output = [] if output is None else output
        reader = threading.Thread(target=lambda: output.extend(process.stderr), daemon=True)
        reader.start()
        wait_until_up(match[0])
        yield process, match[0]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=300)
        reader.join()


def wait_until_up(address):
    for _ in range(600):
        try:
            return httpx.get(f"{address}/health").raise_for_status()
        except httpx.TransportError:
            time.sleep(0.1)
    pytest.fail("服务没有起来")


@pytest.fixture(scope="module")
def address(base, adapters):
    with running("--model_path", base, "--adapter", *adapters, "--max_new_tokens", 24, "--batch_size", 16) as (
        _,
        place,
    ):
        yield place


# ---- 同样的 id 与 token ----


@pytest.mark.parametrize("arch", ["baichuan2-7b", "baichuan2-13b", "baichuan-13b"])
@pytest.mark.parametrize("kind", [None, "lora", "prefix"])
def test_a_conversation_gives_the_tokens_of_predict(tiny_checkpoint, tmp_path, arch, kind):
    base = tiny_checkpoint(arch, chat=True)
    flags = ["--model_path", base]
    if kind is not None:
        flags += ["--adapter", make_adapter(base, tmp_path / "one", kind=kind)]
    with in_process(*flags) as (client, service):
        oracle = make_predictor(*flags)
        history = [("system", "你是汽车维修的助手。")] if arch.startswith("baichuan2") else []
        for question in QUESTIONS[:4]:
            history.append(("user", question))
            adapter = None if kind is None else "one"
            prompt, ids = by_predict(oracle, history, 7, adapter)
            body = {
                "model": "one" if kind else arch,
                "messages": as_messages(history),
                "max_tokens": 7,
                "logprobs": True,
            }
            answer = client.post(CHAT, json=body).json()
            assert service.encode(module.read_request(body))[0] == prompt
            assert answer["usage"]["prompt_tokens"] == len(prompt)
            choice = answer["choices"][0]
            pieces = [bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]]
            assert pieces == [module.token_bytes(oracle.tokenizer, token) for token in ids]
            assert choice["message"]["content"] == oracle.decode(ids)
            history.append(("assistant", choice["message"]["content"]))


def test_a_ptuning_checkpoint_alone_is_a_model(base, tmp_path):
    path = make_adapter(base, tmp_path / "run" / "epoch-1-step-3", kind="prefix")
    (path / "run_config.json").write_text(json.dumps({"base_model": {"path": str(base)}}))
    with in_process("--model_path", path) as (client, _):
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["epoch-1-step-3"]
        oracle = make_predictor("--model_path", path)
        _, ids = by_predict(oracle, [("user", "你好")], 6)
        answer = client.post(CHAT, json={"model": "epoch-1-step-3", "messages": as_messages([("user", "你好")])})
        assert answer.json()["choices"][0]["message"]["content"] == oracle.decode(ids)


def test_the_prompt_format_follows_the_adapter(base, tmp_path):
    path = make_adapter(base, tmp_path / "plain")
    (path / "run_config.json").write_text(json.dumps({"prompt_format": "plain"}))
    with in_process("--model_path", base, "--adapter", path) as (_, service):
        ids = service.predictor.tokenizer.encode_plain("你好")
        messages = as_messages([("user", "你好")])
        prompts = {
            name: service.encode(module.read_request({"model": name, "messages": messages}))[0]
            for name in ("plain", base.name)
        }
        assert prompts == {"plain": ids, base.name: [195, *ids, 196]}


def test_the_stop_of_a_template(base, tmp_path):
    """模板里有 stop 的检查点：回答到它之前为止，流式的也是，服务停得下来。"""
    template = {"user": "问：{text}\n", "assistant": "答：{text}"}
    path = tmp_path / "template.json"

    def by_template(**more):
        path.write_text(json.dumps({**template, **more}), encoding="utf-8")
        predictor = make_predictor("--model_path", base, "--prompt_format", path)
        return predictor.decode(by_predict(predictor, [("user", "你好")], 20)[1])

    full = by_template()
    stop = full[len(full) // 2 :][:2]
    expected = by_template(stop=stop)
    assert expected == full[: full.index(stop)]
    body = {"model": base.name, "messages": as_messages([("user", "你好")]), "max_tokens": 20}
    with running("--model_path", base, "--prompt_format", path) as (process, place):
        choice = httpx.post(place + CHAT, json=body, timeout=60).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
        lines = httpx.post(place + CHAT, json={**body, "stream": True}, timeout=60).text.splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == expected
        process.terminate()
        assert process.wait(timeout=60) == 0


def test_adapters_that_read_rows_differently_are_served_together(base, adapters, tmp_path):
    paths = [shutil.copytree(path, tmp_path / path.name) for path in adapters]
    for path, separator in zip(paths, ("", "\n"), strict=True):
        (path / "run_config.json").write_text(json.dumps({"args": {"input_separator": separator}}))
    with in_process("--model_path", base, "--adapter", *paths) as (client, _):
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [base.name, "spo", "cls"]


def test_a_model_is_named_as_given(base, tmp_path):
    (tmp_path / "baichuan2-13B").symlink_to(base)
    with in_process("--model_path", tmp_path / "baichuan2-13B") as (_, service):
        assert [*service.names] == ["baichuan2-13B"]


def test_log_probabilities_are_the_models(base):
    with in_process("--model_path", base) as (client, _):
        messages = [("user", "你好")]
        body = {"model": base.name, "messages": as_messages(messages), "max_tokens": 5, "logprobs": True}
        plain = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
        top = client.post(CHAT, json={**body, "top_logprobs": 3}).json()["choices"][0]["logprobs"]["content"]
        oracle = make_predictor("--model_path", base)
        prompt, ids = by_predict(oracle, messages, 5)
        with torch.no_grad():
            rows = oracle.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert len(plain) == len(ids) == 5
        for index, token in enumerate(ids):
            assert plain[index]["logprob"] == pytest.approx(float(rows[index, token]), abs=1e-4)
            assert plain[index]["top_logprobs"] == []
            best = rows[index].topk(3)
            assert [bytes(entry["bytes"]) for entry in top[index]["top_logprobs"]] == [
                module.token_bytes(oracle.tokenizer, found) for found in best.indices.tolist()
            ]
            assert [entry["logprob"] for entry in top[index]["top_logprobs"]] == pytest.approx(
                best.values.tolist(), abs=1e-4
            )


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("stops", [[], ["END"]])
def test_log_probabilities_go_with_the_characters_they_write(base, is_streamed, stops):
    """一个字由几个字节片段写成：最后一个到了才算写出；它们都在，次序不乱。"""
    tokenizer = BaichuanTokenizer.from_pretrained(base)
    pieces = ["好", *(f"<0x{byte:02X}>" for byte in "😀".encode()), *(f"<0x{byte:02X}>" for byte in b"END"), "的"]
    ids = [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]
    assert tokenizer.unk_token_id not in ids
    chunks: list = []
    job = Job(None, [5], len(ids), chunks.append, stops=tuple(stops), top_logprobs=0, is_streamed=is_streamed)
    row = Row(job, tokenizer, tokenizer.eos_token_id, torch.device("cpu"))
    for token in ids:
        if not job.is_done:
            row._log_probs = torch.zeros(len(tokenizer)).log_softmax(-1)
            row.take(token)
    text, found = "", []
    for chunk in chunks:
        text += chunk.text
        found += [choice.token for choice in chunk.choices]
        assert text.startswith(tokenizer.decode(found).rstrip("\ufffd")) and "\ufffd" not in tokenizer.decode(found)
    assert (text, found) == (("好😀", ids[:5]) if stops else ("好😀END的", ids))


def test_sampling_depends_on_the_seed_alone(address, base):
    """同样的种子，单独与成批时回答相同；不写种子时每次不同。"""
    body = {"model": base.name, "messages": as_messages([("user", "你好")]), "temperature": 1, "max_tokens": 16}

    def ask(seed):
        response = httpx.post(address + CHAT, json={**body, **({} if seed is None else {"seed": seed})}, timeout=60)
        return response.json()["choices"][0]["message"]["content"]

    alone = [ask(seed) for seed in range(6)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, [*range(6), *range(6)]))
    assert together == alone * 2
    assert len({*alone}) == 6
    assert len({ask(None) for _ in range(4)}) == 4


def test_sampling_follows_the_distribution(base):
    """首个 token 的频率与 softmax(logits / 温度) 截到 top_k 一致。"""
    with in_process("--model_path", base, "--batch_size", 1000) as (_, service):
        prompt = service.predictor.encode((("user", "你好"),))
        with torch.no_grad():
            logits = service.predictor.model(torch.tensor([prompt])).logits[0, -1] / 0.5
        best = logits.topk(3)
        service.batcher.max_waiting = 1000
        found, jobs = queue.Queue(), []
        for seed in range(1000):
            jobs.append(Job(None, prompt, 1, found.put, temperature=0.5, top_k=3, seed=seed, top_logprobs=0))
            service.batcher.submit(jobs[-1])
        tokens = [found.get(timeout=60).choices[0].token for _ in jobs]
        assert {*tokens} <= {*best.indices.tolist()}
        for token, share in zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True):
            assert abs(tokens.count(token) / 1000 - share) < 4 * (share * (1 - share) / 1000) ** 0.5


# ---- openai 与 curl ----


@pytest.fixture(scope="module")
def openai_client(address):
    openai = pytest.importorskip("openai", reason="没有安装 openai，跳过官方客户端的测试")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_client_lists_the_models(openai_client, base):
    assert [model.id for model in openai_client.models.list()] == [base.name, "spo", "cls"]
    assert openai_client.models.retrieve("spo").id == "spo"


def test_openai_client_streams_what_it_gets_at_once(openai_client, oracle):
    messages = [("system", "简短回答。"), ("user", "你好")]
    _, ids = by_predict(oracle, messages, 20, "spo")
    asked = {"model": "spo", "messages": as_messages(messages), "max_tokens": 20, "logprobs": True}
    whole = openai_client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == oracle.decode(ids)
    chunks = list(openai_client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in deltas) == oracle.decode(ids)
    assert len([choice for choice in deltas if choice.delta.content]) > 3
    streamed = [entry for choice in deltas if choice.logprobs for entry in choice.logprobs.content]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in whole.choices[0].logprobs.content]
    assert [choice.finish_reason for choice in deltas][-1] == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 20


@pytest.mark.parametrize("is_streamed", [False, True])
def test_stop_strings(openai_client, oracle, base, is_streamed):
    messages = [("user", QUESTIONS[1])]
    _, ids = by_predict(oracle, messages, 20)
    full = oracle.decode(ids)
    stop = full[len(full) // 2 :][:2]
    asked = {"model": base.name, "messages": as_messages(messages), "max_tokens": 20, "stop": ["没有的", stop]}
    result = openai_client.chat.completions.create(**asked, logprobs=True, stream=is_streamed)
    if is_streamed:
        choices = [chunk.choices[0] for chunk in result]
        text = "".join(choice.delta.content or "" for choice in choices)
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        reason = choices[-1].finish_reason
    else:
        text, reason = result.choices[0].message.content, result.choices[0].finish_reason
        entries = result.choices[0].logprobs.content
    assert (text, reason) == (full[: full.index(stop)], "stop")
    covered = b"".join(bytes(entry.bytes) for entry in entries)
    assert covered.startswith(text.encode())
    assert not b"".join(bytes(entry.bytes) for entry in entries[:-1]).startswith(text.encode())


def test_two_adapters_at_once(openai_client, oracle, base):
    names = {base.name: None, "spo": "spo", "cls": "cls"}
    expected = {
        (name, question): oracle.decode(by_predict(oracle, [("user", question)], 12, adapter)[1])
        for name, adapter in names.items()
        for question in QUESTIONS
    }
    assert len({*expected.values()}) > 10

    def ask(case):
        answer = openai_client.chat.completions.create(
            model=case[0], messages=as_messages([("user", case[1])]), max_tokens=12
        )
        return answer.choices[0].message.content

    cases = random.Random(0).sample([*expected] * 2, 2 * len(expected))
    with ThreadPoolExecutor(len(cases)) as pool:
        assert list(pool.map(ask, cases)) == [expected[case] for case in cases]


@pytest.mark.skipif(shutil.which("curl") is None, reason="没有 curl")
def test_curl(address, oracle, base):
    _, ids = by_predict(oracle, [("user", "你好")], 8)
    body = {"model": base.name, "messages": as_messages([("user", "你好")]), "max_tokens": 8}

    def curl(**more):
        command = [
            "curl",
            "-sN",
            "-m",
            "60",
            "-H",
            "Content-Type: application/json",
            "-d",
            json.dumps({**body, **more}),
        ]
        return subprocess.run([*command, address + CHAT], capture_output=True, text=True, check=True).stdout

    assert json.loads(curl())["choices"][0]["message"]["content"] == oracle.decode(ids)
    events = [line.removeprefix("data: ") for line in curl(stream=True).splitlines() if line]
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(e)["choices"][0]["delta"].get("content", "") for e in events) == oracle.decode(ids)


# ---- 拒绝 ----


@pytest.fixture(scope="module")
def client(base):
    with in_process("--model_path", base, "--api_key", "secret") as (client, service):
        client.headers["Authorization"] = "Bearer secret"
        client.service = service
        yield client


def valid_body(base):
    return {"model": base.name, "messages": as_messages([("user", "你好")]), "max_tokens": 3}


NUMBERS = [
    "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "top_logprobs", "n",
    "presence_penalty", "frequency_penalty",
]  # fmt: skip


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), float("nan")])
def test_max_completion_tokens_is_checked_as_max_tokens(client, base, value):
    body = {**valid_body(base), "max_tokens": None, "max_completion_tokens": value}
    response = client.post(CHAT, content=json.dumps(body), headers={"Content-Type": "application/json"})
    param = "messages" if value == 10**400 else "max_completion_tokens"  # 前者是整数，只是上下文放不下
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_the_first_generation_has_no_answer_before_the_first_question(tiny_checkpoint):
    base = tiny_checkpoint("baichuan-13b", chat=True)
    with in_process("--model_path", base) as (client, _):
        question, answer = ("user", "你好"), ("assistant", "在")
        for messages, status in (([answer, question], 400), ([question, answer, question], 200)):
            response = client.post(CHAT, json={**valid_body(base), "messages": as_messages(messages)})
            assert response.status_code == status
            assert status == 200 or response.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "别的"}, 404, "model"),
        ({"model": "\ud800"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"\ud800": 1}, 400, "?"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages[0]"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, 400, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0]"),
        ({"messages": as_messages([("user", "a"), ("system", "b")])}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, 400, "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]}]},
            400,
            "messages[0].content[0].cache",
        ),
        ({"max_tokens": 4096}, 400, "messages"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, 400, "max_tokens"),
        ({"temperature": -0.1}, 400, "temperature"),
        ({"temperature": "0"}, 400, "temperature"),
        ({"top_p": 0.5}, 400, "top_p"),
        ({"top_p": 0, "temperature": 1}, 400, "top_p"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"stop": [""]}, 400, "stop"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"n": 2}, 400, "n"),
        ({"tools": [{}]}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"seed": 2**63}, 400, "seed"),
        *(
            ({name: value}, 400, "messages" if name.startswith("max_") and value == 10**400 else name)
            for name in NUMBERS
            for value in (10**400, -(10**400), float("inf"), float("nan"))
        ),
    ],
)
def test_refusals_name_the_field(client, base, change, status, param):
    content = json.dumps({**valid_body(base), **change})
    response = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert response.json()["error"]["message"]


def test_what_has_no_effect_is_accepted_when_it_says_nothing(client, base):
    quiet = {"n": 1, "presence_penalty": 0, "logit_bias": {}, "tools": None, "user": "某人", "top_p": 1}
    assert client.post(CHAT, json={**valid_body(base), **quiet}).status_code == 200


def test_http_refusals(client, base):
    body = json.dumps(valid_body(base))
    json_type = {"Content-Type": "application/json"}
    for content, headers, status in (
        (body, {"Content-Type": "text/plain"}, 415),
        (body, {}, 415),
        (b"{" + b" " * 2**20 + b"}", json_type, 413),
        ("[" * 100000, json_type, 400),
        (b"\xff\xfe", json_type, 400),
        (body, {**json_type, "Authorization": "Bearer x"}, 401),
    ):
        response = client.post(CHAT, content=content, headers=headers)
        assert response.status_code == status
        assert response.json()["error"]["message"]
    assert client.get(CHAT).status_code == 405
    assert client.get("/v1/none").status_code == 404
    assert client.get("/v1/models/none").status_code == 404
    assert client.get("/v1/models", headers={"Authorization": ""}).status_code == 401
    assert client.get("/health", headers={"Authorization": ""}).json()["status"] == "ok"


JUNK = [
    None, True, False, 0, -1, 1, 2, 1e308, -0.0, 10**400, 0.5, "", "a", "\ud800", "\x00", "</s>", [], [[]], [None],
    ["a"] * 17, {}, {"a": 1}, [{"role": "user"}], [{"role": "user", "content": "好"}], {"include_usage": 1}, 2**63,
]  # fmt: skip


def mutated(generator, base):
    """一个合法请求体改动一到三处，有时再弄坏它的字节。"""
    body = copy.deepcopy(valid_body(base)) | {"temperature": 1.0, "stop": ["。"], "logprobs": True, "seed": 1}
    for _ in range(generator.randint(1, 3)):
        place = generator.choice([body, *[m for m in body.get("messages") or [] if isinstance(m, dict)]])
        names = [*place, *module.FIELDS, "role", "content", "未知"]
        name, kind = generator.choice(names), generator.random()
        if kind < 0.2:
            place.pop(name, None)
        else:
            place[name] = generator.choice(JUNK)
        if not isinstance(body.get("messages"), list):
            break
    content = json.dumps(body).encode()
    if generator.random() < 0.25:
        content = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        content = bytes(content[: generator.randint(0, len(content))])
    return content


def test_mutated_bodies_are_never_a_500(client, base):
    generator, statuses = random.Random(26), []
    for _ in range(200):
        content = mutated(generator, base)
        response = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 200 or 400 <= response.status_code < 500, content
        if response.status_code != 200:
            assert response.json()["error"]["message"], content
        elif "event-stream" in response.headers["content-type"]:
            assert response.text.endswith("data: [DONE]\n\n"), content
        statuses.append(response.status_code)
    assert statuses.count(400) > 100
    assert statuses.count(200) > 5
    assert client.get("/health").json() == {"status": "ok", "waiting": 0, "running": 0}


def test_a_full_queue_is_429(client, base, monkeypatch):
    monkeypatch.setattr(client.service.batcher, "max_waiting", 0)
    response = client.post(CHAT, json=valid_body(base))
    assert (response.status_code, response.headers["Retry-After"]) == (429, "1")


def test_only_those_still_waiting_fill_the_queue(base):
    predictor = make_predictor("--model_path", base)
    batcher = Batcher(predictor, batch_size=1, max_waiting=2)
    found = queue.Queue()

    def job(num_tokens=1):
        return Job(None, predictor.encode((("user", "你好"),)), num_tokens, found.put)

    try:
        long = job(3000)
        batcher.submit(long)
        while batcher.counts()["running"] == 0:
            time.sleep(0.01)
        gone = [job(), job()]
        for one in gone:
            batcher.submit(one)
        with pytest.raises(QueueFull):
            batcher.submit(job())
        gone[0].is_cancelled = True
        assert batcher.counts() == {"waiting": 1, "running": 1}
        gone[1].is_cancelled = True
        last = job()
        batcher.submit(last)
        long.is_cancelled = True
        assert found.get(timeout=60).finish_reason == "length"
        assert (last.is_done, gone[0].is_done, gone[1].is_done) == (True, False, False)
    finally:
        batcher.close()


def test_a_generation_that_returns_early_is_an_error(client, base, monkeypatch):
    monkeypatch.setattr(client.service.predictor, "generate_batch", lambda *a, **k: [])
    response = client.post(CHAT, json=valid_body(base))
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")


def test_a_failing_generation_is_told_and_the_next_is_served(client, base, monkeypatch, capsys):
    body = valid_body(base)
    with monkeypatch.context() as patch:
        patch.setattr(client.service.predictor, "generate_batch", lambda *a, **k: 1 / 0)
        response = client.post(CHAT, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")
        assert '"generation_failed"' in client.post(CHAT, json={**body, "stream": True}).text
    assert "test_serve.py" in capsys.readouterr().err  # 出错的地方
    assert client.post(CHAT, json=body).status_code == 200


# ---- 命令行 ----


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        (["--serve", "--test_path", "x.json"], "--test_path"),
        (["--serve", "--do_sample"], "--do_sample"),
        (["--serve", "--stop", "a"], "--stop"),
        (["--serve", "127.0.0.1"], r"--serve\(127\.0\.0\.1\)"),
        (["--serve", "127.0.0.1:70000"], r"--serve\(127\.0\.0\.1:70000\)"),
        (["--serve", "a..b:80"], r"--serve\(a\.\.b:80\) 的主机名"),
        (["--api_key", "a"], "--api_key"),
    ],
)
def test_flags_that_do_not_go_together(base, flags, flag):
    with pytest.raises(ValueError, match=flag):
        prepare(parse_args(["--model_path", str(base), *flags]))


def test_a_taken_port_is_an_error_before_loading(base):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--serve\(127\.0\.0\.1:{port}\)"):
            prepare(parse_args(["--model_path", str(base), "--serve", f"127.0.0.1:{port}"]))


def test_the_port_is_held_while_loading(base):
    flags = ["--model_path", str(base), "--serve"]
    with prepare(parse_args([*flags, "0"])).listener as held:
        place = f"127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(ValueError, match=re.escape(f"--serve({place})")):
            prepare(parse_args([*flags, place]))


def test_missing_libraries_name_the_install(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match="pip install uvicorn starlette"):
        prepare(parse_args(["--model_path", str(base), "--serve"]))


# ---- 信号与并发 ----


def test_sigterm_finishes_what_is_running(base, oracle):
    """比一批多的请求在路上时收到 SIGTERM：全部做完，新的连接不收，退出码 0。"""
    questions = [f"{index}、{QUESTIONS[index % 5]}" for index in range(4)]
    expected = [oracle.decode(by_predict(oracle, [("user", text)], 80)[1]) for text in questions]
    with running("--model_path", base, "--batch_size", 2) as (process, place), ThreadPoolExecutor(4) as pool:

        def ask(text):
            body = {"model": base.name, "messages": as_messages([("user", text)]), "max_tokens": 80}
            return httpx.post(place + CHAT, json=body, timeout=120).json()["choices"][0]["message"]["content"]

        answers = [pool.submit(ask, text) for text in questions]
        while sum(httpx.get(f"{place}/health").json()[name] for name in ("waiting", "running")) < 4:
            assert not any(answer.done() for answer in answers)
        process.send_signal(signal.SIGTERM)
        assert [answer.result() for answer in answers] == expected
        assert process.wait(timeout=300) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{place}/health")


def test_a_forced_exit_says_what_was_not_finished(base):
    """第二次 Ctrl-C 不等：退出码 0，不说都做完了。"""
    body = {"model": base.name, "messages": as_messages([("user", "你好")]), "max_tokens": 4000}
    output = []
    with running("--model_path", base, output=output) as (process, place), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, place + CHAT, json=body, timeout=60)
        while not httpx.get(f"{place}/health").json()["running"]:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        with pytest.raises(httpx.TransportError):  # 不再收新的连接：第一次已经生效
            while True:
                httpx.get(f"{place}/health", timeout=30)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        assert asked.exception() is not None or asked.result().status_code == 500
    assert "1 个收下的请求没有做完" in output[-1]
    assert not any("Exception in thread" in line for line in output)


def test_a_client_that_leaves_frees_its_place(address, base):
    body = {"model": base.name, "messages": as_messages([("user", "你好")]), "max_tokens": 4000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(address + CHAT, json=body, timeout=0.5)
    with httpx.stream("POST", address + CHAT, json={**body, "stream": True}, timeout=60) as response:
        next(response.iter_lines())
    for _ in range(100):
        if httpx.get(f"{address}/health").json() == {"status": "ok", "waiting": 0, "running": 0}:
            return
        time.sleep(0.1)
    pytest.fail("断开的请求仍在生成")


def resident_mb(pid):
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_64_at_once_for_two_minutes(base, adapters, oracle):
    """64 个同时的请求，两分钟：一个不少，一个不混，内存不涨；每秒的请求数至少是一个一个做的三倍。"""
    generator = random.Random(0)
    names = {base.name: None, "spo": "spo", "cls": "cls"}
    cases = [(name, f"{number}：{generator.choice(QUESTIONS)}") for name in names for number in range(30)]
    expected = {case: oracle.decode(by_predict(oracle, [("user", case[1])], 24, names[case[0]])[1]) for case in cases}
    with (
        running("--model_path", base, "--adapter", *adapters, "--batch_size", 32) as (process, place),
        httpx.Client(timeout=120, limits=httpx.Limits(max_connections=64)) as client,
    ):

        def ask(case):
            body = {"model": case[0], "messages": as_messages([("user", case[1])]), "max_tokens": 24}
            answer = client.post(place + CHAT, json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["message"]["content"] == expected[case]

        def until(seconds, seed):
            choose, count, end = random.Random(seed), 0, time.monotonic() + seconds
            while time.monotonic() < end:
                ask(choose.choice(cases))
                count += 1
            return count

        until(3, -1)
        started = time.monotonic()
        alone = until(20, -2) / (time.monotonic() - started)
        memory = []
        with ThreadPoolExecutor(64) as pool:
            started = time.monotonic()
            workers = [pool.submit(until, 120, seed) for seed in range(64)]
            while not all(worker.done() for worker in workers):
                time.sleep(1)
                memory.append(resident_mb(process.pid))
            total = sum(worker.result() for worker in workers)
            together = total / (time.monotonic() - started)
    early, late = max(memory[10:30]), max(memory[-20:])
    print(
        f"一个一个 {alone:.1f} 请求/秒，64 个同时 {together:.1f} 请求/秒，共 {total}；内存 {early:.0f} → {late:.0f} MB"
    )
    assert together >= 3 * alone
    assert late < early * 1.02
