"""Fields of requests: what they mean, and which are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from reformer_dist.errors import ConfigError
from reformer_dist.generation import SamplingOptions
from reformer_dist.serving.chat import ChatTemplate
from reformer_dist.serving.protocol import (
    RequestError,
    RequestLimits,
    TextRequest,
    parse_body,
    parse_chat,
    parse_completion,
)

LIMITS = RequestLimits(max_streams=8, max_tokens=100)


def completion(**fields: Any) -> TextRequest:
    document = {"model": "m", "prompt": "x"} | fields
    return parse_completion(parse_body(json.dumps(document).encode()), "m", LIMITS)


def chat(messages: Any, template: ChatTemplate | None = None, **fields: Any) -> TextRequest:
    return parse_chat({"model": "m", "messages": messages} | fields, "m", LIMITS, template)


def test_defaults_are_those_of_the_protocol():
    request = completion()
    assert [prompt.text for prompt in request.prompts] == [b"x"]
    assert (request.options.max_new_tokens, request.options.samples, request.options.stop) == (16, 1, [])
    sampling = request.options.sampling
    assert sampling == SamplingOptions(temperature=1.0, top_p=1.0, seed=sampling.seed)
    assert completion().options.sampling.seed != sampling.seed
    assert chat([{"role": "user", "content": "x"}]).options.max_new_tokens == LIMITS.max_tokens


def test_fields_reach_the_options():
    request = completion(
        prompt=["a", "é"], max_tokens=9, temperature=0, top_p=0.5, n=3, stop="end", seed=4, stream=True, top_k=2
    )
    assert [prompt.text for prompt in request.prompts] == [b"a", "é".encode()]
    assert request.options.sampling == SamplingOptions(temperature=0.0, top_p=0.5, top_k=2, seed=4)
    assert (request.options.samples, request.options.stop, request.n_texts) == (3, ["end"], 6)
    assert request.is_stream and not request.includes_usage
    nothing = {"logprobs": None, "frequency_penalty": 0, "presence_penalty": 0.0, "best_of": 1, "user": "me"}
    assert completion(**nothing, stop=None, seed=1) == completion(seed=1)


@pytest.mark.parametrize(
    ("param", "word", "fields"),
    [
        ("model", "missing", {"model": None}),
        ("prompt", "missing", {"prompt": None}),
        ("prompt", "token ids", {"prompt": [1, 2]}),
        ("prompt", "token ids", {"prompt": [[1], [2]]}),
        ("prompt", "at least one", {"prompt": []}),
        ("prompt", r"prompt\[1\]=null", {"prompt": ["a", None]}),
        ("prompt", "surrogate", {"prompt": "\ud800"}),
        ("max_tokens", "--max-tokens", {"max_tokens": 101}),
        ("max_tokens", "max_tokens=0", {"max_tokens": 0}),
        ("max_tokens", "integer", {"max_tokens": 1.0}),
        ("temperature", "temperature=-1", {"temperature": -1}),
        ("temperature", "temperature=inf", {"temperature": 10**400}),
        ("temperature", "a number", {"temperature": "1"}),
        ("temperature", "a number", {"temperature": True}),
        ("top_p", "top_p=0", {"top_p": 0}),
        ("top_k", "top_k=-1", {"top_k": -1}),
        ("repetition_penalty", "repetition_penalty=0", {"repetition_penalty": 0}),
        ("n", "n=0", {"n": 0}),
        ("n", "9 texts", {"prompt": ["a", "b", "c"], "n": 3}),
        ("stop", "empty", {"stop": ["a", ""]}),
        ("stop", "at most 4", {"stop": ["a"] * 5}),
        ("seed", "64-bit", {"seed": 2**63}),
        ("stream", "true or false", {"stream": 1}),
        ("stream_options", "without stream", {"stream_options": {}}),
        ("stream_options", "include_all", {"stream": True, "stream_options": {"include_all": True}}),
        ("logprobs", "logprobs", {"logprobs": 0}),
        ("best_of", "or give 1", {"best_of": 2}),
        ("frequency_penalty", "or give 0", {"frequency_penalty": 0.5}),
        ("temprature", "temprature", {"temprature": 1}),
        ("messages", "messages", {"messages": []}),
        ("cached_prefix", r"prompt\[1\] does not begin", {"prompt": ["ab", "b"], "cached_prefix": "a"}),
        ("cached_prefix", "a text", {"cached_prefix": 1}),
    ],
)
def test_what_a_completion_refuses(param, word, fields):
    with pytest.raises(RequestError, match=word) as refused:
        completion(**fields)
    assert refused.value.param == param
    assert refused.value.body()["error"]["type"] == "invalid_request_error"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("word", "messages"),
    [
        ("--chat-template", [user("a"), user("b")]),
        ("of system, user.*--chat-template", [{"role": "system", "content": "a"}, user("b")]),
        ("must be a list", []),
        ("must be a list", "a"),
        (r"messages\[0\] is a text", ["a"]),
        (r"content=null", [user(None)]),
        (r"role=null", [{"content": "a"}]),
        (r"messages\[0\].tool_calls", [user("a") | {"tool_calls": [{}]}]),
        ("not a text", [user([{"type": "image_url"}])]),
    ],
)
def test_messages_that_are_refused(word, messages):
    with pytest.raises(RequestError, match=word) as refused:
        chat(messages)
    assert refused.value.param == "messages"


def test_one_message_of_a_user_is_the_prompt():
    assert chat([user("{role} x")]).prompts[0].text == b"{role} x"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat([user(parts)]).prompts[0].text == b"ab"
    with pytest.raises(RequestError, match="differs"):
        chat([user("a")], max_tokens=1, max_completion_tokens=2)


def test_a_template_makes_text_of_a_conversation():
    template = ChatTemplate("<{role}>{content}</>\n")
    messages = [user("{role}"), {"role": "assistant", "content": "{content}"}, user("c")]
    expected = "<user>{role}</>\n<assistant>{content}</>\n<user>c</>\n<assistant>"
    assert chat(messages, template).prompts[0].text.decode() == expected
    for text in ("{role}", "{content}{content}", "{role}{role}{content}", ""):
        with pytest.raises(ConfigError, match="--chat-template"):
            ChatTemplate(text)
