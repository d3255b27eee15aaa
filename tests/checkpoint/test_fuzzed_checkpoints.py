"""Random damage to every kind of file: it is refused with a message, or the older checkpoint is used."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import AVERAGED, SHAPES, other_states, whole, written

from reformer_dist.checkpoint import CheckpointReader, checkpoint_problem, find_checkpoint
from reformer_dist.checkpoint.files import manifest_entry
from reformer_dist.checkpoint.fragment import KINDS
from reformer_dist.errors import CheckpointError

ODD_VALUES = [None, -1, 0, 2**63, 1e300, "..", "../../etc/passwd", "/etc/passwd", [], {}, [[-1]], True]


def pick(draw: random.Random, folder: Path, suffix: str = "") -> Path:
    return draw.choice(sorted(path for path in folder.iterdir() if path.name.endswith(suffix)))


def flip(draw: random.Random, folder: Path) -> None:
    path = pick(draw, folder)
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(draw: random.Random, folder: Path) -> None:
    path = pick(draw, folder)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def delete(draw: random.Random, folder: Path) -> None:
    pick(draw, folder).unlink()


def rename(draw: random.Random, folder: Path) -> None:
    path = pick(draw, folder)
    path.rename(path.with_name(f"x{path.name}"))


def swap(draw: random.Random, folder: Path) -> None:
    first, second = folder / "rank-00000.safetensors", folder / "rank-00001.safetensors"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def link(draw: random.Random, folder: Path) -> None:
    path = pick(draw, folder)
    target = folder.parent / f"elsewhere-{path.name}"
    shutil.move(path, target)
    path.symlink_to(target if draw.random() < 0.5 else "/dev/zero")


def edit(draw: random.Random, folder: Path) -> None:
    """Replaces any value in any JSON file by an unexpected one."""
    path = pick(draw, folder, ".json")
    document = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                collect(node[key])

    collect(document)
    node, key = draw.choice(places)
    node[key] = draw.choice([value for value in ODD_VALUES if value != node[key]])
    path.write_text(json.dumps(document))


def edit_and_sign(draw: random.Random, folder: Path) -> None:
    """edit, with a manifest that matches."""
    edit(draw, folder)
    manifest = folder / "manifest.json"
    try:
        document = json.loads(manifest.read_text())
        document["files"] = {name: manifest_entry(folder / name) for name in document["files"]}
    except (OSError, KeyError, TypeError):
        return
    manifest.write_text(json.dumps(document))


DAMAGES: list[Callable[[random.Random, Path], None]] = [
    flip,
    truncate,
    delete,
    rename,
    swap,
    link,
    edit,
    edit_and_sign,
]


def read_everything(folder: Path) -> None:
    """Reads all that a resume needs; what is read must be correct."""
    reader = CheckpointReader(folder)
    reader.check_shapes(SHAPES)
    for name, shape in SHAPES.items():
        for kind in KINDS:
            assert torch.equal(reader.read(name, kind, 0, math.prod(shape)), whole(name, kind))
    assert reader.adam_step is not None
    assert len(reader.rank_states) == reader.world_size


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_no_damage_is_taken_for_a_checkpoint(tmp_path: Path, damage: Callable[..., None]) -> None:
    older, pristine = written(tmp_path, 1), written(tmp_path, 2)
    copy = tmp_path / "copy"
    shutil.move(pristine, copy)
    for seed in range(25):
        shutil.copytree(copy, pristine)
        damage(random.Random(seed), pristine)
        wrong = checkpoint_problem(pristine)
        if wrong is None:
            # the manifest matches, or the change is harmless: refused when it is read, or read correctly
            assert damage is edit_and_sign or damage is edit or damage is flip
            try:
                read_everything(pristine)
            except CheckpointError as error:
                assert str(pristine) in str(error)
        else:
            found, complaints = find_checkpoint(tmp_path)
            assert found == older
            assert complaints == [f"{pristine}: {wrong}"]
        shutil.rmtree(pristine)


def test_damaged_descriptions_of_states_are_refused_or_read_correctly(tmp_path: Path) -> None:
    pristine = written(tmp_path, fragments=other_states(), record=AVERAGED)
    right = CheckpointReader(pristine).read_all("matrix")
    rank, record = (json.loads((pristine / name).read_text()) for name in ("rank-00000.json", "run.json"))
    places = [(rank["fragments"][0], "kinds"), (rank["fragments"][0], "factors"), (record, "average")]
    places += [
        (rank["fragments"][0]["factors"], "row_var"),
        (record["average"], "updates"),
        (record["average"], "window"),
    ]
    for node, key in places:
        before = node[key]
        for node[key] in (*ODD_VALUES, [before], {"fp32": -1}):
            (pristine / "rank-00000.json").write_text(json.dumps(rank))
            (pristine / "run.json").write_text(json.dumps(record))
            try:
                for averaged in (False, True):
                    reader = CheckpointReader(pristine, averaged=averaged)
                    for kind, values in reader.read_all("matrix").items():
                        assert torch.equal(values, right[kind])
                    reader.read("matrix", "fp32", 0, 24)
            except CheckpointError as error:
                assert str(pristine) in str(error)
        node[key] = before
