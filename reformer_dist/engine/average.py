"""WeightAverage: an average of the weights, in float32, sharded as the optimizer states are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from reformer_dist.checkpoint.average import AverageRecord
from reformer_dist.config import Average, OptimConfig


class WeightAverage:
    """Averages of the tensors that the optimizer updates on this rank."""

    def __init__(self, config: OptimConfig, masters: Sequence[Tensor]) -> None:
        """Begins with the current weights. masters: float32 tensors."""
        self.record = AverageRecord(config.average_window if config.average is Average.window else None)
        self._decay, self._masters = config.average_decay, list(masters)
        self.tensors = {
            master: {kind: master.detach().clone() for kind in self.record.kinds} for master in self._masters
        }
        """By the tensor that they are an average of, and by kind."""

    @torch.no_grad()
    def restart(self, updates: int = 0) -> None:
        """Begins again with the current weights, or marks loaded averages as those after `updates` steps."""
        self.record = replace(self.record, updates=updates)
        if updates == 0:
            for master, averages in self.tensors.items():
                for average in averages.values():
                    average.copy_(master)

    @torch.no_grad()
    def update(self) -> None:
        """Adds the weights after a step."""
        n_before = self.record.updates
        self.record = replace(self.record, updates=n_before + 1)
        for master, averages in self.tensors.items():
            if self.record.window is None:
                # the first weights would otherwise count for 1 / (1 - decay) steps
                decay = min(self._decay, (1 + n_before) / (10 + n_before))
                averages["average"].lerp_(master.detach(), 1.0 - decay)
                continue
            if self.record.in_block == 1 and n_before:
                averages["previous_average"].copy_(averages["block_average"])
            averages["block_average"].lerp_(master.detach(), 1.0 / self.record.in_block)

    def average(self, master: Tensor) -> Tensor:
        """The average of one of the tensors, a new one."""
        return self.record.combine(self.tensors[master].__getitem__)
