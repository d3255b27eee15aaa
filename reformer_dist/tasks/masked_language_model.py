"""Masked language modeling: the masked tokens of packed text, as in BERT."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data import IGNORE_INDEX, DrawKey, Example
from reformer_dist.tasks.language_model import LanguageModel


class MaskedLanguageModel(LanguageModel):
    """Predicts task.mask_prob of the tokens: 80 % become the mask token, 10 % a random one, 10 % stay the same."""

    extra_tokens = 1
    reports_accuracy, reports_bits_per_byte = True, False

    def encode_row(self, tokens: NDArray[np.int64], labels: NDArray[np.int64], draw_key: DrawKey) -> Example:
        task, mask_id = self.config.task, self.tokenizer.vocab_size
        tokens, is_text = tokens[1:].copy(), labels != IGNORE_INDEX
        # a function of the row's position in the data order: the same for any number of ranks, and after a resume
        bits = draw_key.bits(self.config.trainer.seed, "masks")
        selected, action, replacement = bits.random_raw(3 * len(tokens)).reshape(3, -1) / 2.0**64
        selected = (selected < task.mask_prob) & is_text
        labels = np.where(selected, tokens, IGNORE_INDEX)
        tokens[selected & (action < 0.8)] = mask_id
        replaced = selected & (action >= 0.8) & (action < 0.9)
        tokens[replaced] = (replacement[replaced] * mask_id).astype(np.int64)
        return {"tokens": tokens, "labels": labels}
