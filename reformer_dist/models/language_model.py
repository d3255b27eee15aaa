"""The language model: embedding, reversible stack, head. Plain PyTorch: it runs without any other package."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import Unpack

from reformer_dist.config import ModelConfig
from reformer_dist.models.base import ReformerModel
from reformer_dist.models.context import ForwardOptions
from reformer_dist.models.head import LanguageModelHead
from reformer_dist.models.initialization import init_weights


class ReformerLM(ReformerModel):
    """A language model: causal, or with config.causal=False two-sided, which is the masked language model.

    The masked one reads tokens some of which have been replaced, and has labels at those places alone: -100
    elsewhere. `seed` decides initial weights and hash rotations, alike on every rank and device.
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
        **options: Unpack[ForwardOptions],
    ) -> Tensor:
        """tokens [B, S] -> logits [B, S, V], or with labels [B, S] the summed loss in nats (-100 is ignored).

        logits_to_keep: of the last tokens only, where no more are wanted. The other keywords are those of
        `ForwardOptions`.
        """
        hidden = self.encode(tokens, **options)
        if logits_to_keep is not None:
            hidden = hidden[:, -logits_to_keep:]
        logits_or_loss: Tensor = self.head(hidden, labels)
        return logits_or_loss
