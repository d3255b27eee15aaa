"""The house rules that a machine can check: which folder may import which, and how long files may get."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "reformer_dist"
# what each part may import of ours, beside itself
ALLOWED = {
    "errors": set(),
    "seeds": set(),
    "unread": {"told_to_stop"},
    "log": {"distributed", "unread"},
    "config": {"errors"},
    "ops": set(),
    "models": {"config", "ops", "seeds"},
    "generation": {"config", "errors", "models", "seeds"},
    "data": {"errors"},
    "tasks": {"config", "data", "errors", "generation", "log", "models"},
    "distributed": {"errors"},
    "checkpoint": {"distributed", "errors"},
    "engine": {"config", "errors", "distributed"},
    "planning": {"config", "engine", "models", "ops", "parallel"},
    "doctor": {"cli", "config", "distributed", "errors", "feed", "ops"},
    "interop": {"config", "data", "errors", "models", "ops"},
    "launch": {"config", "errors", "unread"},
    "sweep": {"compose", "config", "distributed", "errors", "log", "overrides", "seeds", "training"},
    "parallel": {"distributed", "errors", "ops"},
    "told_to_stop": set(),
    "training": {
        *("config", "checkpoint", "distributed", "engine", "errors", "log", "parallel", "seeds", "told_to_stop"),
    },
}
THIRD_PARTY_HOMES = {
    "deepspeed": {"engine"},
    "webdataset": {"data"},
    "tokenizers": {"data"},
    "sentencepiece": {"data"},
    "sacrebleu": {"tasks"},
    "rouge_score": {"tasks"},
    "hydra": {"compose", "overrides"},
    "optuna": {"sweep"},
    "matplotlib": {"sweep"},
    "tensorboard": {"training"},
    "triton": {"ops"},
}


def part_of(path: Path) -> str:
    """config for config/model.py, compose for compose.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = part_of(path)
    for name in imports(path):
        words = name.split(".")
        if words[0] == "reformer_dist" and len(words) > 1 and part in ALLOWED:
            assert words[1] == part or words[1] in ALLOWED[part], f"{part} must not import {name}"
        home = THIRD_PARTY_HOMES.get(words[0])
        assert home is None or part in home, f"{name} belongs in {home}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno} lines"
