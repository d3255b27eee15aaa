#!/usr/bin/env bash
# Written by: reformer-train launcher=torchrun experiment=quickstart
#
# Run it on each of node1, node2, at about the same time, in a folder that all of them share.
# They meet at node1. After a rank was lost, all start again from the last checkpoint.
set -euo pipefail

cores=$(nproc)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 4 ? cores / 4 : 1))}"
# how long ranks that are told to end may take to save
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120

exec torchrun \
    --nnodes=2 \
    --nproc-per-node=4 \
    --max-restarts=3 \
    --rdzv-id=reformer \
    --rdzv-backend=c10d \
    --rdzv-endpoint=node1:29400 \
    -m reformer_dist.train \
    experiment=quickstart
