"""`from reformer_dist import ...` in plain PyTorch code."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module, resources

import pytest
import torch

import reformer_dist
from reformer_dist import (
    ExactSelfAttention,
    LocalSelfAttention,
    LSHSelfAttention,
    ModelConfig,
    Position,
    ReformerStack,
    lsh_attention,
)
from reformer_dist.ops.lsh.neighbour_rules import WindowRule
from reformer_dist.ops.lsh.reference import reference_attention
from reformer_dist.ops.lsh.shared_keys import shared_keys

SIZES = {"dim": 24, "n_layers": 2, "n_heads": 3, "n_hashes": 2, "n_buckets": 4, "window": 8, "local_window": 7}


OTHERS = {"deepspeed", "fsspec", "hydra", "omegaconf", "safetensors", "tensorboard", "triton", "webdataset"}
USE = """
import json, sys
import reformer_dist
light = list(sys.modules)
import torch, typing_extensions
torch_alone = list(sys.modules)
from reformer_dist import *
library = list(sys.modules)
model = ReformerLM(ModelConfig(dim=16, n_heads=2, n_buckets=4), 20)
model(torch.zeros(1, 50, dtype=torch.int64), torch.zeros(1, 50, dtype=torch.int64)).backward()
print(json.dumps([light, torch_alone, library, list(sys.modules)]))
"""


def test_importing_the_library_takes_torch_only() -> None:
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, check=True)
    loaded = ({name.partition(".")[0] for name in names} for names in json.loads(done.stdout))
    light, torch_alone, library, used = loaded
    assert "torch" not in light
    assert library - torch_alone - set(sys.stdlib_module_names) == {"reformer_dist"} - torch_alone
    assert not used & OTHERS


def test_every_name_is_there_and_typed() -> None:
    for name in reformer_dist.__all__:
        assert getattr(reformer_dist, name) is not None and name in dir(reformer_dist)
    for home in reformer_dist._EXPORTING_MODULES:
        assert getattr(import_module(home), "__all__", None)
    with pytest.raises(AttributeError, match="no attribute 'Reformar'"):
        _ = reformer_dist.Reformar
    assert resources.files(reformer_dist).joinpath("py.typed").is_file()


def test_lsh_attention_matches_the_reference() -> None:
    qk, v = torch.randn(2, 2, 3, 41, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    mask = torch.arange(41) < torch.tensor([[41], [30]])
    for causal in (True, False):
        found = lsh_attention(qk, v, n_hashes=1, n_buckets=1, window=10, causal=causal, key_padding_mask=mask)
        one_bucket = torch.zeros(2, 3, 1, 41, dtype=torch.int64)
        rule = WindowRule(10, causal)
        expected = reference_attention(
            qk, shared_keys(qk.float()), v, one_bucket, rule, scale=1.0, key_padding_mask=mask
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    hashed = {seed: lsh_attention(qk, v, n_buckets=8, window=5, seed=seed) for seed in (0, 0, 1)}
    assert hashed[0].shape == v.shape and not torch.equal(hashed[0], hashed[1])
    torch.testing.assert_close(
        hashed[0], lsh_attention(qk, v, n_buckets=8, window=5, backend="reference"), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("layer_type", [LSHSelfAttention, LocalSelfAttention, ExactSelfAttention])
@pytest.mark.parametrize("position", [Position.axial, Position.rotary])
def test_a_standalone_attention_layer(layer_type: type[torch.nn.Module], position: Position) -> None:
    layer = layer_type(ModelConfig(**SIZES, position=position, causal=False, attention_dropout=0.1))
    x = torch.randn(2, 300, 24)
    mask = torch.arange(300) < torch.tensor([[300], [200]])
    out = layer(x, key_padding_mask=mask, step=1, dropout_seed=2)
    out.sum().backward()
    assert out.shape == x.shape and all(p.grad is not None for p in layer.parameters())
    assert torch.equal(out, layer(x, key_padding_mask=mask, step=1, dropout_seed=2))
    layer.eval()
    edited = x.clone()
    edited[1, 250] += 1  # padding, to which no token attends
    assert torch.equal(layer(x, key_padding_mask=mask)[:, :200], layer(edited, key_padding_mask=mask)[:, :200])
    if layer_type is LSHSelfAttention:
        assert not torch.equal(layer(x, layer=0), layer(x, layer=1))


def test_a_standalone_stack() -> None:
    stack = ReformerStack(ModelConfig(**SIZES))
    out = stack(torch.randn(2, 50, 24), step=0)
    out.square().sum().backward()
    assert out.shape == (2, 50, 24) and all(p.grad is not None for p in stack.parameters())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_plain_loop_trains(precision: torch.dtype) -> None:
    """Plain torch: optimizer, autocast, and a custom module around layers and stack."""

    class Mine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = ModelConfig(**SIZES, position=Position.rotary, head_dim=8)
            self.embed = torch.nn.Embedding(10, 24)
            self.attend, self.stack = LSHSelfAttention(config), ReformerStack(config)
            self.out = torch.nn.Linear(24, 10)

        def forward(self, tokens: torch.Tensor, step: int) -> torch.Tensor:
            x = self.embed(tokens)
            return self.out(self.stack(x + self.attend(x, step=step), step=step))

    torch.manual_seed(0)
    model = Mine()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    tokens = torch.arange(60).repeat(4, 1) % 7  # each token repeats the one seven before
    losses = []
    for step in range(30):
        with torch.autocast("cpu", dtype=precision, enabled=precision is not torch.float32):
            logits = model(tokens[:, :-1], step)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
