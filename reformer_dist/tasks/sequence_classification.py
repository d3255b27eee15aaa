"""Sequence classification: the label of a text."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from reformer_dist.data import Corpus, DrawKey, Example, Sample
from reformer_dist.errors import DataError
from reformer_dist.models import ReformerForSequenceClassification
from reformer_dist.tasks.base import SampleTask, concat_ids


class SequenceClassification(SampleTask):
    """Rows are a text, truncated if it is too long, and end-of-text."""

    labels_per_row = True
    shards_args = "FILE.jsonl --fields text --label label"

    def build_model(self) -> nn.Module:
        sizes = (self.vocab_size, len(self.labels))
        return ReformerForSequenceClassification(self.config.model, *sizes, self.config.trainer.seed)

    def check(self, corpus: Corpus) -> None:
        super().check(corpus)
        for dataset in corpus.datasets:
            where = f"data.path={dataset.folder.address}"
            if not dataset.labels:
                hint = f"write it with reformer-shards {self.shards_args}"
                raise DataError(f"{where}: its samples have no labels; {hint}")
            if dataset.labels != self.labels:
                differing = ", ".join(sorted(set(dataset.labels) ^ set(self.labels)))
                expected = f"the model's labels are {', '.join(self.labels)}"
                raise DataError(f"{where}: its labels differ ({differing}); {expected}")
        if len(self.labels) < 2:
            problem = "is the only label, so that there is nothing to predict; give texts of two or more classes"
            raise DataError(f"data.path: {self.labels[0]!r} {problem}")

    def encode(self, sample: Sample, draw_key: DrawKey) -> Example:
        tokens = concat_ids(sample.fields[0][: self.config.data.seq_len - 1], [self.tokenizer.eos_id])
        label = self.labels.index(sample.metadata["label"])
        mask = np.ones(len(tokens), dtype=bool)
        return {"tokens": tokens, "key_padding_mask": mask, "labels": np.array(label)}

    def padding_metadata(self) -> dict[str, Any]:
        return {"label": self.labels[0]}
