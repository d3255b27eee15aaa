"""Runs on two processes: exact resumes at each stage, resumes with another world size, shared errors.

One job trains everything (two_ranks.py), and one more comes by the command line; the tests look at what is left.
"""

from __future__ import annotations

import json
import shutil
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from run_helpers import LOSS, STAGED, checkpoint, damage_samples, data_state, heldout_loss, train
from support.events import read_events, scalars
from support.launch import run_ranks
from support.tiny import tiny_overrides
from support.weights import assert_same

from reformer_dist.checkpoint import checkpoint_problem
from reformer_dist.data import Dataset
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.training.spikes import SPIKES_FILE

pytestmark = pytest.mark.jobs

STAGES = (0, 2, 3)
EVALUATED = ("trainer.eval_every=6", "data.eval_rows=0")
SHARED, PROFILED = "parallel.sequence=2", "trainer.profile=[2,3]"
DAMAGED = ("data.max_damaged_fraction=0.5", "data.workers=0")
SPIKES = ("trainer.spike_window=2", "trainer.spike_sigma=0.1", "trainer.skip_spikes=true")
EPOCH = ("data.epochs=1", "data.seq_len=128", "data.batch_size=40", "trainer.micro_batch_size=10")
EPOCH += ("trainer.max_steps=1000",)


def read_spikes(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / SPIKES_FILE).read_text().splitlines()]


def broken(data: Path, copy: Path) -> Path:
    """A copy of a dataset with zeros in half of its shards."""
    shutil.copytree(data, copy)
    for path in sorted(copy.glob("train-*.tar"))[::2]:
        path.write_bytes(bytes(path.stat().st_size))
    return copy


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, job: Runtime) -> Path:
    """The run of one process with which those of two are compared."""
    return train(job, tiny_data, tmp_path_factory.mktemp("runs") / "alone", *EVALUATED)


@pytest.fixture(scope="module")
def alone_staged(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, job: Runtime) -> Path:
    staged = (*STAGED, *EVALUATED, "trainer.save_every=1")
    return train(job, tiny_data, tmp_path_factory.mktemp("runs") / "staged", *staged)


@pytest.fixture(scope="module")
def ranks(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, alone: Path, alone_staged: Path, job: Runtime
) -> tuple[Path, dict[str, Any]]:
    """(directory of the runs, error of each rank by run)."""
    root = tmp_path_factory.mktemp("ranks")
    plan: dict[str, list[str]] = {}

    def add(name: str, *changed: str, data: Path = tiny_data) -> None:
        plan[name] = tiny_overrides(data, root / name, *changed)

    add("plain", *EVALUATED)
    add("elastic", "deepspeed.stage=2", f"resume={checkpoint(alone, 3)}", *EVALUATED)
    add("uneven", "data.batch_size=5")
    add("too many", "parallel.sequence=3")
    by_buckets = (SHARED, "parallel.buckets=2", "deepspeed.stage=1", *EVALUATED, "trainer.sample_every=6")
    add("heads", SHARED, *EVALUATED)
    add("buckets", *by_buckets, "trainer.sample_tokens=3", PROFILED)
    add("buckets-resumed", *by_buckets, f"resume={checkpoint(root / 'buckets', 3)}")
    add("buckets-elastic", *by_buckets, f"resume={checkpoint(alone, 3)}")
    add("broken", data=broken(tiny_data, root / "data"))
    add("threads", "data.workers=3")
    damaged = damage_samples(tiny_data, root / "damaged-data")
    add("damaged", *DAMAGED, data=damaged)
    add("damaged-heads", *DAMAGED, SHARED, data=damaged)
    add("epoch", *EPOCH)
    add("staged", *STAGED, *EVALUATED, "deepspeed.stage=2")
    add("staged-resumed", *STAGED, *EVALUATED, "deepspeed.stage=2", f"resume={checkpoint(root / 'staged', 3)}")
    shared_stages = (*STAGED, *EVALUATED, SHARED, "parallel.buckets=2", f"resume={checkpoint(alone_staged, 2)}")
    add("staged-buckets", *shared_stages)
    for stage in (0, 2):
        poison = ("optim.lr=1e20", "trainer.max_steps=20", "trainer.save_every=1", "trainer.keep_checkpoints=1")
        start = f"resume={checkpoint(alone, 6)}"
        add(f"diverges{stage}", *poison, "trainer.max_skipped_steps=2", f"deepspeed.stage={stage}", start)
    # stage 3 last: DeepSpeed then replaces torch's linear in the process
    for stage in STAGES:
        zero = f"deepspeed.stage={stage}"
        add(f"zero{stage}", zero, *EVALUATED, "trainer.sample_every=6", "trainer.sample_tokens=3", PROFILED)
        add(f"zero{stage}-resumed", zero, f"resume={checkpoint(root / f'zero{stage}', 3)}")
    add("offload3", "deepspeed.stage=3", "deepspeed.offload_optimizer=true")
    plan["again"] = [*plan["plain"], "resume=never"]
    # by low limits, which the run of one process passes at the same steps
    at = [spike["step"] for spike in read_spikes(train(job, tiny_data, root / "spikes", *SPIKES))]
    assert at
    spared = f"data.skip_steps={[[step, step] for step in at]}"
    for stage in (2, 3):
        add(f"spikes{stage}", *SPIKES, f"deepspeed.stage={stage}")
        add(f"spared{stage}", spared, f"deepspeed.stage={stage}")
    (root / "plan.json").write_text(json.dumps(plan))
    run_ranks(Path(__file__).with_name("two_ranks.py"), 2, [root / "plan.json", root / "found.json"], forked=True)
    return root, json.loads((root / "found.json").read_text())


