"""reformer_dist.load on a small trained run, its checkpoint and its export."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import reformer_dist
from reformer_dist.checkpoint import write_export
from reformer_dist.checkpoint.export import open_weights
from reformer_dist.errors import CheckpointError, ConfigError
from reformer_dist.generate import build_parser, run_generation

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_a_checkpoint_and_an_export_are_the_same_model(trained: Path, tmp_path: Path) -> None:
    run = reformer_dist.load(trained)
    checkpoint = reformer_dist.load(str(run.checkpoint), device="cpu")
    write_export(open_weights(trained), tmp_path / "export")  # type: ignore[arg-type]
    export = reformer_dist.load(tmp_path / "export")
    assert run.step == checkpoint.step == export.step == 6
    expected = run.score("time water light")
    for other in (checkpoint, export):
        assert other.score("time water light") == expected
        assert torch.equal(other.embed("time"), run.embed("time"))
    assert reformer_dist.load(trained, "model.n_hashes=8").config.model.n_hashes == 8
    with pytest.raises(CheckpointError, match="nowhere"):
        reformer_dist.load(tmp_path / "nowhere")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text('{"model_type": "reformer"}')
    with pytest.raises(CheckpointError, match=r"theirs: is not an export .*reformer-convert"):
        reformer_dist.load(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 12, "seed": 3}, "--max-new-tokens 12 --seed 3"),
        ({"max_new_tokens": 12, "samples": 2, "top_k": 5}, "--max-new-tokens 12 --samples 2 --top-k 5"),
        (
            {"max_new_tokens": 12, "stop": "e", "temperature": 1.5},
            "--max-new-tokens 12 --stop e --temperature 1.5",
        ),
        (
            {"max_new_tokens": 9, "top_p": 0.5, "repetition_penalty": 1.3},
            "--max-new-tokens 9 --top-p 0.5 --repetition-penalty 1.3",
        ),
        (
            {"max_new_tokens": 6, "beams": 3, "length_penalty": 0.5},
            "--max-new-tokens 6 --beams 3 --length-penalty 0.5",
        ),
    ],
)
def test_generate_is_the_command(trained: Path, options, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two prompts at a time, each option by its name."""
    prompts = ["time", "little house"]
    found = reformer_dist.load(trained).generate(prompts, **options)
    given = ["--prompt", prompts[0], "--prompt", prompts[1], *words.split()]
    run_generation(build_parser().parse_intermixed_args([str(trained), *given]))
    printed = [part.split(" <==\n")[1] for part in capsys.readouterr().out.split("==> ")[1:]]
    n_samples = options.get("samples", 1)
    texts = [text for row in found for text in row] if n_samples > 1 else found
    assert [f"{prompts[n // n_samples]}{text}\n" for n, text in enumerate(texts)] == printed


def test_the_lines_of_the_page_run_as_printed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/quickstart").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/library.md").read_text()
    [block] = [part for part in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if ".load(" in part]
    assert len(block.splitlines()) == 8  # six after the import
    exec(block, {})
    assert capsys.readouterr().out.startswith("def main(")


def test_one_prompt_gives_one_text(trained: Path) -> None:
    model = reformer_dist.load(trained)
    text = model.generate("time", max_new_tokens=5, temperature=0)
    assert isinstance(text, str) and not text.startswith("time")
    assert model.generate("time", max_new_tokens=5, samples=1, temperature=0) == text
    assert len(model.generate("time", max_new_tokens=5, samples=2)) == 2


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_new_tokens": 0}, ConfigError, r"max_new_tokens=0: must be positive"),
        ({"top_k": -1}, ConfigError, r"top_k=-1: "),
        ({"top_p": 2.0, "beams": 2}, ConfigError, r"top_p=2\.0: excludes beams, "),
        ({"samples": 3, "beams": 2}, ConfigError, r"samples=3: must be at most beams=2"),
        ({"stop": ""}, ConfigError, r"stop='': "),
        ({"seed": 1.5}, TypeError, r"seed.*1\.5"),
        ({"temprature": 1}, TypeError, r"temprature"),
    ],
    ids=str,
)
def test_senseless_options_are_refused_by_argument(trained: Path, options, error, words: str) -> None:
    with pytest.raises(error, match=words):
        reformer_dist.load(trained).generate("time", **options)
