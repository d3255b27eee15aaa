"""Bodies of requests and answers in the protocol of OpenAI's API.

A field that is not implemented is refused by name, unless it has the value that changes nothing.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from reformer_dist.errors import ConfigError
from reformer_dist.inference.continuation import Prompt, TextEnd, TextOptions, text_options
from reformer_dist.serving.chat import ChatTemplate, prompt_of_chat

COMPLETION_TOKENS = 16  # of a completion that asks for no number, in the protocol
MAX_STOPS = 4
SEEDS = range(-(2**63), 2**63)
SHARED_FIELDS = ("model", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options")
EXTENSIONS = ("top_k", "repetition_penalty", "cached_prefix")
UNUSED_FIELDS = ("user",)
NEUTRAL: dict[str, list[Any]] = {
    "best_of": [1],
    "echo": [False],
    "frequency_penalty": [0, 0.0],
    "logit_bias": [{}],
    "logprobs": [False],
    "presence_penalty": [0, 0.0],
    "response_format": [{"type": "text"}],
    "store": [False],
    "suffix": [""],
    "tools": [[]],
}
"""Values of fields that are not implemented which ask for nothing."""
Value = TypeVar("Value")


class RequestError(Exception):
    """A request that is refused, with its HTTP status and the field that is wrong."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        return error_body(self.status, str(self), param=self.param, code=self.code)


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class RequestLimits:
    """Bounds of one request."""

    max_streams: int
    """Texts: prompts times n."""
    max_tokens: int
    """New tokens of each text."""


@dataclass(frozen=True)
class TextRequest:
    """What a body asks for."""

    prompts: list[Prompt]
    options: TextOptions
    is_chat: bool
    is_stream: bool
    includes_usage: bool
    prefix: Prompt | None
    """A beginning of all prompts whose state is kept."""

    @property
    def n_texts(self) -> int:
        return len(self.prompts) * self.options.samples


