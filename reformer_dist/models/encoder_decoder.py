"""Encoder-decoder: a bidirectional stack encodes the source, a causal stack with cross attention decodes."""

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
from reformer_dist.models.context import (
    WHOLE_SEQUENCE,
    EncodedSource,
    ForwardContext,
    ForwardOptions,
    call_options,
)
from reformer_dist.models.head import LanguageModelHead
from reformer_dist.models.initialization import init_weights
from reformer_dist.models.inputs import check_source_rows, check_tokens
from reformer_dist.models.sequence import SequenceAccess
from reformer_dist.models.stack import ReformerStack
from reformer_dist.models.training_steps import draws_rotations
from reformer_dist.ops.checks import check_integer, check_type
from reformer_dist.ops.profiling import part
from reformer_dist.seeds import derive_seed


class ReformerEncoderDecoder(ReformerModel):
    """Two stacks of one config (see `ModelConfig.encoder`) that share token and position embeddings.

    `stack` is the decoder. `seed` determines initial weights and hash rotations, which are the same on every rank
    and device. Raises ConfigError if config.causal is false.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int = 0) -> None:
        check_type("config", config, ModelConfig)
        require(config.causal, "model.causal", False, "must be true: the decoder is autoregressive")
        super().__init__(config, vocab_size, seed, has_cross_attention=True)
        self.encoder = ReformerStack(config.encoder(), has_positions=False)
        kinds = [*config.layer_kinds(), *config.encoder().layer_kinds()]
        self._draws_rotations = draws_rotations(config, kinds, has_cross_attention=True)
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

        source: tokens, or the result of `encode_source`. tokens: the decoder input, which is a start token and the
        target. Labels of -100 are ignored. source_mask [B, T]: True for real tokens of the source;
        source_sequence: which part of the sources is local. logits_to_keep: returns logits of the last tokens
        only. The other keywords are those of `ForwardOptions` and apply to the target; document_ids and
        position_ids are refused.
        """
        for name in ("document_ids", "position_ids"):
            if options.get(name) is not None:
                raise ValueError(f"{name}: a row of an encoder-decoder holds one source and one target; omit it")
        if self.training and options.get("dropout_seed") is None:
            options["dropout_seed"] = int(torch.randint(2**62, (1,), device="cpu").item())
        # of both stacks
        options = call_options(self, options, draws_rotations=self._draws_rotations)
        if not isinstance(source, EncodedSource):
            check_source_rows(source, tokens)
            source = self.encode_source(source, source_mask, source_sequence, options)
        context = self._build_context(tokens, options)
        hidden = self._hidden(tokens, replace(context, source=source))
        if logits_to_keep is not None:
            check_integer("logits_to_keep", logits_to_keep, least=1)
            hidden = hidden[:, -logits_to_keep:]
        with part("loss"):
            logits_or_loss: Tensor = self.head(hidden, labels)
        return logits_or_loss

    def encode(self, tokens: Tensor, **options: Unpack[ForwardOptions]) -> Tensor:
        """Source tokens [B, T] -> the encoder's hidden states [B, T, dim] in the dtype of the weights."""
        check_tokens("source", tokens, self.vocab_size, "source_mask", options.get("key_padding_mask"))
        context = self._source_context(self._build_context(tokens, options))
        hidden: Tensor = self.encoder(self._embed(tokens, context), context)
        return hidden

    @torch.no_grad()
    def reversible_drift(  # type: ignore[override]  # takes the inputs of this class's forward
        self,
        source: Tensor,
        tokens: Tensor,
        *,
        source_mask: Tensor | None = None,
        source_sequence: SequenceAccess = WHOLE_SEQUENCE,
        key_padding_mask: Tensor | None = None,
        sequence: SequenceAccess = WHOLE_SEQUENCE,
    ) -> Tensor:
        """The larger drift of the two stacks, on local source [B, T] and tokens [B, S]."""
        source_options: ForwardOptions = {"key_padding_mask": source_mask, "sequence": source_sequence}
        check_tokens("source", source, self.vocab_size, "source_mask", source_mask)
        context = self._source_context(self._evaluation_context(source, source_options))
        encoder_drift = self.encoder.reversible_drift(self._embed(source, context), context)
        options: ForwardOptions = {"key_padding_mask": key_padding_mask, "sequence": sequence}
        hidden = self.encoder(self._embed(source, context), context)
        encoded = EncodedSource(hidden.float(), source_mask, source_sequence)
        context = replace(self._evaluation_context(tokens, options), source=encoded)
        drift = self.stack.reversible_drift(self._embed(tokens, context), context)
        return torch.maximum(encoder_drift, drift)

    def _source_context(self, context: ForwardContext) -> ForwardContext:
        """The encoder's context, with dropout and rotation seeds different from the decoder's."""
        seed, following = context.dropout_seed, context.next_rotation_seed
        return replace(
            context,
            dropout_seed=None if seed is None else derive_seed("encoder", seed),
            rotation_seed=derive_seed("encoder", context.rotation_seed),
            next_rotation_seed=None if following is None else derive_seed("encoder", following),
        )

    def encode_source(
        self,
        source: Tensor,
        source_mask: Tensor | None = None,
        source_sequence: SequenceAccess = WHOLE_SEQUENCE,
        options: ForwardOptions | None = None,
    ) -> EncodedSource:
        """Runs the encoder on source [B, T], for one or more calls of `forward`; arguments as there."""
        source_options: ForwardOptions = {
            **(options or {}),
            "key_padding_mask": source_mask,
            "sequence": source_sequence,
        }
        return EncodedSource(self.encode(source, **source_options).float(), source_mask, source_sequence)

    def conditioned_on(self, source: Tensor, source_mask: Tensor | None = None) -> Callable[..., Tensor]:
        """Encodes source [B, T] once and returns the language model of its targets, for generation."""
        return partial(self, self.encode_source(source, source_mask))
