"""RunRecord: JSON on disk, also of other versions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_helpers import RECORD, SHAPES, written

from reformer_dist.checkpoint import CheckpointReader, RunRecord
from reformer_dist.checkpoint.export import open_weights
from reformer_dist.errors import CheckpointError

EXPORTED = {
    "config": {},
    "tokenizer": {"kind": "bytes"},
    "vocab_size": 257,
    "labels": ["a"],
    "fields": [],
    "shapes": SHAPES,
}


def test_a_record_reads_back() -> None:
    record = replace(RECORD, labels=["a"], data={"weights": None}, progress={"step": 3}, loss_scaler={})
    document = record.to_json()
    names = ("config", "tokenizer", "vocab_size", "shapes", "labels", "fields", "data", "progress", "loss_scaler")
    assert document.keys() == set(names)
    assert RunRecord.from_json(json.loads(json.dumps(document))) == record
    assert record.to_export_json().keys() == EXPORTED.keys()


def test_a_record_of_an_older_version() -> None:
    """It has no class names and renamed keys of the configuration; unknown keys are ignored."""
    saved: dict[str, Any] = RECORD.to_json() | {"made_by": "0.1"}
    del saved["labels"]
    saved["config"] = {"data": {"max_damaged_share": 0.5}}
    record = RunRecord.from_json(saved)
    assert (record.labels, record.config) == ([], {"data": {"max_damaged_fraction": 0.5}})


@pytest.mark.parametrize("changed", [{"shapes": None}, {"config": [1]}, {"tokenizer": "bytes"}])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    folder = written(tmp_path)
    for path, opened in ((folder / "run.json", CheckpointReader), (folder / "config.json", open_weights)):
        path.write_text(json.dumps(EXPORTED | {"step": 1} | changed))
        with pytest.raises(CheckpointError, match=f"{folder}: .*{next(iter(changed))} must be an object"):
            opened(folder)
        path.write_text("{}")
        with pytest.raises(CheckpointError, match=f"{folder}: "):
            opened(folder)
