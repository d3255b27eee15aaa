"""What all commands share: a user's error is one message on standard error and exit status 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from reformer_dist import log
from reformer_dist.distributed import runtime
from reformer_dist.errors import ConfigError, UserError


def run_command(command: Callable[[], None]) -> None:
    """Runs a command to its end, or exits with one message.

    What every rank finds alike (a bad override, an error that the ranks agreed on) only rank 0 tells.
    """
    log.configure()
    try:
        command()
    except (ConfigError, runtime.SharedError) as error:
        runtime.stop()
        _exit(error, speaks=runtime.env_rank() == 0)
    except UserError as error:
        # this rank alone knows; its launcher ends the others
        _exit(error, speaks=True)
    except KeyboardInterrupt:
        sys.exit(130)
    runtime.stop()
    if runtime.env_world_size() > 1:
        _leave_at_once()


def _leave_at_once() -> NoReturn:
    """Ends a rank of a finished job without the interpreter's farewell.

    DeepSpeed keeps process groups alive; a thread of gloo that drops a tensor while the interpreter goes down
    aborts the process, and its launcher would call a good run a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _exit(error: UserError, speaks: bool) -> NoReturn:
    if speaks:
        sys.stdout.flush()
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
    sys.exit(1)
