"""Being told to stop: SIGTERM, SIGINT and SIGHUP are heard whatever the main thread does; all ranks obey alike.

Schedulers send SIGTERM some seconds before they kill, a terminal that closes sends SIGHUP. A thread hears them
even while the main thread waits in a collective. Before the job has come together the process ends at once; after
that, the ranks agree at the next step or held-out batch, save, and end. A second SIGINT ends the process at once.
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
from reformer_dist.process.signals import INTERRUPTED, SIGNALS

T = TypeVar("T")
LINGER = 10.0  # seconds that the parts of a stopped run may take to close
ECHO = 1.0  # seconds in which a second SIGINT is the first one, sent by the terminal and by a launcher


class StopSignal:
    """Whether this process was told to stop; before `listen`, it never is."""

    def __init__(self) -> None:
        self._name = ""
        self._is_awaited = False
        self._first = 0.0

    @property
    def is_set(self) -> bool:
        return self._name != ""

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Hears signals from now on; in the main thread only. Until `defer_to_steps` they end the process."""
        near, far = socket.socketpair()
        far.setblocking(False)
        # under nohup, SIGHUP stays ignored
        is_deaf_to_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        heard = [signum for signum in SIGNALS if signum is not signal.SIGHUP or not is_deaf_to_hangup]
        before = {signum: signal.signal(signum, lambda *_: None) for signum in heard}
        wakeup = signal.set_wakeup_fd(far.fileno())
        threading.Thread(target=self._hear, args=(near,), name="signals", daemon=True).start()
        owner = os.getpid()
        os.register_at_fork(after_in_child=lambda: _be_deaf(owner, heard))
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for signum, handler in before.items():
                signal.signal(signum, handler)
            far.close()

    def defer_to_steps(self) -> None:
        """From now on a signal is obeyed between steps."""
        self._is_awaited = True

    def exit_soon(self) -> None:
        """Ends the process within seconds even if a part does not close, such as a source that never answers."""
        timer = threading.Timer(LINGER, os._exit, args=(os.EX_TEMPFAIL,))
        timer.daemon = True
        timer.start()

    def until_stopped(self, things: Iterable[T], runtime: Runtime) -> Iterator[T]:
        """Passes on as many things on every rank.

        Between two of them raises alike on every rank: Preempted if any was told to stop, or the error that any
        had with its next thing.
        """
        source = iter(things)
        while True:
            following: list[T] = []
            error = None
            try:
                following = [next(source)]
            except StopIteration:
                return
            except (UserError, OSError) as caught:
                error = caught
            stopped, failed = runtime.sum([float(self.is_set), float(error is not None)])
            if stopped:
                raise Preempted("told to stop")
            if failed:
                runtime.raise_together(error)
            yield from following

    def _hear(self, near: socket.socket) -> None:
        with near:
            while heard := near.recv(1):
                if heard[0] in SIGNALS:
                    self._obey(signal.Signals(heard[0]))

    def _obey(self, signum: signal.Signals) -> None:
        now = time.monotonic()
        if not self._is_awaited:
            os._exit(os.EX_TEMPFAIL)
        if self.is_set and signum is signal.SIGINT and now - self._first > ECHO:
            os._exit(INTERRUPTED)
        if not self.is_set:
            self._first, self._name = now, signum.name


def _be_deaf(owner: int, heard: list[signal.Signals]) -> None:
    """A forked child is ended by signals as any process, and does not tell its parent of them."""
    if os.getpid() != owner:
        signal.set_wakeup_fd(-1)
        for signum in heard:
            signal.signal(signum, signal.SIG_DFL)
