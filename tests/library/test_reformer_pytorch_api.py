"""The reformer_pytorch API: the examples of its README, and every option of its classes."""

from __future__ import annotations

import inspect

import pytest
import torch

from reformer_dist import AttentionKind, ModelConfig, init_weights
from reformer_dist import LSHSelfAttention as OurLSHSelfAttention
from reformer_dist.config import Activation, CompatConfig, Norm, Position
from reformer_dist.errors import ConfigError
from reformer_dist.interop.reformer_pytorch_api import (
    DEFAULTS,
    KEYWORDS,
    OPTIONS,
    LSHSelfAttention,
    Reformer,
    ReformerLM,
    to_config,
)

SMALL = {"dim": 32, "depth": 2, "heads": 2, "bucket_size": 16}


def config(name: str = "ReformerLM", **options: object) -> ModelConfig:
    sizes = {"num_tokens": 100, "max_seq_len": 256, "dim": 32, "depth": 2}
    wanted = {
        "ReformerLM": sizes.keys(),
        "Reformer": {"dim", "depth", "max_seq_len"},
        "LSHSelfAttention": {"dim", "max_seq_len"},
    }
    sizes = {key: sizes[key] for key in wanted[name]}
    return to_config(name, sizes, {"heads": 2, "bucket_size": 16, **options})


def test_the_readme_s_language_model() -> None:
    """Its first example, with small sizes and without the unsupported options."""
    options = {
        "num_tokens": 200,
        "max_seq_len": 128,
        **SMALL,
        "lsh_dropout": 0.1,
        "ff_dropout": 0.1,
        "post_attn_dropout": 0.1,
        "layer_dropout": 0.1,
        "causal": True,
        "n_hashes": 4,
        "emb_dim": 16,
        "dim_head": 16,
        "ff_chunks": 4,
        "attn_chunks": 8,
        "reverse_thres": 1024,
        "use_scale_norm": False,
        "use_rezero": False,
        "one_value_head": False,
        "weight_tie": False,
        "weight_tie_embedding": False,
        "pkm_num_keys": 128,
        "use_full_attn": False,
    }
    model = ReformerLM(**options)
    tokens = torch.randint(0, 200, (1, 121))  # not a multiple of anything
    logits = model(tokens)
    assert logits.shape == (1, 121, 200)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    refused = {"num_mem_kv": 128, "full_attn_thres": 1024, "n_local_attn_heads": 2, "pkm_layers": (4, 7)}
    with pytest.raises(ConfigError) as raised:
        ReformerLM(**options, **refused)
    said = str(raised.value)
    assert said.startswith("ReformerLM: ")
    assert all(f"\n{name}={value!r}: " in said for name, value in refused.items()) and said.count("\n") == 4


def test_the_readme_s_stack_and_layer() -> None:
    stack = Reformer(dim=64, depth=2, heads=8, lsh_dropout=0.1, causal=True)
    x = torch.randn(1, 301, 64)
    assert stack(x).shape == x.shape
    assert not torch.equal(stack(x), stack(x))  # each training forward has new rotations
    stack.eval()
    assert torch.equal(stack(x), stack(x))
    layer = LSHSelfAttention(dim=128, heads=8, bucket_size=64, n_hashes=8, causal=False)
    x = torch.randn(2, 200, 128)
    mask = torch.arange(200) < torch.tensor([[200], [120]])
    assert layer.eval()(x, input_mask=mask).shape == x.shape
    edited = x.clone()
    edited[1, 150] = 0
    assert torch.equal(layer(edited, input_mask=mask)[1, :120], layer(x, input_mask=mask)[1, :120])


def test_defaults_match_the_signatures_of_reformer_pytorch() -> None:
    theirs = pytest.importorskip("reformer_pytorch")
    sizes = {"self", "kwargs", "num_tokens", "dim", "depth", "max_seq_len"}
    for name, defaults in DEFAULTS.items():
        parameters = inspect.signature(getattr(theirs, name).__init__).parameters
        expected = {key: p.default for key, p in parameters.items() if key not in sizes}
        if name == "LSHSelfAttention":
            hidden = inspect.signature(theirs.LSHAttention.__init__).parameters
            expected |= {key: hidden[key].default for key in ("rehash_each_round", "drop_for_hash_rate")}
        assert defaults == expected, name


