"""Traffic and memory of exchanges, and the mesh of least traffic. See docs/sequence_parallelism.md."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reformer_dist.ops.lsh.attention import WorkspaceShape
from reformer_dist.ops.lsh.backends import workspace_bytes
from reformer_dist.ops.lsh.hashing import bucket_dtype
from reformer_dist.ops.lsh.neighbour_rules import ChunkRule
from reformer_dist.parallel.exchange_plan import GROUP_TOKENS

INDEX_BYTES = 8  # a head index, a position or a sort key
# Bytes between nodes take about this much longer than bytes inside one (NVLink against one network card).
BETWEEN_NODES = 4


@dataclass(frozen=True)
class LayerShape:
    """Sizes of an LSH layer on one rank."""

    rows: int
    """Rows of a micro-batch."""
    slice_len: int
    """Tokens of a row on this rank."""
    n_heads: int
    head_dim: int
    n_hashes: int
    n_buckets: int
    element_size: int
    """Bytes of a number: 4 in float32, 2 in bf16."""
    own_keys: bool = False
    """Keys and queries have bucket ids, and vectors, of their own."""

    @property
    def tokens(self) -> int:
        """(Token, head) pairs on this rank, which are sent separately."""
        return self.rows * self.slice_len * self.n_heads

    @property
    def vector(self) -> int:
        """Bytes of one token's q, v or output in one head."""
        return -(-self.head_dim * self.element_size // 4) * 4

    @property
    def ids(self) -> int:
        """Bytes of one token's bucket ids in one head."""
        return self.n_hashes * bucket_dtype(self.n_buckets).itemsize * (2 if self.own_keys else 1)


def mean_other_ranks(n_ranks: int, n_hashes: int) -> float:
    """Other ranks that attend from a token, if buckets are evenly distributed: (P - 1)(1 - (1 - 1/P)^R)."""
    return (n_ranks - 1) * (1 - (1 - 1 / n_ranks) ** n_hashes)


def head_bytes(shape: LayerShape, heads: int) -> float:
    """Bytes that a rank sends to others for the head exchange in forward: q, v and bucket ids, and o back.

    And k, if keys are their own.
    """
    return shape.tokens * ((4 if shape.own_keys else 3) * shape.vector + shape.ids) * (heads - 1) / heads


def bucket_bytes(
    shape: LayerShape, heads: int, buckets: int, sent: float | None = None, returned: float | None = None
) -> float:
    """The same for the bucket exchange: counts; then q, v and bucket ids, and o with its logsumexp back.

    sent, returned: the mean number of other ranks that a token is sent to and returned from. None: as expected for
    evenly distributed buckets.
    """
    if buckets == 1:
        return 0.0
    expected = mean_other_ranks(buckets, shape.n_hashes)
    sent, returned = (expected if m is None else m for m in (sent, returned))
    n_heads = shape.rows * shape.n_heads / heads
    counts = 12 * n_heads * shape.n_hashes * shape.n_buckets * (buckets - 1) / buckets
    destination_bits = 2 / 8 * (buckets - 1) * shape.tokens
    # ids of keys and of queries are sent apart, with either
    out = sent * (2 * shape.vector + -(-shape.ids // 4) * 4) + returned * (shape.vector if shape.own_keys else 0)
    back = returned * (shape.vector + 4)
    return counts + destination_bits + shape.tokens * (out + back)


def all_gather_bytes(shape: LayerShape, n_ranks: int) -> float:
    """Bytes that an all-gather of q (or k) and v would send instead."""
    return shape.tokens * 2 * shape.vector * (n_ranks - 1)


def choose_mesh(meshes: list[tuple[int, int]], shape: LayerShape, ranks_per_node: int) -> tuple[int, int]:
    """The (heads, buckets) of least cost among those whose heads divide the layer's. ValueError if none does.

    Bucket groups are consecutive ranks; a head group spans the whole sequence group. Bytes of a group that
    does not fit into a node count BETWEEN_NODES times.
    """
    fitting = [(heads, buckets) for heads, buckets in meshes if shape.n_heads % heads == 0]
    if not fitting:
        raise ValueError(f"no mesh of {meshes} has a number of heads that divides {shape.n_heads}")

    def cost(mesh: tuple[int, int]) -> float:
        heads, buckets = mesh
        far_heads = BETWEEN_NODES if heads * buckets > ranks_per_node else 1
        far_buckets = BETWEEN_NODES if buckets > ranks_per_node else 1
        return far_heads * head_bytes(shape, heads) + far_buckets * bucket_bytes(shape, heads, buckets)

    return min(fitting, key=cost)


def describe_mesh(heads: int, buckets: int, shape: LayerShape) -> str:
    """One line for the log."""
    sent = (head_bytes(shape, heads) + bucket_bytes(shape, heads, buckets)) / 2**20
    gathered = all_gather_bytes(shape, heads * buckets) / 2**20
    return (
        f"a sequence over {heads * buckets} ranks: parallel.heads={heads} x parallel.buckets={buckets} | expected "
        f"traffic {sent:,.1f} MiB a rank, micro-batch, LSH layer and forward (an all-gather: {gathered:,.1f} MiB)"
    )


@dataclass(frozen=True)
class ExchangeMemory:
    """Memory of the bucket exchange of one layer on one rank."""

    layer: LayerShape
    attention: WorkspaceShape
    """Of the heads on this rank, whole sequences."""
    n_ranks: int
    """Ranks of the bucket group."""

    @property
    def n_local(self) -> int:
        return -(-self.attention.seq_len // self.n_ranks)

    @property
    def copies(self) -> float:
        """Expected number of ranks that hold a token (as a key, if keys are their own), its own included.

        If buckets are evenly distributed.
        """
        rule = self.attention.rule
        if self.attention.n_buckets > 1:
            return 1 + mean_other_ranks(self.n_ranks, self.attention.n_rounds)
        if isinstance(rule, ChunkRule):
            reach = rule.chunk_len * (rule.n_before + rule.n_after)
        else:
            reach = (rule.window - 1) * (1 if rule.causal else 2)
        return 1 + min(self.n_ranks - 1.0, reach / self.n_local)

    @property
    def rows(self) -> float:
        """As copies, of the ranks that hold a token as a query or as a key."""
        if not self.attention.own_keys:
            return self.copies
        return 1 + mean_other_ranks(self.n_ranks, 2 * self.attention.n_rounds)

    def plan_bytes(self) -> float:
        """The plan (`exchange_plan.Route`): ids and codes of received tokens, selections, and bucket sizes."""
        shape = self.attention
        sizes = shape.n_heads * shape.n_rounds * shape.n_buckets * 4
        id_bytes = bucket_dtype(self.layer.n_buckets).itemsize + (4 if shape.has_codes else 0)
        ids = shape.n_rounds * id_bytes * (2 if shape.own_keys else 1) + (4 if shape.documents else 0)
        return shape.n_heads * self.n_local * (self.copies * ids + 4 * self.n_ranks / 8) + sizes

    def workspace_bytes(self, backend: str) -> float:
        """Peak in the backward (`bucket_exchange`): a middle group is attended, its neighbours are in flight."""
        shape, vector = self.attention, self.layer.vector
        group_heads = min(shape.n_heads, max(1, GROUP_TOKENS[shape.device] // self.n_local))
        n_separate = 0 if shape.shared_keys else 1
        keys, queries, grads = (n * vector for n in (2, 1 + n_separate, 2 + n_separate))
        queries += 8  # the logsumexp and rowsum(dO * o)
        rows = group_heads * self.n_local * self.copies
        n_groups = -(-shape.n_heads // group_heads)
        # send and receive buffers: both live until the transfer completes
        dispatched, combined = 2 * (keys + queries), 2 * grads
        in_flight = [0, max(dispatched, combined), dispatched + combined][min(n_groups, 3) - 1]
        received = keys + queries
        indices = INDEX_BYTES * (4 + shape.n_rounds) + 8
        query_rows = (1 + n_separate) * vector  # dO, and separate q; 0 for rows that are keys only
        if shape.own_keys:
            query_rows += keys  # 0 for rows that are queries only
        held = group_heads * self.n_local * self.rows
        partition = replace(shape, n_heads=group_heads, n_partition_rows=held)
        return rows * (in_flight + received) + held * (indices + query_rows) + workspace_bytes(backend, partition)
