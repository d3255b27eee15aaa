"""Sequence classification: the label of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reformer_dist.data import Corpus, DrawKey, Example, Sample
from reformer_dist.errors import DataError
from reformer_dist.generation.decoder import check_finite
from reformer_dist.models import ReformerForSequenceClassification
from reformer_dist.tasks.base import SampleTask, concat_ids, device_of, model_inputs


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

    @torch.no_grad()
    def probabilities(self, model: nn.Module, texts: Sequence[NDArray[Any]]) -> Tensor:
        """Probabilities of the labels, [n_texts, n_labels] float32, for the token ids of texts."""
        samples = (Sample("", (text,), self.padding_metadata()) for text in texts)
        rows = [self.encode(sample, DrawKey.heldout(0)) for sample in samples]
        logits: Tensor = model(**model_inputs(rows, device_of(model)))
        return check_finite(logits).softmax(dim=-1).cpu()

    def padding_metadata(self) -> dict[str, Any]:
        return {"label": self.labels[0]}
