"""Decoders: next-token logits of a batch of sequences, with or without KV caches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from reformer_dist.config import ModelConfig
from reformer_dist.errors import ConfigError, UserError
from reformer_dist.models.decoding import DecodingState, kv_cache_unsupported_reason
from reformer_dist.ops.checks import TensorChecks, check_range

ForwardFunction = Callable[..., Tensor]
"""`ReformerLM.forward` or a wrapper with its signature, such as a training engine."""


class Decoder(Protocol):
    """Next-token logits of B sequences: [B, V] float32 on the model's device."""

    def prefill(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Logits after prompts [B, S], padded (mask False) on the left. Replaces all earlier sequences."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Logits after one more token [B] of each sequence."""
        ...

    def select_rows(self, rows: Tensor) -> None:
        """Replaces sequence i by sequence rows[i]; rows [N] int64 may repeat and drop sequences."""
        ...


def check_finite(logits: Tensor) -> Tensor:
    """Returns the logits; raises UserError if one is not finite."""
    if not bool(logits.isfinite().all()):
        raise UserError("the model's logits are not finite: its weights are from a diverged run")
    return logits


def last_document(tokens: Tensor, eos_id: int) -> Tensor:
    """tokens [S] from the last end-of-text token on, or all of them without one.

    What a model whose documents do not see one another (data.mask_documents) sees of a prompt.
    """
    ends = (tokens == eos_id).nonzero()
    return tokens[int(ends[-1]) :] if len(ends) else tokens


def make_decoder(model: ForwardFunction, config: ModelConfig) -> CachedDecoder | UncachedDecoder:
    """A CachedDecoder if the model supports KV caches, else an UncachedDecoder. Raises ConfigError."""
    if not config.causal:
        raise ConfigError("model.causal=false: a bidirectional model can't generate text; must be true")
    return CachedDecoder(model, config) if kv_cache_unsupported_reason(config) is None else UncachedDecoder(model)


class CachedDecoder:
    """Decodes with KV caches, at a constant cost per token except in exact layers."""

    def __init__(self, model: ForwardFunction, config: ModelConfig) -> None:
        self._model, self._config = model, config
        self._state, self._n_rows = DecodingState(config), 0

    def prefill(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        self._state, self._n_rows = DecodingState(self._config), len(tokens)
        return self._logits(tokens, key_padding_mask)

    def step(self, tokens: Tensor) -> Tensor:
        TensorChecks(B=self._n_rows).integers("tokens", tokens, "B")
        return self._logits(tokens.unsqueeze(1), None)

    def select_rows(self, rows: Tensor) -> None:
        self._state.select_rows(rows)
        self._n_rows = len(rows)

    def n_bytes(self) -> int:
        """Memory of the caches."""
        return self._state.n_bytes()

    def fork(self) -> CachedDecoder:
        """A decoder of the same sequences, which continues them on its own."""
        forked = copy.copy(self)
        forked._state = copy.deepcopy(self._state)
        return forked

    def _logits(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return self._model(tokens, key_padding_mask=mask, sequence=self._state, logits_to_keep=1)[:, -1]


class PrefixDecoder:
    """Decodes one sequence whose beginning has been read before.

    The rest of its prompt is read token by token, with the same result whether the state of the beginning was just
    computed or was kept.
    """

    def __init__(self, decoder: CachedDecoder, logits: Tensor, rest: Tensor) -> None:
        """decoder: after the beginning, with its logits [1, V]. rest [T]: the following tokens of the prompt."""
        self._decoder, self._logits, self._unread = decoder, logits, rest

    @property
    def n_unread(self) -> int:
        return self._unread.numel()

    @torch.no_grad()
    def read(self, n_tokens: int) -> None:
        """Reads up to n_tokens more of the prompt."""
        for index in range(min(n_tokens, self.n_unread)):
            self._logits = self._decoder.step(self._unread[index : index + 1])
        self._unread = self._unread[n_tokens:]

    def prefill(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Logits after the prompt; tokens [1, S] must be all of it."""
        self.read(self.n_unread)
        return self._logits

    def step(self, tokens: Tensor) -> Tensor:
        return self._decoder.step(tokens)

    def select_rows(self, rows: Tensor) -> None:
        self._decoder.select_rows(rows)

    def n_bytes(self) -> int:
        """Memory of the caches."""
        return self._decoder.n_bytes()


class UncachedDecoder:
    """Decodes with a forward over the whole sequence for each token."""

    def __init__(self, model: ForwardFunction) -> None:
        self._model = model
        self._tokens = torch.empty(0, 0, dtype=torch.int64, device="cpu")
        self._mask: Tensor | None = None

    def prefill(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        self._tokens, self._mask = tokens, key_padding_mask
        return self._logits()

    def step(self, tokens: Tensor) -> Tensor:
        TensorChecks(B=len(self._tokens)).integers("tokens", tokens, "B")
        self._tokens = torch.cat([self._tokens, tokens.unsqueeze(1)], dim=1)
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=True)
        return self._logits()

    def select_rows(self, rows: Tensor) -> None:
        TensorChecks().integers("rows", rows, "N")
        check_range("rows", rows, len(self._tokens), limit="sequences")
        self._tokens = self._tokens[rows]
        if self._mask is not None:
            mask = self._mask[rows]
            # drop padding that no remaining row needs: it would count towards the model's positions
            n_padding = int(mask.any(dim=0).int().argmax())
            self._tokens, self._mask = self._tokens[:, n_padding:], mask[:, n_padding:]

    def n_bytes(self) -> int:
        """Memory of the tokens."""
        return sum(x.nbytes for x in (self._tokens, self._mask) if x is not None)

    def _logits(self) -> Tensor:
        return self._model(self._tokens, key_padding_mask=self._mask, logits_to_keep=1)[:, -1]
