"""Trained models in use: `load`, and what the commands that use a model share.

`predictor` is the object that `load` returns, `results` what it predicts, `continuation` generates texts. This
file imports no more than the library does until a model is loaded.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from reformer_dist.inference.predictor import Predictor

__all__ = ["load"]


def load(
    path: str | PathLike[str],
    *overrides: str,
    device: str | torch.device | None = None,
    average: bool = False,
    best: bool = False,
) -> Predictor:
    """Loads a run directory (its newest intact checkpoint), a checkpoint, an export or a converted model.

    overrides: settings that do not change the weights, such as "model.n_hashes=8". device: by default the GPU if
    there is one. average, best: use the average of the weights, or the best checkpoint. Raises UserError.
    """
    from reformer_dist.inference.predictor import load_predictor

    return load_predictor(path, overrides, device, average=average, best=best)
