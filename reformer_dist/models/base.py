"""Base of all models: token embedding and reversible stack, from token ids to hidden states."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from reformer_dist.config import ModelConfig
from reformer_dist.models.context import (
    WHOLE_SEQUENCE,
    ForwardContext,
    ForwardOptions,
    build_context,
    call_options,
)
from reformer_dist.models.embedding import TokenEmbedding, check_length
from reformer_dist.models.inputs import check_options, check_tokens
from reformer_dist.models.sequence import SequenceAccess
from reformer_dist.models.stack import ReformerStack
from reformer_dist.models.training_steps import CountsSteps, draws_rotations
from reformer_dist.ops.checks import check_integer, check_type
from reformer_dist.ops.dropout import token_dropout
from reformer_dist.ops.profiling import part

LARGEST_VOCABULARY = 2**31 - 1


class ReformerModel(CountsSteps):
    """A Reformer without a head; subclasses add one.

    `seed` determines initial weights and hash rotations, which are the same on every rank and device.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, seed: int = 0, *, has_cross_attention: bool = False
    ) -> None:
        super().__init__()
        check_type("config", config, ModelConfig)
        check_integer("vocab_size", vocab_size, least=1, most=LARGEST_VOCABULARY)
        check_integer("seed", seed)
        self.config, self.vocab_size, self.seed = config, vocab_size, seed
        self.embedding = TokenEmbedding(config, vocab_size)
        self.stack = ReformerStack(config, has_cross_attention=has_cross_attention, has_positions=False)
        self._draws_rotations = draws_rotations(
            config, config.layer_kinds(), has_cross_attention=has_cross_attention
        )

    def encode(self, tokens: Tensor, **options: Unpack[ForwardOptions]) -> Tensor:
        """tokens [B, S] -> hidden states [B, S, output_dim] in the dtype of the weights."""
        return self._hidden(tokens, self._build_context(tokens, options))

    def reversible_drift(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        sequence: SequenceAccess = WHOLE_SEQUENCE,
    ) -> Tensor:
        """Largest difference between the stack's input and its reconstruction, on local tokens [B, S]."""
        options: ForwardOptions = {
            "key_padding_mask": key_padding_mask,
            "document_ids": document_ids,
            "position_ids": position_ids,
            "sequence": sequence,
        }
        context = self._evaluation_context(tokens, options)
        return self.stack.reversible_drift(self._embed(tokens, context), context)

    def _hidden(self, tokens: Tensor, context: ForwardContext) -> Tensor:
        hidden: Tensor = self.stack(self._embed(tokens, context), context)
        return hidden

    def _embed(self, tokens: Tensor, context: ForwardContext) -> Tensor:
        check_length(self.config, tokens.shape[1])
        with part("embedding"):
            x: Tensor = self.embedding(tokens, context.positions)
            dropout = context.dropout(self.config.dropout)
            return token_dropout(x, dropout, context.seed_for("embedding"), context.coords)

    def _build_context(self, tokens: Tensor, options: ForwardOptions) -> ForwardContext:
        """The context of one forward call on tokens [B, S]. Raises ValueError for inputs that do not fit."""
        options = call_options(self, options, draws_rotations=self._draws_rotations)
        return self._evaluation_context(tokens, options)

    def _evaluation_context(self, tokens: Tensor, options: ForwardOptions) -> ForwardContext:
        """The same with the rotations of evaluation, unless the options have a step."""
        mask = options.get("key_padding_mask")
        check_options(check_tokens("tokens", tokens, self.vocab_size, "key_padding_mask", mask), options)
        n_tokens, device = tokens.shape[1], tokens.device
        return build_context(self.config, self.seed, n_tokens, device, options, is_training=self.training)
