#!/usr/bin/env python3
"""Shows the contents of a dataset, verifies its checksums, and lists the samples of a training step."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import yaml

from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.config import RunConfig
from reformer_dist.config.stages import stage_at
from reformer_dist.data import (
    SPLITS,
    Dataset,
    LoaderState,
    Replay,
    SampleReader,
    SampleRef,
    consumed_hash,
    verify_dataset,
)
from reformer_dist.errors import ConfigError, DataError, UserError
from reformer_dist.process.stdio import exit_quietly
from reformer_dist.run.compose import compose_run, run_config_from
from reformer_dist.run.data import (
    QUARANTINE_FILE,
    TrainingData,
    open_corpus,
    open_sampler,
    saved_loader_state,
)
from reformer_dist.run.directory import CONFIG_FILE

SHOWN_CHARACTERS = 300


def main() -> int:
    arguments = parse_arguments()
    try:
        if arguments.order is not None:
            show_step(arguments)
            return 0
        dataset = Dataset.open(arguments.folder)
        show_counts(dataset)
        for split in SPLITS:
            show_samples(dataset, split, arguments.samples)
        return verify(dataset) if arguments.verify else 0
    except UserError as error:
        print(f"inspect_shards.py: error: {error}", file=sys.stderr)
        return 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder or URL that holds dataset.json; or, for --order, a run directory")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="with --order: those of reformer-train, such as experiment=quickstart trainer.seed=1",
    )
    add(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help="show the first N documents of each split (default: 0)",
    )
    add(
        "--verify",
        action="store_true",
        help="verify the sha256 of every shard and sample; exit 1 on a mismatch",
    )
    add(
        "--order",
        type=int,
        metavar="STEP",
        help="list the samples of a step (from 1) of a run with the given configuration",
    )
    add(
        "--hash",
        action="store_true",
        help="with --order: iterate over all steps up to it and print the running hash stored in checkpoints",
    )
    return parser.parse_intermixed_args()


def show_counts(dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer
    kind = type(tokenizer).__name__
    print(f"{dataset.folder.address}: {kind} with {tokenizer.vocab_size} tokens, stored as {tokenizer.dtype}")
    print(f"  fingerprint {dataset.fingerprint}")
    for split in SPLITS:
        samples, n_bytes, tokens = (dataset.total(count, split) for count in ("samples", "text_bytes", "tokens"))
        print(
            f"  {split:8} {samples:>10,} documents  {n_bytes:>14,} bytes  "
            f"{tokens:>14,} tokens  {len(dataset.shards(split)):>6,} shards"
        )


def show_samples(dataset: Dataset, split: str, n_samples: int) -> None:
    located = ((shard, entry) for shard in dataset.shards(split) for entry in dataset.index(shard).entries)
    reader = SampleReader()
    for shard, entry in islice(located, n_samples):
        text = dataset.tokenizer.decode(reader.read(SampleRef(dataset, shard, entry)))
        size = f"{entry.n_bytes:,} bytes, {entry.n_tokens:,} tokens"
        print(f"\n--- {shard.name} {entry.key}: {entry.document}, {size}")
        print(text[:SHOWN_CHARACTERS] + ("..." if len(text) > SHOWN_CHARACTERS else ""))


def show_step(arguments: argparse.Namespace) -> None:
    if arguments.order < 1:
        raise ConfigError(f"--order {arguments.order}: must be at least 1")
    run = Path(arguments.folder)
    is_run = (run / CONFIG_FILE).is_file()
    if is_run:
        config = run_config_from(yaml.safe_load((run / CONFIG_FILE).read_text()), arguments.overrides)
    else:  # as reformer-train composes it, with the values of an experiment
        config = compose_run(arguments.overrides)
        config = replace(config, data=replace(config.data, path=arguments.folder))
    checkpoints = find_checkpoints(run) if is_run else {}
    replay = replay_until(
        arguments.order - 1, config, checkpoints, find_quarantine(run), every_step=arguments.hash
    )
    print("order of " + ", ".join(f"{key}={value}" for key, value in replay.sampler.settings().items()))
    for number, spans in enumerate(replay.next_step()):
        print(f"step {arguments.order}, row {number}:" + ("" if spans else " empty, the last epoch has ended"))
        for span in spans:
            entry = span.ref.entry
            span_range = f"tokens {span.start} to {span.stop} of {entry.n_tokens}"
            print(f"  {span.ref.where} ({entry.document}), {span_range}")
    if arguments.hash:
        show_hash(replay.hash, checkpoints.get(arguments.order))


def replay_until(
    step: int,
    config: RunConfig,
    checkpoints: dict[int, CheckpointReader],
    quarantine: set[tuple[int, str, str]],
    *,
    every_step: bool,
) -> Replay:
    """The replay of a run after `step` steps: of each of them, or from the nearest checkpoint before."""
    whole = open_corpus(config.data, [])
    before = max((saved for saved in checkpoints if saved <= step and not every_step), default=0)
    stage, of_run = stage_at(config, before), next(iter(checkpoints.values()), None)
    corpus = whole.reweighted(stage.config.data.weights)
    if before:
        opened = TrainingData.open(stage.config, corpus, checkpoints[before])
    else:
        saved = None if of_run is None else saved_loader_state(of_run)
        opened = TrainingData(corpus, open_sampler(stage.config, corpus, saved), LoaderState())
    while True:
        replay = Replay(opened.sampler, opened.state, quarantine, config.data.epochs or None)
        last = step if stage.end_step is None else min(step, stage.end_step)
        for _ in range(last - replay.step if every_step else 0):
            replay.next_step()
        replay.skip(last - replay.step)
        if stage.end_step is None or step < stage.end_step:
            return replay
        stage = stage_at(config, last)
        corpus = whole.reweighted(stage.config.data.weights)
        opened = TrainingData.from_state(stage.config, corpus, replay.state.to_json(replay.sampler))


def show_hash(computed: str, checkpoint: CheckpointReader | None) -> None:
    print(f"hash of all samples so far: {computed}")
    if checkpoint is not None:
        saved = consumed_hash(saved_loader_state(checkpoint))
        if saved != computed:
            step = saved_loader_state(checkpoint)["origin"][0]
            cause = f"; its data, or its rows, changed after step {step}" if step else ""
            raise DataError(f"{checkpoint.folder}: the run read other samples; its hash is {saved}{cause}")
        print(f"{checkpoint.folder}: the hash matches")


def find_checkpoints(run: Path) -> dict[int, CheckpointReader]:
    """Complete checkpoints of a run by step."""
    folders = sorted((run / "checkpoints").glob("step-*"))
    readers = [CheckpointReader(folder) for folder in folders if (folder / "manifest.json").is_file()]
    return {reader.step: reader for reader in readers}


def find_quarantine(run: Path) -> set[tuple[int, str, str]]:
    """Ids of the samples that a run has skipped."""
    path = run / QUARANTINE_FILE
    lines = path.read_text().splitlines() if path.is_file() else []
    return {(number, shard, key) for number, shard, key in (json.loads(line)["id"] for line in lines)}


def verify(dataset: Dataset) -> int:
    damaged = list(verify_dataset(dataset))
    for line in damaged:
        print(f"inspect_shards.py: error: {line}", file=sys.stderr)
    if not damaged:
        print("all shards and samples match their checksums")
    return 1 if damaged else 0


if __name__ == "__main__":
    with exit_quietly():
        sys.exit(main())
