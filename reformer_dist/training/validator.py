"""Looks at a model in training: held-out loss, hash statistics, reversible drift, a sample of its text."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from reformer_dist.config import RunConfig
from reformer_dist.data import Corpus
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.generation import SamplingOptions, generate, make_decoder
from reformer_dist.models.base import ReformerModel
from reformer_dist.ops.lsh.bucket_stats import BucketStats
from reformer_dist.parallel import SlicedSequence
from reformer_dist.process.log import logger
from reformer_dist.tasks import HeldoutBatch, Rows, Task
from reformer_dist.training.batches import MicroBatch
from reformer_dist.training.evaluator import evaluate
from reformer_dist.training.metrics_log import MetricsLogger
from reformer_dist.training.preemption import StopSignal

PROMPT_TOKENS = 64
READ = {"source", "source_mask", "tokens", "key_padding_mask"}
"""What the stacks of a model read, by the names of its forward."""


class Validator:
    """Every rank makes the same calls, since ZeRO stage 3 gathers parameters in each of them."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        engine: TrainEngine,
        sequence: SlicedSequence,
        corpus: Corpus,
        task: Task,
        journal: MetricsLogger,
        stop: StopSignal,
    ) -> None:
        self._config, self._runtime, self._engine, self._sequence = config, runtime, engine, sequence
        self._corpus, self._task, self._journal, self._stop = corpus, task, journal, stop
        self._micro_batch, _ = config.micro_batching(runtime.world_size)

    def evaluate(self, step: int, seconds: float) -> None:
        """Held-out loss over data.eval_rows rows, and the bucket statistics of the model on the first of them.

        seconds: of training so far. Raises Preempted alike on every rank if any is told to stop meanwhile.
        """
        self._engine.train(False)
        mesh = self._sequence.mesh
        batches = self._batches(self._config.data.eval_rows, self._micro_batch, mesh.dp_rank, mesh.dp_size)
        batches = self._stop.until_stopped(batches, self._runtime)
        result = evaluate(
            self._engine.forward,
            batches,
            self._task,
            self._runtime,
            self._sequence,
        )
        logger.info(f"step {step} | {result}")
        values = {f"eval/{name}": value for name, value in result.values().items()}
        self._journal.scalars({**values, **self._health()}, step, seconds)
        self._engine.train(True)

    def sample(self, step: int) -> None:
        """A text that goes on from the first held-out tokens; every rank writes it, whole."""
        self._engine.train(False)
        prompt = self._first_rows()["tokens"][0, 1 : PROMPT_TOKENS + 1].to(self._runtime.device)
        longest = self._config.model.max_positions or self._config.data.seq_len
        n_tokens = max(0, min(self._config.trainer.sample_tokens, longest - prompt.numel()))
        options = SamplingOptions(seed=self._config.trainer.seed)
        # through the engine, whose stage 3 gathers each layer's weights for every call
        decoder = make_decoder(self._engine.forward, self._config.model)
        tokens = generate(decoder, prompt, n_tokens, options)
        drawn = list(self._stop.until_stopped(tokens, self._runtime))
        tokenizer = self._corpus.tokenizer
        self._journal.text("sample", tokenizer.decode(prompt.tolist()) + "⟦…⟧" + tokenizer.decode(drawn), step)
        self._engine.train(True)

    def _batches(self, rows: int, micro_batch: int, rank: int, size: int) -> Iterator[HeldoutBatch]:
        share = self._config.data.max_damaged_fraction
        return self._task.heldout(self._corpus, Rows(rows, micro_batch, rank, size, share))

    def _first_rows(self) -> dict[str, Tensor]:
        """The first held-out row, on every rank the same."""
        return self._runtime.together(lambda: next(self._batches(1, 1, 0, 1)).tensors)

    @torch.no_grad()
    def _health(self) -> dict[str, float]:
        model = self._engine.module
        rows = MicroBatch.of(self._first_rows(), self._sequence, labels_per_row=self._task.labels_per_row)
        given = rows.to(self._runtime.device)
        bucket_stats: list[BucketStats] = []
        values = {}
        with self._engine.autocast():
            model(**given, **rows.sequences, bucket_stats=bucket_stats)
            if isinstance(model, ReformerModel):
                read: dict[str, Any] = {name: given[name] for name in READ & given.keys()}
                read |= rows.sequences
                drift = model.reversible_drift(**read).item()
                values["reversible/drift"] = max(self._runtime.gather(drift))
        if bucket_stats:
            values["lsh/largest_bucket_over_mean"] = fmean(layer.largest_over_mean for layer in bucket_stats)
            values["lsh/full_windows"] = fmean(layer.full_windows for layer in bucket_stats)
            agreement = self._runtime.sum([fmean(layer.agreement for layer in bucket_stats)])[0]
            values["lsh/agreement_of_rounds"] = agreement / self._runtime.world_size
        return values
