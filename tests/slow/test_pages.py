"""Every command that README.md and docs/ print is run as it is printed, or named here with what keeps it from it.

A page is run from top to bottom in a copy of the checkout where the quickstart has been (cut short). A new page
and a new block on an old one are found without a word here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.launch import BIN
from support.pages import PAGES, ROOT, Block, blocks, hidden_commands, inline_commands

SMALL = "takes minutes or a GPU to be worth reading; run small by "
FULL = "takes hours, or data of the reader's own; docs/commands.md runs a short version"
# commands as printed (without comments; of a program in Python, its first line), and why they are not run here
NOT_RUN = {
    "pip install -e .": "changes the environment; these tests run in one made by it",
    "pip wheel -c constraints.txt --wheel-dir wheels '.[sweep,tasks]'": "downloads gigabytes; tried by hand",
    "pip install --no-index --find-links wheels 'reformer_dist[sweep,tasks]'": "changes the environment",
    "make quickstart": "makes an environment; what it calls, tools/quickstart.py, has run before each page",
    "make test": "runs these tests; .ci/run does",
    "tensorboard --logdir outputs": "serves until it is stopped",
    "reformer-serve outputs/quickstart --port 8000": "serves until it is stopped; tests/serving starts others",
    'curl http://127.0.0.1:8000/v1/completions -H "content-type: application/json" \\': "needs that server",
    "python tools/bench_attention.py": SMALL + "tests/tools/test_bench_tools.py",
    "python tools/bench_step.py --impl ours reformer_pytorch": SMALL + "tests/tools/test_bench_tools.py",
    "python tools/bench_decode.py": SMALL + "tests/tools/test_bench_tools.py",
    "python tools/bench_memory.py": SMALL + "tests/tools/test_bench_tools.py",
    "python tools/bench_exchange.py": SMALL + "tests/tools/test_exchange_bench.py",
    "python tools/bench_sequence_memory.py": SMALL + "tests/tools/test_exchange_bench.py",
    "python tools/bench_resume.py": "fails by times, which need an idle machine; run small by "
    + "tests/tools/test_bench_resume.py",
    "python tools/gpu_report.py": SMALL + "tests/tools/test_gpu_report.py",
    "python tools/chaos.py": "takes half an hour; tests/tools/test_chaos.py runs fewer rounds",
    "reformer-train experiment=translation data.path=data/en-de": "needs parallel text of the reader's own",
    "reformer-evaluate outputs/translation": "needs that run",
    'reformer-generate outputs/translation --prompt "A dog runs." --temperature 0': "needs that run",
    "reformer-evaluate outputs/duplication --rounds 1,2,4,8": "needs the run of an application below",
    "python tools/application.py duplication": FULL,
    "python tools/application.py classification": FULL,
    "python tools/application.py summarisation": FULL,
    "python tools/application.py translation --train train.en train.de --heldout test.en test.de": FULL,
    "python tools/application.py question_answering --train train.json --heldout dev.json": FULL,
    "python tools/application.py mqar": SMALL + "tests/tools/test_applications.py and test_evidence.py",
    "python tools/application.py joint_recall": SMALL + "tests/tools/test_evidence.py",
    "python tools/bench_serving.py --rows 1x1024 8x1024 1x100000 --tokens 64": SMALL
    + "tests/serving/test_bench_serving.py",
    "python tools/evidence.py small_recall": "takes minutes; tests/tools/test_evidence.py runs another row",
    "python tools/evidence.py text": "takes hours; tests/tools/test_evidence.py runs another row",
    "python tools/kernel_costs.py": "takes a minute; tests/kernels/test_compile.py runs it for one target",
    "python tools/kernel_costs.py [--json]": "names an option",
    "python tools/evidence.py duplication": "takes minutes; tests/tools/test_evidence.py runs another row",
    "python tools/bench_attention.py --impl ours own_keys": "takes minutes; "
    + "tests/tools/test_bench_tools.py runs another row",
    "reformer-shards dialogs.jsonl --label-spans spans --output data/dialogs": "needs a file of the "
    + "reader's own",
    "reformer-train task.kind=completion data.path=data/dialogs data.seq_len=1024": "needs that dataset",
    "reformer-shards shards/*.tar --in-place --member json --text-field body --output data/corpus": "needs files "
    + "of the reader's own; run by tests/data/test_in_place.py",
    "reformer-train experiment=genome": SMALL + "tests/tools/test_genome.py",
    "reformer-evaluate outputs/genome": "needs that run",
    "reformer-evaluate outputs/genome data.strand=reverse": "needs that run",
    "reformer-train experiment=genome_1m resume=outputs/genome_131k/checkpoints/step-00006000": "needs that run; "
    + "run small by tests/tools/test_recipes.py",
    "reformer-convert reformer-enwik8 outputs/enwik8": "needs google/reformer-enwik8, fetched by the reader",
    'reformer-generate outputs/enwik8 --prompt "In 1965, Brooks left IBM"': "needs that model",
    "python tools/check_plan.py": "takes minutes; run by tests/tools/test_check_plan.py",
}
COPIED = ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "conf", "docs", "launch", "tools")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, with data and a run of the quickstart."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    said = run("python tools/quickstart.py trainer.max_steps=10", folder)
    for words in ("held-out bits per byte", "order-0 entropy", "gzip", "continue", "TensorBoard", "def "):
        assert words in said
    return folder


def run(command: str, folder: Path) -> str:
    """All that it printed; fails with it where the command does."""
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}"
    return done.stdout


def run_block(block: Block, folder: Path) -> None:
    for command in block.commands:
        if name_of(command) in NOT_RUN:
            continue
        if block.language == "python":
            with (folder / "example.py").open("a") as program:  # it goes on from those above it on the page
                program.write(command)
            run("python example.py", folder)
            continue
        said = run(command, folder)
        first = command.splitlines()[0]
        written = re.search(r" > (\S+)(?: << '\w+')?$", first) or re.match(r"mkdir -p (\S+)$", first)
        assert said or (written and (folder / written[1]).stat().st_size), (
            f"{block}: {command}: nothing came of it"
        )


def name_of(command: str) -> str:
    return command.splitlines()[0].split("  #")[0].strip()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_commands_of_a_page_run_as_printed(page: str, quickstart: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(quickstart, folder)
    for block in blocks(page):
        run_block(block, folder)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_running_text_are_named(page: str) -> None:
    """They are tools that take long, each with a test of its own."""
    known = NOT_RUN.keys() | {name_of(command) for block in blocks(page) for command in block.commands}
    unknown = set(inline_commands(page)) - known
    assert not unknown, f"{page}: run them in a ```bash block, or name them in NOT_RUN"


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_bash_blocks(page: str) -> None:
    assert not hidden_commands(page)


def test_what_is_not_run_is_printed_somewhere() -> None:
    printed = {name_of(command) for page in PAGES for block in blocks(page) for command in block.commands}
    printed |= {command for page in PAGES for command in inline_commands(page)}
    assert not NOT_RUN.keys() - printed
