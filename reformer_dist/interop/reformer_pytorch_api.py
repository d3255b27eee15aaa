"""reformer_pytorch's call style: its names and options, for models that are made and trained here.

Of every option the table says what it becomes here, or why it has no counterpart and what to do instead; nothing
is passed over in silence. Texts may have any length, so there is no Autopadder. Weights that were trained there
come by `reformer-convert`, which keeps that system's arithmetic; what is made here has this library's: a window
of each bucket instead of chunks across buckets, strictly causal, and logits q.k / |k| as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from reformer_dist import models
from reformer_dist.config import Activation, AttentionKind, CompatConfig, ModelConfig, Norm, Position
from reformer_dist.errors import ConfigError
from reformer_dist.models.context import ForwardOptions

ConfigKeys = dict[str, Any]
Given = Mapping[str, Any]
"""All options of a call, by their names there."""
Mapped = Callable[[Any, Given], ConfigKeys]


@dataclass(frozen=True)
class OptionRule:
    """What becomes of one option."""

    becomes: Mapped
    """From its value and those of all options to keys of ModelConfig."""
    note: str
    """For the table of the documentation; or, of a refused option, why, and what to do instead."""
    accepts: Callable[[Any], bool] = lambda _value: True
    """False of a value that has no counterpart."""


def _set(name: str) -> Mapped:
    return lambda value, _given: {name: value}


def _drop(_value: Any, _given: Given) -> ConfigKeys:
    return {}


def _renamed(name: str) -> OptionRule:
    return OptionRule(_set(name), f"`{name}`")


def _unsupported(note: str) -> OptionRule:
    return OptionRule(_drop, note, accepts=lambda value: not value)


def _ignored(note: str) -> OptionRule:
    return OptionRule(_drop, note)


def _buckets(bucket_size: int, given: Given) -> ConfigKeys:
    n_buckets = max(1, math.ceil(given["max_seq_len"] / bucket_size))
    # as many keys as a chunk and the chunk before it hold; a two-sided window looks both ways
    window = 2 * bucket_size if given["causal"] else bucket_size
    return {"n_buckets": n_buckets + n_buckets % 2 if n_buckets > 1 else 1, "window": window}


def _axial(_is_axial: bool, given: Given) -> ConfigKeys:
    if not given["axial_position_emb"]:
        return {}
    size = given["bucket_size"]
    shape = given["axial_position_shape"] or (math.ceil(given["max_seq_len"] / size), size)
    return {"position": Position.axial, "axial_shape": list(shape), "compat": CompatConfig(axial_sum=True)}


def _activation(layer: Any, given: Given) -> ConfigKeys:
    name = "gelu" if layer in (None, nn.GELU) else "relu"
    return {"activation": Activation.glu if given.get("ff_glu") else Activation[name]}


def _only_if(keys: ConfigKeys) -> Mapped:
    return lambda value, _given: keys if value else {}


OPTIONS: dict[str, OptionRule] = {
    "num_tokens": OptionRule(_drop, "`vocab_size` of the model"),
    "dim": _renamed("dim"),
    "depth": _renamed("n_layers"),
    "heads": _renamed("n_heads"),
    "dim_head": _renamed("head_dim"),
    "max_seq_len": OptionRule(_set("max_seq_len"), "`n_buckets`, and the rows of a learned position table"),
    "bucket_size": OptionRule(_buckets, "`window`, and with the length `n_buckets`"),
    "n_hashes": _renamed("n_hashes"),
    "causal": _renamed("causal"),
    "ff_chunks": OptionRule(
        lambda chunks, given: {"ff_chunk": math.ceil(given["max_seq_len"] / chunks) if chunks > 1 else 0},
        "`ff_chunk`: tokens of a chunk instead of the number of chunks",
        accepts=lambda chunks: chunks >= 1,
    ),
    "attn_chunks": _ignored("nothing to do: attention always runs over a few heads and rows at a time"),
    "weight_tie": _renamed("share_layers"),
    "lsh_dropout": _renamed("attention_dropout"),
    "dropout": _renamed("attention_dropout"),
    "ff_dropout": _renamed("ff_dropout"),
    "post_attn_dropout": OptionRule(
        _set("dropout"), "`dropout`, which falls on the embedding and on what each sublayer gives"
    ),
    "layer_dropout": _renamed("layer_drop"),
    "ff_activation": OptionRule(
        _activation,
        "`activation`: None and nn.GELU are gelu, nn.ReLU is relu; there are no others, pass one of these",
        accepts=lambda layer: layer in (None, nn.GELU, nn.ReLU),
    ),
    "ff_mult": _renamed("ff_mult"),
    "ff_glu": OptionRule(_drop, "`activation=glu`, gated by a GELU"),
    "lsh_attend_across_buckets": _ignored("a token sees its own bucket only, whatever is asked for"),
    "attend_across_buckets": _ignored("a token sees its own bucket only, whatever is asked for"),
    "lsh_allow_duplicate_attention": OptionRule(
        lambda allowed, _given: {"count_pairs_once": not allowed}, "`count_pairs_once`, negated"
    ),
    "allow_duplicate_attention": OptionRule(
        lambda allowed, _given: {"count_pairs_once": not allowed}, "`count_pairs_once`, negated"
    ),
    "random_rotations_per_head": _ignored("each head has rotations of its own, whatever is asked for"),
    "use_scale_norm": OptionRule(_only_if({"norm": Norm.scale}), "`norm=scale`"),
    "use_rezero": OptionRule(_only_if({"norm": Norm.rezero}), "`norm=rezero`"),
    "use_full_attn": OptionRule(_only_if({"layers": [AttentionKind.exact]}), "`layers=[exact]`"),
    "full_attn_thres": _unsupported(
        "what a model computes does not change with the length here; leave it out, or use_full_attn=True"
    ),
    "reverse_thres": _ignored("nothing to do: gradients are those of plain autograd at any length"),
    "num_mem_kv": _unsupported("no key stands outside all buckets here; leave it out"),
    "one_value_head": _renamed("one_value_head"),
    "n_local_attn_heads": _unsupported(
        "a layer's heads are of one kind here; leave it out, and make a ModelConfig(layers=[local, lsh])"
    ),
    "pkm_layers": _unsupported("there are no product-key memories here; leave it out, or take a wider ff_mult"),
    "pkm_num_keys": _ignored("has no meaning without pkm_layers"),
    "emb_dim": _renamed("embedding_dim"),
    "return_embeddings": _unsupported("leave it out, and call model.net.encode(tokens)"),
    "weight_tie_embedding": _renamed("tie_embeddings"),
    "fixed_position_emb": OptionRule(_only_if({"position": Position.sinusoidal}), "`position=sinusoidal`"),
    "absolute_position_emb": OptionRule(_only_if({"position": Position.learned}), "`position=learned`"),
    "axial_position_emb": OptionRule(_axial, "`position=axial` with `compat.axial_sum`; without any of the three, `rotary`"),
    "axial_position_shape": OptionRule(_drop, "`axial_shape`"),
    "return_attn": _unsupported("leave it out, and call reformer_dist.inspect_attention"),
    "rehash_each_round": OptionRule(
        _drop,
        "each round has a hash of its own here; leave it out",
        accepts=bool,
    ),
    "drop_for_hash_rate": _unsupported("hashes of training and evaluation agree here; leave it out"),
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
"""Options of each class there, beside its sizes, with their defaults there."""

KEYWORDS: dict[str, str] = {
    "keys": "a layer sees its own text alone; make a ReformerEncoderDecoder, whose decoder attends to a source",
    "context_mask": "has no meaning without keys; that of a ReformerEncoderDecoder is source_mask",
    "input_attn_mask": "buckets, causal and input_mask say which tokens meet; "
    "a mask of every pair costs what LSH attention saves, so leave it out",
    "pos_emb": "a model makes its own positions; leave it out, or make a layer of a ModelConfig(position=rotary)",
    "arg_route": "nothing is routed: a sublayer takes what it needs; leave it out",
}
"""Keywords of a call there, beside input_mask, why none has a counterpart, and what to do instead."""


def to_config(name: str, sizes: ConfigKeys, options: ConfigKeys) -> ModelConfig:
    """The configuration for a call of reformer_pytorch's class `name`.

    Raises ConfigError that names every option without counterpart, why, and what to do instead.
    """
    unknown = sorted(options.keys() - DEFAULTS[name].keys())
    if unknown:
        raise ConfigError(f"{name}: reformer_pytorch has no option {', '.join(unknown)}")
    given = DEFAULTS[name] | options | sizes
    refused = {option: OPTIONS[option] for option, value in given.items() if not OPTIONS[option].accepts(value)}
    if refused:
        lines = [f"{option}={given[option]!r}: {row.note}" for option, row in refused.items()]
        raise ConfigError("\n".join([f"{name}: no counterpart here for", *lines]))
    # a bare stack has no positions there: the caller adds them to its input
    position = Position.rotary if name == "ReformerLM" else Position.sinusoidal
    keys: ConfigKeys = {"position": position, "layers": [AttentionKind.lsh]}
    for option, value in given.items():
        keys |= OPTIONS[option].becomes(value, given)
    return ModelConfig(**keys)


def _refuse_keywords(keywords: Given) -> None:
    given = {name: value for name, value in keywords.items() if value is not None}
    unknown = sorted(given.keys() - KEYWORDS.keys())
    if unknown:
        raise ConfigError(f"forward: reformer_pytorch has no keyword {', '.join(unknown)}")
    if given:
        lines = [f"{name}: {KEYWORDS[name]}" for name in given]
        raise ConfigError("\n".join(["forward: no counterpart here for", *lines]))


class Reformer(nn.Module):
    """reformer_pytorch's Reformer: `net` is a `ReformerStack`, [B, S, dim] -> [B, S, dim] at any length S.

    max_seq_len: the length that the number of buckets is chosen for.
    """

    def __init__(self, dim: int, depth: int, *, max_seq_len: int = 8192, **options: Any) -> None:
        super().__init__()
        config = to_config("Reformer", {"dim": dim, "depth": depth, "max_seq_len": max_seq_len}, options)
        self.net, self._rotations = models.ReformerStack(config), _Rotations()
        models.init_weights(self.net, config, seed=0)

    def forward(self, x: Tensor, input_mask: Tensor | None = None, **keywords: Any) -> Tensor:
        """input_mask [B, S]: True for real tokens. Raises ConfigError of what has no counterpart: `KEYWORDS`."""
        _refuse_keywords(keywords)
        out: Tensor = self.net(x, **self._rotations.next(self, input_mask))
        return out


class ReformerLM(nn.Module):
    """reformer_pytorch's ReformerLM: `net` is one of ours, [B, S] -> logits [B, S, num_tokens] at any length."""

    def __init__(self, num_tokens: int, dim: int, depth: int, max_seq_len: int, **options: Any) -> None:
        super().__init__()
        sizes = {"num_tokens": num_tokens, "dim": dim, "depth": depth, "max_seq_len": max_seq_len}
        config = to_config("ReformerLM", sizes, options)
        self.net, self._rotations = models.ReformerLM(config, num_tokens), _Rotations()

    def forward(self, x: Tensor, input_mask: Tensor | None = None, **keywords: Any) -> Tensor:
        """input_mask [B, S]: True for real tokens. Raises ConfigError of what has no counterpart: `KEYWORDS`."""
        _refuse_keywords(keywords)
        out: Tensor = self.net(x, **self._rotations.next(self, input_mask))
        return out


class LSHSelfAttention(nn.Module):
    """reformer_pytorch's LSHSelfAttention: `net` is one, [B, S, dim] -> [B, S, dim] at any length S."""

    def __init__(self, dim: int, *, max_seq_len: int = 8192, **options: Any) -> None:
        super().__init__()
        config = to_config("LSHSelfAttention", {"dim": dim, "max_seq_len": max_seq_len}, options)
        kind = models.ExactSelfAttention if options.get("use_full_attn") else models.LSHSelfAttention
        self.net, self._rotations = kind(config), _Rotations()

    def forward(self, x: Tensor, input_mask: Tensor | None = None, **keywords: Any) -> Tensor:
        """input_mask [B, S]: True for real tokens. Raises ConfigError of what has no counterpart: `KEYWORDS`."""
        _refuse_keywords(keywords)
        out: Tensor = self.net(x, **self._rotations.next(self, input_mask))
        return out


class _Rotations:
    """Numbers the forward calls of training, each of which hashes by rotations of its own."""

    def __init__(self) -> None:
        self._step = -1

    def next(self, model: nn.Module, input_mask: Tensor | None) -> ForwardOptions:
        if model.training:
            self._step += 1
        return {"key_padding_mask": input_mask, "step": self._step if model.training else None}
