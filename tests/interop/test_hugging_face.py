"""Random models of transformers and ours have equal logits, imported and exported."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hugging_face_models import CRIME_AND_PUNISHMENT, ENWIK8, SMALL, build, exactly, logits, options
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from reformer_dist.errors import CheckpointError
from reformer_dist.interop import hugging_face
from reformer_dist.interop.foreign import ForeignModel
from reformer_dist.interop.to_hugging_face import model_files
from reformer_dist.models import ReformerLM

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
SMALLEST_MARGIN = 1e-5


def converted(model: Any) -> ForeignModel:
    """Imports the files that their model saves."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return hugging_face.read(Path(folder))


def ours(found: ForeignModel) -> ReformerLM:
    model = ReformerLM(found.config, found.vocab_size).eval()
    model.load_state_dict(found.weights)
    return model


def theirs(model: ReformerLM) -> Any:
    """Exports our model to theirs."""
    named, tensors = model_files(model.config, model.state_dict(), model.vocab_size)
    kind = getattr(transformers, named["architectures"][0])
    there = kind(transformers.ReformerConfig(**named, use_cache=False)).eval()
    there.load_state_dict(tensors)
    return there


def tokens_of(vocab_size: int, seq_len: int, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab_size, (2, seq_len), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(mine: ReformerLM, their_logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> float:
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    return (mine(tokens, key_padding_mask=mask) - their_logits)[real].abs().max().item()


def padding(seq_len: int) -> Tensor:
    """One row without padding, and one that is about half padding."""
    return torch.arange(seq_len) < torch.tensor([[seq_len], [1 + seq_len // 2]])


@settings(max_examples=50)
@given(options(), st.integers(1, 96), st.integers(0, 2**16), st.booleans())
def test_any_model_both_ways(given: dict[str, Any], seq_len: int, seed: int, has_padding: bool) -> None:
    tokens = tokens_of(given["vocab_size"], seq_len, seed)
    mask = padding(seq_len) if has_padding else None
    model = build(given | {"initializer_range": 0.2}, seed=seed)
    mine = ours(converted(model))
    for there in (model, theirs(mine)):
        with exactly(there) as margins:
            right = logits(there.double(), tokens, mask)
        assume(min(margins, default=1.0) > SMALLEST_MARGIN)
        assert difference(mine, right, tokens, mask) < TOLERANCE


@settings(max_examples=10)
@given(options(), st.integers(1, 96), st.integers(0, 2**16))
def test_a_freshly_initialized_model_in_float32(given: dict[str, Any], seq_len: int, seed: int) -> None:
    """With their initialization, their float32 logits are accurate enough."""
    tokens, mask, model = tokens_of(given["vocab_size"], seq_len, seed), padding(seq_len), build(given, seed=seed)
    assert difference(ours(converted(model)), logits(model, tokens, mask), tokens, mask) < TOLERANCE


@pytest.mark.parametrize("given", [ENWIK8, CRIME_AND_PUNISHMENT], ids=["enwik8", "crime and punishment"])
def test_the_published_patterns(given: dict[str, Any]) -> None:
    model = build(given)
    mine = ours(converted(model))
    for seq_len in (7, 16, 100, 128):
        tokens = tokens_of(given["vocab_size"], seq_len)
        assert difference(mine, logits(model, tokens), tokens) < TOLERANCE
        assert (logits(theirs(mine), tokens) - logits(model, tokens)).abs().max() < TOLERANCE


def test_the_period_of_layers_is_detected() -> None:
    assert [kind.name for kind in converted(build(ENWIK8)).config.layers] == ["local", "local", "lsh", "local"]
    assert ours(converted(build(ENWIK8))).config.layer_kinds()[6].name == "lsh"


def test_default_buckets_match_theirs() -> None:
    for seq_len, chunk_len, longest in ((96, 8, 96), (4096, 64, 4096), (65536, 64, 65536), (128, 16, 2048)):
        given = SMALL | {
            "num_buckets": None,
            "lsh_attn_chunk_length": chunk_len,
            "max_position_embeddings": longest,
        }
        layer = build(given).reformer.encoder.layers[1].attention.self_attention
        layer._set_num_buckets(seq_len)
        right = layer.num_buckets
        found = hugging_face.buckets_for(seq_len, chunk_len, longest)
        assert found == ([right] if isinstance(right, int) else right)
    notes = converted(build(SMALL | {"num_buckets": None})).notes
    assert any("num_buckets" in note for note in notes)


REFUSED: dict[str, tuple[Any, str]] = {
    "model_type": ("bert", "must be reformer"),
    "hidden_act": ("tanh", "relu"),
    "attn_layers": (["lsh", "full"], "local and lsh"),
    "num_buckets": ([3, 4], "even"),
    "axial_pos_embds_dim": ([8, 8], "hidden_size=32"),
    "hidden_size": ("wide", "int"),
    "tie_word_embeddings": (True, "tie_word_embeddings"),
    "num_hidden_layers": (4, "2"),
    "add_cross_attention": (True, "false"),
    "is_encoder_decoder": (True, "false"),
    "pruned_heads": ({"0": [1]}, "empty"),
    "lsh_attn_chunk_lenght": (8, "did you mean lsh_attn_chunk_length?"),
    "quantization_config": ({"bits": 4}, "no such option"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(name: str, tmp_path: Path) -> None:
    value, reason = REFUSED[name]
    build(SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(CheckpointError) as caught:
        hugging_face.read(tmp_path)
    assert name in str(caught.value) and reason in str(caught.value) and str(path) in str(caught.value)


def test_every_option_of_theirs_is_known(tmp_path: Path) -> None:
    """Also those that save_pretrained leaves out at their defaults, and those of published models."""
    build(SMALL).save_pretrained(tmp_path)
    right = hugging_face.read(tmp_path).config
    path = tmp_path / "config.json"
    published = {
        "attention_probs_dropout_prob": 0.1,
        "intermediate_size": 3072,
        "num_chunks_after": 0,
        "num_chunks_before": 1,
        "output_past": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 100}},
    }
    every = transformers.ReformerConfig(**json.loads(path.read_text())).to_dict()
    path.write_text(json.dumps(every | published))
    assert hugging_face.read(tmp_path).config == right


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_classifiers_without_a_softmax_are_refused(problem_type: str, tmp_path: Path) -> None:
    """As one class of several, a single output had the loss 0, and independent labels became exclusive."""
    build(SMALL | {"problem_type": problem_type}, "ReformerForSequenceClassification").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf'problem_type="{problem_type}": .*single_label_classification'):
        hugging_face.read(tmp_path)
    build(SMALL | {"num_labels": 1}, "ReformerForSequenceClassification").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"classifier\.out_proj .*regression"):
        hugging_face.read(tmp_path)
    build(SMALL | {"problem_type": problem_type}).save_pretrained(tmp_path)  # without effect in a language model
    assert hugging_face.read(tmp_path).vocab_size == SMALL["vocab_size"]


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    def complains(*words: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            hugging_face.read(tmp_path)
        for word in words:
            assert word in str(caught.value)

    complains("config.json", "missing")
    (tmp_path / "config.json").write_text("{")
    complains("config.json", "read")
    build(SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    right = json.loads(path.read_text())
    path.write_text(json.dumps(right | {"feed_forward_size": 41}))
    complains("feed_forward.dense.dense.weight", "[40, 32]", "[41, 32]")
    path.write_text(json.dumps(right | {"attn_layers": ["local", "lsh", "lsh"], "num_hidden_layers": 3}))
    complains("tensor reformer.encoder.layers.2", "missing")
    path.write_text(json.dumps(right | {"attn_layers": ["local"], "num_hidden_layers": 1}))
    complains("reformer.encoder.layers.1", "tensor")
    path.write_text(json.dumps(right))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    complains("model.safetensors", "read")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    complains("pytorch_model.bin", "can't be read as tensors", "state_dict")
    (tmp_path / "pytorch_model.bin").unlink()
    complains(str(tmp_path), "model.safetensors")
    transformers.ReformerModel(transformers.ReformerConfig(**SMALL)).save_pretrained(tmp_path)
    complains("no head")


def test_what_theirs_can_not_express() -> None:
    from reformer_dist.config import ModelConfig

    model = ReformerLM(ModelConfig(dim=32, n_layers=2, n_heads=2), 50)
    with pytest.raises(CheckpointError) as caught:
        model_files(model.config, model.state_dict(), 50)
    for key in ("compat.merge_streams", "neighbours", "compat.chunk_wrap", "compat.local_chunk_len"):
        assert f"model.{key}: " in str(caught.value)
    config = ModelConfig(dim=32, n_layers=2, n_heads=2, shared_qk=False, qk_conv=3)
    with pytest.raises(CheckpointError, match=r"model\.shared_qk: .*true(.|\n)*model\.qk_conv: .*0"):
        model_files(config, ReformerLM(config, 50).state_dict(), 50)
