"""Extractive question answering: where in a text its answer begins and ends."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from reformer_dist.config import ModelConfig
from reformer_dist.models.base import ReformerModel
from reformer_dist.models.context import ForwardContext, ForwardOptions
from reformer_dist.models.initialization import init_weights

EXCLUDED = torch.finfo(torch.float32).min


class ReformerForQuestionAnswering(ReformerModel):
    """Two logits for each token: that the answer begins with it, and that it ends with it.

    A two-sided model (config.causal=False) is what the task wants. Trained on whole sequences or on slices of
    them (`models.sequence`): every rank then has the labels of the whole rows, and returns its share of the loss.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int = 0) -> None:
        super().__init__(config, vocab_size, seed)
        self.head = nn.Linear(config.output_dim, 2)
        init_weights(self, config, seed)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        answer_mask: Tensor | None = None,
        **options: Unpack[ForwardOptions],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens [B, S] -> logits of the first and of the last token of the answer, [B, S] float32 each.

        With labels [B, 2], first and last position of the answer in its text, whose first real token is at 0:
        the loss of both in nats, summed. Labels of -100 are ignored, and so is any other where no answer may lie.
        answer_mask [B, S]: True where one may; the question's tokens, as padding always, get the lowest number
        there is as a logit. The other keywords are those of `ForwardOptions`.
        """
        context = self._open(tokens, options)
        logits = self.head(self._hidden(tokens, context)).float()
        masks = [mask.unsqueeze(-1) for mask in (context.key_padding_mask, answer_mask) if mask is not None]
        for mask in masks:
            logits = logits.masked_fill(~mask, EXCLUDED)
        if labels is None:
            first, last = logits.unbind(dim=-1)
            return first, last
        return _cross_entropy_over_positions(logits, labels, masks, context)


def _cross_entropy_over_positions(
    logits: Tensor, labels: Tensor, masks: list[Tensor], context: ForwardContext
) -> Tensor:
    """This rank's share of the summed loss; logits [B, S, 2] of the positions at hand, labels [B, 2].

    masks [B, S, 1] each: False where nothing is asked for.
    """
    sequence = context.sequence
    is_label = context.coords.positions.unsqueeze(-1) == labels.unsqueeze(1)
    for mask in masks:
        is_label = is_label & mask
    # over slices too: each has its own sum of exponentials, and one of them holds the label
    of_label = torch.where(is_label, logits, 0.0).sum(dim=1)
    of_label, n_held = (
        sequence.gather(torch.stack([of_label, is_label.sum(dim=1).float()], dim=-1)).sum(dim=0).unbind(-1)
    )
    of_all = sequence.gather(logits.logsumexp(dim=1)).logsumexp(dim=0)
    # a label that no place holds has no logit that its loss could be bounded by
    return torch.where(n_held > 0, of_all - of_label, 0.0).sum() / sequence.n_parts
