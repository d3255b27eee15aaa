"""Recipes of real sizes: each is planned on every change, and its tiny twin trains, resumes and is evaluated."""

from __future__ import annotations

import gzip
import json
import random
import re
import runpy
import shlex
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api import models
from support.launch import run_ranks
from support.tiny import WORDS

from reformer_dist.config import RunConfig, TaskKind
from reformer_dist.launch.render import render
from reformer_dist.run.compose import compose_run
from reformer_dist.run.dry_run import count_ranks

ROOT = Path(__file__).parents[2]
IN_FOLDER = ROOT / "tests" / "slow" / "in_folder.py"
TOOL = runpy.run_path(str(ROOT / "tools" / "recipes.py"))
RECIPES = {recipe.name: recipe for recipe in TOOL["read_recipes"]()}
ROOM = 0.9
"""Of the card, for what is not planned: the CUDA context, and holes of the allocator."""


def header(name: str) -> list[str]:
    """The commands in the header of a recipe."""
    lines = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().splitlines()
    return [line.removeprefix("#   ") for line in lines if line.startswith("#   ")]


@cache
def recipe_config(name: str) -> RunConfig:
    return compose_run([f"experiment={name}"])


def test_all_recipes_are_known() -> None:
    assert {"enwik8", "books", "code_repositories", "genome_131k", "genome_1m", "long_8b"} <= RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_fits_the_card_and_is_that_of_the_page(name: str) -> None:
    recipe = RECIPES[name]
    plans = recipe.plans()
    assert max(plan.total for _, plan in plans) < ROOM * recipe.card_bytes
    page = TOOL["PAGE"].read_text()
    assert TOOL["row"](recipe, plans) in page.splitlines(), "python tools/recipes.py --write"
    assert page.count(f"| [`{name}`]") == 1


@pytest.mark.parametrize("name", RECIPES)
def test_its_header_names_the_command_that_starts_it(name: str) -> None:
    commands = header(name)
    launcher = recipe_config(name).launcher.kind.name
    assert f"reformer-train experiment={name}{' | sbatch' if launcher == 'slurm' else ''}" in commands
    subprocess.run(["bash", "-n"], input="\n".join(commands), text=True, check=True)


@pytest.mark.parametrize("name", ["books", "code_repositories"])
def test_launch_files_are_rendered_from_it(name: str) -> None:
    nodes = f"launcher.nnodes={recipe_config(name).launcher.n_nodes}"
    pod = [nodes, "launcher.image=i", "launcher.claim=c"]
    for kind, model, words in (
        ("slurm", None, [nodes]),
        ("jobset", models.JobsetV1alpha2JobSet, pod),
        ("trainjob", models.TrainerV1alpha1TrainJob, pod),
    ):
        given = [f"experiment={name}", f"launcher={kind}", *words]
        config = compose_run(given)
        assert count_ranks(config)[1] == count_ranks(recipe_config(name))[1]
        text = render(config, given)
        assert f"experiment={name}" in text
        if model is None:
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        else:
            tree = yaml.safe_load(text)
            assert model.from_dict(tree).to_dict() == tree


def test_genome_1m_begins_as_genome_131k_ends() -> None:
    """So that it can take up its run: the same model, rows and rates, on other ranks."""
    short, long = recipe_config("genome_131k"), recipe_config("genome_1m")
    keys = ("data.seq_len", "data.batch_size", "model.n_buckets")
    ends = [stage["until"] for stage in short.stages] + [short.trainer.max_steps]
    values = [[stage[key] for key in keys] for stage in short.stages]
    values.append([short.data.seq_len, short.data.batch_size, short.model.n_buckets])
    assert [stage["until"] for stage in long.stages] == ends
    assert [[stage[key] for key in keys] for stage in long.stages] == values
    assert (short.optim.lr, short.optim.schedule, short.optim.warmup_steps) == (
        long.optim.lr,
        long.optim.schedule,
        long.optim.warmup_steps,
    )
    assert short.optim.decay_from is None and (long.optim.decay_from or 0) > ends[-1]


# ---- tiny twins

SIZES = {
    "model.dim": 32,
    "model.n_layers": 2,
    "model.n_heads": 2,
    "model.head_dim": None,
    "model.ff_dim": None,
    "model.n_buckets": 4,
    "model.window": 8,
    "model.local_window": 8,
    "model.next_value_heads": 1,
    "data.seq_len": 64,
    "data.batch_size": 4,
    "data.eval_rows": 4,
    "trainer.micro_batch_size": 2,
    "trainer.eval_every": 2,
    "trainer.save_every": 2,
    "optim.warmup_steps": 1,
    "optim.accept_jump": True,
}