def test_what_should_end_well_does(ranks: tuple[Path, dict[str, Any]]) -> None:
    fails = {"agreements", "uneven", "too many", "broken", "again", "diverges0", "diverges2"}
    assert {name: said for name, said in ranks[1].items() if name not in fails and said != [None, None]} == {}


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bitwise(ranks: tuple[Path, dict[str, Any]], stage: int) -> None:
    whole, resumed = ranks[0] / f"zero{stage}", ranks[0] / f"zero{stage}-resumed"
    assert scalars(resumed, LOSS) == {step: loss for step, loss in scalars(whole, LOSS).items() if step > 3}
    assert_same(checkpoint(resumed, 6), checkpoint(whole, 6))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_skipped_spike_leaves_no_trace_on_any_rank(ranks: tuple[Path, dict[str, Any]], stage: int) -> None:
    run, spared, alone = (ranks[0] / name for name in (f"spikes{stage}", f"spared{stage}", "spikes"))
    assert_same(checkpoint(run, 6), checkpoint(spared, 6))
    found, expected = read_spikes(run), read_spikes(alone)
    assert [(spike["step"], spike["rows"]) for spike in found] == [
        (spike["step"], spike["rows"]) for spike in expected
    ]


@pytest.mark.parametrize("name", ["buckets", "zero0", "zero2", "zero3"])
def test_every_rank_profiles_its_steps(ranks: tuple[Path, dict[str, Any]], name: str) -> None:
    for rank in (0, 1):
        table = (ranks[0] / name / f"profile/rank-{rank:05d}.steps-2-3.txt").read_text().splitlines()
        named = [line.split()[0] for line in table]
        assert {"attend", "feed-forward", "optimizer"} < set(named)
        assert ("exchange" in named) == (name == "buckets")
        _, total, _, measured, *_ = table[-1].split()
        assert float(total) == pytest.approx(float(measured), rel=0.05)


@pytest.mark.parametrize("stage", [0, 2])
def test_ranks_that_diverge_say_alike_where_to_go_on(
    ranks: tuple[Path, dict[str, Any]], alone: Path, stage: int
) -> None:
    first, second = ranks[1][f"diverges{stage}"]
    assert first == second and first.startswith("Diverged: trainer.max_skipped_steps=2: ")
    assert f"newest good checkpoint is {checkpoint(alone, 6)}; " in first and "optim.lr=0.01" in first
    assert all(checkpoint_problem(path) is None for path in (ranks[0] / f"diverges{stage}/checkpoints").iterdir())


@pytest.mark.parametrize("stage", STAGES)
def test_stages_observe_alike(ranks: tuple[Path, dict[str, Any]], stage: int) -> None:
    first, run = ranks[0] / "zero0", ranks[0] / f"zero{stage}"
    assert read_events(run).Tags() == read_events(first).Tags()
    assert "sample/text_summary" in read_events(run).Tags()["tensors"]
    for tag in (LOSS, "train/grad_norm", "eval/loss"):
        assert scalars(run, tag) == pytest.approx(scalars(first, tag), rel=1e-4)
    assert scalars(run, "eval/loss")[6] == pytest.approx(heldout_loss(checkpoint(run, 6), seq_len=64)[0], rel=1e-5)


@pytest.mark.parametrize("name", ["plain", "elastic", "offload3", "heads", "buckets", "buckets-elastic"])
def test_worlds_agree(ranks: tuple[Path, dict[str, Any]], alone: Path, name: str) -> None:
    """Also with dropout, whose masks depend on tokens, not on ranks."""
    expected = {step: loss for step, loss in scalars(alone, LOSS).items() if "elastic" not in name or step > 3}
    assert scalars(ranks[0] / name, LOSS) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["staged", "staged-resumed", "staged-buckets"])
