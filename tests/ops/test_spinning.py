"""Threads of OpenMP spin briefly, however the package is loaded; where it is too late, a busy machine is told."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Mapping

import pytest
import torch

from reformer_dist.ops import spinning
from reformer_dist.ops.spinning import SETTINGS, limit_spinning, warn_of_spinning


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before the package was imported."""
    for name in (*SETTINGS, spinning.POLICY):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(spinning, "_is_too_late", False)
    warn_of_spinning.cache_clear()


def settings_of(*arguments: str) -> Mapping[str, str]:
    """What OpenMP has read, by name."""
    clean = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, spinning.POLICY)}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=clean | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [
        line.strip().removeprefix("[host] ").split(" = ") for line in done.stderr.splitlines() if " = " in line
    ]
    return {name: value.strip("'") for name, value in lines}


@pytest.mark.jobs
@pytest.mark.skipif(sys.platform != "linux", reason="the wheels of PyTorch have GNU's runtime on Linux")
def test_a_library_and_a_module_limit_it_before_pytorch_is_loaded() -> None:
    script = "import reformer_dist, torch; torch.ones(9).sum()"
    for arguments in (("-c", script), ("-m", "reformer_dist.evaluate", "--help")):
        assert settings_of(*arguments)["GOMP_SPINCOUNT"] == SETTINGS["GOMP_SPINCOUNT"]


def test_children_inherit_it_and_a_choice_of_the_user_stays(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_spinning()
    assert {name: os.environ.get(name) for name in SETTINGS} == SETTINGS
    for name, value in ((spinning.POLICY, "ACTIVE"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "7")):
        for other in (*SETTINGS, spinning.POLICY):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, value)
        limit_spinning()
        chosen = {other for other in (*SETTINGS, spinning.POLICY) if other in os.environ}
        assert chosen == {name} and os.environ[name] == value


@pytest.mark.parametrize(
    ("is_late", "load", "n_threads", "is_told"),
    [(True, 1.0, 2, True), (True, 0.1, 2, False), (True, 9.0, 1, False), (False, 9.0, 2, False)],
)
def test_who_is_told(
    fresh: None, monkeypatch: pytest.MonkeyPatch, is_late: bool, load: float, n_threads: int, is_told: bool
) -> None:
    """Only where PyTorch came first, several threads are used, and other programs want the cores too."""
    if not is_late:
        monkeypatch.delitem(sys.modules, "torch")
    limit_spinning()
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn_of_spinning()
        warn_of_spinning()
    assert len(told) == is_told
    assert not told or "OMP_WAIT_POLICY" in str(told[0].message)
