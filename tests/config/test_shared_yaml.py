"""Yaml files of others run no code: not in experiments, groups or root files, on the command line, or as saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

from reformer_dist.config import RunConfig
from reformer_dist.errors import ConfigError
from reformer_dist.run.compose import run_config_from, to_dict
from reformer_dist.sweep.request import run_or_sweep

GLOBAL = "# @package _global_\n"
CALL = {"_target_": "os.mkdir", "path": "MARK"}
FACTORY = {"version": 1, "root": {"handlers": ["a"]}, "handlers": {"a": {"()": "os.mkdir", "path": "MARK"}}}
CLASS = {"version": 1, "root": {"handlers": ["a"]}, "handlers": {"a": {"class": "os.mkdir", "path": "MARK"}}}
FORMATTER = {"version": 1, "formatters": {"a": {"()": "os.mkdir", "path": "MARK"}}}

# in an experiment file, at the root of the configuration
HYDRA: dict[str, dict[str, Any]] = {
    "callback": {"callbacks": {"a": CALL}},
    "nested callback": {"callbacks": {"a": {"_target_": "builtins.dict", "b": {"c": CALL}}}},
    "launcher": {"launcher": CALL},
    "sweeper": {"sweeper": CALL},
    "sweeper's part": {"sweeper": {"a": [CALL]}},
    "handler factory": {"job_logging": FACTORY},
    "handler class": {"job_logging": CLASS},
    "formatter": {"job_logging": FORMATTER},
    "Hydra's handler": {"hydra_logging": FACTORY},
    "environment": {"job": {"env_set": {"PYTHONSTARTUP": "MARK"}}},
    "run directory": {"run": {"dir": "MARK"}},
    "output directory": {"run": {"dir": "MARK"}, "output_subdir": "MARK"},
    "search path": {"searchpath": ["pkg://evil_module"]},
    "mode": {"verbose": True},
}

# file: content, and the command line that reads it
Case = tuple[dict[str, str], list[str]]
FILES: dict[str, Case] = {
    "package of a callback": (
        {"experiment/evil": f"# @package hydra.callbacks.a\n{json.dumps(CALL)}"},
        ["experiment=evil"],
    ),
    "package hydra": (
        {"experiment/evil": f"# @package hydra\n{json.dumps(HYDRA['launcher'])}"},
        ["experiment=evil"],
    ),
    "another group": ({"deepspeed/evil": GLOBAL + json.dumps({"hydra": HYDRA["callback"]})}, ["deepspeed=evil"]),
    "added group": ({"more/evil": GLOBAL + json.dumps({"hydra": HYDRA["callback"]})}, ["+more=evil"]),
    "package on the command line": (
        {"experiment/evil": json.dumps(CALL)},
        ["+experiment@hydra.callbacks.a=evil"],
    ),
    "group of callbacks": (
        {
            "experiment/evil": GLOBAL + "defaults: [{override /hydra/callbacks: evil}]",
            "hydra/callbacks/evil": json.dumps({"a": CALL}),
        },
        ["experiment=evil"],
    ),
    "group of launchers": (
        {
            "experiment/evil": GLOBAL + "defaults: [{override /hydra/launcher: evil}]",
            "hydra/launcher/evil": json.dumps(CALL),
        },
        ["experiment=evil"],
    ),
    "root file": (
        {"evil": f"defaults: [train, _self_]\nhydra: {json.dumps(HYDRA['callback'])}"},
        ["--config-name=evil"],
    ),
    "search path of a root file": (
        {"evil": "defaults: [train, _self_]\nhydra: {searchpath: ['pkg://evil_module']}"},
        ["--config-name=evil"],
    ),
    "python tag": (
        {"experiment/evil": GLOBAL + "output_dir: !!python/object/apply:os.mkdir [MARK]"},
        ["experiment=evil"],
    ),
    "resolver": ({"experiment/evil": GLOBAL + "output_dir: ${os.mkdir:MARK}"}, ["experiment=evil"]),
    "instantiating resolver": (
        {"experiment/evil": GLOBAL + "output_dir: ${hydra.instantiate:MARK}"},
        ["experiment=evil"],
    ),
    "target at the root": ({"experiment/evil": GLOBAL + json.dumps(CALL)}, ["experiment=evil"]),
    "target in a group": ({"experiment/evil": GLOBAL + json.dumps({"model": CALL})}, ["experiment=evil"]),
    "target in a value of any type": (
        {"experiment/evil": GLOBAL + json.dumps({"data": {"path": CALL}})},
        ["experiment=evil"],
    ),
    "target in the space of a sweep": (
        {"experiment/evil": GLOBAL + json.dumps({"sweep": {"params": {"_target_": "os.mkdir"}}})},
        ["experiment=evil"],
    ),
}
FILES |= {
    name: ({"experiment/evil": GLOBAL + json.dumps({"hydra": settings})}, ["experiment=evil"])
    for name, settings in HYDRA.items()
}

WORDS = [
    "+hydra.callbacks.a={_target_:os.mkdir,path:MARK}",
    "++hydra.callbacks.a._target_=os.mkdir",
    "hydra.callbacks={a:{_target_:os.mkdir,path:MARK}}",
    "hydra={callbacks:{a:{_target_:os.mkdir,path:MARK}}}",
    "+hydra={callbacks:{a:{_target_:os.mkdir,path:MARK}}}",
    "hydra.launcher._target_=os.mkdir",
    "hydra/launcher=evil",
    "hydra/job_logging=default",
    "hydra.searchpath=[pkg://evil_module]",
    "++hydra.searchpath=[pkg://evil_module]",
    "hydra.run.dir=MARK",
    "hydra.mode=MULTIRUN",
    "~hydra.callbacks",
    "--experimental-rerun=MARK",
    "--config-path=MARK",
]

# beside a plain run; each is one way through Hydra
MODES = [["--multirun", "model.n_hashes=1,2"], ["--cfg=job"], ["--cfg=hydra"], ["--help"], ["--info=config"]]


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the files try to make. A module that makes it on import is on Python's path."""
    path = tmp_path / "mark"
    module = tmp_path / "modules" / "evil_module"
    module.mkdir(parents=True)
    (module / "__init__.py").write_text(f"import os; os.mkdir({str(path)!r})")
    monkeypatch.syspath_prepend(module.parent)
    return path


