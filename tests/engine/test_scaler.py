"""The fp16 loss scale is restored on resume, in runs that have one; tested without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from reformer_dist.engine import TrainEngine

SCALE = {"cur_scale": 4096.0, "cur_iter": 9, "last_overflow_iter": 3, "cur_hysteresis": 1}


def engine(**optimizer: Any) -> TrainEngine:
    """An engine with nothing but an optimizer."""
    made = TrainEngine.__new__(TrainEngine)
    made._engine = SimpleNamespace(optimizer=SimpleNamespace(**optimizer))
    return made


def scaler(*, dynamic: bool, scale: float) -> SimpleNamespace:
    start = {"cur_scale": scale, "cur_iter": 0, "last_overflow_iter": -1, "cur_hysteresis": 2}
    return SimpleNamespace(dynamic=dynamic, **start)


def test_a_dynamic_scale_goes_on() -> None:
    resumed = engine(loss_scaler=scaler(dynamic=True, scale=65536.0))
    resumed.load_scaler_state(SCALE)
    assert resumed.scaler_state() == SCALE


def test_other_precisions_have_none() -> None:
    for other in (engine(), engine(loss_scaler=scaler(dynamic=False, scale=1.0))):
        assert other.scaler_state() == {}
        before = vars(other._engine.optimizer).copy()
        other.load_scaler_state(SCALE)
        assert vars(other._engine.optimizer) == before
    fixed = engine(loss_scaler=scaler(dynamic=False, scale=1.0))
    fixed.load_scaler_state(SCALE)
    assert fixed._engine.optimizer.loss_scaler.cur_scale == 1.0


def test_a_run_without_a_scale_goes_on_in_fp16() -> None:
    resumed = engine(loss_scaler=scaler(dynamic=True, scale=65536.0))
    resumed.load_scaler_state({})
    assert resumed._engine.optimizer.loss_scaler.cur_scale == pytest.approx(65536.0)
