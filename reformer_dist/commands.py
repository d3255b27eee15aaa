"""Entry points of the installed commands: configure OpenMP before PyTorch is loaded, then call `main`."""

from __future__ import annotations

import os
from importlib import import_module

from reformer_dist.process.signals import exit_on_interrupt

SPIN_COUNT = "1000"


def _limit_spinning() -> None:
    """Lets waiting threads of GNU OpenMP spin only briefly.

    On cores shared with other programs, ten times as much spinning made a step ten times slower, since a waiting
    thread takes the core from the one it waits for. On an idle machine, it gains a few percent.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def train() -> None:
    _limit_spinning()
    from reformer_dist.train import main

    main()


def _run_main(module: str) -> None:
    with exit_on_interrupt():
        main = import_module(module).main
    main()


def evaluate() -> None:
    _limit_spinning()
    _run_main("reformer_dist.evaluate")


def generate() -> None:
    _limit_spinning()
    _run_main("reformer_dist.generate")


def convert() -> None:
    _run_main("reformer_dist.convert")


def doctor() -> None:
    _limit_spinning()
    _run_main("reformer_dist.doctor.__main__")


def checkpoints() -> None:
    _run_main("reformer_dist.checkpoints")
