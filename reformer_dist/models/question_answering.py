"""Extractive question answering: start and end positions of the answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from reformer_dist.config import ModelConfig
from reformer_dist.models.base import ReformerModel
from reformer_dist.models.context import ForwardContext, ForwardOptions
from reformer_dist.models.initialization import init_weights
from reformer_dist.models.inputs import check_labels
from reformer_dist.ops.checks import TensorChecks, check_range
from reformer_dist.ops.cross_entropy import IGNORE_INDEX
from reformer_dist.ops.profiling import part

MASKED_LOGIT = torch.finfo(torch.float32).min


class ReformerForQuestionAnswering(ReformerModel):
    """Start and end logits for each token; meant for a bidirectional model (config.causal=False).

    Under sequence parallelism (`models.sequence`), every rank holds the labels of the whole rows and returns an
    equal fraction of the loss.
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

        With labels [B, 2], the positions of the first and last token, counted from the first real token of the
        row: the summed loss of both in nats. Labels of -100 are ignored, and so are labels at masked positions.
        answer_mask [B, S]: True where an answer may be, such as outside the question. Masked positions and padding
        get the lowest float32 as logit. The other keywords are those of `ForwardOptions`. Raises ValueError.
        """
        context = self._build_context(tokens, options)
        self._check(tokens, labels, answer_mask, context)
        hidden = self._hidden(tokens, context)
        with part("loss"):
            logits = self.head(hidden).float()
            masks = [mask.unsqueeze(-1) for mask in (context.key_padding_mask, answer_mask) if mask is not None]
            for mask in masks:
                logits = logits.masked_fill(~mask, MASKED_LOGIT)
            if labels is None:
                first, last = logits.unbind(dim=-1)
                return first, last
            return _cross_entropy_over_positions(logits, labels, masks, context)

    @staticmethod
    def _check(tokens: Tensor, labels: Tensor | None, answer_mask: Tensor | None, context: ForwardContext) -> None:
        checks = TensorChecks()
        checks.integers("tokens", tokens, "B S")
        checks.mask("answer_mask", answer_mask, "B S")
        if labels is not None:
            check_labels(labels, "B 2", tokens)
            seq_len = tokens.shape[1] * context.sequence.n_slices
            check_range("labels", labels, seq_len, limit="seq_len", also=IGNORE_INDEX)


def _cross_entropy_over_positions(
    logits: Tensor, labels: Tensor, masks: list[Tensor], context: ForwardContext
) -> Tensor:
    """This rank's fraction of the summed loss; logits [B, S, 2] of the local positions, labels [B, 2].

    masks [B, S, 1] each: False at positions whose labels are ignored.
    """
    sequence = context.sequence
    is_label = context.coords.positions.unsqueeze(-1) == labels.unsqueeze(1)
    for mask in masks:
        is_label = is_label & mask
    # every slice of the sequence has its own logsumexp, and one of them holds the label
    label_logit = torch.where(is_label, logits, 0.0).sum(dim=1)
    label_logit, n_found = (
        sequence.gather(torch.stack([label_logit, is_label.sum(dim=1).float()], dim=-1)).sum(dim=0).unbind(-1)
    )
    logsumexp = sequence.gather(logits.logsumexp(dim=1)).logsumexp(dim=0)
    # without a logit of the label, the loss would be unbounded
    return torch.where(n_found > 0, logsumexp - label_logit, 0.0).sum() / sequence.n_slices