def test_every_option_is_used_and_defaults_are_accepted() -> None:
    assert OPTIONS.keys() == {"num_tokens", "dim", "depth", "max_seq_len"}.union(*DEFAULTS.values())
    for name in DEFAULTS:
        assert config(name).layers == [AttentionKind.lsh]


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("heads", 4, {"n_heads": 4}),
        ("dim_head", 10, {"head_dim": 10}),
        ("bucket_size", 32, {"n_buckets": 8, "window": 32}),
        ("bucket_size", 256, {"n_buckets": 1, "window": 256}),
        ("n_hashes", 3, {"n_hashes": 3}),
        ("causal", True, {"causal": True, "window": 32}),
        ("ff_chunks", 10, {"ff_chunk": 26}),
        ("weight_tie", True, {"share_layers": True, "layers": [AttentionKind.lsh]}),
        ("lsh_dropout", 0.2, {"attention_dropout": 0.2}),
        ("ff_dropout", 0.2, {"ff_dropout": 0.2}),
        ("post_attn_dropout", 0.2, {"dropout": 0.2}),
        ("layer_dropout", 0.2, {"layer_drop": 0.2}),
        ("ff_activation", torch.nn.ReLU, {"activation": Activation.relu}),
        ("ff_glu", True, {"activation": Activation.glu}),
        ("ff_mult", 2, {"ff_mult": 2}),
        ("use_scale_norm", True, {"norm": Norm.scale}),
        ("use_rezero", True, {"norm": Norm.rezero}),
        ("use_full_attn", True, {"layers": [AttentionKind.exact]}),
        ("one_value_head", True, {"one_value_head": True}),
        ("emb_dim", 8, {"embedding_dim": 8}),
        ("weight_tie_embedding", True, {"tie_embeddings": True}),
        ("fixed_position_emb", True, {"position": Position.sinusoidal}),
        ("absolute_position_emb", True, {"position": Position.learned, "max_seq_len": 256}),
        (
            "axial_position_emb",
            True,
            {"position": Position.axial, "axial_shape": [16, 16], "compat": CompatConfig(axial_sum=True)},
        ),
        ("attn_chunks", 8, {"position": Position.rotary}),
        ("reverse_thres", 1024, {}),
        ("random_rotations_per_head", True, {}),
    ],
)
def test_what_an_option_becomes(option: str, value: object, expected: dict[str, object]) -> None:
    found = config(**{option: value})
    assert {key: getattr(found, key) for key in expected} == expected


def test_options_of_the_stack_alone() -> None:
    assert config("Reformer", lsh_allow_duplicate_attention=False).count_pairs_once
    assert not config("Reformer", lsh_attend_across_buckets=False).count_pairs_once
    shape = config(axial_position_emb=True, axial_position_shape=(8, 32)).axial_shape
    assert shape == [8, 32]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Reformer", {"num_mem_kv": 3}, "num_mem_kv=3: "),
        ("ReformerLM", {"return_embeddings": True}, r"return_embeddings=True: .*model\.net\.encode"),
        ("ReformerLM", {"ff_activation": torch.nn.SiLU}, "ff_activation=.*: .*gelu"),
        ("LSHSelfAttention", {"return_attn": True}, "reformer_dist.inspect_attention"),
        ("LSHSelfAttention", {"rehash_each_round": False}, "rehash_each_round=False: "),
        ("ReformerLM", {"bucketsize": 3}, r"ReformerLM: .*option bucketsize \(did you mean bucket_size\?\)"),
        ("Reformer", {"emb_dim": 3}, "Reformer: .*option emb_dim"),
    ],
)
def test_what_is_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(name, **options)


MODELS = {
    "Reformer": lambda: Reformer(**SMALL),
    "ReformerLM": lambda: ReformerLM(num_tokens=20, max_seq_len=64, **SMALL),
    "LSHSelfAttention": lambda: LSHSelfAttention(dim=32, heads=2, bucket_size=16),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_keywords_of_a_call(name: str) -> None:
    """None is accepted; other values are refused with the reason, all in one error."""
    model = MODELS[name]().eval()
    x = torch.randint(0, 20, (1, 30)) if name == "ReformerLM" else torch.randn(1, 30, 32)
    assert torch.equal(model(x, **dict.fromkeys(KEYWORDS)), model(x))
    with pytest.raises(ConfigError) as raised:
        model(x, input_mask=None, keys=torch.zeros(1, 5, 32), input_attn_mask=torch.ones(1, 30, 30, dtype=bool))
    said = str(raised.value)
    assert said.startswith("forward: ") and "\nkeys: " in said
    assert "\ninput_attn_mask: " in said and said.count("\n") == 2
    with pytest.raises(ConfigError, match=r"forward: .*keyword mask\b"):
        model(x, mask=torch.ones(1, 30, dtype=torch.bool))


def test_every_keyword_of_theirs_is_known() -> None:
    theirs = pytest.importorskip("reformer_pytorch")
    layer = inspect.signature(theirs.LSHSelfAttention.forward).parameters
    sequence = inspect.signature(theirs.reversible.ReversibleSequence.forward).parameters
    assert KEYWORDS.keys() == {*layer, *sequence} - {"self", "x", "input_mask", "kwargs"}


def test_a_standalone_layer_applies_rotary_positions() -> None:
    x = torch.randn(1, 30, 32)
    outputs = []
    for position in (Position.sinusoidal, Position.rotary):
        layer = OurLSHSelfAttention(ModelConfig(dim=32, n_heads=2, n_buckets=1, position=position)).eval()
        init_weights(layer, layer.config, seed=0)
        outputs.append(layer(x))
    assert not torch.allclose(*outputs)
