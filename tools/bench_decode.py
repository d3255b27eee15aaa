#!/usr/bin/env python3
"""Time per token of decoding at contexts of several lengths: ours beside other Reformers' generation.

Every row runs in a process of its own. One text is read to the context's length, then --tokens more are decoded
one by one, greedily. Correctness comes first, at a small length and with the row's own model: logits of
step-by-step decoding must equal those of the whole forward. A row that fails shows no speed, and the tool exits 1.

ours             generation.CachedDecoder of a model of alternating local and LSH layers
reformer_pytorch 1.4.4's generate, which has no cache: each token is a forward over all before it (LSH layers only)
transformers     4.57.6's generate with its cache, alternating local and LSH layers

The two peers are optional: pip install 'reformer_dist[peers]'. Of them only finite logits are asked; `difference`
says how far transformers' cached logits are from those of its own whole forward, in their standard deviations
(reformer_pytorch hashes anew in each call, so it has nothing to compare).

ms a token: of ours the median of --tokens, of the peers the mean of a few. prefill: seconds until the first
token; forward: one whole forward of ours at that length, which a token costs without a cache; cache: memory
that the state holds.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_attention import IMPORT_FAILED, MIB, PEERS
from torch import Tensor

from reformer_dist.commands import SPIN_COUNT
from reformer_dist.config import AttentionKind, ModelConfig
from reformer_dist.generation import CachedDecoder
from reformer_dist.models import ReformerLM
from reformer_dist.models.decoding import DecodingState

IMPLEMENTATIONS = ("ours", *PEERS)
MEASURES = ("seconds", "prefill", "forward", "cache_mib", "difference")
TOLERANCE = 1e-4
CHECK_PROMPT, CHECK_TOKENS = 300, 60


@dataclass(frozen=True)
class Row:
    """What one process measures."""

    impl: str
    context: int
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
        return -(-(max(self.context, CHECK_PROMPT + CHECK_TOKENS) + self.tokens + 1) // unit) * unit

    def text(self, n_tokens: int, seed: int = 0) -> Tensor:
        return torch.randint(1, self.vocab, (1, n_tokens), generator=torch.Generator().manual_seed(seed))


def main() -> int:
    arguments = parse_arguments()
    if arguments.row is not None:
        return run_row(Row(**json.loads(arguments.row)))
    impls = [impl for impl in IMPLEMENTATIONS if impl in arguments.impl]
    for impl in [impl for impl in PEERS if impl in impls and importlib.util.find_spec(impl) is None]:
        print(f"bench_decode.py: {impl} left out, not installed", file=sys.stderr)
        impls.remove(impl)
    names = [name for name in Row.__dataclass_fields__ if name not in ("impl", "context", "n_buckets")]
    sizes = {name: getattr(arguments, name) for name in names}
    # buckets belong to the model: those of the longest context, at every context
    sizes["n_buckets"] = arguments.n_buckets or max(2, max(arguments.context) // arguments.window // 2 * 2)
    rows = [
        found
        for impl, context in itertools.product(impls, arguments.context)
        if (found := in_own_process(Row(impl=impl, context=context, **sizes), arguments.timeout)) is not None
    ]
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
    add("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_own_process(row: Row, timeout: float) -> dict[str, Any] | None:
    """What the row's process printed; None where a peer can't do it, which is said."""
    command = [sys.executable, str(Path(__file__).resolve()), "--row", json.dumps(asdict(row))]
    environment = {"GOMP_SPINCOUNT": SPIN_COUNT} | os.environ
    name = f"bench_decode.py: {row.impl} at {row.context}"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        print(f"{name} left out: takes more than {timeout:.0f} s", file=sys.stderr)
        return None
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last_line = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    if row.impl in PEERS:
        print(f"{name} left out: {last_line}", file=sys.stderr)
        return None
    print(f"{name} failed: {last_line}", file=sys.stderr)
    return report(row, None)


def report(row: Row, measured: dict[str, float | None] | None) -> dict[str, Any]:
    """A row as it is printed; without measures it was not correct."""
    return {**asdict(row), **(measured or dict.fromkeys(MEASURES)), "correct": measured is not None}


def run_row(row: Row) -> int:
    torch.set_num_threads(row.threads)
    torch.manual_seed(0)  # of the peers' weights and hashes
    try:
        measured = {"ours": ours, "reformer_pytorch": reformer_pytorch, "transformers": transformers}[row.impl](
            row
        )
    except ImportError as error:
        print(error, file=sys.stderr)
        return IMPORT_FAILED
    print(json.dumps(report(row, measured)))
    return 0


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def ours(row: Row) -> dict[str, float | None] | None:
    sides = [row.longest // (2 * row.window), 2 * row.window]
    config = ModelConfig(
        dim=row.dim,
        n_layers=row.layers,
        n_heads=row.heads,
        layers=[AttentionKind.local, AttentionKind.lsh],
        n_hashes=row.n_hashes,
        n_buckets=row.n_buckets,
        window=row.window,
        local_window=row.window,
        axial_shape=sides,
    )
    model = ReformerLM(config, row.vocab).eval()
    # a token that rounding puts into another bucket is attended otherwise: not in each of three texts
    differences = [difference_of(model, row.text(CHECK_PROMPT + CHECK_TOKENS, seed)) for seed in range(1, 4)]
    if min(differences) > TOLERANCE:
        return None
    text = row.text(row.context)
    forward = min(timed(lambda: model(text, logits_to_keep=1)) for _ in range(2))
    state = DecodingState(config)
    decoder = CachedDecoder(lambda *given, **named: model(*given, **{**named, "sequence": state}), config)
    prefill = timed(lambda: decoder.start(text))
    newest = text[0, -1:]
    seconds = []
    for _ in range(row.tokens + 2):  # the first two warm up
        start = time.perf_counter()
        newest = decoder.step(newest).argmax(dim=-1)
        seconds.append(time.perf_counter() - start)
    cache = state.n_bytes() / MIB
    return measures(statistics.median(seconds[2:]), prefill, forward, cache, min(differences))


def difference_of(model: ReformerLM, text: Tensor) -> float:
    """Largest difference of a logit of step-by-step decoding from the whole forward's, in standard deviations."""
    whole = model(text)[:, CHECK_PROMPT:]
    state = DecodingState(model.config)
    model(text[:, :CHECK_PROMPT], sequence=state)
    steps = [model(token, sequence=state) for token in text[:, CHECK_PROMPT:].split(1, dim=1)]
    return float((torch.cat(steps, dim=1) - whole).abs().max() / whole.std())


