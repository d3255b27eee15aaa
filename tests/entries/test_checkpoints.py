"""reformer-checkpoints on the checkpoints of a trained run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reformer_dist import checkpoints
from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.errors import CheckpointError, ConfigError
from reformer_dist.fs.lock import RunLock
from reformer_dist.run.pretrained import load_model


def run(*words: object) -> None:
    arguments = checkpoints.build_parser().parse_args([str(word) for word in words])
    arguments.action(arguments)


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A run directory that may be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def step(run_folder: Path, number: int) -> Path:
    return run_folder / "checkpoints" / f"step-{number:08d}"


def test_ls_and_verify(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("verify", copy)
    assert capsys.readouterr().out == f"{step(copy, 3)}: intact\n{step(copy, 6)}: intact\n"
    (step(copy, 3) / "run.json").write_text("{}")
    run("ls", copy)
    damaged, good = capsys.readouterr().out.splitlines()
    assert damaged.startswith(f"{step(copy, 3)} | damaged: run.json has 2 bytes")
    assert good.startswith(f"{step(copy, 6)} | step 6 | 1 ranks | ZeRO stage 0 | ")
    with pytest.raises(CheckpointError, match="1 of 2 checkpoints"):
        run("verify", copy)
    with pytest.raises(CheckpointError, match=rf"{copy.parent}: .*no checkpoint"):
        run("ls", copy.parent)


def test_diff(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("diff", trained, step(trained, 6))
    assert "identical" in capsys.readouterr().out.splitlines()[-1]
    run("diff", step(trained, 3), step(trained, 6))
    said = capsys.readouterr().out
    assert said.startswith("step: 3 -> 6; optimizer's step: 3 -> 6\n")
    assert " exp_avg: differs by up to " in said


def test_prune_counts_good_ones(copy: Path) -> None:
    shutil.copytree(step(copy, 6), step(copy, 9))  # its manifest is of step 6
    run("prune", copy, "--keep", 1)
    assert [path.name for path in sorted((copy / "checkpoints").iterdir())] == ["step-00000006", "step-00000009"]
    with pytest.raises(ConfigError, match="--keep 0: "):
        run("prune", copy, "--keep", 0)


def test_paths_from_within_a_run(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(step(copy, 3))
    run("verify", ".")
    assert capsys.readouterr().out == f"{step(copy, 3)}: intact\n"
    with pytest.raises(CheckpointError, match=r"step-00000003: .*exists"):
        run("export", copy, ".")
    (tmp_path / "link").symlink_to(copy / "checkpoints")
    locked = []
    monkeypatch.setattr(checkpoints, "RunLock", lambda folder: (locked.append(folder), RunLock(folder))[1])
    for folder, path in ((copy / "checkpoints", "."), (step(copy, 6), "."), (tmp_path, "link")):
        monkeypatch.chdir(folder)
        run("prune", path, "--keep", 1)
    assert locked == [copy] * 3
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["step-00000006"]


def test_a_copy_under_a_name_of_its_own_is_good(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = Path(shutil.copytree(step(copy, 3), copy / "checkpoints" / "step-00000003-best"))
    run("verify", best)
    assert capsys.readouterr().out == f"{best}: intact\n"


@pytest.mark.parametrize("size", [[], ["--max-shard-size", "40KB"]])
def test_an_export_is_the_model(trained: Path, tmp_path: Path, size: list[str]) -> None:
    run("export", trained, tmp_path / "exported", *size)
    exported = load_model(tmp_path / "exported", [], torch.device("cpu"))
    original = load_model(trained, [], torch.device("cpu"))
    assert exported.step == 6
    assert exported.config == original.config
    for name, parameter in original.model.named_parameters():
        assert torch.equal(parameter, exported.model.get_parameter(name))
    files = sorted((tmp_path / "exported").glob("*.safetensors"))
    if size:
        index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
        assert len(files) > 1 and {path.name for path in files} == set(index["weight_map"].values())
        shapes = CheckpointReader(step(trained, 6)).record.shapes
        assert index["metadata"]["total_size"] == 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    else:
        assert [path.name for path in files] == ["model.safetensors"]
    run("export", trained, tmp_path / "short", "--dtype", "bfloat16")
    short = load_model(tmp_path / "short", [], torch.device("cpu"))
    for name, parameter in original.model.named_parameters():
        assert torch.equal(parameter.bfloat16().float(), short.model.get_parameter(name))
    written = load_file(tmp_path / "short" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'exported'}: .*exists"):
        run("export", trained, tmp_path / "exported", *size)


@pytest.mark.parametrize("words", ["0", "2XB", "-1"])
def test_sizes(trained: Path, tmp_path: Path, words: str) -> None:
    with pytest.raises(ConfigError, match=f"--max-shard-size {words}: "):
        run("export", trained, tmp_path / "exported", f"--max-shard-size={words}")


def test_a_damaged_export_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    run("export", trained, folder, "--max-shard-size", "40KB")
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    name = next(iter(document["weight_map"]))
    index.write_text(json.dumps({"weight_map": document["weight_map"] | {name: "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"\.\./x\.safetensors"):
        load_model(folder, [], torch.device("cpu"))
    index.write_text(json.dumps({"weight_map": document["weight_map"] | {name: "absent.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"absent\.safetensors"):
        load_model(folder, [], torch.device("cpu"))
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"{folder}/?.*: .*export"):
        load_model(folder, [], torch.device("cpu"))
