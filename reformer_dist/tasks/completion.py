"""Completion: a causal language model that is trained on chosen tokens, such as the text after a prompt."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from reformer_dist.data import (
    IGNORE_INDEX,
    Corpus,
    DrawKey,
    Example,
    RowSelection,
    Sample,
    Span,
    collate,
    label_mask,
    make_sample,
    pack_examples,
    read_groups,
    read_spans,
)
from reformer_dist.models import ReformerLM
from reformer_dist.tasks.base import AllGather, SampleTask, TaskMetrics, concat_ids, device_of


class Completion(SampleTask):
    """Rows hold one sample each. Labels are the tokens that the dataset marks, or a completion.

    Samples of one field are end-of-text and the text, whose label spans say what is predicted; all of it if it has
    none. Samples of two are end-of-text, prompt, end-of-text, completion, of which the completion and a final
    end-of-text are predicted.
    """

    field_names = ("prompt", "completion")
    shards_args = "FILE.jsonl --fields prompt completion (or --label-spans)"
    reports_bits_per_byte = True
    reads_spans = True

    def build_model(self) -> nn.Module:
        return ReformerLM(self.config.model, self.vocab_size, self.config.trainer.seed)

    def make_example(self, spans: list[Span], draw_key: DrawKey) -> Example:
        if not self.config.data.pack_samples:
            return super().make_example(spans, draw_key)
        samples: list[Sample | None] = [make_sample(span.ref, span.tokens) for span in spans]
        return pack_examples([self._encode_or_pad(sample, draw_key) for sample in samples or [None]])

    def encode(self, sample: Sample, draw_key: DrawKey) -> Example:
        """Rows that are too long lose the beginning of the prompt, and then the end of the completion."""
        seq_len, eos = self.config.data.seq_len, [self.tokenizer.eos_id]
        if len(sample.fields) == 1:
            targets = concat_ids(sample.fields[0], eos)
            mask = label_mask(sample.metadata, len(targets), sample.name)
            labels = np.where(mask, targets, IGNORE_INDEX)
            return {"tokens": concat_ids(eos, targets[:-1])[:seq_len], "labels": labels[:seq_len]}
        prompt, completion = sample.fields
        targets = concat_ids(completion, eos)[: seq_len - 1]
        context = concat_ids(eos, prompt, eos)[-(seq_len - len(targets) + 1) :]
        labels = concat_ids([IGNORE_INDEX] * (len(context) - 1), targets)
        return {"tokens": concat_ids(context, targets[:-1]), "labels": labels}

    @torch.no_grad()
    def measure(self, model: nn.Module, corpus: Corpus, rows: RowSelection, gather: AllGather) -> TaskMetrics:
        """The accuracy of each group of label spans, if the dataset has groups."""
        if not any(dataset.has_label_spans for dataset in corpus.datasets):
            return TaskMetrics()
        samples = self.samples(corpus, rows)
        results: list[tuple[str, bool]] = []
        while batch := list(islice(samples, rows.micro_batch_size)):
            inputs = collate([self.encode(sample, DrawKey.heldout(0)) for sample in batch])
            predicted = model(inputs["tokens"].to(device_of(model))).argmax(-1).cpu()
            is_right = (predicted == inputs["labels"]).numpy()
            for sample, right in zip(batch, is_right, strict=True):
                results += self._answers(sample, right)
        counts, right = Counter[str](), Counter[str]()
        for group, is_correct in gather(results):
            counts[group] += 1
            right[group] += is_correct
        values = {name: 100 * right[name] / counts[name] for name in sorted(counts)}
        lines = [f"{name}: {value:.2f} % of {counts[name]:,}" for name, value in values.items()]
        return TaskMetrics(values, lines)

    def _answers(self, sample: Sample, is_right: NDArray[np.bool_]) -> list[tuple[str, bool]]:
        """(group, whether all of its tokens are predicted) of each label span; none if spans have no groups."""
        spans = read_spans(sample.metadata, len(sample.fields[0]) + 1, sample.name)
        groups = read_groups(sample.metadata, len(spans), sample.name)
        # a span that the row is too short for is wrong
        answered = [stop <= len(is_right) and bool(is_right[start:stop].all()) for start, stop in spans]
        return list(zip(groups, answered, strict=False))
