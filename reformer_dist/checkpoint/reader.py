"""Finding a checkpoint that holds, and reading any part of it from whichever ranks' files have it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reformer_dist.checkpoint.files import FORMAT, MANIFEST, PREFIX, RUN_FILE, fingerprint, rank_file, step_folders
from reformer_dist.errors import CheckpointError


def is_good(folder: Path) -> str | None:
    """None if every file of the manifest is there and unchanged, else what is wrong."""
    try:
        if (folder / MANIFEST).is_symlink():
            return f"{MANIFEST} is a link"
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
        if not isinstance(manifest["step"], int) or not isinstance(manifest["world_size"], int):
            return f"{MANIFEST} has no step or world_size"
        is_of_run = folder.name.startswith(PREFIX) and folder.name[len(PREFIX) :].isdecimal()
        if is_of_run and f"{PREFIX}{manifest['step']:08d}" != folder.name:
            return f"{MANIFEST} is of step {manifest['step']}"
        needed = {RUN_FILE, *(rank_file(rank, end) for rank in range(manifest["world_size"]) for end in ENDS)}
        if absent := sorted(needed - files.keys()):
            return f"{MANIFEST} does not name {absent[0]}"
        for name, mark in files.items():
            path = folder / name
            if Path(name).name != name or path.is_symlink():
                return f"{MANIFEST} names {name!r}, which is no file of the folder's own"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != mark["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {mark['bytes']}"
            if fingerprint(path)["sha256"] != mark["sha256"]:
                return f"the content of {name} has changed"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} can't be read ({error})"
    return None


def find_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint below `root`, if any, and what is wrong with newer ones."""
    complaints: list[str] = []
    for folder in reversed(step_folders(root)):
        wrong = is_good(folder)
        if wrong is None:
            return folder, complaints
        complaints.append(f"{folder}: {wrong}")
    return None, complaints


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means by a path: a checkpoint, a run directory, or its checkpoints folder.

    Raises CheckpointError where there is none, or none that is whole.
    """
    if (path / MANIFEST).is_file():
        wrong = is_good(path)
        if wrong is not None:
            raise CheckpointError(f"{path}: this checkpoint is damaged: {wrong}")
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found, complaints = find_checkpoint(root) if root.is_dir() else (None, [])
    if found is None:
        damaged = "".join(f"\n  {words}" for words in complaints)
        what = f"neither a checkpoint (a folder with {MANIFEST}) nor a run directory that holds one"
        raise CheckpointError(f"{path}: is {what}{damaged}")
    return found


ENDS = ("safetensors", "json")


@dataclass(frozen=True, order=True)
class _Piece:
    offset: int
    length: int
    file: Path


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Around JSON that is whole, as checksums go, and may yet be no checkpoint's. Raises CheckpointError."""
    try:
        yield
    except (OSError, OverflowError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its JSON files are not those of a checkpoint ({error!r})") from error


class CheckpointReader:
    """A checkpoint folder that has been found good."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with _explained(folder):
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
            self.run: dict[str, Any] = json.loads((folder / RUN_FILE).read_text())
            self.step: int = self.manifest["step"]
            self.world_size: int = self.manifest["world_size"]

    @cached_property
    def _ranks(self) -> list[dict[str, Any]]:
        with _explained(self.folder):
            paths = [self.folder / rank_file(rank, "json") for rank in range(self.world_size)]
            return [json.loads(path.read_text()) for path in paths]

    @property
    def adam_step(self) -> int:
        with _explained(self.folder):
            return max(int(rank["adam_step"]) for rank in self._ranks)

    @property
    def rank_states(self) -> list[dict[str, Any]]:
        """What each rank had to remember, by rank."""
        with _explained(self.folder):
            return [rank["state"] for rank in self._ranks]

    @cached_property
    def _pieces(self) -> dict[str, list[_Piece]]:
        """By parameter, in the order of their places."""
        pieces: dict[str, list[_Piece]] = {}
        with _explained(self.folder):
            for rank, index in enumerate(self._ranks):
                file = self.folder / rank_file(rank, "safetensors")
                for place in index["fragments"]:
                    piece = _Piece(int(place["offset"]), int(place["length"]), file)
                    pieces.setdefault(place["name"], []).append(piece)
        return {name: sorted(of_one) for name, of_one in pieces.items()}

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor:
        """`length` float32 elements of the flattened parameter `name` from `offset`.

        kind: "fp32" (weights), "exp_avg" or "exp_avg_sq". Raises CheckpointError if not all are there, once each.
        """
        parts: list[Tensor] = []
        found, end = 0, offset + length
        for piece in self._pieces.get(name, []):
            first, last = max(offset, piece.offset), min(end, piece.offset + piece.length)
            if first >= last:
                continue
            if first < offset + found:
                raise CheckpointError(f"{piece.file}: element {first} of {name} is in another file as well")
            parts.append(self._read_piece(piece, f"{name}|{kind}", first, last))
            found += last - first
        if found != length:
            raise CheckpointError(f"{self.folder}: holds {found} of {length} elements of {name} from {offset}")
        return torch.cat(parts) if parts else torch.empty(0)

    def _read_piece(self, piece: _Piece, key: str, first: int, last: int) -> Tensor:
        try:
            with safe_open(piece.file, framework="pt") as tensors:
                stored = tensors.get_slice(key)
                shape, kind = stored.get_shape(), stored.get_dtype()
                if shape != [piece.length] or kind != "F32":
                    raise CheckpointError(f"{piece.file}: {key} is {kind}{shape} instead of F32[{piece.length}]")
                return stored[first - piece.offset : last - piece.offset]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{piece.file}: can't be read: {error}") from error

    def load_weights(self, model: torch.nn.Module) -> None:
        """Fills a plain model's parameters. Raises CheckpointError if they are not those of the checkpoint."""
        self.check_shapes({name: list(p.shape) for name, p in model.named_parameters()})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.read(name, "fp32", 0, parameter.numel()).view(parameter.shape))

    def check_shapes(self, shapes: dict[str, list[int]]) -> None:
        """Raises CheckpointError if a model's parameters have other names or shapes than the checkpoint's."""
        check_shapes(str(self.folder), self.run["shapes"], shapes)

    @property
    def extra_files(self) -> list[str]:
        """Files that belong to no rank, such as the tokenizer's."""
        ours = {RUN_FILE, *(rank_file(rank, end) for rank in range(self.world_size) for end in ENDS)}
        return sorted(self.manifest["files"].keys() - ours)


def check_shapes(folder: str, saved: dict[str, list[int]], shapes: dict[str, list[int]]) -> None:
    """Raises CheckpointError if a model's parameters have other names or shapes than those saved in `folder`."""
    differing = sorted(
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, {shapes.get(name, 'absent')} here"
        for name in saved.keys() | shapes.keys()
        if saved.get(name) != shapes.get(name)
    )
    if differing:
        more = f"\n  and {len(differing) - 5} more" if len(differing) > 5 else ""
        lines = "".join(f"\n  {line}" for line in differing[:5])
        raise CheckpointError(f"{folder}: is of another model:{lines}{more}")
