"""Classes with reformer_pytorch's names and options, for new models.

The table `OPTIONS` maps every option to a config key, or states why it has no counterpart and what to use instead;
no option is ignored silently. Inputs may have any length, so there is no Autopadder. `reformer-convert` imports
weights trained with reformer_pytorch and keeps its arithmetic. New models have this library's arithmetic: a window
within each bucket instead of chunks across buckets, strictly causal, with logits q.k / |k| as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from reformer_dist import models
from reformer_dist.config import Activation, AttentionKind, CompatConfig, ModelConfig, Norm, Position
from reformer_dist.config.keywords import with_nearest
from reformer_dist.errors import ConfigError
from reformer_dist.models.context import ForwardOptions

ConfigKeys = dict[str, Any]
Options = Mapping[str, Any]
"""All options of a call, by their names in reformer_pytorch."""
Convert = Callable[[Any, Options], ConfigKeys]


@dataclass(frozen=True)
class OptionRule:
    """Conversion of one option."""

    convert: Convert
    """Maps the option's value and all options to keys of ModelConfig."""
    note: str
    """For the table in docs/library.md; if the option is refused, the reason and the alternative."""
    accepts: Callable[[Any], bool] = lambda _value: True
    """False for values without a counterpart."""


def _set(name: str) -> Convert:
    return lambda value, _options: {name: value}


def _drop(_value: Any, _options: Options) -> ConfigKeys:
    return {}


def _renamed(name: str) -> OptionRule:
    return OptionRule(_set(name), f"`{name}`")


def _unsupported(note: str) -> OptionRule:
    return OptionRule(_drop, note, accepts=lambda value: not value)


def _ignored(note: str) -> OptionRule:
    return OptionRule(_drop, note)


def _buckets(bucket_size: int, options: Options) -> ConfigKeys:
    n_buckets = max(1, math.ceil(options["max_seq_len"] / bucket_size))
    # as many keys as a chunk and the previous one; a bidirectional window extends both ways
    window = 2 * bucket_size if options["causal"] else bucket_size
    return {"n_buckets": n_buckets + n_buckets % 2 if n_buckets > 1 else 1, "window": window}


def _axial(_is_axial: bool, options: Options) -> ConfigKeys:
    if not options["axial_position_emb"]:
        return {}
    size = options["bucket_size"]
    shape = options["axial_position_shape"] or (math.ceil(options["max_seq_len"] / size), size)
    return {"position": Position.axial, "axial_shape": list(shape), "compat": CompatConfig(axial_sum=True)}


def _activation(layer: Any, options: Options) -> ConfigKeys:
    name = "gelu" if layer in (None, nn.GELU) else "relu"
    return {"activation": Activation.glu if options.get("ff_glu") else Activation[name]}


def _if_true(keys: ConfigKeys) -> Convert:
    return lambda value, _options: keys if value else {}


