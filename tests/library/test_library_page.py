"""docs/library.md: its examples run, its shapes are correct, and its tables match the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from public_calls import CALLS
from refusal_table import table

import reformer_dist
from reformer_dist import generation
from reformer_dist.interop.reformer_pytorch_api import KEYWORDS, OPTIONS
from reformer_dist.ops import kv_cache, lsh

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "library.md").read_text()


def shape_of(value: Any) -> list[int]:
    return list((value[0] if isinstance(value, tuple) else value).shape)


def test_its_examples_run_with_the_documented_shapes() -> None:
    names: dict[str, Any] = {}
    checked = 0
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        if "reformer_dist.load(" in block:  # needs a run: tests/entries/test_load.py has one
            continue
        exec(block, names)
        for line in block.splitlines():
            documented = re.match(r"(?:(?P<names>[\w, ]+) = )?(?P<value>.*?)  # (?P<shape>\[\d.*?\])", line)
            if documented is None:
                continue
            with torch.no_grad():
                found = eval(
                    documented["names"].split(",")[0] if documented["names"] else documented["value"], names
                )
            assert shape_of(found) == eval(documented["shape"]), line
            checked += 1
    assert checked == 8


def table_below(head: str) -> dict[str, str]:
    table = PAGE.partition(head)[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, flags=re.MULTILINE))


def test_its_tables_match_the_code() -> None:
    assert table_below("| there | here |") == {name: row.note for name, row in OPTIONS.items()}
    assert table_below("| keyword of a call | reason |") == KEYWORDS


def test_its_list_of_refusals_is_that_of_the_code() -> None:
    """If not, `PYTHONPATH=. python tests/library/refusal_table.py` prints the right one."""
    assert table() in PAGE


def test_every_public_function_is_in_the_list() -> None:
    listed = {name.partition(".")[0] for name in CALLS} | {"CrossKeys", "ReformerStack"}
    # a Block runs in a stack, which checks its inputs; configurations have their own tests
    others = {"AttentionCache", "AttentionView", "Block", "Decoder", "Hypothesis", "Rule"}
    others |= {"__version__", "make_decoder", "load"} | set(reformer_dist.config.__all__)
    for module in (reformer_dist, lsh, kv_cache, generation):
        assert not set(module.__all__) - listed - others, module.__name__


def test_the_readme_links_to_it_and_its_example_runs() -> None:
    part = (ROOT / "README.md").read_text().partition("## As a library")[2].partition("\n## ")[0]
    assert "(docs/library.md)" in part
    exec(re.search(r"```python\n(.*?)```", part, flags=re.DOTALL)[1], {})
