"""Imported language models of reformer_pytorch have equal logits with equal rotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reformer_dist.errors import CheckpointError
from reformer_dist.interop import reformer_pytorch
from reformer_dist.models import ReformerLM, attention

theirs = pytest.importorskip("reformer_pytorch")

TOLERANCE = 1e-4
SMALL: dict[str, Any] = {
    "num_tokens": 40,
    "dim": 24,
    "depth": 2,
    "max_seq_len": 64,
    "heads": 2,
    "dim_head": 8,
    "bucket_size": 8,
    "n_hashes": 3,
    "causal": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "axial": {"axial_position_emb": True},
    "axial of another shape": {"axial_position_emb": True, "axial_position_shape": [4, 16], "causal": False},
    "learned": {"absolute_position_emb": True},
    "sinusoidal": {"fixed_position_emb": True, "causal": False},
    "gated": {"ff_glu": True, "ff_mult": 2, "ff_chunks": 3},
    "one value head": {"one_value_head": True, "random_rotations_per_head": True},
    "tied layers": {"weight_tie": True, "depth": 3, "layer_dropout": 0.3},
    "scale norm": {"use_scale_norm": True},
    "rezero": {"use_rezero": True, "use_scale_norm": True},
    "rezero, tied layers and one value head": {"use_rezero": True, "weight_tie": True, "one_value_head": True},
    "scale norm, tied layers and all narrow": {"use_scale_norm": True, "weight_tie": True, "emb_dim": 10},
    "tied embedding": {"weight_tie_embedding": True},
    "narrow embedding": {"emb_dim": 10},
    "narrow, tied and axial": {"emb_dim": 10, "weight_tie_embedding": True, "axial_position_emb": True},
    "narrow and sinusoidal": {"emb_dim": 10, "fixed_position_emb": True},
    "exact": {"use_full_attn": True, "absolute_position_emb": True},
    "exact, two-sided": {"use_full_attn": True, "absolute_position_emb": True, "causal": False},
}


def build(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = theirs.ReformerLM(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Saves state dict and arguments as docs/interop.md describes."""
    folder.mkdir(exist_ok=True)
    save_file({name: x.clone() for name, x in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**SMALL, **options}))
    return folder


def same_rotations(monkeypatch: pytest.MonkeyPatch, *, is_rotary: bool) -> None:
    """Both draw from one generator, layer by layer; their rotations are the same for all heads and rows."""

    generate = torch.randn

    def drawn(seed: int, head_dim: int, n_hashes: int, columns: int) -> Tensor:
        return generate(head_dim, n_hashes, columns, generator=torch.Generator().manual_seed(seed))

    def ours(n_heads: int, head_dim: int, n_hashes: int, n_buckets: int, *_: Any, **__: Any) -> Tensor:
        ours.calls += 1
        rotations = drawn(ours.calls, head_dim, n_hashes, n_buckets // 2).transpose(0, 1)
        if is_rotary:  # channels of a head are in another order here
            rotations = torch.cat([rotations[:, 0::2], rotations[:, 1::2]], dim=1)
        return rotations.expand(n_heads, -1, -1, -1).contiguous()

    def randn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        randn.calls += 1
        return drawn(randn.calls, *shape[1:]).to(dtype).expand(shape)

    ours.calls = randn.calls = 0
    monkeypatch.setattr(attention, "draw_rotations", ours)
    monkeypatch.setattr(theirs.reformer_pytorch.torch, "randn", randn)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_same_logits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = KINDS[kind]
    there = build(**options)
    found = reformer_pytorch.read(save(there, tmp_path / "there", **options))
    mine = ReformerLM(found.config, found.vocab_size).eval()
    mine.load_state_dict(found.weights)
    tokens = torch.randint(0, 40, (2, 64), generator=torch.Generator().manual_seed(1))
    is_rotary = not any(name.endswith("position_emb") for name in options)
    with monkeypatch.context() as patched:
        same_rotations(patched, is_rotary=is_rotary)
        logits = mine(tokens)
        # float64, since in float32 their attention row of a query without keys does not sum to 1
        right = there.double()(tokens)
    assert (logits - right).abs().max() < TOLERANCE
    assert right.std() > 0.1


def test_wrapped_and_cast(tmp_path: Path) -> None:
    there = build()
    plain = reformer_pytorch.read(save(there, tmp_path / "plain"))
    wrapped = reformer_pytorch.read(save(theirs.Autopadder(there), tmp_path / "wrapped"))
    assert all(torch.equal(plain.weights[name], wrapped.weights[name]) for name in plain.weights)
    half = reformer_pytorch.read(save(there.half(), tmp_path / "half"))
    assert all(tensor.dtype == torch.float32 for tensor in half.weights.values())


REFUSED: dict[str, tuple[Any, str]] = {
    "n_local_attn_heads": (1, "layers"),
    "num_mem_kv": (4, "keys"),
    "pkm_layers": ([1], "product-key"),
    "use_scale_norm": ("yes", "bool"),
    "weight_tie": (1, "bool"),
    "layer_dropout": ("0.1", "float"),
    "use_full_attn": (True, "rotary"),
    "ff_activation": ("relu", "GELU"),
    "attends_twice": (1, "option"),
    "heads": ("two", "int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_without_counterpart(name: str, tmp_path: Path) -> None:
    value, reason = REFUSED[name]
    save(build(), tmp_path, **{name: value})
    with pytest.raises(CheckpointError) as caught:
        reformer_pytorch.read(tmp_path)
    assert name in str(caught.value) and reason in str(caught.value) and "config.json" in str(caught.value)


def test_states_that_do_not_fit(tmp_path: Path) -> None:
    def complains(*words: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            reformer_pytorch.read(tmp_path)
        for word in words:
            assert word in str(caught.value)

    save(build(), tmp_path, depth=3)
    complains("reformer.layers.blocks.2", "missing")
    save(build(), tmp_path, depth=1)
    complains("reformer.layers.blocks.1", "not in the model")
    save(build(), tmp_path, dim=32)
    complains("token_emb.weight", "[40, 24]", "[40, 32]")
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    complains("token_emb.weight", "ReformerLM")
    (tmp_path / "model.safetensors").unlink()
    torch.save(build(), tmp_path / "model.pt")  # a module, whose pickle names classes
    complains("model.pt", "can't be read as tensors", "state_dict")
    torch.save([1], tmp_path / "model.pt")
    complains("model.pt", "is no state dict")
    torch.save(build().state_dict(), tmp_path / "model.bin")
    complains("model.bin, model.pt must be left")


def test_a_state_dict_of_torch_save_is_read_as_safetensors_are(tmp_path: Path) -> None:
    save(build(), tmp_path)
    expected = reformer_pytorch.read(tmp_path).weights
    (tmp_path / "model.safetensors").unlink()
    torch.save(build().state_dict(), tmp_path / "model.pt")
    found = reformer_pytorch.read(tmp_path).weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_options_that_affect_training_only_are_noted(tmp_path: Path) -> None:
    save(build(), tmp_path, layer_dropout=0.1, full_attn_thres=32, ff_dropout=0.2, lsh_dropout=0.3)
    found = reformer_pytorch.read(tmp_path)
    assert (found.config.ff_dropout, found.config.attention_dropout, found.config.layer_drop) == (0.2, 0.3, 0.1)
    for word in ("layer_dropout", "full_attn_thres", "n_buckets=8"):
        assert any(word in note for note in found.notes)
