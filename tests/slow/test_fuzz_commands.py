"""Every command with mixed-up options, types, names and files: a documented status, and a message that says what.

REFORMER_FUZZ_CASES is the number of cases of each command; REFORMER_FUZZ_SEED gives others.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.damage import BYTES, become_a_folder, remove
from support.forks import fork_ranks
from support.launch import run_ranks
from support.tiny import flat, tiny_overrides, write_tiny_dataset

from reformer_dist.config import RunConfig
from reformer_dist.process.exit_status import FAILED, INTERRUPTED
from reformer_dist.run.compose import to_dict

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("REFORMER_FUZZ_CASES", "12"))
SEED = os.environ.get("REFORMER_FUZZ_SEED", "0")
BOUND = 90  # seconds of a command; what is asked takes about one
USAGE = 2  # of argparse
TOOLS = Path(__file__).resolve().parents[2] / "tools"
RUNNER = Path(__file__).with_name("in_folder.py")
KEYS = [key for key, _ in flat(to_dict(RunConfig())) if not key.startswith(("sweep.", "launcher."))]
# of no key or option; the numbers are valid for some
NONSENSE = (
    "",
    " ",
    "abc",
    "[]",
    "{}",
    "[1,2]",
    "{a: 1}",
    "nan",
    "'",
    '"',
    "a\nb",
    "é\u2028",
    "${x}",
    "${oc.env:HOME}",
)
NONSENSE += ("???", "1,,2", "=", "\udcff", "x" * 3000, "!!python/object:os.system", "~")
NUMBERS = (
    "-1",
    "0",
    "0.5",
    "-0.0",
    "1e999",
    "-inf",
    "null",
    "true",
    "1_0",
    "0x10",
    "99999999999999999999",
    "-2147483649",
)


@dataclass
class Case:
    """A command line, and what a message about its changes must name."""

    words: list[str]
    names: list[str] = field(default_factory=list)
    may_name_others: bool = False
    must_fail: bool = False


Change = Callable[[Case, Path, random.Random], None]


def odd_path(folder: Path, draw: random.Random) -> tuple[str, str]:
    """A path where there is nothing that a command reads, and the name of it in a message."""
    plain, empty = folder / "plain.txt", folder / "empty"
    plain.write_text("some text\n")
    (folder / "nothing").touch()
    (folder / "noise.bin").write_bytes(draw.randbytes(300))
    empty.mkdir(exist_ok=True)
    loop = folder / "loop"
    if not loop.is_symlink():
        loop.symlink_to(loop)
        (folder / "dangling").symlink_to(folder / "gone")
    paths = [folder / "missing", plain, folder / "nothing", folder / "noise.bin", empty, loop, folder / "dangling"]
    paths += [plain / "below", Path("/proc/self/mem"), Path("/proc/none/x"), folder / ("n" * 300)]
    chosen = draw.choice(paths)
    return str(chosen), chosen.name


def damage(case: Case, folder: Path, draw: random.Random) -> None:
    """Damages a file that the command reads."""
    inputs = [path for name in ("run", "data", "export") for path in (folder / name).rglob("*") if path.is_file()]
    path = draw.choice(sorted(inputs))
    if path.stat().st_size:
        draw.choice([*BYTES, remove, become_a_folder])(path, draw)
    case.may_name_others = True


def change_value(case: Case, folder: Path, draw: random.Random) -> None:
    places = [place for place, word in enumerate(case.words) if "=" in word]
    if not places:
        return
    place = draw.choice(places)
    key = case.words[place].partition("=")[0]
    value = draw.choice([*NONSENSE, *NUMBERS])
    case.words[place] = f"{key}={value}"
    case.names += [key.lstrip("-+").rpartition(".")[2], value.strip() or key]


def change_path(case: Case, folder: Path, draw: random.Random) -> None:
    places = [place for place, word in enumerate(case.words) if str(folder) in word]
    if places:
        place = draw.choice(places)
        path, name = odd_path(folder, draw)
        case.may_name_others |= name == "plain.txt"  # which is right for some
        before = case.words[place]
        case.words[place] = before[: before.index(str(folder))] + path
        case.names += [name, before.partition("=")[0].lstrip("-") if "=" in before else name]


def misspell(case: Case, folder: Path, draw: random.Random) -> None:
    places = [place for place, word in enumerate(case.words) if "=" in word or word.startswith("--")]
    if not places:
        return
    place = draw.choice(places)
    name, equals, value = case.words[place].partition("=")
    cut = draw.randrange(3, max(4, len(name)))
    wrong = name[:cut] + draw.choice("qzx_9") + name[cut:]
    case.words[place] = wrong + equals + value
    case.names += [name, wrong, wrong.rpartition(".")[2], wrong.partition(".")[0]]
    case.must_fail = True


def add_key(case: Case, folder: Path, draw: random.Random) -> None:
    """A key of the configuration with a value of any type."""
    key, value = draw.choice(KEYS), draw.choice([*NONSENSE, *NUMBERS])
    case.words.append(f"{draw.choice(['', '', '', '+', '++', '~'])}{key}={value}")
    case.names += [key.rpartition(".")[2], key.partition(".")[0], value.strip() or key]


def add_word(case: Case, folder: Path, draw: random.Random) -> None:
    word = draw.choice(
        ["--nonsense", "--", "-q", "nonsense", "a.b=1", "--help=1", "=", "+x", "@a=b", "--rows", "-"]
    )
    case.words.insert(draw.randrange(len(case.words) + 1), word)
    case.names += [word, word.partition("=")[0].strip("-+@"), "Key", "usage"]


def drop(case: Case, folder: Path, draw: random.Random) -> None:
    case.words.pop(draw.randrange(len(case.words)))
    case.may_name_others = True


def swap(case: Case, folder: Path, draw: random.Random) -> None:
    one, other = draw.randrange(len(case.words)), draw.randrange(len(case.words))
    case.words[one], case.words[other] = case.words[other], case.words[one]
    case.may_name_others = True


CHANGES: list[Change] = [change_value, change_path, misspell, add_word, drop, swap, damage]
# command: its target, and words of a call that ends well, with {run} and so on for copies of what it may change
TRAIN = "reformer_dist.train"
COMMANDS: dict[str, tuple[str, list[list[str]]]] = {
    "train": (
        TRAIN,
        [["{train}"], ["{train}", "--dry-run"], ["{train}", "--cfg=job"], ["{train}", "init_from={run}"]],
    ),
    "sweep": (
        TRAIN,
        [
            [
                "--multirun",
                "{train}",
                "model.n_hashes=1,2",
                "launcher=slurm",
                "launcher.nnodes=1",
                "launcher.array=2",
            ]
        ],
    ),
    "launch": (
        TRAIN,
        [
            ["{train}", "launcher=torchrun", "launcher.hosts=[a,b]", "launcher.nproc_per_node=1"],
            ["{train}", "launcher=slurm", "launcher.nnodes=1", "launcher.nproc_per_node=1", "launcher.time=1:00"],
            ["{train}", "launcher=job", "launcher.nproc_per_node=1", "launcher.image=a", "launcher.claim=b"],
        ],
    ),
    "evaluate": (
        "reformer_dist.evaluate",
        [
            ["{run}", "--rows=2", "--batch=2", "data.path={data}"],
            ["{run}", "--rows=2", "--rounds=1,2"],
            ["{run}", "--rows=1", "--coverage", "--output={out}.json"],
        ],
    ),
    "generate": (
        "reformer_dist.generate",
        [
            ["{run}", "--prompt=time", "--max-new-tokens=3", "--temperature=0.7", "--top-k=3", "--top-p=0.9"],
            ["{run}", "--prompt-file={text}", "--max-new-tokens=3", "--beams=2", "--length-penalty=1"],
            ["{export}", "--prompt=a", "--max-new-tokens=2", "--samples=2", "--seed=1", "--stop=x"],
        ],
    ),
    "predict": (
        "reformer_dist.predict",
        [
            ["{run}", "--text=time", "--batch=2"],
            ["{export}", "--lines={text}", "--output={out}.jsonl", "--top-k=2"],
        ],
    ),
    "runs": (
        "reformer_dist.runs",
        [
            ["ls", "{run}"],
            ["show", "{run}", "--json"],
        ],
    ),
    "convert": ("reformer_dist.convert", [["{run}", "{out}"], ["{export}", "{out}", "--tokenizer=bytes"]]),
    "checkpoints": (
        "reformer_dist.checkpoints",
        [
            ["ls", "{run}"],
            ["verify", "{run}"],
            ["diff", "{run}/checkpoints/step-00000003", "{run}/checkpoints/step-00000006"],
            ["prune", "{run}", "--keep=1", "--keep-every=2"],
            ["export", "{run}", "{out}", "--max-shard-size=1MB"],
        ],
    ),
    "doctor": ("reformer_dist.doctor", [["--data={data}", "--output={out}", "--json"]]),
    "make_shards": (
        str(TOOLS / "make_shards.py"),
        [
            ["{text}", "--output={out}", "--heldout=0.2", "--shard-mb=1"],
            ["{text}", "--output={out}", "--tokenizer=bpe", "--vocab-size=300"],
            ["{text}", "--output={out}", "--tokenizer-of={run}"],
        ],
    ),
    "inspect_shards": (
        str(TOOLS / "inspect_shards.py"),
        [["{data}", "--samples=1", "--verify"], ["{run}", "--order=2"]],
    ),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a run of 6 steps, its export and a text."""
    folder = tmp_path_factory.mktemp("originals")
    write_tiny_dataset(folder / "data")
    run_ranks(TRAIN, 1, tiny_overrides(folder / "data", folder / "run"), forked=True)
    run_ranks("reformer_dist.checkpoints", 1, ["export", folder / "run", folder / "export"], forked=True)
    (folder / "text.txt").write_text("\n\n".join(f"paragraph {number} " * 40 for number in range(30)))
    return folder


