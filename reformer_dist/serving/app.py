"""Routes of the server: from an HTTP request to jobs of the engine, and from their tokens to the answer."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from reformer_dist.errors import ConfigError, UserError
from reformer_dist.inference.continuation import TextEnd, TextStep, encode_prompt
from reformer_dist.inference.prefixes import check_prefixes, common_length
from reformer_dist.run.pretrained import LoadedModel
from reformer_dist.serving.chat import ChatTemplate
from reformer_dist.serving.engine import Engine, EngineBusy, EngineStopped, Job
from reformer_dist.serving.metrics import Metrics
from reformer_dist.serving.protocol import (
    Answers,
    RequestError,
    RequestLimits,
    TextRequest,
    error_body,
    parse_body,
    parse_chat,
    parse_completion,
    usage,
)

HEALTH, METRICS, MODELS = "/health", "/metrics", "/v1/models"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PATHS = (HEALTH, METRICS, MODELS, COMPLETIONS, CHAT)
RETRY_SECONDS = 1  # after which a client that was turned away may ask again
EVENT_STREAM = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}


@dataclass(frozen=True)
class ServerOptions:
    """What a server accepts."""

    limits: RequestLimits
    max_context: int
    """Tokens of a prompt and of the text that continues it."""
    max_body: int
    """Bytes."""
    client_timeout: float
    """Seconds for the body of a request."""
    api_key: str | None
    chat_template: ChatTemplate | None


class Server:
    """The app, and what its routes share."""

    def __init__(self, loaded: LoadedModel, name: str, engine: Engine, metrics: Metrics, options: ServerOptions):
        """name: of the model, in requests."""
        self._loaded, self._name, self._engine, self._metrics = loaded, name, engine, metrics
        self._options, self._started = options, int(time.time())
        routes = [
            Route(HEALTH, self._health),
            Route(METRICS, self._show_metrics),
            Route(MODELS, self._models),
            Route(COMPLETIONS, self._completions, methods=["POST"]),
            Route(CHAT, self._chat, methods=["POST"]),
        ]
        refused: dict[Any, Any] = {RequestError: _refuse, 404: _no_route, 405: _no_route}
        self.app: ASGIApp = _Gate(Starlette(routes=routes, exception_handlers=refused), options.api_key, metrics)

    async def _health(self, request: Request) -> Response:
        if not self._engine.is_alive:
            return JSONResponse({"status": "the engine has ended"}, status_code=503)
        return JSONResponse({"status": "ok", "model": self._name})

    async def _show_metrics(self, request: Request) -> Response:
        return PlainTextResponse(self._metrics.render(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        entry = {"id": self._name, "object": "model", "created": self._started, "owned_by": "reformer_dist"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def _completions(self, request: Request) -> Response:
        document = parse_body(await self._read(request))
        return await self._begin(parse_completion(document, self._name, self._options.limits))

    async def _chat(self, request: Request) -> Response:
        document = parse_body(await self._read(request))
        options = self._options
        return await self._begin(parse_chat(document, self._name, options.limits, options.chat_template))

    async def _read(self, request: Request) -> bytes:
        """The body. Raises RequestError."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a page in a browser can't send without asking first
            raise RequestError(415, f"content-type {kind or 'missing'}: must be application/json")
        most, body = self._options.max_body, bytearray()
        too_large = RequestError(413, f"the body has more than {most} bytes (--max-body)")
        if int(request.headers.get("content-length", "0")) > most:
            raise too_large

        async def read() -> None:
            async for part in request.stream():
                body.extend(part)
                if len(body) > most:
                    raise too_large

        try:
            await asyncio.wait_for(read(), self._options.client_timeout)
        except asyncio.TimeoutError as error:
            waited = f"{self._options.client_timeout:g} s (--client-timeout)"
            raise RequestError(408, f"the body is not complete after {waited}") from error
        except ClientDisconnect as error:
            raise RequestError(400, "the body is not complete, and the client is gone") from error
        return bytes(body)

    async def _begin(self, request: TextRequest) -> Response:
        """Queues the jobs of a request. Raises RequestError."""
        prompts, prefix_lengths = await asyncio.to_thread(self._encode, request)
        texts = _Texts(request, prompts, prefix_lengths, self._options.max_context)
        try:
            self._engine.submit(texts.jobs)
        except EngineBusy as error:
            raise RequestError(429, str(error), code="server_busy") from error
        except EngineStopped as error:
            raise RequestError(503, str(error)) from error
        return _TextResponse(request, texts, Answers(request, self._name))

    def _encode(self, request: TextRequest) -> tuple[list[Tensor], list[int]]:
        """Token ids [S] of the prompts, and the lengths of their prefixes. Raises RequestError."""
        try:
            prompts = [encode_prompt(self._loaded, prompt) for prompt in request.prompts]
            prefix = None if request.prefix is None else encode_prompt(self._loaded, request.prefix)
        except ConfigError as error:
            field = request.prompts[0].name.partition("[")[0]
            raise RequestError(400, str(error), param=field, code="context_length_exceeded") from error
        if prefix is None:
            return prompts, [0] * len(prompts)
        try:
            check_prefixes(self._loaded)
        except ConfigError as error:
            raise RequestError(400, f"cached_prefix: {error}", param="cached_prefix") from error
        return prompts, [common_length(prompt, prefix) for prompt in prompts]


