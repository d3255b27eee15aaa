"""tools/evidence.py at a tiny size: results are saved, and not measured again."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "evidence.py"


@pytest.mark.slow
def test_a_row_is_measured_once(tmp_path: Path) -> None:
    def run(*options: str) -> str:
        command = [sys.executable, str(TOOL), *options, "--output", str(tmp_path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
        assert done.returncode == 0, done.stdout
        return done.stdout

    row = (
        "joint_recall",
        "--rows",
        "lsh",
        "--seeds",
        "1",
        "trainer.max_steps=2",
        "model.dim=16",
        "data.batch_size=4",
    )
    assert "$ " in run(*row)
    [path] = (tmp_path / "results").iterdir()
    result = json.loads(path.read_text())
    assert (result["claim"], result["row"], result["seed"]) == ("joint_recall", "lsh", 0)
    assert set(result["sizes"]["task"]) == {"up to 8 contexts of 8 keys"}
    assert run(*row).strip() == f"{path} is there"


@pytest.mark.slow
def test_the_curves_of_staged_runs(tmp_path: Path, tiny_data: Path) -> None:
    """Both rows, with two checkpoints each, evaluated at the last length."""
    shutil.copytree(tiny_data, tmp_path / "data" / "stdlib")
    tiny = ("model.dim=16", "trainer.max_steps=2", "trainer.save_every=1", "--seeds", "1", "data.eval_rows=1")
    command = [sys.executable, str(TOOL), "stages", *tiny, "--output", str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    assert done.returncode == 0, done.stdout
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "results").iterdir())]
    assert sorted(result["row"] for result in results) == ["512, 2048, 8192", "8192"]
    for result in results:
        assert [point["tokens"] for point in result["curve"]] == [8192, 16384]
        assert all(0 < point["bits_per_byte"] < 9 for point in result["curve"])
    assert (tmp_path / "stages.png").is_file()


def test_rows_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOOL.parent)  # as for a script
    monkeypatch.setattr(sys, "argv", ["evidence.py", "text", "--list"])
    runpy.run_path(str(TOOL), run_name="__main__")
    names = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    ablations = ("lsh_no_conv", "lsh_rotary", "one_bucket")
    assert names == [["text", name] for name in ("lsh", "lsh_own_values", "exact", "local", *ablations)]
