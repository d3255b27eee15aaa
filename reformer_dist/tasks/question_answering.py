"""Question answering: where in a context the answer lies. A context that is too long is read through windows."""

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
from reformer_dist.data import Batch, Corpus, Example, Sample, DrawKey, collate, seeded_bits
from reformer_dist.errors import DataError
from reformer_dist.models import ReformerForQuestionAnswering
from reformer_dist.models.sequence import SequenceAccess
from reformer_dist.tasks.metrics import answer_f1, best_over, exact_match
from reformer_dist.tasks.base import Gather, Rows, SampleTask, device_of, row_of

ANYWHERE = 4  # one visit in so many sees a window that is drawn from all, whether or not it has the answer


@dataclass(frozen=True, eq=False)
class Window:
    """A row of question, end of text, part of the context, end of text."""

    tokens: NDArray[np.int64]
    context_at: int
    """Where in the row the context begins."""
    start: int
    """Which of the context's tokens is the first there."""

    @property
    def end(self) -> int:
        """Which of the context's tokens is the first that it does not hold."""
        return self.start + len(self.tokens) - self.context_at - 1

    @property
    def answer_mask(self) -> NDArray[np.bool_]:
        """Where an answer may lie; the last token stands for none."""
        return np.arange(len(self.tokens)) >= self.context_at


class QuestionAnswering(SampleTask):
    """In training a sample is seen through one window, mostly one with the answer; in evaluation through all."""

    needs = ("question", "context")
    labels_per_row = True
    make_shards_args = "--squad FILE.json"

    def build_model(self) -> nn.Module:
        return ReformerForQuestionAnswering(self.config.model, self.vocab_size, self.config.trainer.seed)

    def check(self, corpus: Corpus) -> None:
        """Raises ConfigError, too, where windows would have to share more than they can hold."""
        super().check(corpus)
        stride, seq_len = self.config.task.stride, self.config.data.seq_len
        right = f"must be below {seq_len - 2}, the most that a window of data.seq_len={seq_len} holds of a context"
        require(stride < seq_len - 2, "task.stride", stride, right)
        if not self.tokenizer.is_lossless:
            right = f"write it with make_shards.py {self.make_shards_args} --tokenizer bytes or bpe"
            raise DataError(
                f"data.path={corpus.where}: its vocabulary is of SentencePiece, which normalises texts, so that "
                f"answers do not stand where they are said to; {right}"
            )

    def example(self, sample: Sample, visit: DrawKey) -> Example:
        first, last = self._answer_tokens(sample)
        windows = self._windows(sample)
        with_answer = [window for window in windows if window.start <= first and last < window.end]
        stream, lane, place = visit
        draw, which = seeded_bits(self.config.trainer.seed, f"windows/{stream}/{lane}", place).random_raw(2)
        among = windows if draw % ANYWHERE == 0 or not with_answer else with_answer
        window = among[int(which % len(among))]
        shift, none = window.context_at - window.start, len(window.tokens) - 1
        labels = [first + shift, last + shift] if window in with_answer else [none, none]
        return {**_tensors(window), "labels": np.array(labels)}

    def blank_facts(self) -> dict[str, Any]:
        return {"answers": [[0, ""]]}

    def predict(self, outputs: Any, sequence: SequenceAccess) -> Tensor:
        ends = torch.stack(outputs, dim=1)  # [B, 2, tokens at hand]
        return torch.cat(sequence.gather(ends).unbind(), dim=-1).argmax(-1)

    @torch.no_grad()
    def measure(self, model: nn.Module, corpus: Corpus, rows: Rows, gather: Gather) -> list[str]:
        scores: list[tuple[float, float]] = []
        for sample in self.samples(corpus, rows):
            answer, truths = self._answer(model, sample, rows.micro_batch), [t for _, t in sample.facts["answers"]]
            scores.append((best_over(exact_match, answer, truths), best_over(answer_f1, answer, truths)))
        scores = gather(scores)
        return [
            f"questions: {len(scores):,}",
            f"exact match: {100 * fmean(score[0] for score in scores):.2f}",
            f"F1: {100 * fmean(score[1] for score in scores):.2f}",
        ]

    def _windows(self, sample: Sample) -> list[Window]:
        """All windows of a sample: each shares task.stride tokens with the last, at most half of what it holds.

        A long question leaves little room: by more in common a context would be read through thousands of windows.
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
            Window(row_of(question, eos, context[start : start + room], eos), len(question) + 1, start)
            for start in starts
        ]

    def _answer_tokens(self, sample: Sample) -> tuple[int, int]:
        """First and last token of the first answer in the context."""
        at, text = sample.facts["answers"][0]
        ends = np.cumsum(self.tokenizer.token_bytes[sample.fields[1]])
        first, last = np.searchsorted(ends, [at, max(at, at + len(text.encode()) - 1)], side="right")
        return int(first), int(last)

    def _answer(self, model: nn.Module, sample: Sample, micro_batch: int) -> str:
        """The best span over all windows, measured against what each has for "not here"."""
        best, best_score = (0, -1), -np.inf
        windows = iter(self._windows(sample))
        while some := list(islice(windows, micro_batch)):
            batch = collate([_tensors(window) for window in some])
            first, last = _forward(model, batch)
            for window, starts, ends in zip(some, first, last, strict=True):
                span, score = self._best_span(window, starts, ends)
                if score > best_score:
                    best, best_score = span, score
        return self.tokenizer.decode(sample.fields[1][best[0] : best[1] + 1]).strip()

    def _best_span(self, window: Window, starts: Tensor, ends: Tensor) -> tuple[tuple[int, int], float]:
        """((first, last) token of the context, score) of a window's logits [S]."""
        stop = len(window.tokens) - 1
        none = starts[stop] + ends[stop]
        starts, ends = starts[window.context_at : stop], ends[window.context_at : stop]
        n = len(starts)
        if n == 0:
            return (0, -1), -float("inf")
        # the best of each start, by length: what all pairs would take grows with the square of the window
        scores, lengths = torch.full((n,), -torch.inf), torch.zeros(n, dtype=torch.int64)
        for length in range(min(n, self.config.task.max_answer_tokens)):
            of_length = starts[: n - length] + ends[length:]
            is_better = of_length > scores[: n - length]
            scores[: n - length][is_better] = of_length[is_better]
            lengths[: n - length][is_better] = length
        at = int(scores.argmax())
        first = window.start + at
        return (first, first + int(lengths[at])), float(scores[at] - none)


def _tensors(window: Window) -> Example:
    mask = np.ones(len(window.tokens), dtype=bool)
    return {"tokens": window.tokens, "key_padding_mask": mask, "answer_mask": window.answer_mask}


def _forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    device = device_of(model)
    first, last = model(**{name: tensor.to(device) for name, tensor in batch.items()})
    return first.float().cpu(), last.float().cpu()
