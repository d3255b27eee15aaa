"""The command `reformer-doctor`: checks this machine or, under torchrun, the job."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from reformer_dist.config import DataConfig
from reformer_dist.distributed import runtime
from reformer_dist.doctor import check_machine
from reformer_dist.doctor.check_attention import check_attention
from reformer_dist.doctor.check_collectives import ADVICE, check_collectives, check_local_collectives
from reformer_dist.doctor.findings import CheckState, Finding, failed, ok, run_check
from reformer_dist.errors import UserError
from reformer_dist.process.command import run_command
from reformer_dist.process.version import add_version
from reformer_dist.run.data import open_corpus


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-doctor",
        description="Checks whether this machine is fit to train a Reformer. Exits with 1 if a check fails.",
        epilog="under torchrun, it checks the job: torchrun --nproc_per_node=2 -m reformer_dist.doctor",
    )
    add_version(parser)
    parser.add_argument("--data", type=Path, help="a dataset to check")
    parser.add_argument("--output", type=Path, default=Path(), help="where runs will be written (default: here)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return parser


def run_checks(arguments: argparse.Namespace) -> list[Finding]:
    """Findings of all checks. Under a launcher, every rank calls this."""
    findings = run_check("versions", check_machine.check_versions, "install reformer_dist again")
    for name, check in (
        ("devices", check_machine.check_devices),
        ("C compiler", check_machine.check_compiler),
        ("attention on the CPU", check_machine.check_native_backend),
        ("shared memory", check_machine.check_shared_memory),
        ("open files", check_machine.check_open_files),
        ("disk", lambda: check_machine.check_disk(arguments.output)),
    ):
        findings += run_check(name, check, "see the message")
    if arguments.data is not None:
        findings += run_check("data", lambda: check_data(arguments.data), "give the directory of dataset.json")
    if not runtime.is_rank():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        findings += run_check("LSH attention", lambda: check_attention(device), "do not train here")
        return findings + run_check("collectives", check_local_collectives, ADVICE)
    job = runtime.start()
    findings += run_check("LSH attention", lambda: check_attention(job.device), "do not train here")

    def check_job() -> list[Finding]:
        return [ok("collectives", f"{job.world_size} ranks of this job: {check_collectives(job)}")]

    findings += run_check("collectives", check_job, ADVICE)
    by_rank: list[list[Finding]] = job.gather(findings)
    # all findings of rank 0, and the problems of the others
    return by_rank[0] + [
        replace(finding, name=f"rank {rank}, {finding.name}")
        for rank, others in enumerate(by_rank[1:], start=1)
        for finding in others
        if finding.state is not CheckState.ok
    ]


def check_data(folder: Path) -> Iterator[Finding]:
    """The dataset opens, and each shard has the size recorded in its index."""
    try:
        corpus = open_corpus(DataConfig(path=str(folder)), ["train"])
    except UserError as error:
        yield failed("data", str(error), "write it again with reformer-shards, or give the right path")
        return
    yield ok("data", f"{corpus.total('tokens', 'train'):,} training tokens in {folder}")


def report(findings: list[Finding], *, as_json: bool) -> str:
    counts = {state.value: sum(finding.state is state for finding in findings) for state in CheckState}
    if as_json:
        return json.dumps({"findings": [finding.to_json() for finding in findings], **counts}, indent=1)
    summary = f"{counts['ok']} ok, {counts['warning']} warnings, {counts['failed']} failed"
    return "\n".join([*(finding.line() for finding in findings), summary])


def _run() -> None:
    arguments = build_parser().parse_args()
    findings = run_checks(arguments)
    if runtime.env_rank() == 0:
        sys.stdout.write(report(findings, as_json=arguments.json) + "\n")
    if any(finding.state is CheckState.failed for finding in findings):
        runtime.stop()
        sys.exit(1)


def main() -> None:
    run_command(_run)


if __name__ == "__main__":
    main()
