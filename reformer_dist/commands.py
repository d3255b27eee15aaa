"""Entry points of the installed commands: configure OpenMP before PyTorch is loaded, then call `main`."""

from __future__ import annotations

import os

from reformer_dist.process.signals import exit_on_interrupt

SPIN_COUNT = "1000"


def _limit_spinning() -> None:
    """Lets waiting threads of GNU OpenMP spin only briefly.

    With other programs on the cores, ten times as much spinning made a step ten times slower, since a waiting
    thread takes the core from the one it waits for. On an idle machine it gains a few percent.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def train() -> None:
    _limit_spinning()
    from reformer_dist.train import main

    main()


def evaluate() -> None:
    _limit_spinning()
    with exit_on_interrupt():
        from reformer_dist.evaluate import main

    main()


def generate() -> None:
    _limit_spinning()
    with exit_on_interrupt():
        from reformer_dist.generate import main

    main()


def convert() -> None:
    with exit_on_interrupt():
        from reformer_dist.convert import main

    main()


def doctor() -> None:
    _limit_spinning()
    with exit_on_interrupt():
        from reformer_dist.doctor.__main__ import main

    main()


def checkpoints() -> None:
    with exit_on_interrupt():
        from reformer_dist.checkpoints import main

    main()
