"""`ops.lsh.held.HeldAttention` by the C library, under the window rule."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from reformer_dist.ops.lsh.held import HeldRows
from reformer_dist.ops.lsh.native.calls import Group, order_rows, window_of
from reformer_dist.ops.lsh.online_softmax import LOG2_E
from reformer_dist.ops.lsh.options import AttentionOptions, WindowRule


class NativeRows:
    """All rows as one unit, whose buckets are those of every unit."""

    def __init__(self, held: HeldRows, options: AttentionOptions) -> None:
        assert isinstance(options.rule, WindowRule)
        keys = torch.stack(held.keys)
        order = order_rows(keys.unsqueeze(0), options, held.query_bounds(options.rule))
        order = replace(order, codes=held.rows.codes)
        window = window_of(options, held.seq_len)
        self._group = Group(options, keys.shape[1], window, held.rows.unit, order, held.rows.position)

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
        """In float32; the output of who meets nobody is v."""
        out = torch.empty(v.shape, dtype=torch.float32)
        lse = torch.empty(v.shape[0], dtype=torch.float32)
        self._group.attend(_rows(q), None if k is None else _rows(k), _rows(v), out, lse)
        return out, lse.div_(LOG2_E)

    def attend_backward(
        self, q: Tensor, k: Tensor | None, v: Tensor, d_out: Tensor, *, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """In float32."""
        rows = (_rows(q), None if k is None else _rows(k), _rows(v), _rows(d_out))
        dq, dv = torch.empty_like(rows[0]), torch.empty_like(rows[2])
        dk = None if k is None else torch.empty_like(dq)
        self._group.attend_backward(rows, None, lse * LOG2_E, (dq, dk, dv), delta)
        return dq, dk, dv


def _rows(x: Tensor) -> Tensor:
    return x.float().contiguous()
