"""Entry: `reformer-doctor`, alone or under torchrun, where it examines the job that will train."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from reformer_dist.config import DataConfig
from reformer_dist.distributed import runtime
from reformer_dist.doctor import machine
from reformer_dist.doctor.attention import attention
from reformer_dist.doctor.collectives import ADVICE, job_collectives, local_collectives
from reformer_dist.doctor.findings import Finding, State, examine, failed, ok
from reformer_dist.errors import UserError
from reformer_dist.process.command import run_command
from reformer_dist.run.data import open_corpus


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-doctor",
        description="Is this machine fit to train a Reformer? Exits 1 if anything has failed.",
        epilog="under torchrun it examines the job: torchrun --nproc_per_node=2 -m reformer_dist.doctor",
    )
    parser.add_argument("--data", type=Path, help="a data set that must be readable")
    parser.add_argument("--output", type=Path, default=Path(), help="where runs will be written (default: here)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return parser


def examine_all(arguments: argparse.Namespace) -> list[Finding]:
    """All findings of this process; under a launcher, every rank calls this."""
    findings = examine("versions", machine.versions, "install reformer_dist again")
    for name, examination in (
        ("devices", machine.devices),
        ("C compiler", machine.compilers),
        ("attention on the CPU", machine.native_attention),
        ("shared memory", machine.shared_memory),
        ("open files", machine.file_limits),
        ("disk", lambda: machine.disk(arguments.output)),
    ):
        findings += examine(name, examination, "see the message")
    if arguments.data is not None:
        findings += examine("data", lambda: data(arguments.data), "give --data the folder that holds dataset.json")
    if not runtime.is_rank():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        findings += examine("LSH attention", lambda: attention(device), "do not train here")
        return findings + examine("collectives", local_collectives, ADVICE)
    job = runtime.start()
    findings += examine("LSH attention", lambda: attention(job.device), "do not train here")
    findings += examine("collectives", lambda: job_collectives(job), ADVICE)
    return _of_all_ranks(job.gather(findings))


def data(folder: Path) -> Iterator[Finding]:
    """The data set opens, and every shard has the size that its index says."""
    try:
        corpus = open_corpus(DataConfig(path=str(folder)), ["train"])
    except UserError as error:
        yield failed("data", str(error), "write it again with tools/make_shards.py, or give the right path")
        return
    yield ok("data", f"{corpus.total('tokens', 'train'):,} training tokens in {folder}")


def _of_all_ranks(found: list[list[Finding]]) -> list[Finding]:
    """Rank 0's findings, and what is not well on others."""
    others = [
        Finding(f"rank {rank}, {finding.name}", finding.state, finding.words, finding.advice)
        for rank, findings in enumerate(found[1:], start=1)
        for finding in findings
        if finding.state is not State.ok
    ]
    return [*found[0], *others]


def report(findings: list[Finding], *, as_json: bool) -> str:
    n_bad = {state: sum(finding.state is state for finding in findings) for state in State}
    if as_json:
        counts = {state.value: n for state, n in n_bad.items()}
        return json.dumps({"findings": [finding.plain() for finding in findings], **counts}, indent=1)
    last = f"{n_bad[State.ok]} ok, {n_bad[State.warning]} warnings, {n_bad[State.failed]} failed"
    return "\n".join([*(finding.line() for finding in findings), last])


def _run() -> None:
    arguments = build_parser().parse_args()
    findings = examine_all(arguments)
    if runtime.env_rank() == 0:
        sys.stdout.write(report(findings, as_json=arguments.json) + "\n")
    if any(finding.state is State.failed for finding in findings):
        runtime.stop()
        sys.exit(1)


def main() -> None:
    run_command(_run)


if __name__ == "__main__":
    main()
