"""When a rank is lost, every other rank ends soon, with one message that names the lost one.

A collective that fails tells no more than a closed connection, and the peer that closed it may itself be one that
left because of another. Some ranks are told nothing: they wait for a peer that is alive and waits as well. So each
rank has a thread that answers for it in the job's store as soon as any rank raises the alarm, whatever its main
thread is waiting for. Who does not answer is lost; who failed has left its words; who answers but never came to
the collective that others waited for hangs.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import distributed_c10d

from reformer_dist.distributed.rendezvous import launcher_hosts_store
from reformer_dist.distributed.runtime import Runtime, SharedError
from reformer_dist.errors import PeerLost

POLL = 0.5  # seconds between two looks at the store while all is well, one small request each
HURRY = 0.2  # seconds between two looks at what the others say
ANSWER = 5.0  # seconds that a rank has to answer an alarm: its thread needs one, unless its machine is very busy
PATIENCE = 5.0  # seconds that a main thread has to notice by itself what its watch knows
LEAVE = 10.0  # seconds that it then has to close its files and end
LOG = "failures/log"  # in the store: a line of JSON for each note
MAX_WORDS = 500
# gloo raises plain RuntimeErrors, but names its source file in all of them
SIGNS = ("gloo/transport/", "third_party/gloo/", "Gloo connectFullMesh")
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
# whose innermost lines wait for what they have sent before
WAITERS = (str(Path(__file__).parent), "/deepspeed/")
LIBRARIES = ("/site-packages/", "/dist-packages/", "/lib/python")


class Kind(str, Enum):
    failed = "failed"
    """Raised an error of its own."""
    noticed = "noticed"
    """A collective failed under it."""
    waiting = "waiting"
    """Its main thread is in a collective, as far as can be seen."""
    busy = "busy"
    """Its main thread is elsewhere."""
    done = "done"
    """Knows who was lost, and needs the store no more."""


@dataclass(frozen=True)
class Note:
    """What a rank says of itself; a later one replaces an earlier."""

    rank: int
    kind: Kind
    words: str = ""
    place: str = ""


@contextmanager
def named(job: Runtime, advice: str = "") -> Iterator[None]:
    """Around all that a job does together. Raises PeerLost, which names the lost ranks, where a collective fails.

    Any other error goes on as it is, once the other ranks can read of it. After an error that the ranks did not
    agree on, the process has to end: if it does not within seconds, it is ended.

    advice: what the user should do, said behind what happened.
    """
    if job.world_size == 1:
        yield
        return
    watch = _Watch(job, advice)
    try:
        yield
        job.barrier()  # a rank that ends early must not look like a lost one
    except SharedError:
        watch.stop()
        raise
    except BaseException as error:
        if not is_of_a_collective(error):
            watch.report(Note(job.rank, Kind.failed, _words(error)), error)
            raise
        stack = list(traceback.walk_tb(error.__traceback__))[::-1]
        note = Note(job.rank, Kind.noticed, _words(error), _place(stack))
        raise PeerLost(watch.report(note, error)) from error
    watch.stop()


def is_of_a_collective(error: BaseException) -> bool:
    """Whether it, or what it came from, tells of the connection to other ranks and not of this one."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError):
            return True
        if isinstance(seen, RuntimeError) and any(sign in str(seen) for sign in SIGNS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def judge(notes: dict[int, Note], world_size: int) -> str:
    """Who was lost, from all that the ranks said of themselves in time."""
    of, said = f"of {world_size}", sorted(notes.items())
    found = [f"rank {rank} {of} failed: {note.words}" for rank, note in said if note.kind is Kind.failed]
    silent = [str(rank) for rank in range(world_size) if rank not in notes]
    if silent:
        were = f"rank {silent[0]} {of} was" if len(silent) == 1 else f"ranks {', '.join(silent)} {of} were"
        found.append(f"{were} lost: ended without a word, or does not answer")
    if not found and any("timed out" in note.words.lower() for note in notes.values()):
        found = [
            f"rank {rank} {of} hangs at {note.place}: the others waited for it in a collective"
            for rank, note in said
            if note.kind is Kind.busy
        ]
    if not found:
        each = "; ".join(f"rank {rank} at {note.place}: {note.words or note.kind.value}" for rank, note in said)
        found = [f"all {world_size} ranks are alive, but a collective failed among them: {each}"]
    return "; ".join(found)


class _Watch:
    """Answers for this rank in the job's store, and ends the process if its main thread does not."""

    def __init__(self, job: Runtime, advice: str) -> None:
        self._rank, self._world_size, self._advice = job.rank, job.world_size, advice
        self._main = threading.get_ident()
        # a connection of its own: on the shared one it would wait for whatever the main thread waits for
        self._store: Any = _default_store().clone()
        self._lifeline = _connect_to_host()
        self._is_cut_off = False
        self._notes: dict[int, Note] = {}
        self._done: set[int] = set()
        self._own: Note | None = None
        self._error: BaseException | None = None
        self._is_stopped = False
        self._settled = threading.Event()  # the main thread has reported, or stopped us
        self._judged = threading.Event()
        self._verdict = ""
        threading.Thread(target=self._run, name="failures", daemon=True).start()

    def stop(self) -> None:
        """The ranks end as they agreed: from now on nothing is a failure."""
        self._is_stopped = True
        self._settled.set()

    def report(self, note: Note, error: BaseException) -> str:
        """From the main thread: raises the alarm, and returns who was lost."""
        self._own, self._error = note, error
        self._settled.set()
        if self._judged.wait(2 * ANSWER + PATIENCE):
            return self._verdict
        self._is_cut_off = True  # our thread waits for a store that does not answer
        return self._who()

    def _run(self) -> None:
        with self._lifeline:
            self._wait_and_judge()
        if self._settled.wait(PATIENCE):
            if self._is_stopped:
                return
            time.sleep(LEAVE)
        self._end()

    def _wait_and_judge(self) -> None:
        while not self._settled.wait(POLL) and not self._ask("check", [LOG]):
            if self._is_cut_off:
                self._settled.wait()  # that alone is no reason to end a job
        if self._is_stopped:
            return
        time.sleep(HURRY)  # a host that dies closes its connections one after another
        self._collect()
        self._verdict = self._who()
        self._release_store()
        self._judged.set()

    def _collect(self) -> None:
        """Waits until every rank has said what it knows, or should have."""
        deadline = time.monotonic() + ANSWER
        while not self._is_cut_off and time.monotonic() < deadline:
            self._answer()
            self._read()
            kinds = {note.kind for note in self._notes.values()}
            if len(self._notes) == self._world_size and (Kind.failed in kinds or kinds == {Kind.noticed}):
                return
            time.sleep(HURRY)

    def _answer(self) -> None:
        if self._own is not None:
            if self._notes.get(self._rank) != self._own:
                self._write(self._own)
        elif self._rank not in self._notes:
            self._write(_look_at(self._rank, sys._current_frames()[self._main]))

    def _release_store(self) -> None:
        """The rank that hosts the store stays until the others have read what is in it."""
        self._write(Note(self._rank, Kind.done))
        deadline = time.monotonic() + ANSWER
        while self._rank == 0 and not self._is_cut_off and time.monotonic() < deadline:
            self._read()
            if self._done.issuperset(self._notes):
                return
            time.sleep(HURRY)

    def _who(self) -> str:
        has_failed = any(note.kind is Kind.failed for note in self._notes.values())
        if self._is_cut_off and not has_failed:
            host = "the job's launcher" if launcher_hosts_store() else f"rank 0 of {self._world_size}"
            words = f"{host}, which hosts the job's store, was lost: ended without a word, or does not answer"
        else:
            words = judge(self._notes, self._world_size)
        return f"{words}; {self._advice}" if self._advice else words

    def _write(self, note: Note) -> None:
        self._ask("append", LOG, json.dumps(asdict(note)) + "\n")

    def _read(self) -> None:
        for line in (self._ask("get", LOG) or b"").decode().splitlines():
            said = json.loads(line)
            note = Note(**{**said, "kind": Kind(said["kind"])})
            if note.kind is Kind.done:
                self._done.add(note.rank)
            else:
                self._notes[note.rank] = note

    def _ask(self, request: str, *args: Any) -> Any:
        """A request to the store; None where it is gone."""
        # the store's own client would print a page of addresses about the connection before it raises
        self._is_cut_off = self._is_cut_off or _has_ended(self._lifeline)
        if not self._is_cut_off:
            try:
                return getattr(self._store, request)(*args)
            except RuntimeError:
                self._is_cut_off = True
        return None

    def _end(self) -> NoReturn:
        """Ends the process from this thread: the main one waits for something that will not come."""
        with suppress(Exception):
            sys.stdout.flush()
        with suppress(OSError):  # nobody may read it any more
            if self._error is not None and not is_of_a_collective(self._error):
                traceback.print_exception(self._error)
            else:
                sys.stderr.write(f"error: {self._verdict}\n")
            sys.stderr.flush()
        os._exit(1)


def _default_store() -> Any:
    return distributed_c10d._get_default_store()


def _connect_to_host() -> socket.socket:
    """A connection to the store's port on which nothing is said: it ends when the host does."""
    return socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))


def _has_ended(connection: socket.socket) -> bool:
    try:
        return bool(select.select([connection], [], [], 0)[0]) and connection.recv(1) == b""
    except OSError:
        return True


def _words(error: BaseException) -> str:
    """Kind and first line: what some libraries write below it is long."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:MAX_WORDS] if lines else type(error).__name__


def _look_at(rank: int, frame: FrameType) -> Note:
    """What the main thread does just now."""
    stack = list(traceback.walk_stack(frame))
    waits = any(part in _file(each) for each, _ in stack for part in COLLECTIVES)
    waits = waits or any(part in _file(frame) for part in WAITERS)
    return Note(rank, Kind.waiting if waits else Kind.busy, place=_place(stack))


def _place(stack: list[tuple[FrameType, int]]) -> str:
    """The innermost line that is no library's, from frames with the innermost first."""
    ours = [each for each in stack if not any(part in _file(each[0]) for part in LIBRARIES)]
    frame, line = (ours or stack)[0]
    return f"{Path(_file(frame)).name}:{line} in {frame.f_code.co_name}"


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename
