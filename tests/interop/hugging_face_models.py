"""Small random models of transformers, and their logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

SMALL: dict[str, Any] = {
    "attn_layers": ["local", "lsh"],
    "hidden_size": 32,
    "attention_head_size": 8,
    "num_attention_heads": 2,
    "feed_forward_size": 40,
    "axial_pos_shape": [8, 16],
    "axial_pos_embds_dim": [8, 24],
    "max_position_embeddings": 128,
    "num_buckets": 8,
    "num_hashes": 2,
    "hash_seed": 3,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
    "vocab_size": 50,
    "is_decoder": True,
    "use_cache": False,
}
ENWIK8 = SMALL | {
    "attn_layers": ["local", "local", "lsh", "local"] * 3,
    "num_buckets": 32,
    "num_hashes": 4,
    "lsh_attn_chunk_length": 16,
    "hidden_dropout_prob": 0.2,
    "vocab_size": 258,
}
CRIME_AND_PUNISHMENT = SMALL | {
    "attn_layers": ["local", "lsh"] * 3,
    "num_buckets": [4, 8],
    "num_hashes": 1,
    "vocab_size": 320,
}


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a random model."""
    is_decoder = draw(st.booleans())
    after = st.just(0) if is_decoder else st.integers(0, 2)
    chunks = st.sampled_from([4, 6, 8])
    heads, size = draw(st.integers(1, 3)), draw(st.sampled_from([4, 8, 10]))
    first = draw(st.integers(1, 15))
    return SMALL | {
        "attn_layers": draw(st.lists(st.sampled_from(["local", "lsh"]), min_size=1, max_size=4)),
        "hidden_size": 16,
        "attention_head_size": size,
        "num_attention_heads": heads,
        "feed_forward_size": draw(st.integers(1, 40)),
        "axial_pos_embds": draw(st.booleans()),
        "axial_pos_shape": [8, 12],
        "axial_pos_embds_dim": [first, 16 - first],
        "max_position_embeddings": 96,
        "num_buckets": draw(st.sampled_from([2, 6, 8, [2, 4], [4, 2, 2]])),
        "num_hashes": draw(st.integers(1, 3)),
        "hash_seed": draw(st.integers(0, 2**32)),
        "lsh_attn_chunk_length": draw(chunks),
        "local_attn_chunk_length": draw(chunks),
        "lsh_num_chunks_before": draw(st.integers(0, 2)),
        "lsh_num_chunks_after": draw(after),
        "local_num_chunks_before": draw(st.integers(0, 2)),
        "local_num_chunks_after": draw(after),
        "chunk_size_feed_forward": draw(st.sampled_from([0, 1])),
        "hidden_act": draw(st.sampled_from(["relu", "gelu", "gelu_new"])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-5])),
        "is_decoder": is_decoder,
    }


def build(given: dict[str, Any], kind: str | None = None, seed: int = 0) -> Any:
    """A random model of transformers; kind: the class, by its name."""
    import transformers

    torch.manual_seed(seed)
    name = kind or ("ReformerModelWithLMHead" if given["is_decoder"] else "ReformerForMaskedLM")
    model = getattr(transformers, name)(transformers.ReformerConfig(**given)).eval()
    with torch.no_grad():  # they start at 1 and 0, which would hide mistakes
        for parameter in (p for p in model.parameters() if p.dim() == 1):
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(tokens, attention_mask=mask).logits


@contextmanager
def exactly(model: Any) -> Iterator[list[float]]:
    """Runs the model in float64 with the rotations that it draws in float32.

    In float32, theirs gives a token that meets nobody a row of attention that sums to 0.996 to 1.004: its
    logsumexp is taken near -1e5, where numbers lie 0.008 apart. Yields a list that gets the smallest relative
    distance of the two largest projections of each hash: near 0, rounding decides.
    """
    margins: list[float] = []
    layers = [module for module in model.modules() if hasattr(module, "_hash_vectors")]
    for layer in layers:
        layer._hash_vectors = _watched(layer, margins)
    try:
        yield margins
    finally:
        for layer in layers:
            del layer._hash_vectors
        model.float()


def _watched(layer: Any, margins: list[float]) -> Any:
    hash_vectors = layer._hash_vectors

    def hashed(vectors: Tensor, num_hashes: int, mask: Tensor | None, **beside: Any) -> Tensor:
        vectors = vectors.float()
        factors = [layer.num_buckets] if isinstance(layer.num_buckets, int) else layer.num_buckets
        torch.manual_seed(layer.hash_seed)
        heads, size = layer.num_attention_heads, vectors.shape[-1]
        rotations = torch.randn(heads, size, num_hashes, sum(factors) // 2)
        projected = torch.einsum("bmtd,mdhr->bmhtr", vectors, rotations)
        for part in projected.split([factor // 2 for factor in factors], dim=-1):
            first, second = torch.cat([part, -part], dim=-1).topk(2).values.unbind(-1)
            margins.append(((first - second) / vectors.norm(dim=-1).unsqueeze(2)).min().item())
        return hash_vectors(vectors, num_hashes, mask, **beside)

    return hashed
