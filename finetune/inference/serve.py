"""predict.py --serve：OpenAI 写法的 HTTP 服务（/v1/models、/v1/chat/completions），用本项目自己的模型与提示词格式。

适合别的引擎载入不了的 P-Tuning 检查点、一个基座上的几个适配器，以及导出之前的试用；部署见 docs/serving.md。
"""

import asyncio
import hmac
import json
import math
import re
import signal
import socket
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import torch

from finetune.data.prompting import encode_prompt
from finetune.inference.batcher import Batcher, Chunk, Job, QueueFull, TokenChoice
from finetune.inference.options import DEFAULT_ADDRESS
from finetune.inference.predictor import Predictor, short_names
from finetune.terminal import note

LOOPBACK = ("127.0.0.1", "::1")
MAX_BODY_BYTES = 2**20
MAX_WAITING = 256
BODY_SECONDS = 30
SHUTDOWN_SECONDS = 300
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def bind(address: str) -> socket.socket:
    """占住 HOST:PORT（只写 PORT 是本机的 127.0.0.1，端口 0 由系统选）；写法不对或占不了时抛 ValueError。

    这里就 listen：带 SO_REUSEADDR 只 bind 的端口，另一个进程还能占。
    """
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) < 2**16):
        raise ValueError(f"--serve({address}) 写法不对，应为 主机:端口，例如 {DEFAULT_ADDRESS}")
    host = host.strip("[]") or LOOPBACK[0]
    try:
        family, kind, *_, place = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    except UnicodeError as error:  # 空的或太长的一段，如 a..b
        raise ValueError(f"--serve({address}) 的主机名写法不对，应为 主机:端口，例如 {DEFAULT_ADDRESS}") from error
    except OSError as error:
        raise ValueError(f"--serve({address}) 占不了：{error.strerror}，请检查主机名") from error
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen()
    except OSError as error:
        listener.close()
        raise ValueError(f"--serve({address}) 占不了：{error.strerror}，请换一个端口，或检查主机名") from error
    return listener


# ---------------------------------------------------------------------------------------------------------------------
# 请求


def printable(text: str) -> str:
    """请求里的文字可能有不成对的代理码位，写不成 UTF-8：换成问号。"""
    return text.encode(errors="replace").decode()


class Refused(Exception):
    """不接受的请求：HTTP 状态、说明，以及出错的字段。"""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, printable(message), code
        self.param = None if param is None else printable(param)

    def body(self) -> dict[str, Any]:
        """OpenAI 写法的错误。"""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ChatRequest(NamedTuple):
    """核对过的 /v1/chat/completions 请求。"""

    model: str
    messages: list[tuple[str, str]]
    max_tokens: int | None
    is_streamed: bool
    with_usage: bool  # 流式时最后另送一段用量
    options: dict[str, Any]  # batcher.Job 的同名字段


