"""Choice of the attention backend: by device, by name, or refused with a reason if it can't run."""

from __future__ import annotations

import pytest
import torch

from reformer_dist.config import AttentionBackend, AttentionKind, ModelConfig
from reformer_dist.errors import ConfigError
from reformer_dist.models.attention import check_attention_backend
from reformer_dist.ops.lsh import AttentionOptions, WindowRule, backends, bucket_attention

CPU = torch.device("cpu")


def test_auto_prefers_native_on_a_cpu():
    assert backends.choose("auto", CPU, 64, torch.float64) == "torch"
    wanted = "native" if backends.unavailable_reason() is None else "torch"
    assert backends.choose("auto", CPU, 64, torch.float32) == wanted
    assert backends.choose("reference", CPU, 7, torch.float64) == "reference"


def test_names_match_the_config():
    assert {choice.name for choice in AttentionBackend} == {"auto", *backends.NAMES}


def test_reasons_why_a_backend_is_unavailable(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    why = backends.unsupported_reason
    assert "needs a GPU" in why("triton", CPU, 64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why("triton", CPU, 64) is None
    assert "multiple of 16" in why("triton", CPU, 24) and "multiple of 16" in why("triton", CPU, 144)
    assert "float64" in why("triton", CPU, 64, torch.float64)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in why("triton", CPU, 64)
    assert "must be auto" in why("cuda", CPU, 64)
    with pytest.raises(ValueError, match=r"\btriton: .*package"):
        backends.choose("triton", CPU, 64, torch.float32)


def test_config_with_an_unavailable_backend_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = ModelConfig(attention_backend=AttentionBackend.triton)
    with pytest.raises(ConfigError, match=r"model\.attention_backend=triton: .*GPU"):
        check_attention_backend(config, CPU)
    config = ModelConfig(attention_backend=AttentionBackend.triton, layers=[AttentionKind.exact], n_heads=1)
    check_attention_backend(config, CPU)


def test_reference_and_torch_agree():
    generator = torch.Generator().manual_seed(0)
    q, v = (torch.randn(1, 2, 30, 8, generator=generator).requires_grad_() for _ in range(2))
    ids = torch.randint(0, 2, (1, 2, 2, 30), generator=generator)
    found = []
    for name in ("reference", "torch"):
        options = AttentionOptions(
            WindowRule(5, True), 2, 0.5, dropout=0.2, dropout_seed=9, rows=torch.tensor([3]), backend=name
        )
        out = bucket_attention(q, None, v, ids, options)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, v))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
