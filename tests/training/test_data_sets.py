"""Runs on several datasets, and on one over HTTP: training, evaluation and resume."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from run_helpers import LOSS, checkpoint, data_state, interrupted, train
from support.events import scalars
from support.servers import serve
from support.tiny import WORDS
from support.weights import assert_same

from reformer_dist.data import ByteTokenizer, DamagedSample, consumed_hash, write_dataset
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import UserError
from reformer_dist.run.data import QuarantineFile

MIXED = ("data.weights=[1,3]", "data.mask_document_starts=true", "data.workers=3", "trainer.eval_every=6")


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("second")
    documents = [
        (str(number), " ".join(WORDS[number % 7 :] * 9).encode() + b"%d" % number) for number in range(40)
    ]
    write_dataset(documents, folder, ByteTokenizer(), shard_bytes=9000, heldout_fraction=0.2)
    return folder


def test_data_sets_mix_and_a_mixture_resumes(tiny_data: Path, second: Path, tmp_path: Path, job: Runtime) -> None:
    changed = (f"data.path=[{tiny_data},{second}]", *MIXED)
    whole = train(job, tiny_data, tmp_path / "whole", *changed)
    state = data_state(checkpoint(whole, 6))
    rows = [sum(stream[lane] for stream in state["streams"].values()) / 64 for lane in (0, 1)]
    assert rows == [6, 18]
    resumed = train(job, tiny_data, interrupted(whole, tmp_path / "run", 3), *changed)
    assert_same(checkpoint(resumed, 6), checkpoint(whole, 6))
    assert scalars(resumed, "eval/loss") == scalars(whole, "eval/loss")


def test_changed_data_are_refused_by_name(tiny_data: Path, second: Path, tmp_path: Path, job: Runtime) -> None:
    whole = train(job, tiny_data, tmp_path / "whole")
    run = interrupted(whole, tmp_path / "run", 3)
    with pytest.raises(UserError, match=r"data\.accept_changed(.|\n)*train-\d+\.tar was (altered|removed)"):
        train(job, second, run)
    train(job, second, run, "data.accept_changed=true")
    assert data_state(checkpoint(run, 6))["origin"] == [3, 0]
    assert sorted(scalars(run, LOSS)) == [4, 5, 6]


def test_http_trains_as_the_folder_does(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(tiny_data.parent) as server:
        where = f"http://127.0.0.1:{server.port}/{tiny_data.name}"
        changed = (f"data.path={where}", f"data.cache_dir={tmp_path / 'cache'}")
        run = train(job, tiny_data, tmp_path / "run", *changed, "trainer.eval_every=3", "data.eval_rows=0")
    assert_same(checkpoint(run, 6), checkpoint(whole, 6))
    assert scalars(run, "eval/loss") == scalars(whole, "eval/loss")


def test_the_hash_of_what_was_read_is_said(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    train(job, tiny_data, interrupted(whole, tmp_path / "run", 3))
    found = consumed_hash(data_state(checkpoint(whole, 3)))
    assert any("step 3" in line and line.endswith(f": {found}") for line in said.messages)


def test_a_quarantine_that_can_not_be_written_ends_nothing(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    damage = DamagedSample((0, "train-000000.tar", "1"), "train-000000.tar: sample 1", "a.py", "is torn")
    for _ in range(2):
        QuarantineFile(tmp_path).add([damage])
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1
    QuarantineFile(tmp_path / "nowhere").add([damage])
    assert re.search(r"quarantine\.jsonl: .*\(No such file or directory\)$", said.messages[-1])
