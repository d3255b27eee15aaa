"""Finds intact checkpoints, and reads ranges of parameters from the rank files that contain them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reformer_dist.checkpoint.average import AverageRecord
from reformer_dist.checkpoint.files import (
    FORMAT,
    MANIFEST,
    PREFIX,
    RUN_FILE,
    manifest_entry,
    rank_file,
    step_folder,
    step_folders,
)
from reformer_dist.checkpoint.fragment import KINDS, is_finite
from reformer_dist.checkpoint.record import RunRecord
from reformer_dist.errors import CheckpointError

RANK_SUFFIXES = ("safetensors", "json")
MAX_SHOWN = 5  # differing parameters in an error message


def checkpoint_problem(folder: Path) -> str | None:
    """Checks every file against the manifest, and that all numbers are finite.

    Returns the first problem, or None for an intact checkpoint.
    """
    try:
        if (folder / MANIFEST).is_symlink():
            return f"{MANIFEST} is a link"
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
        if not isinstance(manifest["step"], int) or not isinstance(manifest["world_size"], int):
            return f"{MANIFEST} has no step or world_size"
        is_step_folder = folder.name.startswith(PREFIX) and folder.name[len(PREFIX) :].isdecimal()
        if is_step_folder and f"{PREFIX}{manifest['step']:08d}" != folder.name:
            return f"{MANIFEST} is of step {manifest['step']}"
        ranks = range(manifest["world_size"])
        needed = {RUN_FILE, *(rank_file(rank, suffix) for rank in ranks for suffix in RANK_SUFFIXES)}
        if missing := sorted(needed - files.keys()):
            return f"{MANIFEST} does not list {missing[0]}"
        # hashing releases the GIL, so that the files of many ranks take no longer than they take to read
        with ThreadPoolExecutor() as pool:
            problems = pool.map(lambda name: _file_problem(folder, name, files[name]), files)
            return next((problem for problem in problems if problem is not None), None)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except SafetensorError as error:
        return f"its tensors can't be read ({error})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} can't be read ({error})"


def _file_problem(folder: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with a file of the manifest; entry: its size and sha256."""
    path = folder / name
    if Path(name).name != name or path.is_symlink():
        return f"{MANIFEST} lists {name!r}, which is not a regular file of this directory"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    if manifest_entry(path)["sha256"] != entry["sha256"]:
        return f"the content of {name} has changed"
    if path.suffix == ".safetensors" and (key := _find_non_finite(path)) is not None:
        return f"{name} holds numbers that are not finite in {key}"
    return None


def _find_non_finite(path: Path) -> str | None:
    """The first tensor of a rank's file with an infinite or nan value."""
    with safe_open(path, framework="pt") as tensors:
        return next((key for key in tensors.keys() if not is_finite(tensors.get_tensor(key))), None)  # noqa: SIM118


