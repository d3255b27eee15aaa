"""Trains every case under DeepSpeed, as one rank of a job; writes results.json and checkpoints.

python zero_cases.py [--slow] OUT [OTHER]     OTHER: where another number of processes wrote; read instead of OUT
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import torch
from zero_setup import (
    LEARNING_RATES,
    PROVED,
    READ,
    RESUMED,
    SLOW,
    SLOW_READ,
    STEPS,
    TRAINED,
    VALID,
    VOCAB,
    Case,
    Outcome,
    micro_batches,
    read_name,
    rows,
)

from reformer_dist.checkpoint import AsyncSave, CheckpointReader, RunRecord
from reformer_dist.checkpoint.files import step_folder
from reformer_dist.distributed import runtime
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.engine.fragments import parameter_shapes
from reformer_dist.models.block import Block
from reformer_dist.models.decoding import DecodingState


class Run:
    """One engine; `done` is the number of its steps."""

    def __init__(self, job: Runtime, case: Case, folder: Path) -> None:
        self.job, self.folder, self.done = job, folder, 0
        self.outcome = Outcome()
        model = case.model()
        self.shapes = parameter_shapes(model)
        self.engine = TrainEngine(model, [Block], case.config(), job.world_size)

    def load(self, source: Path) -> None:
        reader = CheckpointReader(source)
        self.engine.load_fragments(reader)
        self.done = reader.step

    def save(self) -> None:
        AsyncSave(
            self.job,
            self.folder,
            self.done,
            self.engine.fragments(),
            rank_state={},
            record=RunRecord(
                config={},
                tokenizer={},
                vocab_size=VOCAB,
                shapes=self.shapes,
                average=None if self.engine.average is None else asdict(self.engine.average),
            ),
            extra_files={},
        ).finish()

    def step(self, *, is_bad: bool = False) -> None:
        """A training step; if bad, the last rank's first loss is infinite."""
        total = 0.0
        n_ranks = self.job.world_size
        for number, (inputs, labels, seeds) in enumerate(micro_batches(self.done, self.job.rank, n_ranks)):
            loss = self.engine.forward(inputs, labels, **seeds)
            if is_bad and number == 0 and self.job.rank == n_ranks - 1:
                loss = loss + math.inf  # leaves its gradient unchanged
            total += loss.item()
            self.engine.backward(loss, VALID)
        result = self.engine.step(LEARNING_RATES[self.done])
        self.done += 1
        self.outcome.losses.append(self.job.sum([total])[0] / VALID)
        self.outcome.norms.append(result.grad_norm)
        self.outcome.skipped.append(result.was_skipped)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Records the evaluation loss, and the error of decoding token by token."""
        self.engine.train(False)
        row = rows(99)
        if self.engine.average is not None:
            with self.engine.averaged_weights():
                loss = self.engine.forward(row[:, :-1], row[:, 1:]).item()
            self.outcome.heldout_of_average[str(self.done)] = loss
        self.outcome.heldout[str(self.done)] = self.engine.forward(row[:, :-1], row[:, 1:]).item()
        text, state = row[:2, :20], DecodingState(self.engine.module.config)
        parts = [text[:, :12], *text[:, 12:].split(1, dim=1)]
        found = torch.cat([self.engine.forward(part, sequence=state) for part in parts], dim=1)
        self.outcome.decoding_error = (found - self.engine.forward(text)).abs().max().item()
        self.engine.train(True)


class Cases:
    def __init__(self, job: Runtime, out: Path) -> None:
        self.job, self.out = job, out
        self.outcomes: dict[str, Outcome] = {}

    def train(
        self,
        name: str,
        case: Case,
        *,
        load: Path | None = None,
        until: int = STEPS,
        saves: Collection[int] = (STEPS,),
        bad: Collection[int] = (),
    ) -> None:
        """Trains from the checkpoint `load`; evaluates and saves after each number of steps in `saves`."""
        run = Run(self.job, case, self.out / name)
        if load is not None:
            run.load(load)
        while True:
            if run.done in saves:
                run.evaluate()
                run.save()
            if run.done == until:
                break
            run.step(is_bad=run.done in bad)
        run.engine.close()
        self.outcomes[name] = run.outcome

    def prove(self, case: Case) -> None:
        """Trains without interruption, resumed in the middle, with a bad step, and without that step."""
        name = case.name
        self.resume(case)
        self.train(f"{name}-bad", case, until=3, bad=[1], saves=(1, 2, 3))
        self.train(f"{name}-after-bad", case, load=step_folder(self.out / f"{name}-bad", 2), until=3, saves=[3])

    def train_alone(self, case: Case) -> None:
        self.train(case.name, case)

    def resume(self, case: Case) -> None:
        """Trains without interruption, and resumed in the middle."""
        self.train(case.name, case, saves=(2, STEPS))
        self.train(f"{case.name}-resumed", case, load=step_folder(self.out / case.name, 2))

    def read(self, name: str, case: Case, source: Path) -> None:
        """Reads a checkpoint of another stage or world size, saves it again at once, then trains."""
        self.train(name, case, load=source, saves=(2, STEPS))

    def write_results(self) -> None:
        if self.job.is_main:
            record = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
            (self.out / "results.json").write_text(json.dumps(record))


def main(out: Path, other: Path | None, *, is_slow: bool) -> None:
    torch.set_num_threads(1)
    job = runtime.start()
    cases, world = Cases(job, out), job.world_size
    proved, trained = ([], []) if is_slow else (PROVED[world], TRAINED[world])
    resumed, read = (SLOW, SLOW_READ if world == 1 else []) if is_slow else (RESUMED[world], READ[world])
    # stage 3 last: from its first engine on, DeepSpeed replaces torch's linear in the whole process
    for is_stage3 in (False, True):
        for act, chosen in ((cases.prove, proved), (cases.train_alone, trained), (cases.resume, resumed)):
            for case in chosen:
                if (case.stage == 3) == is_stage3:
                    act(case)
        for source, case in read:
            if (case.stage == 3) == is_stage3:
                cases.read(read_name(source, case), case, step_folder((other or out) / source.name, 2))
    cases.write_results()
    runtime.stop()


if __name__ == "__main__":
    paths = [Path(word) for word in sys.argv[1:] if word != "--slow"]
    main(paths[0], paths[1] if len(paths) > 1 else None, is_slow="--slow" in sys.argv)
