"""Import of Reformer models of Hugging Face's transformers, from config.json and safetensors.

Written for transformers 4.57.6; docs/interop.md lists what is equal and to what tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reformer_dist.config import (
    Activation,
    AttentionKind,
    CompatConfig,
    ModelConfig,
    NeighbourRule,
    Pooling,
    Position,
    StreamMerge,
)
from reformer_dist.errors import CheckpointError
from reformer_dist.interop.foreign import (
    CONFIG_FILE,
    ForeignModel,
    ForeignOptions,
    ForeignTensors,
    HeadKind,
    parameter_shapes,
    reshape_checked,
)
from reformer_dist.models import ReformerForQuestionAnswering, ReformerForSequenceClassification, ReformerLM

ACTIVATIONS = {
    "relu": Activation.relu,
    "gelu": Activation.gelu,
    "gelu_new": Activation.gelu_tanh,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "silu": Activation.silu,
    "swish": Activation.silu,
}
HEAD_TENSORS = {
    "lm_head.decoder.weight": HeadKind.language_model,
    "classifier.dense.weight": HeadKind.sequence_classification,
    "qa_outputs.weight": HeadKind.question_answering,
}
LM_BIAS = ("lm_head.bias", "lm_head.decoder.bias")
FLOAT = (int, float)
# (only supported value, reason)
WITHOUT_COUNTERPART: dict[str, tuple[Any, str]] = {
    "is_encoder_decoder": (False, "their Reformer has no encoder; must be false"),
    "add_cross_attention": (False, "their Reformer has no cross attention; must be false"),
    "tie_encoder_decoder": (False, "their Reformer has no encoder; must be false"),
    "cross_attention_hidden_size": (None, "their Reformer has no cross attention; must be null"),
    "pruned_heads": ({}, "every layer here has all of its heads; must be empty"),
    "sinusoidal_pos_embds": (False, "their positions are axial or learned; must be false"),
}
# options of transformers 4.57.6 that choose outputs, weights at the start, or how text is generated
WITHOUT_EFFECT = (
    *("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "tokenizer_class"),
    *("_attn_implementation_autoset", "finetuning_task", "task_specific_params", "prefix", "return_dict"),
    *("output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate", "use_cache"),
    *("initializer_range", "axial_norm_std", "chunk_size_lm_head", "torchscript", "use_bfloat16"),
    *("tf_legacy_loss", "label2id", "num_labels", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("sep_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "do_sample"),
    *("max_length", "min_length", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "remove_invalid_values"),
    # of versions that published models were written with
    *("attention_probs_dropout_prob", "intermediate_size", "num_chunks_before", "num_chunks_after"),
    *("output_past", "gradient_checkpointing"),
)


def read(directory: Path) -> ForeignModel:
    """Reads a directory written by `save_pretrained`. Raises CheckpointError."""
    options = ForeignOptions.read(directory / CONFIG_FILE)
    kind = options.take("model_type")
    if kind != "reformer":
        raise CheckpointError(f"{options.path}: model_type={kind!r}: can't be converted; must be reformer")
    tensors = ForeignTensors(directory)
    head = next((head for name, head in HEAD_TENSORS.items() if name in tensors.names()), None)
    if head is None:
        known = ", ".join(HEAD_TENSORS)
        raise CheckpointError(f"{directory}: has no head: none of {known} is present; save a model with a head")
    notes: list[str] = []
    options.refuse_other_values(WITHOUT_COUNTERPART)
    for name in WITHOUT_EFFECT:
        options.take(name)
    config = model_config(options, notes)
    vocab_size: int = options.take("vocab_size", 320, kind=int)
    is_classifier = head is HeadKind.sequence_classification
    names, problem_type = options.take("id2label"), options.take("problem_type")
    if is_classifier and problem_type not in (None, "single_label_classification"):
        options.refuse(
            "problem_type", "one of several classes is predicted here; must be single_label_classification"
        )
    if options.take("classifier_dropout") not in (None, config.dropout) and is_classifier:
        notes.append(f"classifier_dropout: model.dropout={config.dropout} is used in the head too")
    classes = _classes(names, tensors) if is_classifier else []
    if classes:
        config = replace(config, pooling=Pooling.first)
    weights = _weights(tensors, head, config, vocab_size, len(classes))
    has_mask = options.take("mask_token_id") == vocab_size - 1
    options.refuse_unknown("the Reformer of transformers")
    return ForeignModel("Hugging Face", head, config, vocab_size, weights, notes, classes, has_mask)


def _classes(names: Any, tensors: ForeignTensors) -> list[str]:
    n_classes = tensors.get("classifier.out_proj.bias").numel()
    if n_classes < 2:
        problem = "has a single output, which transformers trains as a regression; must have two or more classes"
        raise CheckpointError(f"{tensors.directory}: classifier.out_proj {problem}")
    if not isinstance(names, dict) or len(names) != n_classes:
        return [str(label) for label in range(n_classes)]
    return [str(names.get(str(label), label)) for label in range(n_classes)]


def model_config(options: ForeignOptions, notes: list[str]) -> ModelConfig:
    """Converts options of transformers to a ModelConfig. Raises CheckpointError. Appends to notes."""
    layer_names = options.take("attn_layers", ["local", "lsh"] * 3, kind=list)
    if not layer_names or not set(layer_names) <= {"local", "lsh"}:
        options.refuse("attn_layers", "must name local and lsh layers")
    if options.take("num_hidden_layers", len(layer_names)) != len(layer_names):
        options.refuse("num_hidden_layers", f"must be {len(layer_names)}, as many as attn_layers names")
    layers = [AttentionKind[name] for name in layer_names]
    dim: int = options.take("hidden_size", 256, kind=int)
    chunk_len: int = options.take("lsh_attn_chunk_length", 64, kind=int)
    factors = _bucket_factors(options, chunk_len, AttentionKind.lsh in layers, notes)
    hidden_dropout = float(options.take("hidden_dropout_prob", 0.05, kind=FLOAT))
    if options.take("tie_word_embeddings", False):
        options.refuse(
            "tie_word_embeddings", "the head is twice as wide, so it fails in transformers too; must be false"
        )
    return ModelConfig(
        dim=dim,
        n_layers=len(layers),
        n_heads=options.take("num_attention_heads", 12, kind=int),
        head_dim=options.take("attention_head_size", 64, kind=int),
        layers=_shortest_period(layers),
        causal=options.take("is_decoder", False, kind=bool),
        n_hashes=options.take("num_hashes", 1, kind=int),
        n_buckets=math.prod(factors),
        neighbours=NeighbourRule.chunk,
        chunk_len=chunk_len,
        n_chunks_before=options.take("lsh_num_chunks_before", 1, kind=int),
        n_chunks_after=options.take("lsh_num_chunks_after", 0, kind=int),
        ff_dim=options.take("feed_forward_size", 512, kind=int),
        ff_chunk=options.take("chunk_size_feed_forward", 0, kind=int),
        activation=options.take_choice("hidden_act", ACTIVATIONS, "relu"),
        norm_eps=float(options.take("layer_norm_eps", 1e-12, kind=FLOAT)),
        dropout=hidden_dropout,
        ff_dropout=hidden_dropout,
        attention_dropout=_attention_dropout(options, layers, notes),
        compat=CompatConfig(
            bucket_factors=factors,
            hash_seed=options.take("hash_seed", None),
            chunk_wrap=True,
            local_chunk_len=options.take("local_attn_chunk_length", 64, kind=int),
            local_chunks_before=options.take("local_num_chunks_before", 1, kind=int),
            local_chunks_after=options.take("local_num_chunks_after", 0, kind=int),
            merge_streams=StreamMerge.concat,
        ),
        **_positions(options, dim),
    )


def _shortest_period(layers: list[AttentionKind]) -> list[AttentionKind]:
    """The shortest pattern whose repetition yields the layers."""
    lengths = range(1, len(layers) + 1)
    return next(layers[:n] for n in lengths if all(kind is layers[i % n] for i, kind in enumerate(layers)))


def _bucket_factors(options: ForeignOptions, chunk_len: int, has_lsh: bool, notes: list[str]) -> list[int]:
    factors = options.take_factors("num_buckets")
    if factors is not None:
        return factors
    max_len: int = options.take("max_position_embeddings", 4096, kind=int)
    factors = buckets_for(max_len, chunk_len, max_len)
    if has_lsh:
        notes.append(
            f"num_buckets is not set: transformers derives it from a model's first input; set for the longest, "
            f"{max_len} tokens: {math.prod(factors)} (model.n_buckets and model.compat.bucket_factors)"
        )
    return factors


def buckets_for(seq_len: int, chunk_len: int, max_positions: int) -> list[int]:
    """The factors that transformers chooses for an input of seq_len tokens if num_buckets is not set."""
    bits = max(1, (2 * (seq_len // chunk_len)).bit_length() - 1)
    limit = 2 * max(int((max_positions // chunk_len) ** 0.5), chunk_len)
    return [2**bits] if 2**bits <= limit else [2 ** (bits // 2), 2 ** (bits - bits // 2)]


def _attention_dropout(options: ForeignOptions, layers: list[AttentionKind], notes: list[str]) -> float:
    by_kind = {
        AttentionKind.local: float(options.take("local_attention_probs_dropout_prob", 0.05, kind=FLOAT)),
        AttentionKind.lsh: float(options.take("lsh_attention_probs_dropout_prob", 0.0, kind=FLOAT)),
    }
    rates = {by_kind[kind] for kind in layers}
    if len(rates) > 1:
        notes.append(f"attention dropout differs by kind of layer in transformers; {min(rates)} is used for all")
    return min(rates)


def _positions(options: ForeignOptions, dim: int) -> dict[str, Any]:
    max_seq_len: int = options.take("max_position_embeddings", 4096, kind=int)
    shape = list(options.take("axial_pos_shape", [64, 64], kind=list))
    dims = list(options.take("axial_pos_embds_dim", [64, 192], kind=list))
    if not options.take("axial_pos_embds", True, kind=bool):
        return {"position": Position.learned, "max_seq_len": max_seq_len}
    if len(dims) != len(shape) or sum(dims) != dim:
        options.refuse("axial_pos_embds_dim", f"must be {len(shape)} widths that sum to hidden_size={dim}")
    return {"position": Position.axial, "axial_shape": shape, "axial_dims": dims}


def _weights(
    tensors: ForeignTensors, head: HeadKind, config: ModelConfig, vocab_size: int, n_classes: int
) -> dict[str, Tensor]:
    names = dict(tensor_names(config, head))
    if head is HeadKind.language_model:
        names["head.bias"] = next((name for name in LM_BIAS if name in tensors.names()), LM_BIAS[0])
    # mask_value: constants that versions before 4.0 saved among the weights
    unexpected = {name for name in tensors.names() if "mask_value" not in name} - {*names.values(), *LM_BIAS}
    if unexpected:
        problem = "is not in the model its options describe"
        raise CheckpointError(f"{tensors.directory}: tensor {min(unexpected)} {problem}")
    builders: dict[HeadKind, Callable[[], nn.Module]] = {
        HeadKind.language_model: lambda: ReformerLM(config, vocab_size),
        HeadKind.sequence_classification: lambda: ReformerForSequenceClassification(config, vocab_size, n_classes),
        HeadKind.question_answering: lambda: ReformerForQuestionAnswering(config, vocab_size),
    }
    shapes = parameter_shapes(builders[head])
    return {
        name: reshape_checked(tensors.get(hf_name), shapes[name], hf_name, tensors.directory)
        for name, hf_name in names.items()
    }


def tensor_names(config: ModelConfig, head: HeadKind) -> Iterator[tuple[str, str]]:
    """(our name, name in transformers) of every parameter."""
    yield "embedding.tokens.weight", "reformer.embeddings.word_embeddings.weight"
    if config.position is Position.axial:
        for side in range(len(config.axial_shape)):
            yield f"embedding.positions.tables.{side}", f"reformer.embeddings.position_embeddings.weights.{side}"
    else:
        yield "embedding.positions.table", "reformer.embeddings.position_embeddings.embedding.weight"
    for layer, kind in enumerate(config.layer_kinds()):
        yield from _layer_names(f"stack.blocks.{layer}", f"reformer.encoder.layers.{layer}", kind)
    yield from _weight_and_bias("stack.norm", "reformer.encoder.layer_norm")
    if head is HeadKind.language_model:
        yield "head.weight", "lm_head.decoder.weight"
        yield "head.bias", LM_BIAS[0]
    elif head is HeadKind.sequence_classification:
        yield from _weight_and_bias("head.dense", "classifier.dense")
        yield from _weight_and_bias("head.to_logits", "classifier.out_proj")
    else:
        yield from _weight_and_bias("head", "qa_outputs")


def _layer_names(prefix: str, hf_prefix: str, kind: AttentionKind) -> Iterator[tuple[str, str]]:
    attention = f"{hf_prefix}.attention.self_attention"
    yield from _weight_and_bias(f"{prefix}.attention_norm", f"{hf_prefix}.attention.layer_norm")
    if kind is AttentionKind.lsh:
        yield f"{prefix}.attention.to_q.weight", f"{attention}.query_key.weight"
    else:
        yield f"{prefix}.attention.to_q.weight", f"{attention}.query.weight"
        yield f"{prefix}.attention.to_k.weight", f"{attention}.key.weight"
    yield f"{prefix}.attention.to_v.weight", f"{attention}.value.weight"
    yield f"{prefix}.attention.to_out.weight", f"{hf_prefix}.attention.output.dense.weight"
    yield from _weight_and_bias(f"{prefix}.feed_forward_norm", f"{hf_prefix}.feed_forward.layer_norm")
    yield from _weight_and_bias(f"{prefix}.feed_forward.to_inner", f"{hf_prefix}.feed_forward.dense.dense")
    yield from _weight_and_bias(f"{prefix}.feed_forward.to_out", f"{hf_prefix}.feed_forward.output.dense")


def _weight_and_bias(name: str, hf_name: str) -> Iterator[tuple[str, str]]:
    for part in ("weight", "bias"):
        yield f"{name}.{part}", f"{hf_name}.{part}"
