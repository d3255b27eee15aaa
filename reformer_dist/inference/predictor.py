"""Predictor: a trained model with its tokenizer, and the predictions of its task."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reformer_dist.checkpoint import WeightChoice
from reformer_dist.config import TaskKind
from reformer_dist.data import IGNORE_INDEX, Sample
from reformer_dist.errors import ConfigError
from reformer_dist.inference.continuation import CollectedTexts, Prompt, generate_texts, text_options
from reformer_dist.inference.results import Answer, Candidate, Classification, FilledText, Target, TextScore
from reformer_dist.models.base import ReformerModel
from reformer_dist.ops.checks import check_integer
from reformer_dist.run.pretrained import LoadedModel, load_model
from reformer_dist.tasks import SequenceToSequence
from reformer_dist.tasks.base import concat_ids, model_inputs
from reformer_dist.tasks.masked_language_model import MaskedLanguageModel
from reformer_dist.tasks.question_answering import QuestionAnswering
from reformer_dist.tasks.sequence_classification import SequenceClassification

MASK = "<mask>"
BATCH_SIZE = 8
METHODS = {
    TaskKind.language_model: ("generate", "score", "embed"),
    TaskKind.completion: ("generate", "score", "embed"),
    TaskKind.masked_language_model: ("fill_mask", "embed"),
    TaskKind.sequence_classification: ("classify", "embed"),
    TaskKind.question_answering: ("answer", "embed"),
    TaskKind.sequence_to_sequence: ("write", "generate", "embed"),
}
"""What each kind of task offers, its own prediction first."""
INTEGERS = ("max_new_tokens", "samples", "top_k", "beams", "seed")
Input = TypeVar("Input")


def load_predictor(
    path: str | PathLike[str],
    overrides: Sequence[str],
    device: str | torch.device | None,
    *,
    average: bool,
    best: bool,
) -> Predictor:
    """See `reformer_dist.load`."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    choice = WeightChoice(averaged=average, best=best)
    return Predictor(load_model(Path(path), list(overrides), torch.device(device or default), choice))


