#!/usr/bin/env python3
"""Decoding time per token at several context lengths, compared with the generation of other Reformers.

After a prefill of the context, --tokens tokens are decoded greedily. Ours decodes texts of all lengths in turn,
one token each, so that other load affects them equally; each row of a peer runs in its own process. Results are
checked first at a short length: logits of incremental decoding must equal those of a full forward. Otherwise no
speed is shown, and the tool exits 1.

ours             alternating local and LSH layers
reformer_pytorch 1.4.4's generate, which has no cache: each token is a full forward (LSH layers only)
transformers     4.57.6's generate with its cache, alternating local and LSH layers

The peers are optional: pip install 'reformer_dist[peers]'. Their logits only need to be finite; `difference` is
the deviation of transformers' cached logits from those of its own full forward, in standard deviations
(reformer_pytorch rehashes in each call, so there is nothing to compare).

ms/token: for ours the median of --tokens, for transformers of 4, for reformer_pytorch the mean of 2. prefill:
seconds until the first token; forward: one full forward of ours at that length, the cost of a token without a
cache; cache: memory of the decoding state.
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

from reformer_dist.config import AttentionKind, ModelConfig
from reformer_dist.models import ReformerLM
from reformer_dist.models.decoding import DecodingState
from reformer_dist.ops.spinning import SPIN_COUNT

PEERS = ("reformer_pytorch", "transformers")
IMPLEMENTATIONS = ("ours", *PEERS)
MEASURES = ("seconds", "prefill", "forward", "cache_mib", "difference")
TOLERANCE = 1e-4
CHECK_PROMPT, CHECK_TOKENS = 300, 60


@dataclass(frozen=True)
class DecodingCase:
    """The measurements of one process: a row per context."""

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
        """Maximum length of the model: a multiple of every chunk."""
        multiple = 2 * self.window
        return -(-(max(*self.contexts, CHECK_PROMPT + CHECK_TOKENS) + self.tokens + 1) // multiple) * multiple

    def text(self, n_tokens: int, seed: int = 0) -> Tensor:
        return torch.randint(1, self.vocab, (1, n_tokens), generator=torch.Generator().manual_seed(seed))


def main() -> int:
    arguments = parse_arguments()
    if arguments.work is not None:
        return run_case(DecodingCase(**json.loads(arguments.work)))
    impls = [impl for impl in IMPLEMENTATIONS if impl in arguments.impl]
    for impl in [impl for impl in PEERS if impl in impls and importlib.util.find_spec(impl) is None]:
        print(f"bench_decode.py: {impl} skipped: not installed", file=sys.stderr)
        impls.remove(impl)
    names = [name for name in DecodingCase.__dataclass_fields__ if name not in ("impl", "contexts", "n_buckets")]
    sizes = {name: getattr(arguments, name) for name in names}
    # the number of buckets is a property of the model: that of the longest context
    sizes["n_buckets"] = arguments.n_buckets or max(2, max(arguments.context) // arguments.window // 2 * 2)
    rows = []
    for impl in impls:
        for contexts in [[context] for context in arguments.context] if impl in PEERS else [arguments.context]:
            rows += run_in_process(DecodingCase(impl=impl, contexts=contexts, **sizes), arguments.timeout)
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
    add("--tokens", type=int, default=64, help="decoded tokens; peers: at most 4 (default: 64)")
    add("--dim", type=int, default=256, help="default: 256")
    add("--layers", type=int, default=4, help="default: 4")
    add("--heads", type=int, default=4, help="default: 4")
    add("--n-hashes", type=int, default=4, help="default: 4")
    add("--window", type=int, default=64, help="window of LSH and local layers; peers: chunk length (default: 64)")
    add("--n-buckets", type=int, help="ours (default: the longest context / window)")
    add("--vocab", type=int, default=257, help="default: 257")
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--impl", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS), help="default: all")
    add("--timeout", type=float, default=600.0, help="seconds per row (default: 600)")
    add("--json", action="store_true", help="print one JSON object per row instead of the table")
    add("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_in_process(case: DecodingCase, timeout: float) -> list[dict[str, Any]]:
    """Runs a case in its own process and returns its rows; none, with a message, if a peer fails."""
    command = [sys.executable, str(Path(__file__).resolve()), "--work", json.dumps(asdict(case))]
    environment = {"GOMP_SPINCOUNT": SPIN_COUNT} | os.environ
    name = f"bench_decode.py: {case.impl} at {case.contexts}"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        print(f"{name} skipped: takes more than {timeout:.0f} s", file=sys.stderr)
        return []
    if done.returncode == 0:
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    last_line = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    if case.impl in PEERS:
        print(f"{name} skipped: {last_line}", file=sys.stderr)
        return []
    print(f"{name} failed: {last_line}", file=sys.stderr)
    return [result_row(case, context, None) for context in case.contexts]


Measurement = dict[str, float | None]


def result_row(case: DecodingCase, context: int, measured: Measurement | None) -> dict[str, Any]:
    """A printed row; incorrect without a measurement."""
    sizes = {name: value for name, value in asdict(case).items() if name != "contexts"}
    return {**sizes, "context": context, **(measured or dict.fromkeys(MEASURES)), "correct": measured is not None}


def run_case(case: DecodingCase) -> int:
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)  # weights and hashes of the peers
    measure = {"ours": ours, "reformer_pytorch": reformer_pytorch, "transformers": transformers}[case.impl]
    try:
        measurements = measure(case)
    except ImportError as error:
        print(error, file=sys.stderr)
        return IMPORT_FAILED
    for context, measured in zip(case.contexts, measurements, strict=True):
        print(json.dumps(result_row(case, context, measured)))
    return 0


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class DecodingRun:
    """Incremental decoding of one text after its prefill."""

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

    def measured(self, difference: float) -> Measurement:
        seconds = statistics.median(self.seconds[2:])  # the first two are warm-up
        return measures(seconds, self.prefill, self.forward, self._state.n_bytes() / MIB, difference)


@torch.no_grad()
def ours(case: DecodingCase) -> list[Measurement | None]:
    config = ModelConfig(
        dim=case.dim,
        n_layers=case.layers,
        n_heads=case.heads,
        layers=[AttentionKind.local, AttentionKind.lsh],
        n_hashes=case.n_hashes,
        n_buckets=case.n_buckets,
        window=case.window,
        local_window=case.window,
        axial_shape=[case.longest // (2 * case.window), 2 * case.window],
    )
    model = ReformerLM(config, case.vocab).eval()
    # rounding may move a token to another bucket and change its attention, but not in each of three texts
    differences = [difference_of(model, case.text(CHECK_PROMPT + CHECK_TOKENS, seed)) for seed in range(1, 4)]
    if min(differences) > TOLERANCE:
        return [None] * len(case.contexts)
    texts = [DecodingRun(model, case.text(context)) for context in case.contexts]
    for _ in range(case.tokens + 2):
        for text in texts:
            text.step()
    return [text.measured(min(differences)) for text in texts]


def difference_of(model: ReformerLM, text: Tensor) -> float:
    """Largest deviation of incremental logits from those of a full forward, in standard deviations."""
    whole = model(text)[:, CHECK_PROMPT:]
    state = DecodingState(model.config)
    model(text[:, :CHECK_PROMPT], sequence=state)
    steps = [model(token, sequence=state) for token in text[:, CHECK_PROMPT:].split(1, dim=1)]
    return float((torch.cat(steps, dim=1) - whole).abs().max() / whole.std())


def measures(
    seconds: float, prefill: float, forward: float | None, cache: float | None, difference: float | None
) -> Measurement:
    values = (seconds, prefill, forward, cache, difference)
    return dict(zip(MEASURES, (None if v is None else float(f"{v:.5g}") for v in values), strict=True))


def reformer_pytorch(case: DecodingCase) -> list[Measurement | None]:
    from reformer_pytorch import ReformerLM as Peer
    from reformer_pytorch.generative_tools import TrainingWrapper

    model = Peer(
        num_tokens=case.vocab,
        dim=case.dim,
        depth=case.layers,
        heads=case.heads,
        max_seq_len=case.longest,
        bucket_size=case.window,
        n_hashes=case.n_hashes,
        causal=True,
    )
    generator = TrainingWrapper(model)
    text = case.text(case.contexts[0])
    prefill = timed(lambda: generator.generate(text, 1))
    n_tokens = min(case.tokens, 2)
    seconds = timed(lambda: generator.generate(text, n_tokens)) / n_tokens
    with torch.no_grad():
        is_finite = bool(model(case.text(2 * case.window)).isfinite().all())
    return [measures(seconds, prefill, None, None, None) if is_finite else None]


@torch.no_grad()
def transformers(case: DecodingCase) -> list[Measurement | None]:
    from transformers import ReformerConfig, ReformerModelWithLMHead
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = ReformerConfig(
        attn_layers=["local", "lsh"] * (case.layers // 2) + ["local"] * (case.layers % 2),
        hidden_size=case.dim,
        feed_forward_size=4 * case.dim,
        num_attention_heads=case.heads,
        attention_head_size=case.dim // case.heads,
        lsh_attn_chunk_length=case.window,
        local_attn_chunk_length=case.window,
        num_hashes=case.n_hashes,
        vocab_size=case.vocab,
        axial_pos_shape=[case.longest // (2 * case.window), 2 * case.window],
        axial_pos_embds_dim=[case.dim // 2, case.dim - case.dim // 2],
        max_position_embeddings=case.longest,
        is_decoder=True,
        hash_seed=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = ReformerModelWithLMHead(config).eval()
    difference = difference_of_peer(model, case.text(CHECK_PROMPT))
    model.config.num_buckets = None  # derived again from the length of the context
    for layer in model.reformer.encoder.layers:
        layer.attention.self_attention.num_buckets = None
    timer = TokenTimer()
    generate_by_peer(model, case.text(case.contexts[0]), 1 + min(case.tokens, 4), timer)
    prefill, *steps = timer.intervals()
    seconds = statistics.median(steps)
    return [measures(seconds, prefill, None, None, difference) if math.isfinite(difference) else None]


class TokenTimer:
    """A streamer for generate that records when it receives the prompt and each token."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self._times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def intervals(self) -> list[float]:
        """Seconds between consecutive calls; the first interval is the prefill."""
        return [after - before for before, after in pairwise(self._times)]


def generate_by_peer(model: Any, text: Tensor, n_tokens: int, timer: TokenTimer | None = None) -> Any:
    mask = torch.ones_like(text)
    return model.generate(
        text,
        attention_mask=mask,
        max_new_tokens=n_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        streamer=timer,
    )


def difference_of_peer(model: Any, text: Tensor) -> float:
    generated = generate_by_peer(model, text, 8)
    whole = model(generated.sequences[:, :-1]).logits[:, text.shape[1] - 1 :]
    return float((torch.stack(generated.logits, dim=1) - whole).abs().max() / whole.std())


def print_table(rows: list[dict[str, Any]]) -> None:
    shortest = {row["impl"]: row["seconds"] for row in reversed(rows)}
    print("| implementation | context | ms/token | vs. shortest | prefill, s | forward / token | cache, MiB |")
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
    differences = [
        row["difference"] for row in rows if row["difference"] is not None and row["impl"] == "transformers"
    ]
    if differences:
        print(f"\ntransformers: cached logits differ from a full forward's by {differences[0]:.2g} deviations")


if __name__ == "__main__":
    sys.exit(main())
