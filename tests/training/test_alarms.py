"""Alarms of evaluations: heads that find no more than chance, and layers that invert badly; each once."""

from __future__ import annotations

import pytest

from reformer_dist.config import ModelConfig, Precision, Recompute, RunConfig, TrainerConfig
from reformer_dist.training.alarms import Alarms

GOOD, BLIND, DENSE = {"mass": 0.3, "pairs": 0.1}, {"mass": 0.11, "pairs": 0.1}, {"mass": 0.41, "pairs": 0.4}


def test_a_blind_head_is_named_once(said: pytest.LogCaptureFixture) -> None:
    alarms = Alarms(RunConfig(model=ModelConfig(n_hashes=2, window=32)))
    alarms.check_coverage([[GOOD, DENSE], [GOOD, GOOD]])
    assert not said.messages
    for _ in range(2):
        alarms.check_coverage([[GOOD, GOOD], [GOOD, BLIND]])
    [warning] = said.messages
    assert "LSH layer 1: heads 1 (0.110 on 0.100 of the pairs)" in warning
    assert "model.n_hashes=2" in warning and "model.window above 32" in warning
    alarms.check_coverage([[BLIND], [BLIND]])
    assert len(said.messages) == 2  # of another layer


def test_drift_of_reversible_layers(said: pytest.LogCaptureFixture) -> None:
    Alarms(RunConfig(model=ModelConfig(recompute=Recompute.checkpoint))).check_drift(1.0)
    Alarms(RunConfig(trainer=TrainerConfig(precision=Precision.bf16))).check_drift(0.05)
    alarms = Alarms(RunConfig())
    alarms.check_drift(1e-5)
    assert not said.messages
    alarms.check_drift(0.05)
    alarms.check_drift(0.06)
    [warning] = said.messages
    assert "0.05 (reversible/drift)" in warning and "model.recompute=checkpoint" in warning
