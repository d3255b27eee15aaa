"""The doctor finds a healthy machine well, and each thing that is broken here by name."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from support.launch import run_ranks
from support.tiny import write_tiny_dataset

from reformer_dist.doctor import check_machine
from reformer_dist.doctor.__main__ import check_data, main
from reformer_dist.doctor.check_attention import check_attention
from reformer_dist.doctor.check_collectives import _expect
from reformer_dist.doctor.findings import CheckState, ok, run_check
from reformer_dist.ops.lsh import bucket_attention

CPU = torch.device("cpu")


def states(findings) -> list[CheckState]:
    return [finding.state for finding in findings]


@pytest.mark.jobs
def test_a_healthy_machine_is_well(tmp_path):
    folder = write_tiny_dataset(tmp_path / "data")
    said = json.loads(
        run_ranks("reformer_dist.doctor", 1, ["--json", "--data", folder, "--output", tmp_path / "x"])
    )
    assert said["failed"] == 0, said
    names = {finding["name"] for finding in said["findings"]}
    assert names >= {"torch", "deepspeed", "shared memory", "disk speed", "data", "collectives", "open files"}
    assert all(finding["advice"] for finding in said["findings"] if finding["state"] != "ok")


@pytest.mark.jobs
def test_under_torchrun_it_examines_the_job():
    said = run_ranks("reformer_dist.doctor", 2)
    assert said.count("2 ranks of this job: all-reduce") == 1 and "0 failed" in said


def test_anything_failed_is_status_1(monkeypatch, capsys):
    from reformer_dist.doctor import __main__ as entry

    monkeypatch.setattr(entry, "check_local_collectives", lambda: iter(()))
    monkeypatch.setattr(entry.runtime, "stop", lambda: None)  # tests that come later in this process have a job
    monkeypatch.setattr("sys.argv", ["reformer-doctor", "--data", "nowhere", "--output", "/proc"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().out
    assert ended.value.code == 1
    assert "failed    data: nowhere" in said and "failed    disk" in said and "-> " in said


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v, ids, options: bucket_attention(q, k, v, ids, options) * 1.01,
        lambda q, k, v, ids, options: bucket_attention(q.detach(), k, v, ids, options) + 0 * q,
        lambda q, k, v, ids, options: bucket_attention(q, k, v, ids, options) * torch.nan,
    ],
    ids=["output", "gradient", "nan"],
)
def test_a_wrong_kernel_is_found(wrong):
    assert states(check_attention(CPU)) == [CheckState.ok, CheckState.ok]
    assert next(iter(check_attention(CPU, wrong))).state is CheckState.failed


def test_few_open_files_are_warned_of():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        (finding,) = check_machine.check_open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (
        finding.state is CheckState.warning and "at most 256" in finding.message and "ulimit -n" in finding.advice
    )


def test_little_shared_memory_is_warned_of(monkeypatch, tmp_path):
    monkeypatch.setattr(check_machine, "ENOUGH_SHARED", 2**62)
    (finding,) = check_machine.check_shared_memory(tmp_path)
    assert finding.state is CheckState.warning and "--shm-size" in finding.advice


def test_packages_of_another_version_fail(monkeypatch):
    monkeypatch.setattr(
        check_machine, "package_version", lambda package: {"deepspeed": "0.1", "numpy": None}.get(package, "99")
    )
    failed = {finding.name for finding in check_machine.check_versions() if finding.state is CheckState.failed}
    assert {"deepspeed", "numpy"} <= failed


def test_a_damaged_data_set_fails(tmp_path):
    folder = write_tiny_dataset(tmp_path / "data")
    assert states(check_data(folder)) == [CheckState.ok]
    shard = next(folder.rglob("*.tar"))
    shard.unlink()
    assert states(check_data(folder)) == [CheckState.failed]


def test_what_breaks_is_a_finding_and_ends_nothing():
    def breaks():
        yield ok("a", "b")
        raise OSError("no such device")

    (finding,) = run_check("thing", breaks, "mend it")
    assert finding.state is CheckState.failed and "no such device" in finding.message


def test_a_wrong_number_from_a_collective_is_an_error():
    _expect("all-reduce", torch.ones(2), torch.ones(2))
    with pytest.raises(RuntimeError, match="all-reduce: "):
        _expect("all-reduce", torch.ones(2), torch.zeros(2))


def test_disks_that_do_not_exist_yet_are_those_of_their_parent(tmp_path):
    assert CheckState.failed not in states(check_machine.check_disk(tmp_path / "not" / "yet"))
    assert not (tmp_path / "not").exists()
    assert Path("/proc").is_dir() and CheckState.failed in states(check_machine.check_disk(Path("/proc")))