def prepare(template: list[str], folder: Path, originals: Path) -> list[str]:
    """The words of a call, for copies of the originals in a folder of its own."""
    shutil.copytree(originals, folder, symlinks=True)
    places = {name: str(folder / name) for name in ("run", "data", "export", "out")} | {
        "text": f"{folder}/text.txt"
    }
    words: list[str] = []
    for word in template:
        if word == "{train}":
            words += tiny_overrides(folder / "data", folder / "new", "trainer.max_steps=2", "trainer.save_every=2")
        else:
            words.append(word.format(**places))
    return words


def problem(case: Case, status: int, said: str, folder: Path) -> str:
    """What is wrong with the end of a command; empty if nothing is."""
    if "Traceback (most recent call last)" in said:
        return "traceback"
    if status not in (0, FAILED, USAGE, INTERRUPTED):
        return f"status {status}"
    if status == 0:
        return "silent acceptance" if case.must_fail else ""
    errors = [
        line for line in said.splitlines() if re.search(r"\berror: |^usage: |^failed |\"state\": \"failed\"", line)
    ]
    if not errors:
        return "no message"
    plain = said.replace(str(folder), "").lower()
    names = [name.lower() for name in case.names if name]
    is_named = any(name in plain or repr(name)[1:-1] in plain for name in names)
    return "" if is_named or case.may_name_others else "names nothing"


