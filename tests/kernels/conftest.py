"""Fixtures of the kernel tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fills uninitialized memory with nan, so that reading it shows in the results."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x):
        return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(-(2**30))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
