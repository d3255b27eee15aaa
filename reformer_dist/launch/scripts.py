"""Shell scripts that start a job: torchrun, DeepSpeed over ssh, SLURM."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from reformer_dist.config import LauncherConfig
from reformer_dist.process.exit_status import PREEMPTED

MODULE = "reformer_dist.train"
PORT = 29400
SIGNALS = "TERM USR1 USR2"
REQUEUE = f"""
# a job that scancel ends is COMPLETING, and must not come back
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
if ((status == {PREEMPTED})) && [[ $state != COMPLETING ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def torchrun(launcher: LauncherConfig, arguments: Sequence[str], source: str) -> str:
    nodes, ranks, main_host = launcher.n_nodes, launcher.nproc_per_node, launcher.host_names[0]
    nnodes = f"{launcher.min_nodes}:{nodes}" if launcher.min_nodes else f"{nodes}"
    options = torchrun_options(launcher, nnodes, main_host)
    return f"""#!/usr/bin/env bash
# {source}
#
# Run it on each of {", ".join(launcher.hosts)}, at about the same time, in a directory that all of them share.
# The rendezvous is on {main_host}. If a rank is lost, all restart from the last checkpoint.
set -euo pipefail

cores=$(nproc)
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$((cores > {ranks} ? cores / {ranks} : 1))}}"
# seconds for ranks to save after SIGTERM
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={launcher.grace}

exec {_join_lines(["torchrun", *options, f"-m {MODULE}"], [*map(shlex.quote, arguments)])}
"""


def torchrun_options(launcher: LauncherConfig, nnodes: str, rendezvous_host: str) -> list[str]:
    return [
        f"--nnodes={nnodes}",
        f"--nproc-per-node={launcher.nproc_per_node}",
        f"--max-restarts={launcher.max_restarts}",
        f"--rdzv-id={launcher.name}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={rendezvous_host}:{PORT}",
    ]


def deepspeed(launcher: LauncherConfig, arguments: Sequence[str], source: str) -> str:
    ranks, hosts = launcher.nproc_per_node, launcher.host_names
    slots = "\n".join(f"{host} slots={ranks}" for host in hosts)
    command = [
        "deepspeed",
        "--no_local_rank",
        "--force_multi",
        '--hostfile "$folder/hostfile"',
        f"--master_addr {hosts[0]}",
        f"--module {MODULE}",
    ]
    return f"""#!/usr/bin/env bash
# {source}
#
# Run it on {hosts[0]}, in a directory that all machines share. It starts the ranks over ssh, which must
# work without a password, and needs pdsh. Lost ranks are not restarted: use torchrun for that.
set -euo pipefail

cores=$(nproc)
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT

cat > "$folder/hostfile" << 'END'
{slots}
END
# environment of the ranks, besides the variables of NCCL and Python
cat > "$folder/environment" << END
PATH=$PATH
OMP_NUM_THREADS=${{OMP_NUM_THREADS:-$((cores > {ranks} ? cores / {ranks} : 1))}}
END
export DS_ENV_FILE="$folder/environment"

{_join_lines(command, [*map(shlex.quote, arguments)])}
"""


def slurm(launcher: LauncherConfig, arguments: Sequence[str], source: str) -> str:
    options = _sbatch(launcher, launcher.nproc_per_node or 1, launcher.cpus_per_rank)
    command = _join_lines(["rank"], [*map(shlex.quote, arguments)])
    return f"""#!/usr/bin/env bash
# {source}
{options}
#
# Each task is a rank. On SIGTERM, when the job is preempted or near its time limit, ranks save and exit with
# status {PREEMPTED}; the job is then requeued and resumes from that checkpoint.
set -euo pipefail
trap : {SIGNALS} # this shell must outlive the ranks to read their status

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}}"

status=0
# shellcheck disable=SC2016 # expanded by each task
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS"
    export LOCAL_RANK="$SLURM_LOCALID" LOCAL_WORLD_SIZE="$SLURM_NTASKS_PER_NODE"
    exec reformer-train "$@"
' {command} || status=$?
{REQUEUE}"""


def slurm_sweep(launcher: LauncherConfig, arguments: Sequence[str], source: str) -> str:
    """A job array, each task of which runs one shard of a sweep on one machine."""
    ranks = launcher.nproc_per_node or 1
    options = f"{_sbatch(launcher, 1, ranks * launcher.cpus_per_rank)}\n#SBATCH --array=0-{launcher.array - 1}"
    local = ["launcher=local", f"launcher.nproc_per_node={ranks}"]
    shard = '"sweep.shard=$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"'
    command = _join_lines(["reformer-train"], [*map(shlex.quote, [*arguments, *local]), shard])
    return f"""#!/usr/bin/env bash
# {source}
{options}
#
# Each task of the array runs one shard of the trials, as many in parallel as its machine holds. On SIGTERM,
# running trials save; the task exits with status {PREEMPTED}, is requeued, and resumes.
set -euo pipefail
trap : {SIGNALS} # this shell must outlive the sweep to read its status

status=0
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" {command} || status=$?
{REQUEUE}"""


def _sbatch(launcher: LauncherConfig, tasks_per_node: int, cpus_per_task: int) -> str:
    gpus = launcher.nproc_per_node if launcher.gpus_per_node is None else launcher.gpus_per_node
    options = [
        f"--job-name={launcher.name}",
        f"--nodes={launcher.n_nodes}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--cpus-per-task={cpus_per_task}",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        f"--time={launcher.time}",
        f"--output={'%x-%A_%a' if launcher.array else '%x-%j'}.out",
        "--open-mode=append",
        "--requeue",
        f"--signal=TERM@{launcher.grace}",
        *launcher.sbatch,
    ]
    return "\n".join(f"#SBATCH {option}" for option in options)


def _join_lines(command: Sequence[str], arguments: Sequence[str]) -> str:
    """One shell command over several lines."""
    return " \\\n    ".join([*command, *arguments])
