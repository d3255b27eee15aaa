"""reformer-generate on a small trained run: sources of prompts, several texts, ends of texts."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from reformer_dist.data import ByteTokenizer
from reformer_dist.errors import ConfigError
from reformer_dist.generate import build_parser, run_generation
from reformer_dist.generation import TextStream, beam_search
from reformer_dist.inference import continuation


@pytest.fixture
def write(trained: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process; returns what it printed."""

    def run(*arguments: str) -> str:
        run_generation(build_parser().parse_intermixed_args([str(trained), *arguments]))
        return capsys.readouterr().out

    return run


def test_prompts_from_arguments_files_and_standard_input(write, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"time water")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"time water")))
    given = write("--prompt", "time water", "--max-new-tokens", "12")
    assert given.startswith("time water") and given.endswith("\n")
    # a file's text is not printed again
    assert write("--prompt-file", str(file), "--max-new-tokens", "12") == given.removeprefix("time water")
    assert write("--prompt-file", "-", "--max-new-tokens", "12") == given.removeprefix("time water")


def test_several_prompts_and_samples(write):
    options = ("--samples", "2", "--max-new-tokens", "12", "--seed", "3")
    output = write("--prompt", "time", "--prompt", "little house ", *options)
    texts = output.split("==> ")[1:]
    assert [text.split(" <==\n")[0] for text in texts] == [
        f"prompt {prompt}, text {text}" for prompt in (1, 2) for text in (1, 2)
    ]
    bodies = [text.split(" <==\n")[1].removesuffix("\n") for text in texts]
    assert all(body.startswith("time") for body in bodies[:2])
    assert all(body.startswith("little house ") for body in bodies[2:])
    assert len(set(bodies)) == 4
    # the first sample does not depend on what else is written
    assert write("--prompt", "time", "--max-new-tokens", "12", "--seed", "3") == bodies[0] + "\n"


def test_more_rounds_than_it_was_trained_with(write):
    assert write("--prompt", "time", "model.n_hashes=8", "--max-new-tokens", "5").startswith("time")


def test_a_stop_string_ends_the_text_before_it(write):
    whole = write("--prompt", "time", "--max-new-tokens", "40", "--temperature", "0").removesuffix("\n")
    stop = whole[10:13]
    text = write("--prompt", "time", "--max-new-tokens", "40", "--temperature", "0", "--stop", stop)
    assert text == whole[: whole.index(stop, len("time"))] + "\n"
    searched = write("--prompt", "time", "--max-new-tokens", "40", "--beams", "1")
    assert searched == whole + "\n"
    # a beam that ends there makes room for the next best one
    assert stop not in write("--prompt", "time", "--max-new-tokens", "40", "--beams", "2", "--stop", stop)


def test_a_search_ends_texts_at_stop_strings_across_tokens(write, monkeypatch):
    """The printed text is cut there anyway; the search must stop as well, or it would score what follows."""
    ends = []

    def look(*arguments):
        ends.append(arguments[-1])
        return beam_search(*arguments)

    monkeypatch.setattr(continuation, "beam_search", look)
    write("--prompt", "time", "--max-new-tokens", "4", "--beams", "2", "--stop", "é!", "--stop", "at")
    [is_end] = ends
    assert [is_end(list(text.encode())) for text in ("né!", "cat", "né", "n!", "a t")] == [True] * 2 + [False] * 3
    assert is_end([ByteTokenizer().eos_id])


@pytest.mark.parametrize("beams", [(), ("--beams", "2")], ids=["drawn", "searched"])
def test_a_text_is_read_behind_its_own_prompt(write, monkeypatch, beams):
    """Otherwise a SentencePiece vocabulary would lose the space between the two."""
    given = set()

    def look(decode, stops, before):
        given.add(tuple(before))
        return TextStream(decode, stops, before)

    monkeypatch.setattr(continuation, "TextStream", look)
    write("--prompt", "time water", "--prompt", "no", "--samples", "2", "--max-new-tokens", "2", *beams)
    assert given == {tuple(b"me water"), (ByteTokenizer().eos_id, *b"no")}


def test_the_best_beams_are_printed(write):
    output = write("--prompt", "time", "--max-new-tokens", "6", "--beams", "3", "--samples", "2")
    first, second = (text.split(" <==\n")[1] for text in output.split("==> ")[1:])
    assert first.startswith("time") and second.startswith("time") and first != second


def test_it_writes_up_to_the_last_position(trained, capsys):
    """The end-of-text token takes one of 128 positions; the other row continues after the first has ended."""
    prompts = ["--prompt", "x" * 117, "--prompt", "y"]
    arguments = [str(trained), *prompts, "--max-new-tokens", "30", "--temperature", "0"]
    run_generation(build_parser().parse_intermixed_args(arguments))
    printed = capsys.readouterr()
    first, second = (text.split(" <==\n")[1].removesuffix("\n") for text in printed.out.split("==> ")[1:])
    assert (len(first), len(second)) == (127, 31)
    assert "128 positions" in printed.err and len(printed.err.splitlines()) == 1


def test_a_prompt_that_is_too_long_is_named(write, tmp_path):
    file = tmp_path / "long.txt"
    file.write_bytes(b"x" * 127)
    with pytest.raises(ConfigError, match=r"long\.txt: .*\b127 tokens.*\b126\b"):
        write("--prompt-file", str(file))


def test_models_of_the_chunk_rule_write_too(write):
    assert write("--prompt", "time", "model.neighbours=chunk", "--max-new-tokens", "5").startswith("time")
