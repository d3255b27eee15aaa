"""reformer-checkpoints: manages checkpoints. `reformer-checkpoints ls | verify | diff | prune | export`."""

from __future__ import annotations

import argparse
import os
import re
from contextlib import suppress
from pathlib import Path

import torch

from reformer_dist.checkpoint import CheckpointReader, checkpoint_problem, prune, resolve_checkpoint, write_export
from reformer_dist.checkpoint.files import step_folders, step_of
from reformer_dist.errors import CheckpointError, ConfigError
from reformer_dist.fs.lock import RunLock
from reformer_dist.process.command import run_command
from reformer_dist.process.version import add_version
from reformer_dist.run.config_changes import config_changes
from reformer_dist.run.pretrained import add_weight_choice, weight_choice

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_SHOWN = 20  # differing tensors


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-checkpoints",
        description="Lists, verifies, compares, prunes and exports checkpoints.",
        epilog="example: reformer-checkpoints export outputs/quickstart exported --max-shard-size 2GB",
    )
    add_version(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, description: str, action: object, *paths: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=description, description=description)
        command.set_defaults(action=action)
        for path in paths:
            command.add_argument(path, type=_absolute_path)
        return command

    add("ls", "list the checkpoints of a run: step, ranks, ZeRO stage, bytes", list_all, "run")
    add("verify", "verify every file against the checksums of its manifest", verify, "run")
    add("diff", "compare keys, weights and moments of two checkpoints", diff, "first", "second")
    pruning = add("prune", "remove old checkpoints, without counting damaged ones", prune_run, "run")
    pruning.add_argument("--keep", type=int, required=True, help="newest intact checkpoints to keep; at least 1")
    pruning.add_argument("--keep-every", type=int, default=0, help="also keep those of every N-th step")
    exporting = add("export", "export the weights alone, as plain safetensors", export, "checkpoint", "output")
    exporting.add_argument("--max-shard-size", metavar="SIZE", help="such as 2GB (default: one file)")
    dtype = "of the weights (default: float32)"
    exporting.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help=dtype)
    add_weight_choice(exporting)
    return parser


def _absolute_path(path: str) -> Path:
    """Absolute path, so that `.` and links have the name and parent of their target."""
    return Path(os.path.realpath(path))  # Path.resolve raises where links form a loop


def list_all(arguments: argparse.Namespace) -> None:
    folders = _folders(arguments.run)
    best = _best_step(folders)
    for folder in folders:
        print(f"{folder} | {_describe(folder)}{' | best' if step_of(folder) == best else ''}")


def _best_step(folders: list[Path]) -> int | None:
    """The best step of a run, as of its newest readable checkpoint."""
    for folder in reversed(folders):
        with suppress(CheckpointError):
            return CheckpointReader(folder).best_step
    return None


def _describe(folder: Path) -> str:
    try:
        reader = CheckpointReader(folder)
        stage = reader.record.config["deepspeed"]["stage"]
        size = sum(entry["bytes"] for entry in reader.manifest["files"].values())
    except (CheckpointError, KeyError, TypeError):
        return f"damaged: {checkpoint_problem(folder)}"
    return f"step {reader.step} | {reader.world_size} ranks | ZeRO stage {stage} | {size:,} bytes"


def verify(arguments: argparse.Namespace) -> None:
    """Prints the state of each checkpoint, then raises CheckpointError if any is damaged."""
    problems = {folder: checkpoint_problem(folder) for folder in _folders(arguments.run)}
    for folder, problem in problems.items():
        print(f"{folder}: {problem or 'intact'}")
    n_damaged = sum(problem is not None for problem in problems.values())
    if n_damaged:
        raise CheckpointError(f"{arguments.run}: {n_damaged} of {len(problems)} checkpoints are damaged")


def diff(arguments: argparse.Namespace) -> None:
    first, second = (CheckpointReader(resolve_checkpoint(path)) for path in (arguments.first, arguments.second))
    print(f"step: {first.step} -> {second.step}; optimizer's step: {first.adam_step} -> {second.adam_step}")
    for line in config_changes(first.record.config, second.record.config):
        print(line)
    first.check_shapes(second.record.shapes)
    differing, n_tensors = [], 0
    for name in first.record.shapes:
        left, right = first.read_all(name), second.read_all(name)
        n_tensors += len(left.keys() | right.keys())
        differing += [f"{name} {kind}: only in {first.folder}" for kind in left if kind not in right]
        differing += [f"{name} {kind}: only in {second.folder}" for kind in right if kind not in left]
        for kind, values in left.items():
            if kind in right and not torch.equal(values, right[kind]):
                size = (values - right[kind]).abs().max().item()
                differing.append(f"{name} {kind}: differs by up to {size:.3g}")
    print(*differing[:MAX_SHOWN], sep="\n")
    if len(differing) > MAX_SHOWN:
        print(f"and {len(differing) - MAX_SHOWN} more")
    print(f"{len(differing)} of {n_tensors} tensors differ" if differing else "weights and moments are identical")


def prune_run(arguments: argparse.Namespace) -> None:
    for name, value, minimum in (("keep", arguments.keep, 1), ("keep-every", arguments.keep_every, 0)):
        if value < minimum:
            raise ConfigError(f"--{name} {value}: must be at least {minimum}")
    root = _folders(arguments.run)[0].parent
    lock = RunLock(root.parent)  # a running job prunes its checkpoints itself
    try:
        intact = [folder for folder in step_folders(root) if checkpoint_problem(folder) is None]
        if not intact:
            raise CheckpointError(f"{root}: no checkpoint is intact; nothing is removed")
        best = _best_step(intact)
        for folder in prune(root, intact[-1], arguments.keep, arguments.keep_every, intact, best):
            print(f"removed {folder}")
    finally:
        lock.close()


def export(arguments: argparse.Namespace) -> None:
    choice = weight_choice(arguments)
    reader = CheckpointReader(resolve_checkpoint(arguments.checkpoint, best=choice.best), averaged=choice.averaged)
    limit = _parse_bytes(arguments.max_shard_size) if arguments.max_shard_size else None
    write_export(reader, arguments.output, limit, DTYPES[arguments.dtype])
    print(f"exported {reader.folder} to {arguments.output}")


def _folders(run: Path) -> list[Path]:
    """Checkpoints of a run or checkpoints directory, or the one at the path."""
    root = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    folders = step_folders(root)
    if not folders and root.name.startswith("step-") and root.is_dir():
        folders = [root]
    if not folders:
        raise CheckpointError(f"{run}: holds no checkpoint")
    return folders


def _parse_bytes(size: str) -> int:
    """Parses sizes such as 2GB, in powers of ten. Raises ConfigError."""
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", size.upper())
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"--max-shard-size {size}: must be a number of bytes, such as 500MB or 2GB")
    return int(match[1]) * UNITS[match[2]]


def main() -> None:
    def run() -> None:
        arguments = build_parser().parse_args()
        arguments.action(arguments)

    run_command(run)


if __name__ == "__main__":
    main()
