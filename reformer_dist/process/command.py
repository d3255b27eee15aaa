"""What all commands share: a user's error is one message on standard error and exit status 1."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from reformer_dist.distributed import runtime
from reformer_dist.errors import ConfigError, UserError
from reformer_dist.process import log, stdio
from reformer_dist.process.signals import INTERRUPTED

PREEMPTED = os.EX_TEMPFAIL  # 75: told to end by a signal, and saved; the same command goes on
HEAR_OUT = 10.0  # seconds that silent ranks leave to rank 0, which speaks for all


def run_command(command: Callable[[], None]) -> None:
    """Runs a command to its end, or exits with one message.

    What every rank finds alike (a bad override, an error that the ranks agreed on) only rank 0 tells.
    """
    log.configure()
    _drop_local_rank()
    with stdio.quietly():
        _run(command)


def _run(command: Callable[[], None]) -> None:
    try:
        command()
    except runtime.Preempted as stopped:
        stdio.say(sys.stdout, f"{stopped}\n" if runtime.env_rank() == 0 else "")
        _leave(PREEMPTED)
    except (ConfigError, runtime.SharedError) as error:
        runtime.stop()
        _exit(error, speaks=runtime.env_rank() == 0)
    except UserError as error:
        # this rank alone knows, or others are lost: nothing that waits for them may come now
        _exit(error, speaks=True)
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except Exception:
        if runtime.env_world_size() == 1:
            raise
        sys.excepthook(*sys.exc_info())
        _leave(1)
    runtime.stop()
    if runtime.env_world_size() > 1:
        _leave(0)


def _drop_local_rank() -> None:
    """DeepSpeed's launcher gives each rank its number twice: LOCAL_RANK, and an argument that is no user's."""
    if "LOCAL_RANK" in os.environ:
        sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]


def _leave(status: int) -> NoReturn:
    """Ends a rank of a job of several without the interpreter's farewell.

    DeepSpeed keeps process groups alive; a thread of gloo that drops a tensor while the interpreter goes down
    aborts the process, and a group with a lost rank may never go down.
    """
    stdio.flush()
    if runtime.env_world_size() > 1:
        os._exit(status)
    sys.exit(status)


def _exit(error: UserError, speaks: bool) -> NoReturn:
    if speaks:
        stdio.say(sys.stdout, "")
        stdio.say(sys.stderr, f"error: {error}\n")
    else:
        # a launcher ends all ranks as soon as one has ended: let it be the one that speaks
        time.sleep(HEAR_OUT)
    _leave(1)
