"""How long a waiting thread of OpenMP spins before it sleeps.

On cores shared with other programs, a thread that spins takes the core from the one it waits for, and a step may
take ten times as long. On an idle machine, it gains a few percent.

Imports nothing slow: the limit must be set before PyTorch is loaded.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings

SPIN_COUNT = "1000"
# read once, when GNU's runtime (PyTorch's wheels, the C library here) or Intel's and LLVM's is loaded
SETTINGS = {"GOMP_SPINCOUNT": SPIN_COUNT, "KMP_BLOCKTIME": "1"}
POLICY = "OMP_WAIT_POLICY"  # of both
_is_too_late = False


def limit_spinning() -> None:
    """Sets the environment of this process and its children, unless the user has chosen."""
    global _is_too_late
    if POLICY in os.environ or not os.environ.keys().isdisjoint(SETTINGS):
        return
    os.environ.update(SETTINGS)
    _is_too_late = "torch" in sys.modules


@functools.cache
def warn_of_spinning() -> None:
    """Warns, once, if threads spin that other programs on this machine delay. Called where threads are used."""
    import torch

    n_threads, n_cores = torch.get_num_threads(), os.cpu_count() or 1
    if _is_too_late and n_threads > 1 and os.getloadavg()[0] > n_cores - n_threads + 0.5:
        warnings.warn(
            f"this machine is busy, and waiting threads of OpenMP spin on its cores, which may take ten times as "
            f"long: import reformer_dist before torch, or set {POLICY}=PASSIVE or OMP_NUM_THREADS=1 at the start",
            stacklevel=2,
        )