def refuses(words: list[str], mark: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The message of the real entry, which must not get as far as a run, a sweep or what `mark` stands for."""

    def run(config: object) -> None:
        raise AssertionError(f"accepted: {config}")

    monkeypatch.chdir(mark.parent)
    monkeypatch.setattr("sys.argv", ["reformer-train", *(word.replace("MARK", str(mark)) for word in words)])
    with pytest.raises(ConfigError) as caught:
        run_or_sweep(run, run)
    assert not mark.exists()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def enters(name: str, mode: list[str], mark: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`refuses` for one of FILES, in a folder of its own."""
    files, words = FILES[name]
    own = mark.parent / "own"
    for file, content in files.items():
        path = own / f"{file}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.replace("MARK", str(mark)))
    return refuses([f"--config-dir={own}", *words, *mode], mark, monkeypatch)


@pytest.mark.parametrize("name", FILES)
def test_files_run_no_code(name: str, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enters(name, [], mark, monkeypatch)


@pytest.mark.parametrize("word", WORDS)
def test_command_lines_run_no_code(word: str, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert word.lstrip("+~").split("=")[0].split(".")[0] in refuses([word], mark, monkeypatch)


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_no_mode_runs_code(mode: list[str], mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("callback", "handler factory", "Hydra's handler", "search path of a root file"):
        enters(name, mode, mark, monkeypatch)
    for word in WORDS[:2]:
        refuses([word, *mode], mark, monkeypatch)


SAVED: list[dict[str, Any]] = [
    {"hydra": HYDRA["callback"]},
    CALL,
    {"model": CALL},
    {"model": {"compat": CALL}},
    {"data": {"path": [CALL]}},
    {"sweep": {"params": {"_target_": "os.mkdir"}}},
    {"output_dir": "${os.mkdir:MARK}"},
    {"launcher": {"()": "os.mkdir"}},
]


@pytest.mark.parametrize("saved", SAVED, ids=str)
def test_saved_configurations_run_no_code(saved: dict[str, Any], mark: Path) -> None:
    """What a resumed, evaluated or exported model says of its run; and the same as overrides."""
    values = json.loads(json.dumps(saved).replace("MARK", str(mark)))
    merged = OmegaConf.to_container(OmegaConf.merge(to_dict(RunConfig()), values))
    assert isinstance(merged, dict)
    with pytest.raises(ConfigError):
        run_config_from({str(key): value for key, value in merged.items()}, [])
    with pytest.raises(ConfigError):
        run_config_from(to_dict(RunConfig()), [f"{key}={json.dumps(value)}" for key, value in values.items()])
    assert not mark.exists()


def test_resolvers_are_those_of_the_libraries() -> None:
    """None of them calls what its arguments name."""
    resolvers = {name for name in BaseContainer._resolvers if not name.startswith("oc.")}
    assert resolvers <= {"now", "hydra", "python_version"}
