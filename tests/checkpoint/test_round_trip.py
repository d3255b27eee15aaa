"""Checkpoints read back as written, for any split over ranks."""

from __future__ import annotations

import json
import math
import pickle
import re
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import AVERAGED, RECORD, SHAPES, fragment, other_states, split_evenly, whole, written
from hypothesis import given, settings
from hypothesis import strategies as st

from reformer_dist.checkpoint import CheckpointReader, Fragment, checkpoint_problem
from reformer_dist.checkpoint.fragment import KINDS
from reformer_dist.errors import CheckpointError


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_round_trip(tmp_path: Path, world_size: int) -> None:
    extra = {"tokenizer.json": b"{}"}
    folder = written(tmp_path, 12, fragments=split_evenly(world_size), extra_files=extra)
    assert folder == tmp_path / "step-00000012"
    assert checkpoint_problem(folder) is None
    reader = CheckpointReader(folder)
    assert (reader.step, reader.adam_step) == (12, 7)
    assert reader.rank_states == [{"rank": rank} for rank in range(world_size)]
    assert reader.record == RECORD
    assert (folder / "tokenizer.json").read_bytes() == b"{}"
    for name, shape in SHAPES.items():
        for kind in KINDS:
            assert torch.equal(reader.read(name, kind, 0, math.prod(shape)), whole(name, kind))


def test_states_of_other_optimizers(tmp_path: Path) -> None:
    folder = written(tmp_path, fragments=other_states(), record=AVERAGED)
    assert checkpoint_problem(folder) is None
    reader = CheckpointReader(folder)
    found = {name: reader.read_all(name) for name in SHAPES}
    assert {name: set(values) for name, values in found.items()} == {
        "matrix": {"fp32", "average", "row_var", "col_var"},
        "bias": {"fp32", "variance", "average"},
        "scalar": {"fp32"},
    }
    assert torch.equal(found["matrix"]["average"], whole("matrix", "exp_avg"))
    assert torch.equal(found["matrix"]["col_var"], torch.arange(6.0))
    averaged = CheckpointReader(folder, averaged=True)
    assert torch.equal(averaged.read("matrix", "fp32", 5, 10), whole("matrix", "exp_avg")[5:15])
    assert torch.equal(averaged.read("scalar", "fp32", 0, 1), whole("scalar", "fp32"))  # frozen
    with pytest.raises(CheckpointError, match=r"--average: .*no average"):
        CheckpointReader(written(tmp_path, 2), averaged=True)


def test_nothing_else_is_left_behind(tmp_path: Path) -> None:
    folder = written(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    names = {
        "manifest.json",
        "run.json",
        *(f"rank-0000{rank}.{end}" for rank in (0, 1) for end in ("safetensors", "json")),
    }
    assert {path.name for path in folder.iterdir()} == names
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert listed.keys() == names - {"manifest.json"}


@st.composite
def splits(draw: st.DrawFn) -> list[list[Fragment]]:
    """Every parameter split anywhere, its fragments assigned to any ranks in any order."""
    fragments = []
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        bounds = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=5))})
        fragments += [fragment(name, low, high - low) for low, high in pairwise(bounds)]
    ranks: list[list[Fragment]] = [[] for _ in range(draw(st.integers(1, 3)))]
    for each in draw(st.permutations(fragments)):
        rank = draw(st.integers(0, len(ranks) - 1))
        # a rank has at most one fragment of a parameter
        if all(other.name != each.name for other in ranks[rank]):
            ranks[rank].append(each)
        else:
            ranks.append([each])
    return ranks


@settings(max_examples=25, deadline=None)
@given(fragments=splits(), data=st.data())
def test_any_range_of_any_split(fragments: list[list[Fragment]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        reader = CheckpointReader(written(Path(root), fragments=fragments))
        for name, shape in SHAPES.items():
            offset = data.draw(st.integers(0, math.prod(shape)))
            length = data.draw(st.integers(0, math.prod(shape) - offset))
            kind = data.draw(st.sampled_from(KINDS))
            found = reader.read(name, kind, offset, length)
            assert torch.equal(found, whole(name, kind)[offset : offset + length])


def test_what_no_rank_wrote_is_missed(tmp_path: Path) -> None:
    fragments = [[fragment("matrix", 0, 10)], [fragment("matrix", 12, 12)]]
    reader = CheckpointReader(written(tmp_path, fragments=fragments))
    assert reader.read("matrix", "fp32", 13, 5).numel() == 5
    with pytest.raises(CheckpointError, match="22 of 24 elements of matrix"):
        reader.read("matrix", "fp32", 0, 24)
    with pytest.raises(CheckpointError, match="0 of 5 elements of bias"):
        reader.read("bias", "fp32", 0, 5)


def test_what_two_ranks_wrote_is_refused(tmp_path: Path) -> None:
    """As many elements as the parameter has, of which some are there twice, and as many are missing."""
    rest = [fragment("bias", 0, 5), fragment("scalar", 0, 1)]
    ranks = [[fragment("matrix", 0, 12), *rest], [fragment("matrix", 6, 12)]]
    reader = CheckpointReader(written(tmp_path, fragments=ranks))
    with pytest.raises(CheckpointError, match="element 6 of matrix is in another file as well"):
        reader.read("matrix", "fp32", 0, 24)


def test_bf16_fragments_are_stored_as_float32(tmp_path: Path) -> None:
    rounded = replace(fragment("bias", 0, 5), state={"exp_avg": whole("bias", "exp_avg").bfloat16()})
    reader = CheckpointReader(written(tmp_path, fragments=[[rounded]]))
    found = reader.read("bias", "exp_avg", 0, 5)
    assert found.dtype == torch.float32
    assert torch.equal(found, whole("bias", "exp_avg").bfloat16().float())


def test_fragments_of_a_large_tensor_take_only_their_own_room(tmp_path: Path) -> None:
    view = replace(fragment("bias", 0, 5), master=torch.zeros(1_000_000))
    folder = written(tmp_path, fragments=[[view]])
    assert (folder / "rank-00000.safetensors").stat().st_size < 10_000


def test_loading_a_model(tmp_path: Path) -> None:
    reader = CheckpointReader(written(tmp_path))
    module = torch.nn.Module()
    for name, shape in SHAPES.items():
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
    reader.load_weights(module)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.detach().flatten(), whole(name, "fp32"))
    module.bias = torch.nn.Parameter(torch.zeros(6))
    module.other = torch.nn.Parameter(torch.zeros(2))
    del module.scalar
    with pytest.raises(CheckpointError) as caught:
        reader.load_weights(module)
    message = str(caught.value)
    for line in (r"bias: \[5\] .*\[6\]", r"other: absent .*\[2\]", r"scalar: \[\] .*absent"):
        assert re.search(line, message)
    assert "matrix" not in message


def test_many_differing_parameters_are_summed_up(tmp_path: Path) -> None:
    reader = CheckpointReader(written(tmp_path))
    with pytest.raises(CheckpointError, match=r"\b7 more"):
        reader.check_shapes({**SHAPES, **{f"layer{number}": [1] for number in range(12)}})


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    assert checkpoint_problem(folder) is None
    reader = CheckpointReader(folder)
    assert reader.read("matrix", "fp32", 0, 24).numel() == 24
    assert reader.rank_states
