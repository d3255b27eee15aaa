"""reformer-serve as a process, asked by the client of OpenAI, and by clients that are slow, cut off or wrong."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import openai
import pytest

import reformer_dist

pytestmark = pytest.mark.jobs

GREEDY = {"temperature": 0, "max_tokens": 100_000}  # a text that goes on until it is cancelled
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "time water", "max_tokens": 60, "temperature": 0},
    {"prompt": "river", "max_tokens": 50, "temperature": 0.9, "top_p": 0.8, "seed": 3},
    {"prompt": "", "max_tokens": 40, "temperature": 1.0, "seed": 7, "n": 2},
    {"prompt": "stone " * 60, "max_tokens": 30, "seed": 1, "extra_body": {"top_k": 5, "repetition_penalty": 1.2}},
    {"prompt": "word", "max_tokens": 80, "seed": 2, "stop": ["e", "at"]},
]


@pytest.fixture(scope="module")
def library(endless):
    """What reformer-generate writes for the fields of a request, as a list of n texts."""
    model = reformer_dist.load(endless)

    def write(*, prompt: str, max_tokens: int, n: int = 1, extra_body: Any = None, **fields: Any) -> list[str]:
        options = {"temperature": 1.0, "top_p": 1.0} | fields | (extra_body or {})
        texts = model.generate([prompt], max_new_tokens=max_tokens, samples=n, **options)
        return texts[0] if n > 1 else texts

    return write


def wait_until(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)


def streamed(client: openai.OpenAI, **fields: Any) -> list[str]:
    texts = [""] * fields.get("n", 1)
    for chunk in client.completions.create(model="endless", stream=True, **fields):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    return texts


def whole(client: openai.OpenAI, **fields: Any) -> list[str]:
    return [choice.text for choice in client.completions.create(model="endless", **fields).choices]


@pytest.mark.parametrize("ask", [streamed, whole])
def test_texts_are_those_of_reformer_generate_whatever_runs_beside_them(server, library, ask):
    expected = [library(**request) for request in REQUESTS]
    assert len({text for texts in expected for text in texts}) == 6
    for order in (REQUESTS, REQUESTS[::-1]):
        with ThreadPoolExecutor(3) as pool:
            texts = list(pool.map(lambda request: ask(server.client, **request), order))
        assert texts == (expected if order is REQUESTS else expected[::-1])


def test_prompts_of_a_list_are_as_if_asked_for_one_by_one(server, library):
    fields = {"max_tokens": 20, "seed": 5}
    response = server.client.completions.create(model="endless", prompt=["time", "water and", "time"], **fields)
    expected = [library(prompt=prompt, **fields)[0] for prompt in ("time", "water and", "time")]
    assert [choice.text for choice in response.choices] == expected
    assert [choice.index for choice in response.choices] == [0, 1, 2]


def test_usage_and_what_ended_a_text(server, library):
    prompt = "time water"
    response = server.client.completions.create(model="endless", prompt=prompt, max_tokens=8, temperature=0)
    assert response.choices[0].finish_reason == "length"
    counted = response.usage.prompt_tokens, response.usage.completion_tokens, response.usage.total_tokens
    assert counted == (len(prompt) + 1, 8, len(prompt) + 9)
    [text] = library(prompt=prompt, max_tokens=8, temperature=0)
    stopped = server.client.completions.create(
        model="endless", prompt=prompt, max_tokens=8, temperature=0, stop=text[2:4]
    )
    assert stopped.choices[0].finish_reason == "stop" and stopped.choices[0].text == text[: text.index(text[2:4])]


def test_chat_streams_the_continuation_of_a_message(server, library):
    messages = [{"role": "user", "content": "time water"}]
    fields = {"temperature": 0, "max_completion_tokens": 20, "model": "endless", "messages": messages}
    [expected] = library(prompt="time water", max_tokens=20, temperature=0)
    answer = server.client.chat.completions.create(**fields)
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", expected)
    usage = {"stream_options": {"include_usage": True}}
    first, *chunks, last = server.client.chat.completions.create(stream=True, **usage, **fields)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length" and last.usage.completion_tokens == 20


def test_prompts_that_share_a_prefix_find_its_state(server, library):
    document = "stone water " * 20
    fields = {"max_tokens": 30, "temperature": 0}
    hits = server.metric("prefix_hits_total")
    for number, prompt in enumerate((document + "time", document + "river " * 5, document)):
        response = server.client.completions.create(
            model="endless", prompt=prompt, extra_body={"cached_prefix": document}, **fields
        )
        assert [choice.text for choice in response.choices] == library(prompt=prompt, **fields)
        cached = response.usage.prompt_tokens_details.cached_tokens
        assert cached == (len(document) + 1 if number else 0)
    assert server.metric("prefix_hits_total") == hits + 2 and server.metric("prefix_bytes") > 0


def test_refusals_reach_the_client_as_its_own_errors(server):
    create = server.client.completions.create
    with pytest.raises(openai.NotFoundError, match=r"model.*must be endless"):
        create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="logprobs") as refused:
        create(model="endless", prompt="x", logprobs=3)
    assert refused.value.param == "logprobs"
    with pytest.raises(openai.BadRequestError, match=r"90001 tokens.*90000.*--max-context") as refused:
        create(model="endless", prompt="x" * 90_000, max_tokens=1)
    assert refused.value.code == "context_length_exceeded"
    other = openai.OpenAI(base_url=server.client.base_url, api_key="another", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="REFORMER_API_KEY"):
        other.completions.create(model="endless", prompt="x")


def test_paths(server):
    health = server.request("GET", "/health", key=None)
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    assert server.request("GET", "/metrics", key=None).status_code == 401
    assert [model.id for model in server.client.models.list()] == ["endless"]
    assert server.request("GET", "/v1/completions").status_code == 405
    missing = server.request("GET", "/v1/embeddings")
    assert missing.status_code == 404 and "/v1/embeddings" in missing.json()["error"]["message"]
    assert 'requests_total{path="other",status="404"}' in server.request("GET", "/metrics").text


@pytest.mark.parametrize(
    ("status", "word", "body", "kind"),
    [
        (400, "not JSON", b'{"model": ', "application/json"),
        (400, "twice", b'{"model": "a", "model": "b"}', "application/json"),
        (400, "NaN", b'{"temperature": NaN}', "application/json"),
        (400, "not JSON", b"[" * 50_000, "application/json"),
        (400, "a list", b"[]", "application/json"),
        (400, "not JSON", b"\xff\xfe", "application/json"),
        (413, "--max-body", b"x" * 100_001, "application/json"),
        (415, "text/plain", b"{}", "text/plain"),
    ],
)
def test_bodies_that_are_refused(server, status, word, body, kind):
    headers = {"content-type": kind}
    response = server.request("POST", "/v1/completions", content=body, headers=headers)
    assert response.status_code == status and word in response.json()["error"]["message"]
    if status == 413:  # of unknown length
        parts = (body[i : i + 5000] for i in range(0, len(body), 5000))
        assert server.request("POST", "/v1/completions", content=parts, headers=headers).status_code == 413


def test_a_client_that_is_gone_cancels_its_texts(server):
    stream = server.client.completions.create(model="endless", prompt="a", stream=True, **GREEDY)
    next(iter(stream))
    wait_until(lambda: server.metric("streams") == 1)
    assert server.metric("state_bytes") > 0
    stream.close()
    wait_until(lambda: server.metric("streams") == 0)
    with suppress(openai.APITimeoutError):
        server.client.with_options(timeout=0.3).completions.create(model="endless", prompt="a", **GREEDY)
    wait_until(lambda: server.metric("streams") == 0)
    assert server.metric("state_bytes") == 0


def test_texts_wait_for_a_stream_and_are_turned_away_beyond_the_queue(server):
    def open_stream(n: int = 1) -> Any:
        fields = {"model": "endless", "prompt": "a", "stream": True, "n": n, **GREEDY}
        return server.client.completions.create(**fields)

    running = [open_stream(), open_stream(2)]
    wait_until(lambda: server.metric("streams") == 3)
    with ThreadPoolExecutor(1) as pool:
        short = {"prompt": "time", "max_tokens": 5, "temperature": 0, "n": 2}
        waiting = pool.submit(whole, server.client, **short)
        wait_until(lambda: server.metric("waiting") == 2)
        with pytest.raises(openai.RateLimitError, match="--max-queue 2") as refused:
            open_stream()
        assert refused.value.response.headers["retry-after"]
        running[0].close()
        time.sleep(0.1)
        assert not waiting.done()  # it needs two streams
        running[1].close()
        assert len(waiting.result(20)) == 2
    with pytest.raises(openai.BadRequestError, match="--max-streams"):
        open_stream(4)


def test_clients_that_send_slowly_are_cut_off(server):
    body = b'{"model": "endless", "prompt": "a", "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: here\r\nauthorization: Bearer a-key\r\n"
    head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    for sent, answer in ((head[:40], b""), (b"", b""), (head + body[:9], b" 408 "), (b"\0\1\2\r\n\r\n", b" 400 ")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(sent)
            received = b""
            with suppress(ConnectionResetError):
                while part := connection.recv(10_000):
                    received += part
            assert answer in received.partition(b"\r\n")[0]
            assert bool(received) == bool(answer)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for part in (head[:40], head[40:] + body[:9], body[9:]):  # slow, but not too slow
            connection.sendall(part)
            time.sleep(0.3)
        assert b" 200 " in connection.recv(10_000)
    for sent in (head[:40], head + body[:9]):  # cut
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(sent)
    assert whole(server.client, prompt="time", max_tokens=1)


def test_a_signal_ends_the_server_when_its_texts_have_ended(start, library):
    with start("--chat-template", "{role}: {content}\n", key=None) as server:
        messages = [{"role": role, "content": f"{role} says"} for role in ("system", "user")]
        fields = {"model": "endless", "messages": messages, "temperature": 0, "max_tokens": 300}
        stream = server.client.chat.completions.create(stream=True, **fields)
        first = next(iter(stream))
        server.process.terminate()
        chunks = [first, *stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        prompt = "system: system says\nuser: user says\nassistant: "
        assert [text] == library(prompt=prompt, max_tokens=300, temperature=0)
        assert server.process.wait(20) == 0
        with pytest.raises(openai.APIConnectionError):
            server.client.models.list()
