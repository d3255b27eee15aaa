"""What all commands share: a user's error is one message on standard error and exit status 1."""

from __future__ import annotations

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


def _exit(error: UserError, speaks: bool) -> NoReturn:
    if speaks:
        sys.stdout.flush()
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
    sys.exit(1)
