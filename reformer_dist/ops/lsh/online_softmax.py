"""A softmax in parts. Scores, their maxima and logsumexps are in base 2: p = 2^(s - lse)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Stands for "no key seen yet" in running maxima: finite, so that differences of two of them are 0, not nan.
LOWEST = -1e30
# of exp2 and exp, only exp2 is vectorised where there are infinities
LOG2_E = math.log2(math.e)
LOG_2 = math.log(2)


@dataclass(frozen=True)
class PartialSoftmax:
    """A partial softmax of each row: what its scores s have summed up to so far."""

    o: Tensor
    """[n_rows, D] float32: sum of 2^(s - top) v."""
    top: Tensor
    """[n_rows] largest s."""
    weight: Tensor
    """[n_rows] sum of 2^(s - top); 0 for queries that met no key."""

    def merge(self, other: PartialSoftmax) -> PartialSoftmax:
        """Both as one; this one's memory is used up."""
        top = torch.maximum(self.top, other.top)
        factor, other_factor = (self.top - top).exp2_(), (other.top - top).exp2_()
        o = self.o.mul_(factor.unsqueeze(1)).addcmul_(other.o, other_factor.unsqueeze(1))
        return PartialSoftmax(o, top, self.weight.mul_(factor).addcmul_(other.weight, other_factor))

    def output(self) -> tuple[Tensor, Tensor]:
        """Output [n_rows, D] and logsumexp [n_rows], float32; nan and inf for queries that met no key.

        This one's memory is used up.
        """
        lse = (self.top + self.weight.log2()).masked_fill_(self.weight == 0, torch.inf)
        return self.o.div_(self.weight.unsqueeze(1)), lse