OPTIONS: dict[str, OptionRule] = {
    "num_tokens": OptionRule(_drop, "`vocab_size` of the model"),
    "dim": _renamed("dim"),
    "depth": _renamed("n_layers"),
    "heads": _renamed("n_heads"),
    "dim_head": _renamed("head_dim"),
    "max_seq_len": OptionRule(_set("max_seq_len"), "`n_buckets`, and the rows of a learned position table"),
    "bucket_size": OptionRule(_buckets, "`window`; with max_seq_len also `n_buckets`"),
    "n_hashes": _renamed("n_hashes"),
    "causal": _renamed("causal"),
    "ff_chunks": OptionRule(
        lambda chunks, options: {"ff_chunk": math.ceil(options["max_seq_len"] / chunks) if chunks > 1 else 0},
        "`ff_chunk`: tokens per chunk instead of the number of chunks",
        accepts=lambda chunks: chunks >= 1,
    ),
    "attn_chunks": _ignored("not needed: attention always runs over a few heads and rows at a time"),
    "weight_tie": _renamed("share_layers"),
    "lsh_dropout": _renamed("attention_dropout"),
    "dropout": _renamed("attention_dropout"),
    "ff_dropout": _renamed("ff_dropout"),
    "post_attn_dropout": OptionRule(
        _set("dropout"), "`dropout`, which applies to the embedding and to the output of each sublayer"
    ),
    "layer_dropout": _renamed("layer_drop"),
    "ff_activation": OptionRule(
        _activation,
        "`activation`: None and nn.GELU are gelu, nn.ReLU is relu; others are not supported",
        accepts=lambda layer: layer in (None, nn.GELU, nn.ReLU),
    ),
    "ff_mult": _renamed("ff_mult"),
    "ff_glu": OptionRule(_drop, "`activation=glu`, gated by GELU"),
    "lsh_attend_across_buckets": _ignored("no effect: a token attends to its own bucket only"),
    "attend_across_buckets": _ignored("no effect: a token attends to its own bucket only"),
    "lsh_allow_duplicate_attention": OptionRule(
        lambda allowed, _options: {"count_pairs_once": not allowed}, "`count_pairs_once`, negated"
    ),
    "allow_duplicate_attention": OptionRule(
        lambda allowed, _options: {"count_pairs_once": not allowed}, "`count_pairs_once`, negated"
    ),
    "random_rotations_per_head": _ignored("no effect: each head always has its own rotations"),
    "use_scale_norm": OptionRule(_if_true({"norm": Norm.scale}), "`norm=scale`"),
    "use_rezero": OptionRule(_if_true({"norm": Norm.rezero}), "`norm=rezero`"),
    "use_full_attn": OptionRule(_if_true({"layers": [AttentionKind.exact]}), "`layers=[exact]`"),
    "full_attn_thres": _unsupported(
        "the kind of attention does not depend on the length here; omit it, or use use_full_attn=True"
    ),
    "reverse_thres": _ignored("not needed: gradients match plain autograd at any length"),
    "num_mem_kv": _unsupported("every key belongs to a bucket here; omit it"),
    "one_value_head": _renamed("one_value_head"),
    "n_local_attn_heads": _unsupported(
        "heads of a layer are of one kind here; omit it, and use ModelConfig(layers=[local, lsh])"
    ),
    "pkm_layers": _unsupported("there are no product-key memories here; omit it, or use a larger ff_mult"),
    "pkm_num_keys": _ignored("no effect without pkm_layers"),
    "emb_dim": _renamed("embedding_dim"),
    "return_embeddings": _unsupported("omit it, and call model.net.encode(tokens)"),
    "weight_tie_embedding": _renamed("tie_embeddings"),
    "fixed_position_emb": OptionRule(_if_true({"position": Position.sinusoidal}), "`position=sinusoidal`"),
    "absolute_position_emb": OptionRule(_if_true({"position": Position.learned}), "`position=learned`"),
    "axial_position_emb": OptionRule(
        _axial, "`position=axial` with `compat.axial_sum`; without any of the three, `rotary`"
    ),
    "axial_position_shape": OptionRule(_drop, "`axial_shape`"),
    "return_attn": _unsupported("omit it, and call reformer_dist.inspect_attention"),
    "rehash_each_round": OptionRule(_drop, "each round has its own hash here; omit it", accepts=bool),
    "drop_for_hash_rate": _unsupported("training and evaluation hash the same way here; omit it"),
}
SHARED_DEFAULTS: ConfigKeys = {
    "heads": 8,
    "dim_head": None,
    "bucket_size": 64,
    "n_hashes": 8,
    "causal": False,
    "attn_chunks": 1,
    "random_rotations_per_head": False,
    "num_mem_kv": 0,
    "one_value_head": False,
    "use_full_attn": False,
    "full_attn_thres": 0,
    "post_attn_dropout": 0.0,
    "n_local_attn_heads": 0,
}
STACK_DEFAULTS: ConfigKeys = SHARED_DEFAULTS | {
    "ff_chunks": 100,
    "weight_tie": False,
    "lsh_dropout": 0.0,
    "ff_dropout": 0.0,
    "ff_activation": None,
    "ff_mult": 4,
    "ff_glu": False,
    "layer_dropout": 0.0,
    "use_scale_norm": False,
    "use_rezero": False,
    "reverse_thres": 0,
    "pkm_layers": (),
    "pkm_num_keys": 128,
}
DEFAULTS: dict[str, ConfigKeys] = {
    "Reformer": STACK_DEFAULTS
    | {"attn_chunks": None, "lsh_attend_across_buckets": True, "lsh_allow_duplicate_attention": True},
    "ReformerLM": STACK_DEFAULTS
    | {
        "n_hashes": 4,
        "dim_head": 64,
        "emb_dim": None,
        "return_embeddings": False,
        "weight_tie_embedding": False,
        "fixed_position_emb": False,
        "absolute_position_emb": False,
        "axial_position_emb": False,
        "axial_position_shape": None,
    },
    "LSHSelfAttention": SHARED_DEFAULTS
    | {
        "attend_across_buckets": True,
        "allow_duplicate_attention": True,
        "full_attn_thres": None,
        "return_attn": False,
        "dropout": 0.0,
        "rehash_each_round": True,
        "drop_for_hash_rate": 0.0,
    },
}
"""Options of each class of reformer_pytorch, except sizes, with their defaults."""

