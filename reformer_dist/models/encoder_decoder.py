"""The encoder-decoder: a two-sided stack reads the source, a causal one that attends to it writes the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from reformer_dist.config import ModelConfig
from reformer_dist.config.checks import require
from reformer_dist.models.base import ReformerModel
from reformer_dist.models.context import WHOLE_SEQUENCE, ForwardContext, ForwardOptions, EncodedSource
from reformer_dist.models.head import LanguageModelHead
from reformer_dist.models.initialization import init_weights
from reformer_dist.models.sequence import SequenceAccess
from reformer_dist.models.stack import ReformerStack
from reformer_dist.seeds import derive_seed


class ReformerEncoderDecoder(ReformerModel):
    """Two stacks of one config (see `ModelConfig.encoder`), which share the embedding of tokens and positions.

    `stack` is the decoder. `seed` decides initial weights and hash rotations, alike on every rank and device.
    Raises ConfigError where config.causal is not true.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int = 0) -> None:
        require(config.causal, "model.causal", False, "must be true: the decoder writes from left to right")
        super().__init__(config, vocab_size, seed, has_cross_attention=True)
        self.encoder = ReformerStack(config.encoder())
        table = self.embedding.tokens.weight
        assert isinstance(table, nn.Parameter)
        self.head = LanguageModelHead(config, vocab_size, table)
        init_weights(self, config, seed)

    def forward(
        self,
        source: Tensor | EncodedSource,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        source_mask: Tensor | None = None,
        source_sequence: SequenceAccess = WHOLE_SEQUENCE,
        logits_to_keep: int | None = None,
        **options: Unpack[ForwardOptions],
    ) -> Tensor:
        """source [B, T], tokens [B, S] -> logits [B, S, V], or with labels [B, S] the summed loss in nats.

        source: tokens, or what `read` made of them. tokens: what the decoder reads, which is the target behind a
        first token. Labels of -100 are ignored. source_mask [B, T]: True for real tokens of the source;
        source_sequence: which part of the sources is at hand. logits_to_keep: of the last tokens only, where no
        more are wanted. The other keywords are those of `ForwardOptions`, and about the target.
        """
        if self.training and options.get("dropout_seed") is None:
            options["dropout_seed"] = int(torch.randint(2**62, (1,)).item())
        if isinstance(source, Tensor):
            source = self.encode_source(source, source_mask, source_sequence, options)
        hidden = self._hidden(tokens, replace(self._open(tokens, options), source=source))
        if logits_to_keep is not None:
            hidden = hidden[:, -logits_to_keep:]
        logits_or_loss: Tensor = self.head(hidden, labels)
        return logits_or_loss

    def encode(self, tokens: Tensor, **options: Unpack[ForwardOptions]) -> Tensor:
        """Tokens of a source [B, T] -> the encoder's hidden vectors [B, T, dim] in the dtype of the weights."""
        context = self._open_source(tokens, options)
        hidden: Tensor = self.encoder(self._embed(tokens, context), context)
        return hidden

    @torch.no_grad()
    def reversible_drift(  # type: ignore[override]  # what it is asked of are the inputs of its own forward
        self,
        source: Tensor,
        tokens: Tensor,
        *,
        source_mask: Tensor | None = None,
        source_sequence: SequenceAccess = WHOLE_SEQUENCE,
        key_padding_mask: Tensor | None = None,
        sequence: SequenceAccess = WHOLE_SEQUENCE,
    ) -> Tensor:
        """The larger drift of the two stacks, on source [B, T] and tokens [B, S] at hand."""
        of_source: ForwardOptions = {"key_padding_mask": source_mask, "sequence": source_sequence}
        context = self._open_source(source, of_source)
        encoder_drift = self.encoder.reversible_drift(self._embed(source, context), context)
        own: ForwardOptions = {"key_padding_mask": key_padding_mask, "sequence": sequence}
        read = self.encode_source(source, source_mask, source_sequence)
        context = replace(self._open(tokens, own), source=read)
        drift = self.stack.reversible_drift(self._embed(tokens, context), context)
        return torch.maximum(encoder_drift, drift)

    def _open_source(self, tokens: Tensor, options: ForwardOptions) -> ForwardContext:
        """The encoder's context, whose masks and rotations are others than the decoder's."""
        context = self._open(tokens, options)
        seed = context.dropout_seed
        return replace(
            context,
            dropout_seed=None if seed is None else derive_seed("encoder", seed),
            rotation_seed=derive_seed("encoder", context.rotation_seed),
        )

    def read(
        self,
        source: Tensor,
        source_mask: Tensor | None = None,
        source_sequence: SequenceAccess = WHOLE_SEQUENCE,
        options: ForwardOptions | None = None,
    ) -> EncodedSource:
        """What the decoder reads of source [B, T]: the encoder runs here. The arguments are those of `forward`."""
        own: ForwardOptions = {**(options or {}), "key_padding_mask": source_mask, "sequence": source_sequence}
        return EncodedSource(self.encode(source, **own).float(), source_mask, source_sequence)

    def conditioned_on(self, source: Tensor, source_mask: Tensor | None = None) -> Callable[..., Tensor]:
        """The language model of the targets of source [B, T], as generation takes one: it is read here, once."""
        return partial(self, self.encode_source(source, source_mask))
