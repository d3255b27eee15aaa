"""Language modeling: the next token of packed text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import nn

from reformer_dist.config import Strand
from reformer_dist.data import (
    DNA,
    Batch,
    Corpus,
    DrawKey,
    Example,
    RowSelection,
    Span,
    document_ids,
    draws_reverse,
    heldout_text_batches,
    next_token_example,
    pack_spans,
    positions_in_documents,
    reverse_complement_row,
    reverse_documents,
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
            if self.config.data.strand is not Strand.forward and dataset.alphabet != DNA:
                expected = f"{dataset.folder.address} must be DNA in bytes, written by reformer-shards --fasta"
                raise DataError(f"data.strand={self.config.data.strand.name}: data.path: {expected}")

    def make_example(self, spans: list[Span], draw_key: DrawKey) -> Example:
        return self._example(spans, draw_key, is_training=True)

    def _example(self, spans: list[Span], draw_key: DrawKey, *, is_training: bool = False) -> Example:
        data, eos_id = self.config.data, self.tokenizer.eos_id
        mask_starts, separate = is_training and data.mask_document_starts, data.mask_documents
        row = pack_spans(spans, data.seq_len, eos_id, mask_starts, separate=separate)
        ids = document_ids(spans, data.seq_len)
        is_random = is_training and data.strand is Strand.random
        if data.strand is Strand.reverse or (is_random and draws_reverse(self.config.trainer.seed, draw_key)):
            n_labels = sum(span.stop - span.start for span in spans)
            ids = reverse_documents(ids, row[0], n_labels, eos_id)
            row = reverse_complement_row(row, n_labels, mask_starts, eos_id)
        example = self.encode_row(*row, draw_key)
        if separate:
            example["document_ids"] = ids
        if data.reset_position_ids:
            example["position_ids"] = positions_in_documents(ids)
        return example

    def encode_row(self, tokens: NDArray[np.int64], labels: NDArray[np.int64], draw_key: DrawKey) -> Example:
        """Example of a row of text: tokens [seq_len + 1] and next-token labels [seq_len]."""
        return next_token_example(tokens, labels)

    def heldout(self, corpus: Corpus, rows: RowSelection) -> Iterator[Batch]:
        seq_len = self.config.data.seq_len
        return heldout_text_batches(corpus, rows, seq_len=seq_len, report=warn_damaged, make_example=self._example)
