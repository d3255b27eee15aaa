"""Extractive question answering: the answer is a span of a context. Long contexts are read in windows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reformer_dist.config.checks import require
from reformer_dist.data import Corpus, DrawKey, Example, RowSelection, Sample
from reformer_dist.errors import DataError
from reformer_dist.models import ReformerForQuestionAnswering
from reformer_dist.models.sequence import SequenceAccess
from reformer_dist.tasks.base import AllGather, SampleTask, TaskMetrics, concat_ids, device_of, model_inputs
from reformer_dist.tasks.text_metrics import answer_f1, exact_match, max_over_answers

ANY_WINDOW_PERIOD = 4  # one row in 4 draws from all windows, the others from those that hold the answer


@dataclass(frozen=True, eq=False)
class ContextWindow:
    """A row of question, end-of-text, tokens [start, end) of the context, end-of-text."""

    tokens: NDArray[np.int64]
    context_offset: int
    """Index in the row of the first context token."""
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.tokens) - self.context_offset - 1

    @property
    def answer_mask(self) -> NDArray[np.bool_]:
        """Tokens that an answer may hold, and the last one, which means "no answer"."""
        return np.arange(len(self.tokens)) >= self.context_offset


@dataclass(frozen=True)
class TokenSpan:
    """Tokens [first, stop) of a context, empty if no window has room for any."""

    first: int
    stop: int
    score: float
    """Sum of the logits of the first and last token, minus that of "no answer" in the same window."""


class QuestionAnswering(SampleTask):
    """Training reads one window of each sample, usually one with the answer; evaluation reads all windows."""

    field_names = ("question", "context")
    labels_per_row = True
    shards_args = "--squad FILE.json"

    def build_model(self) -> nn.Module:
        return ReformerForQuestionAnswering(self.config.model, self.vocab_size, self.config.trainer.seed)

    def check(self, corpus: Corpus) -> None:
        """Also raises ConfigError if the overlap of windows exceeds their length."""
        super().check(corpus)
        stride, seq_len = self.config.task.stride, self.config.data.seq_len
        limit = f"must be below {seq_len - 2}, the most that a window of data.seq_len={seq_len} holds of a context"
        require(stride < seq_len - 2, "task.stride", stride, limit)
        if not self.tokenizer.is_lossless:
            problem = "its SentencePiece vocabulary normalizes text, which shifts answers"
            hint = f"write it with reformer-shards {self.shards_args} --tokenizer bytes or bpe"
            raise DataError(f"data.path={corpus.where}: {problem}; {hint}")

    def encode(self, sample: Sample, draw_key: DrawKey) -> Example:
        first, last = self._answer_tokens(sample)
        windows = self._windows(sample)
        with_answer = [window for window in windows if window.start <= first and last < window.end]
        draw, choice = draw_key.bits(self.config.trainer.seed, "windows").random_raw(2)
        candidates = windows if draw % ANY_WINDOW_PERIOD == 0 or not with_answer else with_answer
        window = candidates[int(choice % len(candidates))]
        shift, no_answer = window.context_offset - window.start, len(window.tokens) - 1
        labels = [first + shift, last + shift] if window in with_answer else [no_answer, no_answer]
        return {**_inputs(window), "labels": np.array(labels)}

    def padding_metadata(self) -> dict[str, Any]:
        return {"answers": [[0, ""]]}

    def predict(self, outputs: Any, sequence: SequenceAccess) -> Tensor:
        ends = torch.stack(outputs, dim=1)  # [B, 2, local tokens]
        return torch.cat(sequence.gather(ends).unbind(), dim=-1).argmax(-1)

    @torch.no_grad()
    def measure(self, model: nn.Module, corpus: Corpus, rows: RowSelection, gather: AllGather) -> TaskMetrics:
        scores: list[tuple[float, float]] = []
        for sample in self.samples(corpus, rows):
            span = self.best_span(model, sample, rows.micro_batch_size)
            answer = self.text_of(sample, span)
            truths = [text for _, text in sample.metadata["answers"]]
            scores.append(
                (max_over_answers(exact_match, answer, truths), max_over_answers(answer_f1, answer, truths))
            )
        scores = gather(scores)
        exact, f1 = (100 * fmean(each) for each in zip(*scores, strict=True))
        lines = [f"questions: {len(scores):,}", f"exact match: {exact:.2f}", f"F1: {f1:.2f}"]
        return TaskMetrics({"exact_match": exact, "f1": f1}, lines)

    def _windows(self, sample: Sample) -> list[ContextWindow]:
        """All windows of a sample. Consecutive windows share task.stride tokens, but at most half of their length.

        A long question leaves short windows, of which a larger overlap would require thousands.
        """
        seq_len, eos = self.config.data.seq_len, [self.tokenizer.eos_id]
        question = sample.fields[0][: max(0, seq_len // 2 - 2)]
        context = sample.fields[1]
        length = seq_len - len(question) - 2
        step = length - min(self.config.task.stride, length // 2)
        starts = [0]
        while starts[-1] + length < len(context):
            starts.append(starts[-1] + step)
        return [
            ContextWindow(
                concat_ids(question, eos, context[start : start + length], eos), len(question) + 1, start
            )
            for start in starts
        ]

    def _answer_tokens(self, sample: Sample) -> tuple[int, int]:
        """(first, last) context token of the first answer."""
        start, text = sample.metadata["answers"][0]
        token_ends = np.cumsum(self.tokenizer.token_bytes[sample.fields[1]])
        last_byte = max(start, start + len(text.encode()) - 1)
        first, last = np.searchsorted(token_ends, [start, last_byte], side="right")
        return int(first), int(last)

    def text_of(self, sample: Sample, span: TokenSpan) -> str:
        return self.tokenizer.decode(sample.fields[1][span.first : span.stop]).strip()

    @torch.no_grad()
    def best_span(self, model: nn.Module, sample: Sample, micro_batch_size: int) -> TokenSpan:
        """The best span over all windows of a context, scored relative to the "no answer" score of its window."""
        best = TokenSpan(0, 0, -np.inf)
        windows, device = iter(self._windows(sample)), device_of(model)
        while group := list(islice(windows, micro_batch_size)):
            logits = model(**model_inputs([_inputs(window) for window in group], device))
            for window, starts, ends in zip(group, *(part.float().cpu() for part in logits), strict=True):
                span = self._best_of_window(window, starts, ends)
                best = span if span.score > best.score else best
        return best

    def _best_of_window(self, window: ContextWindow, starts: Tensor, ends: Tensor) -> TokenSpan:
        """From start and end logits [S] of a window."""
        last = len(window.tokens) - 1
        no_answer = starts[last] + ends[last]
        starts, ends = starts[window.context_offset : last], ends[window.context_offset : last]
        n = len(starts)
        if n == 0:
            return TokenSpan(0, 0, -np.inf)
        # the best end of each start, one length at a time: a table of all pairs would be quadratic in the window
        scores, lengths = torch.full((n,), -torch.inf), torch.zeros(n, dtype=torch.int64)
        for length in range(min(n, self.config.task.max_answer_tokens)):
            candidates = starts[: n - length] + ends[length:]
            is_better = candidates > scores[: n - length]
            scores[: n - length][is_better] = candidates[is_better]
            lengths[: n - length][is_better] = length
        best = int(scores.argmax())
        first = window.start + best
        return TokenSpan(first, first + int(lengths[best]) + 1, float(scores[best] - no_answer))


def _inputs(window: ContextWindow) -> Example:
    mask = np.ones(len(window.tokens), dtype=bool)
    return {"tokens": window.tokens, "key_padding_mask": mask, "answer_mask": window.answer_mask}