def _is_int(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(low: float, high: float) -> Callable[[Any], bool]:
    # NaN 与无穷不在任何范围里；再大的整数也能比较，而不能变成 float
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and len(texts) <= 16 and all(isinstance(t, str) and 0 < len(t) <= 256 for t in texts)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


# 字段 → (取值对不对, 要求)；值为 null 的字段等于没写
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, str), "应为字符串，可用的见 /v1/models"),
    "messages": (lambda value: isinstance(value, list) and value, "应为不空的数组，每项是 {role, content}"),
    "max_tokens": (_is_int(1, math.inf), "应为正整数"),
    "max_completion_tokens": (_is_int(1, math.inf), "应为正整数"),
    "temperature": (_is_number(0, 2), "应在 0 到 2 之间，0 是贪心"),
    "top_p": (lambda value: _is_number(0, 1)(value) and value > 0, "应大于 0，至多 1"),
    "top_k": (_is_int(0, 2**31), "应为不小于 0 的整数，0 为不限"),
    "repetition_penalty": (_is_number(0.1, 10), "应在 0.1 到 10 之间，1 为没有惩罚"),
    "seed": (_is_int(-(2**63), 2**63 - 1), "应为 64 位整数"),
    "stop": (_is_stop, "应为字符串，或至多 16 个字符串的数组，每个 1 到 256 字"),
    "stream": (_is_bool, "应为 true 或 false"),
    "stream_options": (
        lambda value: value == {} or (value in ({"include_usage": True}, {"include_usage": False})),
        '应为 {"include_usage": true 或 false}',
    ),
    "logprobs": (_is_bool, "应为 true 或 false"),
    "top_logprobs": (_is_int(0, 20), "应为 0 到 20 的整数"),
    "user": (lambda value: isinstance(value, str), "应为字符串"),
    # 下面几项只接受没有作用的取值
    "n": (_is_int(1, 1), "只支持 1"),
    "presence_penalty": (_is_number(0, 0), "只支持 0，可用 repetition_penalty"),
    "frequency_penalty": (_is_number(0, 0), "只支持 0，可用 repetition_penalty"),
    "logit_bias": (lambda value: value == {}, "不支持"),
    "response_format": (lambda value: value == {"type": "text"}, '只支持 {"type": "text"}'),
}  # fmt: skip


def read_request(body: Any) -> ChatRequest:
    """JSON 值 → 请求；不合要求时抛 Refused，说明字段与要求。"""
    if not isinstance(body, dict):
        raise Refused(400, "请求体应为 JSON 对象")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name not in FIELDS:
            raise Refused(400, f"不支持字段 {name[:64]}，请去掉；可用：{'、'.join(FIELDS)}", name[:64])
        is_valid, requirement = FIELDS[name]
        if not is_valid(value):
            raise Refused(400, f"{name} {requirement}", name)
    for name in ("model", "messages"):
        if name not in given:
            raise Refused(400, f"缺少 {name}：{FIELDS[name][1]}", name)
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise Refused(400, "max_tokens 与 max_completion_tokens 是同一件事，请只写一个", "max_tokens")
    if "top_logprobs" in given and not given.get("logprobs"):
        raise Refused(400, "top_logprobs 需要同时写 logprobs: true", "top_logprobs")
    if "stream_options" in given and not given.get("stream"):
        raise Refused(400, "stream_options 只用于 stream: true", "stream_options")
    for name in ("temperature", "top_p", "repetition_penalty"):
        if name in given:
            given[name] = float(given[name])
    temperature = given.get("temperature", 0.0)
    for name in ("top_p", "top_k"):
        if temperature == 0 and given.get(name, 1) not in (0, 1):
            raise Refused(400, f"{name} 在贪心生成时不起作用，请加上大于 0 的 temperature 或去掉它", name)
    stop = given.get("stop", [])
    options = {
        "stops": (stop,) if isinstance(stop, str) else tuple(stop),
        "temperature": temperature,
        "top_logprobs": given.get("top_logprobs", 0) if given.get("logprobs") else None,
        "is_streamed": given.get("stream", False),
        **{name: given[name] for name in ("top_p", "top_k", "repetition_penalty", "seed") if name in given},
    }
    return ChatRequest(
        model=given["model"],
        messages=[read_message(message, f"messages[{index}]") for index, message in enumerate(given["messages"])],
        max_tokens=given.get("max_tokens", given.get("max_completion_tokens")),
        is_streamed=given.get("stream", False),
        with_usage=given.get("stream_options", {}).get("include_usage", False),
        options=options,
    )