def parse_body(body: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises RequestError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number of JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise ValueError(f"a field occurs twice among {', '.join(sorted(fields))}")
        return fields

    try:
        document = json.loads(body, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise RequestError(400, f"the body is {_kind(document)}; it must be an object")
    return document


def parse_completion(document: dict[str, Any], model: str, limits: RequestLimits) -> TextRequest:
    """The request of a body of /v1/completions. Raises RequestError."""
    fields = _Fields(document, ("prompt",))
    fields.check_model(model)
    given = fields.required("prompt")
    texts = given if isinstance(given, list) else [given]
    if not texts:
        raise RequestError(400, "prompt=[]: must hold at least one text", param="prompt")
    if any(isinstance(text, int | list) for text in texts):
        requirement = "token ids are not taken; give the text, or a list of texts"
        raise RequestError(400, f"prompt: {requirement}", param="prompt")
    prompts = [_prompt(text, "prompt" if text is given else f"prompt[{i}]") for i, text in enumerate(texts)]
    max_tokens = fields.integer("max_tokens", min(COMPLETION_TOKENS, limits.max_tokens))
    return _request(fields, prompts, max_tokens, limits, is_chat=False)


def parse_chat(
    document: dict[str, Any], model: str, limits: RequestLimits, template: ChatTemplate | None
) -> TextRequest:
    """The request of a body of /v1/chat/completions. Raises RequestError."""
    fields = _Fields(document, ("messages", "max_completion_tokens"))
    fields.check_model(model)
    messages = fields.required("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, f"messages={_shown(messages)}: must be a list of messages", param="messages")
    try:
        text = prompt_of_chat([_message(message, i) for i, message in enumerate(messages)], template)
    except ConfigError as error:
        raise RequestError(400, str(error), param="messages") from error
    most = fields.integer("max_tokens", None), fields.integer("max_completion_tokens", None)
    if None not in most and most[0] != most[1]:
        problem = f"max_tokens={most[0]}: differs from max_completion_tokens={most[1]}; give one of them"
        raise RequestError(400, problem, param="max_tokens")
    max_tokens = next((number for number in most if number is not None), limits.max_tokens)
    return _request(fields, [_prompt(text, "messages")], max_tokens, limits, is_chat=True)


def _request(
    fields: _Fields, prompts: list[Prompt], max_tokens: int, limits: RequestLimits, *, is_chat: bool
) -> TextRequest:
    n_samples, stream = fields.integer("n", 1), fields.of_type("stream", bool, False)
    if max_tokens > limits.max_tokens:
        problem = f"max_tokens={max_tokens}: this server generates at most {limits.max_tokens} (--max-tokens)"
        raise RequestError(400, problem, param="max_tokens")
    n_texts = len(prompts) * n_samples
    if n_texts > limits.max_streams:
        problem = f"n={n_samples}: with {len(prompts)} prompts, {n_texts} texts are asked for; this server "
        raise RequestError(400, f"{problem}generates at most {limits.max_streams} (--max-streams)", param="n")
    seed = fields.integer("seed", secrets.randbits(32))
    if seed not in SEEDS:
        raise RequestError(400, f"seed={seed}: must be a 64-bit integer", param="seed")
    try:
        options = text_options(
            max_new_tokens=max_tokens,
            samples=n_samples,
            stop=_stops(fields),
            temperature=fields.number("temperature", 1.0),
            top_p=fields.number("top_p", 1.0),
            top_k=fields.integer("top_k", 0),
            repetition_penalty=fields.number("repetition_penalty", 1.0),
            seed=seed,
        )
    except ConfigError as error:
        raise _of_field(str(error)) from error
    prefix = _prefix(fields, prompts)
    return TextRequest(prompts, options, is_chat, stream, _includes_usage(fields, stream), prefix)


def _prefix(fields: _Fields, prompts: list[Prompt]) -> Prompt | None:
    name = "cached_prefix"
    given = fields.get(name)
    if given is None:
        return None
    prefix = _prompt(given, name)
    for prompt in prompts:
        if not prompt.text.startswith(prefix.text):
            problem = f"{name}: {prompt.name} does not begin with it; it must be the beginning of every prompt"
            raise RequestError(400, problem, param=name)
    return prefix


class _Fields:
    """The fields of a body; null is a field that is not given."""

    def __init__(self, document: dict[str, Any], own: Sequence[str]) -> None:
        """own: fields of this endpoint alone. Raises RequestError for a field that is not implemented."""
        known = (*own, *SHARED_FIELDS, *EXTENSIONS, *UNUSED_FIELDS)
        self._given = {name: value for name, value in document.items() if value is not None}
        for name, value in self._given.items():
            neutral = NEUTRAL.get(name, [])
            if name not in known and not any(type(value) is type(v) and value == v for v in neutral):
                requirement = "leave it out" + (f", or give {json.dumps(neutral[0])}" if neutral else "")
                problem = f"{name}: is not a field that this server implements; {requirement}"
                raise RequestError(400, problem, param=name, code="unsupported_field")

    def required(self, name: str) -> Any:
        if name not in self._given:
            raise RequestError(400, f"{name}: is missing; it must be given", param=name)
        return self._given[name]

    def check_model(self, model: str) -> None:
        given = self.required("model")
        if given != model:
            problem = f"model={_shown(given)}: is not served here; must be {model}"
            raise RequestError(404, problem, param="model", code="model_not_found")

    def get(self, name: str) -> Any:
        return self._given.get(name)

    def of_type(self, name: str, kind: type[Value], default: Value) -> Value:
        value = self._given.get(name, default)
        if type(value) is not kind:
            wanted = {bool: "true or false", dict: "an object"}[kind]
            raise RequestError(400, f"{name}={_shown(value)}: must be {wanted}", param=name)
        return value

    def integer(self, name: str, default: Any) -> Any:
        """An int, or the default."""
        value = self._given.get(name, default)
        if name in self._given and type(value) is not int:
            raise RequestError(400, f"{name}={_shown(value)}: must be an integer", param=name)
        return value

    def number(self, name: str, default: float) -> float:
        value = self._given.get(name, default)
        if type(value) not in (int, float):
            raise RequestError(400, f"{name}={_shown(value)}: must be a number", param=name)
        try:
            return float(value)
        except OverflowError:
            return float("inf")


def _stops(fields: _Fields) -> list[str]:
    given = fields.get("stop")
    stops = [] if given is None else given if isinstance(given, list) else [given]
    if len(stops) > MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        requirement = f"must be a text that is not empty, or a list of at most {MAX_STOPS}"
        raise RequestError(400, f"stop={_shown(given)}: {requirement}", param="stop")
    return stops


def _includes_usage(fields: _Fields, stream: bool) -> bool:
    name = "stream_options"
    options: dict[str, Any] = fields.of_type(name, dict, {})
    if fields.get(name) is not None and not stream:
        raise RequestError(400, f"{name}: has no effect without stream=true; leave it out", param=name)
    for key in options.keys() - {"include_usage"}:
        raise RequestError(400, f"{name}.{key}: is not implemented; leave it out", param=name)
    includes = options.get("include_usage", False)
    if type(includes) is not bool:
        raise RequestError(400, f"{name}.include_usage={_shown(includes)}: must be true or false", param=name)
    return includes


def _prompt(text: Any, name: str) -> Prompt:
    param = name.partition("[")[0]
    if not isinstance(text, str):
        raise RequestError(400, f"{name}={_shown(text)}: must be a text", param=param)
    try:
        return Prompt(name, text.encode())
    except UnicodeEncodeError as error:
        raise RequestError(400, f"{name}: holds half of a surrogate pair; must be Unicode", param=param) from error


def _message(message: Any, index: int) -> tuple[str, str]:
    """(role, content) of a message."""
    name = f"messages[{index}]"
    if not isinstance(message, dict):
        raise RequestError(400, f"{name} is {_kind(message)}; it must be an object", param="messages")
    for field in message.keys() - {"role", "content"}:
        if message[field] not in (None, [], {}):
            raise RequestError(400, f"{name}.{field}: is not implemented; leave it out", param="messages")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, f"{name}.content") for part in content)
    for field, value in (("role", message.get("role")), ("content", content)):
        if not isinstance(value, str):
            raise RequestError(400, f"{name}.{field}={_shown(value)}: must be a text", param="messages")
    return message["role"], content  # type: ignore[return-value]


def _text_part(part: Any, name: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RequestError(400, f"{name}: has a part that is not a text; must be texts only", param="messages")


FIELDS_OF_OPTIONS = {"max-new-tokens": "max_tokens", "samples": "n"}


def _of_field(message: str) -> RequestError:
    """The refusal of an option of reformer-generate, `--top-p 2: ...`, in terms of its field."""
    option, _, problem = message.removeprefix("--").partition(": ")
    name, _, value = option.partition(" ")
    field = FIELDS_OF_OPTIONS.get(name, name.replace("-", "_"))
    return RequestError(400, f"{field}={value}: {problem}", param=field)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


class Answers:
    """Bodies of the answers to one request."""

    def __init__(self, request: TextRequest, model: str) -> None:
        self._is_chat = request.is_chat
        kind = "chat.completion" if request.is_chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._chunk_head = self._head | ({"object": "chat.completion.chunk"} if request.is_chat else {})

    def whole(self, texts: list[str], ends: list[TextEnd | None], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = []
        for index, (text, end) in enumerate(zip(texts, ends, strict=True)):
            message = {"role": "assistant", "content": text}
            content: dict[str, Any] = {"message": message} if self._is_chat else {"text": text}
            choices.append({"index": index, **content, "logprobs": None, "finish_reason": finish_reason(end)})
        return self._head | {"choices": choices, "usage": usage}

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """What begins the stream of a text, if anything does."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None) if self._is_chat else None

    def chunk(self, index: int, text: str, end: TextEnd | None) -> dict[str, Any]:
        content = {"delta": {"content": text} if text else {}} if self._is_chat else {"text": text}
        return self._chunk(index, content, end)

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._chunk_head | {"choices": [], "usage": usage}

    def _chunk(self, index: int, content: dict[str, Any], end: TextEnd | None) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish_reason(end)}
        return self._chunk_head | {"choices": [choice]}


def finish_reason(end: TextEnd | None) -> str | None:
    """In the protocol."""
    if end is None:
        return None
    return "stop" if end in (TextEnd.end_of_text, TextEnd.stop_string) else "length"


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
