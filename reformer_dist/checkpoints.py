"""Entry: looks after the checkpoints of a run. `reformer-checkpoints ls | verify | diff | prune | export`."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import torch

from reformer_dist.checkpoint import CheckpointReader, verify_checkpoint, prune, resolve_checkpoint, write_export
from reformer_dist.checkpoint.files import step_folders
from reformer_dist.errors import CheckpointError, ConfigError
from reformer_dist.fs.lock import RunLock
from reformer_dist.process.command import run_command
from reformer_dist.run.directory import changed_values

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
SHOWN = 20  # differing parameters


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-checkpoints",
        description="Looks after checkpoints.",
        epilog="example: reformer-checkpoints export outputs/quickstart exported --max-shard-size 2GB",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, words: str, action: object, *paths: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=words, description=words)
        command.set_defaults(action=action)
        for path in paths:
            command.add_argument(path, type=_resolved)
        return command

    add("ls", "lists the checkpoints of a run: step, ranks, ZeRO stage, bytes", list_all, "run")
    add("verify", "holds every file against the checksums of its manifest", verify, "run")
    add("diff", "says in which keys, weights and moments two checkpoints differ", diff, "first", "second")
    pruning = add("prune", "removes old checkpoints; damaged ones never count", prune_run, "run")
    pruning.add_argument("--keep", type=int, required=True, help="newest good checkpoints that stay; at least 1")
    pruning.add_argument("--keep-every", type=int, default=0, help="those of steps that it divides stay as well")
    exporting = add("export", "writes the weights alone, as plain safetensors", export, "checkpoint", "output")
    exporting.add_argument("--max-shard-size", metavar="SIZE", help="such as 2GB; without it, there is one file")
    return parser


def _resolved(words: str) -> Path:
    """With a name and a parent of its own, which `.` and a link have not."""
    return Path(words).resolve()


def list_all(arguments: argparse.Namespace) -> None:
    for folder in _folders(arguments.run):
        print(f"{folder} | {_describe(folder)}")


def _describe(folder: Path) -> str:
    try:
        reader = CheckpointReader(folder)
        stage = reader.run["config"]["deepspeed"]["stage"]
        size = sum(mark["bytes"] for mark in reader.manifest["files"].values())
    except (CheckpointError, KeyError, TypeError):
        return f"damaged: {verify_checkpoint(folder)}"
    return f"step {reader.step} | {reader.world_size} ranks | ZeRO stage {stage} | {size:,} bytes"


def verify(arguments: argparse.Namespace) -> None:
    """Raises CheckpointError where one is damaged, after all were looked at."""
    found = {folder: verify_checkpoint(folder) for folder in _folders(arguments.run)}
    for folder, wrong in found.items():
        print(f"{folder}: {'good' if wrong is None else wrong}")
    n_damaged = sum(wrong is not None for wrong in found.values())
    if n_damaged:
        raise CheckpointError(f"{arguments.run}: {n_damaged} of {len(found)} checkpoints are damaged")


def diff(arguments: argparse.Namespace) -> None:
    first, second = (CheckpointReader(resolve_checkpoint(path)) for path in (arguments.first, arguments.second))
    print(f"step: {first.step} -> {second.step}; Adam's step: {first.adam_step} -> {second.adam_step}")
    for line in changed_values(first.run["config"], second.run["config"]):
        print(line)
    first.check_shapes(second.run["shapes"])
    differing = []
    for name, shape in first.run["shapes"].items():
        for kind in KINDS:
            size = math.prod(shape)
            left, right = (reader.read(name, kind, 0, size) for reader in (first, second))
            if not torch.equal(left, right):
                differing.append(f"{name} {kind}: differs by up to {(left - right).abs().max().item():.3g}")
    print(*differing[:SHOWN], sep="\n")
    if len(differing) > SHOWN:
        print(f"and {len(differing) - SHOWN} more")
    n_tensors = len(first.run["shapes"]) * len(KINDS)
    print(f"{len(differing)} of {n_tensors} tensors differ" if differing else "weights and moments are the same")


def prune_run(arguments: argparse.Namespace) -> None:
    for name, value, least in (("keep", arguments.keep, 1), ("keep-every", arguments.keep_every, 0)):
        if value < least:
            raise ConfigError(f"--{name} {value}: must be at least {least}")
    root = _folders(arguments.run)[0].parent
    lock = RunLock(root.parent)  # a run that is at work prunes by itself
    try:
        good = [folder for folder in step_folders(root) if verify_checkpoint(folder) is None]
        if not good:
            raise CheckpointError(f"{root}: no checkpoint is whole; nothing is removed")
        for folder in prune(root, good[-1], arguments.keep, arguments.keep_every, good):
            print(f"removed {folder}")
    finally:
        lock.close()


def export(arguments: argparse.Namespace) -> None:
    folder = resolve_checkpoint(arguments.checkpoint)
    limit = _bytes(arguments.max_shard_size) if arguments.max_shard_size else None
    write_export(CheckpointReader(folder), arguments.output, limit)
    print(f"exported {folder} to {arguments.output}")


def _folders(run: Path) -> list[Path]:
    """Checkpoints below a run directory or its checkpoints folder, or the one that the path names."""
    root = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    found = step_folders(root)
    if not found and root.name.startswith("step-") and root.is_dir():
        found = [root]
    if not found:
        raise CheckpointError(f"{run}: holds no checkpoint")
    return found


def _bytes(words: str) -> int:
    """2GB and the like, in powers of ten. Raises ConfigError."""
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", words.upper())
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"--max-shard-size {words}: must be a number of bytes, such as 500MB or 2GB")
    return int(match[1]) * UNITS[match[2]]


def main() -> None:
    def run() -> None:
        arguments = build_parser().parse_args()
        arguments.action(arguments)

    run_command(run)


if __name__ == "__main__":
    main()
