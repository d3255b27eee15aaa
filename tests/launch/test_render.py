"""Scripts and manifests from the configuration: launch/ has those of the defaults; shell and schemas judge."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api import models

from reformer_dist.config import LauncherConfig, LauncherKind, RunConfig
from reformer_dist.errors import ConfigError
from reformer_dist.launch.render import render, render_sweep
from reformer_dist.run.command_line import conf_folder
from reformer_dist.run.compose import compose_run

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
FILES = sorted(path for path in LAUNCH.iterdir() if path.name != "Dockerfile")
SCRIPTS = [path for path in FILES if path.suffix != ".yaml"]
KINDS = {
    "Job": models.IoK8sApiBatchV1Job,
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}


BATCH = "data.batch_size=8"  # a row for each rank of the examples


def configured(*overrides: str) -> RunConfig:
    return compose_run([BATCH, *overrides])


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
    assert path.read_text() == rendered(f"launcher={path.stem}", "experiment=quickstart", BATCH)


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
    overrides = (odd, "launcher.nproc_per_node=2", "trainer.max_steps=7")
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


PRINTING = [kind for kind in LauncherKind if kind not in (LauncherKind.none, LauncherKind.local)]
# another value of each key than the default
CHANGES: dict[str, Any] = {
    "nproc_per_node": 2,
    "nnodes": 8,
    "hosts": ["gpu[07-09]"],
    "min_nodes": 1,
    "max_restarts": 9,
    "grace": 77,
    "name": "mine",
    "gpus_per_node": 0,
    "cpus_per_rank": 3,
    "time": "7",
    "sbatch": ["--partition=p"],
    "array": 3,
    "image": "other:1",
    "claim": "other",
}


@functools.cache
def default_of(kind: LauncherKind) -> RunConfig:
    return configured(f"launcher={kind.name}", "data.batch_size=96")


@pytest.mark.parametrize("key", [option.name for option in fields(LauncherConfig) if option.name != "kind"])
@pytest.mark.parametrize("kind", PRINTING, ids=lambda kind: kind.name)
def test_every_key_reaches_what_is_printed_or_is_refused(kind: LauncherKind, key: str) -> None:
    config = default_of(kind)
    before = render(config, [])
    try:
        changed = replace(config.launcher, **{key: CHANGES[key]})
        assert render(replace(config, launcher=changed), []) != before
    except ConfigError as refusal:
        assert str(refusal).startswith(f"launcher.{key}="), refusal


@pytest.mark.parametrize("kind", [LauncherKind.none, LauncherKind.local])
def test_launchers_that_print_nothing_refuse_what_they_do_not_read(kind: LauncherKind) -> None:
    for key in ("hosts", "array", "time", "sbatch"):
        with pytest.raises(ConfigError, match=rf"^launcher\.{key}="):
            LauncherConfig(kind=kind, **{key: CHANGES[key]}).refuse_unused_keys()


def test_hosts_may_be_ranges() -> None:
    launcher = LauncherConfig(kind=LauncherKind.torchrun, hosts=["a", "n[08-10,3].x", "r[1-2]c[1-2]"])
    expanded = ["a", "n08.x", "n09.x", "n10.x", "n3.x", "r1c1", "r1c2", "r2c1", "r2c2"]
    assert launcher.host_names == expanded and launcher.n_nodes == 9
    script = rendered("launcher=deepspeed", 'launcher.hosts=["n[1-2]"]')
    assert "n1 slots=4\nn2 slots=4\n" in script and "--master_addr n1 " in script
    script = rendered("launcher=torchrun", 'launcher.hosts=["n[1-8]"]', "launcher.nnodes=8", "data.batch_size=32")
    assert "--nnodes=8 " in script and "--rdzv-endpoint=n1:29400 " in script


@pytest.mark.parametrize(
    "host", ["", "a b", "-a", "a;b", "n[1-", "n1]", "n[]", "n[2-1]", "n[x]", "n[1-2][", "n[1-999999999]", "a\n"]
)
def test_hosts_that_are_none(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^launcher\.hosts="):
        LauncherConfig(kind=LauncherKind.torchrun, hosts=[host])


def test_each_machine_is_named_once() -> None:
    with pytest.raises(ConfigError, match=r"^launcher\.hosts=.*n2"):
        LauncherConfig(kind=LauncherKind.deepspeed, hosts=["n[1-3]", "n2"])


@pytest.mark.parametrize("kind", PRINTING, ids=lambda kind: kind.name)
def test_a_line_break_in_an_argument_does_not_end_the_comment(kind: LauncherKind) -> None:
    """The shell would run what follows it."""
    printed = render(default_of(kind), ["output_dir=a\nb"])
    [comment] = [line for line in printed.splitlines() if "Written by" in line]
    assert comment.endswith("'output_dir=a\\nb'")


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
    (("launcher=torchrun", "launcher.nnodes=8"), ["launcher.nnodes=8", "node1", "node[1-8]"]),
    (("launcher=deepspeed", "launcher.nnodes=1"), ["launcher.nnodes=1", "2"]),
    (("launcher=slurm", "launcher.name='a b'"), ["launcher.name='a b'"]),
    (("launcher=torchrun", "launcher.name='a;b'"), ["launcher.name='a;b'"]),
    (("launcher=job", "launcher.name=Mine"), ["launcher.name='Mine'"]),
    (("launcher=job", "launcher.image='a b'"), ["launcher.image='a b'"]),
    (("launcher=job", "launcher.claim=''"), ["launcher.claim=''"]),
    (("launcher=slurm", "launcher.time='1 day'"), ["launcher.time='1 day'", "24:00:00"]),
    *(
        (("launcher=slurm", f"launcher.sbatch=['{option}']"), [f"launcher.sbatch={option}", *words])
        for option, *words in (
            ("--nodes=3", "launcher.nnodes"),
            ("-N3", "launcher.nnodes"),
            ("--time 3", "launcher.time"),
            ("--signal=B:USR1@60", "shell"),
            ("--signal=KILL@60", "USR1"),
        )
    ),
    (("launcher=slurm", "launcher.sbatch=['rm x']"), ["launcher.sbatch='rm x'", "--partition"]),
    (("launcher=local", "launcher.max_restarts=-1"), ["launcher.max_restarts=-1"]),
    (("launcher=local", "launcher.nproc_per_node=0"), ["launcher.nproc_per_node=0"]),
]


@pytest.mark.parametrize(("overrides", "words"), BAD, ids=[overrides[-1] for overrides, _ in BAD])
def test_what_could_not_run_is_refused(overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        rendered(*overrides)
    assert all(word in str(caught.value) for word in words), caught.value
