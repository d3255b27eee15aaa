"""Which ranks share a sequence, and how: from a configuration to the object that models and loaders are given."""

from __future__ import annotations

from reformer_dist.config import Precision, RunConfig
from reformer_dist.distributed.grid import make_grid
from reformer_dist.distributed.runtime import Runtime, ranks_per_node
from reformer_dist.log import logger
from reformer_dist.parallel import SlicedSequence
from reformer_dist.parallel.traffic import LayerShape, choose_grid, describe_grid


def share_sequences(config: RunConfig, runtime: Runtime, micro_batch: int) -> SlicedSequence:
    """How the ranks share sequences, in the grid that was asked for or the one of least traffic.

    Every rank calls this, since it makes process groups. Raises ConfigError where the job has not the ranks.
    """
    config.dp_size(runtime.world_size)
    parallel, model = config.parallel, config.model
    shape = LayerShape(
        rows=micro_batch,
        slice_len=-(-config.data.seq_len // parallel.sequence),
        n_heads=model.n_heads,
        head_dim=model.resolved_head_dim,
        n_hashes=model.n_hashes + model.local_round,
        n_buckets=model.n_buckets,
        element_size=4 if config.trainer.precision is Precision.fp32 else 2,
    )
    heads, buckets = choose_grid(parallel.grids(), shape, ranks_per_node())
    if parallel.sequence > 1:
        logger.info(describe_grid(heads, buckets, shape))
    grid = make_grid(runtime, heads, buckets, overlaps=parallel.overlap)
    return SlicedSequence(grid, config.data.seq_len, merge_returns=parallel.merge_returns)
