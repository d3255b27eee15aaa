"""Working memory of bucket exchange: units that are attended, and their neighbours that travel meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from reformer_dist.models.layer_rule import LayerRule
from reformer_dist.ops.lsh.options import ChunkRule
from reformer_dist.parallel.plan import GROUP_TOKENS
from reformer_dist.parallel.traffic import mean_other_ranks
from reformer_dist.planning.attention import (
    kernel_parts,
    kernel_tiles,
    native_order,
    runs_kernels,
    runs_native,
    tiled_backward,
)
from reformer_dist.planning.sizes import Job

NUMBER = 8  # bytes of a row's unit, position or sort key


@dataclass(frozen=True)
class Exchange:
    """Of one layer on one rank, in its backward."""

    job: Job
    layer: LayerRule
    units: int
    seq_len: int
    """Of the whole order."""

    @property
    def n_local(self) -> int:
        return -(-self.seq_len // self.job.mesh_shape[1])

    @property
    def units_at_a_time(self) -> int:
        return min(self.units, max(1, GROUP_TOKENS[self.job.device] // self.n_local))

    @property
    def copies(self) -> float:
        """Ranks that hold a token, its own among them, if buckets are spread evenly."""
        n_ranks, rule = self.job.mesh_shape[1], self.layer.rule
        if self.layer.n_buckets > 1:
            return 1 + mean_other_ranks(n_ranks, self.layer.n_rounds)
        if isinstance(rule, ChunkRule):
            reach = rule.chunk_len * (rule.n_before + rule.n_after)
        else:
            reach = (rule.window - 1) * (1 if rule.causal else 2)
        return 1 + min(n_ranks - 1.0, reach / self.n_local)

    def remembered(self) -> float:
        """The plan, which is kept for the recompute: ids that came, who takes which token, and counts."""
        shape = self.job.layer_shape
        tokens = self.units * self.n_local
        counts = self.units * self.layer.n_rounds * self.layer.n_buckets * 4
        n_ids = self.copies * self.layer.n_rounds
        is_counted = self.job.config.model.count_pairs_once and self.layer.n_rounds > 1
        ids = n_ids * (shape.ids / shape.n_hashes + (4 if is_counted else 0))
        return tokens * (ids + 4 * self.job.mesh_shape[1] / 8) + counts

    def workspace(self) -> float:
        """Highest at the attention of a group in the middle."""
        shape, n_own = self.job.layer_shape, 0 if self.layer.shares_keys else 1
        keys, asked, grads = (n * shape.vector for n in (2, 1 + n_own, 2 + n_own))
        asked += 8  # the logsumexp and rowsum(dO * o)
        rows = self.units_at_a_time * self.n_local * self.copies
        n_groups = -(-self.units // self.units_at_a_time)
        going_out, going_home = 2 * (keys + asked), 2 * grads  # what is sent lives until it has arrived
        travelling = [0, max(going_out, going_home), going_out + going_home][min(n_groups, 3) - 1]
        arrived = keys + asked
        numbers = NUMBER * (4 + self.layer.n_rounds) + 8
        as_queries = (1 + n_own) * shape.vector  # dO, and q that came apart: 0 for rows that are no queries
        return rows * (travelling + arrived + numbers + as_queries) + self._attention(rows)

    def _attention(self, rows: float) -> float:
        job, layer, shape = self.job, self.layer, self.job.layer_shape
        n_grads, n_buckets = 2 if layer.shares_keys else 3, self.units_at_a_time * layer.n_buckets
        if runs_kernels(job):
            grads = rows * n_grads * shape.head_dim * shape.element_size
            return kernel_tiles(job, layer, rows, n_buckets) + grads + kernel_parts(job, layer, rows)
        if runs_native(job, layer):
            wide = shape.head_dim * 4
            # what came apart from others already lies side by side, but not in float32
            copies = 2 if shape.element_size == 4 else n_grads + 1
            return native_order(layer, rows, n_buckets) + rows * (wide * (copies + n_grads) + 12)
        return tiled_backward(job, layer, rows, self.units_at_a_time, self.seq_len)