@pytest.mark.parametrize("command", COMMANDS)
def test_mixed_up_calls_end_with_a_message(command: str, originals: Path, tmp_path: Path) -> None:
    target, templates = COMMANDS[command]
    found = []
    n_cases = max(1, CASES // 8) if command == "doctor" else CASES  # which starts ranks to try collectives
    for number in range(n_cases):
        draw = random.Random(f"{SEED} {command} {number}")
        folder = tmp_path / f"{number}"
        case = Case(prepare(draw.choice(templates), folder, originals))
        # transformers can't express this model, which predicts next tokens only: that is found first
        case.may_name_others = command in ("convert", "predict")
        has_keys = target == TRAIN or command in ("evaluate", "generate")
        changes = [
            draw.choice([*CHANGES, *([add_key] * 4 if has_keys else [])]) for _ in range(draw.choice([1, 1, 2]))
        ]
        for change in changes:
            change(case, folder, draw)
        try:
            status, said = fork_ranks(RUNNER, 1, [str(folder), target, *case.words], BOUND, {})
            wrong = problem(case, status, said, folder)
        except AssertionError as hang:
            wrong, said = "hangs", str(hang)
        if wrong:
            names = ", ".join(change.__name__ for change in changes)
            (tmp_path / f"case{number}.txt").write_text(
                f"{shlex.join([target, *case.words])}\n{said}", errors="replace"
            )
            found.append(f"{wrong}: case {number} ({names}), {case.names}\n{said[-1500:]}")
        shutil.rmtree(folder)
    assert not found, f"{len(found)} of {n_cases}:\n" + "\n\n".join(found)