class Predictor:
    """A loaded model. Each method takes one text or a list of them, and returns one result or a list.

    Lists are predicted in batches of batch_size, with the results of one by one, up to rounding. A method that the
    task of the model does not offer raises ConfigError, which names those that it does.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self.config, self.tokenizer, self.task = loaded.config, loaded.tokenizer, loaded.task
        self.model: nn.Module = loaded.model
        """In evaluation mode."""
        self.checkpoint, self.step = loaded.checkpoint, loaded.step
        self.labels = loaded.task.labels
        """Of a classifier."""

    def generate(
        self,
        prompt: str | list[str] = "",
        *,
        max_new_tokens: int = 200,
        samples: int = 1,
        stop: str | Sequence[str] = (),
        **options: Any,
    ) -> Any:
        """Texts that continue prompts, without these, or the targets of sources of sequence_to_sequence.

        Returns a str for a prompt and a list for a list of them; with samples above 1, each is a list of texts.
        The other options are those of reformer-generate, with the same defaults: temperature, top_k, top_p,
        repetition_penalty, beams, length_penalty and seed.
        """
        self._require("generate")
        prompts = _as_list("prompt", prompt)
        stops = [stop] if isinstance(stop, str) else stop
        given = {"max_new_tokens": max_new_tokens, "samples": samples, **options}
        for name in INTEGERS:
            if given.get(name) is not None:
                check_integer(name, given[name])
        try:
            settings = text_options(**given, stop=stops)
            writer = CollectedTexts(len(prompts) * samples)
            named = [Prompt("prompt", text.encode(errors="surrogateescape")) for text in prompts]
            generate_texts(self._loaded, named, settings, writer)
        except ConfigError as error:
            raise ConfigError(_as_arguments(str(error))) from error
        rows = [writer.texts[first : first + samples] for first in range(0, len(writer.texts), samples)]
        results = [row[0] for row in rows] if samples == 1 else rows
        return results[0] if isinstance(prompt, str) else results

    @overload
    def score(self, text: str, *, batch_size: int = BATCH_SIZE) -> TextScore: ...
    @overload
    def score(self, text: list[str], *, batch_size: int = BATCH_SIZE) -> list[TextScore]: ...
    @torch.no_grad()
    def score(self, text: str | list[str], *, batch_size: int = BATCH_SIZE) -> TextScore | list[TextScore]:
        """The log-probability of texts, each after an end-of-text token."""
        self._require("score")
        model, lengths = self._loaded.language_model, self.tokenizer.token_bytes

        def score(rows: Sequence[NDArray[Any]]) -> Iterator[TextScore]:
            examples = [
                {"tokens": row[:-1], "key_padding_mask": np.ones(len(row) - 1, dtype=bool)} for row in rows
            ]
            batch = model_inputs(examples, self._device)
            labels = torch.full_like(batch["tokens"], IGNORE_INDEX)
            for number, row in enumerate(rows):
                labels[number, : len(row) - 1] = torch.from_numpy(row[1:])
            losses = model(**batch, labels=labels, per_token_loss=True).sum(dim=1).tolist()
            for loss, row in zip(losses, rows, strict=True):
                yield TextScore(-loss, len(row) - 1, int(lengths[row[1:]].sum()))

        def encode(each: str) -> NDArray[Any]:
            row = concat_ids([self.tokenizer.eos_id], self._encode(each))
            if len(row) < 2:
                raise ConfigError(f"text={each!r}: has no tokens; give a text to score")
            return self._check_length(row, "text", len(row) - 1)

        return _batched(text, "text", encode, score, batch_size)

    @overload
    def embed(self, text: str, *, batch_size: int = BATCH_SIZE) -> Tensor: ...
    @overload
    def embed(self, text: list[str], *, batch_size: int = BATCH_SIZE) -> list[Tensor]: ...
    @torch.no_grad()
    def embed(self, text: str | list[str], *, batch_size: int = BATCH_SIZE) -> Tensor | list[Tensor]:
        """Vectors of texts, [output_dim] float32 on the CPU: means of the hidden states of their tokens.

        As in training, end-of-text precedes a text that a causal model reads, and follows other texts. Of an
        encoder-decoder, the hidden states are the encoder's.
        """
        model, eos = self.model, [self.tokenizer.eos_id]
        assert isinstance(model, ReformerModel)
        is_first = self.config.model.causal and not isinstance(self.task, SequenceToSequence)

        def encode(each: str) -> NDArray[Any]:
            ids = self._encode(each)
            row = concat_ids(eos, ids) if is_first else concat_ids(ids, eos)
            return self._check_length(row, "text", len(row))

        def embed(rows: Sequence[NDArray[Any]]) -> Iterator[Tensor]:
            examples = [{"tokens": row, "key_padding_mask": np.ones(len(row), dtype=bool)} for row in rows]
            batch = model_inputs(examples, self._device)
            hidden = model.encode(batch["tokens"], key_padding_mask=batch["key_padding_mask"])
            return (x[: len(row)].float().mean(dim=0).cpu() for x, row in zip(hidden, rows, strict=True))

        return _batched(text, "text", encode, embed, batch_size)

    @overload
    def classify(self, text: str, *, batch_size: int = BATCH_SIZE) -> Classification: ...
    @overload
    def classify(self, text: list[str], *, batch_size: int = BATCH_SIZE) -> list[Classification]: ...
    def classify(
        self, text: str | list[str], *, batch_size: int = BATCH_SIZE
    ) -> Classification | list[Classification]:
        """The labels of texts, which are truncated to data.seq_len as in evaluation."""
        task = self._require("classify")
        assert isinstance(task, SequenceClassification)

        def classify(texts: Sequence[NDArray[Any]]) -> Iterator[Classification]:
            for row in task.probabilities(self.model, texts).tolist():
                scores = dict(zip(task.labels, row, strict=True))
                label = max(scores, key=scores.__getitem__)
                yield Classification(label, scores[label], scores)

        return _batched(text, "text", self._encode, classify, batch_size)

    @overload
    def answer(self, question: str, context: str, *, batch_size: int = BATCH_SIZE) -> Answer: ...
    @overload
    def answer(
        self, question: list[str], context: str | list[str], *, batch_size: int = BATCH_SIZE
    ) -> list[Answer]: ...
    def answer(
        self, question: str | list[str], context: str | list[str], *, batch_size: int = BATCH_SIZE
    ) -> Answer | list[Answer]:
        """Answers to questions about their contexts, or about one context, as spans of these.

        A context may be longer than a row: its windows are read in batches, as in evaluation.
        """
        task = self._require("answer")
        assert isinstance(task, QuestionAnswering)
        check_integer("batch_size", batch_size, least=1)
        questions, contexts = _as_list("question", question), _as_list("context", context)
        if isinstance(context, str):
            contexts *= len(questions)
        if len(contexts) != len(questions):
            raise ConfigError(f"context: has {len(contexts)} texts for {len(questions)} questions; give one each")

        def find(asked: str, text: str) -> Answer:
            if not text.strip():
                raise ConfigError(f"context={text!r}: is empty; it must contain a text")
            sample = Sample("", (self._encode(asked), self._encode(text)))
            span = task.best_span(self.model, sample, batch_size)
            found, start = task.text_of(sample, span), None
            if self.tokenizer.is_lossless:
                before, rest = (
                    self.tokenizer.decode_bytes(sample.fields[1][part]).decode(errors="ignore")
                    for part in (slice(span.first), slice(span.first, span.stop))
                )
                start = len(before) + len(rest) - len(rest.lstrip())
            return Answer(found, span.score, start, None if start is None else start + len(found))

        answers = [find(*pair) for pair in zip(questions, contexts, strict=True)]
        return answers[0] if isinstance(question, str) else answers

    @overload
    def fill_mask(
        self, text: str, *, top_k: int = 5, mask: str = MASK, batch_size: int = BATCH_SIZE
    ) -> FilledText: ...
    @overload
    def fill_mask(
        self, text: list[str], *, top_k: int = 5, mask: str = MASK, batch_size: int = BATCH_SIZE
    ) -> list[FilledText]: ...
    def fill_mask(
        self, text: str | list[str], *, top_k: int = 5, mask: str = MASK, batch_size: int = BATCH_SIZE
    ) -> FilledText | list[FilledText]:
        """Texts with the most probable token at each mask, and its top_k candidates. A mask is one token."""
        task = self._require("fill_mask")
        assert isinstance(task, MaskedLanguageModel)
        check_integer("top_k", top_k, least=1, most=self.tokenizer.vocab_size)
        if not mask:
            raise ConfigError("mask='': must not be empty")

        def encode(each: str) -> NDArray[Any]:
            first, *others = (self._encode(part) for part in each.split(mask))
            if not others:
                raise ConfigError(f"text={each[:40]!r}: has no {mask}; write one for each token to fill in")
            parts = [first, *(part for other in others for part in ([task.mask_id], other))]
            row = concat_ids(*parts, [self.tokenizer.eos_id])
            return self._check_length(row, "text", len(row))

        def fill(rows: Sequence[NDArray[Any]]) -> Iterator[FilledText]:
            for row, probabilities in zip(rows, task.fill(self.model, rows), strict=True):
                best = probabilities.topk(top_k, dim=-1)
                filled = row.copy()
                filled[row == task.mask_id] = best.indices[:, 0].numpy()
                candidates = [
                    [Candidate(self.tokenizer.decode([token]), score) for token, score in zip(*pair, strict=True)]
                    for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                ]
                yield FilledText(self.tokenizer.decode(filled), candidates)

        return _batched(text, "text", encode, fill, batch_size)

    @overload
    def write(self, source: str, *, batch_size: int = BATCH_SIZE) -> Target: ...
    @overload
    def write(self, source: list[str], *, batch_size: int = BATCH_SIZE) -> list[Target]: ...
    def write(self, source: str | list[str], *, batch_size: int = BATCH_SIZE) -> Target | list[Target]:
        """Translations or summaries as evaluation generates them: greedily, or with task.beams beams."""
        task = self._require("write")
        assert isinstance(task, SequenceToSequence)

        def encode(each: str) -> Sample:
            if not each.strip():
                raise ConfigError(f"source={each!r}: is empty; it must contain a text")
            return Sample("", (self._encode(each), np.zeros(0, np.int64)))

        def write(samples: Sequence[Sample]) -> Iterator[Target]:
            targets = task.targets(self.model, samples)
            return (Target(task.text_of(target), target.score) for target in targets)

        return _batched(source, "source", encode, write, batch_size)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _require(self, method: str) -> Any:
        """The task, if it offers a method. Raises ConfigError."""
        kind = self.config.task.kind
        if method not in METHODS[kind]:
            offered = ", ".join(METHODS[kind])
            raise ConfigError(f"{method}(): task.kind={kind.name} of {self.checkpoint} offers only {offered}")
        return self.task

    def _encode(self, text: str) -> NDArray[Any]:
        return self.tokenizer.encode(text.encode(errors="surrogateescape"))

    def _check_length(self, row: NDArray[Any], name: str, n_tokens: int) -> NDArray[Any]:
        longest = self.config.model.max_positions
        if longest is not None and n_tokens > longest:
            fix = "shorten it, or train with more positions"
            raise ConfigError(f"{name}: has {n_tokens} tokens, and this model takes at most {longest}; {fix}")
        return row


def _as_list(name: str, texts: str | list[str]) -> list[str]:
    given = [texts] if isinstance(texts, str) else list(texts)
    for text in given:
        if not isinstance(text, str):
            raise TypeError(f"{name}={text!r}: must be a str or a list of them, not a {type(text).__name__}")
    return given


def _batched(
    texts: str | list[str],
    name: str,
    encode: Callable[[str], Input],
    predict: Callable[[Sequence[Input]], Iterator[Any]],
    batch_size: int,
) -> Any:
    """The result of a text, or a list of those of texts."""
    check_integer("batch_size", batch_size, least=1)
    rows = [encode(text) for text in _as_list(name, texts)]
    groups = (rows[first : first + batch_size] for first in range(0, len(rows), batch_size))
    results = [result for group in groups for result in predict(group)]
    return results[0] if isinstance(texts, str) else results


def _as_arguments(message: str) -> str:
    """A message about options of the command, in terms of arguments: top_k=-1 for --top-k -1."""

    def argument(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        return name if found[2] is None else f"{name}={found[2]}"

    return re.sub(r"--([a-z][a-z-]*)(?: ([^\s:,]+)(?=:|$))?", argument, message)