def read_message(message: Any, place: str) -> tuple[str, str]:
    """一条消息 → (role, 文字)；content 是字符串，或 {"type": "text", "text": …} 的数组。"""
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise Refused(400, f"{place} 应为 {{role, content}}", place)
    refuse_other_fields(message, ("role", "content"), place)
    content = message["content"]
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise Refused(400, f"{place}.content 只支持文字", place)
        for index, part in enumerate(content):
            refuse_other_fields(part, ("type", "text"), f"{place}.content[{index}]")
        texts = [part.get("text") for part in content]
    else:
        texts = [content]
    if not all(isinstance(text, str) for text in texts):
        raise Refused(400, f"{place}.content 应为字符串", place)
    text = "".join(texts)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(400, f"{place}.content 里有不成对的代理码位，不是合法的文字", place) from None
    if message["role"] not in ("system", "user", "assistant"):
        raise Refused(400, f"{place}.role 应为 system、user、assistant", place)
    return message["role"], text


def refuse_other_fields(given: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    """有别的、不是 null 的字段时抛 Refused。"""
    for name, value in given.items():
        if name not in known and value is not None:
            name = name[:64]
            raise Refused(400, f"{place} 不支持字段 {name}，请去掉；可用：{'、'.join(known)}", f"{place}.{name}")


# ---------------------------------------------------------------------------------------------------------------------
# 回答


class Service:
    """一个已载入的 Predictor：核对请求、编码、排队，把各段回答写成 OpenAI 的样子。

    names：模型名（目录名）→ 适配器的名字，None 是检查点本身。
    """

    def __init__(self, predictor: Predictor) -> None:
        paths = [predictor.base.path, *(adapter.path for adapter in predictor.adapters.values())]
        self.names: dict[str, str | None] = dict(zip(short_names(paths), (None, *predictor.adapters), strict=True))
        self.predictor, self.created = predictor, int(time.time())
        self.batcher = Batcher(predictor, predictor.args.batch_size, MAX_WAITING)

    def models(self) -> list[dict[str, Any]]:
        """/v1/models 的各项。"""
        return [{"id": name, "object": "model", "created": self.created, "owned_by": "local"} for name in self.names]

    def encode(self, request: ChatRequest) -> tuple[list[int], int]:
        """请求 → (提示词 id, 最多生成的 token 数)；模型名不对、对话不合格式、放不下时抛 Refused。"""
        if request.model not in self.names:
            known = "、".join(self.names)
            raise Refused(404, f"没有模型 {request.model[:64]}，可用：{known}", "model", "model_not_found")
        adapter = self.names[request.model]
        checkpoint = self.predictor.base if adapter is None else self.predictor.adapters[adapter]
        prompting = checkpoint.prompting
        is_v1_chat = (prompting.prompt_format, prompting.family) == ("chat", "baichuan")
        if is_v1_chat and request.messages[0][0] == "assistant":
            # 提示里没有它的位置，encode_prompt 照官方的代码略去它
            raise Refused(400, "Baichuan-13B-Chat（v1）的对话要以 user 开头，请去掉它之前的 assistant 消息", "messages")
        try:
            prompt = encode_prompt(self.predictor.tokenizer, request.messages, **prompting._asdict())
        except ValueError as error:
            raise Refused(400, str(error), "messages") from error
        if not prompt:
            raise Refused(400, "messages 是空的文字，请至少写一个字", "messages")
        room = checkpoint.context_length - len(prompt)
        wanted = request.max_tokens or max(1, min(self.predictor.args.max_new_tokens, room))
        if wanted > room:
            raise Refused(
                400,
                f"提示词 {len(prompt)} 个 token 加上 max_tokens({wanted}) 超过了上下文长度 "
                f"{checkpoint.context_length}，请缩短对话或调小 max_tokens",
                "messages",
                "context_length_exceeded",
            )
        return prompt, wanted

    def submit(self, request: ChatRequest, prompt: list[int], max_new_tokens: int) -> tuple[Job, asyncio.Queue]:
        """排队；返回请求与它的各段。等待的已满时抛 Refused。"""
        loop, chunks = asyncio.get_running_loop(), asyncio.Queue()

        def send(chunk: Chunk) -> None:
            if not loop.is_closed():  # 没有等它做完就停下的服务
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        adapter = self.names[request.model]
        checkpoint = self.predictor.base if adapter is None else self.predictor.adapters[adapter]
        job = Job(adapter, prompt, max_new_tokens, send, **request.options)
        job.stops += checkpoint.prompting.stops
        try:
            self.batcher.submit(job)
        except QueueFull:
            raise Refused(429, f"等待的请求已有 {MAX_WAITING} 个，请稍后再试", code="queue_full") from None
        return job, chunks

    # ---- 写成 OpenAI 的样子 ----

    def token_entry(self, token: int, log_prob: float) -> dict[str, Any]:
        """一个 token 的文字、字节与对数概率。"""
        content = token_bytes(self.predictor.tokenizer, token)
        return {"token": content.decode(errors="replace"), "logprob": log_prob, "bytes": list(content)}

    def logprobs(self, choices: list[TokenChoice]) -> dict[str, Any]:
        """choices[0].logprobs。"""
        content = [
            {
                **self.token_entry(choice.token, choice.log_prob),
                "top_logprobs": [self.token_entry(*alternative) for alternative in choice.alternatives],
            }
            for choice in choices
        ]
        return {"content": content, "refusal": None}


def token_bytes(tokenizer, token: int) -> bytes:
    """一个 token 的字节：字节回退的片段是那个字节，▁ 是空格。"""
    piece = tokenizer.convert_ids_to_tokens(token)
    if match := BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()


def usage(num_prompt: int, num_generated: int) -> dict[str, int]:
    """用量；completion_tokens 不含 eos。"""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }


def raise_failed(chunk: Chunk) -> None:
    """最后一段是错误时抛 Refused。"""
    if chunk.error is None:
        return
    note(f"错误：生成失败：\n{''.join(traceback.format_exception(chunk.error))}")
    if isinstance(chunk.error, torch.OutOfMemoryError):
        remedy = "请缩短对话、调小 max_tokens，或以更小的 --batch_size 重开服务"
        raise Refused(503, f"显存不够，{remedy}", code="out_of_memory")
    raise Refused(500, f"生成失败（{type(chunk.error).__name__}），详情见服务的输出", code="generation_failed")


# ---------------------------------------------------------------------------------------------------------------------
# HTTP


def make_app(service: Service, api_key: str | None):
    """starlette 的应用。"""
    import anyio
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1", "replace")
        if api_key is not None and not hmac.compare_digest(given, f"Bearer {api_key}".encode()):
            raise Refused(401, "Authorization 应为 Bearer 加上 --api_key 的值", code="invalid_api_key")

    async def read_json_body(request: Request) -> Any:
        # 网页里的脚本不经浏览器预检就发不出这种类型，也就用不了本机的服务
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "Content-Type 应为 application/json")
        content = b""
        try:
            with anyio.fail_after(BODY_SECONDS):
                async for part in request.stream():
                    content += part
                    if len(content) > MAX_BODY_BYTES:
                        raise Refused(413, f"请求体超过 {MAX_BODY_BYTES} 字节")
        except TimeoutError:
            raise Refused(408, f"请求体在 {BODY_SECONDS} 秒内没有送完") from None
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"请求体不是合法的 JSON：{str(error)[:200]}") from error

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", **service.batcher.counts()})

    async def list_models(request: Request) -> Response:
        check_key(request)
        return JSONResponse({"object": "list", "data": service.models()})

    async def one_model(request: Request) -> Response:
        check_key(request)
        found = [model for model in service.models() if model["id"] == request.path_params["name"]]
        if not found:
            raise Refused(404, f"没有模型 {request.path_params['name'][:64]}", "model", "model_not_found")
        return JSONResponse(found[0])

    async def chat_completions(request: Request) -> Response:
        check_key(request)
        asked = read_request(await read_json_body(request))
        prompt, max_new_tokens = await run_in_threadpool(service.encode, asked)
        job, chunks = service.submit(asked, prompt, max_new_tokens)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        if asked.is_streamed:
            stream = stream_events(head, asked, job, chunks)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        gone = asyncio.ensure_future(request.receive())  # 请求体读完之后只会等来断开
        done = asyncio.ensure_future(chunks.get())
        try:
            await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ClientDisconnect
            chunk = done.result()  # 不是流式的只有一段
        finally:
            job.is_cancelled = True
            gone.cancel()
            done.cancel()
        raise_failed(chunk)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": chunk.text, "refusal": None},
            "logprobs": None if job.top_logprobs is None else service.logprobs(chunk.choices),
            "finish_reason": chunk.finish_reason,
        }
        return JSONResponse(
            {**head, "object": "chat.completion", "choices": [choice], "usage": usage(len(prompt), chunk.num_tokens)}
        )

    async def stream_events(head: dict, asked: ChatRequest, job: Job, chunks: asyncio.Queue) -> AsyncIterator[str]:
        def event(choices: list, **extra: Any) -> str:
            content = {**head, "object": "chat.completion.chunk", "choices": choices, **extra}
            return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

        def choice(delta: dict, logprobs: dict | None = None, finish_reason: str | None = None) -> list:
            return [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]

        no_usage = {"usage": None} if asked.with_usage else {}
        try:
            yield event(choice({"role": "assistant", "content": ""}), **no_usage)
            while True:
                chunk = await chunks.get()
                raise_failed(chunk)
                logprobs = None if job.top_logprobs is None else service.logprobs(chunk.choices)
                if chunk.text or chunk.choices:
                    yield event(choice({"content": chunk.text}, logprobs), **no_usage)
                if chunk.finish_reason is not None:
                    break
            yield event(choice({}, None, chunk.finish_reason), **no_usage)
            if asked.with_usage:
                yield event([], usage=usage(len(job.prompt), chunk.num_tokens))
            yield "data: [DONE]\n\n"
        except Refused as refused:
            yield f"data: {json.dumps(refused.body(), ensure_ascii=False)}\n\n"
        finally:
            job.is_cancelled = True

    async def on_refused(request: Request, refused: Refused) -> Response:
        return JSONResponse(refused.body(), refused.status, {"Retry-After": "1"} if refused.status == 429 else None)

    async def on_http_error(request: Request, error: HTTPException) -> Response:
        refused = Refused(error.status_code, f"{request.method} {request.url.path[:128]}：{error.detail}")
        return JSONResponse(refused.body(), error.status_code, error.headers)

    async def on_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        ],
        exception_handlers={Refused: on_refused, HTTPException: on_http_error, ClientDisconnect: on_gone},
    )


