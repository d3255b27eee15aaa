"""Extractive question answering: the span of a context that is the answer. Long contexts are read in windows."""

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
from reformer_dist.data import Batch, Corpus, DrawKey, Example, RowSelection, Sample, collate
from reformer_dist.errors import DataError
from reformer_dist.models import ReformerForQuestionAnswering
from reformer_dist.models.sequence import SequenceAccess
from reformer_dist.tasks.base import AllGather, SampleTask, concat_ids, device_of
from reformer_dist.tasks.text_metrics import answer_f1, best_over, exact_match

ANY_WINDOW_PERIOD = 4  # one row in 4 takes any window rather than one that holds the answer


@dataclass(frozen=True, eq=False)
class ContextWindow:
    """A row of question, end-of-text, tokens [start, end) of the context, end-of-text."""

    tokens: NDArray[np.int64]
    context_at: int
    """Index in the row of the first context token."""
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.tokens) - self.context_at - 1

    @property
    def answer_mask(self) -> NDArray[np.bool_]:
        """Tokens that an answer may hold, besides the last one, which stands for "no answer"."""
        return np.arange(len(self.tokens)) >= self.context_at


class QuestionAnswering(SampleTask):
    """Training reads one window of each sample, usually one with the answer; evaluation reads all windows."""

    field_names = ("question", "context")
    labels_per_row = True
    make_shards_args = "--squad FILE.json"

    def build_model(self) -> nn.Module:
        return ReformerForQuestionAnswering(self.config.model, self.vocab_size, self.config.trainer.seed)

    def check(self, corpus: Corpus) -> None:
        """Also raises ConfigError if the overlap of windows exceeds their length."""
        super().check(corpus)
        stride, seq_len = self.config.task.stride, self.config.data.seq_len
        right = f"must be below {seq_len - 2}, the most that a window of data.seq_len={seq_len} holds of a context"
        require(stride < seq_len - 2, "task.stride", stride, right)
        if not self.tokenizer.is_lossless:
            right = f"write it with make_shards.py {self.make_shards_args} --tokenizer bytes or bpe"
            raise DataError(
                f"data.path={corpus.where}: its vocabulary is of SentencePiece, which normalises texts and so "
                f"moves answers; {right}"
            )

    def encode(self, sample: Sample, draw_key: DrawKey) -> Example:
        first, last = self._answer_tokens(sample)
        windows = self._windows(sample)
        with_answer = [window for window in windows if window.start <= first and last < window.end]
        draw, choice = draw_key.bits(self.config.trainer.seed, "windows").random_raw(2)
        candidates = windows if draw % ANY_WINDOW_PERIOD == 0 or not with_answer else with_answer
        window = candidates[int(choice % len(candidates))]
        shift, no_answer = window.context_at - window.start, len(window.tokens) - 1
        labels = [first + shift, last + shift] if window in with_answer else [no_answer, no_answer]
        return {**_inputs(window), "labels": np.array(labels)}

    def padding_metadata(self) -> dict[str, Any]:
        return {"answers": [[0, ""]]}

    def predict(self, outputs: Any, sequence: SequenceAccess) -> Tensor:
        ends = torch.stack(outputs, dim=1)  # [B, 2, local tokens]
        return torch.cat(sequence.gather(ends).unbind(), dim=-1).argmax(-1)

    @torch.no_grad()
    def measure(self, model: nn.Module, corpus: Corpus, rows: RowSelection, gather: AllGather) -> list[str]:
        scores: list[tuple[float, float]] = []
        for sample in self.samples(corpus, rows):
            answer = self._answer(model, sample, rows.micro_batch_size)
            truths = [text for _, text in sample.metadata["answers"]]
            scores.append((best_over(exact_match, answer, truths), best_over(answer_f1, answer, truths)))
        scores = gather(scores)
        return [
            f"questions: {len(scores):,}",
            f"exact match: {100 * fmean(score[0] for score in scores):.2f}",
            f"F1: {100 * fmean(score[1] for score in scores):.2f}",
        ]

    def _windows(self, sample: Sample) -> list[ContextWindow]:
        """All windows of a sample. Consecutive windows share task.stride tokens, but at most half of their length.

        Long questions leave short windows, and a larger overlap would cut the context into thousands of them.
        """
        seq_len, eos = self.config.data.seq_len, [self.tokenizer.eos_id]
        question = sample.fields[0][: max(0, seq_len // 2 - 2)]
        context = sample.fields[1]
        room = seq_len - len(question) - 2
        step = room - min(self.config.task.stride, room // 2)
        starts = [0]
        while starts[-1] + room < len(context):
            starts.append(starts[-1] + step)
        return [
            ContextWindow(concat_ids(question, eos, context[start : start + room], eos), len(question) + 1, start)
            for start in starts
        ]

    def _answer_tokens(self, sample: Sample) -> tuple[int, int]:
        """(first, last) context token of the first answer."""
        at, text = sample.metadata["answers"][0]
        ends = np.cumsum(self.tokenizer.token_bytes[sample.fields[1]])
        first, last = np.searchsorted(ends, [at, max(at, at + len(text.encode()) - 1)], side="right")
        return int(first), int(last)

    def _answer(self, model: nn.Module, sample: Sample, micro_batch_size: int) -> str:
        """Text of the best span over all windows, scored relative to the "no answer" score of its window."""
        best, best_score = (0, -1), -np.inf
        windows = iter(self._windows(sample))
        while group := list(islice(windows, micro_batch_size)):
            batch = collate([_inputs(window) for window in group])
            first, last = _forward(model, batch)
            for window, starts, ends in zip(group, first, last, strict=True):
                span, score = self._best_span(window, starts, ends)
                if score > best_score:
                    best, best_score = span, score
        return self.tokenizer.decode(sample.fields[1][best[0] : best[1] + 1]).strip()

    def _best_span(self, window: ContextWindow, starts: Tensor, ends: Tensor) -> tuple[tuple[int, int], float]:
        """((first, last) context token, score) from start and end logits [S] of a window."""
        stop = len(window.tokens) - 1
        no_answer = starts[stop] + ends[stop]
        starts, ends = starts[window.context_at : stop], ends[window.context_at : stop]
        n = len(starts)
        if n == 0:
            return (0, -1), -float("inf")
        # the best end of each start, one length at a time: a table of all pairs would be quadratic in the window
        scores, lengths = torch.full((n,), -torch.inf), torch.zeros(n, dtype=torch.int64)
        for length in range(min(n, self.config.task.max_answer_tokens)):
            of_length = starts[: n - length] + ends[length:]
            is_better = of_length > scores[: n - length]
            scores[: n - length][is_better] = of_length[is_better]
            lengths[: n - length][is_better] = length
        at = int(scores.argmax())
        first = window.start + at
        return (first, first + int(lengths[at])), float(scores[at] - no_answer)


def _inputs(window: ContextWindow) -> Example:
    mask = np.ones(len(window.tokens), dtype=bool)
    return {"tokens": window.tokens, "key_padding_mask": mask, "answer_mask": window.answer_mask}


def _forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    device = device_of(model)
    first, last = model(**{name: tensor.to(device) for name, tensor in batch.items()})
    return first.float().cpu(), last.float().cpu()