def test_stages_are_alike_in_any_world(ranks: tuple[Path, dict[str, Any]], alone_staged: Path, name: str) -> None:
    """Resumed in the middle of a stage, bitwise at the same world, and at a border with shared sequences."""
    run, first = ranks[0] / name, {"staged": 0, "staged-resumed": 3, "staged-buckets": 2}[name]
    expected = {step: loss for step, loss in scalars(alone_staged, LOSS).items() if step > first}
    assert scalars(run, LOSS) == pytest.approx(expected, rel=1e-5)
    assert scalars(run, "eval/loss") == pytest.approx(scalars(alone_staged, "eval/loss"), rel=1e-5)
    assert data_state(checkpoint(run, 6)) == data_state(checkpoint(alone_staged, 6))
    if name == "staged-resumed":
        assert_same(checkpoint(run, 6), checkpoint(ranks[0] / "staged", 6))


def test_shared_sequences_resume_bitwise(ranks: tuple[Path, dict[str, Any]]) -> None:
    whole, resumed = ranks[0] / "buckets", ranks[0] / "buckets-resumed"
    assert scalars(resumed, LOSS) == {step: loss for step, loss in scalars(whole, LOSS).items() if step > 3}
    assert_same(checkpoint(resumed, 6), checkpoint(whole, 6))


@pytest.mark.parametrize("name", ["heads", "buckets"])
def test_shared_sequences_are_observed_alike(ranks: tuple[Path, dict[str, Any]], alone: Path, name: str) -> None:
    run = ranks[0] / name
    coverage = {"lsh/coverage", "lsh/coverage_by_chance", "coverage_by_layer/0"}  # of whole rows only
    assert set(read_events(run).Tags()["scalars"]) == set(read_events(alone).Tags()["scalars"]) - coverage
    for tag in ("eval/loss", "lsh/largest_bucket_over_mean", "lsh/full_windows"):
        assert scalars(run, tag) == pytest.approx(scalars(alone, tag), rel=1e-5)
    assert 0 <= scalars(run, "lsh/agreement_of_rounds")[6] <= 1
    assert 0 < scalars(run, "reversible/drift")[6] < 1e-3


@pytest.mark.parametrize("name", ["plain", "elastic", "heads", "buckets"])
def test_evaluation_is_exact_in_any_world(ranks: tuple[Path, dict[str, Any]], alone: Path, name: str) -> None:
    run = ranks[0] / name
    loss, bits = heldout_loss(checkpoint(run, 6), seq_len=64)
    assert scalars(run, "eval/loss")[6] == pytest.approx(loss, rel=1e-6)
    assert scalars(run, "eval/bits_per_byte")[6] == pytest.approx(bits, rel=1e-6)
    assert loss == pytest.approx(scalars(alone, "eval/loss")[6], rel=1e-5)


def test_one_process_goes_on_with_stage_3_of_two(
    ranks: tuple[Path, dict[str, Any]],
    alone: Path,
    tiny_data: Path,
    tmp_path: Path,
    job: Runtime,
    said: pytest.LogCaptureFixture,
) -> None:
    source = checkpoint(ranks[0] / "offload3", 3)
    run = train(job, tiny_data, tmp_path / "run", f"resume={source}", "deepspeed.stage=1")
    changes = ("world size: 2 -> 1", "deepspeed.offload_optimizer: True -> False", "deepspeed.stage: 3 -> 1")
    for change in changes:
        assert f"  changed since the checkpoint: {change}" in said.messages
    expected = {step: loss for step, loss in scalars(alone, LOSS).items() if step > 3}
    assert scalars(run, LOSS) == pytest.approx(expected, rel=1e-5)


def test_by_the_command_line(ranks: tuple[Path, dict[str, Any]], tiny_data: Path, tmp_path: Path) -> None:
    overrides = tiny_overrides(tiny_data, tmp_path / "run", "deepspeed=zero2")
    output = run_ranks("reformer_dist.train", 2, overrides)
    assert output.count("ZeRO stage 2, fp32, 2 ranks on cpu") == 1
    assert output.count("step 6/6 | loss ") == 1  # logged by one rank
    assert_same(checkpoint(tmp_path / "run", 6), checkpoint(ranks[0] / "zero2", 6))


