"""What exchanges cost, by formula, and the mesh that costs least. See docs/sequence_parallelism.md."""

from __future__ import annotations

from dataclasses import dataclass

from reformer_dist.ops.lsh.hashing import bucket_dtype

# Bytes between nodes take about this much longer than bytes inside one (NVLink against one network card).
BETWEEN_NODES = 4


@dataclass(frozen=True)
class LayerShape:
    """An LSH layer's sizes on one rank."""

    rows: int
    """Of a micro-batch."""
    slice_len: int
    """Tokens of a row on this rank."""
    n_heads: int
    head_dim: int
    n_hashes: int
    n_buckets: int
    element_size: int
    """Bytes of a number: 4 in float32, 2 in bf16."""

    @property
    def tokens(self) -> int:
        """Tokens on this rank, once for each head: what travels on its own."""
        return self.rows * self.slice_len * self.n_heads

    @property
    def vector(self) -> int:
        """Bytes of one token's q, v or output in one head."""
        return -(-self.head_dim * self.element_size // 4) * 4

    @property
    def ids(self) -> int:
        """Bytes of one token's bucket ids in one head."""
        return self.n_hashes * bucket_dtype(self.n_buckets).itemsize


def mean_other_ranks(n_ranks: int, n_hashes: int) -> float:
    """Other ranks on which a token's rounds fall, if buckets are spread evenly: (P - 1)(1 - (1 - 1/P)^R)."""
    return (n_ranks - 1) * (1 - (1 - 1 / n_ranks) ** n_hashes)


def head_bytes(shape: LayerShape, heads: int) -> float:
    """Bytes that a rank sends to others in forward, to exchange heads: q, v and bucket ids out, o back."""
    return shape.tokens * (3 * shape.vector + shape.ids) * (heads - 1) / heads


def bucket_bytes(
    shape: LayerShape, heads: int, buckets: int, sent: float | None = None, returned: float | None = None
) -> float:
    """The same to exchange buckets: counts; then q, v and bucket ids out, o and its logsumexp back.

    sent, returned: the mean number of other ranks to which a token travels and from which it comes back; None
    takes what evenly spread buckets would give.
    """
    if buckets == 1:
        return 0.0
    expected = mean_other_ranks(buckets, shape.n_hashes)
    sent, returned = (expected if m is None else m for m in (sent, returned))
    units = shape.rows * shape.n_heads / heads
    counts = 12 * units * shape.n_hashes * shape.n_buckets * (buckets - 1) / buckets
    who_needs_what = 2 / 8 * (buckets - 1) * shape.tokens
    out = sent * (2 * shape.vector + -(-shape.ids // 4) * 4)
    back = returned * (shape.vector + 4)
    return counts + who_needs_what + shape.tokens * (out + back)


def all_gather_bytes(shape: LayerShape, n_ranks: int) -> float:
    """What an all-gather of q and v would send instead."""
    return shape.tokens * 2 * shape.vector * (n_ranks - 1)


def choose_mesh(meshes: list[tuple[int, int]], shape: LayerShape, ranks_per_node: int) -> tuple[int, int]:
    """The (heads, buckets) of least cost among those whose heads divide the layer's; ValueError if none does.

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
