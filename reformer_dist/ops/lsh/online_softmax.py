"""Online softmax, over keys in parts. Scores, maxima and logsumexps are in base 2: p = 2^(s - lse)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Initial running maximum: finite, so that the difference of two of them is 0, not nan.
LOWEST = -1e30
# Base 2, since vectorized exp2 handles infinities on a CPU and vectorized exp does not.
LOG2_E = math.log2(math.e)
LOG_2 = math.log(2)


@dataclass(frozen=True)
class PartialSoftmax:
    """Softmax state of each row over the keys seen so far, with scores s."""

    o: Tensor
    """[n_rows, D] float32: sum of 2^(s - row_max) v."""
    row_max: Tensor
    """[n_rows] largest s."""
    row_sum: Tensor
    """[n_rows] sum of 2^(s - row_max); 0 for rows that met no key."""

    @staticmethod
    def empty(n_rows: int, width: int, device: torch.device) -> PartialSoftmax:
        """The state before any key."""
        o = torch.zeros(n_rows, width, dtype=torch.float32, device=device)
        return PartialSoftmax(o, o.new_full((n_rows,), LOWEST), o.new_zeros(n_rows))

    def merge(self, other: PartialSoftmax) -> PartialSoftmax:
        """The state over the keys of both. Overwrites self."""
        row_max = torch.maximum(self.row_max, other.row_max)
        # not exp2, whose vectorized remainder loop rounds differently: a row's bits would depend on its index
        factor, other_factor = (((x.row_max - row_max) * LOG_2).exp_() for x in (self, other))
        o = self.o.mul_(factor.unsqueeze(1)).addcmul_(other.o, other_factor.unsqueeze(1))
        return PartialSoftmax(o, row_max, self.row_sum.mul_(factor).addcmul_(other.row_sum, other_factor))

    def output(self) -> tuple[Tensor, Tensor]:
        """Output [n_rows, D] and logsumexp [n_rows], float32; nan and inf for rows that met no key.

        Overwrites self.
        """
        lse = (self.row_max + self.row_sum.log2()).masked_fill_(self.row_sum == 0, torch.inf)
        return self.o.div_(self.row_sum.unsqueeze(1)), lse