def test_sharing_by_the_command_line(ranks: tuple[Path, dict[str, Any]], tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = run_ranks("reformer_dist.train", 2, tiny_overrides(tiny_data, run, SHARED, *EVALUATED), forked=True)
    assert output.count("a sequence over 2 ranks: parallel.heads=2 x parallel.buckets=1 | expected traffic ") == 1
    assert_same(checkpoint(run, 6), checkpoint(ranks[0] / "heads", 6))
    alone = run_ranks("reformer_dist.evaluate", 1, [run], forked=True)
    shared = run_ranks("reformer_dist.evaluate", 2, [run, SHARED, "parallel.buckets=2"], forked=True)
    for words in ("held-out loss: ", "held-out text: "):
        (right,), (found,) = ([line for line in said.splitlines() if words in line] for said in (alone, shared))
        assert found == right


@pytest.mark.parametrize("step", [3, 6])
def test_every_world_reads_the_same_samples(ranks: tuple[Path, dict[str, Any]], alone: Path, step: int) -> None:
    """The running hash of all samples read is the same for any ranks, threads, sequence degrees and resumes."""
    right = data_state(checkpoint(alone, step))
    assert right["step"] == step
    names = ["plain", "threads", "heads", "buckets", "zero3"]
    if step > 3:
        names += ["elastic", "buckets-resumed", "buckets-elastic", "zero3-resumed"]
    for name in names:
        assert data_state(checkpoint(ranks[0] / name, step)) == right, name


def test_damage_is_passed_over_by_all_ranks_and_named(
    ranks: tuple[Path, dict[str, Any]], tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    root = ranks[0]
    run = train(job, root / "damaged-data", tmp_path / "run", *DAMAGED)
    state = data_state(checkpoint(run, 6))
    n_damaged = len(state["quarantine"])
    assert n_damaged > 1
    named = (run / "quarantine.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in named) == state["quarantine"]
    assert (
        sum("skipped damaged sample: " in words and "sha256 differs" in words for words in said.messages)
        == n_damaged
    )
    for name in ("damaged", "damaged-heads"):
        assert data_state(checkpoint(root / name, 6)) == state
        assert sorted((root / name / "quarantine.jsonl").read_text().splitlines()) == sorted(named)
        assert scalars(root / name, LOSS) == pytest.approx(scalars(run, LOSS), rel=1e-5)
        assert scalars(root / name, "data/damaged")[6] == n_damaged
    # resumed by one process with repaired data: quarantined samples stay skipped
    source = checkpoint(root / "damaged-heads", 3)
    resumed = train(job, root / "damaged-data", tmp_path / "resumed", f"resume={source}", *DAMAGED)
    assert data_state(checkpoint(resumed, 6)) == state


def test_an_epoch_ends_the_run_alike(
    ranks: tuple[Path, dict[str, Any]], tiny_data: Path, tmp_path: Path, job: Runtime
) -> None:
    """After the same number of steps as on one process, the last of them partly padding."""
    run = train(job, tiny_data, tmp_path / "run", *EPOCH)
    n_tokens = Dataset.open(tiny_data).total("tokens", "train")
    last = ceil(ceil(n_tokens / 40) / 128)
    assert scalars(ranks[0] / "epoch", LOSS) == pytest.approx(scalars(run, LOSS), rel=1e-5)
    assert max(scalars(run, LOSS)) == last > 3
    state = data_state(checkpoint(run, last))
    assert sum(stream[0] for stream in state["streams"].values()) == n_tokens
    assert data_state(checkpoint(ranks[0] / "epoch", last)) == state


def test_errors_are_those_of_all_ranks(ranks: tuple[Path, dict[str, Any]]) -> None:
    for name, words in (
        ("uneven", "data.batch_size=5: must be a multiple of the 2 data-parallel ranks"),
        ("too many", "parallel.sequence=3: must divide the 2 ranks of the job"),
        ("broken", "samples are damaged, and data.max_damaged_fraction=0.01 allows 0"),
        ("again", "resume=never: "),
    ):
        first, second = ranks[1][name]
        assert first == second
        assert words in first


def test_ranks_agree_on_what_happened(ranks: tuple[Path, dict[str, Any]]) -> None:
    found = ranks[1]["agreements"]
    assert found["none fails"] == found["raise nothing"] == [None, None]
    assert found["the last fails"] == ["SharedError: rank 1: disk full"] * 2
    assert found["all fail alike"] == ["SharedError: no data"] * 2
    assert found["all fail apart"] == ["SharedError: rank 0: odd 0\nrank 1: odd 1"] * 2
    assert found["main fails"] == ["SharedError: main only"] * 2
    assert found["main tells"] == ["from 0", "from 0"]
    assert found["sum"] == [3.0, 1.0, 2.0**54]
    assert found["gather"] == [{"rank": 0}, {"rank": 1}]
