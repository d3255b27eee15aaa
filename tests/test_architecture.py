"""The layout as far as a machine can check it: imports, import cycles, lengths of files, and names of tests."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "reformer_dist"
# What each part may import besides itself, lowest layers first. Every part has a row.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "seeds": set(),
    "config": {"errors"},
    "ops": set(),
    "distributed": {"errors"},
    "process": {"distributed", "errors"},
    "fs": {"errors", "process"},
    "data": {"errors", "fs", "ops"},
    "checkpoint": {"config", "distributed", "errors", "fs"},
    "models": {"config", "errors", "ops", "seeds"},
    "generation": {"config", "errors", "models", "ops", "seeds"},
    "interop": {"config", "data", "errors", "models", "ops"},
    "parallel": {"config", "distributed", "errors", "ops", "process"},
    "engine": {"checkpoint", "config", "distributed", "errors"},
    "tasks": {"config", "data", "errors", "generation", "models", "process"},
    "diagnostics": {"config", "data", "errors", "models", "ops"},
    "training": {
        *("checkpoint", "config", "data", "diagnostics", "distributed", "engine", "errors", "fs", "generation"),
        *("models", "ops", "parallel", "process", "seeds", "tasks"),
    },
    "planning": {"config", "engine", "errors", "models", "ops", "parallel"},
    "launch": {"config", "errors", "process"},
    "run": {
        *(
            "checkpoint",
            "config",
            "data",
            "distributed",
            "engine",
            "errors",
            "fs",
            "models",
            "parallel",
            "planning",
        ),
        *("process", "tasks", "training"),
    },
    "inference": {"checkpoint", "config", "data", "errors", "generation", "models", "ops", "run", "tasks"},
    "serving": {"config", "errors", "generation", "inference", "process", "run"},
    "doctor": {"config", "distributed", "errors", "ops", "process", "run"},
    "sweep": {"config", "distributed", "errors", "fs", "process", "run", "seeds", "training"},
    "runs": {"config", "errors", "fs", "process", "run", "sweep"},
    # the commands
    "train": {"config", "distributed", "errors", "launch", "process", "run", "sweep", "training"},
    "evaluate": {
        *("config", "data", "diagnostics", "distributed", "errors", "fs", "launch", "models", "parallel"),
        *("process", "run", "tasks", "training"),
    },
    "generate": {"config", "errors", "inference", "process", "run"},
    "predict": {"config", "errors", "inference", "process", "run"},
    "convert": {"checkpoint", "config", "errors", "fs", "interop", "process", "run"},
    "checkpoints": {"checkpoint", "errors", "fs", "process", "run"},
    "shards": {"checkpoint", "data", "errors", "process"},
    "commands": {
        "checkpoints",
        "convert",
        "doctor",
        "evaluate",
        "generate",
        "predict",
        "process",
        "runs",
        "serving",
        "shards",
        "train",
    },
    # the package itself offers the library
    "__init__": {"config", "inference", "models", "ops"},
}
THIRD_PARTY_HOMES = {
    "deepspeed": {"engine"},
    "webdataset": {"data"},
    "tokenizers": {"data"},
    "sentencepiece": {"data"},
    "pyarrow": {"data"},
    "zstandard": {"data"},
    "sacrebleu": {"tasks"},
    "rouge_score": {"tasks"},
    "hydra": {"run", "sweep"},
    "optuna": {"sweep"},
    "matplotlib": {"diagnostics", "planning", "runs", "sweep"},
    "tensorboard": {"training"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "tqdm": {"process"},
    "wandb": {"training"},
    "mlflow": {"training"},
    "triton": {"ops"},
}
MOST_FILES_AT_ROOT = 10
MOST_LINES, MOST_LINES_OF_FUNCTION = 400, 60


def part_of(path: Path) -> str:
    """config for config/model.py, train for train.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = ["reformer_dist", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported anywhere below, and `module.name` for each name taken from one of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"relative import of {node.module}"
            yield node.module
            if node.module.partition(".")[0] == "reformer_dist":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def test_every_part_has_a_row_and_every_row_a_part():
    assert {part_of(path) for path in FILES} == set(ALLOWED)


def test_few_files_at_the_root():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_FILES_AT_ROOT


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = part_of(path)
    for name in imports(TREES[path]):
        words = name.split(".")
        if words[0] == "reformer_dist" and len(words) > 1 and words[1] in ALLOWED:
            assert words[1] == part or words[1] in ALLOWED[part], f"{part} must not import {name}"
        home = THIRD_PARTY_HOMES.get(words[0])
        assert home is None or part in home, f"{name} belongs in {home}"


def test_the_allowed_imports_have_no_cycle():
    assert_no_cycle(ALLOWED)


def test_no_file_imports_itself_through_others():
    """Imports within functions count, and so do those for type checkers."""
    modules = {module_of(path) for path in FILES}
    graph = {module_of(path): set(imports(tree)) & modules - {module_of(path)} for path, tree in TREES.items()}
    packages = {module_of(path) for path in FILES if path.name == "__init__.py"}
    # importing a file runs the __init__ of its package, but an __init__ lists what its own files offer
    assert_no_cycle({name: found for name, found in graph.items() if name not in packages})


def assert_no_cycle(graph: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, f"import cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        for found in sorted(graph.get(name, ())):
            visit(found, [*path, name])
        done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno
            assert length < MOST_LINES_OF_FUNCTION, f"{node.name} has {length} lines"


def test_test_modules_have_different_names():
    """pytest imports them by name alone, so the second of two with the same name fails to load."""
    paths = (path for path in TESTS.rglob("*.py") if path.name not in ("conftest.py", "__init__.py"))
    names = Counter(path.name for path in paths)
    assert [name for name, count in names.items() if count > 1] == []
