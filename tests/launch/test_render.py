"""Scripts and manifests from the configuration: launch/ has those of the defaults; shell and schemas judge."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from kubeflow_trainer_api import models

from reformer_dist.config import RunConfig
from reformer_dist.errors import ConfigError
from reformer_dist.launch.render import render, render_sweep
from reformer_dist.run.compose import conf_folder, register_schema, to_run_config

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
FILES = sorted(LAUNCH.iterdir())
SCRIPTS = [path for path in FILES if path.suffix != ".yaml"]
KINDS = {
    "Job": models.IoK8sApiBatchV1Job,
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}


def configured(*overrides: str) -> RunConfig:
    register_schema()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return to_run_config(compose("train", list(overrides)))


def rendered(*overrides: str) -> str:
    return render(configured(*overrides), overrides)


def manifest(*overrides: str) -> dict[str, Any]:
    return yaml.safe_load(rendered(*overrides))


def judge(script: str) -> None:
    """By bash, and by shellcheck where there is one."""
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-"], input=script, text=True, check=True)


def test_every_launcher_that_prints_has_its_file() -> None:
    printing = {path.stem for path in (conf_folder() / "launcher").iterdir()} - {"none", "local"}
    assert {path.stem for path in FILES} == printing


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_what_the_defaults_give(path: Path) -> None:
    assert path.read_text() == rendered(f"launcher={path.stem}", "experiment=quickstart")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_please_shellcheck(path: Path) -> None:
    subprocess.run(["shellcheck", path], check=True)


@pytest.mark.parametrize(
    "overrides",
    [
        ("launcher=job",),
        ("launcher=job", "launcher.gpus_per_node=0", "launcher.nproc_per_node=1"),
        ("launcher=jobset", "launcher.nnodes=4", "data.batch_size=16"),
        ("launcher=trainjob", "output_dir='with space'", "launcher.gpus_per_node=0"),
    ],
    ids=" ".join,
)
def test_manifests_obey_their_schemas(overrides: tuple[str, ...]) -> None:
    """By the classes that Kubeflow publishes, made from the schemas: a key they do not know would get lost."""
    tree = manifest(*overrides)
    model = KINDS[tree["kind"]].from_dict(tree)
    assert model is not None and model.to_dict() == tree


def test_schemas_refuse_what_is_wrong() -> None:
    tree = manifest("launcher=trainjob")
    model = KINDS["TrainJob"]
    for key, value in (("numNodes", "two"), ("nodes", 2)):
        wrong = {**tree, "spec": {**tree["spec"], "trainer": {**tree["spec"]["trainer"], key: value}}}
        try:
            assert model.from_dict(wrong).to_dict() != wrong
        except ValueError as error:  # pydantic's
            assert key in str(error)


def test_arguments_are_quoted_and_those_of_the_launcher_left_out() -> None:
    odd = "output_dir='a b; c'"
    overrides = (odd, "launcher.gpus_per_node=0", "launcher.nproc_per_node=2", "trainer.max_steps=7")
    for kind in ("torchrun", "deepspeed", "slurm"):
        script = rendered(f"launcher={kind}", *overrides)
        judge(script)
        code = [line for line in script.splitlines() if not line.startswith("#")]
        assert shlex.quote(odd) in "\n".join(code) and "launcher" not in "\n".join(code)
    command = manifest("launcher=job", *overrides)["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command == ["reformer-train", "launcher=local", "launcher.nproc_per_node=2", odd, "trainer.max_steps=7"]
    words = manifest("launcher=trainjob", *overrides)["spec"]["trainer"]["command"][-1]
    assert odd in shlex.split(words)


def test_numbers_reach_the_files() -> None:
    slurm = rendered(
        "launcher=slurm",
        "launcher.nnodes=1",
        "launcher.nproc_per_node=2",
        "launcher.gpus_per_node=0",
        "launcher.cpus_per_rank=3",
        "launcher.time=1:00:00",
        "launcher.grace=30",
        "launcher.name=mine",
        'launcher.sbatch=["--partition=p","--account=a"]',
    )
    options = [line.removeprefix("#SBATCH ") for line in slurm.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        "--job-name=mine",
        "--nodes=1",
        "--ntasks-per-node=2",
        "--cpus-per-task=3",
        "--time=1:00:00",
        "--output=%x-%j.out",
        "--open-mode=append",
        "--requeue",
        "--signal=TERM@30",
        "--partition=p",
        "--account=a",
    ]
    torchrun = rendered(
        "launcher=torchrun", "launcher.hosts=[a,b]", "launcher.min_nodes=1", "launcher.max_restarts=5"
    )
    for words in ("--nnodes=1:2 ", "--rdzv-endpoint=a:29400 ", "--max-restarts=5 "):
        assert words in torchrun


SWEEP = ("--multirun", "model.n_hashes=2,4", "output_dir='a b'")


def swept(*overrides: str) -> str:
    return render_sweep(configured(*overrides).launcher, [*SWEEP, *overrides])


def test_the_tasks_of_an_array_share_a_sweep() -> None:
    script = swept("launcher=slurm", "launcher.nnodes=1", "launcher.array=3", "launcher.cpus_per_rank=2")
    judge(script)
    for option in ("--array=0-2", "--output=%x-%A_%a.out", "--ntasks-per-node=1", "--cpus-per-task=8"):
        assert f"#SBATCH {option}\n" in script
    # what the task would start, said instead of done
    start, end = script.index("status=0"), script.index("|| status=$?")
    shell = "srun() { shift; printf '%s\\0' \"$@\"; }\n" + script[start:end]
    place = {"SLURM_CPUS_PER_TASK": "8", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3"}
    done = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, check=True, env=os.environ | place
    )
    local = ["launcher=local", "launcher.nproc_per_node=4", "sweep.shard=1/3"]
    assert done.stdout.split("\0")[:-1] == ["reformer-train", *SWEEP, *local]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("launcher=slurm", "launcher.nnodes=1"), ["launcher.array=0", "tasks"]),
        (("launcher=slurm", "launcher.array=2"), ["launcher.nnodes=2", "1"]),
        (("launcher=jobset", "launcher.array=2"), ["launcher=jobset", "launcher=slurm"]),
    ],
)
def test_sweeps_that_no_array_can_share_are_refused(overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        swept(*overrides)
    assert all(word in str(caught.value) for word in words), caught.value


BAD = [
    (("launcher=slurm", "launcher.nnodes=3"), ["data.batch_size=8", "12"]),
    (("launcher=slurm", "launcher.nproc_per_node=null"), ["launcher.nproc_per_node=null"]),
    (("launcher=slurm", "launcher.array=2"), ["launcher.array=2", "--multirun"]),
    (("launcher=job", "launcher.nnodes=2"), ["launcher.nnodes=2", "launcher=job"]),
    (("launcher=local", "launcher.nnodes=2"), ["launcher.nnodes=2", "launcher=local"]),
    (("launcher=torchrun", "launcher.hosts=[]"), ["launcher.hosts=[]", "node1"]),
    (("launcher=torchrun", "launcher.min_nodes=3"), ["launcher.min_nodes=3", "2"]),
    (("launcher=local", "launcher.max_restarts=-1"), ["launcher.max_restarts=-1"]),
    (("launcher=local", "launcher.nproc_per_node=0"), ["launcher.nproc_per_node=0"]),
]


@pytest.mark.parametrize(("overrides", "words"), BAD, ids=[overrides[-1] for overrides, _ in BAD])
def test_what_could_not_run_is_refused(overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        rendered(*overrides)
    assert all(word in str(caught.value) for word in words), caught.value
