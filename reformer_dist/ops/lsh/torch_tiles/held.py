"""`held.HeldAttention` in plain PyTorch, on any device and under both rules."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from reformer_dist.ops.lsh.held import HeldRows, Rows
from reformer_dist.ops.lsh.online_softmax import PartialSoftmax
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.shared_keys import shared_keys, shared_keys_backward
from reformer_dist.ops.lsh.torch_tiles.layout import Layout, build_layouts
from reformer_dist.ops.lsh.torch_tiles.rounds import RowGroup, attend, attend_backward, attend_rounds
from reformer_dist.ops.workspace import Workspace


class TiledRows:
    """Rows that are attended tile by tile, once their rounds are laid out."""

    def __init__(self, rows: Rows, layouts: list[Layout], options: AttentionOptions, scratch: Workspace) -> None:
        self._group = RowGroup.of(rows, layouts, options, scratch)

    @staticmethod
    def of(held: HeldRows, options: AttentionOptions, scratch: Workspace) -> TiledRows:
        layouts = build_layouts(held.keys, held.total, held.seq_len, options, held.part)
        return TiledRows(held.rows, layouts, options, scratch)

    def attend_rounds(self, q: Tensor, k: Tensor | None, v: Tensor) -> Iterator[tuple[Layout, PartialSoftmax]]:
        """Each round's own sums, in the order of the rounds, and where its rows stand."""
        rounds = attend_rounds(self._group, q, shared_keys(q) if k is None else k, v)
        return zip(self._group.layouts, rounds, strict=True)

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
        """In float32; the output of who meets nobody is v."""
        return attend(self._group, q, shared_keys(q) if k is None else k, v).output(v)

    def attend_backward(
        self, q: Tensor, k: Tensor | None, v: Tensor, d_out: Tensor, *, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """In float32."""
        keys = shared_keys(q) if k is None else k
        dq, dk, dv = attend_backward(self._group, q, keys, v, d_out, delta=delta, lse=lse)
        if k is None:
            return dq.add_(shared_keys_backward(q, dk)), None, dv
        return dq, dk, dv
