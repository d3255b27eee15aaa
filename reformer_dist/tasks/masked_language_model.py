"""Masked language modeling: the masked tokens of packed text, as in BERT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reformer_dist.data import IGNORE_INDEX, DrawKey, Example
from reformer_dist.generation.decoder import check_finite
from reformer_dist.tasks.base import device_of, model_inputs
from reformer_dist.tasks.language_model import LanguageModel


class MaskedLanguageModel(LanguageModel):
    """Predicts task.mask_prob of the tokens: 80 % become the mask token, 10 % a random one, 10 % stay the same."""

    extra_tokens = 1
    reports_accuracy, reports_bits_per_byte = True, False

    @property
    def mask_id(self) -> int:
        """Id of the mask token."""
        return self.tokenizer.vocab_size

    @torch.no_grad()
    def fill(self, model: nn.Module, rows: Sequence[NDArray[Any]]) -> list[Tensor]:
        """Probabilities of the tokens at the masks of each row of token ids, [n_masks, vocab_size] float32."""
        examples = [{"tokens": row, "key_padding_mask": np.ones(len(row), dtype=bool)} for row in rows]
        logits = model(**model_inputs(examples, device_of(model)))
        masks = [torch.from_numpy(row == self.mask_id).nonzero().squeeze(1) for row in rows]
        # the mask token is no text
        return [
            check_finite(logits[number, at.to(logits.device)]).softmax(-1)[:, : self.mask_id].cpu()
            for number, at in enumerate(masks)
        ]

    def encode_row(self, tokens: NDArray[np.int64], labels: NDArray[np.int64], draw_key: DrawKey) -> Example:
        task, mask_id = self.config.task, self.mask_id
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