def measures(
    seconds: float, prefill: float, forward: float | None, cache: float | None, difference: float | None
) -> dict[str, float | None]:
    values = (seconds, prefill, forward, cache, difference)
    return dict(zip(MEASURES, (None if v is None else float(f"{v:.5g}") for v in values), strict=True))


def reformer_pytorch(row: Row) -> dict[str, float | None] | None:
    from reformer_pytorch import ReformerLM as Peer
    from reformer_pytorch.generative_tools import TrainingWrapper

    model = Peer(
        num_tokens=row.vocab,
        dim=row.dim,
        depth=row.layers,
        heads=row.heads,
        max_seq_len=row.longest,
        bucket_size=row.window,
        n_hashes=row.n_hashes,
        causal=True,
    )
    writer = TrainingWrapper(model)
    text = row.text(row.context)
    prefill = timed(lambda: writer.generate(text, 1))
    n_tokens = min(row.tokens, 2)
    seconds = timed(lambda: writer.generate(text, n_tokens)) / n_tokens
    with torch.no_grad():
        is_finite = bool(model(row.text(2 * row.window)).isfinite().all())
    return measures(seconds, prefill, None, None, None) if is_finite else None


@torch.no_grad()
def transformers(row: Row) -> dict[str, float | None] | None:
    from transformers import ReformerConfig, ReformerModelWithLMHead
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = ReformerConfig(
        attn_layers=["local", "lsh"] * (row.layers // 2) + ["local"] * (row.layers % 2),
        hidden_size=row.dim,
        feed_forward_size=4 * row.dim,
        num_attention_heads=row.heads,
        attention_head_size=row.dim // row.heads,
        lsh_attn_chunk_length=row.window,
        local_attn_chunk_length=row.window,
        num_hashes=row.n_hashes,
        vocab_size=row.vocab,
        axial_pos_shape=[row.longest // (2 * row.window), 2 * row.window],
        axial_pos_embds_dim=[row.dim // 2, row.dim - row.dim // 2],
        max_position_embeddings=row.longest,
        is_decoder=True,
        hash_seed=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = ReformerModelWithLMHead(config).eval()
    found = difference_of_peer(model, row.text(CHECK_PROMPT))
    model.config.num_buckets = None  # chosen anew, from the context's length
    for layer in model.reformer.encoder.layers:
        layer.attention.self_attention.num_buckets = None
    text = row.text(row.context)
    prefill = timed(lambda: generate_by_peer(model, text, 1))
    n_tokens = min(row.tokens, 4)
    seconds = (timed(lambda: generate_by_peer(model, text, 1 + n_tokens)) - prefill) / n_tokens
    return measures(seconds, prefill, None, None, found) if found == found else None


def generate_by_peer(model: Any, text: Tensor, n_tokens: int) -> Any:
    mask = torch.ones_like(text)
    return model.generate(
        text,
        attention_mask=mask,
        max_new_tokens=n_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
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
