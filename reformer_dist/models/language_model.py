"""Causal and masked language models: embedding, reversible stack, head."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import Unpack

from reformer_dist.config import ModelConfig
from reformer_dist.models.base import ReformerModel
from reformer_dist.models.context import ForwardOptions
from reformer_dist.models.head import LanguageModelHead
from reformer_dist.models.initialization import init_weights
from reformer_dist.ops.checks import check_integer
from reformer_dist.ops.profiling import part


class ReformerLM(ReformerModel):
    """A language model: causal, or masked (bidirectional) with config.causal=False.

    A masked language model reads corrupted tokens and has labels at the corrupted positions, -100 elsewhere.
    `seed` determines initial weights and hash rotations, which are the same on every rank and device.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int = 0) -> None:
        super().__init__(config, vocab_size, seed)
        table = self.embedding.tokens.weight
        assert isinstance(table, nn.Parameter)
        self.head = LanguageModelHead(config, vocab_size, table)
        init_weights(self, config, seed)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        logits_to_keep: int | None = None,
        per_token_loss: bool = False,
        **options: Unpack[ForwardOptions],
    ) -> Tensor:
        """tokens [B, S] -> logits [B, S, V], or with labels [B, S] the summed loss in nats (-100 is ignored).

        logits_to_keep: returns logits of the last tokens only. per_token_loss: with labels, returns the loss of
        each token, [B, S], without gradient. The other keywords are those of `ForwardOptions`.
        """
        hidden = self.encode(tokens, **options)
        if logits_to_keep is not None:
            check_integer("logits_to_keep", logits_to_keep, least=1)
            hidden = hidden[:, -logits_to_keep:]
        with part("loss"):
            logits_or_loss: Tensor = self.head(hidden, labels, per_token=per_token_loss)
        return logits_or_loss
