"""Cases of test_documents_on_ranks.py: documents in rows that ranks share, against each document alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from exchange_cases import own_slice
from slice_checks import check_training
from torch import Tensor

from reformer_dist.config import AttentionKind, ModelConfig
from reformer_dist.data import positions_in_documents
from reformer_dist.distributed.mesh import make_mesh
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.models import ReformerLM
from reformer_dist.models.sequence import SequenceAccess, WholeSequence
from reformer_dist.ops.exact_attention import ExactOptions
from reformer_dist.ops.lsh import AttentionOptions, WindowRule
from reformer_dist.parallel import SlicedSequence
from reformer_dist.training.batches import MicroBatch

LENGTHS = [37, 1, 27, 64, 66, 62]
"""Of the documents in a row of 257 tokens, which no number of ranks divides. Some begin where a rank's slice
does."""
N_HEADS, N_ROUNDS, N_BUCKETS, VOCAB = 4, 2, 4, 40
DOCUMENTS = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)).unsqueeze(0)
WHOLE = WholeSequence()


def attend(
    kind: str,
    sequence: SequenceAccess,
    q: Tensor,
    v: Tensor,
    ids: Tensor,
    documents: Tensor | None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of one kind of layer: with keys q (exact, local) or of a shared query-key (lsh)."""
    if kind == "exact":
        return sequence.of_layer(0).exact_attention(q, q, v, ExactOptions(True, 0.0, 0, None, documents), mask)
    rule = WindowRule(20, causal=True, sees_self=kind.startswith("local"))
    backend = "native" if kind.endswith(" C") else "torch"
    options = AttentionOptions(rule, N_BUCKETS, 0.5, backend=backend, document_ids=documents)
    if kind.startswith("local"):
        ids, options = torch.zeros_like(ids[:, :, :1]), replace(options, n_buckets=1)
    exchange = sequence.make_exchange(ids, options, mask)
    return sequence.of_layer(0).bucket_attention(q, q if kind.startswith("local") else None, v, exchange)


def run_attention(job: Runtime, mesh: tuple[int, int], kind: str) -> None:
    """To the last bit by head exchange in C; to rounding where rounds are combined over ranks."""
    draw = torch.Generator().manual_seed(0)
    q, v = (torch.randn(1, N_HEADS, sum(LENGTHS), 16, generator=draw) for _ in range(2))
    ids = torch.randint(0, N_BUCKETS, (1, N_HEADS, N_ROUNDS, sum(LENGTHS)), generator=draw).to(torch.uint8)
    parts = zip(q.split(LENGTHS, dim=2), v.split(LENGTHS, dim=2), ids.split(LENGTHS, dim=3), strict=True)
    alone = torch.cat([attend(kind, WHOLE, *part, None) for part in parts], dim=2)

    sliced = SlicedSequence(make_mesh(job, *mesh), sum(LENGTHS))
    own_ids = own_slice(sliced, ids.transpose(2, 3)).transpose(2, 3).contiguous()
    documents, mask = sliced.take(DOCUMENTS, 2**31 - 1), sliced.key_padding_mask(1, q.device)
    found = attend(kind, sliced, own_slice(sliced, q), own_slice(sliced, v), own_ids, documents, mask)
    is_real = slice(None) if mask is None else mask[0]
    found, expected = found[:, :, is_real], own_slice(sliced, alone)[:, :, is_real]
    if mesh[1] == 1 and kind.endswith((" C", "exact")):
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def run_model(job: Runtime, mesh: tuple[int, int], per_round: bool) -> None:
    """Loss and every gradient of a model with all kinds of layers, and positions that restart."""
    kinds = [AttentionKind.local, AttentionKind.lsh, AttentionKind.exact]
    config = ModelConfig(
        dim=32, n_layers=3, n_heads=N_HEADS, head_dim=16, layers=kinds, n_buckets=4, window=12, local_window=10,
        next_value_heads=2, local_round=True, axial_shape=[16, 32],
    )  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (1, sum(LENGTHS)), generator=draw)
    labels = torch.randint(0, VOCAB, tokens.shape, generator=draw)
    model = ReformerLM(config, VOCAB, seed=2)
    parts = zip(tokens.split(LENGTHS, dim=1), labels.split(LENGTHS, dim=1), strict=True)
    expected = torch.stack([model(*part, step=3) for part in parts]).sum()
    rows = {"tokens": tokens, "labels": labels, "document_ids": DOCUMENTS.int()}
    rows["position_ids"] = torch.from_numpy(positions_in_documents(DOCUMENTS.numpy()))
    batch = MicroBatch.from_rows(rows, SlicedSequence(make_mesh(job, *mesh), tokens.shape[1], per_round=per_round))
    check_training(model, expected, batch, step=3)
