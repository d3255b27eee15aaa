"""The engine's thread, connections of clients that do not read, and options that are refused at the start."""

from __future__ import annotations

import importlib.util
import queue
import socket
import sys
import threading

import pytest
import torch
import uvicorn

import reformer_dist
from reformer_dist.errors import ConfigError
from reformer_dist.inference.continuation import Prompt, encode_prompt, text_options
from reformer_dist.serving.__main__ import build_parser, run_server
from reformer_dist.serving.connection import connection_class
from reformer_dist.serving.engine import Engine, EngineStopped, Job
from reformer_dist.serving.metrics import Metrics


@pytest.fixture(scope="module")
def loaded(endless):
    return reformer_dist.load(endless)._loaded


def make_job(loaded, text: bytes = b"time", max_new_tokens: int = 5):
    steps = queue.Queue()
    options = text_options(max_new_tokens=max_new_tokens, temperature=0)
    return Job(encode_prompt(loaded, Prompt("prompt", text)), options, steps.put), steps


def test_a_text_that_fails_ends_alone(loaded):
    metrics = Metrics()
    engine = Engine(loaded, metrics, max_streams=4, max_queue=0)
    (good, steps), (bad, failure) = make_job(loaded), make_job(loaded)
    bad.prompt = torch.tensor([10_000])
    engine.start()
    engine.submit([bad, good])
    assert isinstance(failure.get(timeout=20), Exception)
    received = [steps.get(timeout=20) for _ in range(5)]
    assert received[-1][0].end is not None and good.texts is None
    assert 'texts_total{end="error"} 1' in metrics.render()
    engine.stop()
    with pytest.raises(EngineStopped):
        engine.submit([make_job(loaded)[0]])


def test_stopping_ends_unfinished_texts(loaded):
    engine = Engine(loaded, Metrics(), max_streams=1, max_queue=1)
    (running, steps), (waiting, unstarted) = make_job(loaded, max_new_tokens=10**6), make_job(loaded)
    engine.start()
    engine.submit([running, waiting])
    steps.get(timeout=20)
    engine.stop()
    assert isinstance(unstarted.get(timeout=1), EngineStopped) and not engine.is_alive
    while not isinstance(steps.get(timeout=1), EngineStopped):
        pass


def test_a_client_that_does_not_read_is_cut_off():
    """Beyond the buffers of its connection, of which the app knows nothing."""
    gone = threading.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(2**24), "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    options = {"lifespan": "off", "ws": "none", "log_config": None}
    server = uvicorn.Server(uvicorn.Config(app, http=connection_class(0.3), **options))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        with socket.create_connection(listener.getsockname()) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
            assert gone.wait(10)
        server.should_exit = True
        thread.join(10)


@pytest.mark.parametrize(
    ("word", "options", "key"),
    [
        ("--max-streams 0", ["--max-streams", "0"], None),
        ("--client-timeout nan", ["--client-timeout", "nan"], None),
        ("--port 70000", ["--port", "70000"], None),
        ("--host nowhere.invalid", ["--host", "nowhere.invalid"], None),
        ("--chat-template", ["--chat-template", "x"], None),
        ("REFORMER_API_KEY", [], ""),
        ("REFORMER_API_KEY", [], "a b"),
    ],
)
def test_options_that_are_refused(word, options, key, endless, monkeypatch):
    if key is not None:
        monkeypatch.setenv("REFORMER_API_KEY", key)
    with pytest.raises(ConfigError, match=word):
        run_server(build_parser().parse_args([str(endless), "--port", "0", *options]))


def test_a_port_in_use_and_a_missing_library_are_named(endless, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"--port {port}.*in use"):
            run_server(build_parser().parse_args([str(endless), "--port", port]))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        sys.modules[build_parser.__module__], "find_spec", lambda name: find(name) if name != "uvicorn" else None
    )
    with pytest.raises(ConfigError, match=r"reformer_dist\[serve\]"):
        run_server(build_parser().parse_args([str(endless)]))
