"""Shell scripts that start a job: torchrun, DeepSpeed over ssh, SLURM."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from reformer_dist.config import LauncherConfig

MODULE = "reformer_dist.train"
PREEMPTED = 75  # what ranks end with that saved because they were told to end
PORT = 29400


def torchrun(launcher: LauncherConfig, arguments: Sequence[str], source: str) -> str:
    nodes, ranks = launcher.n_nodes, launcher.nproc_per_node
    nnodes = f"{launcher.min_nodes}:{nodes}" if launcher.min_nodes else f"{nodes}"
    options = torchrun_options(launcher, nnodes, launcher.hosts[0])
    return f"""#!/usr/bin/env bash
# {source}
#
# Run it on each of {", ".join(launcher.hosts)}, at about the same time, in a folder that all of them share.
# They meet at {launcher.hosts[0]}. After a rank was lost, all start again from the last checkpoint.
set -euo pipefail

cores=$(nproc)
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$((cores > {ranks} ? cores / {ranks} : 1))}}"
# how long ranks that are told to end may take to save
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={launcher.grace}

exec {_lines(["torchrun", *options, f"-m {MODULE}"], [*map(shlex.quote, arguments)])}
"""


def torchrun_options(launcher: LauncherConfig, nnodes: str, meeting_place: str) -> list[str]:
    return [
        f"--nnodes={nnodes}",
        f"--nproc-per-node={launcher.nproc_per_node}",
        f"--max-restarts={launcher.max_restarts}",
        f"--rdzv-id={launcher.name}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meeting_place}:{PORT}",
    ]


def deepspeed(launcher: LauncherConfig, arguments: Sequence[str], source: str) -> str:
    ranks = launcher.nproc_per_node
    slots = "\n".join(f"{host} slots={ranks}" for host in launcher.hosts)
    command = [
        "deepspeed",
        "--no_local_rank",
        "--force_multi",
        '--hostfile "$folder/hostfile"',
        f"--master_addr {launcher.hosts[0]}",
        f"--module {MODULE}",
    ]
    return f"""#!/usr/bin/env bash
# {source}
#
# Run it on {launcher.hosts[0]}, in a folder that all machines share. It starts the ranks over ssh, which must ask
# for no password, and needs pdsh. Nothing starts them again when one is lost: torchrun does that.
set -euo pipefail

cores=$(nproc)
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT

cat > "$folder/hostfile" << 'END'
{slots}
END
# what the ranks see of this shell's environment, beside variables of NCCL and Python
cat > "$folder/environment" << END
PATH=$PATH
OMP_NUM_THREADS=${{OMP_NUM_THREADS:-$((cores > {ranks} ? cores / {ranks} : 1))}}
END
export DS_ENV_FILE="$folder/environment"

{_lines(command, [*map(shlex.quote, arguments)])}
"""


def slurm(
    launcher: LauncherConfig, arguments: Sequence[str], source: str, trials: Sequence[Sequence[str]] = ()
) -> str:
    """trials: the further arguments of each task of a job array."""
    gpus = launcher.nproc_per_node if launcher.gpus_per_node is None else launcher.gpus_per_node
    options = [
        f"--job-name={launcher.name}",
        f"--nodes={launcher.n_nodes}",
        f"--ntasks-per-node={launcher.nproc_per_node}",
        f"--cpus-per-task={launcher.cpus_per_rank}",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        f"--time={launcher.time}",
        f"--output={'%x-%A_%a' if trials else '%x-%j'}.out",
        "--open-mode=append",
        "--requeue",
        f"--signal=TERM@{launcher.grace}",
        *([f"--array=0-{len(trials) - 1}"] if trials else []),
        *launcher.sbatch,
    ]
    header = "\n".join(f"#SBATCH {option}" for option in options)
    command = _lines(["rank"], [*map(shlex.quote, arguments), *(['"${trial[@]}"'] if trials else [])])
    return f"""#!/usr/bin/env bash
# {source}
{header}
#
# Each task of SLURM is a rank. Ranks that get SIGTERM, when the job is preempted or its time is nearly up, save
# and end with status {PREEMPTED}; the job then goes back to the queue, and later on from that checkpoint.
set -euo pipefail
trap : TERM # this shell stays to see how the ranks end

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}}"
{_cases(trials)}
status=0
# shellcheck disable=SC2016 # each task has variables of its own
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS"
    export LOCAL_RANK="$SLURM_LOCALID" LOCAL_WORLD_SIZE="$SLURM_NTASKS_PER_NODE"
    exec reformer-train "$@"
' {command} || status=$?

if ((status == {PREEMPTED})); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def _cases(trials: Sequence[Sequence[str]]) -> str:
    if not trials:
        return ""
    cases = "\n".join(f"    {number}) trial=({shlex.join(trial)}) ;;" for number, trial in enumerate(trials))
    return f"""
case "$SLURM_ARRAY_TASK_ID" in
{cases}
esac
"""


def _lines(command: Sequence[str], arguments: Sequence[str]) -> str:
    """One part a line, all as the shell should read it."""
    return " \\\n    ".join([*command, *arguments])