def serve(predictor: Predictor, listener: socket.socket, api_key: str | None) -> None:
    """服务到收到 SIGTERM 或 Ctrl-C：不再收新的连接，至多再等 SHUTDOWN_SECONDS 秒，做完已收下的请求后返回。"""
    import uvicorn

    class Server(uvicorn.Server):
        """停下时数一数还没有答完的请求。"""

        num_unanswered = 0

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            self.num_unanswered = len(self.server_state.tasks)

    service = Service(predictor)
    host, port = listener.getsockname()[:2]
    if api_key is None and host not in LOOPBACK:
        note(f"注意：--serve 开在 {host}，没有 --api_key，能连到这里的人都能使用")
    config = uvicorn.Config(
        make_app(service, api_key),
        log_config=None,
        access_log=False,
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=75,
        limit_concurrency=2 * MAX_WAITING,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    note(
        f"服务在 http://{f'[{host}]' if ':' in host else host}:{port}/v1，模型 {'、'.join(service.names)}；Ctrl-C 停下"
    )
    # uvicorn 收尾之后把信号再发一次，这里接住，进程正常退出
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    server = Server(config)
    try:
        server.run(sockets=[listener])
    finally:
        service.batcher.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    left = server.num_unanswered
    note(f"服务已停下，{f'有 {left} 个收下的请求没有做完' if left else '收下的请求都已做完'}")
