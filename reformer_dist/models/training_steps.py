"""Modules that count their own training forwards, for calls without `step`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from reformer_dist.config import AttentionKind, CrossAttentionKind, ModelConfig


class CountsSteps(nn.Module):
    """Numbers its training forwards from 0. The count is in the state dict as soon as there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.next_step = 0
        """Step of the next training forward that is called without one."""

    def count_step(self) -> int:
        """The step of this training forward. Raises RuntimeError in a backward pass, which repeats a forward."""
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "step=None: a training forward in a backward pass, such as in torch.utils.checkpoint, would draw "
                "other rotations than the forward that it repeats; pass step"
            )
        self.next_step += 1
        return self.next_step - 1

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.next_step:
            destination[f"{prefix}next_step"] = torch.tensor(self.next_step, device="cpu")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        count = state_dict.pop(f"{prefix}next_step", None)
        if count is not None:
            self.next_step = int(count)
        super()._load_from_state_dict(state_dict, prefix, *args)


def draws_rotations(
    config: ModelConfig, kinds: Sequence[AttentionKind], *, has_cross_attention: bool = False
) -> bool:
    """Whether layers of these kinds hash with rotations that are drawn anew in each training step."""
    hashes_source = has_cross_attention and config.cross_attention is CrossAttentionKind.lsh
    return config.compat.hash_seed is None and (AttentionKind.lsh in kinds or hashes_source)
