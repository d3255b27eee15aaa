"""Looks at a model in training: held-out loss, health of its hashing, reversible drift, a sample of its text."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

import torch
from torch import Tensor

from reformer_dist.config import RunConfig
from reformer_dist.data import Corpus, EvalBatch, heldout_batches
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.generation import SamplingOptions, generate, make_decoder
from reformer_dist.log import logger
from reformer_dist.models import ReformerLM
from reformer_dist.ops.lsh.health import LSHHealth
from reformer_dist.parallel import SlicedSequence
from reformer_dist.training.evaluator import evaluate
from reformer_dist.training.journal import Journal
from reformer_dist.training.stopping import StopSignal

PROMPT_TOKENS = 64


class Probes:
    """Every rank makes the same calls, since ZeRO stage 3 gathers parameters in each of them."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        engine: TrainEngine,
        sequence: SlicedSequence,
        corpus: Corpus,
        journal: Journal,
        stop: StopSignal,
    ) -> None:
        self._config, self._runtime, self._engine, self._sequence = config, runtime, engine, sequence
        self._corpus, self._journal, self._stop = corpus, journal, stop
        self._token_bytes = torch.from_numpy(corpus.tokenizer.token_bytes)
        self._micro_batch, _ = config.micro_batching(runtime.world_size)

    def evaluate(self, step: int, seconds: float) -> None:
        """Held-out loss over data.eval_rows rows, and the health of the model on the first of them.

        seconds: of training so far. Raises Preempted alike on every rank if any is told to stop meanwhile.
        """
        self._engine.train(False)
        grid = self._sequence.grid
        batches = self._batches(self._config.data.eval_rows, self._micro_batch, grid.dp_rank, grid.dp_size)
        batches = self._stop.until_stopped(batches, self._runtime)
        result = evaluate(self._engine.forward, batches, self._token_bytes, self._runtime, self._sequence)
        logger.info(
            f"step {step} | held-out loss {result.loss:.3f} | held-out bits per byte {result.bits_per_byte:.3f}"
        )
        values = {"eval/loss": result.loss, "eval/bits_per_byte": result.bits_per_byte}
        self._journal.scalars({**values, **self._health()}, step, seconds)
        self._engine.train(True)

    def sample(self, step: int) -> None:
        """A text that goes on from the first held-out tokens; every rank writes it, whole."""
        self._engine.train(False)
        prompt = self._first_row()[0, 1 : PROMPT_TOKENS + 1]
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

    def _batches(self, rows: int, micro_batch: int, rank: int, size: int) -> Iterator[EvalBatch]:
        return heldout_batches(
            self._corpus,
            seq_len=self._config.data.seq_len,
            rows=rows,
            micro_batch_size=micro_batch,
            dp_rank=rank,
            dp_size=size,
            max_damaged_share=self._config.data.max_damaged_share,
            report=lambda damage: logger.warning(f"not evaluated: {damage}"),
        )

    def _first_row(self) -> Tensor:
        """Inputs [1, seq_len] of the first held-out row, on every rank the same."""
        return next(self._batches(1, 1, 0, 1)).inputs.to(self._runtime.device)

    @torch.no_grad()
    def _health(self) -> dict[str, float]:
        model = self._engine.module
        assert isinstance(model, ReformerLM)
        row, sequence = self._sequence.take(self._first_row(), 0), self._sequence
        mask = sequence.key_padding_mask(1, row.device)
        health: list[LSHHealth] = []
        with self._engine.autocast():
            model(row, row, key_padding_mask=mask, health=health, sequence=sequence)
            drift = model.reversible_drift(row, key_padding_mask=mask, sequence=sequence).item()
        values = {"reversible/drift": max(self._runtime.gather(drift))}
        if health:
            values["lsh/largest_bucket_over_mean"] = fmean(layer.largest_over_mean for layer in health)
            values["lsh/full_windows"] = fmean(layer.full_windows for layer in health)
            agreement = self._runtime.sum([fmean(layer.agreement for layer in health)])[0]
            values["lsh/agreement_of_rounds"] = agreement / self._runtime.world_size
        return values
