"""LSH and local attention of whole sequences by the kernels, forward and backward. The host never waits.

All rounds of a group of units are one launch, and another puts them together. Between forward and backward inputs,
output and lse are kept, and the order: 4 bytes for each token, head and round, and its tiles. Reversible layers
keep none of it, since they run their forward again before each backward.
"""

from __future__ import annotations

from torch import Tensor

from reformer_dist.ops.lsh.attention import Grads, Inputs
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.sorting import mark_padding
from reformer_dist.ops.lsh.triton_kernels.launch import HeadGroup
from reformer_dist.ops.lsh.triton_kernels.rowwise import row_products
from reformer_dist.ops.lsh.triton_kernels.tiles import tile_heads
from reformer_dist.ops.lsh.triton_kernels.tuning import GROUP_TOKENS, tuning_of

# HeadGroup lie along dimensions of grids that are shorter than the first, alone or with their rounds.
MOST_UNITS = 2**16 - 1


class KernelAttention:
    """`ops.lsh.whole.WholeAttention`; q, k and v have one type, D is a multiple of 16 up to 128."""

    def __init__(
        self, v: Tensor, bucket_ids: Tensor, options: AttentionOptions, key_padding_mask: Tensor | None
    ) -> None:
        """Of v width and type; bucket_ids [B, H, R, S], key_padding_mask [B, S]."""
        self._groups = _groups(v, bucket_ids, options, key_padding_mask)

    def readable(self, x: Tensor) -> Tensor:
        """Itself where the numbers of a row lie side by side, wherever the rows lie."""
        return x if x.stride(3) == 1 else x.contiguous()

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor, out: Tensor, lse: Tensor) -> None:
        for units in self._groups:
            units.attend(q, k, v, out, lse)

    def attend_backward(self, inputs: Inputs, out: Tensor, lse: Tensor, grads: Grads) -> None:
        delta = row_products(inputs[3], out)
        for units in self._groups:
            units.attend_backward(inputs, lse, delta, grads)


def _groups(
    v: Tensor, bucket_ids: Tensor, options: AttentionOptions, key_padding_mask: Tensor | None
) -> list[HeadGroup]:
    batch, n_heads, n_rounds, seq_len = bucket_ids.shape
    has_padding = key_padding_mask is not None
    buckets = mark_padding(bucket_ids, options.n_buckets, key_padding_mask)
    size = min(MOST_UNITS // n_rounds, max(1, GROUP_TOKENS // (n_rounds * seq_len)))
    largest = tuning_of(v.shape[3], v.dtype).block
    numbers = options.head_indices(batch, n_heads, v.device).int() if options.dropout > 0 else None
    groups = []
    for first in range(0, buckets.shape[0], size):
        its = slice(first, first + size)
        its_numbers = None if numbers is None else numbers[its]
        tiles = tile_heads(buckets[its], its_numbers, options, largest=largest, has_padding=has_padding)
        groups.append(HeadGroup(options, tiles, first))
    return groups
