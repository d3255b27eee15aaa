"""Text from a causal model, token by token.

Each token costs a forward pass over what stands before it. Under the window rule this is exact: what is added
behind a text changes nothing before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingOptions:
    temperature: float = 0.8
    """0 takes the most probable token each time."""
    top_k: int = 0
    """Only the k most probable tokens; 0 means all."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this probability."""
    seed: int = 0


@torch.no_grad()
def generate(
    logits_of: Callable[[Tensor], Tensor], prompt: Tensor, n_tokens: int, options: SamplingOptions
) -> Iterator[int]:
    """Yields n_tokens token ids that go on from the prompt.

    logits_of maps tokens [1, S] to logits [1, S, V]; prompt [S] int64, at least one token.
    """
    generator = torch.Generator().manual_seed(options.seed)
    tokens = prompt.unsqueeze(0)
    for _ in range(n_tokens):
        logits = logits_of(tokens)[0, -1].float().cpu()
        token = pick_token(logits, options, generator)
        yield token
        tokens = torch.cat([tokens, tokens.new_tensor([[token]])], dim=1)


def pick_token(logits: Tensor, options: SamplingOptions, generator: torch.Generator) -> int:
    """One token id from logits [V]."""
    if options.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / options.temperature).softmax(-1)
    ranked, ids = probabilities.sort(descending=True)
    if options.top_k > 0:
        ranked, ids = ranked[: options.top_k], ids[: options.top_k]
    # a token stays while those before it have not yet reached top_p; the first always does
    reached = ranked.cumsum(0) - ranked
    ranked = ranked.masked_fill(reached >= options.top_p, 0.0)
    return int(ids[torch.multinomial(ranked, 1, generator=generator)])
