"""One small trained run without a last position, and a server for it in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from support.launch import TESTS, run_ranks
from support.tiny import tiny_overrides

KEY = "a-key"


@dataclass
class Serving:
    process: subprocess.Popen[str]
    port: int

    @property
    def client(self) -> openai.OpenAI:
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60)

    def request(self, method: str, path: str, *, key: str | None = KEY, **options: object) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        headers |= options.pop("headers", {})  # type: ignore[arg-type]
        url = f"http://127.0.0.1:{self.port}{path}"
        return httpx.request(method, url, headers=headers, timeout=60, **options)  # type: ignore[arg-type]

    def metric(self, name: str) -> float:
        lines = self.request("GET", "/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"reformer_{name}"))


@contextmanager
def serving(run: Path, *options: object, key: str | None = KEY) -> Iterator[Serving]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    environment |= {} if key is None else {"REFORMER_API_KEY": key}
    command = [sys.executable, "-m", "reformer_dist.serving", str(run), "--port", "0", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith(f"serving {run.name} at http://127.0.0.1:")
            yield Serving(process, int(line.rpartition(":")[2].partition("/")[0]))
        finally:
            process.kill()


@pytest.fixture(scope="session")
def endless(tmp_path_factory, tiny_data) -> Path:
    """A run whose model has rotary positions, and so no last one; trained until its texts depend on prompts."""
    run = tmp_path_factory.mktemp("runs") / "endless"
    changed = ("model.position=rotary", "trainer.max_steps=60", "trainer.save_every=60")
    run_ranks("reformer_dist.train", 1, tiny_overrides(tiny_data, run, *changed), forked=True)
    return run


@pytest.fixture(scope="session")
def start(endless) -> Callable[..., object]:
    return lambda *options, **settings: serving(endless, *options, **settings)


@pytest.fixture(scope="module")
def server(start) -> Iterator[Serving]:
    limits = ("--max-streams", 3, "--max-queue", 2, "--max-tokens", 100_000, "--max-context", 90_000)
    with start(*limits, "--max-body", 100_000, "--client-timeout", 1) as running:
        yield running
