"""Runs of every kind of task in this process: they train, are evaluated, resume exactly and load again."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import tiny_config
from task_data import WORDS, make, write_for, write_pairs

from reformer_dist.data import BpeTokenizer, ByteTokenizer, Corpus, DrawKey, RowSelection, Sample
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import CheckpointError, ConfigError, DataError
from reformer_dist.generate import build_parser, run_generation
from reformer_dist.planning import plan
from reformer_dist.run import pretrained as load
from reformer_dist.run.build import build_trainer
from reformer_dist.run.dry_run import dry_run
from reformer_dist.run.pretrained import load_model

OVERRIDES = {
    "masked_language_model": ("model.causal=false", "trainer.eval_every=3"),
    "completion": ("trainer.eval_every=3", "data.seq_len=128"),
    "sequence_classification": ("model.causal=false", "trainer.eval_every=3", "deepspeed.stage=1"),
    "sequence_to_sequence": ("trainer.eval_every=3", "task.max_source_len=64", "model.encoder_layers=[exact]"),
    "question_answering": ("model.causal=false", "trainer.eval_every=3", "task.stride=8"),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data")


def train(job: Runtime, kind: str, data: Path, output: Path, *changed: str) -> list[dict[str, float]]:
    """Metrics of each step, except times and speed."""
    config = tiny_config(data, output, f"task.kind={kind}", *OVERRIDES.get(kind, ()), *changed)
    with ExitStack() as resources:
        build_trainer(config, job, resources).fit()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{tag: x for tag, x in row.items() if not tag.startswith(("perf/", "time_s"))} for row in lines]


@pytest.mark.parametrize("kind", sorted(OVERRIDES))
def test_a_run_resumes_exactly_and_loads(
    kind: str, pairs: Path, tiny_data: Path, tmp_path: Path, job: Runtime
) -> None:
    ready = {"completion": pairs, "sequence_to_sequence": pairs, "masked_language_model": tiny_data}
    data = ready.get(kind) or write_for(kind, tmp_path / "data")
    whole = train(job, kind, data, tmp_path / "whole")
    assert whole[-1]["train/loss"] != whole[0]["train/loss"]
    assert 0 <= whole[-1]["eval/accuracy"] <= 1
    assert 0 < whole[-1]["reversible/drift"] < 1e-4
    assert ("train/bits_per_byte" in whole[-1]) is False
    cut = tmp_path / "whole/checkpoints/step-00000003"
    resumed = train(job, kind, data, tmp_path / "resumed", f"resume={cut}")
    assert resumed[-1] == whole[-1]

    loaded = load_model(tmp_path / "whole", [], torch.device("cpu"))
    assert loaded.task.config.task.kind.name == kind
    assert loaded.fields == Corpus.open([data]).datasets[0].fields
    assert loaded.prompt_end == ([256] if kind == "completion" else [])
    batch = next(iter(loaded.task.heldout(Corpus.open([data]), RowSelection(4, 4))))
    assert torch.isfinite(loaded.model(**batch))


def test_other_tasks_initialize_from_a_masked_language_model(
    tiny_data: Path, tmp_path: Path, job: Runtime
) -> None:
    """Its embedding has one more row, for the mask token; all other weights below the head are kept both ways."""
    kinds = ["masked_language_model", "sequence_classification", "masked_language_model"]
    data = [tiny_data, write_for("sequence_classification", tmp_path / "classes"), tiny_data]
    frozen = ("optim.lr=0", "optim.weight_decay=0", "deepspeed.stage=1", "trainer.max_steps=1")
    tables: list[torch.Tensor] = []
    for number, (kind, its) in enumerate(zip(kinds, data, strict=True)):
        begin = () if number == 0 else (f"init_from={tmp_path / f'run{number - 1}'}",)
        train(job, kind, its, tmp_path / f"run{number}", *begin, *frozen)
        weights = load_model(tmp_path / f"run{number}", [], torch.device("cpu")).model.state_dict()
        tables.append(weights["embedding.tokens.weight"])
    assert [len(table) for table in tables] == [258, 257, 258]
    assert torch.equal(tables[1], tables[0][:257]) and torch.equal(tables[2][:257], tables[1])
    torch.testing.assert_close(tables[2][257], tables[1].mean(dim=0))


def test_masked_tokens_are_a_function_of_the_position(tiny_data: Path) -> None:
    task = make(
        "masked_language_model", tiny_data, "model.causal=false", "data.seq_len=2000", "model.position=rotary"
    )
    text = Corpus.open([tiny_data])
    first, again = (next(iter(task.heldout(text, RowSelection(1, 1)))) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    tokens, labels = first["tokens"], first["labels"]
    asked = labels != -100
    assert 0.12 < asked.float().mean() < 0.18
    assert 0.7 < (tokens[asked] == 257).float().mean() < 0.9  # the mask token, after the 257 byte tokens
    assert (tokens[asked] == labels[asked]).float().mean() > 0.04
    assert (tokens[~asked] != 257).all()


def test_a_completion_that_is_too_long_keeps_its_own_beginning(pairs: Path) -> None:
    task = make("completion", pairs, "data.seq_len=8")
    sample = Sample("", (np.arange(1, 7), np.arange(11, 14)))
    row = task.encode(sample, DrawKey(0, 0, 0))  # type: ignore[attr-defined]
    assert row["tokens"].tolist() == [3, 4, 5, 6, 256, 11, 12, 13]
    assert row["labels"].tolist() == [-100, -100, -100, -100, 11, 12, 13, 256]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["task.kind=masked_language_model"], "model.causal=True: must be false"),
        (["task.kind=completion", "model.causal=false"], "model.causal=False: must be true"),
        (["task.kind=completion", "trainer.sample_every=1"], "trainer.sample_every=1: must be 0"),
        (["task.mask_prob=1"], "task.mask_prob=1.0: "),
        (
            ["task.kind=sequence_to_sequence"],
            "task.max_source_len=1024: must be at most 128",
        ),
    ],
)
def test_inconsistent_options_are_refused(changed: list[str], words: str, tiny_data: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config(tiny_data, Path("unused"), *changed)
    assert str(caught.value).startswith(words)


def test_a_model_of_another_kind_or_vocabulary_is_refused(
    tiny_data: Path, tmp_path: Path, job: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(job, "masked_language_model", tiny_data, tmp_path / "run", "trainer.max_steps=1")
    loaded = load_model(tmp_path / "run", [], torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"task\.kind.*masked_language_model"):
        _ = loaded.language_model
    overrides = ["task.kind=language_model", "model.causal=true"]
    with pytest.raises(
        CheckpointError, match=r"embedding\.tokens\.weight"
    ):  # the mask token has its own embedding
        load_model(tmp_path / "run", overrides, torch.device("cpu"))
    another = BpeTokenizer.train([b"a text of some words"], 270)
    monkeypatch.setattr(load, "load_tokenizer", lambda *_: another)
    with pytest.raises(CheckpointError, match=r"tokenizer.* \d+ tokens.*\b257\b"):
        load_model(tmp_path / "run", [], torch.device("cpu"))


@pytest.mark.parametrize("kind", sorted(OVERRIDES))
def test_a_plan_has_the_parameters_of_the_task_s_model(
    kind: str,
    pairs: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "measure_libraries", lambda job: 0.0)  # takes seconds; its own test measures them
    ready = {"completion": pairs, "sequence_to_sequence": pairs, "masked_language_model": tiny_data}
    data = ready.get(kind) or write_for(kind, tmp_path / "data")
    dry_run(tiny_config(data, tmp_path, f"task.kind={kind}", *OVERRIDES[kind]), "--dry-run=1GiB")
    said = capsys.readouterr().out
    model = make(kind, data, *OVERRIDES[kind], labels=tuple(WORDS)).build_model()
    assert f"parameters    {sum(p.numel() for p in model.parameters()):,}; " in said
    assert "fits in 1.00 GiB" in said
    assert ("256 source tokens" in said) == (kind == "sequence_to_sequence")


def test_a_plan_of_a_task_on_other_data_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task\.kind=question_answering .*question and context"):
        dry_run(
            tiny_config(tiny_data, tmp_path, "task.kind=question_answering", *OVERRIDES["question_answering"]),
            "--dry-run",
        )


def test_a_target_is_generated_for_a_source(
    pairs: Path, tmp_path: Path, job: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    train(job, "sequence_to_sequence", pairs, tmp_path / "run", "trainer.max_steps=2", "optim.lr=0.1")
    loaded = load_model(tmp_path / "run", [], torch.device("cpu"))
    sources = ["red blue", "grey white black"]
    samples = [Sample("", (ByteTokenizer().encode(text.encode()), np.zeros(0, np.int64))) for text in sources]
    expected = loaded.task.generate(loaded.model, samples)  # type: ignore[attr-defined]

    def generate(*arguments: str) -> str:
        capsys.readouterr()
        run_generation(build_parser().parse_intermixed_args([str(tmp_path / "run"), *arguments]))
        return capsys.readouterr().out

    given = ["--prompt", sources[0], "--prompt", sources[1], "--max-new-tokens", "64"]
    both = generate(*given, "--temperature", "0")
    assert [part.split("==>")[0].strip() for part in both.split("<==")[1:]] == expected
    assert generate("--prompt", sources[1], "--max-new-tokens", "64", "--beams", "1").strip() == expected[1]
    with pytest.raises(ConfigError, match=r"--prompt: .*empty"):
        generate("--prompt", " ")
