#!/usr/bin/env python3
"""The table of docs/recipes.md: what `reformer-train --dry-run` plans for each recipe of conf/experiment/.

A recipe is an experiment whose header has the command of its plan. Nothing is trained, and no data are read.

    python tools/recipes.py            prints the table
    python tools/recipes.py --write    puts it into docs/recipes.md
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from reformer_dist.config import Precision
from reformer_dist.planning.peaks import peak_flops
from reformer_dist.planning.plan import GIB, RunPlan
from reformer_dist.run.compose import compose_run
from reformer_dist.run.dry_run import plan_run, read_memory

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipes.md"
PLAN = re.compile(r"^#   reformer-train experiment=(\w+) --dry-run=(\w+) --vocab-size=(\d+)$", re.MULTILINE)
GPU, UTILIZATION = "H100", 0.2
"""The rates of the table: at this fraction of the peak of bf16, recomputed products included."""
HEADINGS = (
    "`experiment=`",
    "parameters",
    "GPUs",
    "tokens per row",
    "tokens per step",
    "tokens, billions",
    "memory per GPU, GiB",
    "sent per GPU and step, GiB",
    "GFLOP per token",
    "tokens/s",
    "hours",
)


@dataclass(frozen=True)
class Recipe:
    """An experiment of a real size, the card that it is for, and its vocabulary."""

    name: str
    card: str
    """Memory of a GPU, such as 80GiB."""
    vocab_size: int

    @property
    def card_bytes(self) -> float:
        return read_memory(f"--dry-run={self.card}") or 0.0

    def plans(self) -> list[tuple[int, RunPlan]]:
        """(steps, plan) of each stage. Raises UserError if it could not run."""
        config = compose_run([f"experiment={self.name}"])
        plans, last_step = plan_run(config, self.card_bytes, self.vocab_size)
        return [(min(stage.end_step or last_step, last_step) - stage.first_step, plan) for stage, plan in plans]


def read_recipes() -> list[Recipe]:
    """All recipes, in the order of their names. Raises ValueError if a header plans another experiment."""
    recipes = []
    for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
        for name, card, vocab_size in PLAN.findall(path.read_text()):
            if name != path.stem:
                raise ValueError(f"{path}: plans experiment={name}; must plan its own")
            recipes.append(Recipe(name, card, int(vocab_size)))
    return recipes


def row(recipe: Recipe, plans: list[tuple[int, RunPlan]]) -> str:
    """A line of the table: memory of the largest stage, tokens and hours of all, and the rest of the last one."""
    last = plans[-1][1]
    n_tokens, rate = _tokens(last), _rate(last)
    cells = (
        f"[`{recipe.name}`](../conf/experiment/{recipe.name}.yaml)",
        _amount(last.count.total),
        str(last.job.world_size),
        f"{last.job.config.task.max_source_len if last.job.encoder else last.job.config.data.seq_len:,}",
        f"{n_tokens:,}",
        f"{sum(steps * _tokens(plan) for steps, plan in plans) / 1e9:.1f}",
        f"{max(plan.total for _, plan in plans) / GIB:.1f} of {recipe.card_bytes / GIB:.0f}",
        f"{sum(last.traffic.values()) / GIB:.1f}",
        f"{last.flops / n_tokens / 1e9:.2f}",
        f"{float(f'{rate:.2g}'):,.0f}",
        f"{sum(steps * _tokens(plan) / _rate(plan) for steps, plan in plans) / 3600:,.0f}",
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    return "\n".join([*lines, *(row(recipe, recipe.plans()) for recipe in read_recipes())])


def _tokens(plan: RunPlan) -> int:
    """Tokens of a step, those of sources included."""
    data, encoder = plan.job.config.data, plan.job.encoder
    return data.batch_size * (data.seq_len + (encoder.config.data.seq_len if encoder else 0))


def _rate(plan: RunPlan) -> float:
    """Tokens per second of all GPUs."""
    peak = peak_flops(GPU, Precision.bf16)
    assert peak is not None
    return UTILIZATION * peak * plan.job.world_size * _tokens(plan) / plan.flops


def _amount(n_parameters: int) -> str:
    return f"{n_parameters / 1e9:.2f} B" if n_parameters >= 1e9 else f"{n_parameters / 1e6:.0f} M"


def in_page(page: str, new_table: str) -> str:
    """The page with another table."""
    start, end = page.index("| `experiment=`"), page.index("\n\n", page.index("| `experiment=`"))
    return page[:start] + new_table + page[end:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--write", action="store_true", help="update docs/recipes.md")
    if parser.parse_args().write:
        PAGE.write_text(in_page(PAGE.read_text(), table()))
    else:
        print(table())


if __name__ == "__main__":
    main()
