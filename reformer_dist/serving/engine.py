"""The thread that owns the model: texts of all requests advance by a token each, in turn.

Requests join and leave between steps. Each prompt has a decoding state of its own, so the texts of one request are
computed exactly as if nothing ran beside them. At most one prompt is read per turn: streams in progress wait for
one prompt at a time.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reformer_dist.errors import UserError
from reformer_dist.generation.decoder import PrefixDecoder
from reformer_dist.inference.continuation import SampledTexts, TextOptions, TextStep
from reformer_dist.inference.prefixes import PrefixCache, read_prefix
from reformer_dist.process.log import logger
from reformer_dist.run.pretrained import LoadedModel
from reformer_dist.serving.metrics import Metrics

MEASURE_EVERY = 64  # steps of a text
Receiver = Callable[["list[TextStep] | Exception"], None]
"""Takes the new tokens of the texts of a prompt, or the error that ended them. Called in the engine's thread."""


class EngineBusy(Exception):
    """There is no room for more texts to wait."""


class EngineStopped(Exception):
    """The engine ends, or has ended."""


@dataclass(eq=False)
class Job:
    """The texts of one prompt."""

    prompt: Tensor
    options: TextOptions
    receive: Receiver
    created: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False
    """Set by any thread; the engine drops the job before its next step."""
    texts: SampledTexts | None = None
    n_prefix: int = 0
    """Leading tokens of the prompt whose state is kept for other prompts; 0: none."""
    n_cached: int = 0
    """Those that were found in the cache."""
    n_steps: int = 0
    n_new_tokens: int = 0
    state_bytes: int = 0
    """As of the last step that is a multiple of MEASURE_EVERY."""

    @property
    def n_texts(self) -> int:
        return self.options.samples


class Engine:
    """Generates the texts of jobs, up to max_streams at a time, in the order of their submission."""

    def __init__(
        self, loaded: LoadedModel, metrics: Metrics, *, max_streams: int, max_queue: int, prefix_bytes: int = 0
    ) -> None:
        """max_queue: number of texts that may wait for a stream. prefix_bytes: of the prefix cache."""
        self._loaded, self._metrics = loaded, metrics
        self._max_streams, self._max_queue = max_streams, max_queue
        self._prefixes = PrefixCache(prefix_bytes)
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_stopping

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all jobs, or none. Raises EngineBusy and EngineStopped."""
        with self._changed:
            if not self.is_alive:
                raise EngineStopped("the server is shutting down")
            n_texts = sum(job.n_texts for job in (*jobs, *self._waiting, *self._running) if not job.is_cancelled)
            if n_texts > self._max_streams + self._max_queue:
                limits = f"--max-streams {self._max_streams} and --max-queue {self._max_queue} are taken"
                raise EngineBusy(f"{limits}; try again later")
            self._waiting.extend(jobs)
            self._changed.notify()

    def stop(self) -> None:
        """Ends the thread after the step in progress; unfinished jobs receive EngineStopped."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._step_until_stopped()
        except Exception as error:
            logger.error("".join(traceback.format_exception(error)))
        with self._changed:
            self._is_stopping = True
        for job in (*self._running, *self._waiting):
            job.receive(EngineStopped("the server is shutting down"))

    def _step_until_stopped(self) -> None:
        while True:
            with self._changed:
                self._drop_cancelled()
                while not (self._running or self._waiting or self._is_stopping):
                    self._changed.wait()
                if self._is_stopping:
                    return
                self._admit()
            for job in list(self._running):
                self._step(job)

    def _drop_cancelled(self) -> None:
        self._running = [job for job in self._running if not job.is_cancelled]
        self._waiting = deque(job for job in self._waiting if not job.is_cancelled)
        self._measure()

    def _admit(self) -> None:
        """Starts the first waiting job if there are streams for it. No later one overtakes it."""
        n_streams = sum(job.n_texts for job in self._running)
        if self._waiting and n_streams + self._waiting[0].n_texts <= self._max_streams:
            self._running.append(self._waiting.popleft())
        self._measure()

    def _measure(self) -> None:
        self._metrics.set("streams", sum(job.n_texts for job in self._running))
        self._metrics.set("waiting", sum(job.n_texts for job in self._waiting))
        self._metrics.set("prefix_bytes", self._prefixes.n_bytes)
        self._metrics.set("state_bytes", sum(job.state_bytes for job in self._running))

    def _step(self, job: Job) -> None:
        if job.is_cancelled:
            return
        try:
            if job.texts is None:
                job.texts = SampledTexts(self._loaded, [job.prompt], job.options, decoder=self._continue(job))
            steps = job.texts.step()
            if job.n_steps % MEASURE_EVERY == 0:
                job.state_bytes = job.texts.n_bytes()
            job.n_steps += 1
        except Exception as error:
            self._fail(job, error)
            return
        if steps and job.n_new_tokens == 0:
            self._metrics.count("prompt_tokens_total", job.prompt.numel())
            self._metrics.add_first_token(time.monotonic() - job.created)
        job.n_new_tokens += len(steps)
        self._metrics.count("completion_tokens_total", len(steps))
        for step in steps:
            if step.end is not None:
                self._metrics.count("texts_total", end=step.end.name)
        if job.texts.is_done:
            job.texts = None  # the job lives as long as its client reads
            self._running.remove(job)
        job.receive(steps)

    def _continue(self, job: Job) -> PrefixDecoder | None:
        """The decoder of a prompt with a prefix, after that."""
        if job.n_prefix == 0:
            return None
        tokens = job.prompt[: job.n_prefix]
        state = self._prefixes.get(tokens)
        if state is None:
            state = read_prefix(self._loaded, tokens)
            self._prefixes.put(tokens, state)
        else:
            job.n_cached = job.n_prefix
        self._metrics.count("prefix_hits_total" if job.n_cached else "prefix_misses_total")
        return state.continued(job.prompt[job.n_prefix :])

    def _fail(self, job: Job, error: Exception) -> None:
        """Ends one job; the others go on."""
        self._running.remove(job)
        job.texts = None
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        if not isinstance(error, UserError):
            logger.error("".join(traceback.format_exception(error)))
        self._metrics.count("texts_total", job.n_texts, end="error")
        job.receive(error)
