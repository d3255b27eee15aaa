"""Results do not depend on PyTorch's default dtype, default device or modes, nor do later ones through a cache."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from reformer_dist import AttentionKind, ModelConfig, ReformerLM, lsh_attention
from reformer_dist.ops.lsh import AttentionOptions, WindowRule, bucket_attention, draw_rotations, seeded_rotations
from reformer_dist.ops.lsh.torch_tiles.pair_mask import _band

PACKAGE = Path(__file__).resolve().parents[2] / "reformer_dist"
CREATE = {"empty", "zeros", "ones", "full", "arange", "randn", "rand", "randint", "eye", "tensor", "linspace"}
TAKES_DEFAULT_DTYPE = {"empty", "zeros", "ones", "full", "randn", "rand", "eye", "linspace"}
UNUSED = count(1000)  # seeds and windows of which nothing is cached


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


STATES = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "fake": FakeTensorMode,
}
DRAWS: dict[str, Callable[[int], Tensor]] = {
    "rotation": lambda seed: draw_rotations(2, 8, 2, 12, "rotation", seed),
    "floor": lambda seed: draw_rotations(2, 8, 2, 12, "floor", seed),
    "seeded": lambda seed: seeded_rotations(2, 8, 2, 12, seed),
    "band": lambda window: _band(WindowRule(window, True), 16, 1, torch.device("cpu")),
}
UNCACHED: dict[str, Callable[[int], Tensor]] = {
    "rotation": lambda seed: draw_rotations.__wrapped__(2, 8, 2, 12, "rotation", seed),
    "floor": lambda seed: draw_rotations.__wrapped__(2, 8, 2, 12, "floor", seed),
    "seeded": lambda seed: seeded_rotations.__wrapped__(2, 8, 2, 12, seed),
    "band": lambda window: _band.__wrapped__(WindowRule(window, True), 16, 1, torch.device("cpu")),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", DRAWS)
def test_the_first_call_leaves_no_trace_in_a_cache(name: str, state: str) -> None:
    number = next(UNUSED)
    with STATES[state]():
        first = DRAWS[name](number)
    later, expected = DRAWS[name](number), UNCACHED[name](number)
    assert type(later) is Tensor and later.dtype is torch.float32 and not later.is_inference()
    assert torch.equal(later, expected)
    if state != "fake":
        assert torch.equal(first, expected)
    with FakeTensorMode():  # a cached tensor would not be accepted by other operations of the mode
        assert (DRAWS[name](number) * 2).shape == expected.shape


@pytest.mark.parametrize("backend", ["torch", "native", "reference"])
@pytest.mark.parametrize("state", [state for state in STATES if state != "fake"])
def test_attention_in_any_state(state: str, backend: str) -> None:
    qk, v = torch.randn(2, 1, 2, 50, 16, generator=torch.Generator().manual_seed(0)).unbind()
    options = {"n_buckets": 4, "dropout": 0.1, "backend": backend, "count_pairs_once": True}
    ids = torch.randint(0, 4, (1, 2, 2, 50))
    rule = AttentionOptions(WindowRule(next(UNUSED), causal=True), **options, scale=1.0)
    seed, window = next(UNUSED), next(UNUSED)
    results = []
    for context in (STATES[state], nullcontext):
        with context():
            hashed = lsh_attention(qk, v, window=window, seed=seed, **options)
            results.append((hashed, bucket_attention(qk, None, v, ids, rule)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("state", ["float64", "meta"])
def test_a_model_in_any_state(state: str) -> None:
    sizes = {"dim": 24, "n_layers": 3, "n_heads": 3, "n_buckets": 4, "window": 8}
    dropout = {"dropout": 0.1, "attention_dropout": 0.1}
    model = ReformerLM(ModelConfig(**sizes, **dropout, layers=["local", "lsh", "exact"]), 30)
    tokens = torch.arange(30).expand(2, -1)
    mask = torch.arange(30) >= torch.tensor([[0], [5]])
    losses, step = [], next(UNUSED)
    for context in (STATES[state], nullcontext):
        with context():
            losses.append(model(tokens, labels=tokens, key_padding_mask=mask, step=step, dropout_seed=3))
            model(tokens, labels=tokens, step=step)  # draws a dropout seed
    assert losses[0].dtype is torch.float32 and torch.equal(*losses)


@pytest.mark.parametrize("part", ["ops", "models", "generation", "parallel"])
def test_created_tensors_name_their_device_and_dtype(part: str) -> None:
    """Weights alone follow the defaults."""
    problems = []
    for path in sorted((PACKAGE / part).rglob("*.py")):
        tree = ast.parse(path.read_text())
        weights = {
            id(argument)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "nn.Parameter"
            for argument in node.args
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or id(node) in weights:
                continue
            module, _, name = ast.unparse(node.func).rpartition(".")
            if module != "torch" or name not in CREATE:
                continue
            named = {keyword.arg for keyword in node.keywords}
            missing = {"device", *({"dtype"} if name in TAKES_DEFAULT_DTYPE else ())} - named
            problems += [f"{path.name}:{node.lineno} torch.{name} without {', '.join(missing)}"] if missing else []
    assert not problems, "\n".join(problems)


@torch.no_grad()
def test_fake_tensors_have_no_values_to_check() -> None:
    with FakeTensorMode():
        model = ReformerLM(ModelConfig(dim=16, n_heads=2, n_layers=1, layers=[AttentionKind.exact]), 257).eval()
        assert model(torch.zeros(2, 8, dtype=torch.int64)).shape == (2, 8, 257)
