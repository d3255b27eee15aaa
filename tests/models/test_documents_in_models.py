"""A model reads the documents of a row as it reads each alone: loss, gradients, logits and decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import EXACT, LOCAL, LSH, VOCAB, assert_grads_agree, random_tokens, shifted, small_model

from reformer_dist.config import CrossAttentionKind, NeighbourRule, Position, Recompute
from reformer_dist.models import ReformerEncoderDecoder, ReformerLM
from reformer_dist.models.decoding import DecodingState

LENGTHS = [14, 1, 29, 20]
"""Of the documents in each row."""
DOCUMENTS = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS)).expand(2, -1)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS]).expand(2, -1)
LAYERS: dict[str, Any] = {"layers": [LOCAL, LSH, EXACT, LSH], "head_dim": 16, "next_value_heads": 1}
TOKENS = random_tokens(2, sum(LENGTHS))
LABELS = torch.cat([shifted(part) for part in TOKENS.split(LENGTHS, dim=1)], dim=1)


@torch.no_grad()
def strong_model(**options: Any) -> ReformerLM:
    """A model whose attention matters, which it hardly does at initialization."""
    model = small_model(**options)
    for name, weight in model.named_parameters():
        if name.endswith("to_out.weight"):
            weight.mul_(5)
    return model


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("position", [Position.axial, Position.rotary])
def test_loss_and_gradients_are_those_of_each_alone(
    recompute: Recompute, causal: bool, position: Position
) -> None:
    options = {**LAYERS, "recompute": recompute, "causal": causal, "position": position, "local_round": True}
    options["qk_conv"] = 3 if causal else 0
    packed, alone = strong_model(**options), strong_model(**options)
    loss = packed(TOKENS, LABELS, document_ids=DOCUMENTS, position_ids=POSITIONS, step=3)
    loss.backward()
    losses = [
        alone(tokens, labels, step=3)
        for tokens, labels in zip(TOKENS.split(LENGTHS, dim=1), LABELS.split(LENGTHS, dim=1), strict=True)
    ]
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(loss, torch.stack(losses).sum(), rtol=1e-6, atol=0)
    assert_grads_agree(packed, alone, tolerance=1e-5)
    assert not torch.allclose(loss, packed(TOKENS, LABELS, position_ids=POSITIONS, step=3), rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_keys_of_their_own(causal: bool) -> None:
    model = strong_model(**LAYERS, shared_qk=False, causal=causal, qk_conv=4 if causal else 0).eval()
    loss = model(TOKENS, LABELS, document_ids=DOCUMENTS, position_ids=POSITIONS)
    parts = zip(TOKENS.split(LENGTHS, dim=1), LABELS.split(LENGTHS, dim=1), strict=True)
    alone = torch.stack([model(tokens, labels) for tokens, labels in parts]).sum()
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)


def test_rotary_positions_need_not_restart() -> None:
    model = strong_model(**LAYERS, position=Position.rotary).eval()
    loss = model(TOKENS, LABELS, document_ids=DOCUMENTS)
    torch.testing.assert_close(loss, model(TOKENS, LABELS, document_ids=DOCUMENTS, position_ids=POSITIONS))


@torch.no_grad()
def test_other_documents_change_no_bit() -> None:
    model = small_model(**LAYERS, qk_conv=3).eval()
    other = torch.where(DOCUMENTS == 2, TOKENS, random_tokens(2, sum(LENGTHS), seed=1))
    before, after = (model(tokens, document_ids=DOCUMENTS) for tokens in (TOKENS, other))
    assert torch.equal(before[DOCUMENTS == 2], after[DOCUMENTS == 2])
    assert not torch.equal(before, after)


@torch.no_grad()
@pytest.mark.parametrize(("padding", "n_more"), [(0, 12), (5, LENGTHS[-1] - 1)])
@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize(("position", "shared_qk"), [("axial", True), ("rotary", True), ("axial", False)])
def test_decoding_continues_the_last_document(
    padding: int, n_more: int, restarts: bool, position: str, shared_qk: bool
) -> None:
    options = {"local_round": True, "position": Position(position), "shared_qk": shared_qk, "qk_conv": 4}
    model = small_model(**LAYERS, **options).eval()
    mask = torch.arange(sum(LENGTHS)) >= torch.tensor([[padding], [0]])
    given = {"position_ids": POSITIONS} if restarts else {}
    whole = model(TOKENS, document_ids=DOCUMENTS, key_padding_mask=mask, **given)
    n_prompt = sum(LENGTHS) - n_more
    state = DecodingState(model.config)
    prompt = {name: x[:, :n_prompt] for name, x in {"document_ids": DOCUMENTS, **given}.items()}
    logits = [model(TOKENS[:, :n_prompt], key_padding_mask=mask[:, :n_prompt], sequence=state, **prompt)]
    swap = torch.tensor([1, 0])
    for number, token in enumerate(TOKENS[:, n_prompt:].split(1, dim=1)):
        if number == 6:
            state.select_rows(swap)
            state.select_rows(swap)
        logits.append(model(token, sequence=state))
    torch.testing.assert_close(torch.cat(logits, dim=1)[mask], whole[mask], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"document_ids: .*last document"):
        model(TOKENS[:, :1], sequence=state, document_ids=DOCUMENTS[:, :1])


@torch.no_grad()
def test_restarted_positions_may_exceed_the_table_in_sum() -> None:
    model = small_model(axial_shape=[8, 8]).eval()  # 64 positions
    state = DecodingState(model.config)
    model(TOKENS, sequence=state, document_ids=DOCUMENTS, position_ids=POSITIONS)
    assert model(TOKENS[:, :1], sequence=state).isfinite().all()  # position 20, not 64
    with pytest.raises(ValueError, match="position_ids=64"):
        model(TOKENS, position_ids=POSITIONS + 64 - POSITIONS.max())
        model(TOKENS, position_ids=POSITIONS + 65 - POSITIONS.max())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (DOCUMENTS.flip(1), "document_ids: .*decrease"),
        (DOCUMENTS[:, 1:], "document_ids.shape"),
        (DOCUMENTS[0], "document_ids.shape"),
        ([[0]], "document_ids: "),
    ],
)
def test_wrong_document_ids(ids: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        small_model()(TOKENS, document_ids=ids)


@pytest.mark.parametrize("name", ["document_ids", "position_ids"])
def test_an_encoder_decoder_refuses_documents(name: str) -> None:
    model = ReformerEncoderDecoder(small_model(cross_attention=CrossAttentionKind.lsh).config, VOCAB)
    with pytest.raises(ValueError, match=f"{name}: .*encoder-decoder"):
        model(TOKENS, TOKENS, **{name: DOCUMENTS})


def test_chunks_refuse_documents() -> None:
    model: ReformerLM = small_model(neighbours=NeighbourRule.chunk)
    with pytest.raises(ValueError, match=r"document_ids: .*WindowRule"):
        model(TOKENS, document_ids=DOCUMENTS)
