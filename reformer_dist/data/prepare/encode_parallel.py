"""Encoding of samples on all cores, resumable: one process reads, the others tokenize batch after batch.

Batches hold consecutive samples, so they do not depend on the number of processes. A batch that an earlier run
finished is used again if the samples read now are those that it was made of.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from reformer_dist.data.format.load_tokenizer import load_tokenizer
from reformer_dist.data.format.tokenizer import Tokenizer
from reformer_dist.data.prepare.encoded_batches import EncodedBatch, write_batch
from reformer_dist.data.prepare.encoding import samples_digest
from reformer_dist.data.prepare.samples import SAMPLE_OVERHEAD, Assigned
from reformer_dist.errors import DataError

BATCH_BYTES = 8 << 20  # of text
BATCHES_IN_FLIGHT = 2  # per process: bounds the memory of the reader

OnRead = Callable[[int], None]
"""Called with the bytes of text of each batch that was read and is tokenized or taken over."""

T = TypeVar("T")
_encoder: tuple[Tokenizer, str]  # of a worker process: the tokenizer and its specification


def encode_batches(
    samples: Iterable[Assigned],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    workers: int = 0,
    on_read: OnRead = lambda n_bytes: None,
) -> list[EncodedBatch]:
    """Writes samples as batches into a folder, where batches of an earlier run may be.

    workers: processes that tokenize; 0 tokenizes in this one. Raises DataError if a sample can't be encoded or a
    worker is killed.
    """
    folder.mkdir(exist_ok=True)
    done: list[EncodedBatch | Future[EncodedBatch]] = []
    waiting: deque[Future[EncodedBatch]] = deque()
    spec = tokenizer.save(folder)
    with ExitStack() as stack:
        submit = _start_workers(stack, spec, folder, workers) if workers else None
        for number, (batch, n_bytes) in enumerate(_cut(samples)):
            path = folder / f"{number:08d}.batch"
            existing = EncodedBatch.open(path)
            if existing is not None and existing.digest == samples_digest(batch, _as_json(spec)):
                done.append(existing)
            elif submit is None:
                done.append(write_batch(path, batch, tokenizer, _as_json(spec)))
            else:
                path.with_suffix(".json").unlink(missing_ok=True)  # of other samples
                waiting.append(submit(write_batch, path, batch))
                done.append(waiting[-1])
                if len(waiting) >= BATCHES_IN_FLIGHT * workers:
                    waiting.popleft().result()
            on_read(n_bytes)
        return [each if isinstance(each, EncodedBatch) else each.result() for each in done]


def map_in_parallel(
    function: Callable[..., T], jobs: Iterable[Any], tokenizer: Tokenizer, folder: Path, workers: int
) -> Iterator[T]:
    """Results of function(job, folder, tokenizer, specification of the tokenizer), in the order of the jobs."""
    folder.mkdir(exist_ok=True)
    spec = tokenizer.save(folder)
    with ExitStack() as stack:
        if workers == 0:
            yield from (function(job, folder, tokenizer, _as_json(spec)) for job in jobs)
            return
        submit = _start_workers(stack, spec, folder, workers)
        for future in [submit(function, job, folder) for job in jobs]:
            yield future.result()


def _cut(samples: Iterable[Assigned]) -> Iterator[tuple[list[Assigned], int]]:
    """(consecutive samples, bytes of their text)."""
    batch: list[Assigned] = []
    n_bytes = n_objects = 0
    for split, sample in samples:
        batch.append((split, sample))
        n_bytes += sum(map(len, sample.fields))
        n_objects += 1
        if n_bytes + n_objects * SAMPLE_OVERHEAD >= BATCH_BYTES:
            yield batch, n_bytes
            batch, n_bytes, n_objects = [], 0, 0
    if batch:
        yield batch, n_bytes


def _start_workers(
    stack: ExitStack, spec: Mapping[str, Any], folder: Path, workers: int
) -> Callable[..., Future[Any]]:
    """A function that submits a call, to which a worker adds the tokenizer and its specification as arguments.

    Workers end with the context, and if this process dies.
    """
    context = multiprocessing.get_context("forkserver")  # a fork would inherit the threads of tokenizers and Arrow
    context.set_forkserver_preload([__name__])
    executor = ProcessPoolExecutor(workers, context, _begin, (spec, folder))
    stack.callback(executor.shutdown, wait=True, cancel_futures=True)
    stack.enter_context(_explaining_killed_workers())
    return lambda function, *arguments: executor.submit(_call, function, *arguments)


@contextmanager
def _explaining_killed_workers() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        hint = "give fewer --workers if memory is short, and run the command again to go on"
        raise DataError(f"a process that tokenizes was killed; {hint}") from error


def _begin(spec: Mapping[str, Any], folder: Path) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = load_tokenizer(spec, folder), _as_json(spec)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(function: Callable[..., T], *arguments: Any) -> T:
    return function(*arguments, *_encoder)


def _as_json(spec: Mapping[str, Any]) -> str:
    return json.dumps(spec, sort_keys=True)
