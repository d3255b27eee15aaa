"""Export to the format of Hugging Face's transformers, for `from_pretrained`."""

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
ACTIVATIONS = {
    Activation.relu: "relu",
    Activation.gelu: "gelu",
    Activation.gelu_tanh: "gelu_new",
    Activation.silu: "silu",
}


def incompatibilities(config: ModelConfig, head: HeadKind) -> list[str]:
    """Config keys that transformers can't express, each with the reason and the supported value."""
    kinds = set(config.layer_kinds())
    has_lsh, has_local = AttentionKind.lsh in kinds, AttentionKind.local in kinds
    wraps = config.compat.chunk_wrap or not (has_lsh or has_local)
    checks: dict[str, bool | str] = {  # True if supported, else the reason
        "model.layers": AttentionKind.exact not in kinds or "they have no exact layers; must be lsh and local",
        "model.compat.merge_streams": config.is_concat or "their head reads both streams; must be concat",
        "model.neighbours": not has_lsh
        or config.neighbours is NeighbourRule.chunk
        or "they support chunks only; must be chunk",
        "model.compat.chunk_wrap": wraps or "their first chunk attends to the last one; must be true",
        "model.compat.local_chunk_len": not has_local
        or config.compat.local_chunk_len > 0
        or "their local attention is in chunks; must be positive",
        "model.position": config.position in (Position.axial, Position.learned) or "must be axial or learned",
        "model.compat.axial_sum": not config.compat.axial_sum or "they concatenate the sides; must be false",
        "model.axial_shape": config.position is not Position.axial
        or len(config.axial_shape) == 2
        or "their model evaluates with two sides only; must have two",
        "model.activation": config.activation in ACTIVATIONS or "must be relu, gelu, gelu_tanh or silu",
        "model.tie_embeddings": not config.tie_embeddings or "their head has its own weights; must be false",
        "model.embedding_dim": config.embedding_dim is None
        or "their embedding has the model's width; must be null",
        "model.norm": config.norm is Norm.layer or "they support layer norm only; must be layer",
        "model.one_value_head": not config.one_value_head
        or "each of their heads has its own values; must be false",
        "model.compat.attention_bias": not config.compat.attention_bias
        or "their output projection has no bias; must be false",
        "model.hash_scheme": config.hash_scheme is HashScheme.rotation or "must be rotation",
        "model.count_pairs_once": not config.count_pairs_once or "they count a pair in every round; must be false",
        "model.shared_qk": not has_lsh
        or config.shared_qk
        or "their LSH layers share queries and keys; must be true",
        "model.next_value_heads": config.next_value_heads == 0 or "they have no such heads; must be 0",
        "model.qk_conv": config.qk_conv == 0 or "they have no convolutions; must be 0",
        "model.local_round": not config.local_round or "they have none; must be false",
        "model.n_buckets": not has_lsh or config.n_buckets > 1 or "must be at least 2",
    }
    reasons = [f"{key}: {reason}" for key, reason in checks.items() if isinstance(reason, str)]
    if head is HeadKind.sequence_classification and config.pooling is not Pooling.first:
        reasons.append("model.pooling: they classify the first token; must be first")
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
    """(config.json, tensors by name in transformers). Raises CheckpointError if it can't express the model."""
    reasons = incompatibilities(config, head)
    if reasons:
        lines = "".join(f"\n  {line}" for line in reasons)
        raise CheckpointError(f"transformers can't express this model:{lines}")
    names = tensor_names(config, head)
    tensors = {hf_name: _convert_tensor(config, name, weights) for name, hf_name in names}
    if head is HeadKind.language_model:
        tensors["lm_head.decoder.bias"] = tensors["lm_head.bias"].clone()
    return {**_options(config, head, vocab_size, classes), "eos_token_id": eos_id}, tensors


def _convert_tensor(config: ModelConfig, name: str, weights: Mapping[str, Tensor]) -> Tensor:
    path = name.split(".")
    stored = list(path)
    if config.share_layers and path[1] == "blocks":
        use, block = divmod(int(path[2]), config.n_blocks)
        stored[2] = str(block)  # the layer that has the parameters
        if config.compat.norm_per_layer and path[3].endswith("_norm"):
            stored.insert(4, str(use))
    tensor = weights[".".join(stored)].detach().float()
    if "tables" in path:
        side = int(path[-1])
        shape = [1] * len(config.axial_shape)
        shape[side] = config.axial_shape[side]
        return tensor.reshape(*shape, -1).clone()
    if path[-2] == "to_q" and config.layer_kinds()[int(path[2])] is AttentionKind.lsh:
        # keys are normalized, so qk_scale can be folded into the queries
        return tensor * config.qk_scale
    return tensor.clone()


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
        "chunk_size_feed_forward": 0,  # same results, and transformers requires lengths that are multiples of it
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
        options["problem_type"] = "single_label_classification"
        options["label2id"] = {name: label for label, name in enumerate(classes)}
    return options
