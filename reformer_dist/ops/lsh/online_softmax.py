"""A softmax that is made piece by piece."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Stands for "no key seen yet" in running maxima: finite, so that differences of two of them are 0, not nan.
LOWEST = -1e30
# Scores are in units of log 2: of exp2 and exp, the processor's vectors know only exp2 where there are infinities.
LOG2_E = math.log2(math.e)
LOG_2 = math.log(2)


@dataclass(frozen=True)
class PartialSoftmax:
    """A partial softmax of each row: what its scores s have summed up to so far."""

    o: Tensor
    """[n_rows, D] float32: sum of exp(s - top) v."""
    top: Tensor
    """[n_rows] largest s."""
    weight: Tensor
    """[n_rows] sum of exp(s - top); 0 for rows that met nobody."""

    def merge(self, other: PartialSoftmax) -> PartialSoftmax:
        """Both as one; this one's memory is used up."""
        top = torch.maximum(self.top, other.top)
        factor, other_factor = (self.top - top).exp_(), (other.top - top).exp_()
        o = self.o.mul_(factor.unsqueeze(1)).addcmul_(other.o, other_factor.unsqueeze(1))
        return PartialSoftmax(o, top, self.weight.mul_(factor).addcmul_(other.weight, other_factor))

    def output(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output [n_rows, D] and logsumexp [n_rows], float32; v and +inf for rows that met nobody.

        This one's memory is used up.
        """
        alone = self.weight == 0
        lse = (self.top + self.weight.log()).masked_fill_(alone, torch.inf)
        o = self.o.div_(self.weight.unsqueeze(1))
        o[alone] = v[alone].float()
        return o, lse
