#!/usr/bin/env python3
"""Time per token of decoding at contexts of several lengths: ours beside other Reformers' generation.

A text is read to the context's length, then --tokens more are decoded one by one, greedily. Ours decodes texts of
all lengths in turns, a token of each, so that other programs slow them alike; each row of a peer runs in a process
of its own. Correctness comes first, at a small length: logits of step-by-step decoding must equal those of the
model's whole forward. Without that no speed is shown, and the tool exits 1.

ours             a model of alternating local and LSH layers
reformer_pytorch 1.4.4's generate, which has no cache: each token is a forward over all before it (LSH layers only)
transformers     4.57.6's generate with its cache, alternating local and LSH layers

The two peers are optional: pip install 'reformer_dist[peers]'. Of them only finite logits are asked; `difference`
says how far transformers' cached logits are from those of its own whole forward, in their standard deviations
(reformer_pytorch hashes anew in each call, so it has nothing to compare).

ms a token: of ours the median of --tokens, of transformers of 4, of reformer_pytorch the mean of 2. prefill:
seconds until the first token; forward: one whole forward of ours at that length, which a token costs without a
cache; cache: memory that the state holds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bench_attention import IMPORT_FAILED, MIB
from torch import Tensor

from reformer_dist.commands import SPIN_COUNT
from reformer_dist.config import AttentionKind, ModelConfig
from reformer_dist.models import ReformerLM
from reformer_dist.models.decoding import DecodingState

PEERS = ("reformer_pytorch", "transformers")
IMPLEMENTATIONS = ("ours", *PEERS)
MEASURES = ("seconds", "prefill", "forward", "cache_mib", "difference")
TOLERANCE = 1e-4
CHECK_PROMPT, CHECK_TOKENS = 300, 60


@dataclass(frozen=True)
class DecodingCase:
    """What one process measures: a row for each of its contexts."""

    impl: str
    contexts: list[int]
    tokens: int
    dim: int
    layers: int
    heads: int
    n_hashes: int
    window: int
    n_buckets: int
    vocab: int
    threads: int

    @property
    def longest(self) -> int:
        """Positions that the model has room for: a multiple of every chunk."""
        unit = 2 * self.window
        return -(-(max(*self.contexts, CHECK_PROMPT + CHECK_TOKENS) + self.tokens + 1) // unit) * unit

    def text(self, n_tokens: int, seed: int = 0) -> Tensor:
        return torch.randint(1, self.vocab, (1, n_tokens), generator=torch.Generator().manual_seed(seed))


def main() -> int:
    arguments = parse_arguments()
    if arguments.work is not None:
        return run_work(DecodingCase(**json.loads(arguments.work)))
    impls = [impl for impl in IMPLEMENTATIONS if impl in arguments.impl]
    for impl in [impl for impl in PEERS if impl in impls and importlib.util.find_spec(impl) is None]:
        print(f"bench_decode.py: {impl} left out, not installed", file=sys.stderr)
        impls.remove(impl)
    names = [name for name in DecodingCase.__dataclass_fields__ if name not in ("impl", "contexts", "n_buckets")]
    sizes = {name: getattr(arguments, name) for name in names}
    # buckets belong to the model: those of the longest context, at every context
    sizes["n_buckets"] = arguments.n_buckets or max(2, max(arguments.context) // arguments.window // 2 * 2)
    rows = []
    for impl in impls:
        for contexts in [[context] for context in arguments.context] if impl in PEERS else [arguments.context]:
            rows += in_own_process(DecodingCase(impl=impl, contexts=contexts, **sizes), arguments.timeout)
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print_table(rows)
    return 0 if all(row["correct"] for row in rows) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    contexts = [1024, 4096, 16384, 65536, 131072]
    add("--context", type=int, nargs="+", default=contexts, help=f"default: {' '.join(map(str, contexts))}")
    add("--tokens", type=int, default=64, help="decoded and timed by ours; peers: 4 at most (default: 64)")
    add("--dim", type=int, default=256, help="default: 256")
    add("--layers", type=int, default=4, help="default: 4")
    add("--heads", type=int, default=4, help="default: 4")
    add("--n-hashes", type=int, default=4, help="default: 4")
    add("--window", type=int, default=64, help="of LSH and local layers; peers: chunk length (default: 64)")
    add("--n-buckets", type=int, help="ours (default: the longest context / window)")
    add("--vocab", type=int, default=257, help="default: 257")
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--impl", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS), help="default: all")
    add("--timeout", type=float, default=600.0, help="seconds that a row may take (default: 600)")
    add("--json", action="store_true", help="print one JSON object a row instead of the table")
    add("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_own_process(work: DecodingCase, timeout: float) -> list[dict[str, Any]]:
    """The rows that the process printed; none where a peer can't do it, which is said."""
    command = [sys.executable, str(Path(__file__).resolve()), "--work", json.dumps(asdict(work))]
    environment = {"GOMP_SPINCOUNT": SPIN_COUNT} | os.environ
    name = f"bench_decode.py: {work.impl} at {work.contexts}"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        print(f"{name} left out: takes more than {timeout:.0f} s", file=sys.stderr)
        return []
    if done.returncode == 0:
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    last_line = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    if work.impl in PEERS:
        print(f"{name} left out: {last_line}", file=sys.stderr)
        return []
    print(f"{name} failed: {last_line}", file=sys.stderr)
    return [report(work, context, None) for context in work.contexts]


