#!/usr/bin/env bash
# Written by: reformer-train launcher=torchrun experiment=quickstart data.batch_size=8
#
# Run it on each of node1, node2, at about the same time, in a directory that all of them share.
# The rendezvous is on node1. If a rank is lost, all restart from the last checkpoint.
set -euo pipefail

cores=$(nproc)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 4 ? cores / 4 : 1))}"
# seconds for ranks to save after SIGTERM
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120

exec torchrun \
    --nnodes=2 \
    --nproc-per-node=4 \
    --max-restarts=3 \
    --rdzv-id=reformer \
    --rdzv-backend=c10d \
    --rdzv-endpoint=node1:29400 \
    -m reformer_dist.train \
    experiment=quickstart \
    data.batch_size=8
