"""Per-call state: the context that every layer of a forward call reads, and the cache of its recompute."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor

from reformer_dist.config import ModelConfig, Position
from reformer_dist.config.keywords import FORWARD_COUNTERPARTS, refuse_unknown_keywords
from reformer_dist.models.decoding import DecodingState
from reformer_dist.models.recompute import LayerWeights
from reformer_dist.models.sequence import SequenceAccess, WholeSequence
from reformer_dist.models.short_conv import with_preceding
from reformer_dist.models.training_steps import CountsSteps
from reformer_dist.ops.checks import check_range
from reformer_dist.ops.dropout import TokenCoords
from reformer_dist.ops.lsh.attention import Exchange
from reformer_dist.ops.lsh.bucket_stats import BucketStats
from reformer_dist.ops.rotary import rotary_tables
from reformer_dist.seeds import derive_seed

WHOLE_SEQUENCE = WholeSequence()


class ForwardOptions(TypedDict, total=False):
    """Optional keyword arguments of every model's forward."""

    key_padding_mask: Tensor | None
    """[B, S] bool, True for real tokens; positions count from the first real token of a row. None: no padding."""
    step: int | None
    """Training step, which seeds that step's hash rotations. None: in evaluation mode and in decoding, the fixed
    rotations of evaluation; in training mode, the module counts its calls (`models.training_steps`)."""
    dropout_seed: int | None
    """Seed of this step's dropout masks in training mode; None draws one from torch's global generator."""
    rows: Tensor | None
    """[B] indices of the rows in the global batch, which dropout masks depend on; None: 0, 1, .."""
    document_ids: Tensor | None
    """[B, S] integers that do not decrease along a row: tokens attend to those of their own document only. None: a
    row is one document."""
    position_ids: Tensor | None
    """[B, S] positions for position embeddings, such as those within documents; None: those in the row."""
    bucket_stats: list[BucketStats] | None
    """List that LSH layers append their bucket statistics to."""
    sequence: SequenceAccess
    """Access to the sequences of which the tokens are a part (`models.sequence`): slices on several ranks, or a
    `models.decoding.DecodingState`, which continues the sequences in its cache. Default: whole sequences."""


@dataclass(frozen=True)
class EncodedSource:
    """Encoder output that a decoder attends to."""

    hidden: Tensor
    """[B, T, dim] float32, in which the gradients of all decoder layers are accumulated."""
    key_padding_mask: Tensor | None
    """[B, T], True for real tokens."""
    sequence: SequenceAccess
    """Access to the sources, of which the local tokens are a part."""


@dataclass(frozen=True)
class ForwardContext:
    """Constants of one forward call. Every random draw is a function of them, so recomputes repeat it."""

    dropout_seed: int | None
    """Seed of this call's dropout masks; None disables dropout."""
    rotation_seed: int
    """Seed of this call's hash rotations: one per training step, a fixed one in evaluation."""
    coords: TokenCoords
    """Coordinates of the local tokens in the global batch, which dropout masks depend on."""
    sequence: SequenceAccess
    """Access to the sequences of which the tokens are a part."""
    positions: Tensor
    """[S] or [B, S] positions of the local tokens for position embeddings."""
    key_padding_mask: Tensor | None = None
    """[B, S], True for real tokens."""
    document_ids: Tensor | None = None
    """[B, S]: see `ForwardOptions`."""
    document_starts: Tensor | None = None
    """[B, S], True for the first token of a document; only for values of the next token."""
    conv_document_ids: Tensor | None = None
    """[B, S], or [B, width - 1 + S] with the tokens before: `with_preceding`; only for model.qk_conv."""
    rotary: tuple[Tensor, Tensor] | None = None
    """cos and sin [S, head_dim / 2], or [B, S, head_dim / 2], of rotary positions."""
    bucket_stats: list[BucketStats] | None = None
    """List that LSH layers append their bucket statistics to; None: not collected."""
    next_rotation_seed: int | None = None
    """rotation_seed of the next training step, for which rotations can be drawn ahead; None in evaluation."""
    source: EncodedSource | None = None
    """Encoder output of an encoder-decoder."""

    def seed_for(self, *site: int | str) -> int:
        """Dropout seed of one site in the model, such as ("attention", layer)."""
        return derive_seed("dropout", self.dropout_seed or 0, *site)

    def dropout(self, p: float) -> float:
        """p in training, 0 in evaluation."""
        return 0.0 if self.dropout_seed is None else p

    def skips_layer(self, layer: int, p: float) -> bool:
        """Whether layer drop skips a layer in this step; the same on every rank, since seeds are."""
        p = self.dropout(p)
        return p > 0.0 and self.seed_for("layer_drop", layer) < p * 2**63


