"""Layout of a checkpoint directory.

    checkpoints/step-00000100/
        rank-00000.safetensors   fragments of parameters and Adam moments, named "<parameter>|<kind>"
        rank-00000.json          parameter, offset and length of each fragment; this rank's data position
        run.json                 RunRecord: resolved configuration, tokenizer, parameter shapes
        tokenizer.json           if the tokenizer needs a file
        manifest.json            step, and size and sha256 of every other file; written last

A directory under its final name is complete: it is written under a temporary name, synced and then renamed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reformer_dist.fs.atomic import file_sha256

FORMAT = 1
MANIFEST = "manifest.json"
RUN_FILE = "run.json"
PREFIX = "step-"


def step_folder(root: Path, step: int) -> Path:
    return root / f"{PREFIX}{step:08d}"


def step_folders(root: Path) -> list[Path]:
    """All paths named like a checkpoint, ordered by step."""
    return sorted((path for path in root.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdecimal()), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name[len(PREFIX) :])


def partial_folder(root: Path, step: int) -> Path:
    """Directory that holds the checkpoint of a step until it is complete."""
    return root / f".{PREFIX}{step:08d}.partial"


def rank_file(rank: int, suffix: str) -> str:
    return f"rank-{rank:05d}.{suffix}"


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def manifest_entry(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
