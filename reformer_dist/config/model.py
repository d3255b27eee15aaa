"""The model: sizes, attention, positions, and activations for backward."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum

from reformer_dist.config.checks import LARGEST_INT32, ConfigGroup, bounded, require
from reformer_dist.config.compat import LARGEST_CHUNK, CompatConfig, StreamMerge
from reformer_dist.config.keywords import MODEL_CONFIG_COUNTERPARTS

# far beyond any model, and small enough that sizes computed from them fit into 64 bits
LARGEST_WIDTH, LARGEST_FF_DIM, LARGEST_FF_MULT = 2**20, 2**24, 2**10
LARGEST_HEADS, LARGEST_LAYERS = 2**14, 1000
LARGEST_HASHES, LARGEST_BUCKETS = 2**10, 2**20
LARGEST_CONV = 8
LARGEST_WINDOW = 2**28  # sorted positions, and distances between them, are 32-bit


class AttentionKind(Enum):
    lsh = "lsh"
    local = "local"
    exact = "exact"


class CrossAttentionKind(Enum):
    exact = "exact"
    lsh = "lsh"


class HashScheme(Enum):
    rotation = "rotation"
    floor = "floor"


class NeighbourRule(Enum):
    window = "window"
    chunk = "chunk"


class Activation(Enum):
    gelu = "gelu"
    gelu_tanh = "gelu_tanh"
    relu = "relu"
    silu = "silu"
    glu = "glu"
    swiglu = "swiglu"

    @property
    def is_gated(self) -> bool:
        """Whether a second projection multiplies the activated one."""
        return self in (Activation.glu, Activation.swiglu)


class AttentionBackend(Enum):
    auto = "auto"
    reference = "reference"
    torch = "torch"
    native = "native"
    triton = "triton"


class Position(Enum):
    axial = "axial"
    rotary = "rotary"
    learned = "learned"
    sinusoidal = "sinusoidal"


class Norm(Enum):
    layer = "layer"
    rms = "rms"
    scale = "scale"
    rezero = "rezero"


class Pooling(Enum):
    mean = "mean"
    first = "first"
    last = "last"


class Recompute(Enum):
    reversible = "reversible"
    checkpoint = "checkpoint"
    none = "none"


@dataclass(kw_only=True)
class ModelConfig(ConfigGroup, prefix="model."):
    """A Reformer stack. The vocabulary size comes from the tokenizer."""

    counterparts = MODEL_CONFIG_COUNTERPARTS

    dim: int = bounded(256, least=1, most=LARGEST_WIDTH)
    """Width of each of the two residual streams."""
    n_layers: int = bounded(4, least=1, most=LARGEST_LAYERS)
    """Layers of the stack; in an encoder-decoder, of the decoder."""
    n_heads: int = bounded(4, least=1, most=LARGEST_HEADS)
    """Attention heads of each layer."""
    head_dim: int | None = bounded(None, least=1, most=LARGEST_WIDTH)
    """Width of one head; null means dim / n_heads."""
    layers: list[AttentionKind] = field(default_factory=lambda: [AttentionKind.local, AttentionKind.lsh])
    """Attention of each layer, repeated until n_layers: lsh, local or exact."""
    causal: bool = True
    """True: tokens attend to the past only. False: bidirectional."""
    share_layers: bool = False
    """Layers at the same position of the pattern share their parameters (not with ZeRO stage 3)."""
    n_encoder_layers: int | None = bounded(None, least=1, most=LARGEST_LAYERS)
    """Encoder-decoder: layers of the encoder; null means n_layers, the number of the decoder's."""
    encoder_layers: list[AttentionKind] | None = None
    """Encoder-decoder: attention of the encoder's layers, as `layers`; null means that of the decoder."""
    cross_attention: CrossAttentionKind = CrossAttentionKind.exact
    """Encoder-decoder: attention of the decoder to the source: exact, or lsh (keys in the query's bucket)."""
    embedding_dim: int | None = bounded(None, least=1, most=LARGEST_WIDTH)
    """Width of token and position embeddings, and of the head's table; null means dim. Otherwise linear
    layers project to dim and back."""
    norm: Norm = Norm.layer
    """Sublayer input. layer: layer norm; rms: RMS norm, without mean and bias; scale: x / |x| times a learned
    scalar; rezero: none, but the output is multiplied by a learned scalar that starts at 0."""
    layer_drop: float = bounded(0.0, least=0, below=1)
    """Probability that a training step skips a layer, drawn for each step, the same on every rank."""
    one_value_head: bool = False
    """All heads of a layer share one value head."""

    n_hashes: int = bounded(4, least=1, most=LARGEST_HASHES)
    """Hash rounds of LSH attention."""
    n_buckets: int = bounded(64, least=1, most=LARGEST_BUCKETS)
    """Buckets per hash round, at any sequence length: 1 or even; seq_len / window is a usual choice."""
    hash_scheme: HashScheme = HashScheme.rotation
    """rotation: argmax of [xR, -xR]; floor: floor(Rx / gamma)."""
    neighbours: NeighbourRule = NeighbourRule.window
    """window: the last tokens of the bucket, strictly causal; chunk: the rule of the paper's code, which leaks."""
    window: int = bounded(64, least=1, most=LARGEST_WINDOW)
    """window rule: a token attends to those of its bucket at a sorted distance below this."""
    chunk_len: int = bounded(64, least=1, most=LARGEST_CHUNK, hint="layers=[exact] attends to more tokens")
    """chunk rule: tokens per chunk of the sorted order."""
    n_chunks_before: int = bounded(1, least=0, most=LARGEST_CHUNK)
    """chunk rule: chunks before its own that a token attends to."""
    n_chunks_after: int = bounded(0, least=0, most=LARGEST_CHUNK)
    """chunk rule: chunks after its own that a token attends to; 0 in a causal model."""
    shared_qk: bool = True
    """LSH layers: the key of a token is its query, normalized. false: keys have a projection of their own, and a
    token attends to the last `window` keys of its query's bucket."""
    next_value_heads: int = bounded(0, least=0)
    """Heads of each LSH layer in which the key of a token carries the value of the next token: they find what
    followed a token like their own."""
    qk_conv: int = bounded(0, least=0, most=LARGEST_CONV)
    """LSH layers: width of a causal depthwise convolution of the queries and keys over the tokens; 0: none. What a
    token is found by then includes the tokens before it."""
    local_round: bool = False
    """An additional round over the nearest positions, in the same softmax."""
    count_pairs_once: bool = False
    """A pair that shares a bucket in several rounds counts once (paper, N(i,j)) instead of once per round."""
    qk_scale: float = bounded(1.0, above=0)
    """Scale of q.k in LSH attention: 1 (paper), or head_dim**-0.5 (reformer_pytorch, and always with keys of their
    own)."""
    local_window: int = bounded(128, least=1, most=LARGEST_WINDOW)
    """Local attention: positions in the window, including the token's own."""
    attention_backend: AttentionBackend = AttentionBackend.auto
    """Of lsh and local layers: triton (GPU), native (C for CPUs, window rule), torch (any device), or reference
    (slow, short sequences only); auto is triton or native where available, otherwise torch."""

    ff_mult: int = bounded(4, least=1, most=LARGEST_FF_MULT)
    """Inner width of the feed-forward, as a multiple of dim."""
    ff_dim: int | None = bounded(None, least=1, most=LARGEST_FF_DIM)
    """Inner width of the feed-forward; null means ff_mult * dim."""
    activation: Activation = Activation.gelu
    """Of the feed-forward: gelu, gelu_tanh (its tanh approximation), relu, silu, or gated: glu (with GELU), swiglu
    (with SiLU)."""
    ff_chunk: int = bounded(0, least=0)
    """Tokens per chunk of the feed-forward; 0 means all at once."""
    loss_chunk: int = bounded(1024, least=1)
    """Tokens per chunk of the loss, which bounds the logits in memory."""
    tie_embeddings: bool = False
    """The output head shares the token embedding table."""

    position: Position = Position.axial
    """Position of a token: axial, learned or sinusoidal embeddings are added; rotary rotates queries and keys."""
    rotary_layers: list[AttentionKind] = field(default_factory=lambda: list(AttentionKind))
    """rotary: layers of these kinds rotate queries and keys; others attend by content alone, at any distance.
    Other kinds of positions ignore it."""
    axial_shape: list[int] = field(default_factory=lambda: [32, 64])
    """axial: shape of the grid of positions; its size bounds the sequence length."""
    axial_dims: list[int] | None = None
    """axial: embedding width of each axis, summing to embedding_dim; null splits it evenly."""
    rotary_base: float = bounded(10000.0, above=1)
    """rotary: base of the wavelengths; a larger one tells positions apart that are further away."""
    max_seq_len: int = bounded(2048, least=1)
    """learned: rows of the position table. Other kinds ignore it."""

    pooling: Pooling = Pooling.mean
    """Classification: input of the head: the mean over all tokens, or the first or last token."""

    dropout: float = bounded(0.0, least=0, below=1)
    """After the embedding and after each sublayer."""
    attention_dropout: float = bounded(0.0, least=0, below=1)
    """On the attention weights, after the softmax."""
    ff_dropout: float = bounded(0.0, least=0, below=1)
    """Inside the feed-forward, after the activation."""
    norm_eps: float = bounded(1e-5, least=0)
    """Added to the variance in layer norms."""
    recompute: Recompute = Recompute.reversible
    """Source of the activations in backward: reversible (inverted), checkpoint (recomputed), none (stored)."""

    compat: CompatConfig = field(default_factory=CompatConfig)
    """Behavior of other implementations, for models that were trained with them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.layers) > 0, "model.layers", self.layers, "must name at least one of lsh, local, exact")
        requirement = "must name at least one of lsh, local, exact, or be null"
        require(self.encoder_layers != [], "model.encoder_layers", self.encoder_layers, requirement)
        requirement = "needs model.causal=false, since the first token of a causal model attends to no other"
        require(self.pooling is not Pooling.first or not self.causal, "model.pooling", "first", requirement)
        requirement = "needs model.share_layers=true, without which each layer has norms of its own anyway"
        has_shared = self.share_layers or not self.compat.norm_per_layer
        require(has_shared, "model.compat.norm_per_layer", True, requirement)
        self._check_heads()
        self._check_lsh()
        self._check_chunks()
        if self.embedding_dim is None:
            requirement = "excludes model.compat.merge_streams=concat, whose head is 2 * dim wide"
            require(not (self.tie_embeddings and self.is_concat), "model.tie_embeddings", True, requirement)
        if self.position is Position.axial:
            self._check_axial()

    def _check_heads(self) -> None:
        if self.head_dim is None:
            requirement = f"must divide model.dim={self.dim}, or model.head_dim be given"
            require(self.dim % self.n_heads == 0, "model.n_heads", self.n_heads, requirement)
        if self.position is Position.rotary:
            requirement = "must be even with model.position=rotary"
            require(self.resolved_head_dim % 2 == 0, "model.head_dim", self.resolved_head_dim, requirement)

    def _check_lsh(self) -> None:
        is_valid = self.n_buckets == 1 or self.n_buckets % 2 == 0
        require(is_valid, "model.n_buckets", self.n_buckets, "must be 1 or an even number")
        factors = self.compat.bucket_factors
        if factors is not None:
            is_valid = all(f > 0 and f % 2 == 0 for f in factors) and math.prod(factors) == self.n_buckets
            requirement = f"must be even numbers with the product model.n_buckets={self.n_buckets}"
            require(is_valid, "model.compat.bucket_factors", factors, requirement)
        n_shifted, requirement = self.next_value_heads, f"must be at most model.n_heads={self.n_heads}"
        require(n_shifted <= self.n_heads, "model.next_value_heads", n_shifted, requirement)
        requirement = f"must be 0, or from 2 to {LARGEST_CONV}: a width of 1 is a scale of the projection"
        require(self.qk_conv != 1, "model.qk_conv", 1, requirement)
        requirement = "needs model.causal=true: a causal convolution reads earlier tokens only; must be 0"
        require(self.causal or self.qk_conv == 0, "model.qk_conv", self.qk_conv, requirement)
        if not self.shared_qk:
            self._check_own_keys()
        if self.compat.hash_seed is not None:
            requirement = "needs model.hash_scheme=rotation"
            is_rotation = self.hash_scheme is HashScheme.rotation
            require(is_rotation, "model.compat.hash_seed", self.compat.hash_seed, requirement)
        if self.count_pairs_once:  # implemented as buckets that are a window apart
            limit = LARGEST_WINDOW // self.n_buckets
            condition = f"model.n_buckets={self.n_buckets} and model.count_pairs_once=true"
            require(self.window <= limit, "model.window", self.window, f"must be at most {limit} with {condition}")

    def _check_own_keys(self) -> None:
        key = "model.shared_qk"
        requirement = "needs model.neighbours=window: in chunks, a token has one bucket as query and key"
        require(self.neighbours is NeighbourRule.window, key, False, requirement)
        for name in ("hash_seed", "bucket_factors"):
            value = getattr(self.compat, name)
            requirement = f"excludes model.compat.{name}={value}, which is of models with shared queries and keys"
            require(value is None, key, False, requirement)
        requirement = "must be 1 with model.shared_qk=false, which scales q.k by head_dim**-0.5"
        uses_scale = self.cross_attention is CrossAttentionKind.lsh
        require(self.qk_scale == 1 or uses_scale, "model.qk_scale", self.qk_scale, requirement)

    def _check_chunks(self) -> None:
        compat, key = self.compat, "model.compat.chunk_wrap"
        if compat.chunk_wrap:
            require(self.neighbours is NeighbourRule.chunk, key, True, "needs model.neighbours=chunk")
            require(not self.count_pairs_once, key, True, "excludes model.count_pairs_once=true")
            require(not self.local_round, key, True, "excludes model.local_round=true")
        if self.causal:
            requirement = "must be 0 in a causal model"
            if self.neighbours is NeighbourRule.chunk:
                require(self.n_chunks_after == 0, "model.n_chunks_after", self.n_chunks_after, requirement)
            if compat.local_chunk_len:
                after = compat.local_chunks_after
                require(after == 0, "model.compat.local_chunks_after", after, requirement)

    def _check_axial(self) -> None:
        require(len(self.axial_shape) > 0, "model.axial_shape", self.axial_shape, "must name at least one axis")
        is_valid = all(0 < size <= LARGEST_INT32 for size in self.axial_shape)
        require(is_valid, "model.axial_shape", self.axial_shape, "must hold positive numbers of at most 31 bits")
        dims = self.resolved_axial_dims
        if self.compat.axial_sum:
            requirement = "must be null with model.compat.axial_sum=true: each axis is as wide as the embedding"
            require(self.axial_dims is None, "model.axial_dims", self.axial_dims, requirement)
            return
        n_axes = len(self.axial_shape)
        is_valid = len(dims) == n_axes and min(dims) > 0 and sum(dims) == self.embedding_width
        requirement = f"must hold a positive width for each of {n_axes} axes, summing to {self.embedding_width}"
        require(is_valid, "model.axial_dims", dims, requirement)

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim if self.head_dim is not None else self.dim // self.n_heads

    @property
    def embedding_width(self) -> int:
        return self.embedding_dim if self.embedding_dim is not None else self.dim

    @property
    def resolved_ff_dim(self) -> int:
        return self.ff_dim if self.ff_dim is not None else self.ff_mult * self.dim

    @property
    def is_concat(self) -> bool:
        return self.compat.merge_streams is StreamMerge.concat

    @property
    def output_dim(self) -> int:
        """Width of the stack's output."""
        return 2 * self.dim if self.is_concat else self.dim

    @property
    def table_width(self) -> int:
        """Width of the language model head's table."""
        return self.embedding_dim if self.embedding_dim is not None else self.output_dim

    @property
    def chunk_multiple(self) -> int:
        """compat.chunk_wrap: other systems pad to a multiple of all chunk lengths in use, and wrap there."""
        lengths = {AttentionKind.lsh: self.chunk_len, AttentionKind.local: self.compat.local_chunk_len or 1}
        used = [lengths.get(kind, 1) for kind in self.layer_kinds()]
        return math.lcm(*used) if self.compat.chunk_wrap else 1

    @property
    def resolved_axial_dims(self) -> list[int]:
        if self.axial_dims is not None:
            return self.axial_dims
        if self.compat.axial_sum:
            return [self.embedding_width] * len(self.axial_shape)
        width, remainder = divmod(self.embedding_width, len(self.axial_shape))
        return [width + (axis < remainder) for axis in range(len(self.axial_shape))]

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the position embedding supports; None if unlimited."""
        if self.position is Position.axial:
            return math.prod(self.axial_shape)
        if self.position is Position.learned:
            return self.max_seq_len
        return None

    def encoder(self) -> ModelConfig:
        """The encoder's stack in an encoder-decoder: bidirectional, with its own layers, of width dim.

        Its LSH layers have no convolution, since qk_conv is causal.
        """
        return replace(
            self,
            causal=False,
            qk_conv=0,
            compat=replace(self.compat, merge_streams=StreamMerge.mean),
            n_layers=self.n_encoder_layers or self.n_layers,
            layers=list(self.encoder_layers or self.layers),
        )

    @property
    def n_blocks(self) -> int:
        """Distinct layers: with share_layers, layer i has the parameters of layer i % n_blocks."""
        return min(len(self.layers), self.n_layers) if self.share_layers else self.n_layers

    def layer_kinds(self) -> list[AttentionKind]:
        """Attention of each of the n_layers layers."""
        return [self.layers[index % len(self.layers)] for index in range(self.n_layers)]