Measured = dict[str, float | None]


def report(work: DecodingCase, context: int, measured: Measured | None) -> dict[str, Any]:
    """A row as it is printed; without measures it was not correct."""
    sizes = {name: value for name, value in asdict(work).items() if name != "contexts"}
    return {**sizes, "context": context, **(measured or dict.fromkeys(MEASURES)), "correct": measured is not None}


def run_work(work: DecodingCase) -> int:
    torch.set_num_threads(work.threads)
    torch.manual_seed(0)  # of the peers' weights and hashes
    measure = {"ours": ours, "reformer_pytorch": reformer_pytorch, "transformers": transformers}[work.impl]
    try:
        found = measure(work)
    except ImportError as error:
        print(error, file=sys.stderr)
        return IMPORT_FAILED
    for context, measured in zip(work.contexts, found, strict=True):
        print(json.dumps(report(work, context, measured)))
    return 0


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class DecodingRun:
    """One text of ours, read to its context's length."""

    def __init__(self, model: ReformerLM, tokens: Tensor) -> None:
        self.forward = timed(lambda: model(tokens, logits_to_keep=1))
        self._state = DecodingState(model.config)
        self._model, self._newest = model, tokens[:, -1:]
        self.prefill = timed(lambda: model(tokens, sequence=self._state, logits_to_keep=1))
        self.seconds: list[float] = []

    def step(self) -> None:
        start = time.perf_counter()
        self._newest = self._model(self._newest, sequence=self._state).argmax(dim=-1)
        self.seconds.append(time.perf_counter() - start)

    def measured(self, difference: float) -> Measured:
        seconds = statistics.median(self.seconds[2:])  # the first two warm up
        return measures(seconds, self.prefill, self.forward, self._state.n_bytes() / MIB, difference)


