#!/usr/bin/env python3
"""One training step of a configuration: speed, hardware utilization, memory, and time by component.

    python tools/bench_step.py model.dim=512 model.n_layers=6 data.seq_len=16384

ours             the run described by the overrides, in one process with DeepSpeed, on random tokens
reformer_pytorch 1.4.4's ReformerLM with the same sizes, rounds, window and chunks, and AdamW (optional dependency)

Results are checked first at a short length: our loss and gradients must equal those of a model that stores its
activations; those of the peer must be finite. An incorrect row shows no speed, and the tool exits 1. A row that
could not run (out of memory, for example) is neither correct nor incorrect: it reports the error, and the tool
exits 2.

mfu is the model FLOPs of the step (planning/flops.py, without recompute) per second, relative to the GPU's peak
rate at this precision or, on other devices, to the measured rate of a large matrix product. planned MiB is the
planner's estimate of the peak (reformer_dist/planning): weights, optimizer states and activations. The split is
measured in one more step, which synchronizes around each component and is therefore slower; recompute counts for
its component.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_attention import (
    IMPORT_FAILED,
    MIB,
    VERDICT,
    exit_status,
    last_line,
    peak_resident_bytes,
    resident_bytes,
)
from torch import Tensor

from reformer_dist.config import Precision, RunConfig
from reformer_dist.distributed import runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.models import ReformerLM, head
from reformer_dist.models import attention as attention_layers
from reformer_dist.models.block import Block
from reformer_dist.models.reversible import Sublayer, TokenwiseSublayer
from reformer_dist.models.sequence import WholeSequence
from reformer_dist.ops.lsh import attention as lsh_attention
from reformer_dist.ops.lsh.native import attention as native_attention
from reformer_dist.ops.lsh.torch_tiles import attention as torch_attention
from reformer_dist.ops.spinning import SPIN_COUNT
from reformer_dist.planning import JobSpec, make_plan
from reformer_dist.planning.flops import layer_flops
from reformer_dist.run.compose import run_config_from, to_dict

IMPLEMENTATIONS = ("ours", "reformer_pytorch")
DEFAULTS = [
    "model.dim=512",
    "model.n_layers=6",
    "model.n_heads=8",
    "model.layers=[lsh]",
    "model.n_hashes=8",
    "model.window=64",
    "model.n_buckets=256",
    "model.axial_shape=[128,128]",
    "model.ff_chunk=1024",
    "data.seq_len=16384",
    "data.batch_size=1",
    "trainer.micro_batch_size=1",
]
VOCAB_SIZE = 257
CHECK_SEQ_LEN = 256
# dense TFLOP/s from NVIDIA's data sheets: tensor cores in bf16 and fp16, CUDA cores in fp32
PEAK_TFLOPS = {
    "H200": {"bf16": 989.4, "fp16": 989.4, "fp32": 66.9},
    "H100 PCIe": {"bf16": 756.0, "fp16": 756.0, "fp32": 51.2},
    "H100 NVL": {"bf16": 835.5, "fp16": 835.5, "fp32": 60.0},
    "H100": {"bf16": 989.4, "fp16": 989.4, "fp32": 66.9},
    "A100": {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5},
    "V100": {"fp16": 125.0, "fp32": 15.7},
}


def main() -> int:
    arguments = parse_arguments()
    if arguments.row is not None:
        return run_row(arguments)
    rows = [row for impl in arguments.impl if (row := run_in_process(impl)) is not None]
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print_table(rows)
    return exit_status(rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help=f"overrides of the run (default: {' '.join(DEFAULTS)})")
    add("--impl", nargs="+", choices=IMPLEMENTATIONS, default=("ours",), help="default: ours")
    add("--repeat", type=int, default=3, help="timed steps; the best is reported (default: 3)")
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--json", action="store_true", help="print one JSON object per row instead of the table")
    add("--row", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


def run_in_process(impl: str) -> dict[str, Any] | None:
    """Runs a row in its own process; None if the peer is not installed."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--row", impl]
    environment = {"GOMP_SPINCOUNT": SPIN_COUNT} | os.environ
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    sys.stderr.write(done.stderr)
    if done.returncode == IMPORT_FAILED:
        return None
    if done.returncode:
        return {"impl": impl, "correct": None, "error": last_line(done.stderr) or f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def run_row(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    config = run_config_from(to_dict(RunConfig()), [*DEFAULTS, *arguments.overrides])
    device = runtime.start().device
    try:
        bench = (Ours if arguments.row == "ours" else ReformerPytorch)(config, device)
    except ImportError as error:
        print(f"bench_step.py: {arguments.row} skipped: {error}", file=sys.stderr)
        return IMPORT_FAILED
    row: dict[str, Any] = {"impl": arguments.row, "correct": bench.check()}
    if row["correct"]:
        row |= measure(bench, config, device, arguments.repeat)
    print(json.dumps(row))
    runtime.stop()
    return 0


class Ours:
    """A training step of the run with its engine."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._config, self._device = config, device

    def check(self) -> bool:
        """Compares loss and gradients with a model that stores activations, in float32 at a short length."""
        tokens = random_tokens(self._config, self._device)[:1, : CHECK_SEQ_LEN + 1]
        results = []
        for recompute in (self._config.model.recompute.name, "none"):
            changed = run_config_from(to_dict(self._config), [f"model.recompute={recompute}"])
            model = ReformerLM(changed.model, VOCAB_SIZE, seed=0).to(self._device)
            loss = model(tokens[:, :-1], tokens[:, 1:], step=0)
            results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
        pairs = zip(*results, strict=True)
        return all((a - b).abs().max() <= 1e-3 * (1 + b.abs().max()) for a, b in pairs)

    def prepare(self) -> None:
        model = ReformerLM(self._config.model, VOCAB_SIZE, seed=0).to(self._device)
        self._engine = TrainEngine(model, [Block], self._config, world_size=1)

    def planned_mib(self) -> float | None:
        """Estimated peak: weights, optimizer states and activations."""
        job = JobSpec(
            self._config, world_size=1, ranks_per_node=1, vocab_size=VOCAB_SIZE, device=self._device.type
        )
        return round(make_plan(job, lambda: ReformerLM(self._config.model, VOCAB_SIZE)).peak.total / MIB, 1)

    def step(self, tokens: Tensor) -> None:
        micro = self._config.micro_batching(1)[0]
        n_tokens = tokens[:, 1:].numel()
        for rows in tokens.split(micro):
            loss = self._engine.forward(rows[:, :-1], rows[:, 1:], step=0)
            self._engine.backward(loss, n_tokens)
        self._engine.step(1e-4)

    def split(self, tokens: Tensor) -> dict[str, float]:
        watch = Stopwatch(self._device)
        with ExitStack() as patches:
            for name, owner, attribute in (
                ("hash", attention_layers, "hash_vectors"),
                ("sort", torch_attention, "lay_out"),
                ("sort", native_attention, "order_rows"),
                ("attend", WholeSequence, "bucket_attention"),
                ("attend", WholeSequence, "exact_attention"),
                ("attend", lsh_attention._Attention, "backward"),
                (sublayer_of, Sublayer, "__call__"),
                (sublayer_of, Sublayer, "grads"),
                (sublayer_of, TokenwiseSublayer, "__call__"),
                (sublayer_of, TokenwiseSublayer, "grads"),
                ("loss", head.LanguageModelHead, "forward"),
                ("optimizer", TrainEngine, "step"),
            ):
                patches.enter_context(mock.patch.object(owner, attribute, watch.wrap(owner, attribute, name)))
            with watch.timed("rest"):
                self.step(tokens)
        return watch.seconds


class ReformerPytorch:
    """A training step of reformer_pytorch's language model with the same sizes."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        from reformer_pytorch import ReformerLM as PeerLM

        model = config.model
        self._config, self._device, self._class = config, device, PeerLM
        self._sizes = {
            "num_tokens": VOCAB_SIZE,
            "dim": model.dim,
            "depth": model.n_layers,
            "max_seq_len": config.data.seq_len,
            "heads": model.n_heads,
            "bucket_size": model.window,
            "n_hashes": model.n_hashes,
            "ff_chunks": -(-config.data.seq_len // model.ff_chunk) if model.ff_chunk else 1,
            "ff_mult": model.ff_mult,
            "causal": True,
        }

    def check(self) -> bool:
        short = 4 * self._config.model.window
        model = self._class(**{**self._sizes, "max_seq_len": short}).to(self._device)
        tokens = random_tokens(self._config, self._device)[:1, : short + 1]
        loss = self._loss(model, tokens)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return bool(loss.isfinite()) and all(bool(grad.isfinite().all()) for grad in grads)

    def prepare(self) -> None:
        self._model = self._class(**self._sizes).to(self._device)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)

    def planned_mib(self) -> float | None:
        return None

    def step(self, tokens: Tensor) -> None:
        n_micro = len(tokens.split(self._config.micro_batching(1)[0]))
        for rows in tokens.chunk(n_micro):
            (self._loss(self._model, rows) / n_micro).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _loss(self, model: Any, tokens: Tensor) -> Tensor:
        is_bf16 = self._config.trainer.precision is Precision.bf16
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=is_bf16):
            logits = model(tokens[:, :-1])
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def split(self, tokens: Tensor) -> dict[str, float]:
        return {}


class Stopwatch:
    """Exclusive seconds by name: nested timings are subtracted."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inner: list[float] = []
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = self._now()
        self._inner.append(0.0)
        yield
        total = self._now() - start
        own = total - self._inner.pop()
        if self._inner:
            self._inner[-1] += total
        self.seconds[name] = self.seconds.get(name, 0.0) + own

    def wrap(self, owner: Any, attribute: str, name: str | Callable[..., str]) -> Any:
        """The function, timed under a name, or under `name(*args)`."""
        function = getattr(owner, attribute)

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.timed(name if isinstance(name, str) else name(*args)):
                return function(*args, **kwargs)

        is_static = isinstance(owner, type) and isinstance(vars(owner).get(attribute), staticmethod)
        return staticmethod(run) if is_static else run

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def sublayer_of(sublayer: Sublayer, *_: Any) -> str:
    """Component of a block's sublayer; attention without its nested timings is its projections."""
    return "feed-forward" if isinstance(sublayer, TokenwiseSublayer) else "projections"


def random_tokens(config: RunConfig, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (config.data.batch_size, config.data.seq_len + 1)
    return torch.randint(0, VOCAB_SIZE, shape, generator=generator).to(device)


def measure(bench: Ours | ReformerPytorch, config: RunConfig, device: torch.device, repeat: int) -> dict[str, Any]:
    tokens = random_tokens(config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = resident_bytes() if device.type == "cpu" else torch.cuda.memory_allocated()
    bench.prepare()
    clock = Stopwatch(device)
    times = []
    for _ in range(repeat):
        start = clock._now()
        bench.step(tokens)
        times.append(clock._now() - start)
    peak = peak_resident_bytes() if device.type == "cpu" else torch.cuda.max_memory_allocated()
    seconds, n_tokens = min(times), config.data.batch_size * config.data.seq_len
    rate, rate_name = peak_rate(config, device)
    return {
        "seconds": round(seconds, 4),
        "tokens_per_s": round(n_tokens / seconds, 1),
        "mfu": round(model_flops(config) / seconds / rate, 4),
        "mfu_of": rate_name,
        "peak_mib": round((peak - before) / MIB, 1),
        "planned_mib": bench.planned_mib(),
        "split": {name: round(part, 4) for name, part in bench.split(tokens).items()},
    }


def model_flops(config: RunConfig) -> float:
    """FLOPs of one step: forward, and backward with twice as many."""
    model, tokens = config.model, config.data.batch_size * config.data.seq_len
    layers = sum(layer_flops(model, kind, config.data.seq_len) for kind in model.layer_kinds())
    return 3 * tokens * (layers + 2 * model.dim * VOCAB_SIZE)


def peak_rate(config: RunConfig, device: torch.device) -> tuple[float, str]:
    """Reference FLOP/s of mfu, and a description."""
    precision = config.trainer.precision.name
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        known = card_peak(name, precision)
        if known is not None:
            return known, f"{name}'s peak in {precision}"
    return measured_rate(device, torch.float32 if precision == "fp32" else torch.bfloat16), "a measured product"


def card_peak(name: str, precision: str) -> float | None:
    """Peak FLOP/s of a GPU by its name; None if unknown."""
    for card, rates in PEAK_TFLOPS.items():  # longer names come first
        if card in name:
            return rates[precision] * 1e12 if precision in rates else None
    return None


def measured_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock = Stopwatch(device)

    def once(work: Callable[[], Any]) -> float:
        start = clock._now()
        work()
        return clock._now() - start

    return 2 * size**3 / min(once(lambda: a @ b) for _ in range(5))


def print_table(rows: list[dict[str, Any]]) -> None:
    line = "{:<18}{:>10}{:>14}{:>8}{:>12}{:>13}{:>8}  {}".format
    print(line("impl", "seconds", "tokens/s", "mfu", "peak MiB", "planned MiB", "time", "correct"))
    own = next((row["seconds"] for row in rows if row["impl"] == "ours" and row["correct"]), None)
    for row in rows:
        if not row["correct"]:
            print(line(row["impl"], *("-" * 6), VERDICT[row["correct"]]))
            continue
        times = f"{row['seconds'] / own:.2f}" if own else "-"
        cells = (
            row["seconds"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['mfu']:.1%}",
            row["peak_mib"],
            row["planned_mib"] or "-",
            times,
        )
        print(line(row["impl"], *cells, "yes"))
    for row in rows:
        if row.get("split"):
            total = sum(row["split"].values())
            parts = " | ".join(f"{name} {part / total:.0%}" for name, part in row["split"].items())
            print(f"{row['impl']}: {parts} ")
            print(f"mfu relative to {row['mfu_of']}")


if __name__ == "__main__":
    sys.exit(main())
