"""Ours as a directory that `from_pretrained` of Hugging Face's transformers reads, where theirs can express it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from reformer_dist.config import (
    Activation,
    AttentionKind,
    HashScheme,
    ModelConfig,
    NeighbourRule,
    Norm,
    Pooling,
    Position,
)
from reformer_dist.errors import CheckpointError
from reformer_dist.interop.foreign import HeadKind
from reformer_dist.interop.hugging_face import tensor_names
from reformer_dist.ops.lsh.hashing import LARGEST_FACTOR, bucket_factors

CLASSES = {
    HeadKind.sequence_classification: "ReformerForSequenceClassification",
    HeadKind.question_answering: "ReformerForQuestionAnswering",
}
ACTIVATIONS = {Activation.relu: "relu", Activation.gelu: "gelu", Activation.gelu_tanh: "gelu_new"}


def incompatibilities(config: ModelConfig, head: HeadKind) -> list[str]:
    """Keys by which a model differs from all of theirs, each with the reason."""
    kinds = set(config.layer_kinds())
    has_lsh, has_local = AttentionKind.lsh in kinds, AttentionKind.local in kinds
    wraps = config.compat.chunk_wrap or not (has_lsh or has_local)
    findings = {
        "model.layers": AttentionKind.exact not in kinds or "they have no exact layers",
        "model.compat.merge_streams": config.is_concat or "their head takes both streams: concat",
        "model.neighbours": not has_lsh or config.neighbours is NeighbourRule.chunk or "they know chunks alone",
        "model.compat.chunk_wrap": wraps or "their first chunk sees the last one: true",
        "model.compat.local_chunk_len": not has_local
        or config.compat.local_chunk_len > 0
        or "their local attention is in chunks",
        "model.position": config.position in (Position.axial, Position.learned) or "they know axial and learned",
        "model.compat.axial_sum": not config.compat.axial_sum or "their sides stand side by side: false",
        "model.axial_shape": config.position is not Position.axial
        or len(config.axial_shape) == 2
        or "their model evaluates two sides only",
        "model.activation": config.activation in ACTIVATIONS or "they know relu, gelu and gelu_tanh",
        "model.tie_embeddings": not config.tie_embeddings or "their head has a table of its own: false",
        "model.embedding_dim": config.embedding_dim is None or "their embedding is as wide as the model: null",
        "model.norm": config.norm is Norm.layer or "they know layer norm alone",
        "model.one_value_head": not config.one_value_head or "their heads have values of their own: false",
        "model.compat.attention_bias": not config.compat.attention_bias or "their output projection has no bias: false",
        "model.hash_scheme": config.hash_scheme is HashScheme.rotation or "they know rotation alone",
        "model.count_pairs_once": not config.count_pairs_once or "they count every meeting: false",
        "model.local_round": not config.local_round or "they have none: false",
        "model.n_buckets": not has_lsh or config.n_buckets > 1 or "theirs are at least 2",
    }
    reasons = [f"{key}: {found}" for key, found in findings.items() if isinstance(found, str)]
    if head is HeadKind.sequence_classification and config.pooling is not Pooling.first:
        reasons.append("model.pooling: their class is decided by the first token: first")
    return reasons


def model_files(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    vocab_size: int,
    head: HeadKind = HeadKind.language_model,
    *,
    classes: Sequence[str] = (),
    eos_id: int = 2,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, tensors by their names) of our model. Raises CheckpointError where theirs can't express it."""
    found = incompatibilities(config, head)
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        raise CheckpointError(f"transformers has no Reformer that computes what this model does:{lines}")
    named = {theirs: _tensor(config, ours, weights) for ours, theirs in tensor_names(config, head)}
    if head is HeadKind.language_model:
        named["lm_head.decoder.bias"] = named["lm_head.bias"].clone()
    return {**_options(config, head, vocab_size, classes), "eos_token_id": eos_id}, named


def _tensor(config: ModelConfig, ours: str, weights: Mapping[str, Tensor]) -> Tensor:
    tensor = weights[_shared(config, ours)].detach().float()
    words = ours.split(".")
    if "tables" in words:
        side = int(words[-1])
        shape = [1] * len(config.axial_shape)
        shape[side] = config.axial_shape[side]
        return tensor.reshape(*shape, -1).clone()
    if words[-2] == "to_q" and config.layer_kinds()[int(words[2])] is AttentionKind.lsh:
        # keys are normed, so that the scale of scores is that of queries
        return tensor * config.qk_scale
    return tensor.clone()


def _shared(config: ModelConfig, name: str) -> str:
    """The name under which a parameter of a layer lies that shares its parameters."""
    words = name.split(".")
    if config.share_layers and words[1] == "blocks":
        words[2] = str(int(words[2]) % len(config.layers))
    return ".".join(words)


def _options(config: ModelConfig, head: HeadKind, vocab_size: int, classes: Sequence[str]) -> dict[str, Any]:
    lm_class = "ReformerModelWithLMHead" if config.causal else "ReformerForMaskedLM"
    is_axial = config.position is Position.axial
    factors = list(config.compat.bucket_factors or bucket_factors(config.n_buckets, LARGEST_FACTOR["rotation"]))
    options: dict[str, Any] = {
        "architectures": [CLASSES.get(head, lm_class)],
        "model_type": "reformer",
        "attention_head_size": config.resolved_head_dim,
        "attn_layers": [kind.name for kind in config.layer_kinds()],
        "axial_pos_embds": is_axial,
        "axial_pos_shape": config.axial_shape,
        "axial_pos_embds_dim": config.resolved_axial_dims if is_axial else [1] * len(config.axial_shape),
        "chunk_size_feed_forward": 0,  # the same numbers, and there a length must be a multiple of it
        "chunk_size_lm_head": 0,
        "feed_forward_size": config.resolved_ff_dim,
        "hash_seed": config.compat.hash_seed,
        "hidden_act": ACTIVATIONS[config.activation],
        "hidden_dropout_prob": config.dropout,
        "hidden_size": config.dim,
        "is_decoder": config.causal,
        "layer_norm_eps": config.norm_eps,
        "local_attention_probs_dropout_prob": config.attention_dropout,
        "local_attn_chunk_length": config.compat.local_chunk_len or config.chunk_len,
        "local_num_chunks_before": config.compat.local_chunks_before,
        "local_num_chunks_after": config.compat.local_chunks_after,
        "lsh_attention_probs_dropout_prob": config.attention_dropout,
        "lsh_attn_chunk_length": config.chunk_len,
        "lsh_num_chunks_before": config.n_chunks_before,
        "lsh_num_chunks_after": config.n_chunks_after,
        "max_position_embeddings": math.prod(config.axial_shape) if is_axial else config.max_seq_len,
        "num_attention_heads": config.n_heads,
        "num_buckets": factors[0] if len(factors) == 1 else factors,
        "num_hashes": config.n_hashes,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "vocab_size": vocab_size,
    }
    if head is HeadKind.sequence_classification:
        options["id2label"] = {str(label): name for label, name in enumerate(classes)}
        options["label2id"] = {name: label for label, name in enumerate(classes)}
    return options
