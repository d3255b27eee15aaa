"""A user's own experiments and groups, in runs, sweeps and every launcher; or one line on what can't be read."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from reformer_dist.config import LauncherKind, RunConfig
from reformer_dist.errors import ConfigError
from reformer_dist.launch.render import RENDERERS, render, render_sweep
from reformer_dist.run.command_line import parse_command_line
from reformer_dist.run.compose import compose_run
from reformer_dist.sweep.request import SweepRequest, parse_request, run_or_sweep
from reformer_dist.sweep.runner import grid_trials, trial_arguments
from reformer_dist.sweep.trials import SweepFile

FILES = {
    "experiment/big": "# @package _global_\nmodel: {dim: 48}\ndata: {seq_len: 77}\n",
    "experiment/nlp/deep": "# @package _global_\nmodel: {n_layers: 7}\n",
    "launcher/mine": "kind: torchrun\nhosts: [a, b]\nnproc_per_node: 2\n",
    "sweep/mine": "params: {model.n_hashes: '1,2'}\n",
    "root": "defaults: [train, _self_]\nmodel: {dim: 24}\n",
    "twice_removed": "defaults: [root, _self_]\nmodel: {n_layers: 3}\n",
    "plain": "model: {dim: 64}\n",
    "a_list": "[1, 2]\n",
    "broken": "model: [\n",
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "own" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "own"


Enter = Callable[..., RunConfig | SweepRequest]


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Enter:
    """What a command line runs, or sweeps over."""

    def parse(*words: object) -> RunConfig | SweepRequest:
        found: list[RunConfig | SweepRequest] = []
        monkeypatch.setattr("sys.argv", ["reformer-train", *map(str, words)])
        run_or_sweep(found.append, found.append)
        return found[0]

    return parse


def test_runs(own: Path, enter: Enter, monkeypatch: pytest.MonkeyPatch) -> None:
    config = enter("--config-dir", own, "experiment=big", "model.n_heads=2")
    assert isinstance(config, RunConfig)
    assert (config.model.dim, config.data.seq_len, config.model.n_heads) == (48, 77, 2)
    monkeypatch.chdir(own.parent)
    assert enter("-cd", "own", "experiment=big") == enter(f"--config-dir={own}", "experiment=big")
    deep = enter(f"--config-dir={own}", "experiment=nlp/deep")
    assert isinstance(deep, RunConfig)
    assert deep.model.n_layers == 7
    root, removed = (enter(f"--config-dir={own}", "--config-name", n) for n in ("root.yaml", "twice_removed"))
    assert isinstance(root, RunConfig) and isinstance(removed, RunConfig)
    assert (root.model.dim, removed.model.dim, removed.model.n_layers) == (24, 24, 3)


def test_sweeps(own: Path, enter: Enter, tmp_path: Path) -> None:
    """Each trial is a command line of its own, which must read the same files."""
    for flags in (["--multirun", "model.n_hashes=1,2"], ["sweep=mine"]):
        words = [f"--config-dir={own}", "--config-name=root", "experiment=big", f"output_dir={tmp_path / 's'}"]
        request = enter(*words, *flags)
        assert isinstance(request, SweepRequest)
        request.folder.mkdir(exist_ok=True)
        trials = grid_trials(request, SweepFile(request.folder, (0, 1)))
        for trial, n_hashes in zip(trials, (1, 2), strict=True):
            config = enter(*trial_arguments(request, trial))
            assert isinstance(config, RunConfig)
            assert (config.model.dim, config.data.seq_len, config.model.n_hashes) == (24, 77, n_hashes)


def test_every_launcher_passes_them_on(own: Path, enter: Enter) -> None:
    """The printed scripts and manifests hold a command line that composes to the same run."""
    files = [f"--config-dir={own}", "--config-name=root"]
    for kind in RENDERERS:
        words = [*files, "experiment=big", f"launcher={kind.name}", "launcher.nproc_per_node=1"]
        config = enter(*words)
        assert isinstance(config, RunConfig)
        text = render(config, words)
        assert all(word in text for word in [*files, "experiment=big"])
    words = [f"--config-dir={own}", "launcher=mine"]
    config = enter(*words)
    assert isinstance(config, RunConfig)
    assert (config.launcher.kind, config.launcher.hosts) == (LauncherKind.torchrun, ["a", "b"])
    (command,) = [line for line in render(config, words).replace("\\\n", " ").splitlines() if "exec " in line]
    assert shlex.split(command)[-1:] == [f"--config-dir={own}"]
    words = [*files, "--multirun", "model.n_hashes=1,2", "launcher=slurm", "launcher.nnodes=1", "launcher.array=2"]
    request = enter(*words)
    assert isinstance(request, SweepRequest)
    assert all(word in render_sweep(request.launcher, words) for word in files)


def test_groups_may_be_left_out(enter: Enter) -> None:
    default = RunConfig()
    config = compose_run(["experiment=null"])
    assert config == compose_run(["~experiment"])
    assert (config.model, config.data, config.output_dir) == (default.model, default.data, default.output_dir)
    for group in ("deepspeed", "launcher", "sweep", "tracker", "experiment"):
        assert compose_run([f"{group}=null"]) == compose_run([f"~{group}"])
    assert compose_run(["deepspeed=zero2", "deepspeed=null"]).deepspeed.stage == 0
    assert compose_run(["deepspeed=null", "deepspeed=zero2"]).deepspeed.stage == 2
    request = parse_request(["experiment=null,quickstart"])
    assert [compose_run([f"experiment={value}"]).model.dim for value in request.space["experiment"].values] == [
        256,
        128,
    ]  # type: ignore[union-attr]


def test_information_with_a_group_left_out(enter: Enter, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(IndexError):  # nothing is run
        enter("--cfg", "job", "experiment=null", "deepspeed=zero1")
    assert "output_dir: outputs/default" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--config-path", "OWN"], ["--config-path=OWN: ", "--config-dir=OWN"]),
        (["--config-path=OWN", "--config-name=root"], ["--config-path=OWN: ", "--config-dir=OWN"]),
        (["--config-dir=OWN/nowhere"], ["--config-dir=OWN/nowhere: "]),
        (["--config-dir=OWN/root.yaml"], ["--config-dir=OWN/root.yaml: "]),
        (["--config-name=root"], ["--config-name=root: ", "--config-dir"]),
        (["--config-dir=OWN", "--config-name=nowhere"], ["--config-name=nowhere: ", "OWN"]),
        (
            ["--config-dir=OWN", "--config-name=plain", "data.seq_len=8"],
            ["--config-name=plain: ", "[train, _self_]"],
        ),
        (["--config-dir=OWN", "--config-name=a_list"], ["--config-name=a_list: ", "mapping"]),
        (["--config-dir=OWN", "--config-name=broken"], ["--config-name=broken", "yaml"]),
        (["--config-dir=OWN", "experiment=bgi"], ["experiment=bgi: ", "mean big"]),
        (["experiment=OWN/experiment/big.yaml"], ["experiment=OWN/experiment/big.yaml: ", "--config-dir"]),
        (["experiment=big"], ["experiment=big: ", "--config-dir"]),
        (["deepspeed=OWN/ds.json"], ["deepspeed=OWN/ds.json: ", "zero3", "deepspeed.*"]),
        (["deepspeed=ds.json"], ["deepspeed=ds.json: ", "zero3", "deepspeed.*"]),
        (["experiment=3"], ["experiment=3: ", "null"]),
        (["experiment="], ["experiment=: ", "null"]),
        (["experiment=[]"], ["experiment=[]: ", "null"]),
        (["+experiment=null"], ["+experiment=null: "]),
        (["model.n_hashes=2,4"], ["model.n_hashes=2,4: ", "--multirun"]),
        (["model.n_hashes=range(1,3)"], ["model.n_hashes=range(1,3): ", "--multirun"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0][0] in "-+edm" else "",
)
def test_what_can_not_be_read(words: list[str], parts: list[str], own: Path, enter: Enter) -> None:
    sweep = [] if "n_hashes" in words[0] else ["--multirun", "optim.lr=1,2"]
    for more in ([], ["--cfg", "job"], sweep):
        with pytest.raises(ConfigError) as caught:
            enter(*(word.replace("OWN", str(own)) for word in words), *more)
        assert len(str(caught.value).splitlines()) == 1
        for part in parts:
            assert part.replace("OWN", str(own)) in str(caught.value)


def test_files_that_conf_would_hide(own: Path, enter: Enter) -> None:
    (own / "experiment" / "quickstart.yaml").write_text(FILES["experiment/big"])
    with pytest.raises(ConfigError, match=r"--config-dir=.*: experiment/quickstart\.yaml "):
        enter(f"--config-dir={own}", "experiment=quickstart")


def test_a_file_that_is_no_text(own: Path, enter: Enter) -> None:
    for content in (b"\xff\xfe\x00model", b"\x00", b"- 1\n", b"3", b"model: &a [*a]", b"a: 1\na: 2\n"):
        (own / "experiment" / "odd.yaml").write_bytes(b"# @package _global_\n" + content)
        with pytest.raises(ConfigError):
            enter(f"--config-dir={own}", "experiment=odd")


def test_flags_are_parsed_back() -> None:
    for words in (["--config-dir=a b", "--config-name=c"], ["--config-dir=x"], ["--config-name=c"], []):
        assert parse_command_line(words).files.arguments() == words
