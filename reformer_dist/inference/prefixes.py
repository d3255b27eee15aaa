"""Decoding states of beginnings that prompts share, such as a document about which several questions are asked."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.errors import ConfigError
from reformer_dist.generation.decoder import CachedDecoder, PrefixDecoder
from reformer_dist.models.decoding import kv_cache_unsupported_reason
from reformer_dist.run.pretrained import LoadedModel
from reformer_dist.tasks import SequenceToSequence


@dataclass(frozen=True)
class PrefixState:
    """The state after a beginning, and the logits [1, V] there."""

    decoder: CachedDecoder
    logits: Tensor

    @property
    def n_bytes(self) -> int:
        return self.decoder.n_bytes() + self.logits.nbytes

    def continued(self, rest: Tensor) -> PrefixDecoder:
        """A decoder of the beginning and the rest [T] of a prompt. The state stays as it is."""
        return PrefixDecoder(self.decoder.fork(), self.logits, rest)


def check_prefixes(loaded: LoadedModel) -> None:
    """Raises ConfigError if prompts of a model have no beginnings whose states can be kept."""
    reason = kv_cache_unsupported_reason(loaded.config.model)
    if isinstance(loaded.task, SequenceToSequence):
        reason = "task.kind=sequence_to_sequence: a source is read as a whole"
    if reason is not None:
        raise ConfigError(f"no state of a prefix can be kept: {reason}")


def common_length(a: Tensor, b: Tensor) -> int:
    """Number of leading tokens that a [S] and b [T] share."""
    n = min(a.numel(), b.numel())
    differs = (a[:n] != b[:n]).nonzero()
    return int(differs[0]) if len(differs) else n


@torch.no_grad()
def read_prefix(loaded: LoadedModel, tokens: Tensor) -> PrefixState:
    """Reads the beginning [S] of a prompt."""
    decoder = CachedDecoder(loaded.language_model, loaded.config.model)
    return PrefixState(decoder, decoder.prefill(tokens.unsqueeze(0)))


class PrefixCache:
    """The states of the beginnings that were used last, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self.n_bytes = max_bytes, 0
        self._states: OrderedDict[bytes, PrefixState] = OrderedDict()

    def get(self, tokens: Tensor) -> PrefixState | None:
        """The state after tokens [S], if it is kept."""
        key = _key(tokens)
        if key in self._states:
            self._states.move_to_end(key)
        return self._states.get(key)

    def put(self, tokens: Tensor, state: PrefixState) -> None:
        """Keeps a state in place of those that were not used for longest, unless it is larger than the cache."""
        if state.n_bytes > self._max_bytes:
            return
        self._states[_key(tokens)] = state
        self.n_bytes += state.n_bytes
        while self.n_bytes > self._max_bytes:
            _, dropped = self._states.popitem(last=False)
            self.n_bytes -= dropped.n_bytes


def _key(tokens: Tensor) -> bytes:
    return tokens.cpu().numpy().tobytes()
