"""run_command: a user error is one message on standard error and an exit status."""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from reformer_dist.distributed import environment
from reformer_dist.errors import ConfigError, UserError
from reformer_dist.process import log, stdio
from reformer_dist.process.exit_status import FAILED, INTERRUPTED, PREEMPTED

REPORT_SECONDS = 10.0  # time for rank 0 to report an error of all ranks before the others exit


def run_command(command: Callable[[], None]) -> None:
    """Runs a command, or exits with one message.

    An error that is the same on all ranks (an invalid override, an error that the ranks agreed on) is reported by
    rank 0 only. Leaves the job that the command joined, but not one that the caller is in.
    """
    log.configure()
    is_callers_job = _is_in_job()
    if "LOCAL_RANK" in os.environ:  # DeepSpeed's launcher also passes it as an argument
        sys.argv[1:] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    with stdio.exit_quietly():
        try:
            command()
        except environment.Preempted as stopped:
            log.log_to_file(str(stopped))
            stdio.write(sys.stdout, f"{stopped}\n" if environment.env_rank() == 0 else "")
            _exit(PREEMPTED)
        except (ConfigError, environment.SharedError) as error:
            _leave_job(is_callers_job)
            _fail(error, is_reporter=environment.env_rank() == 0)
        except UserError as error:  # of this rank alone, or peers are lost: no collective may follow
            _fail(error, is_reporter=True)
        except KeyboardInterrupt:
            _exit(INTERRUPTED)
        except Exception as error:
            if isinstance(error, OSError) and _is_of_the_machine(error):
                _fail(UserError(environment.explain(error)), is_reporter=True)
            log.log_to_file(traceback.format_exc())
            if environment.env_world_size() == 1:
                raise
            sys.excepthook(*sys.exc_info())
            _exit(FAILED)
        _leave_job(is_callers_job)
        if environment.env_world_size() > 1:
            _exit(0)


def _is_in_job() -> bool:
    """Whether this process has joined a job, without importing PyTorch to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def _leave_job(is_callers_job: bool) -> None:
    if _is_in_job() and not is_callers_job:
        from reformer_dist.distributed import runtime

        runtime.stop()


def _is_of_the_machine(error: OSError) -> bool:
    """Whether the cause is a path or a disk, about which a traceback would say no more than the system does."""
    is_disk = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    return error.strerror is not None and (error.filename is not None or is_disk)


def _exit(status: int) -> NoReturn:
    """Ends a rank of a job with several ranks without the interpreter's cleanup.

    DeepSpeed keeps process groups alive. A gloo thread that frees a tensor during interpreter shutdown aborts the
    process, and destroying a group with a lost rank may hang.
    """
    stdio.flush()
    if environment.env_world_size() > 1:
        os._exit(status)
    sys.exit(status)


def _fail(error: UserError, *, is_reporter: bool) -> NoReturn:
    log.log_to_file(f"error: {error}")
    if is_reporter:
        stdio.write(sys.stdout, "")
        stdio.write(sys.stderr, f"error: {error}\n")
    else:
        # a launcher kills all ranks once one has exited: the reporter must be the first
        time.sleep(REPORT_SECONDS)
    _exit(FAILED)