KEYWORDS: dict[str, str] = {
    "keys": "layers attend to their own sequence only; use ReformerEncoderDecoder for cross attention",
    "context_mask": "no meaning without keys; ReformerEncoderDecoder takes source_mask",
    "input_attn_mask": "buckets, causal and input_mask determine which tokens attend to each other; "
    "a mask of all pairs would cost what LSH attention saves; omit it",
    "pos_emb": "models have their own positions; omit it, or build a layer with ModelConfig(position=rotary)",
    "arg_route": "there is no argument routing; omit it",
}
"""Keywords of reformer_pytorch's forward except input_mask, with the reason and the alternative."""


def to_config(name: str, sizes: ConfigKeys, options: ConfigKeys) -> ModelConfig:
    """The configuration for a constructor call of reformer_pytorch's class `name`.

    Raises ConfigError, which names every option without a counterpart, the reason and the alternative.
    """
    unknown = sorted(options.keys() - DEFAULTS[name].keys())
    if unknown:
        raise ConfigError(f"{name}: reformer_pytorch has no option {with_nearest(unknown, DEFAULTS[name])}")
    values = DEFAULTS[name] | options | sizes
    refused = {option: OPTIONS[option] for option, value in values.items() if not OPTIONS[option].accepts(value)}
    if refused:
        lines = [f"{option}={values[option]!r}: {rule.note}" for option, rule in refused.items()]
        raise ConfigError("\n".join([f"{name}: no counterpart here for", *lines]))
    # reformer_pytorch's bare stack has none; rotary ones do no harm to a caller who adds others to the input
    head_dim = values["dim_head"] or values["dim"] // values["heads"]
    is_rotary = name == "ReformerLM" or (name == "Reformer" and head_dim % 2 == 0)
    position = Position.rotary if is_rotary else Position.sinusoidal
    keys: ConfigKeys = {"position": position, "layers": [AttentionKind.lsh]}
    for option, value in values.items():
        keys |= OPTIONS[option].convert(value, values)
    return ModelConfig(**keys)


def _refuse_keywords(keywords: Options) -> None:
    names = [name for name, value in keywords.items() if value is not None]
    unknown = sorted(set(names) - KEYWORDS.keys())
    if unknown:
        known = [*KEYWORDS, "input_mask"]
        raise ConfigError(f"forward: reformer_pytorch has no keyword {with_nearest(unknown, known)}")
    if names:
        lines = [f"{name}: {KEYWORDS[name]}" for name in names]
        raise ConfigError("\n".join(["forward: no counterpart here for", *lines]))


class _Adapter(nn.Module):
    """Calls `net` with the arguments of reformer_pytorch's forward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, input_mask: Tensor | None = None, **keywords: Any) -> Tensor:
        """input_mask [B, S]: True for real tokens. Raises ConfigError for the unsupported `KEYWORDS`."""
        _refuse_keywords(keywords)
        options: ForwardOptions = {"key_padding_mask": input_mask}
        out: Tensor = self.net(x, **options)
        return out


class Reformer(_Adapter):
    """reformer_pytorch's Reformer: `net` is a `ReformerStack`, [B, S, dim] -> [B, S, dim] at any length S.

    max_seq_len: the length for which the number of buckets is chosen.
    """

    def __init__(self, dim: int, depth: int, *, max_seq_len: int = 8192, **options: Any) -> None:
        config = to_config("Reformer", {"dim": dim, "depth": depth, "max_seq_len": max_seq_len}, options)
        super().__init__(models.ReformerStack(config))
        models.init_weights(self.net, config, seed=0)


class ReformerLM(_Adapter):
    """reformer_pytorch's ReformerLM: `net` is ours, [B, S] -> logits [B, S, num_tokens] at any length S."""

    def __init__(self, num_tokens: int, dim: int, depth: int, max_seq_len: int, **options: Any) -> None:
        sizes = {"num_tokens": num_tokens, "dim": dim, "depth": depth, "max_seq_len": max_seq_len}
        super().__init__(models.ReformerLM(to_config("ReformerLM", sizes, options), num_tokens))


class LSHSelfAttention(_Adapter):
    """reformer_pytorch's LSHSelfAttention: `net` is ours, [B, S, dim] -> [B, S, dim] at any length S."""

    def __init__(self, dim: int, *, max_seq_len: int = 8192, **options: Any) -> None:
        config = to_config("LSHSelfAttention", {"dim": dim, "max_seq_len": max_seq_len}, options)
        kind = models.ExactSelfAttention if options.get("use_full_attn") else models.LSHSelfAttention
        super().__init__(kind(config))
