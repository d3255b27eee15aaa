"""Averages of the weights, against their definition."""

from __future__ import annotations

import pytest
import torch

from reformer_dist.config import Average, OptimConfig
from reformer_dist.engine.average import WeightAverage


def trajectory(n_steps: int) -> list[torch.Tensor]:
    """Weights before the first step and after each."""
    return list(torch.randn(n_steps + 1, 4, generator=torch.Generator().manual_seed(0)).cumsum(0))


@pytest.mark.parametrize("window", [1, 3, 4, 100])
def test_a_window_is_the_current_block_and_the_one_before(window: int) -> None:
    start, *steps = trajectory(13)
    weights = start.clone()
    average = WeightAverage(OptimConfig(average=Average.window, average_window=window), [weights])
    torch.testing.assert_close(average.average(weights), start)
    for number, values in enumerate(steps, 1):
        weights.copy_(values)
        average.update()
        first = max(0, (number - 1) // window - 1) * window
        assert min(number, window) <= number - first <= 2 * window
        torch.testing.assert_close(average.average(weights), torch.stack(steps[first:number]).mean(dim=0))


def test_an_exponential_average_forgets_its_start() -> None:
    start, *steps = trajectory(40)
    weights, right = start.clone(), start.clone()
    average = WeightAverage(OptimConfig(average=Average.exponential, average_decay=0.7), [weights])
    for number, values in enumerate(steps):
        weights.copy_(values)
        average.update()
        share = min(0.7, (1 + number) / (10 + number))
        right = share * right + (1 - share) * values
        torch.testing.assert_close(average.average(weights), right)
    assert average.record.updates == 40
    average.restart()
    assert torch.equal(average.average(weights), weights)
    assert average.record.updates == 0
