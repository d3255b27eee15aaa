"""Rotations of calls without `step`: counted in training, fixed in evaluation and in decoding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from model_helpers import EXACT, LOCAL, LSH, random_tokens, small_config, small_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reformer_dist.config import ModelConfig
from reformer_dist.interop import reformer_pytorch_api
from reformer_dist.models import (
    ExactSelfAttention,
    LSHSelfAttention,
    ReformerEncoderDecoder,
    ReformerForSequenceClassification,
    ReformerLM,
    ReformerStack,
    attention,
)
from reformer_dist.models.attention import hash_heads
from reformer_dist.models.decoding import DecodingState

CONFIG = small_config(layers=[LSH], n_layers=2)
VECTORS = torch.randn(2, 37, 24, generator=torch.Generator().manual_seed(0))
OTHERS = {"dim": 24, "depth": 2, "heads": 2, "bucket_size": 8, "n_hashes": 2}
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "lm": (lambda: ReformerLM(CONFIG, 50), (random_tokens(),)),
    "classifier": (lambda: ReformerForSequenceClassification(CONFIG, 50, 3), (random_tokens(),)),
    "pair": (lambda: ReformerEncoderDecoder(CONFIG, 50), (random_tokens(), random_tokens())),
    "stack": (lambda: ReformerStack(CONFIG), (VECTORS,)),
    "layer": (lambda: LSHSelfAttention(CONFIG), (VECTORS,)),
    "their_stack": (lambda: reformer_pytorch_api.Reformer(max_seq_len=64, **OTHERS), (VECTORS,)),
    "their_lm": (
        lambda: reformer_pytorch_api.ReformerLM(num_tokens=50, max_seq_len=64, **OTHERS),
        (random_tokens(),),
    ),
}


@pytest.mark.parametrize("name", list(MODULES))
def test_training_forwards_are_numbered(name: str) -> None:
    build, inputs = MODULES[name]
    module = build()
    start = {key: value.clone() for key, value in module.state_dict().items()}
    assert not any("next_step" in key for key in start)
    drawn = [module(*inputs).detach() for _ in range(3)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    other = build()
    other.load_state_dict(start)  # a state dict without a count
    assert torch.equal(other(*inputs), drawn[0]) and torch.equal(other(*inputs), drawn[1])
    third = build()
    third.load_state_dict(other.state_dict())  # with a count: training continues
    assert torch.equal(third(*inputs), drawn[2])
    if not name.startswith("their"):
        assert torch.equal(third(*inputs, step=1), drawn[1])
    module.eval()
    assert torch.equal(module(*inputs), module(*inputs))
    assert not torch.equal(module(*inputs), drawn[0])


def test_given_steps_and_layers_without_rotations_are_not_counted() -> None:
    model = small_model(layers=[LSH])
    model(random_tokens(), step=3)
    model.reversible_drift(random_tokens())
    exact, layer = small_model(layers=[EXACT, LOCAL]), ExactSelfAttention(CONFIG)
    exact(random_tokens())
    layer(VECTORS)
    for module in (model, exact, layer, model.stack):
        assert module.next_step == 0 and not any("next_step" in key for key in module.state_dict())


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_a_recompute_is_not_counted(is_reentrant: bool) -> None:
    x = VECTORS.clone().requires_grad_()
    layer = LSHSelfAttention(CONFIG)
    out = checkpoint(layer, x, use_reentrant=is_reentrant)
    with pytest.raises(RuntimeError, match=r"step=None.*checkpoint"):
        out.sum().backward()
    checkpoint(lambda x: layer(x, step=0), x, use_reentrant=is_reentrant).sum().backward()
    checkpoint(ExactSelfAttention(CONFIG), x, use_reentrant=is_reentrant).sum().backward()


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "ff_dropout", "layer_drop"])
@pytest.mark.parametrize("kind", [LSH, LOCAL, EXACT])
def test_dropout_in_decoding_is_refused(name: str, kind: object) -> None:
    model = small_model(layers=[kind], **{name: 0.1})
    with pytest.raises(ValueError, match=rf"model\.{name}=0\.1: .*model\.eval\(\)"):
        model(random_tokens(), sequence=DecodingState(model.config))
    model.eval()(random_tokens(), sequence=DecodingState(model.config))


def test_decoding_keeps_the_rotations_of_the_prompts() -> None:
    model = small_model(layers=[LSH])
    tokens = random_tokens()
    expected = model.eval()(tokens)
    state = DecodingState(model.config)
    model.train()(tokens[:, :-1], sequence=state)
    torch.testing.assert_close(model(tokens[:, -1:], sequence=state)[:, 0], expected[:, -1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"step=4: .*step=None"):
        model(tokens[:, -1:], sequence=state, step=4)


@pytest.mark.parametrize("name", ["lm", "pair"])
def test_the_next_steps_rotations_are_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[tuple[int, int | None]] = []

    def record(vectors: Tensor, config: ModelConfig, seed: int, next_seed: int | None = None) -> Tensor:
        seeds.append((seed, next_seed))
        return hash_heads(vectors, config, seed, next_seed)

    monkeypatch.setattr(attention, "hash_heads", record)
    build, inputs = MODULES[name]
    module = build()
    for step in (5, 6):
        module(*inputs, step=step)
    half = len(seeds) // 2
    assert [ahead for _, ahead in seeds[:half]] == [seed for seed, _ in seeds[half:]]
    assert len(set(seeds)) == len(seeds) >= 4
    module.eval()
    module(*inputs)
    assert all(ahead is None for _, ahead in seeds[2 * half :])