def build_context(
    config: ModelConfig,
    seed: int,
    n_tokens: int,
    device: torch.device,
    options: ForwardOptions,
    *,
    is_training: bool,
) -> ForwardContext:
    """Builds the context of a forward call on rows of n_tokens. seed: the model's; is_training enables dropout.

    Without a step, it has the rotations of evaluation. Raises ValueError for dropout in decoding.
    """
    sequence = options.get("sequence", WHOLE_SEQUENCE)
    mask, step = options.get("key_padding_mask"), options.get("step")
    documents, positions = options.get("document_ids"), options.get("position_ids")
    if isinstance(sequence, DecodingState):
        sequence.check_call(config, step, documents, positions, is_training=is_training)
    coords = TokenCoords(options.get("rows"), sequence.positions(n_tokens, device, mask))
    if positions is None:
        positions = coords.positions
    else:
        check_range("position_ids", positions, config.max_positions or 2**31, limit="max_positions")
    dropout_seed = options.get("dropout_seed")
    if not is_training:
        dropout_seed = None
    elif dropout_seed is None:
        dropout_seed = int(torch.randint(2**62, (1,), device="cpu").item())
    rotary = None
    if config.position is Position.rotary:
        rotary = rotary_tables(positions, config.resolved_head_dim, config.rotary_base)
    starts = conv_documents = None
    if documents is not None and config.next_value_heads:
        starts = sequence.document_starts(documents)
    if documents is not None and config.qk_conv:
        conv_documents = with_preceding(documents, sequence, config.qk_conv - 1)
    phase = "evaluation" if step is None else "training"
    rotation_seed = derive_seed("rotations", seed, phase, step or 0)
    return ForwardContext(
        dropout_seed,
        rotation_seed,
        coords,
        sequence,
        positions,
        mask,
        documents,
        starts,
        conv_documents,
        rotary,
        options.get("bucket_stats"),
        None if step is None else derive_seed("rotations", seed, phase, step + 1),
    )


def refuse_options(options: ForwardOptions) -> None:
    """Raises TypeError for any option beside a context."""
    if options:
        raise TypeError(
            f"{', '.join(options)}: no effect with context, which has the options of the model's forward"
        )


def call_options(module: CountsSteps, options: ForwardOptions, *, draws_rotations: bool) -> ForwardOptions:
    """Options of a forward of `module`, with the step that it counts if it draws rotations in training.

    Raises TypeError for unknown keywords.
    """
    given: dict[str, Any] = dict(options)
    known = [*ForwardOptions.__annotations__, *inspect.signature(module.forward).parameters]
    known = [name for name in known if name not in ("self", "options", "context", "cache", "x")]
    refuse_unknown_keywords(f"{type(module).__name__}.forward", given, known, FORWARD_COUNTERPARTS)
    is_decoding = isinstance(options.get("sequence"), DecodingState)
    if draws_rotations and module.training and options.get("step") is None and not is_decoding:
        return {**options, "step": module.count_step()}
    return options


@dataclass
class RecomputeCache:
    """Decisions of a layer's forward that its recompute must reuse.

    Hashing a reconstructed token again could move it to another bucket, since reconstruction rounds.
    """

    weights: LayerWeights | None = None
    """Of the layer, during its forward."""
    exchanges: dict[int, Exchange] = field(default_factory=dict)
    """Bucket ids, and the plan of exchanges between ranks, by layer."""
    query_ids: dict[int, Tensor] = field(default_factory=dict)
    """Bucket ids [B, H, R, S] of the queries of LSH cross attention, by layer."""
    key_ids: dict[int, Tensor] = field(default_factory=dict)
    """Bucket ids [B, H, R, T] of its keys, by layer."""
