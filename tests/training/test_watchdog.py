"""Watchdog: part of a step that takes too long is logged once, with the rank and its activity."""

from __future__ import annotations

import time

import pytest

from reformer_dist.distributed.runtime import Runtime
from reformer_dist.training.watchdog import Watchdog


def wait_for_words(said: pytest.LogCaptureFixture) -> None:
    while not said.messages:
        time.sleep(0.01)


def test_what_takes_long_is_told_once(job: Runtime, said: pytest.LogCaptureFixture) -> None:
    watchdog = Watchdog(job, 0.1)
    with watchdog.watching():
        with watchdog.phase("waiting for data of step 3"):
            wait_for_words(said)
            time.sleep(0.3)
        time.sleep(0.3)  # between phases nothing is slow
    [words] = said.messages
    assert words.startswith("rank 0 of 1 has been waiting for data of step 3 ")
    assert "0.1 s (trainer.step_timeout)" in words


def test_never_means_never(job: Runtime, said: pytest.LogCaptureFixture) -> None:
    watchdog = Watchdog(job, 0)
    with watchdog.watching(), watchdog.phase("computing step 1"):
        time.sleep(0.05)
    assert said.messages == []
