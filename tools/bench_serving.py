#!/usr/bin/env python3
"""Time to first token, rate and memory of reformer-serve, by number of streams and context.

A row STREAMSxCONTEXT asks a server for that many texts at once, of different prompts of CONTEXT tokens. Each must
be what reformer-generate gives for its prompt and seed; otherwise no speed is shown, and the tool exits with 1.
With --shared, the prompts of a row are one document, which `cached_prefix` names, and different ends; their texts
must be those that the state of the document gives in this process.

The model is random, of bytes, with alternating local and LSH layers. Its head is scaled so that texts depend on
prompts; the tool fails if they don't.

first token: median and last of the streams, from the request; tokens/s: of all streams together, after the first
tokens; ms/token: of one stream; state: memory of the decoding state of a stream; peak RSS: of the server, which
has about 0.3 GiB before the first request.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reformer_dist  # before torch, whose threads it keeps from spinning

# isort: split
import psutil
import torch
from safetensors.torch import save_file

from reformer_dist.checkpoint import RunRecord
from reformer_dist.checkpoint.export import CONFIG_FILE, WEIGHTS_FILE
from reformer_dist.config import RunConfig
from reformer_dist.data import ByteTokenizer
from reformer_dist.inference.continuation import Prompt, SampledTexts, encode_prompt, text_options
from reformer_dist.inference.prefixes import PrefixState, read_prefix
from reformer_dist.run.compose import run_config_from, to_dict
from reformer_dist.run.pretrained import LoadedModel
from reformer_dist.tasks import make_task

MIB = 2**20
HEAD_SCALE = 20.0
END_TOKENS = 16  # of a prompt after the document that it shares


@dataclass(frozen=True)
class ServingCase:
    """A row: streams at a time, each with a prompt of a number of tokens."""

    streams: int
    context: int

    @classmethod
    def read(cls, text: str) -> ServingCase:
        streams, _, context = text.partition("x")
        return cls(int(streams), int(context))


@dataclass(frozen=True)
class StreamedText:
    text: str
    n_tokens: int
    first: float
    """Seconds from the request to its first text."""
    begun: float
    ended: float


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(arguments, model)
        for case in arguments.rows:
            rows.append(run_row(arguments, case, model))
            if arguments.json:
                print(json.dumps(rows[-1]), flush=True)
    if not arguments.json:
        print_table(rows)
    return 0 if all(row["correct"] for row in rows) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    rows = [ServingCase(1, 1024), ServingCase(8, 1024)]
    name = "STREAMSxCONTEXT"
    add("--rows", type=ServingCase.read, nargs="+", default=rows, metavar=name, help="default: 1x1024 8x1024")
    add("--shared", action="store_true", help="the prompts of a row share all but their last 16 tokens")
    add("--tokens", type=int, default=128, help="new tokens of a text (default: 128)")
    add("--dim", type=int, default=256, help="default: 256")
    add("--layers", type=int, default=4, help="default: 4")
    add("--heads", type=int, default=4, help="default: 4")
    add("--n-hashes", type=int, default=4, help="default: 4")
    add("--window", type=int, default=64, help="of LSH and local layers (default: 64)")
    add("--n-buckets", type=int, default=64, help="default: 64")
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--json", action="store_true", help="print one JSON object per row instead of the table")
    return parser.parse_args()


def write_model(arguments: argparse.Namespace, folder: Path) -> None:
    """An export of a random model."""
    sizes = {"dim": arguments.dim, "n_layers": arguments.layers, "n_heads": arguments.heads}
    sizes |= {"n_hashes": arguments.n_hashes, "n_buckets": arguments.n_buckets, "window": arguments.window}
    given = {**sizes, "local_window": arguments.window, "layers": "[local,lsh]", "position": "rotary"}
    config = run_config_from(to_dict(RunConfig()), [f"model.{key}={value}" for key, value in given.items()])
    tokenizer = ByteTokenizer()
    model = make_task(config, tokenizer, []).build_model()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name in weights:
        if name.startswith("head."):
            weights[name] *= HEAD_SCALE
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    record = RunRecord(to_dict(config), tokenizer.save(folder), tokenizer.vocab_size, shapes)
    folder.mkdir()
    save_file(weights, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps({**record.to_export_json(), "step": 0}))


def prompts_of(case: ServingCase, *, shared: bool) -> list[str]:
    """Random ASCII; one byte is one token, and an end-of-text token precedes each prompt."""

    def text(n_bytes: int, seed: int) -> str:
        drawn = torch.randint(97, 123, (n_bytes,), generator=torch.Generator().manual_seed(seed))
        return bytes(drawn.tolist()).decode()

    length = case.context - 1
    if not shared:
        return [text(length, seed) for seed in range(case.streams)]
    return [text(length - END_TOKENS, 0) + text(END_TOKENS, 1 + seed) for seed in range(case.streams)]


def run_row(arguments: argparse.Namespace, case: ServingCase, model: Path) -> dict[str, Any]:
    prompts = prompts_of(case, shared=arguments.shared)
    expected = expected_texts(arguments, prompts, reformer_dist.load(model, device="cpu")._loaded)
    if case.streams > 1 and len(set(expected)) == 1:
        raise SystemExit("bench_serving.py: all texts are equal, which shows nothing; change --tokens or --dim")
    with server(arguments, case, model) as (process, port), memory_of(process.pid, port) as memory:
        ask(port, model.name, prompts[0][:8], 8, {})
        extra = {"cached_prefix": prompts[0][:-END_TOKENS]} if arguments.shared else {}
        with ThreadPoolExecutor(case.streams) as pool:
            texts = list(pool.map(lambda prompt: ask(port, model.name, prompt, arguments.tokens, extra), prompts))
    row: dict[str, Any] = {"streams": case.streams, "context": case.context, "shared": arguments.shared}
    if [text.text for text in texts] != expected:
        return row | {"correct": False}
    firsts = [text.first for text in texts]
    rest = sum(text.n_tokens - 1 for text in texts)
    seconds = max(text.ended for text in texts) - min(text.begun + text.first for text in texts)
    per_token = [(text.ended - text.begun - text.first) / max(1, text.n_tokens - 1) for text in texts]
    return row | {
        "correct": True,
        "first": statistics.median(firsts),
        "last_first": max(firsts),
        "tokens_per_s": rest / seconds,
        "ms_per_token": 1000 * statistics.median(per_token),
        "state_mib": memory["state"] / case.streams / MIB,
        "peak_rss_mib": memory["rss"] / MIB,
    }


def expected_texts(arguments: argparse.Namespace, prompts: list[str], loaded: LoadedModel) -> list[str]:
    options = text_options(max_new_tokens=arguments.tokens, temperature=1.0, top_p=1.0, seed=0)
    state: PrefixState | None = None
    found = []
    for prompt in prompts:
        tokens, decoder = encode_prompt(loaded, Prompt("prompt", prompt.encode())), None
        if arguments.shared:
            state = state or read_prefix(loaded, tokens[:-END_TOKENS])
            decoder = state.continued(tokens[-END_TOKENS:])
        texts, text = SampledTexts(loaded, [tokens], options, decoder=decoder), ""
        while not texts.is_done:
            text += "".join(step.text for step in texts.step())
        found.append(text)
    return found


@contextmanager
def server(
    arguments: argparse.Namespace, case: ServingCase, model: Path
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "reformer_dist.serving", str(model), "--port", "0"]
    command += ["--max-streams", str(case.streams), "--client-timeout", "3600", "--prefix-cache", str(2**34)]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit("bench_serving.py: the server did not start")
            yield process, int(line.rpartition(":")[2].partition("/")[0])
        finally:
            process.terminate()


@contextmanager
def memory_of(pid: int, port: int) -> Iterator[dict[str, float]]:
    """The largest resident size of a process, and state_bytes of its metrics, in bytes, seen every 0.1 s."""
    largest, done = {"rss": 0.0, "state": 0.0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            largest["rss"] = max(largest["rss"], psutil.Process(pid).memory_info().rss)
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
            states = [float(line.split()[1]) for line in lines if line.startswith("reformer_state_bytes ")]
            largest["state"] = max(largest["state"], *states)
            connection.close()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield largest
    finally:
        done.set()
        thread.join()


def ask(port: int, model: str, prompt: str, n_tokens: int, extra: dict[str, Any]) -> StreamedText:
    """Streams a text."""
    fields = {"model": model, "prompt": prompt, "max_tokens": n_tokens, "seed": 0, "stream": True, **extra}
    body = json.dumps({**fields, "stream_options": {"include_usage": True}})
    connection = http.client.HTTPConnection("127.0.0.1", port)
    begun, first, text, count = time.perf_counter(), 0.0, "", 0
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise SystemExit(f"bench_serving.py: {chunk['error']['message']}")
        count = chunk.get("usage", {}).get("completion_tokens", count)
        for choice in chunk["choices"]:
            first = first or time.perf_counter() - begun
            text += choice["text"]
    connection.close()
    return StreamedText(text, count, first, begun, time.perf_counter())


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        "| streams | context | first token, s | last stream's | tokens/s | ms/token | state, MiB | peak RSS, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        head = f"| {row['streams']} | {row['context']:,}{' (shared)' if row['shared'] else ''} "
        if not row["correct"]:
            print(f"{head}| incorrect | | | | | |")
            continue
        print(
            f"{head}| {row['first']:.2f} | {row['last_first']:.2f} | {row['tokens_per_s']:.0f} "
            f"| {row['ms_per_token']:.1f} | {row['state_mib']:.1f} | {row['peak_rss_mib']:,.0f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
