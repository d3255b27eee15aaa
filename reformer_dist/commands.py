"""What the installed commands call: it settles how threads wait before PyTorch is loaded, then hands over."""

from __future__ import annotations

import os

from reformer_dist.process.signals import exit_on_interrupt

SPIN_COUNT = "1000"


def _wait_patiently() -> None:
    """Lets threads of GNU OpenMP spin only briefly for one another.

    With other programs on the cores, threads that spin for ten times as long made a step ten times slower: a
    thread that waits burns the time that the one it waits for needs. On an idle machine they gain some percent.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def train() -> None:
    _wait_patiently()
    from reformer_dist.train import main

    main()


def evaluate() -> None:
    _wait_patiently()
    with exit_on_interrupt():
        from reformer_dist.evaluate import main

    main()


def generate() -> None:
    _wait_patiently()
    with exit_on_interrupt():
        from reformer_dist.generate import main

    main()


def convert() -> None:
    with exit_on_interrupt():
        from reformer_dist.convert import main

    main()


def doctor() -> None:
    _wait_patiently()
    with exit_on_interrupt():
        from reformer_dist.doctor.__main__ import main

    main()


def checkpoints() -> None:
    with exit_on_interrupt():
        from reformer_dist.checkpoints import main

    main()
