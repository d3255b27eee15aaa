"""The quickstart on a user's text; test_pages.py runs it on the default one."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_quickstart_on_a_given_text(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text(
        "\n\n".join(f"Line {n} of a text that somebody wrote, {n * n} words long." for n in range(4000))
    )
    command = [sys.executable, ROOT / "tools" / "quickstart.py", "--text", text, "trainer.max_steps=4"]
    for said in ("data/quickstart-mine-", "nothing to train"):  # the second run resumes
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout and "held-out bits per byte" in done.stdout
    data, run = sorted((tmp_path / "data").iterdir()), sorted((tmp_path / "outputs").iterdir())
    assert len(data) == len(run) == 1
    [continues] = [line for line in done.stdout.splitlines() if line.startswith("continue ")]
    assert continues.count("trainer.max_steps=") == 1
    done = subprocess.run(shlex.split(continues)[1:], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "step 8/8" in done.stderr + done.stdout, done.stdout + done.stderr


def test_a_changed_text_is_another_dataset(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    quickstart = importlib.import_module("quickstart")
    text, heldout = tmp_path / "text", tmp_path / "heldout.txt"
    text.mkdir()
    for path in (text / "a.txt", heldout):
        path.write_text("one")
    names = [quickstart._source(text, None)[1], quickstart._source(text, [heldout])[1]]
    assert quickstart._source(text, None)[1] == names[0]
    (text / "a.txt").write_text("three")
    names.append(quickstart._source(text, None)[1])
    assert len(set(names)) == 3
    with pytest.raises(SystemExit, match="HELDOUT=absent"):
        quickstart._source(text, [Path("absent")])


@pytest.mark.parametrize("word", ["output_dir=elsewhere", "++data.path=mine"])
def test_dataset_and_run_are_named_by_the_tool(word, monkeypatch):
    """Otherwise it would train one run and evaluate another."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.setattr(sys, "argv", ["quickstart.py", word])
    with pytest.raises(SystemExit, match=re.escape(f"error: {word}: ")):
        importlib.import_module("quickstart").main()
