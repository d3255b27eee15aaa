"""Unknown keywords are refused with the nearest one, or with the counterpart of another system's keyword."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches


def refuse_unknown_keywords(
    call: str, given: Mapping[str, object], known: Iterable[str], counterparts: Mapping[str, str]
) -> None:
    """Raises TypeError if a keyword given to `call` is not known. counterparts: of other systems' keywords."""
    names = list(known)
    unknown = [name for name in given if name not in names]
    if unknown:
        lines = [f"{name}={_show(given[name])}: {_advice(name, names, counterparts)}" for name in unknown]
        raise TypeError(f"{call}: no such keyword: " + "; ".join(lines))


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that `name` may be a misspelling of."""
    return next(iter(get_close_matches(name, known, n=1)), None)


def with_nearest(unknown: Iterable[str], known: Collection[str]) -> str:
    """The unknown names, each with the known one that it may be a misspelling of: "x (did you mean y?), z"."""
    similar = {name: nearest(name, known) for name in unknown}
    return ", ".join(f"{name} (did you mean {near}?)" if near else name for name, near in similar.items())


def _advice(name: str, known: Collection[str], counterparts: Mapping[str, str]) -> str:
    if name in counterparts:
        return f"use {counterparts[name]}"
    similar = nearest(name, known)
    return f"did you mean {similar}?" if similar else f"must be one of {', '.join(known)}"


def _show(value: object) -> str:
    shape = getattr(value, "shape", None)
    return repr(value)[:40] if shape is None else f"{type(value).__name__}{list(shape)}"


# Names in transformers, reformer_pytorch and torch, and what has that meaning in `ModelConfig`.
MODEL_CONFIG_COUNTERPARTS: Mapping[str, str] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "n_embd", "attention_hidden_size"), "dim"),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "n_layer"), "n_layers"),
    **dict.fromkeys(("num_attention_heads", "num_heads", "nhead", "heads", "n_head"), "n_heads"),
    **dict.fromkeys(("attention_head_size", "dim_head", "kdim"), "head_dim"),
    **dict.fromkeys(("num_hashes", "n_rounds"), "n_hashes"),
    "num_buckets": "n_buckets",
    "attn_layers": "layers, a pattern of lsh, local and exact",
    **dict.fromkeys(("feed_forward_size", "intermediate_size", "dim_feedforward"), "ff_dim"),
    **dict.fromkeys(("chunk_size_feed_forward", "ff_chunks"), "ff_chunk, a number of tokens"),
    "ff_glu": "activation='glu'",
    **dict.fromkeys(("hidden_act", "ff_activation"), "activation"),
    **dict.fromkeys(("hidden_dropout_prob", "post_attn_dropout"), "dropout"),
    **dict.fromkeys(
        ("lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob", "lsh_dropout"),
        "attention_dropout",
    ),
    "layer_dropout": "layer_drop",
    **dict.fromkeys(("lsh_attn_chunk_length", "bucket_size"), "window, or chunk_len with neighbours='chunk'"),
    "lsh_num_chunks_before": "n_chunks_before",
    "lsh_num_chunks_after": "n_chunks_after",
    "local_attn_chunk_length": "local_window",
    **dict.fromkeys(("is_decoder", "is_causal"), "causal"),
    "axial_pos_shape": "axial_shape",
    "axial_position_shape": "axial_shape",
    "axial_pos_embds_dim": "axial_dims",
    "axial_pos_embds": "position='axial'",
    "axial_position_emb": "position='axial'",
    "absolute_position_emb": "position='learned'",
    "fixed_position_emb": "position='sinusoidal'",
    "max_position_embeddings": "max_seq_len",
    "layer_norm_eps": "norm_eps",
    "use_scale_norm": "norm='scale'",
    "use_rezero": "norm='rezero'",
    **dict.fromkeys(("tie_word_embeddings", "weight_tie_embedding"), "tie_embeddings"),
    "weight_tie": "share_layers",
    "emb_dim": "embedding_dim",
    **dict.fromkeys(("vocab_size", "num_tokens"), "vocab_size of the model, as in ReformerLM(config, vocab_size)"),
}

_MASK = "key_padding_mask [B, S], True for real tokens"
_PAIRS = "causal of ModelConfig, and key_padding_mask for padding: there is no mask of pairs"
_DECODE = "sequence=reformer_dist.models.decoding.DecodingState(model.config)"
_CROSS = "ReformerEncoderDecoder, which attends to a source"
# Names in transformers, reformer_pytorch and torch, and what has that meaning in a forward call.
FORWARD_COUNTERPARTS: Mapping[str, str] = {
    **dict.fromkeys(("attention_mask", "input_mask", "mask", "padding_mask", "decoder_attention_mask"), _MASK),
    **dict.fromkeys(("src_key_padding_mask", "tgt_key_padding_mask"), f"{_MASK}: the opposite of torch's"),
    **dict.fromkeys(("attn_mask", "src_mask", "tgt_mask", "input_attn_mask", "is_causal"), _PAIRS),
    **dict.fromkeys(("input_ids", "decoder_input_ids"), "tokens [B, S]"),
    "inputs_embeds": "ReformerStack, which takes vectors [B, S, dim]",
    **dict.fromkeys(
        ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"), "document_ids [B, S], the document of each token"
    ),
    "pos_emb": "position of ModelConfig",
    **dict.fromkeys(("output_attentions", "need_weights", "return_attn"), "reformer_dist.inspect_attention"),
    **dict.fromkeys(("output_hidden_states", "return_embeddings"), "model.encode(tokens)"),
    **dict.fromkeys(("past_buckets_states", "past_key_values", "use_cache", "cache_position"), _DECODE),
    **dict.fromkeys(("return_loss", "target", "targets"), "labels"),
    "num_logits_to_keep": "logits_to_keep",
    "num_hashes": "n_hashes of ModelConfig",
    "return_dict": "the returned tensor itself",
    **dict.fromkeys(("keys", "context", "encoder_hidden_states", "encoder_outputs", "memory"), _CROSS),
    **dict.fromkeys(
        ("context_mask", "encoder_attention_mask", "memory_key_padding_mask"),
        "source_mask [B, T] of ReformerEncoderDecoder, True for real tokens",
    ),
    **dict.fromkeys(("global_step", "seed"), "step for rotations, dropout_seed for dropout"),
}
