"""Reversible, checkpointed and plain backward agree: the loss, and the gradient of every parameter."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from model_helpers import (
    EXACT,
    LOCAL,
    LSH,
    assert_grads_agree,
    grads_of,
    random_tokens,
    relative_error,
    shifted,
    small_config,
    small_model,
    with_recompute,
)
from torch import Tensor

from reformer_dist.config import (
    Activation,
    CompatConfig,
    HashScheme,
    NeighbourRule,
    Norm,
    Position,
    Recompute,
    StreamMerge,
)
from reformer_dist.models import ReformerLM, attention
from reformer_dist.models.context import ForwardContext, RecomputeCache
from reformer_dist.models.reversible import TokenwiseSublayer, _Autocast
from reformer_dist.models.sequence import WholeSequence
from reformer_dist.models.stack import ReformerStack
from reformer_dist.ops.dropout import TokenCoords

DROPOUTS = {"dropout": 0.1, "attention_dropout": 0.2, "ff_dropout": 0.3}
CHANGES: list[dict[str, Any]] = [
    {},
    {"dropout": 0.2},
    {"attention_dropout": 0.2},
    {"ff_dropout": 0.2},
    {"layers": [LSH], **DROPOUTS},
    {"layers": [LOCAL], **DROPOUTS},
    {"layers": [EXACT], **DROPOUTS},
    {"layers": [LSH, EXACT, LOCAL], "n_layers": 3, **DROPOUTS},
    {"share_layers": True, **DROPOUTS},
    {"share_layers": True, "layers": [LSH], "compat": CompatConfig(norm_per_layer=True), **DROPOUTS},
    {"tie_embeddings": True},
    {"position": Position.rotary},
    {"position": Position.rotary, "rotary_layers": [LOCAL], "next_value_heads": 1},
    {"position": Position.learned},
    {"position": Position.sinusoidal},
    {"activation": Activation.relu},
    {"activation": Activation.glu},
    {"activation": Activation.swiglu, "norm": Norm.rms},
    {"ff_chunk": 10, **DROPOUTS},
    {"neighbours": NeighbourRule.chunk},
    {
        "neighbours": NeighbourRule.chunk,
        "causal": False,
        "n_chunks_after": 1,
        "compat": CompatConfig(chunk_wrap=True),
        **DROPOUTS,
    },
    {
        "neighbours": NeighbourRule.chunk,
        "compat": CompatConfig(chunk_wrap=True, local_chunk_len=6, merge_streams=StreamMerge.concat),
    },
    {
        "ff_dim": 30,
        "compat": CompatConfig(bucket_factors=[2, 2], hash_seed=7, attention_bias=True, axial_sum=True),
    },
    {"activation": Activation.gelu_tanh},
    {"activation": Activation.silu},
    {"local_round": True, "count_pairs_once": True, **DROPOUTS},
    {"hash_scheme": HashScheme.floor},
    {"causal": False, **DROPOUTS},
    {"n_layers": 1},
    {"norm": Norm.scale, **DROPOUTS},
    {"embedding_dim": 10, "tie_embeddings": True, **DROPOUTS},
    {"layers": [LSH, EXACT, LOCAL], "n_layers": 3, "one_value_head": True, **DROPOUTS},
    {"layer_drop": 0.5, **DROPOUTS},
    {"head_dim": 5, "qk_scale": 0.4},
    {"next_value_heads": 1, **DROPOUTS},
    {"shared_qk": False, "local_round": True, **DROPOUTS},
    {"qk_conv": 3, "next_value_heads": 1, "position": Position.rotary, **DROPOUTS},
    {"qk_conv": 4, "shared_qk": False, **DROPOUTS},
]


def run(model: ReformerLM, tokens: Tensor, **options: Any) -> Tensor:
    loss = model(tokens, shifted(tokens), step=3, dropout_seed=5, **options)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_three_ways_of_backward_agree(changed: dict[str, Any]) -> None:
    plain = small_model(recompute=Recompute.none, **changed)
    expected = run(plain, random_tokens())
    assert len(grads_of(plain)) == len(list(plain.parameters()))
    for recompute, tolerance in ((Recompute.reversible, 1e-5), (Recompute.checkpoint, 0.0)):
        model = with_recompute(plain, recompute)
        assert torch.equal(run(model, random_tokens()), expected)
        assert_grads_agree(model, plain, tolerance)


@pytest.mark.parametrize("seq_len", [1, 2, 7, 33, 128])
@pytest.mark.parametrize("padded", [False, True])
def test_lengths_and_padding(seq_len: int, padded: bool) -> None:
    plain = small_model(recompute=Recompute.none, layers=[LSH, LOCAL, EXACT], **DROPOUTS)
    tokens = random_tokens(3, seq_len)
    mask = None
    if padded:
        mask = torch.ones(3, seq_len, dtype=torch.bool)
        mask[0, seq_len // 2 :] = False
        mask[1] = False
    # without a loss, since a single token has no next token
    for recompute in (Recompute.none, Recompute.reversible):
        model = with_recompute(plain, recompute)
        out = model(tokens, key_padding_mask=mask, step=0, dropout_seed=1)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        if recompute is Recompute.none:
            plain = model
    assert_grads_agree(model, plain, 1e-5)


@pytest.mark.parametrize("recompute", [Recompute.reversible, Recompute.checkpoint])
def test_accumulation_of_micro_batches(recompute: Recompute) -> None:
    plain = small_model(recompute=Recompute.none, **DROPOUTS)
    model = with_recompute(plain, recompute)
    for seed in (0, 1):
        for each in (plain, model):
            run(each, random_tokens(seed=seed))
    assert_grads_agree(model, plain, 1e-5)


@pytest.mark.parametrize("recompute", [Recompute.reversible, Recompute.checkpoint])
@pytest.mark.parametrize("backward_order", [(0, 1), (1, 0)])
def test_two_forwards_before_a_backward(recompute: Recompute, backward_order: tuple[int, int]) -> None:
    plain = small_model(recompute=Recompute.none, **DROPOUTS)
    model = with_recompute(plain, recompute)
    for seed in backward_order:
        run_later = random_tokens(seed=seed)
        plain(run_later, shifted(run_later), step=seed, dropout_seed=seed).backward()
    losses = [
        model(tokens, shifted(tokens), step=seed, dropout_seed=seed)
        for seed, tokens in enumerate(random_tokens(seed=seed) for seed in (0, 1))
    ]
    for seed in backward_order:
        losses[seed].backward()
    assert_grads_agree(model, plain, 1e-5)


@pytest.mark.parametrize("recompute", list(Recompute))
def test_the_stack_trains_under_a_frozen_embedding(recompute: Recompute) -> None:
    plain = small_model(recompute=Recompute.none)
    run(plain, random_tokens())
    frozen = with_recompute(plain, recompute)
    frozen.embedding.requires_grad_(False)
    run(frozen, random_tokens())
    grads = grads_of(frozen)
    assert grads.keys() == {name for name in grads_of(plain) if not name.startswith("embedding.")}
    assert all(relative_error(grads[name], grads_of(plain)[name]) <= 1e-5 for name in grads)


@pytest.mark.parametrize("trained", ["attention.to_v", "feed_forward.to_out", "attention_norm"])
def test_partly_frozen_blocks(trained: str) -> None:
    plain = small_model(recompute=Recompute.none)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(trained in name)
    model = with_recompute(plain, Recompute.reversible)
    for each in (plain, model):
        run(each, random_tokens())
    assert_grads_agree(model, plain, 1e-5)


@pytest.mark.parametrize("is_inside", [False, True])
@pytest.mark.parametrize("layers", [[LOCAL, LSH], [EXACT]], ids=str)
def test_bf16_autocast(layers: list[Any], is_inside: bool) -> None:
    """Backward inside the autocast context or, as recommended, outside: the recompute restores autocast."""
    plain = small_model(recompute=Recompute.none, layers=layers, qk_conv=3, **DROPOUTS)
    losses = []
    for recompute, tolerance in ((Recompute.none, 0.0), (Recompute.checkpoint, 0.0), (Recompute.reversible, 0.03)):
        model = with_recompute(plain, recompute)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(random_tokens(), shifted(random_tokens()), step=3, dropout_seed=5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_inside):
            loss.backward()
        losses.append(loss.detach())
        if recompute is Recompute.none:
            plain = model
        assert_grads_agree(model, plain, tolerance)
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("recompute", [Recompute.reversible, Recompute.checkpoint])
def test_the_recompute_runs_in_the_dtypes_of_the_forward(recompute: Recompute) -> None:
    model = small_model(recompute=recompute, n_layers=2)
    seen: list[torch.dtype] = []
    for block in model.stack.blocks:
        block.attention.to_v.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(random_tokens(), shifted(random_tokens()), step=0)
    loss.backward()
    assert seen == [torch.bfloat16] * 4


@pytest.mark.parametrize("is_autocast", [False, True])
def test_streams_are_reconstructed(is_autocast: bool) -> None:
    """The inverse reconstructs the input of each layer, also under autocast."""
    stack = ReformerStack(small_config(n_layers=6))
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1, torch.Generator().manual_seed(parameter.numel()))
    coords = TokenCoords(None, torch.arange(37))
    context = ForwardContext(
        dropout_seed=None, rotation_seed=1, coords=coords, sequence=WholeSequence(), positions=coords.positions
    )
    caches = [RecomputeCache() for _ in range(6)]
    streams = [torch.randn(2, 2, 37, 24, generator=torch.Generator().manual_seed(0)).unbind()]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        for layer, block in enumerate(stack.blocks):
            streams.append(block(*streams[-1], context, layer, cache=caches[layer]))
        rebuilt = streams[-1]
        for layer in reversed(range(6)):
            rebuilt = stack.blocks[layer](*rebuilt, context, layer, cache=caches[layer], is_inverse=True)
            for found, expected in zip(rebuilt, streams[layer], strict=True):
                assert found.dtype == torch.float32
                # a rounding error of a stream may change the last bit of a sublayer's bf16 input
                assert (found - expected).abs().max() <= (1e-2 if is_autocast else 2e-6)


def test_backward_twice_is_refused() -> None:
    model = small_model()
    loss = model(random_tokens(), shifted(random_tokens()), step=0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once"):
        loss.backward()


@pytest.mark.parametrize("recompute", list(Recompute))
def test_the_recompute_reuses_the_buckets_of_the_forward(recompute: Recompute) -> None:
    model = small_model(recompute=recompute, layers=[LSH, LOCAL], n_layers=4)
    with mock.patch.object(attention, "hash_vectors", wraps=attention.hash_vectors) as hashed:
        loss = model(random_tokens(), shifted(random_tokens()), step=0)
        assert hashed.call_count == 2
        loss.backward()
        assert hashed.call_count == 2


def test_chunks_sum_their_gradients_in_float32() -> None:
    """A bf16 sum of 512 positive gradients would be off by more than a rounding, or stop growing."""
    generator = torch.Generator().manual_seed(0)
    x, d_out = torch.rand(1, 512, 4, generator=generator), torch.rand(1, 512, 3, generator=generator)
    weight = torch.randn(3, 4, generator=generator).bfloat16().requires_grad_()
    sublayer = TokenwiseSublayer(lambda _, part: part.bfloat16() @ weight.t(), [weight], chunk=1)
    _, (_, d_weight) = sublayer.grads(x, d_out, _Autocast("cpu"))
    assert d_weight is not None and d_weight.dtype == torch.float32
    right = (d_out.bfloat16().double().squeeze(0).t() @ x.bfloat16().double().squeeze(0)).float()
    torch.testing.assert_close(d_weight, right, rtol=1e-3, atol=0.0)