class _Texts:
    """The jobs of a request, and their steps as they arrive; text i * n + j is text j of prompt i."""

    def __init__(
        self, request: TextRequest, prompts: list[Tensor], prefix_lengths: list[int], max_context: int
    ) -> None:
        self._queue: asyncio.Queue[tuple[int, list[TextStep] | Exception]] = asyncio.Queue()
        self._loop, self._n_samples = asyncio.get_running_loop(), request.options.samples
        self.jobs = [self._job(request, i, prompt, max_context) for i, prompt in enumerate(prompts)]
        for job, n_prefix in zip(self.jobs, prefix_lengths, strict=True):
            job.n_prefix = n_prefix
        self.n_texts = request.n_texts
        self.n_prompt_tokens = sum(prompt.numel() for prompt in prompts)
        self.n_new_tokens = 0

    def _job(self, request: TextRequest, index: int, prompt: Tensor, max_context: int) -> Job:
        room = max_context - prompt.numel()
        if room < 1:
            name, length = request.prompts[index].name, prompt.numel()
            problem = (
                f"{name}: has {length} tokens with those around it, and this server takes texts of {max_context}"
            )
            field = name.partition("[")[0]
            raise RequestError(400, f"{problem} (--max-context)", param=field, code="context_length_exceeded")
        options = request.options
        options = replace(options, max_new_tokens=min(options.max_new_tokens, room))

        def receive(steps: list[TextStep] | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits for it
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, steps))

        return Job(prompt, options, receive)

    def cancel(self) -> None:
        for job in self.jobs:
            job.is_cancelled = True

    async def __aiter__(self) -> AsyncIterator[tuple[int, TextStep]]:
        """Steps with the index of their text, until all have ended. Raises what ended a job."""
        n_left = self.n_texts
        while n_left:
            prompt, steps = await self._queue.get()
            if isinstance(steps, Exception):
                raise steps
            for step in steps:
                self.n_new_tokens += 1
                n_left -= step.end is not None
                yield prompt * self._n_samples + step.row, step

    def usage(self) -> dict[str, Any]:
        return usage(self.n_prompt_tokens, self.n_new_tokens, sum(job.n_cached for job in self.jobs))


class _TextResponse(Response):
    """Sends the texts of a request, whole or as server-sent events. Cancels them when the client is gone."""

    def __init__(self, request: TextRequest, texts: _Texts, answers: Answers) -> None:
        super().__init__()
        self._request, self._texts, self._answers = request, texts, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = asyncio.ensure_future(self._stream(send) if self._request.is_stream else self._send(scope, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            self._texts.cancel()
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)

    async def _send(self, scope: Scope, send: Send) -> None:
        texts = [""] * self._texts.n_texts
        ends: list[TextEnd | None] = [None] * self._texts.n_texts
        try:
            async for index, step in self._texts:
                texts[index] += step.text
                ends[index] = step.end
        except Exception as error:
            status, body = _failure(error)
            response = JSONResponse(body, status_code=status)
        else:
            response = JSONResponse(self._answers.whole(texts, ends, self._texts.usage()))
        await response(scope, _nothing, send)

    async def _stream(self, send: Send) -> None:
        async def write(document: dict[str, Any] | str, *, is_last: bool = False) -> None:
            data = document if isinstance(document, str) else json.dumps(document, separators=(",", ":"))
            await send(
                {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": not is_last}
            )

        headers = [(name.encode(), value.encode()) for name, value in EVENT_STREAM.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for index in range(self._texts.n_texts):
            first = self._answers.first_chunk(index)
            if first is not None:
                await write(first)
        try:
            async for index, step in self._texts:
                if step.text or step.end is not None:
                    await write(self._answers.chunk(index, step.text, step.end))
        except Exception as error:
            await write(_failure(error)[1], is_last=True)
            return
        if self._request.includes_usage:
            await write(self._answers.usage_chunk(self._texts.usage()))
        await write("[DONE]", is_last=True)


class _Gate:
    """Asks for the key, except at /health, and counts answers."""

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count("requests_total", path=path, status=str(message["status"]))
            await send(message)

        given = dict(scope["headers"]).get(b"authorization", b"")
        if self._key is not None and path != HEALTH and not hmac.compare_digest(given, self._key):
            body = error_body(401, "authorization: must be Bearer and the key of REFORMER_API_KEY of this server")
            response = JSONResponse(body, status_code=401, headers={"www-authenticate": "Bearer"})
            await response(scope, receive, counted)
            return
        await self._app(scope, receive, counted)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _failure(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for an error of the engine, whose details are for its log unless it is a user's."""
    if isinstance(error, EngineStopped):
        return 503, error_body(503, str(error))
    return 500, error_body(500, str(error) if isinstance(error, UserError) else "the text failed; see the log")


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"connection": "close"} if error.status in (408, 413, 415) else {}
    if error.status == 429:
        headers["retry-after"] = str(RETRY_SECONDS)
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _no_route(request: Request, error: Exception) -> Response:
    status: int = getattr(error, "status_code", 404)
    problem = "no such path" if status == 404 else f"{request.method} is not answered here"
    return JSONResponse(error_body(status, f"{request.url.path}: {problem}"), status_code=status)