def tiny_sizes(name: str) -> list[str]:
    """Overrides that make a recipe tiny: its sizes and lengths, and nothing else."""
    config = recipe_config(name)
    sizes: dict[str, Any] = dict(SIZES)
    if config.model.ff_chunk:
        sizes["model.ff_chunk"] = 16
    if config.parallel.sequence > 1:
        sizes["parallel.sequence"] = 2
    if config.optim.decay_from:
        sizes["optim.decay_from"] = 3
    if config.task.kind is TaskKind.sequence_to_sequence:
        sizes |= {"model.n_encoder_layers": 2, "task.max_source_len": 96, "task.beams": 2}
    stages = ",".join(
        f"{{until:{number},data.seq_len:{8 * 2**number},data.batch_size:4,model.n_buckets:2,"
        "trainer.micro_batch_size:2}"
        for number in range(1, len(config.stages) + 1)
    )
    words = [f"{key}={'null' if value is None else value}" for key, value in sizes.items()]
    return [*words, f"stages=[{stages}]"]


def text(draw: random.Random, n_words: int = 120) -> str:
    return " ".join(draw.choices(WORDS, k=n_words)) + "\n"


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def raw_enwik8(folder: Path, draw: random.Random) -> None:
    for split in ("train", "valid"):
        write(folder / f"enwik8.{split}", text(draw, 1000))


def raw_books(folder: Path, draw: random.Random) -> None:
    for number in range(20):
        write(folder / f"pg19/{'validation' if number < 4 else 'train'}/{number}.txt", text(draw))


def raw_repositories(folder: Path, draw: random.Random) -> None:
    for number in range(60):
        write(folder / f"repos/r{number}/package/part.py", f'"""{text(draw)}"""\n')
        write(folder / f"repos/r{number}/main.py", f"from package import part\n\n# {text(draw, 20)}")


def raw_genomes(folder: Path, draw: random.Random) -> None:
    lines = [f">chr{number}\n{''.join(draw.choices('ACGTacgt', k=3000))}\n" for number in (1, 8, 14)]
    write(folder / "hg38.fa.gz", gzip.compress("".join(lines).encode()))


def raw_pairs(folder: Path, draw: random.Random) -> None:
    for name, n_rows in (("train", 24), ("validation", 6)):
        rows = [
            {key: text(draw, 12) for key in ("document", "summary", "source", "answer")} for _ in range(n_rows)
        ]
        write(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def raw_tables(folder: Path, draw: random.Random) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tokenizers = pytest.importorskip("tokenizers")
    texts = [text(draw) for _ in range(40)]
    (folder / "corpus").mkdir()
    parquet.write_table(arrow.table({"text": texts}), folder / "corpus/part.parquet")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))


def raw_files(folder: Path, draw: random.Random) -> None:
    for number in range(40):
        write(folder / f"files/{number}.bin", draw.randbytes(300))


RAW: dict[str, Callable[[Path, random.Random], None]] = {
    "enwik8": raw_enwik8,
    "books": raw_books,
    "code_repositories": raw_repositories,
    "genome_131k": raw_genomes,
    "genome_1m": raw_genomes,
    "long_summarisation": raw_pairs,
    "long_answers": raw_pairs,
    "long_8b": raw_tables,
    "bytes_5m": raw_files,
}


def prepare(name: str, folder: Path) -> None:
    """Runs the data command of the header on raw files of its form."""
    RAW[name](folder, random.Random(0))
    source = "genome_131k" if name == "genome_1m" else name
    (command,) = [command for command in header(source) if command.startswith("reformer-shards ")]
    words = shlex.split(re.sub(r"--vocab-size \d+", "--vocab-size 300", command))[1:]
    expanded = [
        each for word in words for each in (sorted(map(str, folder.glob(word))) if "*" in word else [word])
    ]
    run_ranks(IN_FOLDER, 1, [folder, "reformer_dist.shards", *expanded, "--workers", "1"], forked=True)


def train(name: str, folder: Path, *words: str) -> str:
    n_ranks = 2 if count_ranks(recipe_config(name))[1] > 1 else 1
    given = [folder, "reformer_dist.train", f"experiment={name}", *tiny_sizes(name), *words]
    return run_ranks(IN_FOLDER, n_ranks, given, forked=True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "enwik8" else pytest.mark.slow) for name in RECIPES]
)
def test_a_tiny_twin_trains_resumes_and_evaluates(name: str, tmp_path: Path) -> None:
    prepare(name, tmp_path)
    first, taken_up = name, []
    if name == "genome_1m":
        first, taken_up = "genome_131k", ["resume=outputs/genome_131k/checkpoints/step-00000002"]
    assert "step 2/2" in train(first, tmp_path, "trainer.max_steps=2", "trainer.log_every=1")
    resumed = train(name, tmp_path, "trainer.max_steps=4", "trainer.log_every=1", *taken_up)
    assert "step 4/4" in resumed and "step 2/4" not in resumed
    output_dir = recipe_config(name).output_dir
    words = [tmp_path, "reformer_dist.evaluate", output_dir, "--rows", "2", "--output", tmp_path / "result.json"]
    run_ranks(IN_FOLDER, 1, words, forked=True)
    assert 0 < json.loads((tmp_path / "result.json").read_text())["loss"] < 10
