"""Short causal convolution of projections over tokens, wherever the tokens are: model.qk_conv."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reformer_dist.models.sequence import LayerAccess, SequenceAccess
from reformer_dist.ops.causal_conv import causal_conv


class ShortConv(nn.Module):
    """Depthwise causal convolution of [B, S, n_channels] over the tokens; initially the identity."""

    def __init__(self, n_channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, n_channels))
        """weight[i]: of the token i positions before."""
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.zero_()
        self.weight[0] = 1.0

    def forward(self, x: Tensor, document_ids: Tensor | None) -> Tensor:
        """[B, S, n_channels]; see `causal_conv`."""
        return causal_conv(x, self.weight, document_ids)


def convolve(
    convs: Sequence[ShortConv],
    projections: Sequence[Tensor],
    access: LayerAccess,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
) -> list[Tensor]:
    """Each of the projections [B, S, C] of the local tokens by its convolution, which padding does not enter.

    document_ids: of `with_preceding`. The projections share one exchange of the tokens before.
    """
    if key_padding_mask is not None:
        projections = [x.masked_fill(~key_padding_mask.unsqueeze(-1), 0) for x in projections]
    n_before = convs[0].weight.shape[0] - 1
    preceding = access.preceding(torch.cat([x[:, -n_before:] for x in projections], dim=-1), n_before)
    if preceding is None:
        return [conv(x, document_ids) for conv, x in zip(convs, projections, strict=True)]
    parts = preceding.chunk(len(projections), dim=-1)
    extended = [torch.cat(tensors, dim=1) for tensors in zip(parts, projections, strict=True)]
    return [conv(x, document_ids)[:, n_before:] for conv, x in zip(convs, extended, strict=True)]


def with_preceding(document_ids: Tensor, sequence: SequenceAccess, n_before: int) -> Tensor:
    """document_ids [B, S], after those of the n_before preceding tokens if these are on other ranks."""
    preceding = sequence.preceding(document_ids[:, -n_before:].unsqueeze(-1), n_before)
    return document_ids if preceding is None else torch.cat([preceding.squeeze(-1), document_ids], dim=1)
