"""What the installed commands call: it settles how threads wait before PyTorch is loaded, then hands over."""

from __future__ import annotations

import os

SPIN_COUNT = "10000"


def _wait_patiently() -> None:
    """Lets threads of GNU OpenMP spin only briefly for one another.

    Tens of microseconds: long enough for one small operation to follow another without a thread falling asleep
    on an idle machine; short enough not to burn a core that another program wants, which can double a step.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def train() -> None:
    _wait_patiently()
    from reformer_dist.train import main

    main()


def evaluate() -> None:
    _wait_patiently()
    from reformer_dist.evaluate import main

    main()


def generate() -> None:
    _wait_patiently()
    from reformer_dist.generate import main

    main()
