"""What generation asks of a model: the logits behind some texts, which then grow by a token each at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from reformer_dist.config import ModelConfig
from reformer_dist.errors import ConfigError, UserError
from reformer_dist.models.decoding import DecodingState, kv_cache_unsupported_reason

Model = Callable[..., Tensor]
"""`ReformerLM.forward`, or what stands before it, such as a training engine's forward."""


class Decoder(Protocol):
    """Of B texts. Logits are [B, V] on the model's device, in float32."""

    def prefill(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Logits behind prompts [B, S], whose padding (mask False) stands before the text. Forgets other texts."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Logits behind one more token [B] of each text."""
        ...

    def select_rows(self, rows: Tensor) -> None:
        """Makes text i what text rows[i] was: rows [N] int64 may repeat some and leave others out."""
        ...


def check_finite(logits: Tensor) -> Tensor:
    """The logits themselves. Raises UserError."""
    if not bool(logits.isfinite().all()):
        raise UserError("the model's logits are not finite: its weights are those of a run that diverged")
    return logits


def make_decoder(model: Model, config: ModelConfig) -> Decoder:
    """With a cache; where the model has none, by the whole forward for each token. Raises ConfigError."""
    if not config.causal:
        raise ConfigError("model.causal=false: a two-sided model writes no text; use one with model.causal=true")
    return CachedDecoder(model, config) if kv_cache_unsupported_reason(config) is None else UncachedDecoder(model)


class CachedDecoder:
    """The cost of a token does not grow with its text, exact layers apart."""

    def __init__(self, model: Model, config: ModelConfig) -> None:
        self._model, self._config = model, config
        self._state = DecodingState(config)

    def prefill(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        self._state = DecodingState(self._config)
        return self._logits(tokens, key_padding_mask)

    def step(self, tokens: Tensor) -> Tensor:
        return self._logits(tokens.unsqueeze(1), None)

    def select_rows(self, rows: Tensor) -> None:
        self._state.select_rows(rows)

    def _logits(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return self._model(tokens, key_padding_mask=mask, sequence=self._state, logits_to_keep=1)[:, -1]


class UncachedDecoder:
    """Each token costs a forward pass over what stands before it."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def prefill(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        self._tokens, self._mask = tokens, key_padding_mask
        return self._logits()

    def step(self, tokens: Tensor) -> Tensor:
        self._tokens = torch.cat([self._tokens, tokens.unsqueeze(1)], dim=1)
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=True)
        return self._logits()

    def select_rows(self, rows: Tensor) -> None:
        self._tokens = self._tokens[rows]
        if self._mask is not None:
            mask = self._mask[rows]
            # padding before a longer prompt that is gone would count towards the positions that the model has
            n_padding = int(mask.any(dim=0).int().argmax())
            self._tokens, self._mask = self._tokens[:, n_padding:], mask[:, n_padding:]

    def _logits(self) -> Tensor:
        return self._model(self._tokens, key_padding_mask=self._mask, logits_to_keep=1)[:, -1]
