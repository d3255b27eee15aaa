"""StopSignal: graceful stop on a signal, agreed on by all ranks.

Schedulers send SIGTERM, SIGUSR1 or SIGUSR2 some seconds before SIGKILL, and a terminal that closes sends SIGHUP. A
thread receives signals even while the main thread waits in a collective. Before rendezvous they end the process;
later, the ranks agree at the next step or held-out batch, save and exit. A second SIGINT ends the process at once.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from reformer_dist.distributed.runtime import Preempted, Runtime
from reformer_dist.errors import UserError
from reformer_dist.process.exit_status import INTERRUPTED, PREEMPTED
from reformer_dist.process.signals import SIGNALS

T = TypeVar("T")
EXIT_SECONDS = 10.0  # time for the parts of a stopped run to close
REPEAT_SECONDS = 1.0  # a second SIGINT within this time is the first one, sent by both terminal and launcher


class StopSignal:
    """Whether this process received a stop signal; never set before `listen`."""

    def __init__(self) -> None:
        self._name = ""
        self._is_deferred = False
        self._first = 0.0

    @property
    def is_set(self) -> bool:
        return self._name != ""

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Receives signals, in the main thread only. Until `defer_to_steps` they end the process."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        # under nohup, SIGHUP stays ignored
        ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        handled = [signum for signum in SIGNALS if signum is not signal.SIGHUP or not ignores_hangup]
        previous = {signum: signal.signal(signum, lambda *_: None) for signum in handled}
        wakeup = signal.set_wakeup_fd(writer.fileno())
        threading.Thread(target=self._receive, args=(reader,), name="signals", daemon=True).start()
        owner = os.getpid()
        os.register_at_fork(after_in_child=lambda: _restore_defaults(owner, handled))
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for signum, handler in previous.items():
                signal.signal(signum, handler)
            writer.close()

    def defer_to_steps(self) -> None:
        """From now on a signal takes effect between steps."""
        self._is_deferred = True

    def exit_soon(self) -> None:
        """Ends the process after EXIT_SECONDS even if a part does not close, such as a hung data source."""
        timer = threading.Timer(EXIT_SECONDS, os._exit, args=(PREEMPTED,))
        timer.daemon = True
        timer.start()

    def until_stopped(self, items: Iterable[T], runtime: Runtime) -> Iterator[T]:
        """Yields the items, of which every rank has the same number.

        Before each item, raises on every rank: Preempted if any received a stop signal, or the error of any
        rank that failed to produce its item.
        """
        source = iter(items)
        while True:
            next_item: list[T] = []
            error = None
            try:
                next_item = [next(source)]
            except StopIteration:
                return
            except (UserError, OSError) as raised:
                error = raised
            stopped, failed = runtime.sum([float(self.is_set), float(error is not None)])
            if stopped:
                raise Preempted("stopped by a signal")
            if failed:
                runtime.raise_together(error)
            yield from next_item

    def _receive(self, reader: socket.socket) -> None:
        with reader:
            while received := reader.recv(1):
                if received[0] in SIGNALS:
                    self._handle(signal.Signals(received[0]))

    def _handle(self, signum: signal.Signals) -> None:
        now = time.monotonic()
        if not self._is_deferred:
            os._exit(PREEMPTED)
        if self.is_set and signum is signal.SIGINT and now - self._first > REPEAT_SECONDS:
            os._exit(INTERRUPTED)
        if not self.is_set:
            self._first, self._name = now, signum.name


def _restore_defaults(owner: int, handled: list[signal.Signals]) -> None:
    """In a forked child, signals end the process as usual and are not reported to the parent."""
    if os.getpid() != owner:
        signal.set_wakeup_fd(-1)
        for signum in handled:
            signal.signal(signum, signal.SIG_DFL)
