"""Validator: held-out loss, bucket statistics, reversible drift and text samples of a model in training."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch

from reformer_dist.config import AttentionKind
from reformer_dist.data import Batch, RowSelection
from reformer_dist.diagnostics.coverage import CoverageSequence
from reformer_dist.engine import TrainEngine
from reformer_dist.generation import SamplingOptions, generate, make_decoder
from reformer_dist.generation.decoder import last_document
from reformer_dist.models import ReformerLM
from reformer_dist.models.base import ReformerModel
from reformer_dist.ops.lsh.bucket_stats import BucketStats
from reformer_dist.process.log import logger
from reformer_dist.training.alarms import Alarms
from reformer_dist.training.batches import MicroBatch, interruptible
from reformer_dist.training.evaluation import EvalResult, evaluate
from reformer_dist.training.metrics_log import MetricsLogger
from reformer_dist.training.parts import RunContext, StepLayout, TaskData

PROMPT_TOKENS = 64
COVERAGE_QUERIES = 128  # of the first held-out row
STACK_INPUTS = {"source", "source_mask", "tokens", "key_padding_mask", "document_ids", "position_ids"}
"""Inputs of a model's layer stacks, by the names of its forward."""


class Validator:
    """Evaluates a model in training. Every rank makes the same calls: ZeRO stage 3 gathers parameters in each."""

    def __init__(
        self, run: RunContext, data: TaskData, layout: StepLayout, engine: TrainEngine, metrics: MetricsLogger
    ) -> None:
        self._config, self._runtime, self._stop = run.config, run.runtime, run.stop
        self._data, self._layout, self._engine, self._metrics = data, layout, engine, metrics
        self._alarms = Alarms(run.config)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that `evaluate` returns."""
        task = self._data.task
        names = [
            "loss",
            *([] if task.token_bytes is None else ["bits_per_byte"]),
            *(["accuracy"] if task.reports_accuracy else []),
        ]
        groups = ["eval", *(["eval_average"] if self._engine.average is not None else [])]
        return [f"{group}/{name}" for group in groups for name in names]

    def evaluate(self, step: int, seconds: float) -> dict[str, float]:
        """Logs and returns held-out metrics over data.eval_rows rows, also of the average of the weights, if any.

        Logs model statistics on the first row.
        seconds: time spent training so far. Raises Preempted on every rank if any receives a stop signal.
        """
        self._engine.train(False)
        result = self._evaluate_rows(step, by_position=self._data.task.config.task.packs_text)
        values = {f"eval/{name}": value for name, value in result.values().items()}
        if self._engine.average is not None:
            with self._engine.averaged_weights():
                averaged = self._evaluate_rows(step, of="average of the weights: ")
            values |= {f"eval_average/{name}": value for name, value in averaged.values().items()}
        positions = {f"eval_by_position/{name}": value for name, value in result.position_values().items()}
        self._metrics.scalars({**values, **positions, **self._model_stats(step)}, step, seconds)
        self._engine.train(True)
        return values

    def _evaluate_rows(self, step: int, *, of: str = "", by_position: bool = False) -> EvalResult:
        """Evaluates and logs. of: whose result it is, if not that of the model's weights."""
        sequence = self._layout.sequence
        dp_rank, dp_size = sequence.mesh.dp_rank, sequence.mesh.dp_size
        rows = self._select_rows(self._config.data.eval_rows, self._layout.micro_batch, dp_rank, dp_size)
        batches = self._stop.until_stopped(interruptible(self._batches(rows), self._stop), self._runtime)
        task, forward = self._data.task, self._engine.forward
        result = evaluate(forward, batches, task, self._runtime, sequence, by_position=by_position)
        logger.info(f"step {step} | {of}{result} | {rows.describe(task.count_rows(self._data.corpus))}")
        return result

    def generate_text(self, step: int) -> None:
        """Logs a continuation of the first held-out tokens, which every rank generates in full."""
        self._engine.train(False)
        prompt = self._first_row()["tokens"][0, 1 : PROMPT_TOKENS + 1].to(self._runtime.device)
        if self._config.data.mask_documents:
            prompt = last_document(prompt, self._data.corpus.tokenizer.eos_id)
        max_len = self._config.model.max_positions or self._config.data.seq_len
        n_tokens = max(0, min(self._config.trainer.sample_tokens, max_len - prompt.numel()))
        options = SamplingOptions(seed=self._config.trainer.seed)
        # the engine's forward, which gathers each layer's weights at ZeRO stage 3
        tokens = generate(make_decoder(self._engine.forward, self._config.model), prompt, n_tokens, options)
        generated = list(self._stop.until_stopped(tokens, self._runtime))
        decode = self._data.corpus.tokenizer.decode
        self._metrics.text("sample", f"{decode(prompt.tolist())}⟦…⟧{decode(generated)}", step)
        self._engine.train(True)

    def _select_rows(self, n_rows: int, micro_batch: int, rank: int, size: int) -> RowSelection:
        return RowSelection(n_rows, micro_batch, rank, size, self._config.data.max_damaged_fraction)

    def _batches(self, rows: RowSelection) -> Iterator[Batch]:
        return self._data.task.heldout(self._data.corpus, rows)

    def _first_row(self) -> Batch:
        """The first held-out row, the same on every rank."""
        return self._runtime.together(lambda: next(self._batches(self._select_rows(1, 1, 0, 1))))

    @torch.no_grad()
    def _model_stats(self, step: int) -> dict[str, float]:
        model = self._engine.module
        batch = MicroBatch.from_rows(
            self._first_row(), self._layout.sequence, labels_per_row=self._data.task.labels_per_row
        )
        inputs, coverage = batch.to(self._runtime.device), CoverageSequence(COVERAGE_QUERIES)
        measured = {"sequence": coverage} if self._can_measure_coverage() else {}
        bucket_stats: list[BucketStats] = []
        values = {}
        with self._engine.autocast():
            model(**{**inputs, **batch.sequences, **measured}, bucket_stats=bucket_stats)
            if isinstance(model, ReformerModel):
                stack_inputs: dict[str, Any] = {name: inputs[name] for name in STACK_INPUTS & inputs.keys()}
                stack_inputs |= batch.sequences
                drift = model.reversible_drift(**stack_inputs).item()
                values["reversible/drift"] = max(self._runtime.gather(drift))
                self._alarms.check_drift(values["reversible/drift"])
        for index, layer in enumerate(bucket_stats):
            self._metrics.histogram(
                f"lsh/bucket_size_over_mean/{index}", layer.sizes_over_mean.double().numpy(force=True), step
            )
        if bucket_stats:
            values["lsh/largest_bucket_over_mean"] = fmean(layer.largest_over_mean for layer in bucket_stats)
            values["lsh/full_windows"] = fmean(layer.full_windows for layer in bucket_stats)
            agreement = self._runtime.sum([fmean(layer.agreement for layer in bucket_stats)])[0]
            values["lsh/agreement_of_rounds"] = agreement / self._runtime.world_size
        if coverage.layers:
            fractions = [layer.fractions() for layer in coverage.layers]
            values["lsh/coverage"] = fmean(layer["mass"] for layer in fractions)
            values["lsh/coverage_by_chance"] = fmean(layer["pairs"] for layer in fractions)
            values |= {f"coverage_by_layer/{index}": layer["mass"] for index, layer in enumerate(fractions)}
            self._alarms.check_coverage([layer.by_head() for layer in coverage.layers])
        return values

    def _can_measure_coverage(self) -> bool:
        """Whether the model has LSH layers of rows that are whole on each rank."""
        model = self._engine.module
        return (
            isinstance(model, ReformerLM)
            and AttentionKind.lsh in model.config.layers
            and self._layout.sequence.mesh.size == 1
            and not model.config.compat.chunk_wrap
        )