def find_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint under `root`, if any, and the problem of each newer one."""
    problems: list[str] = []
    for folder in reversed(step_folders(root)):
        problem = checkpoint_problem(folder)
        if problem is None:
            return folder, problems
        problems.append(f"{folder}: {problem}")
    return None, problems


def resolve_checkpoint(path: Path, *, best: bool = False) -> Path:
    """The checkpoint at `path`, or the newest intact one if it is a run or checkpoints directory.

    best: the best one of the run, as of that checkpoint. Raises CheckpointError if there is none, or none that is
    intact.
    """
    if best:
        current = resolve_checkpoint(path)
        found = CheckpointReader(current).best_step
        if found is None:
            raise CheckpointError(f"--best: {path} has none; train with trainer.keep_best=eval/loss")
        return resolve_checkpoint(step_folder(current.parent, found))
    if (path / MANIFEST).is_file():
        problem = checkpoint_problem(path)
        if problem is not None:
            raise CheckpointError(f"{path}: this checkpoint is damaged: {problem}")
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest, problems = find_checkpoint(root) if root.is_dir() else (None, [])
    if newest is None and problems:
        raise CheckpointError(
            f"{path}: no checkpoint is intact:" + "".join(f"\n  {problem}" for problem in problems)
        )
    if newest is None:
        expected = f"neither a checkpoint (a directory with {MANIFEST}) nor a run directory that contains one"
        raise CheckpointError(f"{path}: is {expected}")
    return newest


@dataclass(frozen=True, order=True)
class _StoredFragment:
    offset: int
    length: int
    file: Path
    kinds: tuple[str, ...]
    factors: dict[str, int] = field(compare=False)


@contextmanager
def _json_errors(folder: Path) -> Iterator[None]:
    """Raises CheckpointError for JSON that matches its checksum but is not a checkpoint's."""
    try:
        yield
    except (OSError, OverflowError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its JSON files are not a checkpoint's ({error!r})") from error


class CheckpointReader:
    """Reads a checkpoint directory that has been verified."""

    def __init__(self, folder: Path, *, averaged: bool = False) -> None:
        """averaged: reads the average of the weights as the weights. Raises CheckpointError if there is none."""
        self.folder = folder
        with _json_errors(folder):
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
            self.record = RunRecord.from_json(json.loads((folder / RUN_FILE).read_text()))
            self.step: int = self.manifest["step"]
            self.world_size: int = self.manifest["world_size"]
            saved = self.record.average
            self.average = None if saved is None else AverageRecord.from_json(saved)
        self._reads_average = averaged
        if averaged and self.average is None:
            raise CheckpointError(
                f"--average: {folder} holds no average of the weights; train with optim.average=exponential"
            )

    @property
    def best_step(self) -> int | None:
        """The step with the best value of trainer.keep_best up to this one, if the run has one."""
        with _json_errors(self.folder):
            best = (self.record.progress or {}).get("best")
            return None if best is None else int(best["step"])

    @cached_property
    def _rank_indexes(self) -> list[dict[str, Any]]:
        with _json_errors(self.folder):
            paths = [self.folder / rank_file(rank, "json") for rank in range(self.world_size)]
            return [json.loads(path.read_text()) for path in paths]

    @property
    def adam_step(self) -> int:
        with _json_errors(self.folder):
            return max(int(rank["adam_step"]) for rank in self._rank_indexes)

    @property
    def rank_states(self) -> list[dict[str, Any]]:
        """State saved by each rank, indexed by rank."""
        with _json_errors(self.folder):
            return [rank["state"] for rank in self._rank_indexes]

    @cached_property
    def _fragments(self) -> dict[str, list[_StoredFragment]]:
        """Fragments of each parameter, ordered by offset."""
        fragments: dict[str, list[_StoredFragment]] = {}
        with _json_errors(self.folder):
            for rank, rank_index in enumerate(self._rank_indexes):
                file = self.folder / rank_file(rank, "safetensors")
                for entry in rank_index["fragments"]:
                    kinds = tuple(map(str, entry.get("kinds", KINDS)))
                    factors = {str(kind): int(size) for kind, size in entry.get("factors", {}).items()}
                    fragment = _StoredFragment(int(entry["offset"]), int(entry["length"]), file, kinds, factors)
                    fragments.setdefault(entry["name"], []).append(fragment)
        return {name: sorted(unordered) for name, unordered in fragments.items()}

    def kinds(self, name: str) -> tuple[str, ...]:
        """The tensors that are stored of each element of a parameter; fp32 alone if it was frozen."""
        fragments = self._fragments.get(name, [])
        return fragments[0].kinds if fragments else ()

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor:
        """`length` float32 elements of the flattened parameter `name`, from `offset` on.

        kind: one of `kinds`. Raises CheckpointError unless each element is stored exactly once.
        """
        average = self.average if self._reads_average and kind == "fp32" else None
        if average is not None and set(average.kinds) <= set(self.kinds(name)):
            return average.combine(lambda stored: self._read(name, stored, offset, length))
        return self._read(name, kind, offset, length)

    def _read(self, name: str, kind: str, offset: int, length: int) -> Tensor:
        parts: list[Tensor] = []
        n_read, end = 0, offset + length
        for fragment in self._fragments.get(name, []):
            start, stop = max(offset, fragment.offset), min(end, fragment.offset + fragment.length)
            if start >= stop:
                continue
            if start < offset + n_read:
                raise CheckpointError(f"{fragment.file}: element {start} of {name} is in another file as well")
            parts.append(self._read_fragment(fragment, f"{name}|{kind}", start, stop))
            n_read += stop - start
        if n_read != length:
            raise CheckpointError(f"{self.folder}: holds {n_read} of {length} elements of {name} from {offset}")
        return torch.cat(parts) if parts else torch.empty(0)

    def factors(self, name: str) -> dict[str, int]:
        """Sizes of the state that a parameter has as a whole, by kind."""
        first = next((each for each in self._fragments.get(name, []) if each.offset == 0), None)
        return first.factors if first is not None else {}

    def read_factor(self, name: str, kind: str) -> Tensor:
        """All float32 elements, flat, of a state of the whole parameter `name`. Raises CheckpointError."""
        length = self.factors(name).get(kind)
        if length is None:
            raise CheckpointError(f"{self.folder}: holds no {kind} of {name}")
        first = self._fragments[name][0]
        whole = _StoredFragment(0, length, first.file, first.kinds, first.factors)
        return self._read_fragment(whole, f"{name}|{kind}", 0, length)

    def read_all(self, name: str) -> dict[str, Tensor]:
        """All that is stored of a parameter, flat, by kind. Raises CheckpointError."""
        numel = torch.Size(self.record.shapes[name]).numel()
        tensors = {kind: self._read(name, kind, 0, numel) for kind in self.kinds(name)}
        return tensors | {kind: self.read_factor(name, kind) for kind in self.factors(name)}

    def _read_fragment(self, fragment: _StoredFragment, key: str, first: int, last: int) -> Tensor:
        file, length = fragment.file, fragment.length
        try:
            with safe_open(file, framework="pt") as tensors:
                stored = tensors.get_slice(key)
                shape, dtype = stored.get_shape(), stored.get_dtype()
                if shape != [length] or dtype != "F32":
                    raise CheckpointError(f"{file}: {key} is {dtype}{shape} instead of F32[{length}]")
                return stored[first - fragment.offset : last - fragment.offset]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: can't be read: {error}") from error

    def load_weights(self, model: torch.nn.Module, ignored: Collection[str] = ()) -> None:
        """Loads all saved parameters but `ignored` into a model.

        Raises CheckpointError if names or shapes differ.
        """
        self.check_shapes({name: list(p.shape) for name, p in model.named_parameters()}, ignored)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.read(name, "fp32", 0, parameter.numel()).view(parameter.shape))

    def check_shapes(self, shapes: dict[str, list[int]], ignored: Collection[str] = ()) -> None:
        """Raises CheckpointError if a model's parameters differ in name or shape from the saved ones."""
        check_shapes(self.folder, self.record.shapes, shapes, ignored)

    @property
    def extra_files(self) -> list[str]:
        """Files that belong to no rank, such as the tokenizer's."""
        known = {RUN_FILE, *(rank_file(rank, end) for rank in range(self.world_size) for end in RANK_SUFFIXES)}
        return sorted(self.manifest["files"].keys() - known)


def check_shapes(
    folder: Path, saved: dict[str, list[int]], shapes: dict[str, list[int]], ignored: Collection[str] = ()
) -> None:
    """Raises CheckpointError if a model's parameters differ in name or shape from those saved in `folder`."""
    differing = sorted(
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, {shapes.get(name, 'absent')} here"
        for name in (saved.keys() - set(ignored)) | shapes.keys()
        if saved.get(name) != shapes.get(name)
    )
    if differing:
        more = f"\n  and {len(differing) - MAX_SHOWN} more" if len(differing) > MAX_SHOWN else ""
        lines = "".join(f"\n  {line}" for line in differing[:MAX_SHOWN])
        raise CheckpointError(f"{folder}: is of a different model:{lines}{more}")
