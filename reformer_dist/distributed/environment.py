"""What a launcher's environment says about this process, and the errors that all ranks share.

Imports nothing slow: a command that only prints help, or refuses an override, needs no PyTorch.
"""

from __future__ import annotations

import os

from reformer_dist.errors import UserError


class SharedError(UserError):
    """An error that all ranks raise together, so that one of them may report it for all."""


class Preempted(SharedError):
    """All ranks stop at the same point, by a stop signal or unreachable data; progress is saved."""


class Unavailable(SharedError):
    """A data source does not respond to some ranks; the run may resume once it does."""


def is_rank() -> bool:
    """Whether a launcher started this process as a rank, which must not launch a job itself."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def env_rank() -> int:
    """Rank from the launcher's environment; 0 without one, or if it is not a number, which `start` refuses."""
    return _env_number("RANK", 0)


def env_world_size() -> int:
    """World size from the launcher's environment; 1 without a launcher."""
    return _env_number("WORLD_SIZE", 1)


def _env_number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def ranks_per_node() -> int:
    """Ranks on this machine from the launcher's environment; the world size without a launcher."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun's, deepspeed's
        if name in os.environ:
            return int(os.environ[name])
    return env_world_size()


def explain(error: UserError | OSError) -> str:
    """The message of an error; that of the operating system as "path: reason" instead of "[Errno 13] ..."."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    is_path = isinstance(error.filename, str | bytes)  # not a file descriptor
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if is_path else error.strerror
