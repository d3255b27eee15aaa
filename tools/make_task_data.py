#!/usr/bin/env python3
"""Generates the data of a task from Python's standard library or at random.

JSON lines, which reformer-shards converts to a dataset:
  duplication   "prompt" and "completion" are the same random text: 0w0w in the paper, with 0 as the end of text
  summaries     "document" is a function without its docstring, "summary" the docstring's first sentence
  packages      "text" is the beginning of a file, "label" its package
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}
LETTERS = [chr(code) for code in range(1, 128)]
MIN_FILES = 20  # per class
SKIPPED_PACKAGES = {"test"}  # larger than all others combined
TEXT_BYTES = 4096
SENTENCE = re.compile(r"(.+?[.!?])(?:\s|$)", re.DOTALL)


def main() -> int:
    arguments = _parse()
    generators: dict[str, Iterator[dict[str, str]]] = {
        "duplication": duplicated(arguments.samples, arguments.length, arguments.seed),
        "summaries": summaries(),
        "packages": packages(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    n_lines = 0
    with arguments.output.open("w", encoding="utf-8") as file:
        for sample in generators[arguments.kind]:
            file.write(json.dumps(sample) + "\n")
            n_lines += 1
    print(f"{arguments.output}: {n_lines:,} samples")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("duplication", "summaries", "packages"))
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument(
        "--samples", type=int, default=20_000, help="duplication: number of samples (default: 20000)"
    )
    parser.add_argument("--length", type=int, default=63, help="duplication: letters per text (default: 63)")
    parser.add_argument("--seed", type=int, default=0, help="duplication: random seed (default: 0)")
    return parser.parse_args()


def duplicated(samples: int, length: int, seed: int) -> Iterator[dict[str, str]]:
    draw = random.Random(seed)
    for _ in range(samples):
        text = "".join(draw.choices(LETTERS, k=length))
        yield {"prompt": text, "completion": text}


def summaries() -> Iterator[dict[str, str]]:
    """Functions without their docstrings, and their first sentences; duplicates are skipped."""
    seen = set()
    for path in _files():
        text = path.read_text(encoding="utf-8", errors="replace")
        for node in _functions(text):
            docstring = ast.get_docstring(node)
            found = SENTENCE.match(docstring) if docstring else None
            document = _without_docstring(node, text)
            if found and document and document not in seen:
                seen.add(document)
                yield {"document": document, "summary": " ".join(found[1].split())}


def _functions(text: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # the test suite has files that are invalid on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, text: str) -> str:
    """Source lines of a function; empty if it has only a docstring."""
    docstring = node.body[0]
    lines = text.splitlines()
    head, body = lines[node.lineno - 1 : docstring.lineno - 1], lines[docstring.end_lineno : node.end_lineno]
    return "\n".join(head + body) if len(node.body) > 1 else ""


def packages() -> Iterator[dict[str, str]]:
    by_package = defaultdict(list)
    for path in _files():
        inside = path.relative_to(STDLIB)
        if len(inside.parts) > 1 and inside.parts[0] not in SKIPPED_PACKAGES:
            by_package[inside.parts[0]].append(path)
    for package, paths in sorted(by_package.items()):
        if len(paths) >= MIN_FILES:
            for path in paths:
                text = path.read_bytes()[:TEXT_BYTES].decode("utf-8", errors="ignore")
                if text.strip():
                    yield {"text": text, "label": package}


def _files() -> Iterator[Path]:
    for path in sorted(STDLIB.rglob("*.py")):
        if not SKIPPED_FOLDERS & set(path.relative_to(STDLIB).parts):
            yield path


if __name__ == "__main__":
    sys.exit(main())
