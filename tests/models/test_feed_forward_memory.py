"""ff_chunk bounds the feed-forward activations that a reversible layer's recompute keeps."""

from __future__ import annotations

import torch
from model_helpers import random_tokens, shifted, small_model
from torch import Tensor

from reformer_dist.config import Recompute


class Kept:
    """A tensor saved for backward, counted while it is alive."""

    bytes = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Kept.bytes += tensor.nbytes
        Kept.most = max(Kept.most, Kept.bytes)

    def __del__(self) -> None:
        Kept.bytes -= self.tensor.nbytes


def most_kept_in_backward(ff_chunk: int) -> int:
    model = small_model(recompute=Recompute.reversible, ff_mult=32, ff_chunk=ff_chunk, ff_dropout=0.1)
    tokens = random_tokens(2, 128)
    loss = model(tokens, shifted(tokens), step=0, dropout_seed=1)
    Kept.bytes = Kept.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        loss.backward()
    return Kept.most


def test_chunks_of_the_feed_forward_are_kept_one_at_a_time() -> None:
    whole, in_eighths = most_kept_in_backward(0), most_kept_in_backward(16)
    assert whole / 8 <= in_eighths <= whole / 5
