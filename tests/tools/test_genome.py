"""From FASTA to a trained model of a genome: tools/make_genome.py, reformer-shards --fasta, and both strands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.forks import fork_ranks
from support.launch import run_ranks

from reformer_dist.data import DNA, Dataset, read_fasta
from reformer_dist.run.compose import compose_run

TOOLS = Path(__file__).parents[2] / "tools"
SHARDS, TRAIN, EVALUATE = (f"reformer_dist.{name}" for name in ("shards", "train", "evaluate"))
SMALL = ["model.dim=16", "model.n_layers=2", "model.n_buckets=4", "data.seq_len=128", "trainer.max_steps=3"]


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("genome") / "raw/synthetic.fa.gz"
    run_ranks(TOOLS / "make_genome.py", 1, [path, "--megabases", 0.06, "--chromosomes", 3], forked=True)
    return path


def test_a_synthetic_genome_has_structure(genome: Path) -> None:
    text = b"".join(sample.fields[0] for sample in read_fasta([genome]))
    assert 58_000 < len(text) <= 60_000 and set(text) <= set(b"ACGTN")
    assert text.count(b"CG") < 0.5 * text.count(b"GC")
    places = range(0, 50_000, 20)  # repeats: what follows has been seen before
    assert sum(text.count(text[place : place + 20]) > 1 for place in places) > 0.1 * len(places)


def test_a_genome_is_trained_on_both_strands(genome: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    given = [genome, "--fasta", "--heldout-chromosomes", "chr3", "--output", data, "--section-mb", 0.01]
    run_ranks(SHARDS, 1, given, forked=True)
    dataset = Dataset.open(data)
    assert dataset.alphabet == DNA
    chromosomes = {
        split: {
            entry.document.split(":")[0]
            for shard in dataset.shards(split)
            for entry in dataset.index(shard).entries
        }
        for split in dataset.splits
    }
    assert chromosomes == {"train": {"synthetic/chr1", "synthetic/chr2"}, "heldout": {"synthetic/chr3"}}
    keys = ["experiment=genome", f"data.path={data}", f"output_dir={run}", *SMALL]
    assert compose_run(keys).data.strand.name == "random"
    assert "step 3/3" in run_ranks(TRAIN, 1, keys, forked=True)
    losses = []
    for strand in ("forward", "reverse"):
        result = tmp_path / f"{strand}.json"
        words = [run, f"data.strand={strand}", "--rows", "20", "--output", result]
        run_ranks(EVALUATE, 1, words, forked=True)
        losses.append(json.loads(result.read_text())["loss"])
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.5


def test_fasta_options_are_checked(genome: Path, tmp_path: Path) -> None:
    for words, message in (
        (["--case", "mask"], "need --fasta"),
        (["--fasta", "--fields", "a"], "give one of them"),
        (["--fasta", "--bed", genome, genome], "one file per INPUT"),
        (["--fasta", "--max-n", "-1"], "--max-n -1"),
        (["--fasta", "--heldout-from", genome, "--heldout-chromosomes", "chr1"], "exclude each other"),
    ):
        status, output = fork_ranks(
            "reformer_dist.shards", 1, [*map(str, [genome, *words]), "--output", str(tmp_path / "d")], 60, {}
        )
        assert (status, message in output) == (2, True), output
