"""Language modeling: the next token of packed text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import nn

from reformer_dist.data import (
    Batch,
    Corpus,
    DrawKey,
    Example,
    RowSelection,
    Span,
    document_ids,
    heldout_text_batches,
    next_token_example,
    pack_spans,
    positions_in_documents,
)
from reformer_dist.errors import DataError
from reformer_dist.models import ReformerLM
from reformer_dist.tasks.base import Task, spans_refused, warn_damaged


class LanguageModel(Task):
    """Predicts the next token of packed text."""

    reports_accuracy, reports_bits_per_byte = False, True

    def build_model(self) -> nn.Module:
        return ReformerLM(self.config.model, self.vocab_size, self.config.trainer.seed)

    def check(self, corpus: Corpus) -> None:
        for dataset in corpus.datasets:
            if dataset.has_label_spans:
                raise DataError(spans_refused(dataset, self.config.task.kind.name))
            if len(dataset.fields) > 1:
                kind, fields = self.config.task.kind.name, ", ".join(dataset.fields)
                expected = f"task.kind={kind} reads running text; give a dataset of text, or another task.kind"
                raise DataError(f"data.path={dataset.folder.address}: its samples hold {fields}; {expected}")

    def make_example(self, spans: list[Span], draw_key: DrawKey) -> Example:
        return self._example(spans, draw_key, mask_starts=self.config.data.mask_document_starts)

    def _example(self, spans: list[Span], draw_key: DrawKey, *, mask_starts: bool = False) -> Example:
        data = self.config.data
        separate = data.mask_documents
        row = pack_spans(spans, data.seq_len, self.tokenizer.eos_id, mask_starts, separate=separate)
        example = self.encode_row(*row, draw_key)
        if separate:
            example["document_ids"] = document_ids(spans, data.seq_len)
        if data.reset_position_ids:
            example["position_ids"] = positions_in_documents(example["document_ids"])
        return example

    def encode_row(self, tokens: NDArray[np.int64], labels: NDArray[np.int64], draw_key: DrawKey) -> Example:
        """Example of a row of text: tokens [seq_len + 1] and next-token labels [seq_len]."""
        return next_token_example(tokens, labels)

    def heldout(self, corpus: Corpus, rows: RowSelection) -> Iterator[Batch]:
        seq_len = self.config.data.seq_len
        return heldout_text_batches(corpus, rows, seq_len=seq_len, report=warn_damaged, make_example=self._example)
