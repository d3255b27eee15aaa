#!/usr/bin/env bash
# Written by: reformer-train launcher=deepspeed experiment=quickstart data.batch_size=8
#
# Run it on node1, in a directory that all machines share. It starts the ranks over ssh, which must
# work without a password, and needs pdsh. Lost ranks are not restarted: use torchrun for that.
set -euo pipefail

cores=$(nproc)
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT

cat > "$folder/hostfile" << 'END'
node1 slots=4
node2 slots=4
END
# environment of the ranks, besides the variables of NCCL and Python
cat > "$folder/environment" << END
PATH=$PATH
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 4 ? cores / 4 : 1))}
END
export DS_ENV_FILE="$folder/environment"

deepspeed \
    --no_local_rank \
    --force_multi \
    --hostfile "$folder/hostfile" \
    --master_addr node1 \
    --module reformer_dist.train \
    experiment=quickstart \
    data.batch_size=8
