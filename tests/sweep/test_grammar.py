"""Parsing of sweep command lines: Hydra's grammar, presets, errors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

import pytest

from reformer_dist.config import SweepConfig, SweepKind
from reformer_dist.errors import ConfigError
from reformer_dist.run.command_line import conf_folder
from reformer_dist.sweep.grid import combinations, trial_name
from reformer_dist.sweep.request import SweepRequest, as_override, is_sweep, run_or_sweep
from reformer_dist.sweep.space import Choices, Interval

Ask = Callable[..., SweepRequest]

VALUES = [
    ("model.n_hashes=2,4,8", ("2", "4", "8")),
    ("model.n_hashes=choice(2,4)", ("2", "4")),
    ("model.n_hashes=range(2,9,3)", ("2", "5", "8")),
    ("model.n_hashes=range(3,0,-1)", ("1", "2", "3")),
    ("model.dropout=range(0,0.3,0.1)", ("0.0", "0.1", "0.2")),
    ("optim.lr=1e-3,0.001,3e-4", ("0.001", "0.0003")),
    ("model.layers=[lsh],[local,lsh]", ("[lsh]", "[local,lsh]")),
    ("model.head_dim=null,16", ("null", "16")),
    ("deepspeed=zero1,zero2", ("zero1", "zero2")),
    ("deepspeed=glob(zero*,exclude=zero3)", ("zero0", "zero1", "zero2")),
    ("data.path='a b','c,d'", ("'a b'", "'c,d'")),
]


@pytest.mark.parametrize(("word", "values"), VALUES, ids=[word for word, _ in VALUES])
def test_values(requested: Ask, word: str, values: tuple[str, ...]) -> None:
    request = requested("--multirun", word)
    key = word.partition("=")[0]
    assert combinations(request.space) == [{key: value} for value in values]
    assert not any(each.startswith(f"{key}=") for each in request.fixed)


def test_every_combination_in_order(requested: Ask) -> None:
    request = requested("model.n_hashes=1,2", "--multirun", "trainer.max_steps=9", "optim.lr=1e-3,1e-2")
    assert [tuple(each.values()) for each in combinations(request.space)] == [
        ("1", "0.001"),
        ("1", "0.01"),
        ("2", "0.001"),
        ("2", "0.01"),
    ]
    assert request.fixed[-1] == "trainer.max_steps=9"


INTERVALS = [
    ("optim.lr=interval(0.1,1)", Interval(0.1, 1.0)),
    ("optim.lr=tag(log,interval(1e-4,1e-2))", Interval(1e-4, 1e-2, is_log=True)),
    ("model.n_hashes=int(interval(1,8))", Interval(1, 8, is_integer=True)),
    ("model.n_hashes=range(1,9,2)", Interval(1, 7, 2, is_integer=True)),
    ("model.n_hashes=1,2", Choices(("1", "2"))),
]


@pytest.mark.parametrize(("word", "dimension"), INTERVALS, ids=[word for word, _ in INTERVALS])
def test_a_search_accepts_intervals(requested: Ask, word: str, dimension: Interval) -> None:
    request = requested("sweep=optuna", word)
    assert request.settings.kind is SweepKind.optuna
    assert list(request.space.values()) == [dimension]


def test_overrides_of_a_preset(requested: Ask) -> None:
    preset = requested("sweep=lsh")
    assert list(preset.space) == ["model.n_hashes", "model.window", "model.n_buckets"]
    changed = requested("sweep=lsh", "sweep.parallel=3", "model.n_hashes=5,6")
    assert changed.space["model.n_hashes"] == Choices(("5", "6"))
    assert changed.settings.parallel == 3
    assert not any(word.startswith("sweep") for word in changed.fixed)


def test_a_key_that_the_command_line_fixes_is_no_longer_tried(requested: Ask) -> None:
    assert list(requested("sweep=lsh", "model.window=16").space) == ["model.n_hashes", "model.n_buckets"]


def test_the_last_of_two_values_counts(requested: Ask) -> None:
    assert "model.n_hashes" not in requested("optim.lr=1,2", "-m", "model.n_hashes=1,2", "model.n_hashes=3").space


@pytest.mark.parametrize(
    "words", [["model.n_hashes=2"], ["--multirun", "--cfg", "job"], ["--help", "-m"], ["--nonsense", "sweep=lsh"]]
)
def test_command_lines_without_a_sweep(words: list[str]) -> None:
    assert not is_sweep(words)


REFUSED = [
    (["sweep.parallel=2"], ["sweep.parallel=2", "--multirun"]),
    (["-m", "optim.lr=shuffle(1,2)"], ["optim.lr", "shuffle"]),
    (["-m", "optim.lr=interval(2,1)"], ["optim.lr=interval(2,1)", "increasing"]),
    (["-m", "optim.lr=tag(log,interval(0,1))"], ["optim.lr", "above 0"]),
    (["-m", "model.n_hashes=range(1,1)"], ["model.n_hashes", "empty"]),
    (["-m", "deepspeed=glob(nothing*)"], ["deepspeed", "no values"]),
    (["-m", "output_dir=a,b"], ["output_dir=a,b", "one value"]),
    (["-m", "sweep.seed=1,2"], ["sweep.seed=1,2", "one value"]),
    (["-m", "hydra.sweep.dir=x"], ["hydra.sweep.dir=x", "sweep=..."]),
    (["-m", "optim.lr=1,"], ["optim.lr=1,"]),
    (["-m", "sweep=nothing"], ["nothing", "optuna"]),
    (["-m", "sweep.paralel=1"], ["sweep.paralel", "mean sweep.parallel"]),
    (["-m", "+sweep.more=1"], ["sweep.more=1", "key"]),
    (["-m", "sweep.shard=4/4"], ["sweep.shard=4/4", "0/4"]),
    (["-m", "sweep.parallel=0"], ["sweep.parallel=0"]),
]


@pytest.mark.parametrize(("words", "told"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_refusals(words: list[str], told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["reformer-train", *words])
    with pytest.raises(ConfigError) as caught:
        run_or_sweep(lambda config: None, lambda request: None)
    for word in told:
        assert word in str(caught.value)


def test_a_grid_needs_values(requested: Ask) -> None:
    with pytest.raises(ConfigError, match=r"optim.lr=interval\(0.1,1\).*sweep=optuna"):
        combinations(requested("-m", "optim.lr=interval(0.1,1)").space)


NAMES = [
    ({"model.n_hashes": "2", "optim.lr": "0.001"}, "model.n_hashes-2+optim.lr-0.001"),
    ({"+x": "-1"}, "x--1"),
    ({"deepspeed": "zero2"}, "deepspeed-zero2"),
]


@pytest.mark.parametrize(("changed", "name"), NAMES)
def test_names(changed: dict[str, str], name: str) -> None:
    assert trial_name(changed) == name
    assert as_override("output_dir", f"out/{name}") == f"output_dir=out/{name}"  # needs no quotes


def test_lossy_names_are_unique() -> None:
    paths = ("a b", "a,b", "'a b'", "a/b", "a\tb", "x" * 200, "x" * 201)
    names = {trial_name({"data.path": path}) for path in paths}
    assert len(names) == len(paths)
    assert all("/" not in name and len(name) < 150 for name in names)


ODD_PATHS = ["a=b", "a,b", "it's", "null", "3", "[x]", "a b ", "1e-3", "back\\", "out/x"]


@pytest.mark.parametrize("path", ODD_PATHS)
def test_any_path_becomes_one_value(path: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(as_override("output_dir", path))
    assert str(override.value()) == path and not override.is_sweep_override()


def test_shares() -> None:
    assert SweepConfig(shard="2/5").parse_shard() == (2, 5)


def test_presets_only_have_settings_of_a_sweep() -> None:
    """The preset is not passed to trials: other keys in it would be ignored."""
    for path in (conf_folder() / "sweep").iterdir():
        assert "@package" not in path.read_text()


def test_the_commands_of_the_docs_are_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    docs = (conf_folder().parent / "docs/sweeps.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", docs, flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    sweeps = [command for command in commands if command.startswith("reformer-train")]
    assert len(sweeps) == 3
    for command in sweeps:
        requests: list[SweepRequest] = []
        monkeypatch.setattr("sys.argv", shlex.split(command))
        run_or_sweep(lambda config: None, requests.append)
        assert requests[0].space and requests[0].folder.parent.name == "outputs"