@torch.no_grad()
def ours(work: DecodingCase) -> list[Measured | None]:
    config = ModelConfig(
        dim=work.dim,
        n_layers=work.layers,
        n_heads=work.heads,
        layers=[AttentionKind.local, AttentionKind.lsh],
        n_hashes=work.n_hashes,
        n_buckets=work.n_buckets,
        window=work.window,
        local_window=work.window,
        axial_shape=[work.longest // (2 * work.window), 2 * work.window],
    )
    model = ReformerLM(config, work.vocab).eval()
    # a token that rounding puts into another bucket is attended otherwise: not in each of three texts
    differences = [difference_of(model, work.text(CHECK_PROMPT + CHECK_TOKENS, seed)) for seed in range(1, 4)]
    if min(differences) > TOLERANCE:
        return [None] * len(work.contexts)
    texts = [DecodingRun(model, work.text(context)) for context in work.contexts]
    for _ in range(work.tokens + 2):
        for text in texts:
            text.step()
    return [text.measured(min(differences)) for text in texts]


def difference_of(model: ReformerLM, text: Tensor) -> float:
    """Largest difference of a logit of step-by-step decoding from the whole forward's, in standard deviations."""
    whole = model(text)[:, CHECK_PROMPT:]
    state = DecodingState(model.config)
    model(text[:, :CHECK_PROMPT], sequence=state)
    steps = [model(token, sequence=state) for token in text[:, CHECK_PROMPT:].split(1, dim=1)]
    return float((torch.cat(steps, dim=1) - whole).abs().max() / whole.std())


def measures(
    seconds: float, prefill: float, forward: float | None, cache: float | None, difference: float | None
) -> Measured:
    values = (seconds, prefill, forward, cache, difference)
    return dict(zip(MEASURES, (None if v is None else float(f"{v:.5g}") for v in values), strict=True))


def reformer_pytorch(work: DecodingCase) -> list[Measured | None]:
    from reformer_pytorch import ReformerLM as Peer
    from reformer_pytorch.generative_tools import TrainingWrapper

    model = Peer(
        num_tokens=work.vocab,
        dim=work.dim,
        depth=work.layers,
        heads=work.heads,
        max_seq_len=work.longest,
        bucket_size=work.window,
        n_hashes=work.n_hashes,
        causal=True,
    )
    writer = TrainingWrapper(model)
    text = work.text(work.contexts[0])
    prefill = timed(lambda: writer.generate(text, 1))
    n_tokens = min(work.tokens, 2)
    seconds = timed(lambda: writer.generate(text, n_tokens)) / n_tokens
    with torch.no_grad():
        is_finite = bool(model(work.text(2 * work.window)).isfinite().all())
    return [measures(seconds, prefill, None, None, None) if is_finite else None]


@torch.no_grad()
def transformers(work: DecodingCase) -> list[Measured | None]:
    from transformers import ReformerConfig, ReformerModelWithLMHead
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = ReformerConfig(
        attn_layers=["local", "lsh"] * (work.layers // 2) + ["local"] * (work.layers % 2),
        hidden_size=work.dim,
        feed_forward_size=4 * work.dim,
        num_attention_heads=work.heads,
        attention_head_size=work.dim // work.heads,
        lsh_attn_chunk_length=work.window,
        local_attn_chunk_length=work.window,
        num_hashes=work.n_hashes,
        vocab_size=work.vocab,
        axial_pos_shape=[work.longest // (2 * work.window), 2 * work.window],
        axial_pos_embds_dim=[work.dim // 2, work.dim - work.dim // 2],
        max_position_embeddings=work.longest,
        is_decoder=True,
        hash_seed=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = ReformerModelWithLMHead(config).eval()
    found = difference_of_peer(model, work.text(CHECK_PROMPT))
    model.config.num_buckets = None  # chosen anew, from the context's length
    for layer in model.reformer.encoder.layers:
        layer.attention.self_attention.num_buckets = None
    clock = TokenTimer()
    generate_by_peer(model, work.text(work.contexts[0]), 1 + min(work.tokens, 4), clock)
    prefill, *steps = clock.between()
    seconds = statistics.median(steps)
    return [measures(seconds, prefill, None, None, found) if math.isfinite(found) else None]


class TokenTimer:
    """What generate hands the prompt to, and then each token: it keeps the times."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self._times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def between(self) -> list[float]:
        """Seconds from one to the next; the first are those of the prefill."""
        return [after - before for before, after in pairwise(self._times)]


def generate_by_peer(model: Any, text: Tensor, n_tokens: int, clock: TokenTimer | None = None) -> Any:
    mask = torch.ones_like(text)
    return model.generate(
        text,
        attention_mask=mask,
        max_new_tokens=n_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        streamer=clock,
    )


def difference_of_peer(model: Any, text: Tensor) -> float:
    found = generate_by_peer(model, text, 8)
    whole = model(found.sequences[:, :-1]).logits[:, text.shape[1] - 1 :]
    return float((torch.stack(found.logits, dim=1) - whole).abs().max() / whole.std())


def print_table(rows: list[dict[str, Any]]) -> None:
    shortest = {row["impl"]: row["seconds"] for row in reversed(rows)}
    print(
        "| implementation | context | ms a token | of the shortest | prefill, s | forward / token | cache, MiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        if not row["correct"]:
            print(f"| {row['impl']} | {row['context']} | incorrect | | | | |")
            continue
        growth = f"{row['seconds'] / shortest[row['impl']]:.2f}" if shortest[row["impl"]] else ""
        saved = "" if row["forward"] is None else f"{row['forward'] / row['seconds']:.0f}"
        cache = "" if row["cache_mib"] is None else f"{row['cache_mib']:.0f}"
        print(
            f"| {row['impl']} | {row['context']} | {1000 * row['seconds']:.2f} | {growth} | {row['prefill']:.2f} "
            f"| {saved} | {cache} |"
        )
    found = [row["difference"] for row in rows if row["difference"] is not None and row["impl"] == "transformers"]
    if found:
        print(f"\ntransformers: cached logits differ from the whole forward's by {found[0]:.2g} deviations")


if __name__ == "__main__":
    sys.exit(main())
