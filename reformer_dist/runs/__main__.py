"""The command `reformer-runs`: lists runs, shows one, and compares several."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from reformer_dist.errors import ConfigError
from reformer_dist.process.command import run_command
from reformer_dist.process.text_table import format_table
from reformer_dist.process.version import add_version
from reformer_dist.run.config_changes import config_changes
from reformer_dist.runs.comparison import differing_keys, measured, write_plot
from reformer_dist.runs.summary import RunSummary, find_runs, open_run
from reformer_dist.sweep.trial_metrics import TRAIN_LOSS

EPILOG = """\
examples:
  reformer-runs ls outputs
  reformer-runs show outputs/quickstart
  reformer-runs compare outputs/a outputs/b --metric eval/loss --plot losses.png
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-runs",
        description="Lists runs, shows how one was started and how far it is, and compares several.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls|show|compare")
    listing = commands.add_parser("ls", help="a table of the runs in a directory")
    listing.add_argument("folder", type=Path, nargs="?", default=Path("outputs"), help="default: outputs")
    show = commands.add_parser("show", help="how a run was started and configured, and its last metrics")
    show.add_argument("run", type=Path, help="a run directory")
    compare = commands.add_parser("compare", help="the keys in which runs differ, and their metrics side by side")
    compare.add_argument(
        "runs", type=Path, nargs="+", metavar="run", help="run directories, or one that holds runs"
    )
    compare.add_argument("--metric", metavar="NAME", help="such as eval/loss (default: the losses)")
    compare.add_argument("--plot", type=Path, metavar="FILE", help="plot the metric over steps and hours")
    for each in (listing, show, compare):
        each.add_argument("--json", action="store_true", help="print JSON instead")
    return parser


def run_subcommand(arguments: argparse.Namespace) -> None:
    """Prints what was asked for. Raises UserError."""
    {"ls": _list, "show": _show, "compare": _compare}[arguments.command](arguments)


def _list(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.folder
    runs = find_runs(folder)
    names = [folder.name if run.folder == folder else str(run.folder.relative_to(folder)) for run in runs]
    rows = [run.as_row(name) for run, name in zip(runs, names, strict=True)]
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    _write(json.dumps(rows, indent=1) if arguments.json else format_table(rows, columns))


def _show(arguments: argparse.Namespace) -> None:
    run = open_run(arguments.run)
    changed, last_values = _changed_keys(run), {tag: value for row in run.metrics for tag, value in row.items()}
    if arguments.json:
        document = {
            "state": run.state.value,
            "step": run.step,
            "max_steps": run.max_steps,
            "starts": run.starts,
            "changed": changed,
            "metrics": last_values,
            "checkpoints": run.checkpoints,
        }
        _write(json.dumps(document, indent=1))
        return
    metrics = [f"{tag}: {value:.6g}" for tag, value in sorted(last_values.items())]
    _write(f"{run.folder}: {run.state.value}, step {run.step:,} of {run.max_steps:,}")
    for start in run.starts:
        _write("\n" + "\n".join(_describe_start(start)))
    for title, lines in (
        ("keys that differ from the defaults", changed),
        ("last metrics", metrics),
        ("checkpoints", run.checkpoints),
    ):
        _write(f"\n{title}:")
        _write("\n".join(f"  {line}" for line in lines or ["none"]))


def _describe_start(start: dict[str, Any]) -> list[str]:
    n_ranks = start["world_size"]
    return [
        f"started {start['time']} from step {start['step']:,}: {start['command']}",
        f"  in {start['working_directory']}, {start['machine']['system']}",
        *(
            f"  {host}: {len(entry['ranks'])} of {n_ranks} ranks on {entry['device']}"
            for host, entry in start["hosts"].items()
        ),
        *(
            f"  {title}: {', '.join(f'{name} {value}' for name, value in start[title].items())}"
            for title in ("versions", "commits", "environment")
            if start[title]
        ),
    ]


def _compare(arguments: argparse.Namespace) -> None:
    paths: list[Path] = arguments.runs
    runs = find_runs(paths[0]) if len(paths) == 1 else [open_run(path) for path in paths]
    if len(runs) < 2:
        raise ConfigError(f"{paths[0]}: is one run; give two or more to compare")
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise ConfigError("compare: names a run twice; give different ones")
    keys, values = differing_keys(runs), measured(runs, arguments.metric)
    if arguments.json:
        _write(json.dumps({"keys": keys, "metrics": values}, indent=1))
    else:
        _write(format_table(keys) if keys else "the runs have the same configuration")
        _write(f"\n{format_table(values)}")
    if arguments.plot is not None:
        write_plot(runs, arguments.metric or TRAIN_LOSS, arguments.plot)
        sys.stderr.write(f"plot: {arguments.plot}\n")


def _changed_keys(run: RunSummary) -> list[str]:
    """Lines of the keys that differ from the defaults of this version."""
    from reformer_dist.config import RunConfig
    from reformer_dist.run.compose import to_dict

    defaults = to_dict(RunConfig())
    return [change for change in config_changes(defaults, run.config) if not change.startswith("output_dir:")]


def _write(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def main() -> None:
    run_command(lambda: run_subcommand(build_parser().parse_args()))


if __name__ == "__main__":
    main()
