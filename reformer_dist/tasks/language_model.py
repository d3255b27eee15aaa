"""Language models: rows of running text, of which the next tokens or hidden ones are asked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from reformer_dist.data import (
    IGNORE_INDEX,
    Corpus,
    Example,
    Span,
    TextRow,
    DrawKey,
    heldout_batches,
    make_row,
    next_tokens,
    seeded_bits,
)
from reformer_dist.errors import DataError
from reformer_dist.models import ReformerLM
from reformer_dist.tasks.base import HeldoutBatch, Rows, Task


class LanguageModel(Task):
    """The next token."""

    reports_accuracy = False

    def build_model(self) -> nn.Module:
        return ReformerLM(self.config.model, self.vocab_size, self.config.trainer.seed)

    def check(self, corpus: Corpus) -> None:
        for dataset in corpus.datasets:
            if len(dataset.fields) > 1:
                kind, found = self.config.task.kind.name, ", ".join(dataset.fields)
                right = f"task.kind={kind} reads running text; give a data set of text, or another task.kind"
                raise DataError(f"data.path={dataset.folder.address}: its samples hold {found}; {right}")

    def make_example(self, pieces: list[Span], visit: DrawKey) -> Example:
        data = self.config.data
        row = make_row(pieces, data.seq_len, self.tokenizer.eos_id, data.mask_document_starts)
        return self.finish(row, visit)

    def finish(self, row: TextRow, visit: DrawKey) -> Example:
        return next_tokens(row)

    def heldout(self, corpus: Corpus, rows: Rows) -> Iterator[HeldoutBatch]:
        return heldout_batches(
            corpus,
            seq_len=self.config.data.seq_len,
            rows=rows.most,
            micro_batch_size=rows.micro_batch,
            dp_rank=rows.rank,
            dp_size=rows.size,
            max_damaged_fraction=rows.max_damaged_fraction,
            report=rows.report,
            finish=self.finish,
        )

    @property
    def token_bytes(self) -> Tensor | None:
        return torch.from_numpy(self.tokenizer.token_bytes)


class MaskedLanguageModel(LanguageModel):
    """Tokens that were hidden, as in BERT: of those asked for, 80 % are a mask, 10 % another, 10 % themselves."""

    extra_tokens = 1
    reports_accuracy = True

    def finish(self, row: TextRow, visit: DrawKey) -> Example:
        task, mask_id = self.config.task, self.tokenizer.vocab_size
        tokens, is_text = row.tokens[1:].copy(), row.labels != IGNORE_INDEX
        # a function of the place in the order: another world or a resumed run hides the same
        stream, lane, place = visit
        bits = seeded_bits(self.config.trainer.seed, f"masks/{stream}/{lane}", place)
        asked, fate, other = bits.random_raw(3 * len(tokens)).reshape(3, -1) / 2.0**64
        asked = (asked < task.mask_prob) & is_text
        labels = np.where(asked, tokens, IGNORE_INDEX)
        tokens[asked & (fate < 0.8)] = mask_id
        swapped = asked & (fate >= 0.8) & (fate < 0.9)
        tokens[swapped] = (other[swapped] * mask_id).astype(np.int64)
        return {"tokens": tokens, "labels": labels}

    @property
    def token_bytes(self) -> Tensor | None:
        return None
